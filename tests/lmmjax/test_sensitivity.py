"""How much keys and values suffer: against NumPy in float64 and finite differences, and the command."""

import argparse
import json
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image
from small import CONFIG, encoded

from kernels.rope import rotate
from lmmjax import cache_flags, data, kv_error, kv_picture, likelihood, llava, plan, weights
from lmmjax import checkpoint as checkpoints
from lmmjax.attention import CachedAttention
from lmmjax.cache import empty_search_cache
from lmmjax.kv_error import SIDES, WIDTHS, Sensitivity
from lmmjax.kv_rounding import Sides, given_back, positions, turned
from lmmjax.plan import CacheFormat
from lmmjax.sensitivity import main

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
TEXT = CONFIG.text
FORM = CacheFormat(group=4)


@pytest.fixture(scope="module")
def params() -> llava.Params:
    return llava.init(CONFIG, jax.random.key(0))


def measured(params: llava.Params, samples: data.Encoded, form: CacheFormat = FORM, size: int = 8) -> Sensitivity:
    return kv_error.gather(list(kv_error.sums(CONFIG, params, samples, form, size)))


@pytest.fixture(scope="module")
def found(params: llava.Params) -> Sensitivity:
    return measured(params, encoded(6))


def one_batch(params: llava.Params) -> likelihood.Batch:
    (batch,) = likelihood.batches(CONFIG, params, encoded(6), 6)
    return batch


def rounding(params: llava.Params, batch: likelihood.Batch, bits: int):
    """Every layer's change under rounding, as (keys after RoPE, values), and the loss's slopes by them."""
    _, seen, slopes = kv_error.gradients(CONFIG, params, batch)
    real = (jnp.arange(batch.x.shape[1]) < batch.lengths[:, None])[:, None, :, None]
    turn = llava.turn(CONFIG, positions(batch))
    moved = []
    for layer in seen:
        held = given_back(CONFIG, FORM, jnp.int32(bits), layer.kv, batch)
        moved.append([jnp.where(real, x - old, 0) for x, old in zip(held, turned(layer.kv, turn), strict=True)])
    return moved, [turned(pair, turn) for pair in slopes]


@pytest.mark.parametrize("side", range(2), ids=SIDES)
@pytest.mark.parametrize("layer", range(TEXT.layers))
def test_the_slopes_are_those_of_the_loss(params: llava.Params, layer: int, side: int):
    """Along one layer's rounding error the loss rises as fast as sum dx * dloss/dx says."""
    batch = one_batch(params)
    moved, slopes = rounding(params, batch, 3)

    cos, sin = llava.turn(CONFIG, positions(batch))
    along = moved[layer][side] if side else rotate(moved[layer][side], (cos, -sin))  # probes come before RoPE

    @jax.jit
    def loss(t: float) -> jax.Array:
        probes = [[jnp.zeros_like(x) for x in pair] for pair in moved]
        probes[layer][side] = t * along
        return kv_error.loss(tuple(Sides(*pair) for pair in probes), CONFIG, params, batch)[0]

    slope = float(loss(0.1) - loss(-0.1)) / 0.2
    assert slope == pytest.approx(float(jnp.sum(moved[layer][side] * slopes[layer][side])), rel=0.02, abs=2e-5)
    assert abs(slope) > 1e-4


def test_the_loss_is_that_of_the_model_without_probes(params: llava.Params, found: Sensitivity):
    samples, losses = encoded(6), []
    x = llava.embed_prompts(CONFIG, params, samples.tokens, samples.lengths, samples.pixels)
    b, t = samples.tokens.shape
    mask = jnp.broadcast_to(jnp.tril(jnp.ones((t, t), bool)), (b, t, t))
    states = llava.forward(CONFIG, params, x, jnp.broadcast_to(jnp.arange(t), (b, t)), mask)
    predicted = np.asarray(jax.nn.log_softmax(llava.logits(CONFIG, params, states)))
    for row in range(b):
        at = np.flatnonzero(samples.is_answer[row])
        losses.append(-np.mean(predicted[row, at - 1, samples.tokens[row, at]]))
    assert found.loss == pytest.approx(np.mean(losses), rel=1e-5)


