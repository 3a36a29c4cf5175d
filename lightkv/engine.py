"""The engine: prompts stream in, answers are decoded together, in bounded memory.

    engine = Engine(model, LightKVConfig.for_model(model.config, retention=0.25), Memory(bits=Bits(4)))
    for result in engine.run(requests):
        print(result.key, [answer.tokens for answer in result.answers])

A request is one prompt (text, images, parts of a video, in order, as they arrive) and one or more questions after it.
Prefill goes piece by piece (intake.py, stream.py); answers share decoding steps (flow.py, slots.py) and leave while
others go on. While the next frames of a request are not there yet, the answers in progress move on. Answers are the
same as one by one.
"""

import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field

import torch
from transformers import PreTrainedModel

from lightkv.config import LightKVConfig
from lightkv.errors import ConfigError, UnsupportedModelError
from lightkv.families import first_stage_layer
from lightkv.flow import Flow
from lightkv.intake import POLL_S, Intake
from lightkv.layerkv import Bits
from lightkv.layers import Layers
from lightkv.request import Request, Result
from lightkv.rotary import Positions


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
        if self.budget is not None and not (self.fold and self.budget >= 1):
            raise ConfigError(
                "a budget is of at least one token and needs fold=True, since layers that merge together must hold the "
                f"same tokens; got budget={self.budget}, fold={self.fold}"
            )


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
    def run(self, requests: Iterable[Request | None], beat: Callable[[], None] | None = None) -> Iterator[Result]:
        """Results as they are complete, in any order; one per request, also where it failed.

        Requests are taken as there is room; None says that there is none yet, and the answers in progress move on.
        `beat` is called at every piece, every token and while waiting: silence means that the engine hangs.
        Lost device contexts (torch.AcceleratorError) are raised; all else that happens to a request is its result.
        """
        flow = Flow(self)
        waiting = iter(requests)
        upcoming: Intake | None = None
        while True:
            if upcoming is None and flow.room():
                request = next(waiting, ...)
                if request is ... and not flow.busy():
                    return
                if isinstance(request, Request):
                    upcoming = Intake(self, request)
                elif not flow.busy():
                    time.sleep(POLL_S)
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
