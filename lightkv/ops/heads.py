"""What the votes and their kernel share: how votes are reduced, and which heads of the two sides meet."""

from typing import Literal

Reduce = Literal["sum", "max"]


def short_heads(long: int, short: int) -> tuple[int, int]:
    """(group, shared) for that many heads: head x of long meets `group` heads of short from x · group // shared on."""
    return max(1, short // long), max(1, long // short)
