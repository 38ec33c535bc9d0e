"""The page of a dry run: sizes as people write them, and a table that stays short."""

import pytest
from small import CONFIG

from lmmjax.dryrun import page, parse_size
from lmmjax.memory import memory_report
from lmmjax.plan import LayerPlan, Plan


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("8GiB", 8 * 2**30),
        ("8 gib", 8 * 2**30),
        ("1.5 GB", 1_500_000_000),
        ("500MB", 500_000_000),
        ("512MiB", 512 * 2**20),
        ("16kB", 16_000),
        ("2TiB", 2 * 2**40),
        (" 7B ", 7),
    ],
)
def test_sizes_as_people_write_them(text, expected):
    assert parse_size("--memory", text) == expected


def test_layers_that_take_the_same_are_one_line():
    text = CONFIG.text.__class__(**{**CONFIG.text.__dict__, "layers": 32})
    config = CONFIG.__class__(**{**CONFIG.__dict__, "text": text})
    plan = Plan((*[LayerPlan(8, 4)] * 3, *[LayerPlan(4, 2)] * 28, LayerPlan(16, 2)))
    shown = page(memory_report(config, plan, 2, 64)).splitlines()
    layers = [line.split("  ")[0] for line in shown if line.startswith("layer")]
    assert layers == ["layers 0-2, each", "layers 3-30, each", "layer 31"]
    assert max(map(len, shown)) <= 120


def test_what_is_stored_otherwise_than_held_is_said():
    report = memory_report(CONFIG, None, 1, 16, "float32")
    assert "float32 on this device (stored: bfloat16)" in page(report, stored=["bfloat16"])
    assert "on this device" not in page(report, stored=["float32"])


def test_fitting_exactly_is_fitting():
    report = memory_report(CONFIG, None, 1, 16)
    assert ": fits, 0 B left" in page(report, report.total)
    assert ": DOES NOT FIT, 1 B too little" in page(report, report.total - 1)
