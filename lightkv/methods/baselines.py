"""Other methods to compare with, run by the same machinery and counted by the same accounting.

    random   a seeded draw of an item's tokens
    stride   every k-th token of an item
    tome     token merging by content alone (Bolya et al. 2023), with proportional attention
    fastv    the tokens that the last prompt token attends to most, after an early layer (Chen et al. 2024)
    evs      the tokens of a video that differ most from the frame before (efficient video sampling)

`compress(model, baseline("fastv", model.config, retention=0.5))` runs one with its usual schedule: fastv has one stage
after layer 1 or 2, the others have one on the embeddings. `LightKVConfig(stages, method="random")` runs it with any.
"""

from typing import TYPE_CHECKING, Any

from lightkv.errors import ConfigError
from lightkv.methods.config import LightKVConfig

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

BASELINES = ("random", "stride", "tome", "fastv", "evs")


def baseline(name: str, model_config: "PreTrainedConfig", retention: float, **options: Any) -> LightKVConfig:
    """The schedule with which baseline `name` keeps `retention` of this model's vision KV, layers averaged.

    `options` are further fields of LightKVConfig. Raises ConfigError for an unknown name, and where the stage comes
    too late for the target, with the least it can reach.
    """
    if name not in BASELINES:
        raise ConfigError(f"baseline must be one of {list(BASELINES)}, got {name!r}")
    return LightKVConfig.for_model(model_config, retention, method=name, **options)
