"""Defines LightKVConfig: the method, the stages and their drops; checks it and derives it from a retention."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import TYPE_CHECKING, Any

from lightkv.errors import ConfigError
from lightkv.methods.guidance import GUIDANCES
from lightkv.methods.schedule import USUAL_DROP, kept_share
from lightkv.methods.settings import Settings, Stage
from lightkv.methods.table import METHODS
from lightkv.vision.families import EMBEDDINGS, first_stage_layer

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

POSITIONS = ("keep", "compact")
WINDOW_SCOPES = ("frame", "spatiotemporal", "released")
BUDGETS = ("window", "item")
DEFAULT_METHOD = "lightkv"  # of for_model; LightKVConfig(stages) itself defaults to the paper's method
OF_EVERY_METHOD = frozenset({"stages", "positions", "method"})  # any other field must be in the method's `reads`


@dataclass(frozen=True)
class LightKVConfig(Settings):
    """How `compress` and the engine compress a model; the fields are documented at `Settings` (settings.py).

    Raises ConfigError for impossible values, and for values of fields that the method does not read.
    """

    def __post_init__(self) -> None:
        object.__setattr__(self, "stages", tuple(self.stages))
        layers = [stage.layer for stage in self.stages]
        if layers != sorted(set(layers)):
            raise ConfigError(f"stages must follow ascending, distinct layers, got {layers}")
        _one_of("positions", self.positions, POSITIONS)
        _one_of("windows", self.windows, WINDOW_SCOPES)
        _one_of("guidance", self.guidance, GUIDANCES)
        _one_of("budget", self.budget, BUDGETS)
        _one_of("method", self.method, METHODS)
        self._check_method()
        frames = self.window_frames
        if frames is not None and (type(frames) is not int or frames < 1 or self.windows != "spatiotemporal"):
            raise ConfigError(
                f'window_frames must be a whole number from 1 and needs windows="spatiotemporal", '
                f"got {self.window_frames} with windows={self.windows!r}"
            )

    def _check_method(self) -> None:
        method = METHODS[self.method]
        for field in fields(self):
            value = getattr(self, field.name)
            if field.name not in OF_EVERY_METHOD | method.reads and value != field.default:
                raise ConfigError(f"method={self.method!r} does not read {field.name}: omit it, got {value!r}")
        if "windows" not in method.reads and any(stage.windows != 1 for stage in self.stages):
            raise ConfigError(f"method={self.method!r} has no windows: leave Stage.windows at 1")
        if type(self.rounds) is not int or self.rounds < 1:
            raise ConfigError(f"rounds must be a whole number from 1, got {self.rounds!r}")
        if type(self.distance) not in (int, float) or not 0.0 <= self.distance < float("inf"):
            raise ConfigError(f"distance must be a number of at least 0, got {self.distance!r}")
        if type(self.seed) is not int:
            raise ConfigError(f"seed must be a whole number, got {self.seed!r}")
        if any(stage.layer == EMBEDDINGS and method.scorer(self, n) for n, stage in enumerate(self.stages)):
            what = f"guidance={self.guidance!r}" if "guidance" in method.reads else f"method={self.method!r}"
            raise ConfigError(f"{what} needs a layer before it, for its queries and keys: no stage at layer -1")

    def retention(self, num_layers: int) -> float:
        """Share of vision KV entries that a decoder of `num_layers` layers keeps, averaged over layers (paper: 55%)."""
        self.check_depth(num_layers)
        return kept_share([(stage.layer, stage.drop) for stage in self.stages], num_layers)

    def check_depth(self, num_layers: int, first_layer: int = EMBEDDINGS) -> None:
        """Raises ConfigError unless every stage follows `first_layer` or a later layer, and precedes the last layer."""
        for stage in self.stages:
            if not first_layer <= stage.layer <= num_layers - 2:
                where = "on the embeddings" if stage.layer == EMBEDDINGS else f"after layer {stage.layer}"
                why = " (vision features still enter in the layers before)" if stage.layer < first_layer else ""
                raise ConfigError(
                    f"a stage {where} is not possible: this decoder of {num_layers} layers takes stages after layers "
                    f"{first_layer} to {num_layers - 2}{why}"
                )

    def to_dict(self) -> dict[str, Any]:
        """Plain values for YAML, JSON and `from_dict`."""
        return {**asdict(self), "stages": [asdict(stage) for stage in self.stages]}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "LightKVConfig":
        """The inverse of `to_dict`. Raises ConfigError for unknown or missing keys."""
        _known(cls, values)
        stages = []
        for stage in values["stages"]:
            _known(Stage, stage, required=("layer", "drop"))
            stages.append(Stage(**stage))
        return cls(**{**values, "stages": tuple(stages)})

    @classmethod
    def for_model(
        cls,
        model_config: "PreTrainedConfig",
        retention: float = 0.55,
        stages: int | None = None,
        method: str = DEFAULT_METHOD,
        **options: Any,
    ) -> "LightKVConfig":
        """The configuration with which `method` keeps `retention` (0.05 to 1) of the vision KV of this model.

        "lightkv" has a stage on the embeddings and one after a third of the layers. "published" has three stages by
        default, near the paper's layers; for a lower retention they move towards the input, then drop more
        (schedule.py). Its windows per side are 2^(stages - 1), …, 2, 1, and its budget is "item". `options` are
        further fields, e.g. positions="compact".
        Raises ConfigError if the depth cannot reach the target, and names the least retention it can.
        """
        _one_of("method", method, METHODS)
        if not 0.05 <= retention <= 1.0:
            raise ConfigError(f"retention must be between 0.05 and 1.0, got {retention}")
        if stages is not None and stages < 1:
            raise ConfigError(f"stages must be at least 1, got {stages}")
        depth = model_config.get_text_config().num_hidden_layers
        plan = METHODS[method].plan(depth, first_stage_layer(model_config), stages, retention)
        sides = [1] * len(plan)
        if "windows" in METHODS[method].reads:
            sides = [2 ** (len(plan) - 1 - number) for number in range(len(plan))]
            options = {"budget": "item", **options}
        derived = tuple(Stage(layer, side, drop) for (layer, drop), side in zip(plan, sides, strict=True))
        return cls(derived, method=method, **options)

    @classmethod
    def published(cls, model: str, **options: Any) -> "LightKVConfig":
        """The paper's schedule for one of its models, e.g. "llava-1.5-7b". Raises ConfigError for other names."""
        _one_of("model", model, PUBLISHED)
        layers, sides = PUBLISHED[model]
        stages = tuple(Stage(*stage, USUAL_DROP) for stage in zip(layers, sides, strict=True))
        return cls(stages, method="published", **options)


