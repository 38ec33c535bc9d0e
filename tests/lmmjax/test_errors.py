"""How a command ends when nobody reads what it prints."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from lmmjax.errors import first_line, is_unicode

ROOT = Path(__file__).parents[2]
PRINTS = """
import sys
from lmmjax.errors import exit_code
def command():
    print("text")
    return 0
sys.exit(exit_code(command))
"""


def test_a_closed_pipe_is_a_quiet_end():
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run([sys.executable, "-c", PRINTS], cwd=ROOT, stdout=writer, stderr=subprocess.PIPE)
    os.close(writer)
    assert (done.returncode, done.stderr) == (141, b"")


def test_a_lone_surrogate_is_no_text():
    assert is_unicode("漢 \N{GRINNING FACE} \0")
    assert not is_unicode("a\ud800")


@pytest.mark.parametrize(
    ("error", "line"), [(OSError("\n a\nb"), "a"), (AssertionError(), "AssertionError"), (KeyError("x"), "'x'")]
)
def test_the_first_line_of_an_exception(error: Exception, line: str):
    assert first_line(error) == line
