"""Reads and checks a job's configuration: a YAML file plus `--set key=value`, before anything starts.

Unknown keys, wrong types and impossible values raise `ConfigError`. It names every wrong key, the expected and the
actual value. Keys carry their unit in their name (`_s`, `_bytes`, `_px`, `_fps`, `_tokens`).
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
    """One prompt that the model answers for every unit."""

    id: str = Field(min_length=1, description="name of the answer in the output (prompt_id)")
    text: str = Field(min_length=1, description="the question or instruction that the model answers")


class Storage(_Section):
    """Access to `s3://`. Credentials come from the AWS chain only: environment, profile or role.

    Connections use TLS and verify certificates, against AWS_CA_BUNDLE if it is set. Only an `endpoint_url` with
    http:// is used without TLS.
    """

    endpoint_url: str | None = Field(
        None, description="S3-compatible server, https://host[:port], or http:// for one without TLS; null: AWS"
    )
    region: str | None = None
    path_style: bool = Field(False, description="put the bucket into the path instead of the host name")
    anonymous: bool = Field(False, description="send unsigned requests, for public buckets")
    max_attempts: int = Field(
        5,
        ge=1,
        le=20,
        description="attempts per request; 5xx, throttling, timeouts, resets and truncated responses are retried",
    )
    timeout_s: float = Field(
        30.0, gt=0, description="longest time without data while connecting or reading, per attempt"
    )

    @model_validator(mode="after")
    def _reachable(self) -> Self:
        # Not a field validator: its errors repeat the value, which may contain a password.
        if self.endpoint_url is None:
            return self
        parts = urlsplit(self.endpoint_url)
        if "@" in self.endpoint_url:
            raise ValueError(
                "endpoint_url: expected https://host[:port], got a URL with a user or password; remove them and "
                "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, a profile or a role"
            )
        if parts.scheme not in ("http", "https") or not parts.hostname or parts.query or parts.fragment:
            raise ValueError(
                f"endpoint_url: expected https://host[:port], or http:// for a server without TLS, "
                f"got {self.endpoint_url!r}"
            )
        return self


class Source(_Section):
    """The videos and images to caption."""

    uri: str = Field(min_length=1, description="folder, s3://bucket/prefix, one file, or a .parquet / .jsonl manifest")
    recursive: bool = True
    extensions: tuple[str, ...] = Field(
        (".mp4", ".mov", ".mkv", ".webm", ".avi", ".m4v", ".mpg", ".mpeg", ".ts", ".flv", ".wmv", ".3gp"),
        description="file name extensions of the videos in a folder",
    )
    max_units: int | None = Field(None, ge=1, description="plan only the first max_units units; null: all")
    probe: bool = Field(True, description="open every video while planning, to read its length, frame size and codec")
    probe_workers: int = Field(8, ge=1, le=256)
    known: str | None = Field(
        None,
        description="an earlier run, or a folder of runs: units that have a row there are not planned; null: plan all",
    )
    known_attempts: int = Field(
        1,
        ge=1,
        le=100,
        description="units with an error row there are planned again until they had this many attempts; 1: never",
    )

    @field_validator("extensions", mode="before")
    @classmethod
    def _normalised(cls, value: Any) -> Any:
        if isinstance(value, list | tuple) and all(isinstance(v, str) for v in value):
            return tuple(v.lower() if v.startswith(".") else f".{v.lower()}" for v in value)
        return value


class Clips(_Section):
    """How a video is cut into units; with `length_s: null` a video is one unit."""

    length_s: float | None = Field(None, gt=0)
    stride_s: float | None = Field(
        None, gt=0, description="time from one clip's start to the next one's; null: length_s, no overlap"
    )
    min_length_s: float = Field(0.0, ge=0, description="a last clip shorter than this is joined to the clip before it")
    skip_shorter_s: float | None = Field(None, gt=0, description="units shorter than this get status skipped")
    skip_longer_s: float | None = Field(None, gt=0, description="units longer than this get status skipped")

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.length_s is None and self.stride_s is not None:
            raise ValueError("stride_s needs length_s")
        if self.length_s is not None and self.min_length_s > self.length_s:
            raise ValueError(f"min_length_s ({self.min_length_s}) must be at most length_s ({self.length_s})")
        return self


class Frames(_Section):
    """Which frames of a unit are decoded and encoded, and at what size."""

    strategy: Literal["fps", "uniform"] = "fps"
    fps: float = Field(1.0, gt=0, le=240, description="strategy fps: frames per second of video")
    count: int = Field(16, ge=1, description="strategy uniform: frames per unit")
    max_frames: int = Field(
        128, ge=1, description="strategy fps: most frames per unit; a longer unit gets this many, spread evenly"
    )
    min_frames: int = Field(2, ge=1, description="strategy fps: fewest frames per unit, if the video has as many")
    min_px: int = Field(64 * 64, ge=1, description="smallest area of a frame after resizing (height x width)")
    max_px: int = Field(448 * 448, ge=1, description="largest area of a frame after resizing (height x width)")
    batch_frames: int = Field(
        16, ge=1, le=1024, description="frames per batch: decoded, sent to the model actor and encoded together"
    )
    repeat_tolerance: float | None = Field(
        None,
        ge=0,
        le=255,
        description="a frame is a repeat if no patch differs from the last encoded frame by more than this, in mean "
        "pixel value (0 to 255); repeats are counted, not encoded (Qwen-VL only); null: encode all",
    )

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.min_px > self.max_px:
            raise ValueError(f"min_px ({self.min_px}) must be at most max_px ({self.max_px})")
        if self.min_frames > self.max_frames:
            raise ValueError(f"min_frames ({self.min_frames}) must be at most max_frames ({self.max_frames})")
        return self


class Decode(_Section):
    """How frames are decoded: in Ray tasks of their own, whose crash does not end the job."""

    backend: str = Field(
        "auto",
        pattern=r"^(auto|decord|pyav|[\w.]+:\w+)$",
        description="auto (decord; PyAV where decord fails or would decode many frames twice) | decord | pyav | "
        "package.module:function",
    )
    timeout_s: float = Field(300.0, gt=0, description="longest time a running decoder may take for one batch of frames")
    max_retries: int = Field(2, ge=0, le=10, description="restarts of a unit's decoder after its process died")
    prefetch_units: int = Field(
        8, ge=0, le=16, description="units decoded ahead of the one that enters the model next, per actor"
    )
    num_cpus: float = Field(1.0, gt=0, description="CPUs reserved for one decode task")
    max_object_bytes: int = Field(
        8 << 30,
        ge=1,
        description="largest object copied to local disk; PyAV reads larger ones by byte range",
    )


class Model(_Section):
    """The vision-language model that every actor loads."""

    name: str = Field(
        "mini", min_length=1, description="mini (part of this package) | a hub name such as Qwen/Qwen2.5-VL-7B-Instruct"
    )
    path: str | None = Field(None, description="local folder to load the model from; null: the hub")
    revision: str | None = None
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    device: str = Field("auto", pattern=r"^(auto|cpu|cuda(:\d+)?)$")
    attention: Literal["sdpa", "eager", "flash_attention_2"] = "sdpa"
    max_new_tokens: int = Field(128, ge=1)
    temperature: float = Field(0.0, ge=0, description="sampling temperature; 0: greedy decoding")
    timeout_s: float = Field(
        1800.0,
        gt=0,
        description="longest time without an encoded frame batch, chunk or token; then the process is replaced",
    )
    seed: int = 0


class LightKV(_Section):
    """Compression of vision tokens during prefill."""

    enabled: bool = True
    method: Literal["lightkv", "published", "spacetime"] = Field(
        "lightkv",
        description="lightkv: merge tokens in space and time, then drop those the question attends to least; "
        "spacetime: only merge; published: the method of the paper",
    )
    retention: float = Field(
        0.55, ge=0.05, le=1.0, description="share of the vision KV entries kept, averaged over layers"
    )
    stages: int | None = Field(
        None, ge=1, le=16, description="layers at which tokens are reduced; null: the method's default"
    )
    windows: Literal["frame", "spatiotemporal"] = Field(
        "frame", description="published: windows within which tokens merge"
    )
    window_frames: int | None = Field(
        None, ge=1, description="published: frames per spatiotemporal window; null: all frames of the unit"
    )
    guidance: Literal["prompt", "question", "uniform"] = Field(
        "prompt", description="published: tokens whose attention weights the merges; uniform: equal weights"
    )

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.method != "published":
            for name in ("windows", "window_frames", "guidance"):
                value = getattr(self, name)
                if value != type(self).model_fields[name].default:
                    raise ValueError(
                        f"{name} ({value}) needs method: published; remove it, or change method ({self.method})"
                    )
        if self.window_frames is not None and self.windows != "spatiotemporal":
            raise ValueError("window_frames needs windows: spatiotemporal")
        return self


class Engine(_Section):
    """How prompts are prefilled and answers decoded, and how the KV cache is stored."""

    chunk_tokens: int = Field(
        4096,
        ge=1,
        description="tokens per prefill chunk; a longer unit is prefilled chunk by chunk as its frames arrive",
    )
    answers: int = Field(
        16, ge=1, description="most prompts in prefill and decoding at once, of one unit or of several"
    )
    kv_bits: Literal[4, 8, 16] = Field(
        16, description="bits per number in the KV cache of everything before the question; 16: the model's dtype"
    )
    kv_group: Literal[16, 32, 64, 128] = Field(32, description="tokens whose keys share one scale, with kv_bits 4 or 8")
    fold: bool = Field(
        False, description="shrink the cache of layers before the last stage to the tokens that the last stage left"
    )
    silent_layers: tuple[int, ...] = Field(
        (),
        description="decoder layers, counted from 0, whose vision KV is dropped after each chunk; which layers "
        "allow it depends on the model",
    )
    compiled: bool = Field(
        False, description="decode with torch.compile; the first answers are slow, and a C++ compiler is needed"
    )
    cache_bytes: int | None = Field(
        None,
        ge=1,
        description="most bytes of all KV caches together; no unit enters while they are full; null: from limits",
    )


class Budget(_Section):
    """A bound on the KV cache of one prompt, for units of any length; tokens beyond it are merged further."""

    kv_bytes: int | None = Field(
        None, ge=1, description="most bytes of vision KV of one prompt; null: no bound, lightkv.retention alone decides"
    )


class Limits(_Section):
    """What one actor may use of its machine."""

    gpu_memory_bytes: int | None = Field(
        None,
        ge=1 << 20,
        description="GPU memory of one actor, weights included; chunks and caches are sized to fit; null: all of it",
    )


class Actors(_Section):
    """The pool of model actors. Ray Data grows it from `min` to `max` while units wait."""

    min: int = Field(1, ge=1)
    max: int = Field(1, ge=1)
    num_gpus: float | None = Field(None, ge=0, description="GPUs of one actor; null: 1 on a GPU device, 0 on the CPU")
    num_cpus: float = Field(0.0, ge=0, description="CPUs reserved for one actor; decode tasks cannot use them")
    batch_units: int = Field(
        16,
        ge=1,
        le=1024,
        description="units per block, and most units in the model at once; an actor holds four blocks, which are "
        "repeated if its process dies",
    )

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.min > self.max:
            raise ValueError(f"min ({self.min}) must be at most max ({self.max})")
        return self


class Ray(_Section):
    """The Ray cluster and its resources."""

    address: str | None = Field(
        None, description="cluster address; null: that of `ray job submit` or RAY_ADDRESS, else start a local cluster"
    )
    num_cpus: int | None = Field(None, ge=1, description="CPUs of a local cluster; null: all")
    object_store_bytes: int | None = Field(
        None, ge=80 << 20, description="object store of a local cluster; null: Ray's default"
    )
    actors: Actors = Actors()


class Sink(_Section):
    """The output: rows as Parquet files in `uri/data`, the run's own files in `uri/_run`."""

    uri: str = Field(min_length=1)
    rows_per_file: int = Field(
        64, ge=1, description="rows per Parquet file; a kill loses at most the rows of unfinished files"
    )
    compression: Literal["zstd", "snappy", "none"] = "zstd"


