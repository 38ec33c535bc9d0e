"""Our cache beside Hugging Face's, run by transformers and optimum-quanto on the same random tiny LLaVA."""

from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_checkpoints import IMAGE_TOKEN

torch = pytest.importorskip("torch", reason="Hugging Face's cache is torch's")
from transformers.cache_utils import Cache, DynamicLayer, QuantoQuantizedLayer  # noqa: E402
from transformers.utils.import_utils import is_optimum_quanto_available  # noqa: E402

from benchmarks import kv_peers, kv_peers_torch  # noqa: E402
from benchmarks.kv_peers_torch import Quanto, RoundedAtOnce  # noqa: E402
from kernels.quantize import Quantizer, round_groups  # noqa: E402
from lmmjax import checkpoint as checkpoints  # noqa: E402
from lmmjax import likelihood, perplexity  # noqa: E402
from lmmjax.cache import empty_cache  # noqa: E402
from lmmjax.data import Encoded  # noqa: E402
from lmmjax.perplexity import Window  # noqa: E402
from lmmjax.plan import CacheFormat, LayerPlan, Plan, uniform  # noqa: E402

needs_quanto = pytest.mark.skipif(
    not is_optimum_quanto_available(), reason="Hugging Face's quantized cache needs optimum-quanto"
)
DENSE = (None, None)
HEAD_DIM, SAMPLES = 8, 6


@pytest.fixture(scope="module", autouse=True)
def readably() -> Iterator[None]:
    """Unpacks quanto's codes in torch: the C++ for it would first be compiled, for a minute and a half."""
    if not is_optimum_quanto_available():
        yield
        return
    from optimum.quanto.library.extensions import cpp

    def unpack(packed: torch.Tensor, bits: int) -> torch.Tensor:
        return torch.cat([packed >> at & (1 << bits) - 1 for at in range(0, 8, bits)])

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cpp.ext, "_lib", SimpleNamespace(unpack=unpack))
        yield


@pytest.fixture(scope="module")
def ours(checkpoint: Path) -> checkpoints.Checkpoint:
    return checkpoints.load(checkpoint, "float32")


@pytest.fixture(scope="module")
def theirs(checkpoint: Path):
    return kv_peers_torch.load(checkpoint)


@pytest.fixture(scope="module")
def windows() -> list[Window]:
    """Three windows of unequal length; in the last two the first tokens only serve as context."""
    ids = np.random.default_rng(5).integers(4, 260, (3, 64)).tolist()
    return [Window(0, ids[0], 1), Window(0, ids[1][:41], 20), Window(1, ids[2][:7], 3)]


@pytest.fixture(scope="module")
def questions() -> Encoded:
    """Samples of unequal length: some text, an image of four tokens, text, and answers of one to three tokens."""
    rng = np.random.default_rng(6)
    tokens = rng.integers(4, 260, (SAMPLES, 40)).astype(np.int32)
    tokens[:, 3:7] = IMAGE_TOKEN
    lengths, answers = rng.integers(24, 41, SAMPLES), rng.integers(1, 4, SAMPLES)
    at, ends = np.arange(40), lengths[:, None]
    return Encoded(
        tokens=np.where(at < ends, tokens, 0),
        lengths=lengths.astype(np.int32),
        is_answer=(at >= ends - answers[:, None]) & (at < ends),
        pixels=rng.standard_normal((SAMPLES, 3, 28, 28)).astype(np.float32),
        kinds=("any",) * SAMPLES,
    )


def predicted(ours: checkpoints.Checkpoint, plan: Plan, questions: Encoded) -> tuple[likelihood.Batch, np.ndarray]:
    """Returns all questions as one batch, and our log-probabilities of its counted tokens."""
    (batch,) = likelihood.batches(ours.config, ours.params, questions, size=SAMPLES)
    cache = empty_cache(ours.config.text, plan, SAMPLES, batch.x.shape[1])
    return batch, np.asarray(jax.jit(likelihood.log_probs, static_argnums=0)(ours.config, ours.params, cache, batch))


def dense(ours: checkpoints.Checkpoint) -> Plan:
    return uniform(ours.config.text, cache=CacheFormat(dtype="float32"))


