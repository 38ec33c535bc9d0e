"""The table of a kv-quality-NAME.json, in Markdown: what each format of the KV cache costs, at its true bits."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from benchmarks import tables

LEGEND = """*Settled* are the bits of codes, scales and zeros that a value takes once it is quantized; *at N* counts
everything at a context of N tokens, the exact tokens of ring and sinks too. Losses are relative to the dense model. A
row *by layer* has widths a layer, chosen by the error of its attention on other images within so many bits of all
kinds; its level is that budget. *KIVI* rounds keys after RoPE, a scale a channel and 32 tokens, values a scale a token
and 32 channels; *KIVI +* adds one option; *ours* has them all but rotated keys and codebook, *ours, X* is otherwise
than it in X alone. Hugging Face's cache is run by its own code with prompts rounded as here; its KL is from torch's
dense model. *Per token* has one scale a token and head.

Compare by the KL of the text. Perplexity is noisier: rows that treat text alike, *ours* and *ours, image tokens 2*, lie
0.2 to 0.4% apart, as rounding amplifies the last bits of floating point; and a question is 0.53% of those right.
"""


def page(found: Mapping[str, Any]) -> str:
    """Returns the table of all rows measured so far, by level and then by the KL of text, those without it last."""
    chosen, rows = found["settings"], found["rows"]
    dense = next(row for row in rows if row["method"] == "dense")
    contexts = [str(tokens) for tokens in chosen["contexts"]]
    text = chosen["text"] is not None
    columns = ["bits", "format", "settled", *(f"at {tokens}" for tokens in contexts), "KL answers", "right lost"]
    columns += ["KL text", "perplexity", "lost"] if text else []
    quantized = sorted(
        (row for row in rows if row["method"] != "dense"),
        key=lambda row: (-float(row["level"]), row.get("text_kl", math.inf), row["method"]),
    )
    body = [_row(row, dense, contexts, text) for row in quantized]
    return f"{tables.table(columns, body)}\n{_small_print(found, dense)}"


def _row(row: Mapping[str, Any], dense: Mapping[str, Any], contexts: Sequence[str], text: bool) -> list[str]:
    true = row["true_bits"]
    first = true[contexts[0]]
    settled = f"{first['codes'] + first['scales']:.2f}" if "codes" in first else f"{first['all']:.2f}"
    cells = [row["level"], row["method"], settled, *(f"{true[tokens]['all']:.2f}" for tokens in contexts)]
    cells += [f"{row['kl']:.2g}", _lost(row["right"], dense["right"])] if row["right"] is not None else ["", ""]
    if text:
        cells += [f"{row['text_kl']:.4f}" if "text_kl" in row else ""]
        cells += [f"{row['ppl']:.3f}", f"{100 * (row['ppl'] / dense['ppl'] - 1):+.2f}%"]
    return cells


def _lost(right: float, dense: float) -> str:
    """Returns which share of what the dense model gets right is lost; nothing can be lost of nothing."""
    return f"{100 * (1 - right / dense):.2f}%" if dense else ""


def _small_print(found: Mapping[str, Any], dense: Mapping[str, Any]) -> str:
    chosen, about = found["settings"], found["about"]
    text = chosen["text"]
    read = (
        f"; perplexity {dense['ppl']:.3f} on {text['windows']} windows of {text['context']} tokens of"
        f" {len(text['files'])} files"
        if text
        else ""
    )
    return (
        f"Dense: {100 * dense['right']:.2f}% right of {chosen['samples']} questions of easy-VQA's test split{read}."
        f" {tables.machine(about)}."
    )
