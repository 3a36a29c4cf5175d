"""The model actor: a captioner kept loaded, which answers blocks of units with frames from decode tasks.

Its process may die at any time. `Attempts` then knows which units were in the model.
"""

import faulthandler
import logging
import os
import threading
import time
from collections import deque
from collections.abc import Generator, Iterator
from concurrent.futures import Future
from contextlib import ExitStack, closing
from dataclasses import dataclass, field
from datetime import UTC, datetime
from itertools import islice, takewhile
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import pyarrow as pa
import ray
import torch
from ray.actor import ActorHandle

from pipeline import logs
from pipeline.captioning.captioner import Captioner, Given
from pipeline.cluster.attempts import End, Turn
from pipeline.cluster.frame_streams import FrameStream, FrameStreams
from pipeline.cluster.metrics import ActorMetrics
from pipeline.cluster.turns import Turns
from pipeline.config import JobConfig
from pipeline.decoding.decode import FrameBatch
from pipeline.errors import UnitError
from pipeline.run.samples import Sampling
from pipeline.schema import rows_table

_LOG = logging.getLogger(__name__)
# Blocks an actor holds at once, so that the next block's units enter while the last one's finish. Must be a power of
# two: Ray Data divides the actor's GPU share by it, and rounding with thirds asks for one node too few.
BLOCKS_AT_ONCE = 4
_LEAVE_S = 0.25  # within this time finished rows have left the process
_REPORT_EVERY_S = 2.0
_NOT_YET = Turn(go=False)


@dataclass
class _Block:
    """A block of units in the order in which they enter the model, and their rows so far.

    begun   unit id → how many earlier starts never ended (its process died)
    open    number of units without a row
    result  the rows, or the exception that prevents them
    """

    units: deque[dict[str, Any]]
    begun: dict[str, int]
    open: int
    rows: list[dict[str, Any]] = field(default_factory=list)
    result: Future[list[dict[str, Any]]] = field(default_factory=Future)


@dataclass(eq=False)
class _Unit:
    """A unit whose frames are requested, and its permission to start."""

    unit: dict[str, Any]
    block: _Block
    stream: FrameStream
    asked: "ray.ObjectRef[Turn] | None" = None
    turn: Turn = _NOT_YET
    started: datetime | None = None

    @property
    def alone(self) -> bool:
        """Whether the unit is a suspect, which runs alone in the model."""
        return self.unit["id"] in self.block.begun