def test_the_change_is_the_mean_over_samples_of_the_sum_of_magnitudes(params: llava.Params, found: Sensitivity):
    batch = one_batch(params)
    for column, bits in enumerate(WIDTHS):
        for layer, (moved, slopes) in enumerate(zip(*rounding(params, batch, bits), strict=True)):
            for side, dx, slope in zip(SIDES, moved, slopes, strict=True):
                each = np.abs(np.asarray(dx, np.float64) * np.asarray(slope, np.float64)).sum((1, 2, 3))
                assert found.change[side][layer, column] == pytest.approx(each.mean(), rel=5e-4)


def half(x: np.ndarray, towards: float) -> np.ndarray:
    """The nearest float16 on that side."""
    near = x.astype(np.float16)
    beyond = near > x if towards < 0 else near < x
    return np.where(beyond, np.nextafter(near, np.float16(towards)), near).astype(np.float64)


def rounded(x: np.ndarray, bits: int, axis: int) -> np.ndarray:
    """Groups along an axis on even levels from their least to their largest, these two in float16, rounded outwards."""
    zero = half(x.min(axis, keepdims=True), -np.inf)
    step = half(x.max(axis, keepdims=True) - zero, np.inf) / (2**bits - 1)
    return zero + np.round((x - zero) / step) * step


def with_rope(x: np.ndarray) -> np.ndarray:
    """Rotary embedding of (heads, tokens, channels)."""
    half = TEXT.head_dim // 2
    angle = np.arange(x.shape[1])[:, None] / TEXT.rope_theta ** (np.arange(half) / half)
    low, high = x[..., :half], x[..., half:]
    return np.concatenate([low * np.cos(angle) - high * np.sin(angle), high * np.cos(angle) + low * np.sin(angle)], -1)


def attention(q: np.ndarray, k: np.ndarray, v: np.ndarray) -> np.ndarray:
    k, v = (np.repeat(x, TEXT.heads // TEXT.kv_heads, axis=0) for x in (k, v))
    scores = q @ k.transpose(0, 2, 1) / np.sqrt(TEXT.head_dim)
    scores = np.where(np.tril(np.ones(scores.shape[1:], bool)), scores, -np.inf)
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    return weights / weights.sum(-1, keepdims=True) @ v


def first_layer(params: llava.Params, samples: data.Encoded):
    """Yields q, k and v of the first layer for every sample, without its padding."""
    layer = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), params["text"]["layers_0"])
    embedded = llava.embed_prompts(CONFIG, params, samples.tokens, samples.lengths, samples.pixels)
    for x, length in zip(np.asarray(embedded, np.float64), samples.lengths, strict=True):
        x = x[:length]
        normed = x / np.sqrt((x**2).mean(-1, keepdims=True) + TEXT.eps) * layer["attn_norm"]["scale"]
        q, k, v = (
            (normed @ layer["attn"][name]["kernel"]).reshape(length, -1, TEXT.head_dim).transpose(1, 0, 2)
            for name in "qkv"
        )
        yield with_rope(q), with_rope(k), v


@pytest.mark.parametrize("bits", WIDTHS)
def test_the_error_of_the_attention_is_that_of_its_formula(params: llava.Params, found: Sensitivity, bits: int):
    """On a single layer in NumPy and float64."""
    group, sums = FORM.group, np.zeros(3)
    for q, k, v in first_layer(params, encoded(6)):
        whole = k.shape[1] // group * group
        blocks = k[:, :whole].reshape(len(k), -1, group, TEXT.head_dim)
        rounded_k = np.concatenate([rounded(blocks, bits, 2).reshape(len(k), whole, -1), k[:, whole:]], axis=1)
        rounded_v = rounded(v.reshape(*v.shape[:2], -1, group), bits, 3).reshape(v.shape)
        exact = attention(q, k, v)
        outs = (attention(q, rounded_k, v), attention(q, k, rounded_v))
        sums += [*(((out - exact) ** 2).sum() for out in outs), (exact**2).sum()]
    for side, error in zip(SIDES, sums, strict=False):
        assert found.error[side][0, WIDTHS.index(bits)] == pytest.approx(np.sqrt(error / sums[2]), rel=1e-3)


FORMATS = [
    {},
    {"group": 8, "value_group": 2},
    {"sinks": 3},
    {"key_axis": "channels"},
    {"keys": "before_rope"},
    {"rotate_keys": True, "rotate_values": "online"},
    {"visual_values": "tokens", "sinks": 2},
    {"clip": True, "metadata": "float8"},
    {"codebook": "normal", "metadata": "float8"},
]


