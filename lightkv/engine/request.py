"""Requests to the engine, and their results."""

from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass, field

from torch import Tensor

from lightkv.engine.segments import Segment
from lightkv.errors import ConfigError


@dataclass(frozen=True, eq=False)
class Request:
    """One prompt and the questions after it.

    key        identifies the request to the caller
    segments   the prompt without its questions, in order; None: the next segment is not ready yet
    questions  token ids int64 [T], T ≥ 1, of the text at the end of the prompt; one answer each
    max_new_tokens, temperature (0: greedy), seeds (one per question; None: 0 for all)
    traced     return which vision token each was merged into
    alone      run with no other request in the engine
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
    """One answer: token ids, with the stop token if there was one, and the size of its cache at the end of prefill.

    retention  share of vision KV entries kept, averaged over layers
    kv_bytes   bytes of its cache, shared parts counted in full; kv_bytes_uncompressed: without compression, in the
               model's own type
    kv_bits    bits of the same cache if the model's type had 16 bits, whatever it has; kv_bits_uncompressed likewise
    merges     per stage int64 [V]: the vision token that each is merged into, -1: dropped; empty unless traced
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
    """The result of a request: one answer per question, or the exception that ended it.

    prefill_s, generate_s  its share of the engine's time in prefill and in decoding
    waited_s               its share of the time in which the engine had nothing to do but wait for segments
    """

    key: Hashable
    answers: list[Generated]
    error: Exception | None
    vision_tokens: int
    prefill_s: float
    generate_s: float
    waited_s: float


@dataclass(eq=False)
class Job:
    """A request in the engine: its counts, times, and answers so far."""

    request: Request
    vision_tokens: int = 0
    text_tokens: int = 0  # without the questions
    text_ids: set[int] = field(default_factory=set)  # distinct token ids of its text, without the questions
    answers: dict[int, Generated] = field(default_factory=dict)
    error: Exception | None = None
    prefill_s: float = 0.0
    generate_s: float = 0.0
    waited_s: float = 0.0

    def result(self) -> Result:
        """The result; only once every question is answered or the request has failed."""
        count = len(self.request.questions)
        answers = [] if self.error is not None else [self.answers[number] for number in range(count)]
        times = self.prefill_s, self.generate_s, self.waited_s
        return Result(self.request.key, answers, self.error, self.vision_tokens, *times)
