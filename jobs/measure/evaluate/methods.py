"""Turn a method and a retention into a configuration of `lightkv`, or into changed frames for the plain model.

Two methods change only the frames and leave the model as it is. They also save vision-tower FLOPs, which the figures do
not count. They may show the model sizes and lengths that it was not trained on.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
from PIL import Image

from jobs.measure.evaluate.config import EvaluateConfig, Suite
from lightkv import Bits, LightKVConfig, Memory
from lightkv import ConfigError as Unreachable
from lightkv.methods.baselines import BASELINES, baseline
from pipeline.errors import ConfigError
from pipeline.mini.model import TEMPORAL_PATCH, TOKEN_PX
from pipeline.mini.samples import vision_tokens

TOLERANCE = 0.06  # allowed distance between the share of tokens that changed frames reach and the retention
STRETCH = 1.5  # allowed change of a smaller frame's aspect ratio

Change = Callable[[np.ndarray], np.ndarray]


@dataclass(frozen=True)
class Treatment:
    """`config` compresses inside the model; `frames` changes uint8 [T, H, W, 3] before it.

    The engine answers if `memory` is set, else `generate`. `bits` per number in the cache, of the plain model's 16.
    """

    config: LightKVConfig | None = None
    frames: Change | None = None
    memory: Memory | None = None
    bits: float = 16.0


def treatment(config: EvaluateConfig, method: str, suite: Suite, retention: float, model_config: Any) -> Treatment:
    """The treatment for a method at a retention.

    Raises `lightkv.ConfigError` if the method cannot reach the retention, `ConfigError` for a wrong method.
    """
    asked = config.methods[method]
    preset = PRESETS.get(asked.preset)
    if preset is None:
        raise ConfigError(f"methods.{method}.preset: expected one of {', '.join(PRESETS)}, got {asked.preset!r}")
    try:
        return preset(suite, retention, model_config, **asked.options_at(retention))
    except TypeError as error:
        raise ConfigError(f"methods.{method}.options: {error}") from None


def _method(name: str, suite: Suite, retention: float, model_config: Any, **options: Any) -> Treatment:
    return Treatment(LightKVConfig.for_model(model_config, retention, method=name, **options))


def _baseline(name: str, suite: Suite, retention: float, model_config: Any, **options: Any) -> Treatment:
    return Treatment(baseline(name, model_config, retention, **options))


def _engine(
    suite: Suite,
    retention: float,
    model_config: Any,
    method: str = "lightkv",
    bits: int = 16,
    group: int = 32,
    fold: bool = False,
    silent: Sequence[int] = (),
    chunk_tokens: int = 1 << 20,
    before_budget: float | None = None,
    **options: Any,
) -> Treatment:
    """`method` in the engine. With fewer bits it keeps more tokens in the same bytes, at most all of them.

    With `before_budget` the stages leave at least that share of every piece, and a budget merges the rest.
    """
    text = model_config.get_text_config()
    dims = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    memory = Memory(bits=Bits(bits, group), fold=fold, silent=frozenset(silent), chunk_tokens=chunk_tokens)
    number = memory.bits.per_number(dims)
    depth = text.num_hidden_layers
    tokens = retention * 16 / number * depth / (depth - len(silent))
    if tokens >= 1 and (bits < 16 or silent):
        return Treatment(None, None, memory, number)
    if before_budget is not None:
        whole = vision_tokens(suite.kind, suite.frames, suite.height_px, suite.width_px)
        memory = replace(memory, fold=True, budget=max(1, round(tokens * whole)))
        return Treatment(folded_to(model_config, max(before_budget, tokens), method, options), None, memory, number)
    config = LightKVConfig.for_model(model_config, tokens, method=method, **options)
    if fold:  # with folding the retention is the share that the last stage leaves
        config = folded_to(model_config, tokens, method, options)
    return Treatment(config, None, memory, number)


def folded_to(model_config: Any, share: float, method: str, options: dict[str, Any]) -> LightKVConfig:
    """The schedule of `method` whose last stage leaves `share` of the tokens; bisects over the retention."""
    low, high = 0.05, 1.0
    for _ in range(40):
        middle = (low + high) / 2
        found = LightKVConfig.for_model(model_config, middle, method=method, **options)
        left = math.prod(1 - stage.drop for stage in found.stages)
        low, high = (middle, high) if left < share else (low, middle)
    return LightKVConfig.for_model(model_config, high, method=method, **options)


def _downsample(suite: Suite, retention: float, model_config: Any) -> Treatment:
    rows, columns = suite.height_px // TOKEN_PX, suite.width_px // TOKEN_PX
    smaller = smaller_grid(rows, columns, retention)
    _check_share(smaller[0] * smaller[1] / (rows * columns), retention, f"frames of {rows}×{columns} tokens")
    return Treatment(frames=partial(shrink, height=smaller[0] * TOKEN_PX, width=smaller[1] * TOKEN_PX))


def _fewer_frames(suite: Suite, retention: float, model_config: Any) -> Treatment:
    if suite.kind != "video":
        raise Unreachable(f"frames can be left out of a video only, and this is a suite of kind {suite.kind}")
    pairs = -(-suite.frames // TEMPORAL_PATCH)
    kept = max(1, round(retention * pairs))
    _check_share(kept / pairs, retention, f"{pairs} frame pairs")
    return Treatment(frames=partial(thin, count=kept * TEMPORAL_PATCH))


def smaller_grid(rows: int, columns: int, retention: float) -> tuple[int, int]:
    """The grid within `rows` × `columns` with the token count closest to `retention` of theirs; ties by shape."""
    shape = rows / columns
    grids = [
        (r, c) for r in range(1, rows + 1) for c in range(1, columns + 1) if shape / STRETCH <= r / c <= shape * STRETCH
    ]
    target = retention * rows * columns
    return min(grids, key=lambda grid: (abs(grid[0] * grid[1] - target), abs(np.log(grid[0] / grid[1] / shape))))


def shrink(frames: np.ndarray, height: int, width: int) -> np.ndarray:
    """Frames uint8 [T, H, W, 3] averaged over areas to [T, height, width, 3]."""
    return np.stack([np.asarray(Image.fromarray(f).resize((width, height), Image.Resampling.BOX)) for f in frames])


def thin(frames: np.ndarray, count: int) -> np.ndarray:
    """`count` evenly spread frames of [T, …], including the first and the last."""
    return frames[np.round(np.linspace(0, len(frames) - 1, count)).astype(int)]


def _check_share(share: float, retention: float, of: str) -> None:
    if abs(share - retention) > TOLERANCE:
        raise Unreachable(f"{of} come no closer to {retention:.0%} than {share:.0%}")


PRESETS: dict[str, Callable[..., Treatment]] = {
    "lightkv": partial(_method, "lightkv"),
    "spacetime": partial(_method, "spacetime"),
    "asked": partial(_method, "asked"),
    "published": partial(_method, "published"),
    **{name: partial(_baseline, name) for name in BASELINES},
    "engine": _engine,
    "downsample": _downsample,
    "fewer_frames": _fewer_frames,
}
