"""Compute figures from raw answers: which tasks count, accuracy kept, intervals, tests, agreement and cost.

A task counts in a suite if the plain model answers at least `counts_from` of its questions right: a task that it half
knows says little about compression. Choosing tasks by the plain answers to the same questions favours the plain model a
little, so that the kept accuracy is, if anything, understated. Captions never count as short answers. Every word of a
caption must be right, which makes it the sensitive task; captions are reported separately, at any accuracy.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from jobs.measure.evaluate.config import CAPTIONS, PLAIN, Cell, EvaluateConfig, cells_of
from jobs.measure.evaluate.statistics import Tally, accuracies, interval, paired_p, weights

EVERY = "all suites"


@dataclass(frozen=True)
class Answered:
    """The answers of one cell as columns; all cells of a suite have the same questions in the same order."""

    scene: np.ndarray
    family: np.ndarray
    right: np.ndarray
    agrees: np.ndarray
    reached: np.ndarray
    kv_bytes: np.ndarray
    flops: np.ndarray

    def tally(self, families: Sequence[str], scenes: int, values: np.ndarray | None = None) -> Tally:
        """Right answers (or `values`) and questions per scene, over the questions of these families."""
        chosen = np.isin(self.family, list(families))
        values = self.right if values is None else values
        right = np.bincount(self.scene[chosen], values[chosen], minlength=scenes)
        return Tally(right, np.bincount(self.scene[chosen], minlength=scenes).astype(np.float64))


@dataclass(frozen=True)
class Figures:
    """One line of a table: a method at a retention in one suite or in several; NaN without questions.

    accuracy, kept    of the short answers that count, absolute and as a share of the plain model's
    captions          exact match of whole captions
    agreement         share of the short answers that equal the plain model's, right or wrong
    kv, flops         of prefill, as a share of the plain model's for the same questions
    p_plain, p_reference  of paired permutation tests of accuracy, not corrected for their number; p_captions: of the
                          captions against the reference
    error             why there are no figures, else empty
    """

    suite: str
    method: str
    retention: float
    error: str = ""
    questions: int = 0
    reached: float = float("nan")
    accuracy: float = float("nan")
    accuracy_interval: tuple[float, float] = (float("nan"), float("nan"))
    kept: float = float("nan")
    kept_interval: tuple[float, float] = (float("nan"), float("nan"))
    captions: float = float("nan")
    captions_interval: tuple[float, float] = (float("nan"), float("nan"))
    agreement: float = float("nan")
    kv: float = float("nan")
    flops: float = float("nan")
    p_plain: float = float("nan")
    p_reference: float = float("nan")
    p_captions: float = float("nan")


@dataclass(frozen=True)
class Summary:
    """figures   pools of suites (`pools_of`), then suite by suite, in the order of the configuration
    tasks     (suite, method, retention) → family → (right, asked), of everything asked
    counting  suite → families that count as short answers
    """

    figures: list[Figures]
    tasks: dict[Cell, dict[str, tuple[int, int]]]
    counting: dict[str, tuple[str, ...]]


def summarise(table: pa.Table, config: EvaluateConfig) -> Summary:
    """Figures of all cells in `table` (`answers.SCHEMA` with `agrees`).

    A suite without the plain model's answers is left out.
    """
    answered, errors = _by_cell(table)
    cells = [cell for cell in cells_of(config) if _plain(cell.suite) in answered]
    suites = list(dict.fromkeys(cell.suite for cell in cells))
    tasks = {cell: _tasks(answered[cell]) for cell in cells if cell in answered}
    counting = {suite: _counting(tasks[_plain(suite)], config.counts_from) for suite in suites}
    compare = _Comparison(config, answered, counting)
    figures = []
    for name, members in pools_of(config, suites).items():
        for cell in (cell for cell in cells if cell.suite == members[0]):
            figures += compare.pooled(name, members, cell, errors)
    for cell in cells:
        if cell in answered:
            figures.append(compare.figures(cell.suite, [cell.suite], cell.method, cell.retention))
        elif cell in errors:
            figures.append(Figures(cell.suite, cell.method, cell.retention, errors[cell]))
    return Summary(figures, tasks, counting)


def pools_of(config: EvaluateConfig, suites: Iterable[str]) -> dict[str, list[str]]:
    """Pools of suites that are also shown together: all pooled suites, and all of one kind, if there are several."""
    kinds = {suite: config.suites[suite].kind for suite in suites if config.suites[suite].pooled}
    pools = {EVERY: list(kinds)}
    for kind in dict.fromkeys(kinds.values()):
        pools[f"all {kind} suites"] = [suite for suite, its in kinds.items() if its == kind]
    several = {name: members for name, members in pools.items() if len(members) > 1}
    return {name: members for name, members in several.items() if name == EVERY or len(members) < len(kinds)}


class _Comparison:
    """Compares cells of the same suites under the same resamples."""

    def __init__(
        self, config: EvaluateConfig, answered: dict[Cell, Answered], counting: dict[str, tuple[str, ...]]
    ) -> None:
        self.config, self.answered, self.counting = config, answered, counting
        self.scenes = {suite: int(answered[_plain(suite)].scene.max()) + 1 for suite in counting}
        self.weights = {
            suite: weights(np.random.default_rng([config.seed, zlib.crc32(suite.encode())]), scenes, config.resamples)
            for suite, scenes in self.scenes.items()
        }

    def pooled(self, name: str, suites: list[str], cell: Cell, errors: dict[Cell, str]) -> list[Figures]:
        """The line over several suites; an error if one suite has an error, no line if one is not answered yet."""
        parts = [Cell(suite, cell.method, cell.retention) for suite in suites]
        if all(part in self.answered for part in parts):
            return [self.figures(name, suites, cell.method, cell.retention)]
        lacking = [part.suite for part in parts if part in errors]
        if not lacking:
            return []
        return [Figures(name, cell.method, cell.retention, f"not reached in {', '.join(lacking)}")]

    def figures(self, name: str, suites: list[str], method: str, retention: float) -> Figures:
        cells = [self.answered[Cell(suite, method, retention)] for suite in suites]
        plains = [self.answered[_plain(suite)] for suite in suites]
        drawn = [self.weights[suite] for suite in suites]
        short, plain_short = self._tallies(suites, cells), self._tallies(suites, plains)
        accuracy, plain = accuracies(short, drawn), accuracies(plain_short, drawn)
        with np.errstate(invalid="ignore", divide="ignore"):
            kept = accuracy / plain
        captions = self._tallies(suites, cells, CAPTIONS)
        told = accuracies(captions, drawn)
        agrees = [self._tally(s, c, self.counting[s], c.agrees) for s, c in zip(suites, cells, strict=True)]
        return Figures(
            suite=name,
            method=method,
            retention=retention,
            questions=int(sum(tally.asked.sum() for tally in short)),
            reached=float(np.mean([cell.reached.mean() for cell in cells])),
            accuracy=float(accuracy[0]),
            accuracy_interval=interval(accuracy),
            kept=float(kept[0]),
            kept_interval=interval(kept),
            captions=float(told[0]),
            captions_interval=interval(told),
            agreement=float(accuracies(agrees, [w[:1] for w in drawn])[0]),
            kv=_share([cell.kv_bytes for cell in cells], [cell.kv_bytes for cell in plains]),
            flops=_share([cell.flops for cell in cells], [cell.flops for cell in plains]),
            p_plain=self._p(short, plain_short) if method != PLAIN else float("nan"),
            p_reference=self._p_reference(suites, short, method, retention),
            p_captions=self._p_reference(suites, captions, method, retention, CAPTIONS),
        )

    def _tallies(self, suites: list[str], cells: list[Answered], families: Sequence[str] | None = None) -> list[Tally]:
        """Tallies suite by suite; without `families`, of the short answers that count there."""
        return [
            self._tally(suite, cell, families or self.counting[suite])
            for suite, cell in zip(suites, cells, strict=True)
        ]

    def _tally(self, suite: str, cell: Answered, families: Sequence[str], values: np.ndarray | None = None) -> Tally:
        return cell.tally(families, self.scenes[suite], values)

    def _p_reference(
        self,
        suites: list[str],
        tallies: list[Tally],
        method: str,
        retention: float,
        families: Sequence[str] | None = None,
    ) -> float:
        others = [Cell(suite, self.config.compared_with, retention) for suite in suites]
        if method in (PLAIN, self.config.compared_with) or not all(other in self.answered for other in others):
            return float("nan")
        return self._p(tallies, self._tallies(suites, [self.answered[other] for other in others], families))

    def _p(self, one: list[Tally], other: list[Tally]) -> float:
        if not sum(tally.asked.sum() for tally in one):
            return float("nan")
        return paired_p(one, other, np.random.default_rng(self.config.seed), self.config.resamples)


def with_plain(table: pa.Table) -> pa.Table:
    """Add two columns: the `plain_answer` to the same question, and whether the answer `agrees` with it."""
    rows = table.select(["suite", "scene", "question", "method", "answer"]).to_pylist()
    known = {(row["suite"], row["scene"], row["question"]): row["answer"] for row in rows if row["method"] == PLAIN}
    plain = [known.get((row["suite"], row["scene"], row["question"])) for row in rows]
    agrees = [None if a is None else a == row["answer"] for a, row in zip(plain, rows, strict=True)]
    return table.append_column("plain_answer", pa.array(plain, pa.string())).append_column(
        "agrees", pa.array(agrees, pa.bool_())
    )


def _plain(suite: str) -> Cell:
    return Cell(suite, PLAIN, 1.0)


def _by_cell(table: pa.Table) -> tuple[dict[Cell, Answered], dict[Cell, str]]:
    names = [table[name].to_numpy(zero_copy_only=False) for name in ("suite", "method", "retention")]
    starts = np.flatnonzero(np.r_[True, np.logical_or.reduce([name[1:] != name[:-1] for name in names])])
    answered, errors = {}, {}
    for start, stop in zip(starts, [*starts[1:], table.num_rows], strict=True):
        suite, method, retention = (name[start] for name in names)
        cell = Cell(suite, method, float(retention))
        part = table.slice(start, stop - start)
        if part["error"][0].as_py():
            errors[cell] = part["error"][0].as_py()
        else:
            answered[cell] = _answered(part)
    return answered, errors


def _answered(part: pa.Table) -> Answered:
    columns: dict[str, Any] = {
        name: part[name].to_numpy(zero_copy_only=False) for name in Answered.__dataclass_fields__
    }
    return Answered(**{**columns, **{name: columns[name].astype(np.float64) for name in ("right", "agrees")}})


def _tasks(cell: Answered) -> dict[str, tuple[int, int]]:
    return {
        str(family): (int(cell.right[cell.family == family].sum()), int((cell.family == family).sum()))
        for family in np.unique(cell.family)
    }


def _counting(tasks: dict[str, tuple[int, int]], counts_from: float) -> tuple[str, ...]:
    return tuple(
        family for family, (right, asked) in tasks.items() if family not in CAPTIONS and right >= counts_from * asked
    )


def _share(values: list[np.ndarray], plain: list[np.ndarray]) -> float:
    """The sum as a share of the plain model's, mean over suites."""
    return float(np.mean([v.sum() / p.sum() for v, p in zip(values, plain, strict=True)]))
