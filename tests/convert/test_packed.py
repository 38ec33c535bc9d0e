"""`python -m convert.export --packed`: the reader that the document gives finds the very weights."""

import re
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from convert import export
from convert.packed import export_packed
from lmmjax.pack import __main__ as pack

DOCUMENT = Path(__file__).parents[2] / "docs" / "weights.md"


@pytest.fixture(scope="module")
def read_packed():
    """The function in the document."""
    found = re.search(r"<!-- reader -->\n```python\n(.*?)```", DOCUMENT.read_text(), re.DOTALL)
    assert found
    scope: dict = {}
    exec(found[1], scope)
    return scope["read_packed"]


@pytest.mark.parametrize(
    ("model", "kind", "bits"),
    [
        ("bitmap", "bitmap", "32"),
        ("2:4", "2:4", "8"),
        ("bitmap", "bitmap", "4"),
        ("dense", "dense", "4"),
        ("permuted", "2:4", "4"),
    ],
    ids="-".join,
)
def test_the_documents_reader_finds_the_weights(pruned, read_packed, model, kind, bits, tmp_path):
    small = tmp_path / "small"
    words = ["--bits", bits, "--group", "16"] if bits != "32" else []
    assert pack.main(["--model", str(pruned[model]), "--weights", kind, *words, str(small)]) == 0
    assert export.main([str(small), str(tmp_path / "hf")]) == 0
    if kind == "2:4":
        export_packed(small, tmp_path / "packed", shard_bytes=2**14)
        assert len(list((tmp_path / "packed").glob("packed-*.safetensors"))) > 1
    else:
        assert export.main(["--packed", str(small), str(tmp_path / "packed")]) == 0
    found, expected = read_packed(tmp_path / "packed"), load_file(tmp_path / "hf" / "model.safetensors")
    assert {name for name in expected if "language_model" in name} <= found.keys()
    for name, array in found.items():
        np.testing.assert_array_equal(np.float32(array), np.float32(expected[name]), err_msg=name)
    if kind == "bitmap":
        sizes = [sum(f.stat().st_size for f in (tmp_path / name).glob("*.safetensors")) for name in ("packed", "hf")]
        assert sizes[0] < sizes[1]
