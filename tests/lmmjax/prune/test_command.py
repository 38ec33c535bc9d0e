"""python -m lmmjax.prune end to end: exact, resumable, shared statistics, replayable, exported; and bad input."""

import json
import shutil

import jax
import numpy as np
import pytest
from PIL import Image

from lmmjax import checkpoint as checkpoints
from lmmjax import orders
from lmmjax.calibrate import walk
from lmmjax.config import LINEARS
from lmmjax.files import read_json
from lmmjax.linears import kernel_of, with_kernels
from lmmjax.prune import __main__ as command
from lmmjax.prune import passes, scores, targets
from lmmjax.prune.allocations import ALLOCATIONS
from lmmjax.prune.updates import UPDATES


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Eight questions about random pictures, and a text of a few hundred tokens."""
    folder = tmp_path_factory.mktemp("data")
    rng = np.random.default_rng(0)
    rows = []
    for number in range(8):
        Image.fromarray(rng.integers(0, 256, (28, 28, 3), np.uint8)).save(folder / f"{number}.png")
        rows.append({"image": f"{number}.png", "question": f"what is {number}?", "answer": "yes"})
    (folder / "questions.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (folder / "text.txt").write_text(" ".join(map(str, rng.integers(0, 1000, 200))))
    return folder


@pytest.fixture
def prune(checkpoint, data, tmp_path, monkeypatch):
    """The command on the random checkpoint, with statistics in a directory of its own."""

    def call(out, *words, sparsity=("--sparsity", "0.5"), samples=("--data", "questions.jsonl", "--samples", "6")):
        monkeypatch.chdir(data)
        where = ["--model", str(checkpoint), "--statistics", str(tmp_path / "statistics")]
        return command.main([*where, *samples, *sparsity, *words, str(tmp_path / out)])

    return call


def kernels(path):
    params = checkpoints.load(path).params["text"]
    layers = [params[f"layers_{i}"] for i in range(2)]
    return {(i, name): np.asarray(kernel_of(layer, name)) for i, layer in enumerate(layers) for name in LINEARS}


def share_of_zeros(found):
    return sum((kernel == 0).sum() for kernel in found.values()) / sum(kernel.size for kernel in found.values())


def test_names_of_the_command_line_are_those_of_the_tables():
    assert (*scores.SCORES, *UPDATES) == command.METHODS
    assert tuple(UPDATES) == command.UPDATES
    assert tuple(ALLOCATIONS) == command.ALLOCATIONS


def test_the_result_is_a_checkpoint_at_the_exact_sparsity(prune, checkpoint, tmp_path, capsys):
    assert prune("out", "--method", "wanda") == 0
    found = kernels(tmp_path / "out")
    assert share_of_zeros(found) == pytest.approx(0.5, abs=1e-4)
    dense, pruned = checkpoints.load(checkpoint).params, checkpoints.load(tmp_path / "out")
    jax.tree.map(np.testing.assert_array_equal, dense["vision"], pruned.params["vision"])
    for (index, name), kernel in found.items():
        whole = np.asarray(kernel_of(dense["text"][f"layers_{index}"], name))
        np.testing.assert_array_equal(kernel[kernel != 0], whole[kernel != 0])
    figures = json.loads((tmp_path / "out" / "pruning.json").read_text())
    assert figures["sparsity"] == pytest.approx(0.5, abs=1e-4)
    assert len(figures["linears"]) == 14
    assert all(0 < row["error"] < 1 for row in figures["linears"])
    assert pruned.plan is not None
    assert "lmmjax.prune" in pruned.plan.made_by
    table = capsys.readouterr().out
    assert f"  all    {figures['sparsity']:.4f}" in table
    assert not list((tmp_path / "statistics").glob("*/layer-*"))  # nothing is left of a run that ended


def test_an_interrupted_run_goes_on_and_ends_alike(prune, tmp_path, monkeypatch):
    assert prune("whole", "--method", "sparsegpt") == 0
    looked, look = [], walk.look

    def second_fails(text, layer, *rest, **named):
        looked.append(layer)
        if len(looked) == 2:
            raise KeyboardInterrupt
        return look(text, layer, *rest, **named)

    monkeypatch.setattr(passes.walk, "look", second_fails)
    assert prune("again", "--method", "sparsegpt") == 130
    assert not (tmp_path / "again").exists()
    assert prune("again", "--method", "sparsegpt") == 0
    assert len(looked) == 3  # the first layer was not looked at again
    for key, kernel in kernels(tmp_path / "whole").items():
        np.testing.assert_array_equal(kernel, kernels(tmp_path / "again")[key])


def test_one_shot_statistics_serve_every_method(prune, tmp_path, monkeypatch):
    assert prune("one", "--method", "lognorm", "--one-shot") == 0
    monkeypatch.setattr(passes.walk, "look", None)  # whoever asks again, fails
    assert prune("two", "--method", "ria", "--update", "admm", "--one-shot", "--allocation", "owl") == 0
    assert share_of_zeros(kernels(tmp_path / "two")) == pytest.approx(0.5, abs=1e-4)


def test_a_one_shot_plan_can_be_replayed(prune, checkpoint, tmp_path):
    from lmmjax import answer
    from lmmjax.plan import Plan

    assert prune("out", "--method", "lognorm", "--one-shot") == 0
    stored = checkpoints.load(tmp_path / "out")
    assert isinstance(stored.plan, Plan)
    assert stored.plan.made_by is None
    replayed = answer.compress(checkpoints.load(checkpoint), stored.plan)
    jax.tree.map(np.testing.assert_array_equal, stored.params, replayed.params)


def test_a_sequential_plan_is_not_replayed(prune, checkpoint, tmp_path, capsys):
    from lmmjax import generate

    assert prune("out", "--method", "wanda", "--light") == 0
    (tmp_path / "plan.json").write_text(checkpoints.load(tmp_path / "out").plan.to_json())
    capsys.readouterr()
    assert generate.main(["--model", str(checkpoint), "--plan", str(tmp_path / "plan.json"), "--prompt", "hi"]) == 2
    assert "were pruned by `python -m lmmjax.prune" in capsys.readouterr().err


def test_a_plan_says_how_much_goes(prune, tmp_path):
    assert prune("one", "--one-shot", "--allocation", "mgaa") == 0
    plan = checkpoints.load(tmp_path / "one").plan
    (tmp_path / "plan.json").write_text(plan.to_json())
    assert prune("two", "--one-shot", sparsity=("--plan", str(tmp_path / "plan.json"))) == 0
    for key, kernel in kernels(tmp_path / "one").items():
        np.testing.assert_array_equal(kernel, kernels(tmp_path / "two")[key])


def test_what_a_plan_leaves_alone_counts_as_kept(prune, checkpoint, tmp_path, capsys):
    from lmmjax.config import from_hf
    from lmmjax.plan import LayerPlan, Plan

    text = from_hf(read_json(checkpoint / "config.json")).text
    half = LayerPlan(drop={name: text.linear_shape(name)[0] // 2 for name in LINEARS})
    (tmp_path / "plan.json").write_text(Plan((half, LayerPlan())).to_json())
    (tmp_path / "none.json").write_text(Plan((LayerPlan(), LayerPlan())).to_json())
    assert prune("out", "--light", sparsity=("--plan", str(tmp_path / "plan.json"))) == 0
    assert json.loads((tmp_path / "out" / "pruning.json").read_text())["sparsity"] == pytest.approx(0.25)
    capsys.readouterr()
    assert prune("none", sparsity=("--plan", str(tmp_path / "none.json"))) == 2
    assert "not one input of any linear would be dropped" in capsys.readouterr().err


def test_statistics_belong_to_the_weights_and_the_config(checkpoint):
    import dataclasses

    from lmmjax.layered import held

    stored = checkpoints.load(checkpoint)
    one = held(stored.config, stored.params)
    turned = dataclasses.replace(stored.config, text=dataclasses.replace(stored.config.text, rope_theta=5e5))
    moved = jax.tree.map(lambda leaf: leaf.at[(0,) * leaf.ndim].add(1), stored.params)
    digests = {one.digest(), held(turned, stored.params).digest(), held(stored.config, moved).digest()}
    assert len(digests) == 3
    assert one.digest() == held(stored.config, dict(stored.params)).digest()


def test_an_interrupted_one_shot_run_goes_on(prune, tmp_path, monkeypatch):
    assert prune("whole", "--method", "admm", "--one-shot") == 0
    pruned, prune_one = [], passes.Passes._prune

    def second_fails(self, task, index, *rest):
        pruned.append(index)
        if len(pruned) == 2:
            raise KeyboardInterrupt
        return prune_one(self, task, index, *rest)

    monkeypatch.setattr(passes.Passes, "_prune", second_fails)
    assert prune("again", "--method", "admm", "--one-shot") == 130
    assert prune("again", "--method", "admm", "--one-shot") == 0
    assert pruned == [0, 1, 1]
    for key, kernel in kernels(tmp_path / "whole").items():
        np.testing.assert_array_equal(kernel, kernels(tmp_path / "again")[key])


def test_gradients_text_and_patterns(prune, tmp_path):
    samples = ("--data", "questions.jsonl", "--samples", "3", "--text", "text.txt", "--windows", "3", "--length", "24")
    words = ("--method", "pruner-zero", "--tokens", "drift", "--permute")
    assert prune("out", *words, sparsity=("--pattern", "2:4"), samples=samples) == 0
    assert share_of_zeros(kernels(tmp_path / "out")) == pytest.approx(0.5)
    found = orders.read(tmp_path / "out")
    assert found
    for (index, linear), kernel in kernels(tmp_path / "out").items():
        order = found.get(orders.name_of(index, linear), np.arange(len(kernel)))
        assert (np.asarray(kernel)[order] != 0).reshape(-1, 4, kernel.shape[1]).sum(1).max() == 2


def test_the_export_is_what_was_pruned(prune, tmp_path):
    from safetensors.numpy import load_file

    assert prune("out", "--method", "magnitude", "--light", "--export", str(tmp_path / "hf")) == 0
    exported = load_file(tmp_path / "hf" / "model.safetensors")
    (name,) = (name for name in exported if "language" in name and name.endswith("layers.0.self_attn.q_proj.weight"))
    np.testing.assert_array_equal(exported[name].T, kernels(tmp_path / "out")[0, "q"])


@pytest.mark.parametrize(
    ("index", "linear", "said"),
    [
        (0, "up", "layer 0: what its linears are fed is not finite"),
        (1, "down", "layer 1, down: got weights that are inf"),
    ],
)
@pytest.mark.parametrize("words", [("--light",), ("--light", "--one-shot"), ("--method", "sparsegpt")], ids=str)
def test_weights_that_are_not_finite_are_one_line(checkpoint, data, tmp_path, capsys, index, linear, said, words):
    """Nothing could rank them, and what comes behind them would be calibrated on nothing."""
    stored, name = checkpoints.load(checkpoint), f"layers_{index}"
    text = stored.params["text"]
    broken = with_kernels(text[name], {linear: kernel_of(text[name], linear).at[3, 2].set(np.inf)})
    checkpoints.save(
        tmp_path / "broken", stored.params | {"text": text | {name: broken}}, like=checkpoint, plan=stored.plan
    )
    where = ["--model", str(tmp_path / "broken"), "--statistics", str(tmp_path / "statistics"), "--sparsity", "0.5"]
    asked = ["--data", str(data / "questions.jsonl"), "--samples", "6"]
    for _ in range(2):  # what the first run left on its trail changes nothing
        assert command.main([*where, *asked, *words, str(tmp_path / "out")]) == 2
        assert said in capsys.readouterr().err
        assert not (tmp_path / "out").exists()


def test_layers_that_lose_everything_are_said(prune, monkeypatch, capsys):
    drops = [dict.fromkeys(LINEARS, 8), {**dict.fromkeys(LINEARS, 8), "q": 32}]
    monkeypatch.setattr(targets.Targets, "_counts", lambda self, passes, seed: drops)
    assert prune("out", "--light") == 0
    assert "layer 1: all weights of q are to go" in capsys.readouterr().err


@pytest.mark.parametrize("place", ["out", "out/hf", "."])
def test_an_export_lies_apart(prune, tmp_path, capsys, place):
    (tmp_path / "there").mkdir()
    assert prune("there/out", "--light", "--export", str(tmp_path / "there" / place)) == 2
    said = capsys.readouterr().err
    assert "--export: got" in said or "exists" in said
    assert not list((tmp_path / "there").iterdir())


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--sparsity", "1.5"), "--sparsity: got 1.5"),
        ((), "expected exactly one of them"),
        (("--sparsity", "0.5", "--pattern", "2:4"), "expected exactly one of them"),
        (("--pattern", "4:2"), "--pattern: got '4:2'"),
        (("--pattern", "3:5"), "but q has 32 inputs"),
        (("--pattern", "2:128"), "--pattern: got '2:128'"),
        (("--pattern", "2:4", "--allocation", "owl"), "--allocation: got owl without --sparsity"),
        (("--sparsity", "0.5", "--samples", "0"), "--samples: got 0"),
        (("--sparsity", "0.5", "--text", "text.txt", "--length", "4096"), "--length: got 4096, expected 2 to"),
        (("--sparsity", "0.5", "--data", "none.jsonl"), "data is"),
    ],
)
def test_bad_input_is_one_line(prune, tmp_path, capsys, words, message):
    assert prune("out", *words, sparsity=(), samples=()) == 2
    said = capsys.readouterr().err
    assert message in said
    assert said.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_what_exists_is_not_overwritten_and_what_is_pruned_not_pruned_again(prune, checkpoint, tmp_path, capsys):
    assert prune("out", "--light") == 0
    capsys.readouterr()
    assert prune("out", "--light") == 2
    assert "exists" in capsys.readouterr().err
    words = ["--model", str(tmp_path / "out"), "--sparsity", "0.5", str(tmp_path / "twice")]
    assert command.main(words) == 2
    assert "is compressed already" in capsys.readouterr().err
    shutil.rmtree(tmp_path / "out")
