"""Votes of short sequences on long ones: a softmax along the long side, reduced over heads and the short side.

Both kinds of scores that a stage asks for are this: prompt guidance (method step 1: queries are the long side, the
text's keys the short one, summed) and the question's attention (vision keys and the question's queries, the maximum).
"""

import torch
from torch import Tensor

from lightkv.errors import ConfigError
from lightkv.ops.dispatch import use_triton
from lightkv.ops.heads import Reduce, short_heads

REDUCES = ("sum", "max")
DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)
SCORES_AT_ONCE = 1 << 24  # fp32 scores the twin holds at a time: 64 MiB


def softmax_votes(
    long: Tensor,
    short: Tensor,
    long_index: Tensor,
    long_starts: Tensor,
    short_index: Tensor,
    short_starts: Tensor,
    scale: float,
    reduce: Reduce,
    most_long: int,
    most_short: int,
) -> Tensor:
    """out_i = Σ or max over heads h and the sequence's short tokens j of softmax_i(scale · long_i,h · short_j,h).

    The softmax runs over the long tokens i of the same sequence. A sequence without short tokens gets 0.

    long   [B, Hl, S, d] and short [B, Hs, S', d] of one floating dtype, any strides. The larger of Hl and
           Hs, H, is a multiple of the other: h runs over H, and H / Hl of them share a head of long, likewise short.
    index  int64 [N] and [M] of the tokens that count, sequence after sequence, each as b·S + s (b·S' + s)
    starts int64 [R + 1] per side: sequence r owns index[starts[r] : starts[r + 1]]; from 0 to N (M)
    most   the largest sequence of each side, or more: kernels are sized by it, without waiting for the device

    → fp32 [N], in the order of long_index, without gradient. Raises ConfigError for arguments that do not fit together.
    """
    _check(long, short, long_index, long_starts, short_index, short_starts, reduce)
    if use_triton(long):
        from lightkv.ops.votes_kernel import softmax_votes_triton as run
    else:
        run = softmax_votes_torch
    return run(long, short, long_index, long_starts, short_index, short_starts, scale, reduce, most_long, most_short)


@torch.no_grad()
def softmax_votes_torch(
    long: Tensor,
    short: Tensor,
    long_index: Tensor,
    long_starts: Tensor,
    short_index: Tensor,
    short_starts: Tensor,
    scale: float,
    reduce: Reduce,
    most_long: int,
    most_short: int,
) -> Tensor:
    """softmax_votes in fp32, one sequence and head of `long` at a time, SCORES_AT_ONCE of its scores at most.

    Raises ConfigError where a sequence is larger than most_long or most_short says.
    """
    votes = torch.zeros(len(long_index), dtype=torch.float32, device=long.device)
    group, shared = short_heads(long.shape[1], short.shape[1])
    long_sizes, short_sizes = long_starts.diff().tolist(), short_starts.diff().tolist()
    for name, sizes, most in (("most_long", long_sizes, most_long), ("most_short", short_sizes, most_short)):
        if max(sizes, default=0) > most:
            raise ConfigError(f"{name} must be at least the largest sequence, {max(sizes)}, got {most}")
    sequences = zip(votes.split(long_sizes), long_index.split(long_sizes), short_index.split(short_sizes), strict=True)
    for best, long_tokens, short_tokens in sequences:
        at_once = max(1, SCORES_AT_ONCE // max(1, len(long_tokens)))
        for head in range(long.shape[1]):
            first = head * group // shared
            rows = _tokens(long, long_tokens, slice(head, head + 1)).T  # [d, n]
            for block in (_tokens(short, short_tokens, slice(first, first + group)) * scale).split(at_once):
                attention = torch.softmax(block @ rows, dim=-1)
                if reduce == "sum":
                    best += attention.sum(dim=0)
                elif len(block):
                    torch.maximum(best, attention.amax(dim=0), out=best)
    return votes


def _tokens(x: Tensor, index: Tensor, heads: slice) -> Tensor:
    """fp32 [tokens · heads, d] of x [B, H, S, d] at index = b·S + s."""
    rows, columns = index // x.shape[2], index % x.shape[2]
    return x[rows, heads, columns].flatten(0, 1).float()


def _check(
    long: Tensor,
    short: Tensor,
    long_index: Tensor,
    long_starts: Tensor,
    short_index: Tensor,
    short_starts: Tensor,
    reduce: str,
) -> None:
    if reduce not in REDUCES:
        raise ConfigError(f"softmax_votes: reduce must be one of {REDUCES}, got {reduce!r}")
    if long.ndim != 4 or short.ndim != 4 or long.shape[3] != short.shape[3]:
        shapes = f"{list(long.shape)} and {list(short.shape)}"
        raise ConfigError(f"softmax_votes: long and short must be [B, H, S, d] with the same d, got {shapes}")
    heads = sorted([long.shape[1], short.shape[1]])
    if heads[0] < 1 or heads[1] % heads[0]:
        raise ConfigError(f"softmax_votes: one number of heads must divide the other, got {heads}")
    if long.dtype != short.dtype or long.dtype not in DTYPES:
        raise ConfigError(f"softmax_votes: both sides must have one of {DTYPES}, got {long.dtype} and {short.dtype}")
    integers = {
        "long_index": long_index,
        "long_starts": long_starts,
        "short_index": short_index,
        "short_starts": short_starts,
    }
    for name, tensor in integers.items():
        if tensor.dtype != torch.int64 or tensor.ndim != 1 or tensor.device != long.device:
            got = f"{tensor.dtype} {list(tensor.shape)} on {tensor.device}"
            raise ConfigError(f"softmax_votes: {name} must be int64 with one dimension on {long.device}, got {got}")
    if len(long_starts) != len(short_starts) or not len(long_starts):
        sizes = f"{len(long_starts)} and {len(short_starts)}"
        raise ConfigError(f"softmax_votes: starts must have sequences + 1 entries on both sides, got {sizes}")