def answers(theirs, layers: kv_peers_torch.Layers, questions: Encoded) -> list[np.ndarray]:
    return list(kv_peers_torch.answers(theirs, layers, questions))


def rms(x: np.ndarray) -> float:
    return float(np.sqrt(np.mean(np.square(x))))


def test_the_dense_caches_agree_on_text(ours, theirs, windows: list[Window]):
    want = perplexity.gather(list(kv_peers_torch.score(theirs, DENSE, windows)))
    scored = perplexity.score(ours.config, ours.params, dense(ours), windows, context=64)
    got = perplexity.gather(list(scored))
    np.testing.assert_array_equal(got.tokens, want.tokens)
    np.testing.assert_allclose(got.nll, want.nll, rtol=1e-5)


def test_the_dense_caches_agree_on_answers_about_images(ours, theirs, questions: Encoded):
    want = answers(theirs, DENSE, questions)
    batch, got = predicted(ours, dense(ours), questions)
    np.testing.assert_allclose(got[np.asarray(batch.counted)], np.concatenate(want), atol=1e-4)
    blind = Encoded(**{**vars(questions), "pixels": questions.pixels * 0})
    assert rms(np.concatenate(answers(theirs, DENSE, blind)) - np.concatenate(want)) > 0.01, "the image must matter"


@needs_quanto
def test_a_mix_of_layers_errs_as_ours_does_at_equal_bits(ours, theirs, questions: Encoded):
    layers = (Quanto(4, HEAD_DIM, dtype="float32"), None)
    exact, rounded = (np.concatenate(answers(theirs, mix, questions)) for mix in (DENSE, layers))
    # One group a token and head, along channels: what quanto's axis 0 makes of groups of head_dim.
    form = kv_peers.per_token(ours.config.text, dtype="float32")
    batch, own = predicted(ours, Plan((LayerPlan(4, 4), LayerPlan()), cache=form), questions)
    error, apart = rms(rounded - exact), rms(own[np.asarray(batch.counted)] - rounded)
    assert error > 0.01
    # The same groups and levels: only float16 metadata, rounded outwards, and the codes that it moves set them apart.
    assert apart < 0.15 * error


@needs_quanto
def test_kivis_scheme_and_quantos_default_err_alike(ours, theirs, questions: Encoded):
    reference = answers(theirs, DENSE, questions)
    quanto = kv_peers.compare(questions, reference, answers(theirs, (Quanto(4, HEAD_DIM), None), questions))
    plan = Plan((LayerPlan(4, 4), LayerPlan()), cache=kv_peers.kivi(HEAD_DIM, dtype="float32"))
    batch, own = predicted(ours, plan, questions)
    exact = predicted(ours, dense(ours), questions)[1]
    kl = np.asarray(likelihood.compare(batch, jnp.asarray(exact), jnp.asarray(own)).kl)
    # Other groups for the keys, and ours keeps those that are not full yet.
    assert np.sum(quanto.kl) / 4 < kl.sum() < np.sum(quanto.kl) * 2


@needs_quanto
def test_errors_follow_the_bits_of_each_layer(theirs, questions: Encoded):
    reference = answers(theirs, DENSE, questions)
    two, four = Quanto(2, HEAD_DIM), Quanto(4, HEAD_DIM)
    kl = {
        mix: kv_peers.compare(questions, reference, answers(theirs, mix, questions)).kl.sum()
        for mix in ((two, two), (two, four), (four, four), (four, None), (None, four), DENSE)
    }
    assert kl[two, two] > kl[two, four] > 5 * kl[four, four] > 5 * kl[four, None]
    assert kl[four, None] != kl[None, four] > 0
    assert kl[DENSE] == 0


