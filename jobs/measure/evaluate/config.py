"""Configuration of `jobs.measure.evaluate`: suites of scenes, methods and retentions, and the cells that they form.

Unknown keys, wrong types and impossible values raise `ConfigError`, as in `pipeline.config`.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Self

import pydantic
import yaml
from pydantic import BaseModel, ConfigDict, Field, model_validator

from pipeline.config import Model
from pipeline.errors import ConfigError
from pipeline.mini.model import TOKEN_PX
from pipeline.mini.questions import FAMILIES, SET_FAMILIES

PLAIN = "plain"  # the model without compression: always asked, and the baseline of all comparisons
CAPTIONS = ("caption", "set_caption")
MOST_SCENES = 1 << 16


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, protected_namespaces=())


class Suite(_Section):
    """Scenes of one kind and size, and the questions about them."""

    kind: Literal["image", "set", "pair", "video"]
    scenes: int = Field(ge=2, le=MOST_SCENES)
    families: tuple[str, ...] = Field(min_length=1, description="asked if a scene has them, captions included")
    frames: int = Field(1, ge=1, description="frames of a video, or images of a set")
    fps: float = Field(2.0, gt=0, description="of a video; 2: one frame pair per second, as in the main job with mini")
    height_px: int = Field(96, ge=64, multiple_of=TOKEN_PX)
    width_px: int = Field(96, ge=64, multiple_of=TOKEN_PX)
    max_things: int = Field(3, ge=1, le=10)
    max_clutter: int = Field(4, ge=0, description="faint strokes on the background")
    sign_share: float = Field(0.4, ge=0, le=1, description="share of the scenes that show a number")
    pooled: bool = Field(True, description="false: shown separately, left out of figures over several suites")

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        known = SET_FAMILIES if self.kind in ("set", "pair") else FAMILIES
        unknown = [family for family in self.families if family not in known]
        if unknown:
            raise ValueError(f"families {unknown} are not asked about a {self.kind}; known: {', '.join(known)}")
        most = {"image": 1, "set": 6, "pair": 2, "video": 1 << 12}[self.kind]
        least = {"image": 1, "set": 2, "pair": 1, "video": 2}[self.kind]
        if not least <= self.frames <= most:
            raise ValueError(f"frames: expected {least} to {most} for a {self.kind}, got {self.frames}")
        return self


class Method(_Section):
    """A way to use fewer vision tokens; `jobs.measure.evaluate.methods` has the presets."""

    preset: str
    options: dict[str, Any] = Field({}, description="keyword arguments of the preset")
    at: dict[float, dict[str, Any]] = Field({}, description="further options at single retentions")
    drawn: bool = Field(True, description="whether the figure shows it; a panel is readable with up to ten lines")

    def options_at(self, retention: float) -> dict[str, Any]:
        return {**self.options, **self.at.get(retention, {})}


class EvaluateConfig(_Section):
    """Everything that the evaluation depends on."""

    suites: dict[str, Suite] = Field(min_length=1)
    methods: dict[str, Method] = Field(min_length=1)
    retentions: tuple[float, ...] = Field(min_length=1)
    model: Model = Model()
    batch_prompts: int = Field(32, ge=1, description="prompts per batch")
    batch_tokens: int = Field(16384, ge=1, description="tokens per batch; a longer prompt is alone")
    split: Literal["validation", "test", "held_out"] = "test"
    seed: int = Field(0, ge=0, description="selects other scenes of the split and other resamples")
    resamples: int = Field(4000, ge=100, description="of the bootstrap and of the permutation test")
    counts_from: float = Field(
        0.9, ge=0, le=1, description="tasks that the plain model gets right less often do not count"
    )
    reference: str | None = Field(None, description="the method that the others are tested against; null: the first")

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if PLAIN in self.methods:
            raise ValueError(f"methods: {PLAIN} is always asked and cannot be configured")
        if self.reference is not None and self.reference not in self.methods:
            raise ValueError(f"reference: expected one of {list(self.methods)}, got {self.reference!r}")
        wrong = [value for value in self.retentions if not 0 < value < 1]
        if wrong or len(set(self.retentions)) < len(self.retentions):
            raise ValueError(f"retentions: expected distinct shares between 0 and 1, got {list(self.retentions)}")
        for name, method in self.methods.items():
            strange = [value for value in method.at if value not in self.retentions]
            if strange:
                raise ValueError(f"methods.{name}.at: {strange} are not among retentions {list(self.retentions)}")
        if self.model.temperature > 0:
            raise ValueError("model.temperature: exact match needs greedy answers, set it to 0")
        return self

    @property
    def compared_with(self) -> str:
        """The method that the others are tested against."""
        return self.reference or next(iter(self.methods))

    def narrowed(
        self,
        suites: list[str] | None = None,
        methods: list[str] | None = None,
        retentions: list[float] | None = None,
        scenes: int | None = None,
    ) -> EvaluateConfig:
        """A copy with only these suites, methods and retentions, and this many scenes per suite; None: unchanged."""
        values = self.model_dump(mode="json")
        values["suites"] = _picked("--suites", values["suites"], suites)
        values["methods"] = _picked("--methods", values["methods"], methods)
        values["retentions"] = retentions or values["retentions"]
        if self.reference not in values["methods"]:
            values["reference"] = None
        for suite in values["suites"].values():
            suite["scenes"] = scenes or suite["scenes"]
        return _checked(values)


@dataclass(frozen=True)
class Cell:
    """One suite answered by one method at one retention."""

    suite: str
    method: str
    retention: float  # as configured; 1.0 for plain


def cells_of(config: EvaluateConfig) -> Iterator[Cell]:
    """All cells, suite by suite, the plain model first."""
    for suite in config.suites:
        yield Cell(suite, PLAIN, 1.0)
        for method in config.methods:
            for retention in config.retentions:
                yield Cell(suite, method, retention)


def cell_key(config: EvaluateConfig, cell: Cell, weights: str) -> str:
    """16 hex digits over everything that a cell's answers depend on, except the code and batch sizes."""
    method = config.methods.get(cell.method)
    asked = None if method is None else [method.preset, method.options_at(cell.retention), cell.retention]
    model = config.model.model_dump(mode="json", exclude={"seed"})
    suite = config.suites[cell.suite].model_dump(mode="json", exclude={"pooled"})
    parts = [weights, model, config.split, config.seed, cell.suite, suite, asked]
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]


