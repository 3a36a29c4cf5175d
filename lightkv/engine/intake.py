"""Requests in prefill: reads their segments, forms pieces, and prefills them in turns."""

import time
from collections import deque
from collections.abc import Iterator, Sequence
from typing import Any

import torch

from lightkv.engine.decoding import DecodeBatch
from lightkv.engine.layers import Layers
from lightkv.engine.memory import Memory
from lightkv.engine.positions import Positions
from lightkv.engine.prefill import Prefilled, Stream
from lightkv.engine.request import Job, Request
from lightkv.engine.segments import Segment, Text
from lightkv.errors import out_of_memory
from lightkv.methods.config import LightKVConfig

REGROW_PIECES = 64  # pieces without running out of memory before the reduced piece size is doubled
TURN_S = 0.25  # longest turn spent on preparing a piece (vision encoder) before other requests get theirs
POLL_S = 0.002  # between two polls for the next segment when there is nothing to compute


class PieceSize:
    """Tokens per piece for all requests of an engine: halved when memory runs out, doubled again later."""

    def __init__(self, most: int) -> None:
        self.tokens = self._most = most
        self._fitted = 0  # pieces since memory ran out

    def shrink(self, length: int) -> bool:
        """Halve the size after memory ran out on a piece of `length` tokens; False if that piece cannot be smaller."""
        self.tokens, self._fitted = max(1, min(self.tokens, length) // 2), 0
        return length > 1

    def fitted(self) -> None:
        """Count a piece that fitted into memory; after REGROW_PIECES of them, double the size up to the maximum."""
        self._fitted += 1
        if self._fitted % REGROW_PIECES == 0:
            self.tokens = min(self._most, 2 * self.tokens)


class Intake:
    """One request in prefill: call `step` until `done`; then `prompts` holds the result, or `job.error` the failure."""

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
        self._parts: deque[Segment] = deque()  # of the last segment
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
        """Prefill the next piece, or prepare it for at most TURN_S; False if its next segment is not ready."""
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
        """Bytes of its caches so far."""
        return self._stream.nbytes if self._stream is not None else 0

    def _next(self) -> Any:
        """The prompt's next part, small enough for a piece; None: not ready yet, `...`: the prompt has ended."""
        while not self._parts:
            segment = next(self._segments, ...)
            if segment is None or segment is ...:
                return segment
            self._parts.extend(segment.split(self._pieces.tokens))
        return self._parts.popleft()

    def _gather(self, part: Segment) -> bool:
        """Add a part to the piece; True if a full piece was prefilled."""
        if isinstance(part, Text):
            self.job.text_ids.update(part.ids.tolist())
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
        """Prefill a piece; where memory runs out, split it into smaller ones."""
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
        """Prefill the rest of the prompt, then the questions."""
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


class PrefillScheduler:
    """Schedules the requests in prefill: which may enter, and whose turn is next."""

    def __init__(self, memory: Memory) -> None:
        self.intakes: list[Intake] = []
        self._memory = memory
        self._turns: dict[Intake, int] = {}  # the number of each request's last turn
        self._turn = 0

    def add(self, intake: Intake) -> None:
        """Add a request."""
        self.intakes.append(intake)
        self._served(intake)

    def room(self, batch: DecodeBatch) -> bool:
        """Whether another request may enter."""
        if not self.intakes and not batch.busy():
            return True
        alone = batch.alone() or any(intake.job.request.alone for intake in self.intakes)
        prompts = batch.prompts() + sum(len(intake.job.request.questions) for intake in self.intakes)
        return not alone and prompts < batch.most and not self._full(batch)

    def step(self, batch: DecodeBatch) -> Intake | None:
        """Prefill one piece of the request that has waited longest and is ready; returns it, or None if none is ready.

        While the caches are full, only the oldest request gets turns, so that it ends and frees its memory.
        """
        intakes = self.intakes[:1] if self._full(batch) else sorted(self.intakes, key=self._turns.__getitem__)
        for intake in intakes:
            if intake.job.request.alone and (batch.busy() or len(self.intakes) > 1):
                continue
            if intake.step():
                self._served(intake)
                if intake.done:
                    self.intakes.remove(intake)
                    del self._turns[intake]
                return intake
        return None

    def waited(self, seconds: float) -> None:
        """Divide time that the engine spent waiting equally among the requests."""
        for intake in self.intakes:
            intake.job.waited_s += seconds / len(self.intakes)

    def _served(self, intake: Intake) -> None:
        self._turn += 1
        self._turns[intake] = self._turn

    def _full(self, batch: DecodeBatch) -> bool:
        most = self._memory.cache_bytes
        return most is not None and batch.nbytes + sum(intake.nbytes for intake in self.intakes) >= most


def _tokens(piece: Sequence[Segment]) -> int:
    return sum(len(segment) for segment in piece)
