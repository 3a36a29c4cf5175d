"""Defines the lmms-eval model `lightkv`: runs lmms-eval's own model for a checkpoint under `compress`.

    pip install 'lightkv[lmms-eval]'

registers it (entry point group `lmms_eval.models`). Use a separate environment, because lmms-eval 0.7.3 needs av < 16.
The data sets come from the hub (`hf auth login` once); caption scores need Java. The paper's eight benchmarks, one
command per model:

    TASKS=coco2017_cap_val,gqa,mme,nocaps_val,pope,seedbench,scienceqa_img,vizwiz_vqa_val

    python -m lmms_eval --model lightkv --tasks $TASKS --output_path results \\
        --model_args pretrained=llava-hf/llava-1.5-7b-hf,method=published,dtype=float16
    python -m lmms_eval --model lightkv --tasks $TASKS --output_path results \\
        --model_args pretrained=llava-hf/llava-1.5-13b-hf,method=published,dtype=float16
    python -m lmms_eval --model lightkv --tasks $TASKS --output_path results \\
        --model_args pretrained=llava-hf/llava-v1.6-vicuna-7b-hf,method=published,dtype=float16
    python -m lmms_eval --model lightkv --tasks $TASKS --output_path results \\
        --model_args pretrained=llava-hf/llava-v1.6-vicuna-13b-hf,method=published,dtype=float16
    python -m lmms_eval --model lightkv --tasks $TASKS --output_path results \\
        --model_args pretrained=Qwen/Qwen2.5-VL-7B-Instruct,method=published
    python -m lmms_eval --model lightkv --tasks $TASKS --output_path results \\
        --model_args pretrained=OpenGVLab/InternVL3-8B-hf,method=published

`method=none` runs the plain model in the same harness, for comparison. transformers has no code for InternVL2-8B and
EVE, the paper's other models; InternVL3-8B-hf is the closest model that it has. The model is placed on one GPU.
`--device cpu` moves it, `device_map=auto` in the arguments spreads it over GPUs, and `accelerate launch -m lmms_eval`
runs one copy per GPU.

Arguments, `key=value` in --model_args:

    pretrained   checkpoint of a family in LMMS_EVAL_MODELS, on the hub or in a folder
    method       lightkv (the default), spacetime, published, or a baseline: random, stride, tome, fastv, evs;
                 none: no compression
    retention    share of vision KV entries kept, averaged over layers (default 0.55)
    stages       number of stages (default: the method's usual number)
    positions, windows, window_frames, guidance, budget, rounds, distance, seed    as in `LightKVConfig`

and every argument of lmms-eval's own model (`dtype` if it has one, attn_implementation, max_pixels, …).
`LightKVConfig.for_model` derives the stages, with one exception: method=published with neither `retention` nor `stages`
runs the paper's schedule, for a decoder of 28, 32 or 40 layers. An unknown argument is an error. A failed generation is
an error too; lmms-eval's LLaVA and InternVL would score an empty string. The results file reports the shares kept under
`throughput`: `avg_lightkv_retention`, `avg_lightkv_kv_bytes_kept`.
"""

import inspect
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, fields
from typing import Any

from lmms_eval.api.model import lmms  # type: ignore
from lmms_eval.utils import simple_parse_args_string  # type: ignore
from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel

from lightkv.errors import ConfigError, UnsupportedModelError
from lightkv.hooks.compress import compress
from lightkv.hooks.report import Report
from lightkv.methods.config import DEFAULT_METHOD, LightKVConfig
from lightkv.methods.table import METHODS

LMMS_EVAL_MODELS: dict[str, str] = {
    "internvl": "internvl_hf",
    "llava": "llava_hf",
    "llava_next": "llava_hf",
    "qwen2_5_vl": "qwen2_5_vl",
}
"""model_type of a checkpoint → the lmms-eval model that runs it."""

PUBLISHED_BY_DEPTH = {28: "qwen2.5-vl-7b", 32: "llava-1.5-7b", 40: "llava-1.5-13b"}
METHODS_AND_NONE = (*METHODS, "none")
LIGHTKV_OPTIONS = frozenset(field.name for field in fields(LightKVConfig)) - {"stages", "method"}


def manifest() -> Any:
    """The manifest that lmms-eval's registry reads from the entry point."""
    from lmms_eval.models.registry_v2 import ModelManifest  # type: ignore  # imports this module's entry point

    return ModelManifest(model_id="lightkv", chat_class_path=f"{__name__}.{LightKV.__name__}")


def schedule(
    model_config: PreTrainedConfig,
    method: str = DEFAULT_METHOD,
    retention: float | None = None,
    stages: int | None = None,
    **options: Any,
) -> LightKVConfig:
    """The configuration of `method` for this model. Raises ConfigError for arguments that exclude each other."""
    if method not in METHODS_AND_NONE:
        raise ConfigError(f"method must be one of {list(METHODS_AND_NONE)}, got {method!r}")
    targets: dict[str, Any] = {
        name: value for name, value in (("retention", retention), ("stages", stages)) if value is not None
    }
    if method == "none":
        if targets or options:
            raise ConfigError(f"method=none compresses nothing: omit {sorted({*targets, *options})}")
        return LightKVConfig(stages=())
    if targets or method != "published":
        return LightKVConfig.for_model(model_config, method=method, **targets, **options)
    depth = model_config.get_text_config().num_hidden_layers
    if depth not in PUBLISHED_BY_DEPTH:
        raise ConfigError(
            f"the paper has schedules for {sorted(PUBLISHED_BY_DEPTH)} layers, this decoder has {depth}: set retention="
        )
    return LightKVConfig.published(PUBLISHED_BY_DEPTH[depth], **options)


