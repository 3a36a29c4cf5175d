"""Statistics of the evaluation, in NumPy. Scenes are resampled, because questions about one scene are not independent.

A tally counts right answers and questions per scene. All suites have the same weight: the accuracy over suites is the
mean of theirs, whatever their numbers of questions.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

LEVEL = 0.95


class Tally(NamedTuple):
    """Per scene of one suite: right answers and questions, float64 [S] each."""

    right: np.ndarray
    asked: np.ndarray


def weights(rng: np.random.Generator, scenes: int, resamples: int) -> np.ndarray:
    """How often each scene counts, float64 [1 + resamples, scenes]: row 0 once each, then drawn with replacement.

    The same draws for every method make ratios and differences of methods paired.
    """
    drawn = rng.multinomial(scenes, np.full(scenes, 1 / scenes), size=resamples)
    return np.vstack([np.ones(scenes), drawn]).astype(np.float64)


def accuracies(tallies: Sequence[Tally], weights: Sequence[np.ndarray]) -> np.ndarray:
    """[1 + resamples]: the accuracy, then that of every resample; mean over suites with questions, NaN without any."""
    asking = [(tally, w) for tally, w in zip(tallies, weights, strict=True) if tally.asked.sum()]
    if not asking:
        return np.full(len(weights[0]), np.nan)
    with np.errstate(invalid="ignore"):  # a resample may have no question
        return np.mean([(w @ tally.right) / (w @ tally.asked) for tally, w in asking], axis=0)


def interval(values: np.ndarray) -> tuple[float, float]:
    """The percentile bootstrap interval of a result of `accuracies`, or of a ratio of two results."""
    drawn = values[1:][np.isfinite(values[1:])]
    if not len(drawn):
        return float("nan"), float("nan")
    low, high = np.quantile(drawn, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return float(low), float(high)


def paired_p(one: Sequence[Tally], other: Sequence[Tally], rng: np.random.Generator, resamples: int) -> float:
    """Two-sided p of a paired permutation test, which swaps the two methods per scene.

    At least 1 / (resamples + 1); 1 if no scene differs.
    """
    differences = np.concatenate(
        [(a.right - b.right) / max(a.asked.sum(), 1.0) / len(one) for a, b in zip(one, other, strict=True)]
    )
    signs = rng.integers(0, 2, (resamples, len(differences)), dtype=np.int8) * 2 - 1
    reached = np.abs(signs @ differences) >= abs(differences.sum()) - 1e-12
    return float((1 + reached.sum()) / (1 + resamples))
