"""The report as one HTML page with its pictures inside: nothing else needs to travel with it."""

import base64
import html
from collections.abc import Iterable, Mapping
from typing import Any

Report = Mapping[str, Any]

STYLE = """
:root { color-scheme: light }
body { font: 16px/1.55 system-ui, "Segoe UI", Roboto, sans-serif; color: #1f2430; background: #f4f5f7; margin: 0 }
main { max-width: 1040px; margin: 0 auto; padding: 40px 28px 64px; background: #fff; min-height: 100vh }
h1 { font-size: 28px; margin: 0 0 6px; letter-spacing: -.01em }
h2 { font-size: 19px; margin: 44px 0 10px }
p { margin: 8px 0; max-width: 76ch }
.lead { font-size: 18px; margin-bottom: 24px }
.cards { display: grid; grid-template-columns: 3fr 4fr 3fr 3fr; gap: 14px; margin: 22px 0 8px }
.card { border: 1px solid #e3e6ea; border-radius: 8px; padding: 14px 16px }
.card b { display: block; font-size: 24px; font-weight: 650; color: #0072b2; white-space: nowrap }
.card span { color: #5b6270; font-size: 14px }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; font-size: 14.5px }
th, td { text-align: right; padding: 7px 9px; border-bottom: 1px solid #e9ebee; white-space: nowrap }
th { color: #5b6270; font-weight: 500 }
th:first-child, td:first-child { text-align: left; padding-left: 0 }
tr.ours td { font-weight: 650; background: #eef6fb }
small, .note { color: #5b6270; font-size: 14px; font-weight: 400 }
img { width: 100%; margin: 6px 0 }
pre { background: #f4f5f7; padding: 12px 14px; border-radius: 8px; font-size: 13.5px }
pre { white-space: pre-wrap; overflow-wrap: anywhere }
dl { display: grid; grid-template-columns: 190px 1fr; gap: 4px 16px; font-size: 14.5px }
dt { color: #5b6270 } dd { margin: 0; overflow-wrap: anywhere }
@media (max-width: 760px) { .cards { grid-template-columns: repeat(2, 1fr) } dl { grid-template-columns: 1fr } }
"""


def render(report: Report, pictures: Mapping[str, bytes]) -> str:
    """Returns the page; `pictures` are PNG, by the names of `pictures.draw`."""
    images = {name: _image(name, png) for name, png in pictures.items()}
    body = [
        f"<h1>{_text(report['title'])}</h1>",
        f"<p class=lead>{_text(report['headline'])}</p>",
        _cards(report),
        "<h2>Compared on questions that the search never saw</h2>",
        images["comparison"],
        _comparison(report),
        _differences(report),
        "<h2>Where the budget went</h2>",
        images["allocation"],
        f"<p class=note>{_text(report['notes']['allocation'])}</p>",
        "<h2>How the search went</h2>",
        images["history"],
        f"<p class=note>{_text(report['notes']['history'])}</p>",
        "<h2>Try it</h2>",
        f"<pre>{_text(report['try'])}</pre>",
        "<h2>How this was made</h2>",
        f"<pre>{_text(report['command'])}</pre>",
        _details(report),
    ]
    title = f"<title>{_text(report['title'])}</title><meta name=viewport content='width=device-width'>"
    head = f"<head><meta charset=utf-8>{title}<style>{STYLE}</style></head>"
    return f"<!doctype html><html lang=en>{head}<body><main>{''.join(body)}</main></body></html>"


def percent(share: float, digits: int = 1) -> str:
    return f"{100 * share:.{digits}f}%"


def number(value: float | None, form: str = ".4f") -> str:
    """Returns a number as text, "n/a" where there is none because it was not finite."""
    return "n/a" if value is None else format(value, form)


def kilobytes(count: float) -> str:
    """Returns a number of bytes in the unit that suits it, powers of 1000."""
    for unit, size in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= size:
            return f"{count / size:.3g} {unit}"
    return f"{count:.0f} B"


