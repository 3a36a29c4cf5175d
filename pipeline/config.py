"""A job's configuration: YAML plus `--set key=value`, checked whole before anything starts.

Unknown keys, wrong types and impossible values raise `ConfigError`, which names the key, what was expected and
what came. Values carry their unit in their name (`_s`, `_bytes`, `_px`, `_fps`, `_tokens`).
"""

import difflib
import hashlib
import json
from pathlib import Path
from typing import Any, Literal, Self
from urllib.parse import urlsplit

import pydantic
import yaml
from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from pipeline.errors import ConfigError


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, protected_namespaces=())


class Prompt(_Section):
    """One question to every unit."""

    id: str = Field(min_length=1, description="name of the answer in the output")
    text: str = Field(min_length=1, description="what the model is asked")


class Storage(_Section):
    """How `s3://` is reached. Credentials come from the usual AWS chain (environment, profile, role) alone.

    Connections are encrypted and certificates verified, by the authorities in AWS_CA_BUNDLE where it is set; only an
    `endpoint_url` that says http:// is reached without.
    """

    endpoint_url: str | None = Field(
        None, description="an S3-compatible server, https://host[:port] (http:// only by its name); null: AWS"
    )
    region: str | None = None
    path_style: bool = Field(False, description="bucket in the path instead of the host name")
    anonymous: bool = Field(False, description="public buckets: sign nothing")
    max_attempts: int = Field(
        5, ge=1, le=20, description="tries per request, on 5xx, throttling, timeouts, resets and cut answers"
    )
    timeout_s: float = Field(30.0, gt=0, description="longest silence while connecting or reading, per try")

    @model_validator(mode="after")
    def _reachable(self) -> Self:
        # Not a validator of the field: its errors repeat the value, which may hold a password.
        if self.endpoint_url is None:
            return self
        parts = urlsplit(self.endpoint_url)
        if "@" in self.endpoint_url:
            raise ValueError(
                "endpoint_url: expected https://host[:port], got one with a user or password in it; take them out and "
                "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, a profile or a role"
            )
        if parts.scheme not in ("http", "https") or not parts.hostname or parts.query or parts.fragment:
            raise ValueError(
                f"endpoint_url: expected https://host[:port], or http:// for a server without encryption, "
                f"got {self.endpoint_url!r}"
            )
        return self


class Source(_Section):
    """Where the videos and images are."""

    uri: str = Field(min_length=1, description="folder, s3://bucket/prefix, one file, or a .parquet / .jsonl manifest")
    recursive: bool = True
    extensions: tuple[str, ...] = Field(
        (".mp4", ".mov", ".mkv", ".webm", ".avi", ".m4v", ".mpg", ".mpeg", ".ts", ".flv", ".wmv", ".3gp"),
        description="what counts as a video in a folder",
    )
    max_units: int | None = Field(None, ge=1, description="take only the first so many")
    probe: bool = Field(True, description="open every video while planning: length, size, codec")
    probe_workers: int = Field(8, ge=1, le=256)
    known: str | None = Field(
        None, description="a run, or a folder of runs: units that have their row there are left out of the plan"
    )
    known_attempts: int = Field(
        1, ge=1, le=100, description="an error row there is tried again until so many attempts; 1: left to jobs.retry"
    )

    @field_validator("extensions", mode="before")
    @classmethod
    def _normalised(cls, value: Any) -> Any:
        if isinstance(value, list | tuple) and all(isinstance(v, str) for v in value):
            return tuple(v.lower() if v.startswith(".") else f".{v.lower()}" for v in value)
        return value


class Clips(_Section):
    """How a long video is cut into units; `length_s: null` keeps it whole."""

    length_s: float | None = Field(None, gt=0)
    stride_s: float | None = Field(None, gt=0, description="start to start; null: length_s, no overlap")
    min_length_s: float = Field(0.0, ge=0, description="a shorter last clip is joined to the one before")
    skip_shorter_s: float | None = Field(None, gt=0, description="shorter units are not captioned: status skipped")
    skip_longer_s: float | None = Field(None, gt=0, description="longer units are not captioned: status skipped")

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.length_s is None and self.stride_s is not None:
            raise ValueError("stride_s needs length_s")
        if self.length_s is not None and self.min_length_s > self.length_s:
            raise ValueError(f"min_length_s ({self.min_length_s}) must be at most length_s ({self.length_s})")
        return self


