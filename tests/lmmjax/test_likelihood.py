"""Teacher-forced evaluation, with predictions whose right answers can be counted by hand."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from small import CONFIG, encoded

from lmmjax import likelihood, llava
from lmmjax.errors import InputError


@pytest.fixture(scope="module")
def params():
    return llava.init(CONFIG, jax.random.key(0))


def certain(batch: likelihood.Batch, targets) -> jax.Array:
    """Predictions that give these tokens probability one half, and the rest the other half evenly."""
    vocab = CONFIG.text.vocab
    hot = jax.nn.one_hot(targets, vocab)
    return jnp.log(0.5 * hot + 0.5 / (vocab - 1) * (1 - hot))


def test_predictions_are_compared_token_by_token(params):
    data = encoded(3)
    (batch,) = likelihood.batches(CONFIG, params, data)
    right = certain(batch, batch.targets)
    wrong = right.at[1, 0].set(jnp.roll(right[1, 0], 1))
    result = likelihood.gather([likelihood.compare(batch, right, wrong)], data)
    other = 0.5 / (CONFIG.text.vocab - 1)
    assert result.accuracy == pytest.approx(2 / 3)
    assert result.by_kind == {"colour": 0.0, "shape": 1.0}
    assert result.nll == pytest.approx((5 * math.log(2) - math.log(other)) / 6, rel=1e-5)
    assert result.kl == pytest.approx((0.5 - other) * math.log(0.5 / other) / 6, rel=1e-4)
    assert result.ppl == pytest.approx(math.exp(result.nll))


def test_answers_are_predicted_from_the_position_before(params):
    data = encoded(5)
    (batch,) = likelihood.batches(CONFIG, params, data)
    for row in range(5):
        at = np.flatnonzero(data.is_answer[row])
        np.testing.assert_array_equal(batch.at[row][batch.counted[row]], at)
        np.testing.assert_array_equal(batch.targets[row][batch.counted[row]], data.tokens[row, at])
    assert (np.asarray(batch.answers) == np.asarray(batch.counted)).all()


def test_the_last_batch_is_filled_up_with_rows_that_count_nothing(params):
    data = encoded(5)
    parts = list(likelihood.batches(CONFIG, params, data, size=4))
    assert [part.x.shape for part in parts] == [parts[0].x.shape] * 2
    assert [int(part.counted.any(1).sum()) for part in parts] == [4, 1]
    sums = [likelihood.compare(part, certain(part, part.targets), certain(part, part.targets)) for part in parts]
    result = likelihood.gather(sums, data)
    assert result.sums.correct.shape == (5,)
    assert result.sums.tokens.sum() == data.is_answer.sum()


def test_text_tokens_are_those_that_something_precedes(params):
    data = encoded(4)
    (batch,) = likelihood.batches(CONFIG, params, data, tokens="text")
    assert int(batch.counted.sum()) == int((data.lengths - 1 - CONFIG.vision.image_tokens).sum())
    assert int(batch.answers.sum()) == int(data.is_answer.sum())
    assert (np.asarray(batch.targets)[np.asarray(batch.counted)] != CONFIG.image_token).all()


def test_bad_requests_are_refused(params):
    with pytest.raises(InputError, match="tokens: got 'image'"):
        list(likelihood.batches(CONFIG, params, encoded(2), tokens="image"))
    with pytest.raises(InputError, match="no samples"):
        list(likelihood.batches(CONFIG, params, encoded(0)))
