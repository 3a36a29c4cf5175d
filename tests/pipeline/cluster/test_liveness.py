"""There is always a next step until every unit has its row: decode tasks, CPUs, streams, actor and engine together.

Frame streams, model actor and engine loop are the project's own; Ray is simulated (`simulated.py`), and prefill and
decoding compute nothing. Everything happens in the model's thread, so a seed determines the whole run.
"""

from collections import Counter
from random import Random
from types import SimpleNamespace

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lightkv import Memory, Request
from lightkv.engine.engine import Engine
from lightkv.engine.request import Job
from pipeline.cluster import actor, turns
from pipeline.cluster import frame_streams as stream
from pipeline.cluster.attempts import Turn
from pipeline.cluster.frame_streams import FrameStreams
from pipeline.config import load_config
from pipeline.errors import UnitError
from pipeline.schema import units_table
from tests.pipeline.cluster.simulated import SimulatedRay, on_ray
from tests.pipeline.rows import row

_PATIENCE = 5  # waits in a row during which nothing can happen; then the job has stalled
_PIECE_BYTES = 10


class _Intake:
    """A request in prefill: one piece per batch of frames."""

    def __init__(self, request):
        self.job = Job(request)
        self.done, self.nbytes = False, 0
        self._segments = iter(request.segments)

    @property
    def prompts(self):
        return [self.nbytes]

    def step(self):
        try:
            segment = next(self._segments, ...)
        except UnitError as error:
            self.job.error, self.done = error, True
            return True
        if segment is None:
            return False
        self.done = segment is ...
        self.nbytes += _PIECE_BYTES
        return True


class _DecodeBatch:
    """Answers of three tokens."""

    def __init__(self, memory):
        self.most, self._left, self._held = memory.answers, {}, {}

    nbytes = property(lambda self: sum(self._held.values()))

    def busy(self):
        return bool(self._left)

    def prompts(self):
        return len(self._left)

    def alone(self):
        return any(job.request.alone for job in self._left)

    def enter(self, job, prompts):
        if job.error is not None:
            yield job
        else:
            self._left[job], self._held[job] = 3, sum(prompts)

    def step(self):
        for job in list(self._left):
            self._left[job] -= 1
            if not self._left[job]:
                del self._left[job], self._held[job]
                yield job


class _Captioner:
    """Runs the engine's own loop; after each round an event may happen in the cluster."""

    def __init__(self, simulated, memory):
        self.sizing = None
        self._simulated, self._idle = simulated, 0
        self._engine = Engine.__new__(Engine)
        self._engine.memory = memory
        self._engine._intake = _Intake
        self._engine._decode_batch = lambda: _DecodeBatch(memory)

    def refusal(self, unit):
        return None

    def rows(self, given, beat, wait):
        def requests():
            for one in given:
                yield one and Request(one.unit["id"], one.batches, [torch.ones(1)], 3, alone=one.alone)

        def round_():
            beat()
            for _ in range(self._simulated.random.randrange(3)):
                self._simulated.move()

        def idle(seconds):
            self._idle = 0 if self._simulated.move() else self._idle + 1
            assert self._idle < _PATIENCE, "the job has stalled"

        for job in self._engine.run(requests(), round_, idle):
            yield row(job.request.key, status="ok" if job.error is None else "error", wait_s=0.0)


