"""Writes a model of Qwen2.5-VL-7B's shape with random weights: 17 GB in bfloat16, no download.

    python -m jobs.measure.gpu.make_model FOLDER
    python -m jobs.measure.gpu.make_model FOLDER --small --device cpu     # two narrow layers, to try the script

Tokenizer, chat template and vocabulary are the embedded model's. No token ends an answer, so that every answer has
`max_new_tokens` tokens.
"""

import argparse
import json
import shutil
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForImageTextToText

from pipeline.mini import weights_path

CONFIG, GENERATION, PREPROCESSOR = "config.json", "generation_config.json", "preprocessor_config.json"
NOT_COPIED = (CONFIG, "model.safetensors")
TEXT = {
    "hidden_size": 3584,
    "intermediate_size": 18944,
    "num_hidden_layers": 28,
    "num_attention_heads": 28,
    "num_key_value_heads": 4,
}
VISION = {
    "depth": 32,
    "fullatt_block_indexes": [7, 15, 23, 31],
    "hidden_size": 1280,
    "intermediate_size": 3420,
    "num_heads": 16,
    "out_hidden_size": 3584,
    "patch_size": 14,
    "window_size": 112,
}
PREPROCESSING = {"patch_size": 14, "min_pixels": 56 * 56, "max_pixels": 3584 * 3584}
SMALL_TEXT = TEXT | {
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
}
SMALL_VISION = VISION | {
    "depth": 2,
    "fullatt_block_indexes": [1],
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_heads": 2,
    "out_hidden_size": 256,
}


def write(folder: Path, device: torch.device, small: bool = False) -> float:
    """Write the model's folder; returns its parameters in units of 10^9."""
    folder.mkdir(parents=True, exist_ok=True)
    for file in weights_path().iterdir():
        if file.name not in NOT_COPIED:
            shutil.copy(file, folder / file.name)
    _write(folder / CONFIG, configuration(small))
    generation = _read(folder / GENERATION) | {"eos_token_id": None}
    _write(folder / PREPROCESSOR, _read(folder / PREPROCESSOR) | PREPROCESSING)
    with torch.device(device):
        model = AutoModelForImageTextToText.from_config(AutoConfig.from_pretrained(folder), dtype=torch.bfloat16)
    model.generation_config.eos_token_id = None
    model.save_pretrained(folder)
    _write(folder / GENERATION, generation)  # save_pretrained has written its own
    return sum(parameter.numel() for parameter in model.parameters()) / 1e9


def configuration(small: bool) -> dict[str, Any]:
    """The embedded model's configuration with Qwen2.5-VL-7B's dimensions, head dimension 128."""
    config = _read(weights_path() / CONFIG)
    text, vision = config["text_config"], config["vision_config"]
    text.update(SMALL_TEXT if small else TEXT)
    text.update(
        layer_types=["full_attention"] * text["num_hidden_layers"],
        max_window_layers=text["num_hidden_layers"],
        max_position_embeddings=1 << 17,
        rope_parameters={"mrope_section": [16, 24, 24], "rope_theta": 1e6, "rope_type": "default"},
        eos_token_id=None,
        tie_word_embeddings=False,
    )
    vision.update(SMALL_VISION if small else VISION)
    vision.pop("rope_parameters", None)
    config["tie_word_embeddings"] = False
    return config


def _read(file: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    return found


def _write(file: Path, values: dict[str, Any]) -> None:
    file.write_text(json.dumps(values, indent=1) + "\n", encoding="utf-8")


def main(arguments: Sequence[str] | None = None) -> int:
    """Write the model and print its size."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="draws the weights; default: cuda")
    parser.add_argument("--small", action="store_true", help="two narrow layers")
    args = parser.parse_args(arguments)
    began = time.perf_counter()
    billions = write(args.folder, torch.device(args.device), args.small)
    print(f"{billions:.3f} × 10^9 parameters in {time.perf_counter() - began:.1f} s")
    return 0


if __name__ == "__main__":
    sys.exit(main())
