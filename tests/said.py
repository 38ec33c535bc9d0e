"""What a command said: how tests of several commands look at it."""

import pytest


def one_line(capsys: pytest.CaptureFixture) -> str:
    """Returns the one line on stderr with which bad input ends, nothing being on stdout."""
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    return err
