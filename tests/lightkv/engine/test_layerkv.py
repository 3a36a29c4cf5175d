import pytest
import torch

from lightkv import Bits, ConfigError
from lightkv.engine import layerkv
from lightkv.engine.layerkv import LayerKV
from lightkv.ops.attend import attend
from lightkv.ops.codes import ABSENT, dequantise, quantise
from lightkv.ops.quantised import attend_quantised
from lightkv.ops.ragged import Keys, Sequences
from tests.lightkv.tiny import random

HEADS, DIMS = 2, 8


def states(tokens, seed=0):
    """k, v [Hkv, n, d] and log sizes [n]."""
    k, v = random(2, HEADS, tokens, DIMS, seed=seed)
    return k, v, random(tokens, seed=seed + 100).abs()


def cut(parts, begin, end):
    k, v, log_size = parts
    return k[:, begin:end], v[:, begin:end], log_size[begin:end]


def same(found, expected):
    return all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize("lengths", [[50], [1, 49], [20, 0, 30], [10] * 5, [0, 50]])
def test_tokens_pushed_in_pieces_are_in_order(lengths):
    whole, layer, begin = states(50), LayerKV(Bits()), 0
    for length in lengths:
        layer.push(*cut(whole, begin, begin + length))
        begin += length
        assert len(layer) == begin
        assert same(layer.view(), cut(whole, 0, begin))
    assert layer.nbytes == 2 * HEADS * 50 * DIMS * 4


def test_truncating_removes_the_end_and_since_returns_copies():
    whole, layer = states(50), LayerKV(Bits())
    layer.push(*whole)
    end = layer.since(30)
    layer.truncate(30)
    layer.push(*states(20, seed=9))
    assert same(end, cut(whole, 30, 50))
    layer.truncate(30)
    assert same(layer.view(), cut(whole, 0, 30))
    assert layer.nbytes == 2 * HEADS * 30 * DIMS * 4


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("lengths", [[70], [16, 16, 38], [1, 69], [40, 30]])
def test_full_groups_are_sealed_and_read_back_dequantised(lengths, bits):
    whole, layer, begin = states(70), LayerKV(Bits(bits, group=16)), 0
    for length in lengths:
        layer.push(*cut(whole, begin, begin + length))
        layer.seal()
        begin += length
    packed = quantise(whole[0][:, :64], whole[1][:, :64], bits, 16)
    k, v = dequantise(packed, torch.float32)
    expected = torch.cat([k, whole[0][:, 64:]], 1), torch.cat([v, whole[1][:, 64:]], 1), whole[2]
    assert same(layer.view(), expected)
    assert layer.nbytes == packed.nbytes + 2 * HEADS * 6 * DIMS * 4


@pytest.mark.parametrize(("bits", "value_group"), [(4, 4), (8, 8), (8, 2)])
def test_bytes_are_codes_and_a_scale_and_zero_per_group(bits, value_group):
    layer = LayerKV(Bits(bits, group=32, value_group=value_group))
    layer.push(*states(64))
    layer.seal()
    codes = 2 * HEADS * 64 * DIMS * bits // 8
    scales = 2 * HEADS * (64 // 32 * DIMS + 64 * DIMS // value_group) * 4
    assert layer.nbytes == codes + scales


def test_sixteen_bits_leave_everything_as_it_is():
    layer = LayerKV(Bits())
    layer.push(*states(50))
    layer.seal(rest=True)
    assert same(layer.view(), states(50))


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("length", [1, 15, 16, 17, 40])
def test_the_padding_of_the_last_group_gets_no_attention(length, bits):
    """Attention over the packed layer with its padding equals attention over its tokens."""
    layer = LayerKV(Bits(bits, group=16))
    layer.push(*states(length))
    layer.seal(rest=True)
    packed, bias = layer.packed()
    assert len(layer) == len(packed) == len(bias) == -(-length // 16) * 16
    assert bool((bias[length:] <= ABSENT).all())
    q, none = random(1, 4, DIMS, seed=5), torch.empty(1, HEADS, 0, DIMS)
    one = Sequences.of([len(packed)], "cpu")
    heard = attend_quantised(q, packed, one, bias, Keys(none, none, None), 0.3)
    k, v, log_size = (part[None] for part in cut(layer.view(), 0, length))
    expected = attend(q[:, :, None], k, v, log_size, None, 0.3)[:, 0]
    torch.testing.assert_close(heard, expected, atol=1e-6, rtol=1e-5)
    seen = attend(q[:, :, None], *(part[None] for part in layer.view()), None, 0.3)[:, 0]
    torch.testing.assert_close(seen, expected, atol=1e-6, rtol=1e-5)


def test_a_layer_that_never_held_anything_is_packed_as_nothing():
    layer = LayerKV(Bits(8))
    layer.seal(rest=True)
    layer.push(*states(5))  # a question, removed again
    layer.truncate(0)
    packed, bias = layer.packed()
    assert (len(packed), len(bias), packed.heads, packed.dims) == (0, 0, HEADS, DIMS)


@pytest.mark.parametrize("rest", [False, True])
def test_a_seal_that_fails_loses_nothing(rest, monkeypatch):
    layer = LayerKV(Bits(8, group=16))
    layer.push(*states(40))
    layer.seal()
    before = layer.view()

    def full(*_):
        raise torch.OutOfMemoryError

    layer.push(*states(24, seed=3))
    with monkeypatch.context() as patch:
        patch.setattr(layerkv, "quantise", full)
        with pytest.raises(torch.OutOfMemoryError):
            layer.seal(rest)
    k, v, log_size = cut(layer.view(), 0, 64)
    new = states(24, seed=3)
    assert same((k[:, :40], v[:, :40], log_size[:40]), before)
    assert same((k[:, 40:], v[:, 40:], log_size[40:]), new)
    layer.seal(rest)
    assert len(layer.packed()[0]) == 64


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(bits=2), "must be 4, 8 or 16, got 2"),
        (dict(bits=4, group=8), "power of two of at least 16"),
        (dict(bits=4, group=48), "power of two of at least 16"),
    ],
)
def test_bits_that_cannot_be_are_refused(options, message):
    with pytest.raises(ConfigError, match=message):
        Bits(**options)


def test_bits_that_do_not_fit_the_heads_are_refused():
    Bits(16).check(7)
    Bits(8).check(7)
    with pytest.raises(ConfigError, match="even head dimension, got 7"):
        Bits(4).check(7)
    with pytest.raises(ConfigError, match="value_group must divide"):
        Bits(8, value_group=3).check(8)
