"""Part "throughput": captions per hour of the engine, compared with one `generate` after another, frames in memory."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

from jobs.measure.benchmark.cell import Cell, Place, Values
from jobs.measure.benchmark.engine.rounds import Works, in_turns, ratios, spread
from jobs.measure.benchmark.engine.scale import EngineScale
from jobs.measure.benchmark.engine.subject import Subject, Video, request
from jobs.measure.benchmark.timer import Timer
from lightkv import Engine, LightKVConfig, Memory

LOOP, ENGINE, OURS = "generate, one by one", "engine, plain", "engine, lightkv 25%"


def cells(scale: EngineScale) -> list[Cell]:
    """Short clips, where decoding dominates, and long ones, where prefill dominates."""
    found = []
    for units in scale.units:
        at: Place = {
            "model": scale.name,
            "units": len(units),
            "frames": units[0].frames,
            "frame_px": units[0].side_px,
            "answers": scale.answers,
        }
        found.append(Cell("throughput", "captions", at, partial(_measure, scale, units)))
    return found


def _measure(scale: EngineScale, units: Sequence[Video], timer: Timer) -> Values:
    """Time the engine and the loop, vision tower included."""
    subject = scale.subject()
    held = [list(subject.batches(video)) for video in units]
    tokens = sum(len(part) for part in subject.vision(held[0]))
    said: dict[str, list[str]] = {}

    def loop() -> None:
        said[LOOP] = [subject.plain(batches).text for batches in held]

    def engine(name: str, config: LightKVConfig | None) -> None:
        said[name] = captions(scale, subject, held, config)

    ours = scale.ours(subject.model)
    works: Works = {LOOP: loop, ENGINE: partial(engine, ENGINE, None), OURS: partial(engine, OURS, ours)}
    seconds = in_turns(works, scale.rounds, scale.budget_s, scale.device)
    count = len(held)
    return {
        "vision_tokens": tokens,
        "rounds": len(seconds[LOOP]),
        "seconds_per_round": {name: spread(of) for name, of in seconds.items()},
        "units_per_hour": {name: spread([3600 * count / one for one in of]) for name, of in seconds.items()},
        "times_loop": {name: ratios(seconds[LOOP], of) for name, of in seconds.items()},
        "equal_to_loop": {
            name: sum(a == b for a, b in zip(of, said[LOOP], strict=True)) / count for name, of in said.items()
        },
    }


def captions(
    scale: EngineScale,
    subject: Subject,
    held: Sequence[list[object]],
    config: LightKVConfig | None,
) -> list[str]:
    """Captions of all units, in their order."""
    memory = Memory(chunk_tokens=scale.chunk_tokens, answers=scale.answers)
    asked = (request(subject, number, subject.vision(batches)) for number, batches in enumerate(held))
    found: dict[object, str] = {}
    for result in Engine(subject.model, config, memory).run(asked):
        if result.error is not None:
            raise result.error
        found[result.key] = subject.said(result.answers[0]).text
    return [found[number] for number in range(len(held))]
