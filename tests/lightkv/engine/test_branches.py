"""Questions in batches, and layers that may be folded alike."""

import pytest
import torch

from lightkv import Bits, LightKVConfig, Stage
from lightkv.engine.branches import PromptCaches
from lightkv.engine.stages import Stages

DEPTH = 4
ASKED = LightKVConfig((Stage(-1, drop=0.5), Stage(1, drop=0.5)), method="asked")


def caches(config, *lengths):
    questions = [torch.arange(length) for length in lengths]
    return PromptCaches(questions, Stages(config, DEPTH), DEPTH, Bits(), False, frozenset({2}))


@pytest.mark.parametrize(
    ("tokens", "expected"),
    [(0, [[3, 5, 2], [12], [4]]), (5, [[3, 5], [2], [12], [4]]), (20, [[3], [5], [2], [12], [4]])],
)
def test_batches_of_questions_are_bounded_but_hold_at_least_one(tokens, expected, monkeypatch):
    monkeypatch.setattr("lightkv.engine.branches.TOKENS_AT_ONCE", 10)
    batches = caches(ASKED, 3, 5, 2, 12, 4).batches(tokens)
    assert [[len(branch.question) for branch in batch] for batch in batches] == expected


def test_layers_are_folded_alike_for_one_question_or_without_layers_of_its_own():
    assert caches(ASKED, 3).uniform
    assert caches(None, 3, 3).uniform
    assert not caches(ASKED, 3, 3).uniform


def test_a_question_has_the_shared_layers_and_its_own():
    held = caches(ASKED, 3, 3)
    first, second = (held.kv(branch) for branch in held.branches)
    assert len(first) == DEPTH
    assert [one is other for one, other in zip(first, second, strict=True)] == [True, True, False, False]
    assert [held.vision_layers(branch) for branch in held] == [[0, 1], [3], [3]]