class CaptionActor:
    """The class that Ray Data calls: takes blocks of units, returns blocks of rows, one row per unit.

    Ray Data calls it from `BLOCKS_AT_ONCE` threads at once. One further thread runs the model for all of them, so that
    units of the next block enter while the last units of the previous one are answered. The model holds at most
    `ray.actors.batch_units` units.

    A unit enters the model only with permission from `attempts`. While the job drains, units get no row and stay open.
    A suspect runs alone in the model: if the process dies again, the suspect is the cause and no other unit is charged.
    """

    def __init__(self, job: JobConfig, run_id: str, attempts: ActorHandle, sampling: Sampling | None = None) -> None:
        self._job = job
        self._sampling = sampling
        self._turns = Turns(attempts)
        self._arrived: SimpleQueue[_Block] = SimpleQueue()
        self._blocks: deque[_Block] = deque()  # not finished, in the order in which they arrived
        self._in_model: dict[str, _Unit] = {}
        self._draining = False  # once True, stays True
        self._gave_at = 0.0  # time.monotonic() when rows were last returned
        self._idle_since: float | None = None  # time since which units wait for frames and the model is empty
        self._activity = Activity()
        self._metrics = ActorMetrics(run_id)
        self._logs = ExitStack()  # open for the life of this process
        context = ray.get_runtime_context()
        self._id = context.get_actor_id()
        folder = Path(context.get_temp_dir(), context.get_session_name(), "logs")
        self._logs.enter_context(logs.to_folder(folder, f"actor-{os.getpid()}", run=run_id, actor=self._id))
        ray.get(attempts.loading.remote(self._id))
        began = time.perf_counter()
        self._captioner = self._load(run_id)
        self._streams = self._decoders()
        attempts.loaded.remote(self._id)
        load_s = round(time.perf_counter() - began, 3)
        threads = torch.get_num_threads()
        logs.event(_LOG, "actor started", model=job.model.name, load_s=load_s, pid=os.getpid(), threads=threads)
        threading.Thread(target=self._serve, name="model", daemon=True).start()
        threading.Thread(target=self._report, args=(attempts, _REPORT_EVERY_S), name="report", daemon=True).start()

    def __call__(self, batch: pa.Table) -> pa.Table:
        units = batch.to_pylist()
        begun = self._turns.begun([unit["id"] for unit in units])
        # Suspects first: if one kills this process, the fewest finished rows are lost with it.
        units.sort(key=lambda unit: -begun.get(unit["id"], 0))
        block = _Block(deque(units), begun, len(units))
        if units:
            self._arrived.put(block)
        else:
            block.result.set_result([])
        return rows_table(block.result.result())

    def _serve(self) -> None:
        """Answer blocks as they arrive, for the life of this process."""
        while True:
            if not self._blocks:
                self._blocks.append(self._arrived.get())
            try:
                with _Watch(self._job.model.timeout_s, self._activity) as watch, closing(self._given()) as given:
                    for row in self._captioner.rows(given, watch.beat, self._activity.wait):
                        self._ended(row)
            except torch.AcceleratorError:
                # The device is lost to this process: exit, and a new process repeats the units, as after any death.
                _LOG.exception("the device failed on units %s", sorted(self._in_model))
                os._exit(1)
            except Exception as error:
                self._fail(error)
            if self._draining:
                self._turns.tell()
                while self._blocks:
                    block = self._blocks.popleft()
                    block.result.set_result(block.rows)
            self._metrics.streams(asked=0, running=0)

    def _report(self, attempts: ActorHandle, every_s: float) -> None:
        """Report to `attempts` what this actor waits for; the reply says whether the job drains."""
        while True:
            time.sleep(every_s)
            progress, waits = self._activity.look()
            reason = None
            if waits:
                reason = "units" if not self._blocks else "frames" if self._streams.running else "cpu"
            self._metrics.waiting(reason)
            try:
                self._draining |= ray.get(attempts.report.remote(self._id, progress, reason))
            except ray.exceptions.RayError:  # the counter is being restarted
                _LOG.warning("the counter of attempts did not answer", exc_info=True)

    def _given(self) -> Generator[Given | None]:
        """Yield units whose first frames are ready, as the captioner has room, and request frames for the next units.

        Yields None if no unit is ready yet. Ends when no unit is left.
        """
        ahead: deque[_Unit] = deque()
        most = self._job.ray.actors.batch_units
        try:
            while not self._draining:
                self._look_ahead(ahead)
                self._line_up(ahead)
                if ahead and ahead[0].stream.ready and len(self._in_model) < most:
                    given = self._taken(ahead.popleft())
                    self._line_up(ahead)
                    yield given
                elif ahead or self._in_model:
                    if not self._in_model and self._idle_since is None:
                        self._idle_since = time.perf_counter()
                    yield None
                else:
                    return
        finally:
            self._idle_since = None
            for late in ahead:
                late.stream.close()

    def _line_up(self, ahead: deque[_Unit]) -> None:
        """Move the first unit with ready frames to the head and request its permission to start.

        Nothing happens while a suspect is at the head or in the model: the suspect may kill the process again, and that
        must not count as a start of another unit.
        """
        self._streams.look()
        ready = next((one for one in ahead if one.stream.ready), None)
        if ready is None or any(one.alone for one in (ahead[0], *self._in_model.values())):
            return
        ahead.remove(ready)
        ahead.appendleft(ready)
        if ready.asked is None:
            ready.asked = self._turns.ask(ready.unit["id"])

    def _look_ahead(self, ahead: deque[_Unit]) -> None:
        """Request the frames of the next units."""
        while not self._arrived.empty():
            self._blocks.append(self._arrived.get())
        for block in self._together():
            while block.units and len(ahead) <= self._job.decode.prefetch_units:
                unit = block.units.popleft()
                ahead.append(_Unit(unit, block, self._streams.open(unit, self._captioner.refusal(unit))))

    def _together(self) -> list[_Block]:
        """Return the blocks whose units may be in the model together; a block with suspects is served by itself.

        If the process dies, the finished rows of every incomplete block are lost with it, including rows of given-up
        units.
        """
        innocent = list(takewhile(lambda block: not block.begun, self._blocks))
        return innocent or list(islice(self._blocks, 1))

    def _taken(self, one: _Unit) -> Given:
        self._in_model[one.unit["id"]] = one
        self._metrics.streams(asked=self._streams.asked, running=self._streams.running)
        waited_s = 0.0 if self._idle_since is None else time.perf_counter() - self._idle_since
        self._idle_since = None
        return Given(one.unit, self._frames(one), one.alone, waited_s)

    def _frames(self, one: _Unit) -> Iterator[FrameBatch | None]:
        """Yield a unit's frames once it has permission to start; raise `UnitError` if the permission is refused."""
        if one.alone:  # a suspect may kill this process at once: let finished rows leave first
            time.sleep(max(0.0, self._gave_at + _LEAVE_S - time.monotonic()))
        one.started = datetime.now(UTC)
        one.turn = ray.get(one.asked or self._turns.ask(one.unit["id"]))
        if one.turn.draining:
            self._draining = True
            raise UnitError("generate", "Draining", "the job is draining: this unit stays open")
        if not one.turn.go:
            raise self._given_up(one.turn)
        yield from one.stream

    def _ended(self, row: dict[str, Any]) -> None:
        done = self._in_model.pop(row["id"])
        done.stream.close()
        block = done.block
        block.open -= 1
        if not done.turn.draining:
            block.rows.append(self._told(row, done))
        if not block.open:
            self._turns.tell()
            self._blocks.remove(block)
            block.result.set_result(block.rows)
            self._gave_at = time.monotonic()

    def _fail(self, error: BaseException) -> None:
        """Raise `error` in every call that waits for rows."""
        for one in self._in_model.values():
            one.stream.close()
        self._in_model.clear()
        while self._blocks:
            self._blocks.popleft().result.set_exception(error)

    def _told(self, row: dict[str, Any], done: _Unit) -> dict[str, Any]:
        """Add the actor's columns to the row, and report it to `attempts`, metrics and logs."""
        now = datetime.now(UTC)
        row |= {
            "attempts": done.unit["attempts"] + done.turn.attempt,
            "queue_s": min(done.stream.queue_s, row["wait_s"]),
            "actor": self._id,
            "started_at": done.started or now,
            "finished_at": now,
        }
        self._turns.end(End(row["id"], row["status"], tried=done.turn.go))
        if done.turn.attempt > int(done.turn.go):
            self._metrics.crashed_attempt()  # the process died during an earlier start
        self._metrics.observe(row)
        logs.unit_ended(_LOG, done.unit, row)
        return row

    def _load(self, run_id: str) -> Captioner:
        return Captioner(self._job, run_id, self._sampling)

    def _decoders(self) -> FrameStreams:
        return FrameStreams(self._job, self._captioner.sizing)

    def _given_up(self, turn: Turn) -> UnitError:
        return UnitError(
            "generate",
            "ModelCrashed",
            f"the model's process ended {turn.attempt} times while it worked on this unit: killed, out of memory, or "
            f"no progress for model.timeout_s = {self._job.model.timeout_s:g} s; jobs.retry tries it again",
        )


