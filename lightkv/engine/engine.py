"""The engine: prefills many prompts piece by piece and decodes their answers in one batch, in bounded memory.

    engine = Engine(model, LightKVConfig.for_model(model.config, retention=0.25), Memory(bits=Bits(4)))
    for result in engine.run(requests):
        print(result.key, [answer.tokens for answer in result.answers])

A request is one prompt (text, images, parts of a video, in order, as they arrive) and one or more questions after it.
Requests in prefill take turns, one piece each (intake.py, prefill.py). Answers share decode steps (decoding.py,
slots.py); a finished answer frees its row while the others continue. Answers are the same as one by one.
"""

import time
from collections.abc import Callable, Iterable, Iterator

import torch
from transformers import PreTrainedModel

from lightkv.engine.decoding import DecodeBatch
from lightkv.engine.intake import POLL_S, Intake, PieceSize, PrefillScheduler
from lightkv.engine.layers import Layers
from lightkv.engine.memory import Memory
from lightkv.engine.positions import Positions
from lightkv.engine.request import Request, Result
from lightkv.errors import ConfigError, UnsupportedModelError
from lightkv.methods.config import LightKVConfig
from lightkv.vision.families import first_stage_layer


class Engine:
    """Runs requests on one model. Raises UnsupportedModelError and ConfigError for what it cannot run.

    compiled   decode steps run through torch.compile; the first answers then wait for the compilation
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
                f"{model.config.model_type} takes vision inside its layers too, which the engine does not support"
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
        """Yields one result per request, failed or not, as soon as it is complete, in any order.

        The engine draws the next request when it has room; None means that no request is ready yet. Requests whose
        next piece is ready take turns in prefill, one piece each; after each turn, every answer in progress decodes
        one token. So no request waits for another's segments, and a long request neither blocks short ones nor
        starves.

        `beat` is called at every piece, at every token and while waiting; if the calls stop, the engine hangs. `wait`
        is called with the seconds to sleep when there is nothing to compute. Lost device contexts
        (torch.AcceleratorError) are raised; any other failure of a request becomes its result.
        """
        batch, scheduler = self._decode_batch(), PrefillScheduler(self.memory)
        waiting, more = iter(requests), True
        while True:
            if more and scheduler.room(batch):
                request = next(waiting, ...)
                more = request is not ...
                if isinstance(request, Request):
                    scheduler.add(self._intake(request))
            if beat is not None:
                beat()
            stepped = scheduler.step(batch)
            if stepped is not None and stepped.done:
                yield from batch.enter(stepped.job, stepped.prompts)
            if batch.busy():
                yield from batch.step()
            elif stepped is None:
                if not more and not scheduler.intakes:
                    return
                scheduler.waited(POLL_S)
                wait(POLL_S)

    @property
    def chunk_tokens(self) -> int:
        """Tokens per piece at present; for a while after memory ran out, fewer than configured."""
        return self._pieces.tokens

    def _intake(self, request: Request) -> Intake:
        return Intake(request, self.layers, self.config, self.memory, self.positions(), self._pieces)

    def _decode_batch(self) -> DecodeBatch:
        return DecodeBatch(self.layers, self.memory, self.positions().axes, self.penalty, self.stops)

    def positions(self) -> Positions:
        return Positions(self._model_config)