@needs_quanto
def test_predictions_are_judged_as_likelihood_does(ours, theirs, questions: Encoded):
    reference, rounded = answers(theirs, DENSE, questions), answers(theirs, (Quanto(2, 8),) * 2, questions)
    # Some right answers: a random model has none.
    known = Encoded(**{**vars(questions), "tokens": questions.tokens.copy()})
    for row in range(0, SAMPLES, 2):
        known.tokens[row, known.is_answer[row]] = rounded[row].argmax(-1)
    (batch,) = likelihood.batches(ours.config, ours.params, known, size=SAMPLES)
    padded = [np.zeros((*batch.at.shape, reference[0].shape[-1]), np.float32) for _ in range(2)]
    for array, rows in zip(padded, (reference, rounded), strict=True):
        array[np.asarray(batch.counted)] = np.concatenate(rows)
    want = likelihood.compare(batch, *map(jnp.asarray, padded))
    got = kv_peers.compare(known, reference, rounded)
    np.testing.assert_allclose(got.kl, want.kl, rtol=1e-4)
    np.testing.assert_allclose(got.nll, want.nll, rtol=1e-5)
    np.testing.assert_array_equal(got.tokens, want.tokens)
    np.testing.assert_array_equal(got.correct, want.correct)
    assert got.correct.tolist()[::2] == [True] * 3
    with pytest.raises(ValueError, match="expected"):
        kv_peers.compare(known, [row[:0] for row in reference], rounded)


@needs_quanto
def test_transformers_own_layer_hides_the_error_of_the_prefill(theirs):
    ids = torch.arange(4, 44)[None]
    caches = [
        Cache(layers=[kind() for _ in range(2)])
        for kind in (DynamicLayer, lambda: QuantoQuantizedLayer(2, q_group_size=8), lambda: RoundedAtOnce(Quanto(2, 8)))
    ]
    with torch.inference_mode():
        exact, own, at_once = (theirs(input_ids=ids, cache=cache).logits for cache in caches)
    assert torch.equal(own, exact)
    assert not torch.allclose(at_once, exact, atol=0.1)


@needs_quanto
@pytest.mark.parametrize(("axis", "along"), [(0, "channels"), (-1, "tokens")])
@pytest.mark.parametrize("side", [0, 1], ids=["keys", "values"])
def test_what_an_axis_means(side: int, axis: int, along: str):
    tensor = np.random.default_rng(7).standard_normal((1, 3, 64, 32)).astype(np.float32)
    layer = RoundedAtOnce(Quanto(4, 16, axis, axis, "float32"))
    got = layer.update(torch.from_numpy(tensor), torch.from_numpy(tensor))[side].numpy()
    want = np.asarray(round_groups(jnp.asarray(tensor), 4, Quantizer(along, 16)))
    # Equal but for float16 metadata; with the other axis hardly any value would be this close.
    assert (np.abs(got - want) < 0.01).mean() > 0.98


@needs_quanto
def test_later_tokens_join_the_rounded_ones():
    layer = RoundedAtOnce(Quanto(4, 8, dtype="float32"))
    whole = torch.from_numpy(np.random.default_rng(8).standard_normal((1, 2, 12, HEAD_DIM), np.float32))
    want, _ = RoundedAtOnce(Quanto(4, 8, dtype="float32")).update(whole, whole)
    layer.update(whole[:, :, :10], whole[:, :, :10])
    layer.update(whole[:, :, 10:11], whole[:, :, 10:11])
    got, _ = layer.update(whole[:, :, 11:], whole[:, :, 11:])
    torch.testing.assert_close(got, want)
    assert layer.get_seq_length() == 12


@needs_quanto
def test_groups_along_tokens_must_fill_up():
    tensor = torch.ones(1, 3, 33, HEAD_DIM)
    with pytest.raises(ValueError, match="must be a divisor"):
        RoundedAtOnce(Quanto(4, 32, key_axis=-1)).update(tensor, tensor)


@needs_quanto
@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
@pytest.mark.parametrize("group", [8, 16])
@pytest.mark.parametrize("bits", [2, 4])
def test_the_bytes_of_real_tensors(theirs, bits: int, group: int, dtype: str):
    form = Quanto(bits, group, -1, 0, dtype)
    metadata = 2 * (32 if dtype == "float32" else 16) / group
    assert kv_peers_torch.bits_per_value(theirs, (form, form), 64) == bits + metadata
    assert kv_peers_torch.bits_per_value(theirs, (form, None), 64) == (bits + metadata + 16) / 2
    values = 2 * 2 * 64 * HEAD_DIM
    want = {"codes": values * bits // 8, "scales": int(values * metadata / 8), "exact": 2 * values}
    assert kv_peers_torch.sizes(theirs, (form, None), 64) == want