class Frames(_Section):
    """Which frames of a unit the model sees."""

    strategy: Literal["fps", "uniform"] = "fps"
    fps: float = Field(1.0, gt=0, le=240, description="strategy fps: frames per second of video")
    count: int = Field(16, ge=1, description="strategy uniform: frames per unit")
    max_frames: int = Field(128, ge=1, description="strategy fps: cap per unit; above it frames are spread uniformly")
    min_frames: int = Field(2, ge=1, description="strategy fps: at least so many, where the video has them")
    min_px: int = Field(64 * 64, ge=1, description="area of a frame after resizing, at least")
    max_px: int = Field(448 * 448, ge=1, description="area of a frame after resizing, at most")
    batch_frames: int = Field(16, ge=1, le=1024, description="frames decoded, sent and encoded together")
    repeat_tolerance: float | None = Field(
        None,
        ge=0,
        le=255,
        description="frames that differ by no more from the ones before, on average in every token's patch (0 to 255), "
        "are counted instead of encoded (Qwen-VL); null: all are encoded",
    )

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.min_px > self.max_px:
            raise ValueError(f"min_px ({self.min_px}) must be at most max_px ({self.max_px})")
        if self.min_frames > self.max_frames:
            raise ValueError(f"min_frames ({self.min_frames}) must be at most max_frames ({self.max_frames})")
        return self


class Decode(_Section):
    """How frames are decoded: in tasks of their own, which may die."""

    backend: str = Field(
        "auto",
        pattern=r"^(auto|decord|pyav|[\w.]+:\w+)$",
        description="auto (decord; PyAV for what it cannot open or would decode twice) | decord | pyav | "
        "package.module:function",
    )
    timeout_s: float = Field(300.0, gt=0, description="longest wait for one batch of frames of a decoder that runs")
    max_retries: int = Field(2, ge=0, le=10, description="of a decoder that dies, per unit")
    prefetch_units: int = Field(
        8, ge=0, le=16, description="units decoded ahead of the next one to enter the model, per actor"
    )
    num_cpus: float = Field(1.0, gt=0, description="CPUs of one decode task")
    max_object_bytes: int = Field(
        8 << 30,
        ge=1,
        description="larger objects are read by range with PyAV instead of copied to local disk",
    )


class Model(_Section):
    """The vision-language model every actor holds."""

    name: str = Field(
        "mini", min_length=1, description="mini (embedded) | a hub name such as Qwen/Qwen2.5-VL-7B-Instruct"
    )
    path: str | None = Field(None, description="a local folder to load instead of the hub")
    revision: str | None = None
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    device: str = Field("auto", pattern=r"^(auto|cpu|cuda(:\d+)?)$")
    attention: Literal["sdpa", "eager", "flash_attention_2"] = "sdpa"
    max_new_tokens: int = Field(128, ge=1)
    temperature: float = Field(0.0, ge=0, description="0: greedy")
    timeout_s: float = Field(
        1800.0,
        gt=0,
        description="longest time in the model of one batch of frames, or of a unit's answers; then its process ends",
    )
    seed: int = 0


class LightKV(_Section):
    """Compression of vision tokens during prefill."""

    enabled: bool = True
    method: Literal["lightkv", "published", "spacetime"] = Field(
        "lightkv",
        description="lightkv: merge in space and time, then keep what the question attends to; spacetime: the merging "
        "alone; published: the paper's",
    )
    retention: float = Field(0.55, ge=0.05, le=1.0, description="layer-averaged share of vision KV entries kept")
    stages: int | None = Field(None, ge=1, le=16, description="null: the method's own, two or (published) three")
    windows: Literal["frame", "spatiotemporal"] = Field("frame", description="published: tokens merge within these")
    window_frames: int | None = Field(
        None, ge=1, description="published: frames of a spatiotemporal window; null: the whole unit"
    )
    guidance: Literal["prompt", "question", "uniform"] = Field(
        "prompt", description="published: whose attention weighs merges"
    )

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.method != "published":
            for name in ("windows", "window_frames", "guidance"):
                value = getattr(self, name)
                if value != type(self).model_fields[name].default:
                    raise ValueError(f"{name} ({value}) belongs to method: published, leave it out of {self.method}")
        if self.window_frames is not None and self.windows != "spatiotemporal":
            raise ValueError("window_frames needs windows: spatiotemporal")
        return self


