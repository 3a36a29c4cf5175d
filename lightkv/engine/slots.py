"""The KV caches of the decode batch: rows of different lengths that are added and removed between decode steps."""

from collections.abc import Sequence
from itertools import accumulate, pairwise
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from lightkv.engine.layerkv import Bits, LayerKV
from lightkv.engine.prefill import Prefilled
from lightkv.ops.attend import attend
from lightkv.ops.codes import ABSENT, Quantised, concatenated
from lightkv.ops.quantised import attend_quantised
from lightkv.ops.ragged import Keys, Sequences

ROOM = 64  # tokens by which the room for answers grows


class Slots(Protocol):
    """Rows 0 … n - 1 of the decode batch, each with one cache per layer."""

    def __len__(self) -> int: ...

    @property
    def nbytes(self) -> int:
        """Bytes allocated, including unused room."""

    def admit(self, prompts: Sequence[Prefilled], spend: bool = False) -> None:
        """Append rows.

        With spend=True each prompt's layer is freed as soon as it is copied, so at most one layer exists twice; the
        prompts cannot be used again even if this raises.
        """

    def keep(self, rows: Sequence[int]) -> None:
        """Remove all rows except these, which become rows 0 … in this order."""

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        """The callback of `Layers.run`: append one token per row, then attend, q [B, Hq, 1, d], to the whole row."""


def slots(layers: int, bits: Bits) -> Slots:
    """Empty slots: all in the model's own type (16 bits), or with quantised prompts."""
    return PlainSlots(layers) if bits.bits == 16 else PackedSlots(layers)


class _Padded:
    """Keys and values [B, Hkv, room, d] of one layer, rows filled from the left; bias [B, room], ABSENT where empty.

    The rows' lengths are kept twice: `lengths` on the host, `ends` int64 [B] on the device. So a decode step uploads
    nothing; an upload would wait until the layers before it are finished.
    """

    def __init__(self) -> None:
        self.k = self.v = torch.empty(0)
        self.bias = torch.empty(0)
        self.lengths: list[int] = []
        self.rows = self.ends = torch.empty(0, dtype=torch.int64)

    def add(self, rows: Sequence[tuple[Tensor, Tensor, Tensor]]) -> None:
        """Append rows: k, v [Hkv, n, d] and bias [n] of each; n may differ."""
        lengths = [k.shape[1] for k, _, _ in rows]
        before, (heads, _, dims) = len(self.lengths), rows[0][0].shape
        room = max(max([*self.lengths, *lengths]) + ROOM, self.bias.shape[-1])
        # Zero-filled, not empty(): 0 x NaN from uninitialised memory would be NaN.
        k, v = (rows[0][part].new_zeros(before + len(rows), heads, room, dims) for part in (0, 1))
        bias = rows[0][2].new_full((before + len(rows), room), ABSENT)
        ends = torch.zeros(before + len(rows), dtype=torch.int64, device=k.device)
        if before:
            held = self.bias.shape[1]
            k[:before, :, :held], v[:before, :, :held], bias[:before, :held] = self.k, self.v, self.bias
            ends[:before] = self.ends
        for number, (row_k, row_v, row_bias) in enumerate(rows, before):
            length = len(row_bias)
            k[number, :, :length], v[number, :, :length], bias[number, :length] = row_k, row_v, row_bias
            ends[number] = length
        places = torch.arange(len(ends), device=k.device)
        self.k, self.v, self.bias, self.rows, self.ends = k, v, bias, places, ends
        self.lengths += lengths

    @property
    def device(self) -> torch.device:
        return self.bias.device

    def keep(self, rows: Sequence[int], index: Tensor) -> None:
        """See `Slots.keep`; index: the same rows, int64 on the device."""
        self.lengths = [self.lengths[row] for row in rows]
        room = min(self.bias.shape[1], max(self.lengths, default=0) + ROOM)
        self.k, self.v, self.bias = self.k[index, :, :room], self.v[index, :, :room], self.bias[index, :room]
        self.rows, self.ends = self.rows[: len(rows)], self.ends[index]

    def append(self, k: Tensor, v: Tensor) -> None:
        """Append one token per row, k, v [B, Hkv, 1, d]."""
        if max(self.lengths) == self.bias.shape[1]:
            self._widen(self.bias.shape[1] + ROOM)
        self.k[self.rows, :, self.ends] = k[:, :, 0]
        self.v[self.rows, :, self.ends] = v[:, :, 0]
        self.bias[self.rows, self.ends] = 0.0
        self.lengths = [length + 1 for length in self.lengths]
        self.ends += 1

    def view(self) -> tuple[Tensor, Tensor, Tensor]:
        """k, v and bias, cut to the longest row."""
        most = max(self.lengths)
        return self.k[:, :, :most], self.v[:, :, :most], self.bias[:, :most]

    @property
    def nbytes(self) -> int:
        return self.k.nbytes + self.v.nbytes

    def _widen(self, room: int) -> None:
        more = room - self.bias.shape[1]
        if more > 0:
            self.k, self.v = F.pad(self.k, (0, 0, 0, more)), F.pad(self.v, (0, 0, 0, more))
            self.bias = F.pad(self.bias, (0, more), value=ABSENT)


