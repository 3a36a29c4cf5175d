"""The KV cache of one decoder layer of one prompt; it grows during prefill and can be quantised group by group."""

from dataclasses import dataclass

import torch
from torch import Tensor

from lightkv.errors import ConfigError
from lightkv.ops.codes import ABSENT, LEAST_GROUP, Quantised, concatenated, dequantise, quantise, usual_value_group

GROWTH = 1.25  # factor by which the allocation grows when it is full


@dataclass(frozen=True)
class Bits:
    """Precision of the prompt's cache in bits per number: 4, 8, or 16 for the model's own type.

    Keys are scaled per channel over `group` tokens, values per token over `value_group` channels (None: the
    operation's default).
    """

    bits: int = 16
    group: int = 32
    value_group: int | None = None

    def __post_init__(self) -> None:
        if self.bits not in (4, 8, 16):
            raise ConfigError(f"bits of the cache must be 4, 8 or 16, got {self.bits}")
        if self.group < LEAST_GROUP or self.group & (self.group - 1):
            raise ConfigError(f"group must be a power of two of at least {LEAST_GROUP} tokens, got {self.group}")

    def per_number(self, dims: int) -> float:
        """Average bits per number of keys and values in a 16-bit model, including its share of scales."""
        if self.bits == 16:
            return 16.0
        scale_and_zero = 2 * 16
        return (
            self.bits
            + (scale_and_zero / self.group + scale_and_zero / (self.value_group or usual_value_group(dims))) / 2
        )

    def check(self, dims: int) -> None:
        """Raises ConfigError if heads of `dims` dimensions cannot be quantised this way."""
        if self.bits != 16:
            none = torch.empty(1, 0, dims)
            quantise(none, none, self.bits, self.group, self.value_group)


class LayerKV:
    """Keys and values [Hkv, n, d], and the log of the tokens' sizes, fp32 [n]. Sealed tokens cannot be changed."""

    def __init__(self, bits: Bits) -> None:
        self._bits = bits
        self._parts: list[Quantised] = []
        self._sealed = 0  # tokens
        self._log_size = torch.empty(0)  # of all tokens; room at the end
        self._k = torch.empty(0, 0, 0)  # of the tokens that are not sealed; room at the end
        self._v = torch.empty(0, 0, 0)
        self._open = 0

    def __len__(self) -> int:
        return self._sealed + self._open

    @property
    def nbytes(self) -> int:
        """Bytes of keys and values, without unused room."""
        held = sum(part.nbytes for part in self._parts)
        return held + 2 * self._k.shape[0] * self._open * self._k.shape[2] * self._k.element_size()

    def push(self, k: Tensor, v: Tensor, log_size: Tensor) -> None:
        """Append k, v [Hkv, m, d] and log_size fp32 [m]."""
        end = self._open + k.shape[1]
        self._k, self._v = (_room(held, self._open, new) for held, new in ((self._k, k), (self._v, v)))
        self._log_size = _room(self._log_size, len(self), log_size, axis=0)
        self._k[:, self._open : end] = k
        self._v[:, self._open : end] = v
        self._log_size[len(self) : self._sealed + end] = log_size
        self._open = end

    def view(self) -> tuple[Tensor, Tensor, Tensor]:
        """k, v [Hkv, n, d] and log sizes fp32 [n] of all tokens; sealed tokens are dequantised."""
        k, v, log_size = self._k[:, : self._open], self._v[:, : self._open], self._log_size[: len(self)]
        if self._parts:
            k_old, v_old = dequantise(self._packed(), k.dtype)
            k, v = torch.cat([k_old, k], dim=1), torch.cat([v_old, v], dim=1)
        return k, v, log_size

    def since(self, begin: int) -> tuple[Tensor, Tensor, Tensor]:
        """Copies of k, v and log sizes of the tokens after the first `begin`; none of them may be sealed."""
        assert begin >= self._sealed
        first = begin - self._sealed
        k, v = self._k[:, first : self._open], self._v[:, first : self._open]
        return k.clone(), v.clone(), self._log_size[begin : len(self)].clone()

    def truncate(self, length: int) -> None:
        """Remove all tokens after the first `length`."""
        assert self._sealed <= length <= len(self)
        self._open = length - self._sealed

    def seal(self, rest: bool = False) -> None:
        """Quantise all full groups; with `rest` also the last one, padded with tokens of size zero (ABSENT)."""
        if self._bits.bits == 16:
            return
        if rest and (short := -self._open % self._bits.group):
            k, v = (held[:, self._open - 1 : self._open].expand(-1, short, -1) for held in (self._k, self._v))
            self.push(k, v, self._log_size.new_full((short,), ABSENT))
        whole = self._open - self._open % self._bits.group
        if not whole:
            return
        k, v = self._k[:, :whole], self._v[:, :whole]
        packed = quantise(k, v, self._bits.bits, self._bits.group, self._bits.value_group)
        left = slice(whole, self._open)
        self._k, self._v = self._k[:, left].clone(), self._v[:, left].clone()
        self._parts.append(packed)  # if memory ran out before this line, nothing has changed
        self._sealed, self._open = self._sealed + whole, self._open - whole

    def packed(self) -> tuple[Quantised, Tensor]:
        """All tokens, quantised, and their log sizes; only after `seal(rest=True)`."""
        assert not self._open
        if not self._parts:
            none = self._k[:, :0]
            self._parts = [quantise(none, none, self._bits.bits, self._bits.group, self._bits.value_group)]
        return self._packed(), self._log_size[: self._sealed]

    def _packed(self) -> Quantised:
        if len(self._parts) > 1:
            self._parts = [concatenated(self._parts)]
        return self._parts[0]


def _room(held: Tensor, used: int, new: Tensor, axis: int = 1) -> Tensor:
    """A tensor with the first `used` entries of `held` along `axis` and room for `new` after them."""
    need = used + new.shape[axis]
    if held.shape[axis] >= need and len(held):  # no heads: nothing was pushed yet
        return held
    # The first allocation is exact: most prompts need no more.
    shape = list(new.shape)
    shape[axis] = max(need, int(held.shape[axis] * GROWTH))
    grown = new.new_empty(shape)
    if used:
        grown.narrow(axis, 0, used).copy_(held.narrow(axis, 0, used))
    return grown
