"""The engine: prompts stream in, answers are decoded together, in bounded memory.

    engine = Engine(model, LightKVConfig.for_model(model.config, retention=0.25), Memory(bits=Bits(4)))
    for result in engine.run(requests):
        print(result.key, [answer.tokens for answer in result.answers])

A request is one prompt (text, images, parts of a video, in order, as they arrive) and one or more questions after it.
Prefill goes piece by piece (stream.py); answers share decoding steps (slots.py) and leave while others go on. While the
next frames of a request are not there yet, the answers in progress move on. Answers are the same as one by one.
"""

import time
from collections import deque
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from transformers import PreTrainedModel

from lightkv.config import LightKVConfig
from lightkv.errors import ConfigError, LightKVError, UnsupportedModelError, out_of_memory
from lightkv.families import first_stage_layer
from lightkv.layerkv import Bits
from lightkv.layers import Layers
from lightkv.rotary import Positions
from lightkv.segments import Segment, Vision
from lightkv.slots import Slots, slots
from lightkv.stream import Prefilled, Stream

POLL_S = 0.002  # between two looks whether the next part of a prompt is there, when there is nothing else to do


@dataclass(frozen=True)
class Memory:
    """What bounds the engine's memory, and what its caches are made of.

    bits         of the cache of what comes before the questions
    fold         early layers end at the size of the last stage (fold.py)
    silent       layers that keep no vision after its piece
    chunk_tokens vision and text tokens that are prefilled together, but at least one image or step of a video
    answers      decoded together at most
    cache_bytes  of all caches together; a further request waits while it would not fit. None: unbounded
    """

    bits: Bits = field(default_factory=Bits)
    fold: bool = False
    silent: frozenset[int] = frozenset()
    chunk_tokens: int = 4096
    answers: int = 16
    cache_bytes: int | None = None

    def __post_init__(self) -> None:
        if self.chunk_tokens < 1 or self.answers < 1:
            raise ConfigError(
                f"chunk_tokens and answers must be at least 1, got {self.chunk_tokens} and {self.answers}"
            )