@pytest.mark.parametrize("options", FORMATS, ids=str)
def test_what_is_given_back_is_what_the_cache_gives_back(params: llava.Params, options: dict):
    """The last query of each row sees in a real cache what is measured here, in every format."""
    form = CacheFormat(**{"group": 4, "dtype": "float32", **options})
    batch, bits = one_batch(params), jnp.int32(3)
    b, t = batch.x.shape[:2]
    _, seen, _ = kv_error.gradients(CONFIG, params, batch)
    turn = llava.turn(CONFIG, positions(batch))
    cache = empty_search_cache(TEXT, form, *(jnp.full(TEXT.layers, bits),) * 2, b, t).mark(batch.visual, batch.lengths)
    every = llava.turn(CONFIG, jnp.arange(cache.capacity)[None])
    attend = CachedAttention(*cache.layers[1], cache.lengths, batch.lengths, cache.visual, every, form)
    expected, _ = attend(seen[1].q, *seen[1].kv, turn)
    held = given_back(CONFIG, form, bits, seen[1].kv, batch)
    for row, length in enumerate(batch.lengths):
        q, k, v = (np.asarray(x[row, :, :length], np.float64) for x in (rotate(seen[1].q, turn), *held))
        np.testing.assert_allclose(attention(q, k, v)[:, -1], expected[row, :, length - 1], atol=1e-5)


def test_wider_hurts_less(found: Sensitivity):
    for measure in (found.error, found.change):
        for table in measure.values():
            assert table.shape == (TEXT.layers, len(WIDTHS))
            assert (table > 0).all()
            assert (np.diff(table, axis=1) > 0).all()


def test_keys_that_fill_no_group_stay_exact(params: llava.Params):
    found = measured(params, encoded(3), CacheFormat(group=8))
    assert (found.error["keys"] > 0).all()
    samples = encoded(3)
    assert samples.lengths.max() <= 16
    found = measured(params, samples, CacheFormat(group=32))
    assert (found.error["keys"] == 0).all()
    assert (found.change["keys"] == 0).all()


def test_the_rotation_of_values_costs_the_same_wherever_it_is_done(params: llava.Params):
    online, folded = (
        measured(params, encoded(3), CacheFormat(group=4, rotate_values=name)) for name in ("online", "folded")
    )
    np.testing.assert_array_equal(online.error["values"], folded.error["values"])


def test_window_and_dtype_of_the_cache_change_nothing(params: llava.Params, found: Sensitivity):
    other = measured(params, encoded(6), CacheFormat(group=4, window=8, dtype="float16", quantize_prefill=False))
    np.testing.assert_array_equal(other.error["keys"], found.error["keys"])
    np.testing.assert_array_equal(other.change["values"], found.change["values"])


def test_the_batch_changes_nothing(params: llava.Params, found: Sensitivity):
    """Neither its size nor the rows that fill the last one up."""
    other = measured(params, encoded(6), size=4)
    assert other.loss == pytest.approx(found.loss, rel=1e-5)
    for side in SIDES:
        np.testing.assert_allclose(other.error[side], found.error[side], rtol=1e-3)
        np.testing.assert_allclose(other.change[side], found.change[side], rtol=1e-3)


