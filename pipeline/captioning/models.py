"""Finds and loads vision-language models: the embedded one, a local folder, or a name on the hub."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import huggingface_hub.utils
import torch
import transformers
from transformers.image_processing_base import ImageProcessingMixin
from transformers.utils import cached_file

from lightkv import LightKVError, family_of
from pipeline.config import Model
from pipeline.errors import ConfigError


@dataclass(frozen=True)
class ModelCard:
    """What is known of a model without loading its weights."""

    name: str
    location: str  # a folder or a hub name
    revision: str | None
    config: Any  # transformers' configuration
    preprocessor: dict[str, Any]  # preprocessor_config.json


def describe(model: Model) -> ModelCard:
    """Configuration and preprocessing of `model`; raises `ConfigError` with one line if they cannot be loaded."""
    location = _location(model)
    # An unreachable hub is reported once, by the error below, not by each of its retries.
    huggingface_hub.utils.logging.set_verbosity_error()
    try:
        config = transformers.AutoConfig.from_pretrained(location, revision=model.revision, trust_remote_code=False)
        preprocessor, _ = ImageProcessingMixin.get_image_processor_dict(location, revision=model.revision)
    except (OSError, ValueError, KeyError) as error:
        raise ConfigError(_unavailable(model, location, error)) from None
    try:
        family_of(config)
    except LightKVError as error:
        raise ConfigError(f"model.name {model.name}: {error}") from None
    return ModelCard(model.name, location, model.revision, config, preprocessor)


def load_tokenizer(card: ModelCard) -> Any:
    """The tokenizer with its chat template, whichever file of the repository holds it."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(
        card.location, revision=card.revision, trust_remote_code=False
    )
    template = _processor_template(card) or tokenizer.chat_template
    if template is None:
        raise ConfigError(f"model.name {card.name}: it has no chat template; choose an instruction-tuned model")
    tokenizer.chat_template = template
    return tokenizer


def load_model(card: ModelCard, model: Model) -> Any:
    """The model in evaluation mode on its device; reads weights from safetensors only."""
    transformers.utils.logging.disable_progress_bar()
    device = pick_device(model.device)
    dtype = pick_dtype(model.dtype, device)
    try:
        loaded = transformers.AutoModelForImageTextToText.from_pretrained(
            card.location,
            revision=card.revision,
            dtype=dtype,
            attn_implementation=model.attention,
            trust_remote_code=False,
            use_safetensors=True,
        )
    except (OSError, ValueError, ImportError) as error:
        raise ConfigError(_unavailable(model, card.location, error)) from None
    return loaded.to(device).eval()


def pick_device(device: str) -> torch.device:
    """Resolve the device; `auto` is the GPU if there is one."""
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise ConfigError(f"model.device: expected a GPU for {device}, but torch {torch.__version__} finds none")
    return torch.device(device)


def pick_dtype(dtype: str, device: torch.device) -> torch.dtype | str:
    """Resolve the dtype; `auto` is the checkpoint's own on a GPU, and float32 on a CPU, where bfloat16 is slow."""
    if dtype != "auto":
        return getattr(torch, dtype)
    return "auto" if device.type == "cuda" else torch.float32


def _location(model: Model) -> str:
    if model.path is not None:
        if not Path(model.path).is_dir():
            raise ConfigError(f"model.path: expected a folder with a model, got {model.path}")
        return model.path
    if model.name == "mini":
        from pipeline.mini import weights_path  # the only model that is part of the package

        return str(weights_path())
    return model.name


def _processor_template(card: ModelCard) -> str | None:
    for filename in ("chat_template.jinja", "chat_template.json"):
        found = cached_file(
            card.location,
            filename,
            revision=card.revision,
            _raise_exceptions_for_missing_entries=False,
            _raise_exceptions_for_connection_errors=False,
        )
        if found is not None:
            text = Path(found).read_text(encoding="utf-8")
            return text if filename.endswith("jinja") else json.loads(text)["chat_template"]
    return None


def _unavailable(model: Model, location: str, error: Exception) -> str:
    reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    return (
        f"model.name {model.name}: cannot be loaded from {location} ({reason}); "
        "the hub must be reachable or the model in its cache, or set model.path to a local folder"
    )
