"""Arguments of the operations: packed sequences of different lengths, keys with a bias, and groups of tokens."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Sequences:
    """Bounds of R packed sequences: sequence r owns tokens starts[r] … starts[r + 1] − 1.

    starts   int64 [R + 1]
    longest  tokens of the longest sequence, or more: kernels are sized by it without waiting for the device
    """

    starts: Tensor
    longest: int

    @classmethod
    def of(cls, lengths: Sequence[int], device: torch.device | str) -> "Sequences":
        """Sequences of these lengths, the first from token 0 on."""
        return cls(torch.tensor([0, *accumulate(lengths)], device=device), max(lengths, default=0))


@dataclass(frozen=True, eq=False)
class Keys:
    """Keys, their values, and the fp32 bias that is added to the scaled scores of each key; None: no bias."""

    k: Tensor
    v: Tensor
    bias: Tensor | None


@dataclass(frozen=True, eq=False)
class Selection:
    """The tokens of a batch that take part in an operation, sequence after sequence.

    states     [B, H, S, d], any strides
    index      int64 [N]: token s of batch row b is b·S + s
    sequences  bounds in `index`, from 0 to N
    """

    states: Tensor
    index: Tensor
    sequences: Sequences


@dataclass(frozen=True, eq=False)
class Groups:
    """Groups of tokens, each split into a set A and a set B.

    order    int64 [N]: token positions, group after group; within a group set A before set B
    starts   int64 [G + 1] and middles int64 [G]: slots starts[g] … middles[g] − 1 of `order` are set A of group g,
             slots middles[g] … starts[g + 1] − 1 its set B
    largest  tokens of the largest set A, or more
    """

    order: Tensor
    starts: Tensor
    middles: Tensor
    largest: int
