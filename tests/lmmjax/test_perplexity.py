"""Perplexity against whole forward passes, and against the recipe that transformers publishes."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from small import CONFIG

from lmmjax import checkpoint as checkpoints
from lmmjax import llava, perplexity
from lmmjax.errors import InputError
from lmmjax.plan import CacheFormat, Plan, uniform
from lmmjax.prompt import Processor, pad

CONTEXT, STRIDE = 12, 5


@pytest.fixture(scope="module")
def params() -> llava.Params:
    return llava.init(CONFIG, jax.random.key(0))


def documents(*lengths: int) -> list[list[int]]:
    rng = np.random.default_rng(0)
    return [rng.integers(1, 38, length).tolist() for length in lengths]


def scored(params: llava.Params, parts: list[perplexity.Window], plan: Plan | None = None, batch: int = 4):
    return perplexity.gather(list(perplexity.score(CONFIG, params, plan, parts, context=CONTEXT, batch=batch)))


@pytest.mark.parametrize("length", [2, 11, 12, 13, 17, 18, 40])
def test_every_token_is_scored_once_and_sees_enough(length: int):
    (document,) = documents(length)
    seen = []
    for window in perplexity.windows([document], CONTEXT, STRIDE):
        begin = next(i for i in range(length) if document[i : i + len(window.tokens)] == list(window.tokens))
        assert window.first == 1 if begin == 0 else window.first >= CONTEXT - STRIDE
        assert len(window.tokens) <= CONTEXT
        seen += range(begin + window.first, begin + len(window.tokens))
    assert seen == list(range(1, length))


def test_windows_that_do_not_overlap_leave_their_first_tokens_out():
    parts = perplexity.windows(documents(25), CONTEXT, CONTEXT)
    assert [(len(window.tokens), window.first) for window in parts] == [(12, 1), (12, 1)]


def test_sums_are_those_of_whole_forward_passes(params: llava.Params, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(perplexity, "CHUNK", 4)
    parts = perplexity.windows(documents(30, 7), CONTEXT, STRIDE)
    got = scored(params, parts)
    tokens, lengths = pad([window.tokens for window in parts], CONTEXT)
    mask = jnp.broadcast_to(jnp.tril(jnp.ones((CONTEXT, CONTEXT), bool)), (len(parts), CONTEXT, CONTEXT))
    positions = jnp.broadcast_to(jnp.arange(CONTEXT), tokens.shape)
    states = llava.forward(CONFIG, params, llava.embed(CONFIG, params, tokens), positions, mask)
    predicted = jax.nn.log_softmax(llava.logits(CONFIG, params, states))
    for row, window in enumerate(parts):
        own = [predicted[row, i - 1, tokens[row, i]] for i in range(window.first, lengths[row])]
        assert got.nll[row] == pytest.approx(-float(sum(own)), rel=1e-5)
        assert got.tokens[row] == len(own)
    assert got.ppl == pytest.approx(np.exp(got.nll.sum() / got.tokens.sum()))


@pytest.mark.parametrize("bits", [None, 4])
def test_the_batch_changes_nothing(params: llava.Params, bits: int | None):
    plan = bits and uniform(CONFIG.text, bits=bits, cache=CacheFormat(group=4, dtype="float32"))
    parts = perplexity.windows(documents(30, 7), CONTEXT, STRIDE)
    np.testing.assert_allclose(scored(params, parts, plan).nll, scored(params, parts, plan, batch=1).nll, rtol=1e-5)


def test_the_plan_rounds_what_the_windows_see(params: llava.Params):
    parts = perplexity.windows(documents(30), CONTEXT, STRIDE)

    def ppl(bits: int, **form) -> float:
        plan = uniform(CONFIG.text, bits=bits, cache=CacheFormat(group=4, dtype="float32", **form))
        return scored(params, parts, plan).ppl

    dense = scored(params, parts).ppl
    assert ppl(16) == pytest.approx(dense, rel=1e-6)
    assert ppl(2, quantize_prefill=False) == pytest.approx(dense, rel=1e-6)
    assert abs(ppl(2) - dense) > 10 * abs(ppl(8) - dense) > 0


def test_bad_requests_are_refused(params: llava.Params, checkpoint: Path, tmp_path: Path):
    with pytest.raises(InputError, match="--stride: got 13 with --context 12"):
        perplexity.windows(documents(20), CONTEXT, 13)
    with pytest.raises(InputError, match="--stride: got 1 with --context 1;"):
        perplexity.windows(documents(20), 1, 1)
    with pytest.raises(InputError, match="at most the model's 64"):
        list(perplexity.score(CONFIG, params, None, perplexity.windows(documents(20), 12, 5), context=65))
    processor = Processor.load(checkpoint, checkpoints.load(checkpoint).config)
    for content, says in ((b"", "1 token"), (b"\xff", "not UTF-8"), (b"an <image> here", "stands for an image")):
        (tmp_path / "text").write_bytes(content)
        with pytest.raises(InputError, match=says):
            perplexity.read(processor, [tmp_path / "text"])
    with pytest.raises(InputError, match=r"missing.txt \(No such file"):
        perplexity.read(processor, [tmp_path / "missing.txt"])


def test_the_sums_are_those_of_the_recipe_that_transformers_publishes(checkpoint: Path, hf_checkpoint, tmp_path: Path):
    """The recipe's mean loss of a window, times the tokens that the recipe takes it for.

    The recipe takes it for one token too few where windows overlap; ours is the mean over tokens. So the windows'
    means are compared, and both totals with the recipe's weights.
    """
    torch = pytest.importorskip("torch", reason="the peer is transformers on torch")
    from transformers import LlavaForConditionalGeneration

    text = tmp_path / "text.txt"
    text.write_text("the quick brown fox jumps over the lazy dog, and " * 9)
    model = checkpoints.load(checkpoint)
    (ids,) = documents = perplexity.read(Processor.load(checkpoint, model.config), [text])
    context, stride = 100, 40
    parts = perplexity.windows(documents, context, stride)
    got = perplexity.gather(list(perplexity.score(model.config, model.params, None, parts, context=context, batch=2)))

    peer = LlavaForConditionalGeneration.from_pretrained(hf_checkpoint()).eval()
    means, weights, previous = [], [], 0
    for begin in range(0, len(ids), stride):
        end = min(begin + context, len(ids))
        labels = torch.tensor([ids[begin:end]])
        inputs = labels.clone()
        labels[:, : previous - begin] = -100 if previous > begin else labels[:, :0]
        with torch.no_grad():
            means.append(peer(input_ids=inputs, labels=labels).loss.item())
        weights.append(end - previous - 1)
        previous = end
        if end == len(ids):
            break
    np.testing.assert_allclose(got.nll / got.tokens, means, rtol=1e-5)
    assert got.tokens.tolist() == [weights[0], *(weight + 1 for weight in weights[1:])]
    ours = np.exp(np.average(got.nll / got.tokens, weights=weights))
    assert ours == pytest.approx(np.exp(np.average(means, weights=weights)), abs=1e-4)
    assert got.ppl == pytest.approx(ours, rel=0.01)