def points(difference: float, interval: Iterable[float]) -> str:
    """Returns a difference of shares in percentage points, with its interval."""
    low, high = interval
    return f"{100 * difference:+.1f} points [{100 * low:+.1f}, {100 * high:+.1f}]"


def _cards(report: Report) -> str:
    ours, dense = (next(row for row in report["rows"] if row["name"] == name) for name in ("searched", "dense"))
    cards = [
        (percent(ours["weights_kept"], 2), "of the prunable weights kept"),
        (f"{kilobytes(dense['kv_bytes'])} → {kilobytes(ours['kv_bytes'])}", _cache_words(report, ours)),
        (percent(ours["accuracy"]), f"answered right (dense {percent(dense['accuracy'])})"),
        (number(ours["kl"], ".3g"), "KL from the dense model, nats a token"),
    ]
    return f"<div class=cards>{''.join(f'<div class=card><b>{a}</b><span>{b}</span></div>' for a, b in cards)}</div>"


def _cache_words(report: Report, ours: Mapping[str, Any]) -> str:
    return f"KV cache at {report['settings']['context']} tokens ({percent(ours['kv_share'])})"


def _comparison(report: Report) -> str:
    kinds = list(report["rows"][0]["by_kind"])
    perplexity = ["ppl"] if "ppl" in report["rows"][0] else []
    head = ["", "weights kept", "KV bytes", "KL", *perplexity, "right", *(kinds if len(kinds) > 1 else [])]
    lines = [f"<tr>{''.join(f'<th>{_text(name)}</th>' for name in head)}</tr>"]
    for row in report["rows"]:
        low, high = row["accuracy_interval"]
        cells = [
            _text(row["name"]),
            percent(row["weights_kept"], 2),
            f"{kilobytes(row['kv_bytes'])} <small>{percent(row['kv_share'])}</small>",
            number(row["kl"]),
            *(number(row[name]) for name in perplexity),
            f"{percent(row['accuracy'])} <small>[{100 * low:.1f}, {100 * high:.1f}]</small>",
            *(percent(row["by_kind"][kind]) for kind in (kinds if len(kinds) > 1 else [])),
        ]
        mark = " class=ours" if row["name"] == "searched" else ""
        lines.append(f"<tr{mark}>{''.join(f'<td>{cell}</td>' for cell in cells)}</tr>")
    return f"<table>{''.join(lines)}</table><p class=note>{_text(report['notes']['comparison'])}</p>"


def _differences(report: Report) -> str:
    lines = ["<tr><th>searched minus</th><th>answers right</th><th>KL</th></tr>"]
    for name, row in report["differences"].items():
        low, high = (number(end, "+.4f") for end in row["kl_interval"])
        right = points(row["accuracy"], row["accuracy_interval"])
        kl = f"{number(row['kl'], '+.4f')} [{low}, {high}]"
        lines.append(f"<tr><td>{_text(name)}</td><td>{right}</td><td>{kl}</td></tr>")
    return f"<table>{''.join(lines)}</table><p class=note>{_text(report['notes']['differences'])}</p>"


def _details(report: Report) -> str:
    facts = {
        **{f"{name} set": words for name, words in report["sets"].items()},
        **{name.replace("_", " "): value for name, value in report["settings"].items()},
        "trials": report["trials"],
        "seconds": ", ".join(f"{name} {seconds:.1f}" for name, seconds in report["seconds"].items()),
        "versions": ", ".join(f"{name} {version}" for name, version in report["versions"].items()),
        "device": report["device"],
        "finished": report["finished"],
    }
    return f"<dl>{''.join(f'<dt>{_text(name)}</dt><dd>{_text(value)}</dd>' for name, value in facts.items())}</dl>"


def _image(name: str, png: bytes) -> str:
    return f"<img alt='{_text(name)}' src='data:image/png;base64,{base64.b64encode(png).decode()}'>"


def _text(value: object) -> str:
    return html.escape(str(value))
