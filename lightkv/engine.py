"""The engine: prompts stream in, answers are decoded together, in bounded memory.

    engine = Engine(model, LightKVConfig.for_model(model.config, retention=0.25), Memory(bits=Bits(4)))
    for result in engine.run(requests):
        print(result.key, [answer.tokens for answer in result.answers])

A request is one prompt (text, images, parts of a video, in order, as they arrive) and one or more questions after it.
Prefill goes piece by piece (stream.py); answers share decoding steps (slots.py) and leave while others go on. While the
next frames of a request are not there yet, the answers in progress move on. Answers are the same as one by one.
"""

import math
import time
from collections import deque
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from lightkv.config import LightKVConfig
from lightkv.errors import ConfigError, UnsupportedModelError, out_of_memory
from lightkv.families import first_stage_layer
from lightkv.layerkv import Bits
from lightkv.layers import Layers
from lightkv.rotary import Positions
from lightkv.segments import Segment, Text
from lightkv.slots import Slots, slots
from lightkv.stream import Prefilled, Stream

POLL_S = 0.002  # between two looks whether the next part of a prompt is there, when there is nothing else to do


@dataclass(frozen=True)
class Memory:
    """What bounds the engine's memory, and what its caches are made of.

    bits         of the cache of what comes before the questions
    fold         early layers end at the size of the last stage (fold.py)
    silent       layers that keep no vision after its piece
    budget       vision tokens that a prompt's cache may hold per layer; what is more merges (budget.py); needs fold
    chunk_tokens vision and text tokens that are prefilled together, but at least one image or step of a video
    answers      decoded together at most
    cache_bytes  of all caches together; a further request waits while it would not fit. None: unbounded
    """

    bits: Bits = field(default_factory=Bits)
    fold: bool = False
    silent: frozenset[int] = frozenset()
    budget: int | None = None
    chunk_tokens: int = 4096
    answers: int = 16
    cache_bytes: int | None = None

    def __post_init__(self) -> None:
        if self.chunk_tokens < 1 or self.answers < 1:
            raise ConfigError(
                f"chunk_tokens and answers must be at least 1, got {self.chunk_tokens} and {self.answers}"
            )


@dataclass(frozen=True, eq=False)
class Request:
    """One prompt and the questions after it.

    key        whatever tells the caller which it is
    segments   the prompt but its questions, in order; None where the next part is not there yet
    questions  token ids int64 [T], T ≥ 1, of the text after everything else, one per answer
    max_new_tokens, temperature (0: greedy), seeds (one per question; None: 0 for all)
    traced     return where every vision token went
    alone      with no other request beside it
    """

    key: Hashable
    segments: Iterable[Segment | None]
    questions: Sequence[Tensor]
    max_new_tokens: int = 128
    temperature: float = 0.0
    seeds: Sequence[int] | None = None
    traced: bool = False
    alone: bool = False

    def __post_init__(self) -> None:
        if not self.questions or any(question.ndim != 1 or len(question) < 1 for question in self.questions):
            raise ConfigError("a request needs at least one question, and every question at least one token: int64 [T]")
        if self.max_new_tokens < 1 or not 0 <= self.temperature < float("inf"):
            raise ConfigError(
                "max_new_tokens must be at least 1 and temperature a number of at least 0, "
                f"got {self.max_new_tokens} and {self.temperature}"
            )
        if self.seeds is not None and len(self.seeds) != len(self.questions):
            raise ConfigError(f"expected a seed per question, {len(self.questions)}, got {len(self.seeds)}")


@dataclass(frozen=True, eq=False)
class Generated:
    """One answer: token ids with the stop token if there was one; what its cache held when it began.

    retention  layer-averaged share of vision KV entries kept
    kv_bytes   of its cache at the end of prefill, shared parts counted in full; kv_bytes_uncompressed without
               compression, in the model's own type
    kv_bits    of the same cache in a model of 16 bits per number, whatever this one computes in; kv_bits_uncompressed
    merges     per stage int64 [V]: the vision token that each is part of, -1 for dropped; empty unless traced
    """

    tokens: list[int]
    stopped: bool
    prompt_tokens: int
    kept_tokens: int
    retention: float
    kv_bytes: int
    kv_bytes_uncompressed: int
    kv_bits: float
    kv_bits_uncompressed: float
    merges: tuple[Tensor, ...] = field(default=(), repr=False)


