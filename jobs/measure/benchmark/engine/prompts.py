"""Part "prompts": several prompts on one video in the time of one.

All prompts ask for the same caption, so that each costs the same; the engine does not know that they are equal. The
vision tower, which they share, is timed separately: the first figure excludes it.
"""

from __future__ import annotations

from functools import partial

from jobs.measure.benchmark.cell import Cell, Place, Values
from jobs.measure.benchmark.engine.rounds import in_turns, ratios, spread
from jobs.measure.benchmark.engine.scale import EngineScale
from jobs.measure.benchmark.engine.subject import request
from jobs.measure.benchmark.timer import Timer
from lightkv import Engine, Memory

METHODS = ("lightkv", "spacetime")
TOWER = "tower"


def cells(scale: EngineScale) -> list[Cell]:
    at: Place = {"model": scale.name, "frames": scale.asked.frames, "frame_px": scale.asked.side_px}
    return [Cell("prompts", method, at, partial(_measure, scale, method)) for method in METHODS]


def _measure(scale: EngineScale, method: str, timer: Timer) -> Values:
    subject = scale.subject()
    batches = list(subject.batches(scale.asked))
    vision = list(subject.vision(batches))
    memory = Memory(chunk_tokens=scale.chunk_tokens, answers=max(scale.prompts))
    engine = Engine(subject.model, scale.ours(subject.model, method), memory)

    def ask(count: int) -> None:
        (result,) = engine.run([request(subject, 0, vision, [subject.caption] * count)])
        if result.error is not None:
            raise result.error

    works = {str(count): partial(ask, count) for count in scale.prompts}
    seconds = in_turns(
        works | {TOWER: lambda: list(subject.vision(batches))}, scale.rounds, scale.budget_s, scale.device
    )
    tower = seconds.pop(TOWER)
    with_tower = {name: [own + shared for own, shared in zip(of, tower, strict=True)] for name, of in seconds.items()}
    one = str(scale.prompts[0])
    return {
        "vision_tokens": sum(len(part) for part in vision),
        "rounds": len(tower),
        "seconds_of_one": spread(seconds[one]),
        "tower_s": spread(tower),
        "times_one": {name: ratios(of, seconds[one]) for name, of in seconds.items()},
        "times_one_with_tower": {name: ratios(of, with_tower[one]) for name, of in with_tower.items()},
    }