class PlainSlots:
    """Slots in the model's own type."""

    def __init__(self, layers: int) -> None:
        self._layers = [_Padded() for _ in range(layers)]

    def __len__(self) -> int:
        return len(self._layers[0].lengths)

    @property
    def nbytes(self) -> int:
        return sum(layer.nbytes for layer in self._layers)

    def admit(self, prompts: Sequence[Prefilled], spend: bool = False) -> None:
        for index, layer in enumerate(self._layers):
            rows = []
            for prompt in prompts:
                tail_k, tail_v = prompt.tail[index]
                bias = tail_k.new_zeros(tail_k.shape[1], dtype=torch.float32)
                k, v, log_size = (
                    prompt.kv[index].view() if len(prompt.kv[index]) else (tail_k[:, :0], tail_v[:, :0], bias[:0])
                )
                rows.append((torch.cat([k, tail_k], 1), torch.cat([v, tail_v], 1), torch.cat([log_size, bias])))
            layer.add(rows)
            if spend:
                _free_layer(prompts, index)

    def keep(self, rows: Sequence[int]) -> None:
        index = _uploaded(rows, self._layers)
        for layer in self._layers:
            layer.keep(rows, index)

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        held = self._layers[layer]
        held.append(k, v)
        keys, values, bias = held.view()
        return attend(q, keys, values, bias.contiguous(), None, scale)


class PackedSlots:
    """Slots with quantised prompts, concatenated; questions and answers are in the model's own type."""

    def __init__(self, layers: int) -> None:
        self._tails = [_Padded() for _ in range(layers)]
        self._rows: list[list[tuple[Quantised, Tensor]]] = [[] for _ in range(layers)]
        self._joined: list[tuple[Quantised, Tensor, Sequences]] = []

    def __len__(self) -> int:
        return len(self._tails[0].lengths)

    @property
    def nbytes(self) -> int:
        packed = sum(part.nbytes for rows in self._rows for part, _ in rows)
        return packed + sum(tail.nbytes for tail in self._tails)

    def admit(self, prompts: Sequence[Prefilled], spend: bool = False) -> None:
        for index, tail in enumerate(self._tails):
            self._rows[index] += [prompt.kv[index].packed() for prompt in prompts]
            tail.add(
                [(k, v, k.new_zeros(k.shape[1], dtype=torch.float32)) for k, v in (p.tail[index] for p in prompts)]
            )
            if spend:
                _free_layer(prompts, index)
        self._join()

    def keep(self, rows: Sequence[int]) -> None:
        stays = _uploaded(rows, self._tails)
        for index, tail in enumerate(self._tails):
            self._rows[index] = [self._rows[index][row] for row in rows]
            tail.keep(rows, stays)
        self._join()

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        tail = self._tails[layer]
        tail.append(k, v)
        packed, bias, sequences = self._joined[layer]
        return attend_quantised(q[:, :, 0], packed, sequences, bias, Keys(*tail.view()), scale)[:, None]

    def _join(self) -> None:
        """Concatenate the prompts of every layer, as the kernel reads them; the rows become views of the result."""
        self._joined = []
        uploaded: dict[tuple[int, ...], Sequences] = {}  # layers between two stages have the same starts
        for index, rows in enumerate(self._rows if len(self) else ()):
            packed, bias = concatenated([part for part, _ in rows]), torch.cat([bias for _, bias in rows])
            ends = tuple(accumulate((len(part) for part, _ in rows), initial=0))
            self._rows[index] = [(packed.between(*cut), bias[slice(*cut)]) for cut in pairwise(ends)]
            if ends not in uploaded:
                uploaded[ends] = Sequences.of([len(part) for part, _ in rows], bias.device)
            self._joined.append((packed, bias, uploaded[ends]))


def _uploaded(rows: Sequence[int], layers: Sequence[_Padded]) -> Tensor:
    return torch.tensor(rows, dtype=torch.int64, device=layers[0].device)


def _free_layer(prompts: Sequence[Prefilled], index: int) -> None:
    """Free a layer of prompts that are not used again."""
    for prompt in prompts:
        prompt.kv[index] = LayerKV(Bits())