@dataclass(frozen=True, eq=False)
class Result:
    """What came of a request: an answer per question, or the exception that ended it.

    prefill_s, generate_s  its share of the engine's time
    waited_s               for its segments, with nothing else to do
    """

    key: Hashable
    answers: list[Generated]
    error: Exception | None
    vision_tokens: int
    prefill_s: float
    generate_s: float
    waited_s: float


@dataclass(eq=False)
class _Job:
    """A request in the engine."""

    request: Request
    vision_tokens: int = 0
    text_tokens: int = 0  # but the questions
    heard: set[int] = field(default_factory=set)  # tokens of its text but the questions
    answers: dict[int, Generated] = field(default_factory=dict)
    error: Exception | None = None
    prefill_s: float = 0.0
    generate_s: float = 0.0
    waited_s: float = 0.0


@dataclass(eq=False)
class _Row:
    """An answer in progress, on its row of the slots."""

    job: _Job
    number: int
    position: int  # of the token that comes next
    tokens: list[int]
    begun: Generated
    draw: torch.Generator | None
    heard: set[int]  # tokens of its text and of what it has said, for the repetition penalty


class Engine:
    """Holds one model. Raises UnsupportedModelError and ConfigError for what it cannot run.

    compiled   decoding runs through torch.compile, which takes its time at the first answers
    """

    def __init__(
        self, model: PreTrainedModel, config: LightKVConfig | None, memory: Memory | None = None, compiled: bool = False
    ) -> None:
        self.layers = Layers(model, compiled)
        self.memory = memory or Memory()
        self.config = config
        self._model_config = model.config
        if config is not None:
            config.check_depth(len(self.layers), first_stage_layer(model.config))
            if config.positions != "keep":
                raise ConfigError('the engine keeps positions: use positions="keep", or compress() and generate')
        if first_stage_layer(model.config) > -1:
            raise UnsupportedModelError(
                f"{model.config.model_type} takes vision inside its layers too, which the engine does not feed"
            )
        if any(not 0 <= layer < len(self.layers) for layer in self.memory.silent):
            raise ConfigError(f"silent layers must be of 0 … {len(self.layers) - 1}, got {sorted(self.memory.silent)}")
        self.memory.bits.check(self.layers.head_dims)
        self.penalty = model.generation_config.repetition_penalty or 1.0  # some models are published with one
        stop = model.generation_config.eos_token_id
        self.stops = frozenset(stop if isinstance(stop, list) else [] if stop is None else [stop])
        self._chunk_tokens = self.memory.chunk_tokens

    @torch.no_grad()
    def run(self, requests: Iterable[Request], beat: Callable[[], None] | None = None) -> Iterator[Result]:
        """Results as they are complete, in any order; one per request, also where it failed.

        `beat` is called at every piece, every token and while waiting: silence means that the engine hangs.
        Lost device contexts (torch.AcceleratorError) are raised; all else that happens to a request is its result.
        """
        flow = _Flow(self)
        waiting = iter(requests)
        upcoming: _Prefill | None = None
        while True:
            if upcoming is None and flow.room():
                request = next(waiting, None)
                if request is not None:
                    upcoming = _Prefill(self, request)
                elif not flow.busy():
                    return
            if beat is not None:
                beat()
            moved = False
            if upcoming is not None and not (upcoming.job.request.alone and flow.busy()):
                moved = upcoming.step(wait=not flow.busy())
                if upcoming.done:
                    yield from flow.enter(upcoming)
                    upcoming = None
            if flow.busy() and not moved:
                yield from flow.step()

    def shrink_pieces(self, length: int) -> bool:
        """After memory ran out on a piece of so many tokens: whether a smaller one is worth trying."""
        if self.layers.device.type == "cuda":
            torch.cuda.empty_cache()
        self._chunk_tokens = max(1, min(self._chunk_tokens, length) // 2)
        return length > 1

    @property
    def chunk_tokens(self) -> int:
        return self._chunk_tokens

    def positions(self) -> Positions:
        return Positions(self._model_config)


class _Prefill:
    """A request on its way into the cache."""

    def __init__(self, engine: Engine, request: Request) -> None:
        self._engine, self.job = engine, _Job(request)
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


class _Flow:
    """The answers in progress, and those that wait for a row."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._layers = engine.layers
        self._slots = self._no_slots()
        self._rows: list[_Row] = []
        self._ready: deque[tuple[_Row, Prefilled]] = deque()
        self._most = engine.memory.answers

    def _no_slots(self) -> Slots:
        return slots(len(self._layers), self._engine.memory.bits)

    def busy(self) -> bool:
        return bool(self._rows or self._ready)

    def room(self) -> bool:
        """Whether a further request may come in."""
        memory = self._engine.memory
        held = self._slots.nbytes + sum(prompt.nbytes for _, prompt in self._ready)
        fits = memory.cache_bytes is None or held < memory.cache_bytes or not self.busy()
        alone = any(row.job.request.alone for row in (*self._rows, *(row for row, _ in self._ready)))
        return fits and not alone and len(self._rows) + len(self._ready) < self._most

    def enter(self, prefill: _Prefill) -> Iterator[Result]:
        """Take over a request that is prefilled, or has failed."""
        job, request = prefill.job, prefill.job.request
        for number, prompt in enumerate(prefill.prompts):
            draw = None
            if request.temperature > 0:
                seed = request.seeds[number] if request.seeds is not None else 0
                draw = torch.Generator(device=prompt.first.device).manual_seed(seed)
            heard = job.heard | set(request.questions[number].tolist())
            row = _Row(job, number, prompt.position, [], self._begun(job, number, prompt), draw, heard)
            self._say([row], prompt.first[None])
            self._ready.append((row, prompt))
        yield from self._leave([row for row, _ in self._ready if row.job is job], job)

    def step(self) -> Iterator[Result]:
        """One more token of every answer. Where that fails, it is the result of all of their requests."""
        try:
            self._admit()
            began = time.perf_counter()
            self._say(self._rows, self._decode())
            each = (time.perf_counter() - began) / len(self._rows)
            for row in self._rows:
                row.job.generate_s += each
        except torch.AcceleratorError:
            raise
        except Exception as error:
            for row in self._rows:
                row.job.error = row.job.error or error
        yield from self._leave(self._rows)

    def _decode(self) -> Tensor:
        """Logits [B, V] of the rows' next tokens."""
        tokens = torch.tensor([[row.tokens[-1]] for row in self._rows])
        places = torch.tensor([row.position - 1 for row in self._rows])
        axes = self._engine.positions().axes
        angles = self._layers.angles(places[None, :, None].expand(axes, -1, -1))
        with self._layers.attached():
            hidden = self._layers.run(self._layers.embed(tokens), angles, range(len(self._layers)), self._slots.attend)
        return self._layers.logits(hidden[:, -1])

    def _admit(self) -> None:
        """Give rows to answers that wait; to fewer, for the rest of the run, where memory runs out on that."""
        while self._ready and len(self._rows) < self._most:
            fresh = [self._ready.popleft() for _ in range(min(len(self._ready), self._most - len(self._rows)))]
            last = len(self._rows) + len(fresh) == 1  # if this does not fit, nothing less will
            try:
                self._slots.admit([prompt for _, prompt in fresh], spend=last)
                self._rows += [row for row, _ in fresh]
                continue
            except Exception as error:
                if not out_of_memory(error) or last:
                    self._rows += [row for row, _ in fresh]
                    raise
            self._ready.extendleft(reversed(fresh))
            self._most = len(self._rows) or len(fresh) // 2
            self._close_up(range(len(self._rows)))

    def _say(self, rows: Sequence[_Row], logits: Tensor) -> None:
        """Each row's next token, from logits [B, V]."""
        if self._engine.penalty != 1.0:
            logits = torch.stack([self._penalised(row, one) for row, one in zip(rows, logits, strict=True)])
        best, greedy = (found.tolist() for found in logits.max(-1))
        for number, row in enumerate(rows):
            if not math.isfinite(best[number]):  # a maximum over what is no number is none
                row.job.error = FloatingPointError("the model's logits are not finite")
                continue
            token = greedy[number]
            if row.draw is not None:
                chances = (logits[number] / row.job.request.temperature).softmax(-1)
                token = int(torch.multinomial(chances, 1, generator=row.draw))
            row.tokens.append(token)
            row.heard.add(token)
            row.position += 1

    def _penalised(self, row: _Row, logits: Tensor) -> Tensor:
        """As transformers' repetition penalty: what was heard or said becomes less likely."""
        heard = torch.tensor(sorted(row.heard), device=logits.device)
        some, penalty = logits[heard], self._engine.penalty
        return logits.index_copy(0, heard, torch.where(some > 0, some / penalty, some * penalty))

    def _leave(self, rows: Sequence[_Row], *jobs: _Job) -> Iterator[Result]:
        """Take out those of `rows` whose answer has ended, and all of requests that have failed; what is complete."""
        ended = {id(row): row for row in rows if row.job.error is not None or self._ended(row)}
        for row in ended.values():
            if row.job.error is None:
                stopped = row.tokens[-1] in self._engine.stops
                row.job.answers[row.number] = replace(row.begun, tokens=row.tokens, stopped=stopped)
        goes_on = [number for number, row in enumerate(self._rows) if id(row) not in ended]
        if len(goes_on) < len(self._rows):
            self._rows = [self._rows[number] for number in goes_on]
            self._close_up(goes_on)
        self._ready = deque(
            (row, prompt) for row, prompt in self._ready if id(row) not in ended and row.job.error is None
        )
        for job in {id(job): job for job in (*jobs, *(row.job for row in ended.values()))}.values():
            if job.error is not None or len(job.answers) == len(job.request.questions):
                yield _result(job)

    def _close_up(self, rows: Sequence[int]) -> None:
        if rows:
            self._slots.keep(rows)
        else:
            self._slots = self._no_slots()

    def _ended(self, row: _Row) -> bool:
        return row.tokens[-1] in self._engine.stops or len(row.tokens) >= row.job.request.max_new_tokens

    def _begun(self, job: _Job, number: int, prompt: Prefilled) -> Generated:
        vision, text = job.vision_tokens, job.text_tokens + len(job.request.questions[number])
        k, v = prompt.tail[0]
        each = (k.nbytes + v.nbytes) // k.shape[1]
        held = sum(prompt.held) / (len(prompt.held) * vision) if vision else 1.0
        whole = (vision + text) * each * len(prompt.held)
        numbers, dims = 2 * k.shape[0] * k.shape[2], k.shape[2]  # of a token in a layer
        packed = sum(len(layer) for layer in prompt.kv) * self._engine.memory.bits.per_number(dims)
        bits = numbers * (packed + 16.0 * k.shape[1] * len(prompt.kv))
        bits_whole = 16.0 * numbers * (vision + text) * len(prompt.kv)
        return Generated(
            [], False, vision + text, prompt.held[-1], held, prompt.nbytes, whole, bits, bits_whole, prompt.merges
        )


def _result(job: _Job) -> Result:
    answers = [] if job.error is not None else [job.answers[number] for number in range(len(job.request.questions))]
    return Result(job.request.key, answers, job.error, job.vision_tokens, job.prefill_s, job.generate_s, job.waited_s)


def _tokens(piece: Sequence[Segment]) -> int:
    return sum(len(segment) for segment in piece)
