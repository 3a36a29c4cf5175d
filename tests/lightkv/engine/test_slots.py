"""Rows decoded together against each row by itself."""

from random import Random

import pytest
import torch

from lightkv import Bits
from lightkv.engine.layerkv import LayerKV
from lightkv.engine.prefill import Prefilled
from lightkv.engine.slots import ROOM, slots
from lightkv.ops.attend import attend
from tests.lightkv.tiny import random

LAYERS, HEADS, DIMS, SCALE = 3, 2, 8, 0.3
CLOSE = dict(atol=1e-5, rtol=1e-5)
ALL_BITS = [16, 8, 4]


def prompt(bits, lengths, tail, seed):
    """A cache with `lengths` tokens per layer, and a question of `tail` tokens."""
    kv = [LayerKV(Bits(bits, group=16)) for _ in lengths]
    for number, (layer, length) in enumerate(zip(kv, lengths, strict=True)):
        layer.push(*random(2, HEADS, length, DIMS, seed=seed + number), random(length, seed=seed).abs())
        layer.seal(rest=True)
    tails = [tuple(random(2, HEADS, tail, DIMS, seed=seed + 50 + number)) for number in range(len(lengths))]
    return Prefilled(kv, tails, torch.zeros(1), 0, (0,) * len(lengths), ())


class ByItself:
    """One row by itself."""

    def __init__(self, prompt):
        self.layers = [
            [torch.cat([k, tail_k], 1), torch.cat([v, tail_v], 1), torch.cat([log_size, torch.zeros(tail_k.shape[1])])]
            for (k, v, log_size), (tail_k, tail_v) in zip(
                (layer.view() for layer in prompt.kv), prompt.tail, strict=True
            )
        ]

    def attend(self, index, q, k, v):
        held = self.layers[index]
        held[:] = torch.cat([held[0], k], 1), torch.cat([held[1], v], 1), torch.cat([held[2], torch.zeros(1)])
        return attend(q[None], held[0][None], held[1][None], held[2][None], None, SCALE)[0]


def steps(held, rows, count, seed):
    """Append `count` tokens to every row; each row attends as it does by itself."""
    for step in range(count):
        for index in range(LAYERS):
            q = random(len(rows), 4, 1, DIMS, seed=seed + step)
            k, v = random(2, len(rows), HEADS, 1, DIMS, seed=seed + 1000 + step)
            together = held.attend(index, q, k, v, SCALE)
            for number, row in enumerate(rows):
                torch.testing.assert_close(
                    together[number], row.attend(index, q[number], k[number], v[number]), **CLOSE
                )


@pytest.mark.parametrize("bits", ALL_BITS)
def test_rows_come_and_go_in_any_order_and_attend_to_their_own_tokens(bits):
    draw, held, rows = Random(0), slots(LAYERS, Bits(bits)), []
    for seed in range(0, 1200, 100):
        fresh = [
            prompt(bits, [draw.choice([0, 1, 17, 90]) for _ in range(LAYERS)], draw.randint(1, 9), seed + number)
            for number in range(draw.randint(1, 3))
        ]
        held.admit(fresh)
        rows += [ByItself(one) for one in fresh]
        steps(held, rows, draw.randint(0, 3), seed)
        stays = draw.sample(range(len(rows)), draw.randint(1, len(rows)))
        held.keep(stays)
        rows = [rows[number] for number in stays]
        assert len(held) == len(rows)
        steps(held, rows, 1, seed + 50)


@pytest.mark.parametrize("bits", ALL_BITS)
def test_answers_may_outgrow_their_room(bits):
    fresh = [prompt(bits, [5, 0, 16], tail, tail) for tail in (1, 4)]
    held = slots(LAYERS, Bits(bits))
    held.admit(fresh)
    steps(held, [ByItself(one) for one in fresh], ROOM + 2, 0)


@pytest.mark.parametrize("bits", ALL_BITS)
def test_a_step_uploads_nothing(bits, monkeypatch):
    """An upload in a layer would wait until the GPU has finished all earlier layers."""
    held = slots(LAYERS, Bits(bits))
    held.admit([prompt(bits, [5, 0, 16], tail, tail) for tail in (1, 4)])
    made = watched(monkeypatch)
    for _ in range(ROOM + 2):  # the room for answers grows once
        for index in range(LAYERS):
            held.attend(index, random(2, 4, 1, DIMS, seed=1), *random(2, 2, HEADS, 1, DIMS, seed=2), SCALE)
    assert made == []


