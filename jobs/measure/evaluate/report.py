"""Write `table.md` and `summary.json` of the evaluation from a `Summary`."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable
from typing import Any

from jobs.measure.evaluate.config import CAPTIONS, PLAIN, Cell, EvaluateConfig
from jobs.measure.evaluate.summary import Figures, Summary, pools_of

HEAD = (
    "| method | asked | kept KV | short answers [95 %] | of plain [95 %] | captions [95 %] | same as plain "
    "| KV bytes | FLOPs | p: plain | p: {reference} | captions |"
)
LEGEND = (
    "Kept KV: share of the vision KV entries kept, mean over layers, as reached. Short answers: exact match over the "
    "questions of the tasks that count, which the plain model answers at least {counts_from:.0%} of the time in that "
    "suite; of plain: the same as a share of the plain model's. Captions: exact match of whole captions, never part of "
    "the short answers. Same as plain: short answers equal to the plain model's, right or wrong. KV bytes and FLOPs: "
    "of the decoder's prefill, text included, against the plain model. Intervals: bootstrap over scenes, 95 %. p: "
    "two-sided paired permutation by scene of the short answers, and in the last column of the captions against "
    "{reference}, not corrected for the number of tests. All suites: those that pool; every one that asks counts alike."
)


def markdown(summary: Summary, config: EvaluateConfig, run: dict[str, Any]) -> str:
    """The tables as Markdown: suites together, suite by suite, then every task. `run` describes the run."""
    suites = list(dict.fromkeys(figures.suite for figures in summary.figures))
    lines = [
        "# What survives compression",
        "",
        _origin(run),
        "",
        LEGEND.format(counts_from=config.counts_from, reference=config.compared_with),
    ]
    for suite in suites:
        figures = [line for line in summary.figures if line.suite == suite]
        lines += ["", f"## {suite}", "", *_suite_lines(suite, figures, summary, config)]
    lines += ["", "## Task by task", "", "Exact match; tasks in brackets do not count as short answers."]
    for suite in summary.counting:
        lines += ["", f"### {suite}", "", *_task_lines(suite, summary)]
    return "\n".join(lines) + "\n"


def as_json(summary: Summary, run: dict[str, Any]) -> dict[str, Any]:
    """`run`, every line of the tables, the tasks, and which tasks count; NaN becomes null."""
    tasks = [
        {**dataclasses.asdict(cell), "family": family, "right": right, "asked": asked}
        for cell, families in summary.tasks.items()
        for family, (right, asked) in families.items()
    ]
    figures = [{k: _plain_value(v) for k, v in dataclasses.asdict(line).items()} for line in summary.figures]
    return {"run": run, "counting": summary.counting, "figures": figures, "tasks": tasks}


def _origin(run: dict[str, Any]) -> str:
    codes = ", ".join(run["code_versions"])
    return (
        f"Model {run['model']} (weights {run['weights']}), split {run['split']}, seed {run['seed']}, "
        f"{run['answers']:,} answers; {', '.join(run['devices'])}; torch {', '.join(run['torch'])}, code {codes}. "
        f"Remade by `{run['command']}`."
    )


def _suite_lines(suite: str, figures: list[Figures], summary: Summary, config: EvaluateConfig) -> Iterable[str]:
    if suite in config.suites:
        spec = config.suites[suite]
        many = (
            f"{spec.frames} frames of " if spec.kind == "video" else f"{spec.frames} of " if spec.kind == "set" else ""
        )
        counting = ", ".join(summary.counting[suite]) or "none"
        yield (
            f"{spec.scenes} scenes of kind {spec.kind}, {many}{spec.width_px}×{spec.height_px} px, up to "
            f"{spec.max_things} objects; {max(line.questions for line in figures)} short answers. Counting: {counting}."
        )
    else:
        members = pools_of(config, summary.counting)[suite]
        counting = ", ".join(name for name in members if summary.counting[name]) or "none"
        yield (
            f"{', '.join(members)} together; {max(line.questions for line in figures)} short answers, from the suites "
            f"in which tasks count: {counting}."
        )
    yield ""
    yield HEAD.format(reference=config.compared_with)
    yield "|" + "---|" * (HEAD.count("|") - 1)
    for line in figures:
        asked = "" if line.method == PLAIN else f"{line.retention:.0%}"
        yield f"| {line.method} | {asked} | {' | '.join(_cells(line))} |"
    for reason in dict.fromkeys(line.error for line in figures if line.error):
        where = ", ".join(f"{line.method} at {line.retention:.0%}" for line in figures if line.error == reason)
        yield f"\n– {where}: {reason}."


def _cells(line: Figures) -> list[str]:
    if line.error:
        return ["–"] * 10
    return [
        _percent(line.reached),
        _ranged(line.accuracy, line.accuracy_interval),
        _ranged(line.kept, line.kept_interval) if line.method != PLAIN else "",
        _ranged(line.captions, line.captions_interval),
        _percent(line.agreement),
        _percent(line.kv),
        _percent(line.flops),
        _p(line.p_plain),
        _p(line.p_reference),
        _p(line.p_captions),
    ]


def _task_lines(suite: str, summary: Summary) -> Iterable[str]:
    tasks = {cell: families for cell, families in summary.tasks.items() if cell.suite == suite}
    plain = tasks[Cell(suite, PLAIN, 1.0)]
    names = sorted(plain, key=lambda family: (family not in CAPTIONS, family not in summary.counting[suite], family))
    titles = [name if name in (*CAPTIONS, *summary.counting[suite]) else f"({name})" for name in names]
    yield f"| method | asked | {' | '.join(f'{t} ({plain[n][1]})' for t, n in zip(titles, names, strict=True))} |"
    yield "|---|---|" + "---|" * len(names)
    for cell, families in tasks.items():
        shares = [_percent(families[name][0] / families[name][1]) for name in names]
        asked = "" if cell.method == PLAIN else f"{cell.retention:.0%}"
        yield f"| {cell.method} | {asked} | {' | '.join(shares)} |"


def _percent(value: float) -> str:
    return "" if math.isnan(value) else f"{100 * value:.1f}"


def _ranged(value: float, between: tuple[float, float]) -> str:
    return "" if math.isnan(value) else f"{_percent(value)} [{_percent(between[0])}, {_percent(between[1])}]"


def _p(value: float) -> str:
    return "" if math.isnan(value) else "< .001" if value < 0.001 else f"{value:.3f}".lstrip("0") if value < 1 else "1"


def _plain_value(value: Any) -> Any:
    if isinstance(value, tuple):
        return [_plain_value(part) for part in value]
    return None if isinstance(value, float) and math.isnan(value) else value