class Engine(_Section):
    """How prompts get into the model and answers out of it, and what the cache in between is made of."""

    chunk_tokens: int = Field(
        4096, ge=1, description="tokens prefilled together; a longer unit streams in piece by piece"
    )
    answers: int = Field(16, ge=1, description="prompts answered together, of one unit or of several")
    kv_bits: Literal[4, 8, 16] = Field(
        16, description="of a number in the cache of the vision and what precedes the question; 16: the model's own"
    )
    kv_group: Literal[16, 32, 64, 128] = Field(32, description="tokens whose keys share a scale, with kv_bits 4 or 8")
    fold: bool = Field(False, description="early layers, too, end at what the last stage left")
    silent_layers: tuple[int, ...] = Field(
        (),
        description="decoder layers that keep no vision for what comes later; which can, depends on the model",
    )
    compiled: bool = Field(
        False, description="decoding through torch.compile, which takes its time at the first answers; needs a compiler"
    )
    cache_bytes: int | None = Field(
        None,
        ge=1,
        description="of all caches together; a further unit waits while they are full. null: what limits leave",
    )


class Budget(_Section):
    """What one prompt's cache may take, however long the unit is: what is more merges on where the least is lost."""

    kv_bytes: int | None = Field(
        None, ge=1, description="of the vision in the cache of a prompt about one unit; null: as lightkv leaves it"
    )


class Limits(_Section):
    """What an actor may take of its machine."""

    gpu_memory_bytes: int | None = Field(
        None,
        ge=1 << 20,
        description="of its GPU, weights included; pieces, caches and batches are sized by it. null: what the GPU has",
    )


class Actors(_Section):
    """The pool of model actors; Ray Data grows it from `min` to `max` while units are waiting."""

    min: int = Field(1, ge=1)
    max: int = Field(1, ge=1)
    num_gpus: float | None = Field(None, ge=0, description="GPUs of one actor; null: 1 on a GPU device, 0 on the CPU")
    num_cpus: float = Field(0.0, ge=0, description="CPUs that decode tasks then cannot have")
    batch_units: int = Field(
        16,
        ge=1,
        le=1024,
        description="units per hand-over to an actor, which has four at a time, repeated if it dies; so many units "
        "are in the model together at most",
    )

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.min > self.max:
            raise ValueError(f"min ({self.min}) must be at most max ({self.max})")
        return self


class Ray(_Section):
    """Where the job runs."""

    address: str | None = Field(
        None, description="null: the cluster of `ray job submit` or RAY_ADDRESS, else a local one"
    )
    num_cpus: int | None = Field(None, ge=1, description="of a local cluster; null: all")
    object_store_bytes: int | None = Field(None, ge=80 << 20, description="of a local cluster; null: Ray's choice")
    actors: Actors = Actors()


class Sink(_Section):
    """Where rows go: Parquet files in `uri`, the run's own files in `uri/_run`."""

    uri: str = Field(min_length=1)
    rows_per_file: int = Field(64, ge=1, description="units per Parquet file, and per step that a kill can undo")
    compression: Literal["zstd", "snappy", "none"] = "zstd"


class Run(_Section):
    """The run's own behaviour."""

    progress_interval_s: float = Field(10.0, gt=0)
    log_format: Literal["text", "json"] = Field(
        "text", description="of the terminal: progress and a table, or one JSON object per line"
    )
    max_attempts: int = Field(
        3,
        ge=2,  # the first start may have been beside, or next to, the unit that did it
        le=100,
        description="starts of a unit that kills its model process, all but the first alone; then it is an error row",
    )
    max_given_up: int = Field(
        20, ge=1, description="such units in a row, none finished in between; then it is not the units: the job ends"
    )
    stall_s: float = Field(
        600.0,
        gt=0,
        description="end the job with the reason, exit code 2, once nothing has moved for so long: no frame, no token, "
        "no row, no model that loads",
    )
    grace_s: float = Field(25.0, ge=0, description="after SIGTERM: time for the units in the model to be finished")
    lock_timeout_s: float = Field(120.0, gt=0, description="a lock whose owner gave no sign for so long is dead")


class Report(_Section):
    """The inspection page of a run, `_run/report.html`."""

    enabled: bool = True
    samples: int = Field(24, ge=0, le=1000, description="units, spread over the run, that are shown with their frames")
    frames: int = Field(8, ge=1, le=64, description="frames shown of each, at most")


