"""A Plan's JSON goes round, and what is no plan is refused in words."""

import dataclasses
import json

import pytest
from small import CONFIG

from lmmjax.config import LINEARS
from lmmjax.errors import InputError
from lmmjax.plan import CacheFormat, Calibration, LayerPlan, Plan, uniform

PLAN = Plan(
    (LayerPlan(8, 2, dict.fromkeys(LINEARS, 3)), LayerPlan()),
    score="wanda",
    calibration=Calibration(samples=5, tokens="text"),
    cache=CacheFormat(group=4, window=8, dtype="float16", quantize_prefill=False),
)


def test_json_goes_round():
    assert Plan.from_json(PLAN.to_json()) == PLAN


def test_sparsity_is_weighted_by_parameters():
    shapes = [CONFIG.text.linear_shape(name) for name in LINEARS]
    dropped = sum(3 * n_out for _, n_out in shapes)
    assert PLAN.sparsity(CONFIG.text) == pytest.approx(dropped / (2 * sum(a * b for a, b in shapes)))
    assert PLAN.prunes
    assert not uniform(CONFIG.text).prunes


def changed(path: str, value):
    raw = json.loads(PLAN.to_json())
    *way, last = (int(step) if step.isdigit() else step for step in path.split("."))
    at = raw
    for step in way:
        at = at[step]
    at[last] = value
    return json.dumps(raw)


@pytest.mark.parametrize(
    ("path", "value", "named"),
    [
        ("layers.0.key_bits", 4.0, r"layers\[0\].key_bits: got 4.0, expected int"),
        ("layers.0.drop.q", "3", r"layers\[0\].drop.q: got '3', expected int"),
        ("layers.0.drop.q", 1.5, r"drop.q: got 1.5"),
        ("layers.0.drop", None, r"layers\[0\].drop: got None, expected an object"),
        ("layers", {}, "plan.layers: expected a list"),
        ("layers.1", 7, r"layers\[1\]: got 7, expected an object"),
        ("cache.group", 0, "got group 0"),
        ("cache.group", "8", "cache.group: got '8', expected int"),
        ("cache.window", 6, "window 6"),
        ("cache.dtype", "int8", "got dtype 'int8', expected one of bfloat16"),
        ("cache.quantize_prefill", "no", "quantize_prefill: got 'no', expected bool"),
        ("cache.colour", 1, "cache: unknown colour"),
        ("calibration.samples", True, "calibration.samples: got True, expected int"),
        ("calibration.seed", -1, "seed -1"),
        ("score", ["x"], "plan.score: got"),
        ("version", 4, "got version 4, this lmmjax reads 1 to 3"),
        ("version", True, "got version True"),
        ("cache.sinks", 10**13, "at most 65536"),
    ],
)
def test_what_is_no_plan_is_named(path, value, named):
    with pytest.raises(InputError, match=named):
        Plan.from_json(changed(path, value))


@pytest.mark.parametrize("text", ["", "[]", "{", '"plan"'])
def test_other_json_is_refused(text):
    with pytest.raises(InputError, match="plan"):
        Plan.from_json(text)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"layers": PLAN.layers[:1]}, "got 1 layers, expected the model's 2"),
        ({"layers": (LayerPlan(5), LayerPlan())}, r"layers\[0\].key_bits is 5"),
        ({"layers": (LayerPlan(visual_value_bits=1), LayerPlan())}, r"layers\[0\].visual_value_bits is 1"),
        ({"layers": (LayerPlan(drop={"q": 1}), LayerPlan())}, r"layers\[0\].drop names"),
        ({"layers": (LayerPlan(drop=dict.fromkeys(LINEARS, 33)), LayerPlan())}, "drop.q is 33, expected 0 to 32"),
    ],
)
def test_a_plan_must_fit_its_model(change, named):
    assert PLAN.check(CONFIG.text) is PLAN
    with pytest.raises(InputError, match=named):
        dataclasses.replace(PLAN, **change).check(CONFIG.text)


def test_unreadable_files_are_named(tmp_path):
    with pytest.raises(InputError, match="No such file"):
        Plan.load(tmp_path / "plan.json")
    (tmp_path / "plan.json").write_bytes(b"\xff\xfe\xff")
    with pytest.raises(InputError, match="not a text file"):
        Plan.load(tmp_path / "plan.json")


@pytest.mark.parametrize("form", [{"clip": True, "codebook": "normal"}, {"rotate_keys": True, "keys": "before_rope"}])
def test_options_that_exclude_each_other_are_refused(form):
    with pytest.raises(InputError, match="choose one of them"):
        CacheFormat(**form)


def test_groups_that_would_outweigh_their_codes_are_refused():
    plan = dataclasses.replace(PLAN, cache=CacheFormat(value_group=3))
    with pytest.raises(InputError, match=r"cache.value_group 3 and head_dim 8 share no divisor above 1"):
        plan.check(CONFIG.text)
