"""Schedules for the baselines: methods of others to compare with, run and counted like our own.

    random   keeps a seeded draw of an item's tokens
    stride   keeps every k-th token of an item
    tome     merges tokens by content alone (Bolya et al. 2023), with proportional attention
    fastv    keeps the tokens that the last prompt token attends to most, after an early layer (Chen et al. 2024)
    evs      keeps the tokens of a video that differ most from the frame before (efficient video sampling)

`compress(model, baseline("fastv", model.config, retention=0.5))` runs one with its usual schedule: fastv has one stage
after layer 1 or 2, the others have one on the embeddings. `LightKVConfig(stages, method="random")` takes any stages.
"""

from typing import TYPE_CHECKING, Any

from lightkv.errors import ConfigError
from lightkv.methods.config import LightKVConfig

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

BASELINES = ("random", "stride", "tome", "fastv", "evs")


def baseline(name: str, model_config: "PreTrainedConfig", retention: float, **options: Any) -> LightKVConfig:
    """The configuration with which baseline `name` keeps `retention` of this model's vision KV, averaged over layers.

    `options` are further fields of LightKVConfig. Raises ConfigError for an unknown name. Also raises it if the stage
    comes too late for the target, and names the least retention that can be reached.
    """
    if name not in BASELINES:
        raise ConfigError(f"baseline must be one of {list(BASELINES)}, got {name!r}")
    return LightKVConfig.for_model(model_config, retention, method=name, **options)