@dataclass(frozen=True)
class Request:
    """One prompt and the questions after it.

    key        whatever tells the caller which it is
    segments   the prompt but its questions, in order; None where the next part is not there yet
    questions  token ids int64 [T], T ≥ 1, of the text after everything else, one per answer
    most_new_tokens, temperature (0: greedy), seeds (one per question)
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
        if not self.questions or any(len(question) < 1 for question in self.questions):
            raise ConfigError("a request needs at least one question, and every question at least one token")


@dataclass(frozen=True)
class Generated:
    """One answer: token ids with the stop token if there was one; what its cache held when it began.

    retention  layer-averaged share of vision KV entries kept
    kv_bytes   of its cache at the end of prefill, shared parts counted in full; kv_bytes_uncompressed without
               compression, in the model's own type
    merges     per stage int64 [V]: the vision token that each is part of, -1 for dropped; empty unless traced
    """

    tokens: list[int]
    stopped: bool
    prompt_tokens: int
    kept_tokens: int
    retention: float
    kv_bytes: int
    kv_bytes_uncompressed: int
    merges: tuple[Tensor, ...] = field(default=(), repr=False)


@dataclass(frozen=True)
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


@dataclass
class _Job:
    """A request in the engine."""

    request: Request
    unfinished: int
    vision_tokens: int = 0
    answers: dict[int, Generated] = field(default_factory=dict)
    prefill_s: float = 0.0
    generate_s: float = 0.0
    waited_s: float = 0.0


@dataclass
class _Row:
    """An answer in progress, on its row of the slots."""

    job: _Job
    number: int
    position: int  # of the token that comes next
    tokens: list[int]
    begun: Generated
    draw: torch.Generator | None


class Engine:
    """Holds one model. Raises UnsupportedModelError and ConfigError for what it cannot run."""

    def __init__(self, model: PreTrainedModel, config: LightKVConfig | None, memory: Memory | None = None) -> None:
        self.layers = Layers(model)
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
        stop = model.generation_config.eos_token_id
        self.stops = frozenset(stop if isinstance(stop, list) else [] if stop is None else [stop])
        self._chunk_tokens = self.memory.chunk_tokens
        self._answers = self.memory.answers

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
        self._engine, self.job = engine, _Job(request, len(request.questions))
        self._segments = iter(request.segments)
        self._gathered: list[Segment] = []
        self._stream: Stream | None = None
        self.prompts: list[Prefilled] = []
        self.error: Exception | None = None
        self.done = False
        memory = engine.memory
        try:
            self._stream = Stream(
                engine.layers, engine.positions(), engine.config, request.questions, memory.bits,
                fold=memory.fold, silent=memory.silent, traced=request.traced,
            )  # fmt: skip
        except LightKVError as error:
            self._fail(error)

    @property
    def nbytes(self) -> int:
        return self._stream.nbytes if self._stream is not None else 0

    def step(self, wait: bool) -> bool:
        """Take what is there, up to a piece, and prefill it; False when nothing was there and `wait` is not set."""
        try:
            while not self.done:
                segment = next(self._segments, ...)
                if segment is None:
                    if wait:
                        time.sleep(POLL_S)
                        self.job.waited_s += POLL_S
                    return False
                began = time.perf_counter()
                if segment is ...:
                    self._take(self._gathered)
                    self._finish()
                else:
                    self._gather(segment)
                self.job.prefill_s += time.perf_counter() - began
                if segment is ... or not self._gathered:
                    return True
        except torch.AcceleratorError:
            raise
        except Exception as error:
            self._fail(error)
        return True

    def _gather(self, segment: Segment) -> None:
        """Add a segment to the piece, and prefill pieces that are full."""
        most = self._engine.chunk_tokens
        for part in segment.split(most) if isinstance(segment, Vision) else [segment]:
            if self._gathered and _tokens(self._gathered) + len(part) > most:
                self._take(self._gathered)
                self._gathered = []
            self._gathered.append(part)
        if _tokens(self._gathered) >= most:
            self._take(self._gathered)
            self._gathered = []

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
        parts: list[Segment] = []
        for segment in piece:
            parts += segment.split(self._engine.chunk_tokens) if isinstance(segment, Vision) else [segment]
        if len(parts) == 1:
            raise torch.OutOfMemoryError(f"memory ran out on one image or step of a video of {len(parts[0])} tokens")
        half = max(1, len(parts) // 2)
        self._take(parts[:half])
        self._take(parts[half:])

    def _finish(self) -> None:
        assert self._stream is not None
        with self._engine.layers.attached():
            self.prompts = self._stream.finish()
        self.job.vision_tokens = self._stream.vision_tokens
        self.text_tokens = self._stream.text_tokens
        self.done = True

    def _fail(self, error: Exception) -> None:
        self.error, self.done, self._stream = error, True, None
        close = getattr(self._segments, "close", None)
        if close is not None:
            close()


class _Flow:
    """The answers in progress, and those that wait for a row."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._layers = engine.layers
        self._slots: Slots = slots(len(engine.layers), engine.memory.bits)
        self._rows: list[_Row] = []
        self._ready: deque[tuple[_Row, Prefilled]] = deque()

    def busy(self) -> bool:
        return bool(self._rows or self._ready)

    def room(self) -> bool:
        """Whether a further request may come in."""
        memory = self._engine.memory
        held = self._slots.nbytes + sum(prompt.nbytes for _, prompt in self._ready)
        fits = memory.cache_bytes is None or held < memory.cache_bytes or not self.busy()
        alone = any(row.job.request.alone for row in self._rows) or any(r.job.request.alone for r, _ in self._ready)
        return fits and not alone and len(self._rows) + len(self._ready) < memory.answers

    def enter(self, prefill: _Prefill) -> Iterator[Result]:
        """Take over a request that is prefilled, or has failed."""
        job, request = prefill.job, prefill.job.request
        if prefill.error is not None:
            yield _result(job, prefill.error)
            return
        for number, (question, prompt) in enumerate(zip(request.questions, prefill.prompts, strict=True)):
            draw = None
            if request.temperature > 0:
                seed = request.seeds[number] if request.seeds is not None else 0
                draw = torch.Generator(device=prompt.first.device).manual_seed(seed)
            begun = self._begun(prompt, job.vision_tokens, prefill.text_tokens + len(question))
            row = _Row(job, number, prompt.position, [], begun, draw)
            self._say(row, prompt.first)
            if self._ended(row):
                yield from self._leave(row)
            else:
                self._ready.append((row, prompt))

    def step(self) -> Iterator[Result]:
        """One more token of every answer."""
        self._admit()
        began = time.perf_counter()
        tokens = torch.tensor([[row.tokens[-1]] for row in self._rows])
        places = torch.tensor([row.position - 1 for row in self._rows])
        axes = self._engine.positions().axes
        angles = self._layers.angles(places[None, :, None].expand(axes, -1, -1))
        with self._layers.attached():
            hidden = self._layers.run(self._layers.embed(tokens), angles, range(len(self._layers)), self._slots.attend)
        logits = self._layers.logits(hidden[:, -1])
        greedy = logits.argmax(-1).tolist()
        for number, row in enumerate(self._rows):
            self._say(row, logits[number], greedy[number])
        each = (time.perf_counter() - began) / len(self._rows)
        for row in self._rows:
            row.job.generate_s += each
        ended = [row for row in self._rows if self._ended(row)]
        if ended:
            goes_on = [number for number, row in enumerate(self._rows) if row not in ended]
            self._rows = [self._rows[number] for number in goes_on]
            self._slots.keep(goes_on)
            if not goes_on:
                self._slots = slots(len(self._layers), self._engine.memory.bits)
        for row in ended:
            yield from self._leave(row)

    def _admit(self) -> None:
        fresh: list[tuple[_Row, Prefilled]] = []
        while self._ready and len(self._rows) + len(fresh) < self._engine.memory.answers:
            fresh.append(self._ready.popleft())
        if fresh:
            self._slots.admit([prompt for _, prompt in fresh])
            self._rows += [row for row, _ in fresh]

    def _say(self, row: _Row, logits: Tensor, greedy: int | None = None) -> None:
        """The row's next token."""
        temperature = row.job.request.temperature
        if row.draw is not None:
            token = int(torch.multinomial((logits / temperature).softmax(-1), 1, generator=row.draw))
        else:
            token = int(logits.argmax()) if greedy is None else greedy
        row.tokens.append(token)
        row.position += 1

    def _ended(self, row: _Row) -> bool:
        return row.tokens[-1] in self._engine.stops or len(row.tokens) >= row.job.request.max_new_tokens

    def _leave(self, row: _Row) -> Iterator[Result]:
        stopped = row.tokens[-1] in self._engine.stops
        begun = row.begun
        row.job.answers[row.number] = Generated(
            row.tokens, stopped, begun.prompt_tokens, begun.kept_tokens, begun.retention, begun.kv_bytes,
            begun.kv_bytes_uncompressed, begun.merges,
        )  # fmt: skip
        if len(row.job.answers) == row.job.unfinished:
            yield _result(row.job, None)

    def _begun(self, prompt: Prefilled, vision: int, text: int) -> Generated:
        k, v = prompt.tail[0]
        each = (k.nbytes + v.nbytes) // max(1, k.shape[1])
        held = sum(prompt.held) / (len(prompt.held) * vision) if vision else 1.0
        whole = (vision + text) * each * len(prompt.held)
        return Generated([], False, vision + text, prompt.held[-1], held, prompt.nbytes, whole, prompt.merges)


def _result(job: _Job, error: Exception | None) -> Result:
    answers = [] if error is not None else [job.answers[number] for number in range(job.unfinished)]
    return Result(job.request.key, answers, error, job.vision_tokens, job.prefill_s, job.generate_s, job.waited_s)


def _tokens(piece: Sequence[Segment]) -> int:
    return sum(len(segment) for segment in piece)
