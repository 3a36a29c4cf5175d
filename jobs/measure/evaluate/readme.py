"""The evaluation's sections of the pages: tables of methods and retentions."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from jobs.measure.evaluate.config import PLAIN
from jobs.measure.evaluate.summary import EVERY

SIGNIFICANT = 0.05
SHORT_LIST = ("lightkv", "lightkv-int4", "tome", "published", "random")  # of the first page


def quality(summary: dict[str, Any]) -> str:
    """Markdown: the methods of the short list, without intervals and tests."""
    figures, plain = _figures(summary)
    listed = [line for line in figures if line["method"] in SHORT_LIST]
    return "\n".join(
        [
            "Accuracy kept, in percent of the plain model's: short answers / whole captions, by share of the vision KV "
            "cache kept. – cannot be reached.",
            "",
            *_table(listed, lambda line: _short(line, plain)),
        ]
    )


def fidelity(summary: dict[str, Any]) -> str:
    """Markdown: a line per method, a column per retention, and what the figures are."""
    figures, plain = _figures(summary)
    reference = summary["run"]["config"]["reference"] or next(iter(summary["run"]["config"]["methods"]))
    rows = _table(figures, lambda line: _cell(line, plain, reference))
    run = summary["run"]
    return "\n".join(
        [
            f"Accuracy kept, in percent of the plain model's: short answers (95 % interval) / whole captions. Plain: "
            f"{plain['accuracy']:.1%} of {plain['questions']:,} short answers and {plain['captions']:.1%} of the "
            f"captions right. * differs from {reference}, p < {SIGNIFICANT}, paired by scene; – cannot be reached.",
            "",
            *rows,
            "",
            f"{', '.join(run['devices'])}, torch {', '.join(run['torch'])}, transformers {run['transformers']}, split "
            f"“{run['split']}”, {run['answers']:,} answers; remade by `{run['command']}`.",
        ]
    )


def _figures(summary: dict[str, Any]) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """The figures over all suites: those of the methods, and the plain model's."""
    figures = [line for line in summary["figures"] if line["suite"] == EVERY]
    plain = next(line for line in figures if line["method"] == PLAIN)
    return [line for line in figures if line["method"] != PLAIN], plain


def _table(figures: Sequence[dict[str, Any]], cell: Callable[[dict[str, Any]], str]) -> list[str]:
    asked = sorted({line["retention"] for line in figures}, reverse=True)
    rows = [f"| method | {' | '.join(f'{share:.0%} kept' for share in asked)} |", "|---|" + "---|" * len(asked)]
    for method in dict.fromkeys(line["method"] for line in figures):
        cells = {line["retention"]: cell(line) for line in figures if line["method"] == method}
        rows.append(f"| {method} | {' | '.join(cells.get(share, '–') for share in asked)} |")
    return rows


def _short(line: dict[str, Any], plain: dict[str, Any]) -> str:
    if line["error"] or line["kept"] is None:
        return "–"
    captions = f" / {100 * line['captions'] / plain['captions']:.0f}" if plain["captions"] else ""
    return f"{100 * line['kept']:.1f}{captions}"


def _cell(line: dict[str, Any], plain: dict[str, Any], reference: str) -> str:
    if line["error"] or line["kept"] is None:
        return "–"
    low, high = line["kept_interval"]
    short, told = (_star(line, name, reference) for name in ("p_reference", "p_captions"))
    captions = f" / {100 * line['captions'] / plain['captions']:.0f}{told}" if plain["captions"] else ""
    return f"{100 * line['kept']:.1f} ({100 * low:.1f}–{100 * high:.1f}){short}{captions}"


def _star(line: dict[str, Any], test: str, reference: str) -> str:
    differs = line["method"] != reference and line[test] is not None and line[test] < SIGNIFICANT
    return "*" if differs else ""
