import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lightkv import VisionLayout, prompt_guidance
from lightkv.methods.guidance import GUIDANCES, QuestionAttention
from tests.lightkv import oracle
from tests.lightkv.strategies import generator, layouts
from tests.lightkv.tiny import scored


@settings(max_examples=40)
@given(
    heads=st.sampled_from([(1, 1), (4, 2), (6, 1)]),
    length=st.integers(1, 12),
    seed=st.integers(0, 10**6),
    scale=st.sampled_from([0.1, 0.5, 1.0]),
)
def test_every_vote_is_what_the_loops_say(heads, length, seed, scale):
    random = torch.Generator().manual_seed(seed)
    q, k = torch.randn(heads[0], length, 4, generator=random), torch.randn(heads[1], length, 4, generator=random)
    text = torch.rand(length, generator=random) < 0.5
    expected = torch.tensor(oracle.guidance(q.tolist(), k.tolist(), text.tolist(), scale))
    torch.testing.assert_close(prompt_guidance(q, k, text, scale), expected, atol=1e-5, rtol=1e-5)


def test_each_prompt_key_hands_out_one_vote_per_head():
    random = torch.Generator().manual_seed(0)
    q, k = torch.randn(8, 50, 16, generator=random), torch.randn(2, 50, 16, generator=random)
    text = torch.arange(50) % 5 == 0
    assert prompt_guidance(q, k, text, 0.25).sum().item() == pytest.approx(8 * 10, rel=1e-5)


def test_no_more_than_a_block_of_scores_exists_at_a_time(monkeypatch):
    random = torch.Generator().manual_seed(0)
    q, k = torch.randn(4, 64, 8, generator=random), torch.randn(2, 64, 8, generator=random)
    text = torch.arange(64) >= 40
    whole = prompt_guidance(q, k, text, 0.3)
    sizes = []
    softmax = torch.softmax
    monkeypatch.setattr("lightkv.ops.votes.SCORES_AT_ONCE", 2 * 64 * 3)
    monkeypatch.setattr(torch, "softmax", lambda x, dim: sizes.append(x.numel()) or softmax(x, dim))
    torch.testing.assert_close(prompt_guidance(q, k, text, 0.3), whole)
    assert max(sizes) == 2 * 64 * 3


def test_half_precision_scores_do_not_overflow():
    q = torch.full((1, 4, 64), 60.0, dtype=torch.float16)
    text = torch.tensor([False, False, True, True])
    guidance = prompt_guidance(q, q, text, 1.0)
    assert guidance.dtype == torch.float32
    torch.testing.assert_close(guidance, torch.full((4,), 0.5))


def test_no_prompt_means_no_votes():
    q = torch.randn(2, 5, 4)
    assert prompt_guidance(q, q, torch.zeros(5, dtype=torch.bool), 1.0).tolist() == [0.0] * 5


def test_who_votes():
    layout = VisionLayout.grids([(1, 1, 1, 2), (4, 1, 1, 2)], 8)
    assert GUIDANCES["prompt"].voters(layout).tolist() == [True, False, False, True, False, False, True, True]
    assert GUIDANCES["question"].voters(layout).tolist() == [False] * 6 + [True, True]
    assert GUIDANCES["uniform"].voters(layout) is None


@settings(max_examples=60)
@given(
    layout=layouts(),
    heads=st.sampled_from([(1, 1), (4, 2), (6, 1)]),
    at_once=st.sampled_from([1, 17, 1 << 24]),
    seed=st.integers(0, 10**6),
    scale=st.sampled_from([0.1, 1.0]),
)
def test_the_questions_attention_is_what_the_loops_say(layout, heads, at_once, seed, scale):
    """For any text before, between and after the items, with scores computed in one block or in several."""
    q = torch.randn(heads[0], len(layout), 4, generator=generator(seed))
    k = torch.randn(heads[1], len(layout), 4, generator=generator(seed + 1))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("lightkv.ops.votes.SCORES_AT_ONCE", at_once)
        score = scored(QuestionAttention(), q, k, layout, scale)
    expected = torch.tensor(oracle.asked(q.tolist(), k.tolist(), layout.item.tolist(), scale))
    torch.testing.assert_close(score, expected, atol=1e-6, rtol=1e-5)


def test_one_head_of_one_word_is_enough():
    """One word attends only to the second token, in one of four heads; the other heads attend uniformly."""
    layout, q, k = VisionLayout.grids([(1, 1, 1, 4)], 8), torch.zeros(4, 8, 4), torch.zeros(2, 8, 4)
    k[:, 1:5] = torch.eye(4)
    q[2, 6, 1] = 50.0
    q[:, 0, 3] = q[:, 3, 3] = 50.0  # queries of the system prompt and of vision tokens do not count
    assert scored(QuestionAttention(), q, k, layout, 1.0).tolist() == pytest.approx([0, 0.25, 1, 0.25, 0.25, 0, 0, 0])


def test_without_text_after_the_vision_all_score_alike():
    q = torch.randn(2, 6, 4, generator=generator(0))
    assert scored(QuestionAttention(), q, q, VisionLayout.grids([(2, 1, 2, 2)], 6), 1.0).tolist() == [0.0] * 6
    assert scored(QuestionAttention(), q, q, VisionLayout.grids([], 6), 1.0).tolist() == [0.0] * 6


def test_row_ends_take_their_share_of_the_attention():
    item = torch.tensor([0, 0, -2, -1])
    layout = VisionLayout.from_coordinates(
        item, torch.zeros_like(item), torch.zeros_like(item), torch.tensor([0, 1, 0, 0])
    )
    k = torch.tensor([[[0.0], [0.0], [2.0], [9.0]]])
    score = scored(QuestionAttention(), torch.ones(1, 4, 1), k, layout, 1.0)
    assert score.tolist() == pytest.approx([*torch.tensor([0.0, 0.0, 2.0]).softmax(-1).tolist(), 0])


def test_no_more_than_a_block_of_the_questions_scores_exists_at_a_time(monkeypatch):
    q, k = torch.randn(4, 64, 8, generator=generator(0)), torch.randn(2, 64, 8, generator=generator(1))
    layout, sizes, softmax = VisionLayout.grids([(2, 1, 5, 8)], 64), [], torch.softmax
    whole = scored(QuestionAttention(), q, k, layout, 0.3)
    monkeypatch.setattr("lightkv.ops.votes.SCORES_AT_ONCE", 2 * 40 * 3)
    monkeypatch.setattr(torch, "softmax", lambda x, dim: sizes.append(x.numel()) or softmax(x, dim))
    torch.testing.assert_close(scored(QuestionAttention(), q, k, layout, 0.3), whole)
    assert max(sizes) == 2 * 40 * 3