def test_rows_come_without_an_upload_and_go_with_one(monkeypatch):
    held, made = slots(LAYERS, Bits()), watched(monkeypatch)
    held.admit([prompt(16, [5, 0, 16], tail, tail) for tail in (1, 4)])
    held.admit([prompt(16, [7, 7, 7], 2, 9)])
    assert made == []
    held.keep([2, 0])
    assert made == [[2, 0]]


def watched(monkeypatch):
    """The numbers that become a tensor, as they do on their way to a GPU."""
    made, tensor = [], torch.tensor
    monkeypatch.setattr(torch, "tensor", lambda data, **options: made.append(data) or tensor(data, **options))
    return made


@pytest.mark.parametrize("bits", ALL_BITS)
def test_zero_rows_are_allowed(bits):
    held = slots(LAYERS, Bits(bits))
    assert (len(held), held.nbytes) == (0, 0)
    held.admit([prompt(bits, [3, 4, 5], 2, 0)])
    held.keep([])
    assert (len(held), held.nbytes) == (0, 0)
    again = prompt(bits, [20, 1, 0], 1, 9)
    held.admit([again])
    steps(held, [ByItself(again)], 2, 0)


@pytest.mark.parametrize("bits", ALL_BITS)
def test_nan_in_one_row_does_not_change_another(bits):
    broken, whole = prompt(bits, [20, 3, 40], 3, 0), prompt(bits, [7, 30, 0], 5, 9)
    for tail_k, tail_v in broken.tail:
        tail_k.fill_(torch.nan)
        tail_v.fill_(torch.nan)
    held = slots(LAYERS, Bits(bits))
    held.admit([broken, whole])
    alone = ByItself(whole)
    for index in range(LAYERS):
        q, (k, v) = random(2, 4, 1, DIMS, seed=1), random(2, 2, HEADS, 1, DIMS, seed=2)
        found = held.attend(index, q, k, v, SCALE)
        torch.testing.assert_close(found[1], alone.attend(index, q[1], k[1], v[1]), **CLOSE)
        assert bool(found[0].isnan().all())


@pytest.mark.parametrize("bits", ALL_BITS)
def test_spent_prompts_hold_nothing_and_their_rows_attend_the_same(bits):
    fresh, held = [prompt(bits, [40, 0, 17], 3, seed) for seed in (0, 9)], slots(LAYERS, Bits(bits))
    rows = [ByItself(one) for one in fresh]
    held.admit(fresh[:1])
    assert fresh[0].kv[0].nbytes > 0
    held.admit(fresh[1:], spend=True)
    assert [layer.nbytes for layer in fresh[1].kv] == [0] * LAYERS
    steps(held, rows, 2, 0)


def test_room_goes_with_the_row_that_needed_it():
    held = slots(LAYERS, Bits())
    long, short = prompt(16, [500] * LAYERS, 1, 0), prompt(16, [10] * LAYERS, 1, 1)
    each = 2 * LAYERS * HEADS * DIMS * 4
    held.admit([long, short])
    assert held.nbytes == 2 * (501 + ROOM) * each
    held.keep([1])
    assert held.nbytes == (11 + ROOM) * each
    rest = ByItself(short)
    steps(held, [rest], 3, 0)


@pytest.mark.parametrize("bits", [4, 8])
def test_packed_rows_are_held_once(bits):
    held = slots(LAYERS, Bits(bits))
    prompts = [prompt(bits, [40] * LAYERS, 1, seed) for seed in (0, 9)]
    room = 2 * 2 * LAYERS * HEADS * DIMS * 4 * (1 + ROOM)
    held.admit(prompts)
    assert held.nbytes == sum(layer.nbytes for one in prompts for layer in one.kv) + room
    for rows, (joined, *_) in zip(held._rows, held._joined, strict=True):
        for name, whole in joined.tensors.items():
            for packed, _ in rows:
                assert packed.tensors[name].untyped_storage().data_ptr() == whole.untyped_storage().data_ptr()
