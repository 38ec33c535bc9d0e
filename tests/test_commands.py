"""The commands as a user types them, one after the other, on the embedded model and in processes of their own."""

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import easy_vqa
import pytest
from safetensors.numpy import load_file

from lmmjax.checkpoint import EMBEDDED

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return tmp_path_factory.mktemp("commands")


def run(place: Path, command: str) -> subprocess.CompletedProcess:
    """Runs `python -m ...` in a directory of its own, with a cache of its own."""
    python, *arguments = shlex.split(command)
    assert python == "python"
    environment = os.environ | {"PYTHONPATH": str(ROOT), "LMMJAX_CACHE": str(place / "cache")}
    done = subprocess.run([sys.executable, *arguments], cwd=place, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done


def readme_command(mark: str) -> str:
    """The last part of the command behind a mark in the README, without the virtual environment's path."""
    found = re.search(rf"<!-- {mark} -->\n```\n(.*?)\n```", (ROOT / "README.md").read_text(), re.DOTALL)
    assert found
    return found[1].split("&&")[-1].strip().replace(".venv/bin/", "")


def test_the_readme_search_runs_and_its_result_answers(place):
    """The README's command, with fewer trials and samples: no more than the time differs."""
    command = readme_command("search")
    assert command == "python -m search.tpe --budget 0.5"
    said = run(place, f"{command} --trials 3 --search-samples 32 --report-samples 32").stdout
    out = place / "runs" / "tiny-0.5"
    assert (out / "report.html").stat().st_size > 10_000
    image = easy_vqa.get_test_image_paths()[0]
    asked = (
        f"python -m lmmjax.generate --model {out}/checkpoint --image {image} --prompt 'what is the red shape?' --json"
    )
    answer = json.loads(run(place, asked).stdout)
    assert answer["text"] in ("triangle", "circle", "rectangle")
    assert answer["kv_bytes"] <= answer["kv_dense_bytes"] / 2
    assert "lmmjax.generate --model" in said


def test_a_checkpoint_goes_in_answers_and_comes_out_again(place):
    run(place, f"python -m convert.hf {EMBEDDED} converted")
    image, (questions, answers, images) = easy_vqa.get_test_image_paths()[0], easy_vqa.get_test_questions()
    first = images.index(0)
    said = run(
        place, f"python -m lmmjax.generate --model converted --image {image} --prompt {shlex.quote(questions[first])}"
    )
    assert said.stdout.strip() == answers[first]
    run(place, "python -m convert.export converted back")
    source, back = load_file(EMBEDDED / "model.safetensors"), load_file(place / "back" / "model.safetensors")
    assert source.keys() == back.keys()
    assert all(source[name].tobytes() == back[name].tobytes() for name in source)


def test_the_tests_command_is_the_one_that_ci_runs():
    assert readme_command("tests") == "python -m pytest -n auto --maxprocesses 4 --dist loadfile"
    assert "README.md" in (ROOT / ".ci" / "run").read_text()
