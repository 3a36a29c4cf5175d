"""Reductions and head pairing shared by softmax_votes and its kernel."""

from typing import Literal

Reduce = Literal["sum", "max"]


def short_heads(long: int, short: int) -> tuple[int, int]:
    """Returns (group, shared): head x of long is paired with `group` heads of short, from x · group // shared on."""
    return max(1, short // long), max(1, long // short)