class JobConfig(_Section):
    """Everything a captioning job needs."""

    source: Source
    sink: Sink
    prompts: tuple[Prompt, ...] = (Prompt(id="caption", text="Describe the video."),)
    storage: Storage = Storage()
    clips: Clips = Clips()
    frames: Frames = Frames()
    decode: Decode = Decode()
    model: Model = Model()
    lightkv: LightKV = LightKV()
    engine: Engine = Engine()
    budget: Budget = Budget()
    limits: Limits = Limits()
    ray: Ray = Ray()
    run: Run = Run()
    report: Report = Report()

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        ids = [p.id for p in self.prompts]
        if not ids:
            raise ValueError("prompts: expected at least one, got none")
        if len(set(ids)) < len(ids):
            raise ValueError(f"prompts: every id must be there once, got {ids}")
        return self

    def hash(self) -> str:
        """What the answers depend on, as 16 hex digits; where and how fast the job runs is left out."""
        parts = self.model_dump(
            mode="json",
            exclude={
                **dict.fromkeys(("ray", "run", "storage", "decode", "sink", "report", "limits"), True),
                "model": {"timeout_s"},
                "engine": {"answers", "cache_bytes", "compiled"},
            },
        )
        parts["source"] = {"uri": self.source.uri}
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]

    def to_yaml(self) -> str:
        """The resolved configuration; loading it again gives an equal one."""
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


def load_config(path: str | Path | None, overrides: list[str] | None = None) -> JobConfig:
    """Read `path` (YAML; None: only overrides) and apply `a.b=value` overrides, whose values are YAML too."""
    data: Any = {}
    if path is not None:
        try:
            data = yaml.safe_load(Path(path).read_text(encoding="utf-8")) or {}
        except OSError as error:
            raise ConfigError(f"cannot read the configuration {path}: {error.strerror or error}") from None
        except yaml.YAMLError as error:
            raise ConfigError(f"{path} is not valid YAML: {' '.join(str(error).split())}") from None
        if not isinstance(data, dict):
            raise ConfigError(f"{path}: expected keys and values at the top level, got {type(data).__name__}")
    for override in overrides or []:
        _apply(data, override)
    try:
        # JSON mode: strict about types ("3" is no number), but lists may fill tuples.
        return JobConfig.model_validate_json(json.dumps(data))
    except TypeError as error:
        raise ConfigError(f"the configuration holds a value that YAML knows and JSON does not: {error}") from None
    except pydantic.ValidationError as error:
        raise ConfigError(_explain(error)) from None


def _apply(data: dict[str, Any], override: str) -> None:
    key, separator, text = override.partition("=")
    names = key.strip().split(".")
    if not separator or not all(names):
        raise ConfigError(f"--set expects a.b=value, got {override!r}")
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError:
        raise ConfigError(f"--set {key}: the value is not valid YAML: {text!r}") from None
    for depth, name in enumerate(names[:-1]):
        inner = data.setdefault(name, {})
        if not isinstance(inner, dict):
            raise ConfigError(f"--set {override!r}: {'.'.join(names[: depth + 1])} holds a value, not keys")
        data = inner
    data[names[-1]] = value


def _explain(error: pydantic.ValidationError) -> str:
    lines = []
    for issue in error.errors():
        key = ".".join(str(part) for part in issue["loc"]) or "the configuration"
        if issue["type"] == "extra_forbidden":
            lines.append(f"{key}: unknown key{_suggest(issue['loc'])}")
        elif issue["type"] == "missing":
            lines.append(f"{key}: missing, and it has no default")
        else:
            message = issue["msg"].removeprefix("Value error, ")
            came = "" if isinstance(issue["input"], dict) else f", got {issue['input']!r}"
            lines.append(f"{key}: {message}{came}")
    return "invalid configuration:\n  " + "\n  ".join(lines)


def _suggest(location: tuple[int | str, ...]) -> str:
    section: Any = JobConfig
    for name in location[:-1]:
        field = section.model_fields.get(str(name)) if hasattr(section, "model_fields") else None
        if field is None:
            return ""
        section = field.annotation
    known = list(getattr(section, "model_fields", {}))
    close = difflib.get_close_matches(str(location[-1]), known, n=1)
    return f"; did you mean {close[0]}?" if close else f"; known here: {', '.join(known)}"
