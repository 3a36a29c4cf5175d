"""A request on its way into the cache, piece by piece as its segments arrive."""

import time
from collections import deque
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch

from lightkv.errors import out_of_memory
from lightkv.request import Job, Request
from lightkv.segments import Segment, Text
from lightkv.stream import Prefilled, Stream

if TYPE_CHECKING:
    from lightkv.engine import Engine

POLL_S = 0.002  # between two looks whether the next part of a prompt is there, when there is nothing else to do


class Intake:
    """One request: `step` until it is `done`; then its `prompts` are prefilled, or `job.error` says why not."""

    def __init__(self, engine: "Engine", request: Request) -> None:
        self._engine, self.job = engine, Job(request)
        self._segments: Iterator[Segment | None] = iter(())
        self._parts: deque[Segment] = deque()  # of the segment that came last
        self._gathered: list[Segment] = []
        self._stream: Stream | None = None
        self.prompts: list[Prefilled] = []
        self.done = False
        memory = engine.memory
        try:
            self._segments = iter(request.segments)
            self._stream = Stream(
                engine.layers, engine.positions(), engine.config, request.questions, memory.bits,
                fold=memory.fold, silent=memory.silent, budget=memory.budget, traced=request.traced,
            )  # fmt: skip
        except torch.AcceleratorError:
            raise
        except Exception as error:
            self._fail(error)

    def step(self, wait: bool) -> bool:
        """Prefill the next piece; False where it is not all there yet, which takes a moment with `wait`."""
        try:
            while not self.done:
                part = self._next()
                if part is None:
                    if wait:
                        time.sleep(POLL_S)
                        self.job.waited_s += POLL_S
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

    def _next(self) -> Any:
        """The next part of the prompt that fits a piece; None: not there yet, `...`: there is none."""
        while not self._parts:
            segment = next(self._segments, ...)
            if segment is None or segment is ...:
                return segment
            self._parts.extend(segment.split(self._engine.chunk_tokens))
        return self._parts.popleft()

    def _gather(self, part: Segment) -> bool:
        """Add a part to the piece; whether one was full, and was prefilled."""
        if isinstance(part, Text):
            self.job.heard.update(part.ids.tolist())
        most, full = self._engine.chunk_tokens, False
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
            with self._engine.layers.attached():
                self._stream.take(piece)
            return
        except Exception as error:
            if not out_of_memory(error) or not self._engine.shrink_pieces(_tokens(piece)):
                raise
        parts = [part for segment in piece for part in segment.split(self._engine.chunk_tokens)]
        if len(parts) == 1:
            raise torch.OutOfMemoryError(f"memory ran out on one image or step of a video of {len(parts[0])} tokens")
        half = len(parts) // 2
        self._take(parts[:half])
        self._take(parts[half:])

    def _finish(self) -> bool:
        """Prefill what is left of the prompt, and the questions."""
        self._flush()
        assert self._stream is not None
        with self._engine.layers.attached():
            self.prompts = self._stream.finish()
        self.job.vision_tokens, self.job.text_tokens = self._stream.vision_tokens, self._stream.text_tokens
        self.done = True
        return True

    def _fail(self, error: Exception) -> None:
        self.job.error, self.done, self._stream = error, True, None
        close = getattr(self._segments, "close", None)
        if close is not None:
            close()


def _tokens(piece: Sequence[Segment]) -> int:
    return sum(len(segment) for segment in piece)
