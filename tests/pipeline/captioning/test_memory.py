"""The engine's memory limits, from the job, the model's shape and the device's memory."""

import pytest
import torch

from lightkv.cost import Shape
from pipeline.captioning.memory import Room, bound_device, memory_of, piece_bytes_per_token
from pipeline.captioning.models import describe
from pipeline.config import load_config
from pipeline.errors import ConfigError

GIB = 1 << 30


@pytest.fixture(scope="module")
def mini():
    return describe(_job().model).config


def _job(*overrides):
    return load_config(None, ["source.uri=/videos", "sink.uri=/out", *overrides])


def _memory(mini, *overrides, room=None):
    return memory_of(_job(*overrides), mini, torch.float32, room)


def test_every_setting_of_the_engine_arrives(mini):
    keys = "{chunk_tokens: 77, answers: 3, kv_bits: 4, kv_group: 16, fold: true, silent_layers: [3], cache_bytes: 999}"
    memory = _memory(mini, f"engine={keys}")
    assert (memory.chunk_tokens, memory.answers, memory.cache_bytes) == (77, 3, 999)
    assert (memory.bits.bits, memory.bits.group, memory.fold, memory.silent) == (4, 16, True, frozenset({3}))
    assert _memory(mini).budget is None


def test_pieces_and_caches_shrink_with_the_room_the_weights_leave(mini):
    each = piece_bytes_per_token(Shape.of(mini), torch.float32)
    room = Room(total=4000 * each, weights=0)
    memory = _memory(mini, room=room)
    assert memory.chunk_tokens == 1000  # a quarter
    assert memory.cache_bytes == int(0.6 * 4000 * each)
    assert _memory(mini, room=Room(400 * GIB, 0)).chunk_tokens == 4096  # never more than the job's setting
    assert _memory(mini, "engine.cache_bytes=5", room=room).cache_bytes == 5


def test_weights_that_leave_nothing_are_refused(mini):
    with pytest.raises(ConfigError, match=r"gpu_memory_bytes: the weights take 1,000 of 1,100 bytes.*raise the limit"):
        _memory(mini, room=Room(1100, 1000))


def test_a_budget_in_bytes_is_a_number_of_tokens_by_layers_and_bits(mini):
    token = 6 * 2 * 2 * 32 * 2  # layers, keys and values, heads, dims, bytes
    memory = _memory(mini, f"budget.kv_bytes={100 * token}")
    assert (memory.budget, memory.fold) == (100, True)
    few_bits = _memory(mini, f"budget.kv_bytes={100 * token}", "engine.kv_bits=4")
    assert few_bits.budget == 320  # 5 bits with the scales' share
    assert _memory(mini, f"budget.kv_bytes={100 * token}", "engine.silent_layers=[3]").budget == 120
    with pytest.raises(ConfigError, match=r"budget.kv_bytes: 7 is less than a token's 1,536 bytes"):
        _memory(mini, "budget.kv_bytes=7")


def test_a_cpu_is_not_bounded():
    assert bound_device(_job("limits.gpu_memory_bytes=2000000000").limits, torch.device("cpu")) is None
