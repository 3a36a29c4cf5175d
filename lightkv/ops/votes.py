"""Scores tokens of long sequences by softmax along the long side, reduced over heads and the tokens of a short side.

Stages use it for two scores. Prompt guidance (method step 1): queries are the long side, text keys the short side,
reduced by sum. Question attention: vision keys are the long side, the question's queries the short side, reduced by
maximum.
"""

import torch
from torch import Tensor

from lightkv.errors import ConfigError
from lightkv.ops.dispatch import use_triton
from lightkv.ops.heads import Reduce, short_heads
from lightkv.ops.ragged import Selection

REDUCES = ("sum", "max")
DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)
SCORES_AT_ONCE = 1 << 24  # fp32 scores in memory at once in the twin: 64 MiB


def softmax_votes(long: Selection, short: Selection, scale: float, reduce: Reduce) -> Tensor:
    """out_i = Σ or max over heads h and the sequence's short tokens j of softmax_i(scale · long_i,h · short_j,h).

    The softmax runs over the long tokens i of the same sequence. A sequence without short tokens gets 0.

    long   N tokens of [B, Hl, S, d] in R sequences
    short  M tokens of [B, Hs, S', d] in R sequences, of the same floating-point dtype

    H, the larger of Hl and Hs, is a multiple of the other. h runs over H; each head of long serves H / Hl of them, each
    head of short H / Hs.

    → fp32 [N], in the order of long.index, without gradient. Raises ConfigError for arguments that do not fit.
    """
    _check(long, short, reduce)
    if use_triton(long.states):
        from lightkv.ops.votes_kernel import softmax_votes_triton as run
    else:
        run = softmax_votes_torch
    return run(long, short, scale, reduce)


@torch.no_grad()
def softmax_votes_torch(long: Selection, short: Selection, scale: float, reduce: Reduce) -> Tensor:
    """The twin: fp32, one sequence and head of `long` at a time, at most SCORES_AT_ONCE scores.

    Raises ConfigError if a sequence is longer than its `longest`.
    """
    votes = torch.zeros(len(long.index), dtype=torch.float32, device=long.states.device)
    group, shared = short_heads(long.states.shape[1], short.states.shape[1])
    long_sizes, short_sizes = _lengths("long", long), _lengths("short", short)
    sequences = zip(votes.split(long_sizes), long.index.split(long_sizes), short.index.split(short_sizes), strict=True)
    for best, long_tokens, short_tokens in sequences:
        at_once = max(1, SCORES_AT_ONCE // max(1, len(long_tokens)))
        for head in range(long.states.shape[1]):
            first = head * group // shared
            rows = _tokens(long.states, long_tokens, slice(head, head + 1)).T  # [d, n]
            for block in (_tokens(short.states, short_tokens, slice(first, first + group)) * scale).split(at_once):
                attention = torch.softmax(block @ rows, dim=-1)
                if reduce == "sum":
                    best += attention.sum(dim=0)
                elif len(block):
                    torch.maximum(best, attention.amax(dim=0), out=best)
    return votes


def _lengths(name: str, side: Selection) -> list[int]:
    sequences = side.sequences
    lengths: list[int] = sequences.starts.diff().tolist()
    if max(lengths, default=0) > sequences.longest:
        longest = f"{max(lengths)}, got {sequences.longest}"
        raise ConfigError(f"softmax_votes: {name}.sequences.longest must be at least the longest sequence, {longest}")
    return lengths


def _tokens(x: Tensor, index: Tensor, heads: slice) -> Tensor:
    """fp32 [tokens · heads, d] of x [B, H, S, d] at index = b·S + s."""
    rows, columns = index // x.shape[2], index % x.shape[2]
    return x[rows, heads, columns].flatten(0, 1).float()


def _check(long: Selection, short: Selection, reduce: str) -> None:
    if reduce not in REDUCES:
        raise ConfigError(f"softmax_votes: reduce must be one of {REDUCES}, got {reduce!r}")
    one, other = long.states, short.states
    if one.ndim != 4 or other.ndim != 4 or one.shape[3] != other.shape[3]:
        shapes = f"{list(one.shape)} and {list(other.shape)}"
        raise ConfigError(f"softmax_votes: states must be [B, H, S, d] with the same d on both sides, got {shapes}")
    heads = sorted([one.shape[1], other.shape[1]])
    if heads[0] < 1 or heads[1] % heads[0]:
        raise ConfigError(f"softmax_votes: one number of heads must divide the other, got {heads}")
    if one.dtype != other.dtype or one.dtype not in DTYPES:
        raise ConfigError(f"softmax_votes: both sides must have one of {DTYPES}, got {one.dtype} and {other.dtype}")
    for side, selection in (("long", long), ("short", short)):
        for name, tensor in (("index", selection.index), ("sequences.starts", selection.sequences.starts)):
            if tensor.dtype != torch.int64 or tensor.ndim != 1 or tensor.device != one.device:
                expected = f"{side}.{name} must be int64 with one dimension on {one.device}"
                got = f"{tensor.dtype} {list(tensor.shape)} on {tensor.device}"
                raise ConfigError(f"softmax_votes: {expected}, got {got}")
    sizes = [len(side.sequences.starts) for side in (long, short)]
    if sizes[0] != sizes[1] or not sizes[0]:
        raise ConfigError(
            f"softmax_votes: starts must have sequences + 1 entries on both sides, got {sizes[0]} and {sizes[1]}"
        )