@pytest.fixture(autouse=True)
def keep_the_process_as_it_is(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    """What the command sets in the environment ends with the test, and it finds no network."""
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", str(tmp_path / "xla"))
    for name in ("XLA_PYTHON_CLIENT_PREALLOCATE", "TRANSFORMERS_NO_ADVISORY_WARNINGS"):
        monkeypatch.setenv(name, "1")

    def refuse(*_):
        raise AssertionError("the measurement looked for a network")

    monkeypatch.setattr("socket.socket.connect", refuse)


def test_the_command_writes_figures_and_picture(checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    out = tmp_path / "out"
    words = ["--model", str(checkpoint), "--samples", "5", "--batch", "2", "--group", "8", "--seed", "3"]
    assert main([*words, "--out", str(out)]) == 0
    shown = capsys.readouterr()
    assert "3/3" in shown.err  # batches
    written = json.loads((out / "sensitivity.json").read_text())
    model = checkpoints.load(checkpoint)
    settings = written["settings"]
    assert settings["weights"] == weights.digest(model.params).hexdigest()[:16]
    assert (settings["model"], settings["data"], settings["samples"], settings["seed"]) == ("model", "easy-vqa", 5, 3)
    assert settings["cache"]["group"] == 8
    assert written["about"]["command"].startswith("python -m lmmjax.sensitivity --model")
    assert "jax" in written["about"]["versions"]
    layers = model.config.text.layers
    for measure in ("attention_error", "loss_change"):
        for side in SIDES:
            table = np.array(written[measure][side])
            assert table.shape == (layers, len(written["bits"]))
            assert np.isfinite(table).all()
            for value in table[-1]:
                assert f"{value:.3g}" in shown.out
    with Image.open(out / "sensitivity.png") as picture:
        assert min(picture.size) > 500


def test_the_samples_are_those_that_a_search_calibrates_on(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    from search import sets

    asked, encode = [], data.encode
    monkeypatch.setattr(data, "encode", lambda processor, samples: asked.extend(samples) or encode(processor, samples))
    assert main(["--model", str(checkpoint), "--samples", "5", "--group", "8", "--out", str(tmp_path / "out")]) == 0
    same = sets.take("easy-vqa", 5, 4, 4, seed=0)
    assert asked == same.calibration
    more = sets.take("easy-vqa", 9, 4, 4, seed=0)
    assert {sample.image for sample in asked} <= {sample.image for sample in more.calibration}
    assert not {sample.image for sample in asked} & {sample.image for sample in (*more.search, *more.report)}


def test_a_picture_can_be_drawn_of_nothing_rounded():
    for tables in ([[0.0, 0.0]], [[0.0, 1e-3], [1e-5, 1e-2]]):
        sides = {"keys": [[0.0, 0.0]] * len(tables), "values": tables}
        assert kv_picture.draw({"bits": [4, 2], "loss_change": sides, "attention_error": sides}).startswith(b"\x89PNG")


def test_the_flags_of_the_cache_are_its_format():
    known = {name: choices for name, choices in plan.CHOICES.items() if name != "dtype"}
    assert {name: set(choices) for name, choices in cache_flags.CHOICES.items()} == {
        name: set(choices) for name, choices in known.items()
    }
    parser = argparse.ArgumentParser()
    cache_flags.add(parser)
    assert cache_flags.read(parser.parse_args([])) == CacheFormat()
    words = "--group 8 --value-group 4 --sinks 2 --keys before_rope --clip --metadata float8".split()
    expected = CacheFormat(8, 4, sinks=2, keys="before_rope", clip=True, metadata="float8", window=16)
    assert cache_flags.read(parser.parse_args(words), window=16) == expected
    assert cache_flags.read(parser.parse_args(["--codebook", "normal"])) == CacheFormat(codebook="normal")


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--samples", "0"], "--samples: got 0"),
        (["--samples", "999999"], "999999"),
        (["--batch", "0"], "--batch: got 0"),
        (["--seed", "-1"], "--seed: got -1"),
        (["--group", "0"], "got group 0"),
        (["--rotate-keys", "--keys", "before_rope"], "choose one of them"),
        (["--model", "nowhere"], "there is no directory nowhere"),
        (["--data", "nothing.jsonl"], "nothing.jsonl"),
        (["--out", "/proc/nowhere"], "--out: cannot write"),
    ],
)
def test_bad_input_ends_with_one_line_and_code_2(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], more: list[str], message: str
):
    assert main(["--model", str(checkpoint), "--samples", "2", "--out", str(tmp_path / "out"), *more]) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert line.startswith("error: ")
    assert message in line
    assert not (tmp_path / "out" / "sensitivity.json").exists()


def test_a_compressed_checkpoint_is_refused(checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    model = checkpoints.load(checkpoint)
    compressed = plan.uniform(model.config.text, bits=4)
    checkpoints.save(tmp_path / "model", model.params, like=checkpoint, plan=compressed)
    assert main(["--model", str(tmp_path / "model"), "--samples", "2", "--out", str(tmp_path / "out")]) == 2
    assert "is compressed already" in capsys.readouterr().err


def test_help_imports_nothing_heavy():
    code = (
        "import sys, lmmjax.sensitivity as s\ntry: s.main(['--help'])\nexcept SystemExit:"
        " print(sorted({'jax', 'flax', 'matplotlib', 'transformers', 'torch'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.splitlines()[-1] == "[]", done.stderr