def load(pretrained: str, **arguments: Any) -> "LightKV":
    """Loads lmms-eval's model for `pretrained`, with compression; `arguments` are listed in the module's docstring.

    Raises UnsupportedModelError for a family that is not in LMMS_EVAL_MODELS. Raises ConfigError for arguments that
    neither LightKV nor the family's model has.
    """
    from lmms_eval.models import get_model  # type: ignore  # imports every plugin, this module among them

    model_config = AutoConfig.from_pretrained(pretrained)
    name = LMMS_EVAL_MODELS.get(model_config.model_type)
    if name is None:
        raise UnsupportedModelError(
            f"{pretrained} is a {model_config.model_type!r}, expected one of {sorted(LMMS_EVAL_MODELS)}"
        )
    plain = get_model(name)
    ours = {"method", "retention", "stages"} | LIGHTKV_OPTIONS
    known = _parameters(plain)
    unknown = sorted(set(arguments) - ours - known)
    if unknown:
        raise ConfigError(
            f"unknown arguments {unknown}; LightKV has {sorted(ours)}, lmms-eval's {name} {sorted(known)}"
        )
    compression = schedule(model_config, **{key: value for key, value in arguments.items() if key in ours})
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:  # else each process selects its own GPU
        # transformers 5 refuses llava_hf's default ""; the other models' "auto" takes a GPU and ignores `device`.
        arguments.setdefault("device_map", arguments.get("device", "cuda"))
    compressed = type(f"LightKV{plain.__name__}", (LightKV, plain), {"compression": compression})
    return compressed(pretrained=pretrained, **{key: value for key, value in arguments.items() if key not in ours})


def _parameters(model: type) -> set[str]:
    """Names of the constructor's declared arguments, without **kwargs, in which some models ignore unknown ones."""
    parameters = inspect.signature(model).parameters.values()
    return {parameter.name for parameter in parameters if parameter.kind is not parameter.VAR_KEYWORD}


class LightKV(lmms):
    """Base class placed before lmms-eval's own model class: runs every answering method under `compress`."""

    is_simple = False
    compression: LightKVConfig

    @classmethod
    def create_from_arg_string(cls, arg_string: str, additional_config: Mapping[str, Any] | None = None) -> "LightKV":
        """Makes the model from --model_args, --batch_size and --device; lmms-eval calls it."""
        given = {key: value for key, value in (additional_config or {}).items() if value is not None}
        return load(**simple_parse_args_string(arg_string), **given)

    def generate_until(self, requests: list[Any]) -> list[Any]:
        with self._compressed():
            return super().generate_until(requests)

    def generate_until_multi_round(self, requests: list[Any]) -> list[Any]:
        with self._compressed():
            return super().generate_until_multi_round(requests)

    def loglikelihood(self, requests: list[Any]) -> list[Any]:
        with self._compressed():
            return super().loglikelihood(requests)

    @contextmanager
    def _compressed(self) -> Iterator[None]:
        kept = Kept()
        with compress(self.model, self.compression) as report, _watched(self.model, lambda: kept.add(report)):
            yield
        kept.log()


@dataclass
class Kept:
    """Sums over the prefills of one scope: vision tokens and cache bytes, with and without compression."""

    vision_tokens: int = 0
    vision_tokens_kept: float = 0.0  # averaged over layers
    kv_bytes: int = 0
    kv_bytes_uncompressed: int = 0
    notes: tuple[str, ...] = ()

    def add(self, report: Report) -> None:
        self.vision_tokens += report.vision_tokens
        self.vision_tokens_kept += report.vision_tokens * report.retention
        self.kv_bytes += report.kv_bytes
        self.kv_bytes_uncompressed += report.kv_bytes_uncompressed
        self.notes = tuple(dict.fromkeys(self.notes + report.notes))

    def log(self) -> None:
        """Writes the shares to lmms-eval's log and results file, and the notes as warnings."""
        from lmms_eval.models.model_utils.gen_metrics import log_metrics  # type: ignore
        from loguru import logger  # type: ignore

        for note in self.notes:
            logger.warning(f"lightkv: {note}")
        shares = {
            "lightkv_retention": self.vision_tokens_kept / self.vision_tokens if self.vision_tokens else 1.0,
            "lightkv_kv_bytes_kept": self.kv_bytes / self.kv_bytes_uncompressed if self.kv_bytes_uncompressed else 1.0,
        }
        log_metrics(total_elapsed_time=0.0, total_gen_tokens=0, avg_speed=0.0, additional_metrics=shares)


class _AnswerFailed(BaseException):
    """Carries an error of `generate` past the `except Exception` of lmms-eval's models, within this module only."""

    def __init__(self, error: Exception) -> None:
        self.error = error


@contextmanager
def _watched(model: PreTrainedModel, answered: Callable[[], None]) -> Iterator[None]:
    """Calls `answered` after each `generate` in the scope; its errors end the scope even if caught inside."""
    generate = model.generate
    error: Exception | None = None

    def watched(*args: Any, **kwargs: Any) -> Any:
        try:
            output = generate(*args, **kwargs)
        except Exception as caught:
            raise _AnswerFailed(caught) from caught
        answered()
        return output

    model.generate = watched
    try:
        yield
    except _AnswerFailed as failed:
        error = failed.error
    finally:
        model.generate = generate
    if error is not None:
        raise error
