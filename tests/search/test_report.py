"""The report: what the page says, and pictures that can be drawn for models of any depth."""

import io
import json
import math
import re
from html.parser import HTMLParser

import numpy as np
import pytest
from PIL import Image

from search import page, pictures, report


def example(layers: int = 6, kv_budget: float = 0.5) -> dict:
    """A report of plain values, as `assemble` makes it."""
    rng = np.random.default_rng(0)
    names = ["dense", "uniform magnitude", *report.RIVALS, "uniform lognorm", "searched"]
    rows = [
        {
            "name": name,
            "weights_kept": 1.0 if name == "dense" else 0.5,
            "kv_bytes": 2_000_000 if name == "dense" else 900_000,
            "kv_share": 1.0 if name == "dense" else 0.45,
            "kl": 0.01 * index,
            "kl_interval": (0.009 * index, 0.011 * index),
            "accuracy": 0.98 - 0.01 * index,
            "accuracy_interval": (0.97 - 0.01 * index, 0.985 - 0.01 * index),
            "by_kind": {"colour": 0.9, "yes/no": 0.99},
        }
        for index, name in enumerate(names)
    ]
    values = np.exp(-np.linspace(0, 3, 20)) + 0.05 * rng.random(20)
    return {
        "title": "tiny <at> budget 0.5",
        "headline": "50.00% & no more",
        "settings": {"budget": 0.5, "kv_budget": kv_budget, "context": 512, "objective": "kl", "model": "models/tiny"},
        "trials": 20,
        "sets": {"report": "1000 questions"},
        "rows": rows,
        "differences": {
            "uniform wanda": {
                "accuracy": 0.02,
                "accuracy_interval": (0.01, 0.03),
                "kl": -0.02,
                "kl_interval": (-0.03, -0.01),
            }
        },
        "allocation": {
            "linears": list("qkvogud"),
            "sparsity": rng.uniform(0.35, 0.65, (layers, 7)).tolist(),
            "key_bits": rng.choice([2, 4, 8, 16], layers).tolist(),
            "value_bits": rng.choice([2, 4, 8, 16], layers).tolist(),
        },
        "history": [{"value": float(v), "uniform": i < 2, "kl": 0.1, "accuracy": 0.9} for i, v in enumerate(values)],
        "notes": dict.fromkeys(("comparison", "differences", "allocation", "history"), "a note"),
        "command": "python -m search.tpe --budget 0.5",
        "try": "python -m lmmjax.generate --prompt 'a < b?'",
        "seconds": {"search": 60.0},
        "versions": {"jax": "0.10.2"},
        "device": "cpu",
        "finished": "2030-01-01T00:00:00+00:00",
    }


class Tags(HTMLParser):
    """Collects the page's text and checks that what is opened is closed."""

    def __init__(self):
        super().__init__()
        self.open: list[str] = []
        self.text = ""

    def handle_starttag(self, tag, attrs):
        if tag not in ("meta", "img"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data


@pytest.mark.parametrize("layers", [1, 6, 32, 40])
def test_pictures_are_drawn_at_any_depth(layers):
    for name, png in pictures.draw(example(layers)).items():
        image = Image.open(io.BytesIO(png))
        assert image.format == "PNG"
        assert image.width > 1000, name
        assert np.asarray(image.convert("L")).std() > 5, name


def test_a_perfect_or_single_trial_can_be_drawn():
    found = example()
    found["history"] = [{"value": 0.0, "uniform": True}]
    assert pictures.history(found)


def test_numbers_that_are_not_finite_are_said_so_and_not_drawn():
    found = example()
    found["rows"][1] |= {"kl": math.nan, "kl_interval": (math.nan, math.inf)}
    found["differences"]["uniform wanda"] |= {"kl": -math.inf, "kl_interval": (math.nan, math.nan)}
    found["history"][0]["value"] = math.inf
    found = report._plain(found)
    json.dumps(found, allow_nan=False)
    assert "right, KL n/a" in report.summary(found)
    assert "n/a [n/a, n/a]" in page.render(found, pictures.draw(found))


def test_the_page_says_what_the_report_holds():
    found = example()
    rendered = page.render(found, dict.fromkeys(("comparison", "allocation", "history"), b"png"))
    tags = Tags()
    tags.feed(rendered)
    assert tags.open == []
    assert "tiny <at> budget 0.5" in tags.text
    assert "50.00% & no more" in tags.text
    assert "python -m lmmjax.generate --prompt 'a < b?'" in tags.text
    for row in found["rows"]:
        assert row["name"] in tags.text
    assert "+2.0 points [+1.0, +3.0]" in tags.text
    assert rendered.count("data:image/png;base64,") == 3
    assert not re.search(r"(src|href)='?(http|/)", rendered)


def test_the_report_is_written_with_its_json_last(tmp_path, monkeypatch):
    written = []
    monkeypatch.setattr(report, "write_atomic", lambda path, content: written.append(path.name))
    report.write(tmp_path, example())
    assert written == ["comparison.png", "allocation.png", "history.png", "report.html", "report.json"]


def test_the_written_json_is_the_report(tmp_path):
    report.write(tmp_path, example())
    assert json.loads((tmp_path / "report.json").read_text())["trials"] == 20


def test_the_summary_has_a_line_for_every_contender():
    text = report.summary(example())
    for row in example()["rows"]:
        assert re.search(rf"^{row['name']}\s.*%", text, re.MULTILINE)
    assert "searched - uniform wanda: +2.0 points [+1.0, +3.0] right, KL -0.0200" in text


@pytest.mark.parametrize(("count", "text"), [(512, "512 B"), (1536, "1.54 kB"), (2_100_000, "2.1 MB"), (5e9, "5 GB")])
def test_bytes_are_said_in_the_unit_that_suits_them(count, text):
    assert page.kilobytes(count) == text