class Activity:
    """Tracks from the engine's rounds whether the model computes or waits; `look` may run in another thread."""

    def __init__(self) -> None:
        self._worked = self._seen = 0  # rounds that computed something: all, and those before the last look
        self._in_round = self._waited = False
        self._round_at = 0.0

    def round(self) -> None:
        """A round of the engine begins."""
        self.end()
        self._in_round, self._waited, self._round_at = True, False, time.monotonic()

    def wait(self, seconds: float) -> None:
        """Sleep, because this round has nothing to compute."""
        self._waited = True
        time.sleep(seconds)

    def end(self) -> None:
        """The round ends."""
        self._worked += self._in_round and not self._waited
        self._in_round = False

    def look(self) -> tuple[int, bool]:
        """Return how many rounds computed something, and whether the model has only waited since the last look."""
        worked, before = self._worked, self._seen
        self._seen = worked
        computes = self._in_round and not self._waited and time.monotonic() - self._round_at > _REPORT_EVERY_S / 2
        return worked, worked == before and not computes


class _Watch:
    """Kills this process if the model gives no sign of life for `timeout_s`, even if it hangs in native code."""

    def __init__(self, timeout_s: float, activity: Activity | None = None) -> None:
        self._timeout_s = timeout_s
        self._activity = activity or Activity()
        self._beaten = 0.0

    def __enter__(self) -> "_Watch":
        self.beat()
        return self

    def __exit__(self, *_: object) -> None:
        self._activity.end()
        self.pause()

    def beat(self) -> None:
        """A sign of life. Restarts the timer at most a few times per timeout, because each restart costs a thread."""
        self._activity.round()
        now = time.monotonic()
        if now - self._beaten > self._timeout_s / 8:
            faulthandler.dump_traceback_later(self._timeout_s, exit=True)
            self._beaten = now

    def pause(self) -> None:
        """Stop the timer until the next beat."""
        faulthandler.cancel_dump_traceback_later()
        self._beaten = 0.0
