"""Computes exact match per task family without generating.

Greedy decoding gives an answer exactly if each of its tokens is the most likely one after the correct tokens before it.
So one forward pass over the correct answers decides.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

import torch
from transformers import PreTrainedTokenizerFast, Qwen2_5_VLForConditionalGeneration

from pipeline.mini.batched import forward, logits
from pipeline.mini.data import Batch, Task, build_batch
from pipeline.mini.questions import QA


def right_answers(model: Qwen2_5_VLForConditionalGeneration, batch: Batch) -> list[list[bool]]:
    """[B][slot]: would greedy decoding give this answer, up to and including its end?"""
    with torch.no_grad():
        tail = forward(model, batch.frames, batch.grid, batch.tail_ids, batch.tail_offset, batch.tail_slot).tail
        wrong = (logits(model, tail).argmax(-1) != batch.target) & (batch.target >= 0)
    slots, missed = batch.tail_slot.tolist(), wrong.tolist()
    bad = [
        {slot for slot, miss in zip(row, misses, strict=True) if miss}
        for row, misses in zip(slots, missed, strict=True)
    ]
    return [[slot not in bad[b] for slot in range(len(asked))] for b, asked in enumerate(batch.questions)]


def exact_match(
    model: Qwen2_5_VLForConditionalGeneration,
    tokenizer: PreTrainedTokenizerFast,
    split: str,
    tasks: Iterable[tuple[Task, int]],
    *,
    degrade: bool = True,
) -> dict[str, tuple[int, int]]:
    """family → (right, asked) over the first scenes of a split; `tasks` lists each task with its number of batches."""
    right, asked = Counter[str](), Counter[str]()
    device, index = next(model.parameters()).device, 0
    for task, batches in tasks:
        for _ in range(batches):
            batch = build_batch(tokenizer, task, split, index, degrade=degrade).to(device)
            index += task.scenes
            for questions, results in zip(batch.questions, right_answers(model, batch), strict=True):
                asked.update(row_of(qa) for qa in questions)
                right.update(row_of(qa) for qa, result in zip(questions, results, strict=True) if result)
    return {family: (right[family], asked[family]) for family in sorted(asked)}


def row_of(qa: QA) -> str:
    """The family; captions of scenes with a sign are a row of their own, because they also need the number read."""
    return f"{qa.family} with sign" if qa.family == "caption" and "the sign reads" in qa.answer else qa.family


def standard_error(right: int, asked: int) -> float:
    """Standard error of the share of right answers, after Wilson: not zero if all or none are right."""
    share = (right + 0.5) / (asked + 1)
    return (share * (1 - share) / (asked + 1)) ** 0.5


def as_line(scores: dict[str, tuple[int, int]]) -> str:
    """Shares in one line, for progress messages."""
    return " ".join(f"{family} {right / asked:.2f}" for family, (right, asked) in scores.items())