def _run(monkeypatch, tmp_path, *, batches, cpus, seed, deaths, prefetch, batch_units, cache_bytes, suspects):
    """Number of rows by status, for one actor's blocks on a simulated cluster."""
    simulated = SimulatedRay(cpus, Random(seed), deaths)
    on_ray(monkeypatch, simulated, lambda unit: iter([[number] for number in range(batches[int(unit["id"])])]))
    monkeypatch.setattr(stream, "_LOOK_EVERY_S", 0.0)
    context = SimpleNamespace(get_actor_id=lambda: "a", get_temp_dir=lambda: tmp_path, get_session_name=lambda: "s")
    (tmp_path / "s" / "logs").mkdir(parents=True, exist_ok=True)
    ray_of_actor = SimpleNamespace(get=lambda value: value, get_runtime_context=lambda: context)
    monkeypatch.setattr(actor, "ray", ray_of_actor)
    monkeypatch.setattr(actor, "_LEAVE_S", 0.0)
    monkeypatch.setattr(actor, "_REPORT_EVERY_S", 3600.0)
    monkeypatch.setattr(turns, "ray", ray_of_actor)
    quiet = SimpleNamespace(streams=lambda **_: None, observe=lambda row: None, waiting=lambda reason: None)
    monkeypatch.setattr(actor, "ActorMetrics", lambda run_id: quiet)
    keys = [f"ray.actors.batch_units={batch_units}", f"decode.prefetch_units={prefetch}"]
    job = load_config(None, ["source.uri=/v", "sink.uri=/out", *keys])
    memory = Memory(answers=batch_units, cache_bytes=cache_bytes)
    monkeypatch.setattr(actor.CaptionActor, "_load", lambda self, run_id: _Captioner(simulated, memory))
    monkeypatch.setattr(actor.CaptionActor, "_decoders", lambda self: FrameStreams(job, None))
    begun = {str(number): 1 for number in suspects if number < len(batches)}
    attempts = SimpleNamespace(
        begun=SimpleNamespace(remote=lambda ids: {id_: begun[id_] for id_ in ids if id_ in begun}),
        loading=SimpleNamespace(remote=lambda process: None),
        loaded=SimpleNamespace(remote=lambda process: None),
        report=SimpleNamespace(remote=lambda *_: False),
        start=SimpleNamespace(remote=lambda unit_id, ended: Turn(go=True, attempt=1)),
        end=SimpleNamespace(remote=lambda ended: None),
    )
    made = actor.CaptionActor(job, "run", attempts)
    try:
        unit = {"uris": ["v.mp4"], "kind": "video", "attempts": 0, "prompts": [{"prompt_id": "p", "prompt": "?"}]}
        table = made(units_table([unit | {"id": str(number)} for number in range(len(batches))]))
    finally:
        made._logs.close()
    assert sorted(map(int, table["id"].to_pylist())) == list(range(len(batches)))
    return Counter(table["status"].to_pylist())


_LIMITS = {
    "cpus": st.integers(1, 4),
    "seed": st.integers(0, 2**32),
    "prefetch": st.integers(0, 8),
    "batch_units": st.integers(1, 16),
    "cache_bytes": st.sampled_from([None, 1, 35, 200]),
}


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    batches=st.lists(st.integers(1, 20), min_size=1, max_size=14),
    deaths=st.sampled_from([0.0, 0.02, 0.2]),
    suspects=st.sets(st.integers(0, 13), max_size=3),
    **_LIMITS,
)
def test_there_is_a_next_step_until_every_unit_has_its_row(tmp_path, batches, deaths, suspects, **limits):
    with pytest.MonkeyPatch.context() as monkeypatch:
        rows = _run(monkeypatch, tmp_path, batches=batches, deaths=deaths, suspects=suspects, **limits)
    if not deaths:
        assert rows == {"ok": len(batches)}


def test_the_model_notices_a_job_that_stands_still(tmp_path, monkeypatch):
    """If waiting tasks kept their CPUs, a task that died would get none while other tasks are ahead."""
    monkeypatch.setattr(SimulatedRay, "moves", lambda self: _moves_with_cpus_kept(self))
    limits = {"cpus": 1, "prefetch": 8, "batch_units": 1, "cache_bytes": None, "deaths": 0.1, "suspects": ()}
    with pytest.raises(AssertionError, match="has stalled"):
        _run_seeds(range(20), monkeypatch, tmp_path, batches=[20] * 8, **limits)


def _run_seeds(seeds, *args, **limits):
    for seed in seeds:
        _run(*args, seed=seed, **limits)


def _moves_with_cpus_kept(simulated):
    free = simulated.cpus - sum(task.state not in ("queued", "ended") for task in simulated.tasks)
    works = [task for task in simulated.tasks if task.state == "works"]
    goes_on = [task for task in simulated.tasks if task.state == "waits" and not simulated._held(task)]
    queued = [task for task in simulated.tasks if task.state == "queued"] if free > 0 else []
    return works + goes_on + queued
