"""Part "streamed": compare answers to prompts in many pieces with answers to the same prompts in one piece."""

from __future__ import annotations

from functools import partial

from jobs.measure.benchmark.cell import Cell, Place, Values
from jobs.measure.benchmark.engine.scale import EngineScale
from jobs.measure.benchmark.engine.subject import Subject, request
from jobs.measure.benchmark.timer import Timer
from lightkv import Engine, LightKVConfig, Memory

WHOLE = 1 << 30  # tokens: one piece for any prompt


def cells(scale: EngineScale) -> list[Cell]:
    at: Place = {"model": scale.name, "videos": len(scale.compared), "piece_tokens": scale.pieces}
    return [
        Cell("streamed", "plain", at, partial(_measure, scale, False)),
        Cell("streamed", "lightkv 25%", at, partial(_measure, scale, True)),
    ]


def _measure(scale: EngineScale, compressed: bool, timer: Timer) -> Values:
    subject = scale.subject()
    config = scale.ours(subject.model) if compressed else None
    whole, parts = (answers(scale, subject, config, most) for most in (WHOLE, scale.pieces))
    tokens = sum(len(part) for part in subject.vision(subject.batches(scale.compared[0])))
    equal = sum(a == b for a, b in zip(whole, parts, strict=True))
    return {
        "answers": len(whole),
        "equal": equal,
        "share": equal / len(whole),
        "vision_tokens": tokens,
        "pieces": -(-tokens // scale.pieces),
    }


def answers(scale: EngineScale, subject: Subject, config: LightKVConfig | None, chunk_tokens: int) -> list[str]:
    """Answers to every question about every video."""
    asked = [
        request(subject, number, subject.vision(subject.batches(video)), subject.questions(video))
        for number, video in enumerate(scale.compared)
    ]
    memory = Memory(chunk_tokens=chunk_tokens, answers=scale.answers)
    found: dict[object, list[str]] = {}
    for result in Engine(subject.model, config, memory).run(asked):
        if result.error is not None:
            raise result.error
        found[result.key] = [subject.said(answer).text for answer in result.answers]
    return [text for number in range(len(asked)) for text in found[number]]