def load_evaluate_config(path: Path) -> EvaluateConfig:
    """Read and check a YAML file; raises a `ConfigError` that names every wrong key."""
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    except OSError as error:
        raise ConfigError(f"cannot read the configuration {path}: {error.strerror or error}") from None
    except yaml.YAMLError as error:
        raise ConfigError(f"{path} is not valid YAML: {' '.join(str(error).split())}") from None
    return _checked(values)


def _checked(values: Any) -> EvaluateConfig:
    try:
        # JSON mode checks types strictly, except that lists may fill tuples and text keys may fill numbers.
        return EvaluateConfig.model_validate_json(json.dumps(values))
    except TypeError as error:
        raise ConfigError(f"the configuration has a value that YAML allows and JSON does not: {error}") from None
    except pydantic.ValidationError as error:
        lines = [
            f"{'.'.join(map(str, issue['loc'])) or 'the configuration'}: {issue['msg'].removeprefix('Value error, ')}"
            for issue in error.errors()
        ]
        raise ConfigError("invalid configuration:\n  " + "\n  ".join(lines)) from None


def _picked(option: str, known: dict[str, Any], wanted: list[str] | None) -> dict[str, Any]:
    unknown = [name for name in wanted or [] if name not in known]
    if unknown:
        raise ConfigError(f"{option}: expected some of {', '.join(known)}, got {', '.join(unknown)}")
    return {name: value for name, value in known.items() if wanted is None or name in wanted}
