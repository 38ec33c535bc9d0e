"""Windows of text: within one document, every place as likely, and the same by the same seed."""

import numpy as np
import pytest

from lmmjax.calibrate import samples
from lmmjax.errors import InputError

DOCUMENTS = [list(range(100, 110)), [1, 2], list(range(200, 205))]


def test_windows_are_runs_of_a_document():
    found = samples.windows(DOCUMENTS, 400, 5, seed=0)
    starts = set(found.tokens[:, 0].tolist())
    assert starts == {100, 101, 102, 103, 104, 105, 200}  # each place of a run of five, and none of the short document
    np.testing.assert_array_equal(np.diff(found.tokens, axis=1), 1)
    counts = [int((found.tokens[:, 0] == start).sum()) for start in starts]
    assert min(counts) > 30  # 57 expected of each
    assert found.pixels is None
    np.testing.assert_array_equal(found.lengths, 5)


def test_a_seed_draws_the_same_and_another_others():
    first, again, other = (samples.windows(DOCUMENTS, 8, 5, seed).tokens for seed in (0, 0, 1))
    np.testing.assert_array_equal(first, again)
    assert (first != other).any()


def test_windows_longer_than_all_documents_are_refused():
    with pytest.raises(InputError, match="--text: windows have 11 tokens, and the longest file has 10; give longer"):
        samples.windows(DOCUMENTS, 1, 11, seed=0)


def test_digests_tell_samples_apart():
    one, two = (samples.windows(DOCUMENTS, 4, 5, seed) for seed in (0, 1))
    assert samples.digest([one]) == samples.digest([samples.windows(DOCUMENTS, 4, 5, 0)])
    assert len({samples.digest([one]), samples.digest([two]), samples.digest([one, two])}) == 3
