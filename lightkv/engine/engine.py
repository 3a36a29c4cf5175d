"""The engine: prompts stream in, answers are decoded together, in bounded memory.

    engine = Engine(model, LightKVConfig.for_model(model.config, retention=0.25), Memory(bits=Bits(4)))
    for result in engine.run(requests):
        print(result.key, [answer.tokens for answer in result.answers])

A request is one prompt (text, images, parts of a video, in order, as they arrive) and one or more questions after it.
Prefill goes piece by piece (intake.py, prefill.py), with several requests in turns; answers share decoding steps
(decoding.py, slots.py) and leave while others go on. Answers are the same as one by one.
"""

import time
from collections.abc import Callable, Iterable, Iterator

import torch
from transformers import PreTrainedModel

from lightkv.engine.decoding import Flow
from lightkv.engine.intake import POLL_S, Entering, Intake, PieceSize
from lightkv.engine.layers import Layers
from lightkv.engine.memory import Memory
from lightkv.engine.positions import Positions
from lightkv.engine.request import Request, Result
from lightkv.errors import ConfigError, UnsupportedModelError
from lightkv.methods.config import LightKVConfig
from lightkv.vision.families import first_stage_layer


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
        self._pieces = PieceSize(self.memory.chunk_tokens)

    @torch.no_grad()
    def run(
        self,
        requests: Iterable[Request | None],
        beat: Callable[[], None] | None = None,
        wait: Callable[[float], None] = time.sleep,
    ) -> Iterator[Result]:
        """Results as they are complete, in any order; one per request, also where it failed.

        Requests are taken as there is room; None says that there is none yet. Several are prefilled at once: those
        whose next piece is ready take turns, piece by piece, and after each turn every answer in progress gets a
        token. So no request waits for the segments of another, and a long one neither blocks short ones nor starves.

        `beat` is called at every piece, every token and while waiting: silence means that the engine hangs. `wait`
        gets the seconds to sleep when there is nothing to compute. Lost device contexts (torch.AcceleratorError) are
        raised; any other failure of a request is its result.
        """
        flow, entering = self._flow(), Entering(self.memory)
        waiting, more = iter(requests), True
        while True:
            if more and entering.room(flow):
                request = next(waiting, ...)
                more = request is not ...
                if isinstance(request, Request):
                    entering.add(self._intake(request))
            if beat is not None:
                beat()
            moved = entering.step(flow)
            if moved is not None and moved.done:
                yield from flow.enter(moved.job, moved.prompts)
            if flow.busy():
                yield from flow.step()
            elif moved is None:
                if not more and not entering.intakes:
                    return
                entering.waited(POLL_S)
                wait(POLL_S)

    @property
    def chunk_tokens(self) -> int:
        """Tokens of a piece at present: fewer than configured for a while after memory ran out."""
        return self._pieces.tokens

    def _intake(self, request: Request) -> Intake:
        return Intake(request, self.layers, self.config, self.memory, self.positions(), self._pieces)

    def _flow(self) -> Flow:
        return Flow(self.layers, self.memory, self.positions().axes, self.penalty, self.stops)

    def positions(self) -> Positions:
        return Positions(self._model_config)
