import pytest
import torch

from lightkv.engine.fold import folded
from lightkv.engine.positions import turned
from lightkv.ops.attend import attend
from tests.lightkv.tiny import random

HEADS, DIMS = 2, 8
CLOSE = dict(atol=1e-5, rtol=1e-5)


def angles(positions):
    turns = torch.tensor(positions, dtype=torch.float32)[:, None] * torch.tensor([1.0, 0.3, 0.1, 0.03])
    return turns.cos().repeat(1, 2), turns.sin().repeat(1, 2)


def attention_of(k, v, log_size):
    q = random(1, 4, 3, DIMS, seed=7)
    k, v = (torch.cat([part, random(HEADS, 3, DIMS, seed=8)], 1)[None] for part in (k, v))
    return attend(q, k, v, torch.cat([log_size, torch.zeros(3)])[None], None, 0.3)


INTO = torch.tensor([1, 1, -1, 3, 1, 5, 3, 5])
"""The token that each of eight is merged into; 2 is dropped. 1, 3 and 5 survive."""
SURVIVORS = torch.tensor([1, 3, 5])
PLACE = torch.arange(8)
SIZE = torch.tensor([1.0, 2, 4, 1, 3, 1, 1, 5])


def into(target):
    return torch.where(target < 0, -1, torch.searchsorted(SURVIVORS, target.clamp(min=0)))


def test_folding_equal_keys_and_values_at_one_position_keeps_their_attention():
    whose = torch.where(INTO < 0, 0, INTO)
    raw, values = random(2, HEADS, 8, DIMS, seed=0)
    place = angles([7, 7, 9, 2, 7, 4, 2, 4])
    k, v = turned(raw[:, whose], place), values[:, whose]
    k_few, v_few = folded(k, v, place, SIZE, into(INTO), SURVIVORS, PLACE)
    size = torch.zeros(8).index_add(0, whose[INTO >= 0], SIZE[INTO >= 0])[SURVIVORS]
    stays = INTO >= 0
    before = attention_of(k[:, stays], v[:, stays], SIZE[stays].log())
    torch.testing.assert_close(attention_of(k_few, v_few, size.log()), before, **CLOSE)


def test_a_fold_without_merges_changes_nothing():
    k, v = random(2, HEADS, 8, DIMS, seed=0)
    found = folded(k, v, angles(range(8)), SIZE, PLACE, PLACE, PLACE)
    torch.testing.assert_close(found, (k, v), **CLOSE)


def test_size_weighted_values_are_conserved_and_dropped_tokens_are_left_out():
    k, v = random(2, HEADS, 8, DIMS, seed=0)
    k[:, 2], v[:, 2] = torch.nan, torch.nan  # of the token that is dropped
    k_few, v_few = folded(k, v, angles(range(8)), SIZE, into(INTO), SURVIVORS, PLACE)
    size = torch.tensor([1.0 + 2 + 3, 1 + 1, 1 + 5])
    stays = INTO >= 0
    torch.testing.assert_close((v_few * size[:, None]).sum(1), (v[:, stays] * SIZE[stays, None]).sum(1), **CLOSE)
    assert bool(k_few.isfinite().all())


def test_keys_are_averaged_as_if_all_were_at_the_survivors_position():
    raw, v = random(2, HEADS, 8, DIMS, seed=0)
    k_few, _ = folded(turned(raw, angles(range(8))), v, angles(range(8)), SIZE, into(INTO), SURVIVORS, PLACE)
    of_first = (raw[:, 0] * 1 + raw[:, 1] * 2 + raw[:, 4] * 3) / 6
    expected = turned(of_first[:, None], angles([1]))[:, 0]
    torch.testing.assert_close(k_few[:, 0], expected, **CLOSE)


def test_survivors_of_an_earlier_stage_are_found_by_their_place_in_the_piece():
    """Of a piece of 20 tokens, 3, 8, 11 and 17 are left; 8 and 17 survive."""
    k, v = random(2, HEADS, 4, DIMS, seed=0)
    place, survivors = torch.tensor([3, 8, 11, 17]), torch.tensor([8, 17])
    found = folded(k, v, angles([3, 8, 11, 17]), torch.ones(4), torch.tensor([0, 0, -1, 1]), survivors, place)
    torch.testing.assert_close(found[1], torch.stack([v[:, :2].mean(1), v[:, 3]], 1), **CLOSE)
    torch.testing.assert_close(found[0][:, 1], k[:, 3], **CLOSE)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_kept_but_averaged_in_fp32(dtype):
    """A thousand ones plus 1000 would be wrong in half precision."""
    v = torch.ones(1, 1001, DIMS, dtype=dtype)
    v[:, -1] = 1000
    alike = angles([0] * 1001)
    one = torch.zeros(1001, dtype=torch.int64)
    k_few, v_few = folded(v, v, alike, torch.ones(1001), one, torch.tensor([0]), torch.arange(1001))
    assert k_few.dtype == v_few.dtype == dtype
    assert torch.equal(v_few, torch.full((1, 1, DIMS), 2000 / 1001).to(dtype))
    assert torch.equal(k_few, v_few)