# Layers that the stages follow, and windows per side, as the release runs them; every stage drops half.
PUBLISHED: dict[str, tuple[tuple[int, int, int], tuple[int, int, int]]] = {
    "llava-1.5-7b": ((12, 18, 24), (4, 2, 1)),
    "llava-1.5-13b": ((15, 23, 31), (4, 2, 1)),
    "llava-next-7b": ((12, 18, 24), (4, 2, 1)),
    "llava-next-13b": ((15, 23, 31), (4, 2, 1)),
    "internvl2-8b": ((12, 18, 24), (4, 2, 1)),
    "eve-7b": ((12, 18, 24), (4, 2, 1)),
    "eve-7b-hd": ((12, 18, 24), (4, 2, 1)),
    "qwen2.5-vl-7b": ((12, 17, 22), (6, 4, 2)),
}


def _one_of(name: str, value: str, allowed: Iterable[str]) -> None:
    if value not in allowed:
        raise ConfigError(f"{name} must be one of {sorted(allowed)}, got {value!r}")


def _known(kind: type, values: Mapping[str, Any], required: Sequence[str] = ("stages",)) -> None:
    if not isinstance(values, Mapping):
        raise ConfigError(f"{kind.__name__} must be a mapping of its fields, got {values!r}")
    names = {field.name for field in fields(kind)}
    unknown, missing = sorted(set(values) - names), sorted(set(required) - set(values))
    if unknown or missing:
        raise ConfigError(f"{kind.__name__}: unknown keys {unknown}, missing keys {missing}; known: {sorted(names)}")
