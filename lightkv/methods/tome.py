"""Token merging (ToMe, Bolya et al. 2023): bipartite soft matching over an item's tokens, by content alone."""

from lightkv.methods.published import in_windows
from lightkv.vision.tokens import Compressed, Tokens, removal


def tome(tokens: Tokens, drop: float) -> Compressed:
    """Merges every second token of an item, in raster order, into its most similar other token, the best pairs first.

    Similarity is the cosine of hidden states; merging takes the mean weighted by size. One matching removes at most
    half of the tokens; if `drop` asks for more, the rest is matched again.
    """
    return in_windows(tokens, tokens.size, 1, drop, None, "window")


def tome_cost(vision: int, drop: float, width: int) -> tuple[int, int]:
    """(tokens left, FLOPs of the similarities) for one item of `vision` tokens."""
    wanted, flops = removal(vision, drop), 0
    now = vision
    while now > vision - wanted:
        flops += 2 * ((now + 1) // 2) * (now // 2) * width
        now -= min(now // 2, now - (vision - wanted))
    return now, flops
