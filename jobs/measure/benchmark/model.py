"""Shared by the suites on decoders: variants of compression, memory estimates, and a prefill."""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedModel

from jobs.measure.benchmark.decoder import Decoder, weight_bytes
from jobs.measure.benchmark.derive import PLAIN
from jobs.measure.benchmark.prompt import TEXT, Prompt, grid_of
from jobs.measure.benchmark.scale import Scale
from lightkv import Cost, LightKVConfig, Report, compress
from lightkv.cost import prefill_cost

RETENTIONS = (0.55, 0.25)
PUBLISHED = "published"


def variants(decoder: Decoder, published: bool) -> dict[str, LightKVConfig | None]:
    """Variants of compression by name: none, the paper's schedule, ours."""
    ours = {f"lightkv {share:.0%}": decoder.ours(share) for share in RETENTIONS}
    return {PLAIN: None, **({PUBLISHED: decoder.published} if published else {}), **ours}


@dataclass(frozen=True)
class Load:
    """A batch of equal prompts of one video each, under one variant."""

    decoder: Decoder
    config: LightKVConfig | None
    vision: int
    batch: int

    def cost(self, element: int) -> Cost:
        """Cost of one prompt's prefill."""
        return prefill_cost(self.decoder.shape, self.vision, TEXT, self.config, element, grid_of(self.vision)[0])

    def needed_bytes(self, element: int) -> int:
        """Estimated peak: weights, cache, activations of the layer with most tokens, and the prompt's states.

        Activations count three widths of the MLP and six of the residual stream. States count four times: as given,
        packed, merged, and padded again.
        """
        shape, cost = self.decoder.shape, self.cost(element)
        widest = max(layer.tokens for layer in cost.per_layer) * (3 * shape.intermediate + 6 * shape.hidden)
        states = 4 * (self.vision + TEXT) * shape.hidden
        return weight_bytes(shape, element) + self.batch * (cost.kv_bytes + (widest + states) * element)

    def skip(self, scale: Scale) -> str:
        """Why this is not measured on the device; "" if it should fit."""
        needed, there = self.needed_bytes(scale.element), scale.memory_bytes
        if there is None or needed <= there:
            return ""
        return f"needs about {needed / 2**30:.0f} GiB of {there / 2**30:.0f} GiB"

    def prompt(self, scale: Scale) -> Prompt:
        width, axes = self.decoder.shape.hidden, self.decoder.kind.axes
        return Prompt.of(self.vision, self.batch, width, axes, scale.device, scale.dtype)

    @contextmanager
    def scope(self, model: PreTrainedModel, prompt: Prompt) -> Iterator[Report | None]:
        """The scope of compress(), or an empty one without a configuration."""
        with nullcontext() if self.config is None else compress(model, self.config, prompt.layouts) as report:
            yield report


def place(load: Load) -> dict[str, int | str]:
    """The key of its cells: model, batch, vision tokens."""
    return {"model": load.decoder.name, "batch": load.batch, "vision_tokens": load.vision}


def prefill(model: PreTrainedModel, prompt: Prompt) -> Any:
    """The model's output for the prompt: logits of the last token, and the cache."""
    where = {} if prompt.positions is None else {"position_ids": prompt.positions}
    return model(inputs_embeds=prompt.embeds, use_cache=True, logits_to_keep=1, **where)
