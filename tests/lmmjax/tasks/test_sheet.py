"""The bootstrap of published figures: of means as in lmmjax.intervals, paired, and of what sums make."""

import numpy as np
import pytest

from lmmjax.intervals import bootstrap
from lmmjax.tasks import pope
from lmmjax.tasks.questions import Question
from lmmjax.tasks.sheet import differences, intervals, perplexity, shares


def test_a_mean_has_the_interval_of_the_plain_bootstrap():
    marks = np.random.default_rng(0).random(60)
    assert intervals(shares(marks, [""] * 60))["accuracy"] == pytest.approx(bootstrap(marks))


def test_a_difference_has_that_of_the_paired_bootstrap():
    rng = np.random.default_rng(0)
    ours, other = rng.random(60), rng.random(60)
    value, interval = differences(shares(ours, [""] * 60), shares(other, [""] * 60))["accuracy"]
    assert value == pytest.approx(ours.mean() - other.mean())
    assert interval == pytest.approx(bootstrap(ours - other))


def test_a_model_is_no_different_from_itself():
    sheet = perplexity(np.random.default_rng(0).random(9) * 5, [5] * 9)
    assert differences(sheet, sheet) == {"perplexity": (0, (0, 0))}


def test_perplexity_weighs_windows_by_their_tokens():
    sheet = perplexity(np.array([1.0, 30.0]), [1, 10])
    assert sheet.values["perplexity"] == pytest.approx(np.exp(31 / 11))
    assert intervals(sheet)["perplexity"] == pytest.approx((np.e, np.exp(3)))


def test_draws_in_which_a_figure_is_not_defined_do_not_count():
    questions = [Question(i, None, "?") for i in range(4)]
    sheet = pope.judge(questions, [True, True, False, False], ["yes", "no", "no", "no"])
    low, high = intervals(sheet)["precision"]
    assert low == high == 1
    assert np.isnan(intervals(pope.judge(questions, [True] * 4, ["no"] * 4))["precision"]).all()
