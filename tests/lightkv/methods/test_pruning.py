"""Tests which tokens the second stage of asked keeps, over all images together; other methods: test_baselines.py."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lightkv import Tokens, VisionLayout
from lightkv.methods.guidance import QuestionAttention
from lightkv.methods.pruning import asked
from tests.lightkv.strategies import generator, layouts
from tests.lightkv.tiny import scored


def run(layout, score, drop, hidden=None, size=None):
    hidden = torch.zeros(len(layout), 2) if hidden is None else hidden
    size = torch.ones(len(layout)) if size is None else size
    return asked(Tokens(hidden, layout, size, score), drop)


@settings(max_examples=80)
@given(
    layout=layouts(),
    drop=st.sampled_from([0.0, 0.1, 0.29, 0.5, 0.8, 0.97, 1 - 1e-12]),
    levels=st.sampled_from([2, 1000]),  # many ties, or hardly any
    seed=st.integers(0, 10**6),
)
def test_the_best_of_each_item_stay_and_then_the_best_of_all(layout, drop, levels, seed):
    score = torch.randint(0, levels, (len(layout),), generator=generator(seed)).float()
    hidden = torch.randn(len(layout), 3, generator=generator(seed + 1))
    size = torch.randint(1, 9, (len(layout),), generator=generator(seed + 2)).float()
    result = run(layout, score, drop, hidden, size)

    items = layout.item.tolist()
    vision = [i for i, item in enumerate(items) if item >= 0]
    best = [min((-score[i], i) for i in vision if items[i] == item)[1] for item in sorted({items[i] for i in vision})]
    others = sorted((-score[i], i) for i in vision if i not in best)
    ranked = [*sorted(best), *(i for _, i in others)]
    budget = len(vision) - min(int(len(vision) * drop + 1e-9), max(0, len(vision) - 1))
    kept = sorted({i for i in range(len(items)) if i not in vision} | set(ranked[:budget]))

    assert result.kept.tolist() == kept
    assert result.target.tolist() == [i if i in kept else -1 for i in range(len(items))]
    assert torch.equal(result.hidden, hidden[kept])
    assert torch.equal(result.size, size[kept])  # survivors keep their sizes


def test_the_budget_goes_to_the_image_that_is_asked_about():
    layout = VisionLayout.grids([(1, 1, 2, 4), (10, 1, 2, 4)], 20)
    score = torch.where(layout.item == 1, 0.1, 0.01) + torch.arange(20) * 1e-4
    kept = run(layout, score, 0.5).kept
    assert [int((layout.item[kept] == item).sum()) for item in (0, 1)] == [1, 7]


def test_row_ends_and_text_stay_whatever_they_score():
    item = torch.tensor([-1, 0, 0, -2, 0, 0, -2, -1])
    x = torch.tensor([0, 0, 1, 0, 0, 1, 0, 0])
    layout = VisionLayout.from_coordinates(item, torch.zeros_like(item), torch.arange(8) // 4, x)
    assert run(layout, torch.tensor([0, 0.1, 0.2, 0.9, 0.4, 0.3, 0.9, 0.0]), 0.75).kept.tolist() == [0, 3, 4, 6, 7]


def test_without_a_question_the_first_tokens_stay():
    """All scores are equal, and ties go to the lower index."""
    layout = VisionLayout.grids([(1, 1, 2, 4)], 9)
    assert run(layout, torch.zeros(9), 0.5).kept.tolist() == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("wanted", [(3,), (0, 7), (2, 5, 6)])
def test_another_question_keeps_other_tokens(wanted):
    """Every vision token has its own key; every question word has the query that matches its wanted token."""
    layout, q, k = VisionLayout.grids([(1, 1, 2, 4)], 12), torch.zeros(2, 12, 8), torch.zeros(1, 12, 8)
    k[0, 1:9] = torch.eye(8)
    for word, token in enumerate(wanted, start=9):
        q[word % 2, word, token] = 30.0
    score = scored(QuestionAttention(), q, k, layout, 1.0)
    kept = run(layout, score, 1 - len(wanted) / 8).kept
    assert [int(i) - 1 for i in kept if layout.item[i] >= 0] == list(wanted)
