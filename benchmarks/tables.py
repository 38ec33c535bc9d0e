"""What the tables of docs/results.md have in common: Markdown, means with deviations, levels in order, small print."""

import statistics
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from lmmjax.intervals import wilson


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Returns a table in Markdown."""
    return "\n".join(map(line, [head, ["---"] * len(head), *rows])) + "\n"


def line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def spread(values: Sequence[float | None], form: str, unit: str = "") -> str:
    """Returns mean ± deviation; a value that was too large for a number makes the mean so too."""
    known = [value for value in values if value is not None]
    if len(known) < len(values):
        return "∞"
    deviation = f" ± {statistics.stdev(known):{form}}" if len(known) > 1 else ""
    return f"{statistics.mean(known):{form}}{deviation}{unit}"


def sparsities(rows: Iterable[Mapping[str, Any]]) -> list[str]:
    """Returns the rows' levels, the dense model's "" first, then ascending sparsity, then patterns N:M."""
    return sorted({row["level"] for row in rows}, key=lambda level: (":" in level, level))


def share(level: str) -> str:
    """Returns "0.5" as 50%; a pattern stays."""
    return f"{100 * float(level):g}%" if level and ":" not in level else level


def interval(n: int) -> str:
    """Returns how sure a share of n questions is."""
    low, high = wilson(n // 2, n)
    most = f"{50 * (high - low):.1f}"
    return f"{n} questions: the 95% interval of a share is at most ±{most} points, narrower near 0 and 100%."


def text(found: Mapping[str, Any] | None) -> str:
    """Returns what perplexity was taken of."""
    if found is None:
        return "No perplexity: no text was given."
    files = found["files"]
    return (
        f"Perplexity of {len(files)} files, {files[0]} to {files[-1]}: {found['windows']} windows of {found['context']}"
        f" tokens spread evenly over all, stride {found['stride']}."
    )


def machine(about: Mapping[str, Any]) -> str:
    """Returns where and when figures were measured."""
    return f"{about['cpu']}, {about['cores_used']} cores, {about['device']}; {versions(about)}; {about['date'][:10]}"


def versions(about: Mapping[str, Any]) -> str:
    return ", ".join(f"{name} {version}" for name, version in about["versions"].items())


def source(name: str) -> str:
    """Returns a link to a file of figures."""
    return f"[{name}](../benchmarks/results/{name})"
