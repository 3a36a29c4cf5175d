"""Requests in prefill: each goes into its cache piece by piece as its segments arrive, and several take turns."""

import time
from collections import deque
from collections.abc import Iterator, Sequence
from typing import Any

import torch

from lightkv.engine.decoding import Flow
from lightkv.engine.layers import Layers
from lightkv.engine.memory import Memory
from lightkv.engine.positions import Positions
from lightkv.engine.prefill import Prefilled, Stream
from lightkv.engine.request import Job, Request
from lightkv.engine.segments import Segment, Text
from lightkv.errors import out_of_memory
from lightkv.methods.config import LightKVConfig

REGROW_PIECES = 64  # pieces that fit before smaller pieces are doubled again
TURN_S = 0.25  # of preparing a piece (its vision tower), before others have their turn
POLL_S = 0.002  # between two looks for the next segment, when there is nothing to compute


class PieceSize:
    """How many tokens a piece takes, for all requests of an engine: fewer after memory ran out, then more again."""

    def __init__(self, most: int) -> None:
        self.tokens = self._most = most
        self._fitted = 0  # pieces since memory ran out

    def shrink(self, length: int) -> bool:
        """After memory ran out on a piece of so many tokens: whether a smaller one is worth trying."""
        self.tokens, self._fitted = max(1, min(self.tokens, length) // 2), 0
        return length > 1

    def fitted(self) -> None:
        """A piece was prefilled: after some of them, smaller pieces than configured grow again."""
        self._fitted += 1
        if self._fitted % REGROW_PIECES == 0:
            self.tokens = min(self._most, 2 * self.tokens)


class Intake:
    """One request: `step` until it is `done`; then its `prompts` are prefilled, or `job.error` says why not."""

    def __init__(
        self,
        request: Request,
        layers: Layers,
        config: LightKVConfig | None,
        memory: Memory,
        positions: Positions,
        pieces: PieceSize,
    ) -> None:
        self._layers, self._pieces, self.job = layers, pieces, Job(request)
        self._segments: Iterator[Segment | None] = iter(())
        self._parts: deque[Segment] = deque()  # of the segment that came last
        self._gathered: list[Segment] = []
        self._stream: Stream | None = None
        self.prompts: list[Prefilled] = []
        self.done = False
        try:
            self._segments = iter(request.segments)
            self._stream = Stream(
                layers, positions, config, request.questions, memory.bits,
                fold=memory.fold, silent=memory.silent, budget=memory.budget, traced=request.traced,
            )  # fmt: skip
        except torch.AcceleratorError:
            raise
        except Exception as error:
            self._fail(error)

    def step(self) -> bool:
        """Prefill the next piece, or prepare it for TURN_S; False where its next segment is not ready yet."""
        turn_began = time.perf_counter()
        try:
            while not self.done:
                if time.perf_counter() - turn_began > TURN_S:
                    return True
                part = self._next()
                if part is None:
                    return False
                began = time.perf_counter()
                full = self._gather(part) if part is not ... else self._finish()
                self.job.prefill_s += time.perf_counter() - began
                if full:
                    return True
        except torch.AcceleratorError:
            raise
        except Exception as error:
            self._fail(error)
        return True

    @property
    def nbytes(self) -> int:
        """Of the caches so far."""
        return self._stream.nbytes if self._stream is not None else 0

    def _next(self) -> Any:
        """The next part of the prompt that fits a piece; None: not there yet, `...`: there is none."""
        while not self._parts:
            segment = next(self._segments, ...)
            if segment is None or segment is ...:
                return segment
            self._parts.extend(segment.split(self._pieces.tokens))
        return self._parts.popleft()

    def _gather(self, part: Segment) -> bool:
        """Add a part to the piece; whether one was full, and was prefilled."""
        if isinstance(part, Text):
            self.job.heard.update(part.ids.tolist())
        most, full = self._pieces.tokens, False
        if self._gathered and _tokens(self._gathered) + len(part) > most:
            full = self._flush()
        self._gathered.append(part)
        return self._flush() if _tokens(self._gathered) >= most else full

    def _flush(self) -> bool:
        piece, self._gathered = self._gathered, []
        self._take(piece)
        return True

    def _take(self, piece: list[Segment]) -> None:
        """Prefill a piece, in smaller ones where memory runs out."""
        if not piece:
            return
        assert self._stream is not None
        try:
            with self._layers.attached():
                self._stream.take(piece)
            self._pieces.fitted()
            return
        except Exception as error:
            if not out_of_memory(error):
                raise
            if self._layers.device.type == "cuda":
                torch.cuda.empty_cache()
            if not self._pieces.shrink(_tokens(piece)):
                raise
        parts = [part for segment in piece for part in segment.split(self._pieces.tokens)]
        if len(parts) == 1:
            raise torch.OutOfMemoryError(f"memory ran out on one image or step of a video of {len(parts[0])} tokens")
        half = len(parts) // 2
        self._take(parts[:half])
        self._take(parts[half:])

    def _finish(self) -> bool:
        """Prefill what is left of the prompt, and the questions."""
        self._flush()
        assert self._stream is not None
        with self._layers.attached():
            self.prompts = self._stream.finish()
        counts = self._stream.input
        self.job.vision_tokens, self.job.text_tokens = counts.vision_tokens, counts.text_tokens
        self.done = True
        return True

    def _fail(self, error: Exception) -> None:
        self.job.error, self.done, self._stream = error, True, None
        close = getattr(self._segments, "close", None)
        if close is not None:
            close()


class Entering:
    """The requests in prefill, in the order in which they were taken."""

    def __init__(self, memory: Memory) -> None:
        self.intakes: list[Intake] = []
        self._memory = memory
        self._turns: dict[Intake, int] = {}  # number of each request's last turn
        self._turn = 0

    def add(self, intake: Intake) -> None:
        """Take a request in."""
        self.intakes.append(intake)
        self._served(intake)

    def room(self, flow: Flow) -> bool:
        """Whether a further request may be taken."""
        if not self.intakes and not flow.busy():
            return True
        alone = flow.alone() or any(intake.job.request.alone for intake in self.intakes)
        prompts = flow.prompts() + sum(len(intake.job.request.questions) for intake in self.intakes)
        return not alone and prompts < flow.most and not self._full(flow)

    def step(self, flow: Flow) -> Intake | None:
        """One piece of the request that has waited longest for its turn and whose piece is ready; None: none is.

        While the caches are full it is the turn of the first one alone, which then ends and frees its memory.
        """
        intakes = self.intakes[:1] if self._full(flow) else sorted(self.intakes, key=self._turns.__getitem__)
        for intake in intakes:
            if intake.job.request.alone and (flow.busy() or len(self.intakes) > 1):
                continue
            if intake.step():
                self._served(intake)
                if intake.done:
                    self.intakes.remove(intake)
                    del self._turns[intake]
                return intake
        return None

    def waited(self, seconds: float) -> None:
        """All of them have waited with nothing to compute: together they account for that time once."""
        for intake in self.intakes:
            intake.job.waited_s += seconds / len(self.intakes)

    def _served(self, intake: Intake) -> None:
        self._turn += 1
        self._turns[intake] = self._turn

    def _full(self, flow: Flow) -> bool:
        most = self._memory.cache_bytes
        return most is not None and flow.nbytes + sum(intake.nbytes for intake in self.intakes) >= most


def _tokens(piece: Sequence[Segment]) -> int:
    return sum(len(segment) for segment in piece)