class Run(_Section):
    """Logging, retries of crashed units, and when the job ends."""

    progress_interval_s: float = Field(10.0, gt=0)
    log_format: Literal["text", "json"] = Field(
        "text", description="terminal output. text: progress and a final table; json: one JSON object per line"
    )
    max_attempts: int = Field(
        3,
        ge=2,  # at its first start another unit may have ended the process
        le=100,
        description="most starts of a unit whose model process dies, from the second on alone in the model; then the "
        "unit is given up and becomes an error row",
    )
    max_given_up: int = Field(
        20, ge=1, description="end the job after more given-up units in a row than this, with none finished in between"
    )
    stall_s: float = Field(
        600.0,
        gt=0,
        description="end the job (exit code 2) after this long without progress: no frame, no token, no row and "
        "no model that loads; raise it where a node takes longer to start",
    )
    grace_s: float = Field(25.0, ge=0, description="time after SIGTERM to finish the units in the model")
    lock_timeout_s: float = Field(
        120.0, gt=0, description="a lock without a heartbeat for this long may be taken over by another job"
    )


class Report(_Section):
    """The report page of a run, `_run/report.html`."""

    enabled: bool = True
    samples: int = Field(
        24, ge=0, le=1000, description="about how many units are shown with their frames; chosen by a hash of the id"
    )
    frames: int = Field(8, ge=1, le=64, description="most frames shown per unit")


class JobConfig(_Section):
    """The configuration of one captioning job."""

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
            raise ValueError(f"prompts: every id must be unique, got {ids}")
        return self

    def hash(self) -> str:
        """A hash, 16 hex digits, of the keys that answers depend on; keys of place and speed do not count."""
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
        """The resolved configuration as YAML; `load_config` reads it back as an equal one."""
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


def load_config(path: str | Path | None, overrides: list[str] | None = None) -> JobConfig:
    """Read the YAML file `path` (None: overrides only), apply `a.b=value` overrides (YAML values), and check it all."""
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
        # JSON mode is strict about types ("3" is not a number), except that lists may fill tuples.
        return JobConfig.model_validate_json(json.dumps(data))
    except TypeError as error:
        raise ConfigError(
            f"expected strings, numbers, lists and keys only, got a value of another type: {error}"
        ) from None
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
            raise ConfigError(f"--set {override!r}: {'.'.join(names[: depth + 1])} is a value, not a section with keys")
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
    return f"; did you mean {close[0]}?" if close else f"; the keys here are {', '.join(known)}"
