"""Token merging (ToMe): bipartite soft matching over an item's tokens, by content alone."""

from lightkv.methods.published import in_windows
from lightkv.vision.tokens import Compressed, Tokens, removal


def tome(tokens: Tokens, drop: float) -> Compressed:
    """Every second token of an item in raster order merges into the most similar of the others, the best first.

    Similarity is the cosine of hidden states, the mean is weighted by size. Beyond half of the tokens, what is left is
    matched again.
    """
    return in_windows(tokens, tokens.size, 1, drop, None, "window")


def tome_cost(vision: int, drop: float, width: int) -> tuple[int, int]:
    """Of one item's `vision` tokens: how many are left, and FLOPs of the similarities."""
    wanted, flops = removal(vision, drop), 0
    now = vision
    while now > vision - wanted:
        flops += 2 * ((now + 1) // 2) * (now // 2) * width
        now -= min(now // 2, now - (vision - wanted))
    return now, flops
