"""Compare what the question changes in lightkv and in the published method: a picture, and figures over many images.

    python -m jobs.measure.survivors                 # the embedded model; writes jobs/results/survivors.{png,json}
    python -m jobs.measure.survivors --model PATH    # other weights of the mini model

The picture's image is the first demo scene that has a question of each family in ASKED; it is not chosen by its result.
The figures are means and standard deviations over the first images of the test split, two questions each.
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from torch import Tensor, nn
from transformers import AutoModelForImageTextToText, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerFast

from jobs.measure.evaluate.answers import device_name
from jobs.measure.survivors_figure import Seen, draw
from lightkv import LightKVConfig, compress, prompt_guidance
from lightkv.hooks.attention import HOOKS, NO_HOOK
from pipeline.mini import weights_path
from pipeline.mini.answer import answer, image_inputs
from pipeline.mini.measure import weights_sha256
from pipeline.mini.model import TOKEN_PX
from pipeline.mini.questions import QA
from pipeline.mini.render import picture
from pipeline.mini.scene import sample_scene
from pipeline.mini.world import questions_of, scene_seed
from pipeline.version import code_version

SIDE_PX, IMAGES = 192, 50
METHODS, RETENTIONS, DRAWN = ("lightkv", "published"), (0.55, 0.25), 0.25
ASKED = ("color", "digits")
OUT = Path(__file__).parents[1] / "results"


def look(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    image: np.ndarray,
    question: str,
    config: LightKVConfig,
    max_new_tokens: int = 1,
) -> Seen:
    """Answer under compression and return the surviving tokens; leaves the model unchanged."""
    with compress(model, config) as report, _watched(model, config) as prompt:
        said = answer(model, tokenizer, image_inputs([image]), question, max_new_tokens)
    vision = prompt["ids"] == model.config.image_token_id
    stages = report.survivors[0]
    alive = [torch.zeros(len(vision), dtype=torch.bool).index_fill(0, stage.kept, True)[vision] for stage in stages]
    weight = None
    if "q" in prompt:
        votes = prompt_guidance(prompt["q"], prompt["k"], ~vision, prompt["scale"])[vision]
        weight = votes / votes.sum()
    return Seen(question, said, torch.stack(alive), weight, report.retention)


@contextmanager
def _watched(model: PreTrainedModel, config: LightKVConfig) -> Iterator[dict[str, Any]]:
    """Collect from the first forward pass: the prompt's ids and, if the first stage uses them, q and k of its layer."""
    prompt: dict[str, Any] = {}

    def note_ids(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        prompt.setdefault("ids", kwargs["input_ids"][0])

    handle = model.register_forward_pre_hook(note_ids, with_kwargs=True)
    first = config.stages[0].layer
    attention = model.get_decoder().layers[first].self_attn if first >= 0 else None
    hook = HOOKS.get(attention, NO_HOOK) if attention is not None else NO_HOOK
    tap = hook.tap

    def note_attention(q: Tensor, k: Tensor, scale: float) -> None:
        if "q" not in prompt:
            prompt.update(q=q[0], k=k[0], scale=scale)
        assert tap is not None
        tap(q, k, scale)

    if attention is not None and tap is not None:
        HOOKS[attention] = replace(hook, tap=note_attention)  # removed with the other hooks when `compress` ends
    try:
        yield prompt
    finally:
        handle.remove()


@dataclass(frozen=True)
class Overlap:
    """Two looks at one image: survivors of both over survivors of either, per stage, and share of weight moved."""

    iou: tuple[float, ...]
    moved: float | None

    @classmethod
    def of(cls, one: Seen, other: Seen) -> Overlap:
        both, either = (one.alive & other.alive).sum(-1), (one.alive | other.alive).sum(-1)
        moved = None
        if one.weight is not None and other.weight is not None:
            moved = float((one.weight - other.weight).abs().sum()) / 2
        return cls(tuple((both / either).tolist()), moved)


def pairs(split: str, images: int) -> Iterator[tuple[np.ndarray, str, str]]:
    """Still images of a split with two random questions each; scenes with fewer questions are left out."""
    index, found = 0, 0
    while found < images:
        rng = np.random.default_rng(scene_seed(split, index))
        scene = sample_scene(rng, SIDE_PX, SIDE_PX, 0.0)
        offered = questions_of(scene, rng)
        index += 1
        if len(offered) >= 2:
            found += 1
            first, second = (offered[i].question for i in rng.permutation(len(offered))[:2].tolist())
            yield picture(scene), first, second


def measure(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, images: int) -> list[dict[str, Any]]:
    """Overlap of the survivors of two questions about an image: one entry per method and retention."""
    found = []
    for method in METHODS:
        for retention in RETENTIONS:
            config = LightKVConfig.for_model(model.config, retention, method=method)
            overlaps, left = [], []
            for image, *questions in pairs("test", images):
                one, other = (look(model, tokenizer, image, question, config) for question in questions)
                overlaps.append(Overlap.of(one, other))
                left.append(float(one.alive[-1].float().mean()))
            moved = [overlap.moved for overlap in overlaps if overlap.moved is not None]
            found.append(
                {
                    "method": method,
                    "retention": retention,
                    "stages": [{"layer": stage.layer, "drop": stage.drop} for stage in config.stages],
                    "patches_left": _spread(left),
                    "iou": [_spread(stage) for stage in zip(*(overlap.iou for overlap in overlaps), strict=True)],
                    "weight_moved": _spread(moved) if moved else None,
                }
            )
    return found


def _spread(values: Sequence[float]) -> dict[str, float]:
    return {"mean": round(float(np.mean(values)), 4), "standard_deviation": round(float(np.std(values)), 4)}


def example() -> tuple[np.ndarray, list[QA]]:
    """The first demo scene that has a question of every family in ASKED, and those questions."""
    for index in count():
        rng = np.random.default_rng(scene_seed("demo", index))
        scene = sample_scene(rng, SIDE_PX, SIDE_PX, 0.0)
        offered = questions_of(scene, rng, ASKED)
        if len(offered) == len(ASKED):
            return picture(scene), offered
    raise AssertionError


def table(found: Sequence[dict[str, Any]], images: int) -> str:
    """The figures as a Markdown table."""
    lines = [
        f"{images} images of {SIDE_PX}×{SIDE_PX} px, two random questions each; mean ± standard deviation.",
        "",
        "| method | KV kept | patches left | overlap after the first stage | after the last | merge weight moved |",
        "|---|---|---|---|---|---|",
    ]
    for entry in found:
        left, first, *_, last = (_percent(cell) for cell in (entry["patches_left"], *entry["iou"]))
        cells = [
            entry["method"],
            f"{entry['retention']:.0%}",
            left,
            first,
            last,
            _percent(entry["weight_moved"]),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    lines += [
        "",
        "Overlap: of the patches that survive either question, those that survive both. Weight: of the first stage's",
    ]
    return "\n".join([*lines, "merges, by the published method."])


def _percent(cell: dict[str, float] | None) -> str:
    return "–" if cell is None else f"{cell['mean']:.1%} ± {cell['standard_deviation']:.1%}"


def figure(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, footer: Sequence[str]) -> Any:
    """The picture: a row of panels per method, a panel per question."""
    image, questions = example()
    rows = {}
    for method in METHODS:
        config = LightKVConfig.for_model(model.config, DRAWN, method=method)
        rows[method] = [look(model, tokenizer, image, qa.question, config, max_new_tokens=16) for qa in questions]
    return draw(image, TOKEN_PX, rows, footer)


def footer(found: Sequence[dict[str, Any]], images: int) -> list[str]:
    """The text under the panels, from the figures."""
    ours, paper = (
        next(entry for entry in found if (entry["method"], entry["retention"]) == (method, DRAWN)) for method in METHODS
    )
    return [
        f"Mean over {images} images, two random questions each, {DRAWN:.0%} of the vision KV kept: of the patches that "
        "survive either question,",
        f"{ours['iou'][-1]['mean']:.1%} survive both by lightkv and {paper['iou'][-1]['mean']:.1%} by the published "
        "method, where questions set merge weights alone.",
    ]


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=weights_path(), help="folder with weights of the mini model")
    parser.add_argument("--out", type=Path, default=OUT, help="folder of survivors.png and survivors.json")
    parser.add_argument("--images", type=int, default=IMAGES, help="number of images that the figures average over")
    args = parser.parse_args(arguments)
    if not (args.model / "config.json").is_file():
        parser.error(f"--model: expected a folder with a model, got {args.model}")
    if args.images < 1:
        parser.error(f"--images: expected at least 1, got {args.images}")
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    model = AutoModelForImageTextToText.from_pretrained(args.model, dtype=torch.float32).eval()
    found = measure(model, tokenizer, args.images)
    print(table(found, args.images))
    args.out.mkdir(parents=True, exist_ok=True)
    result = {
        "command": f"python -m jobs.measure.survivors --images {args.images}",
        "images": args.images,
        "side_px": SIDE_PX,
        "split": "test",
        "dtype": "float32",
        "device": device_name(),
        "weights_sha256": weights_sha256(args.model),
        "versions": {
            "code": code_version(),
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
        "figures": found,
    }
    (args.out / "survivors.json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    drawn = args.out / "survivors.png"
    figure(model, tokenizer, footer(found, args.images)).save(drawn, optimize=True)
    print(f"\n{drawn}: {drawn.stat().st_size / 1024:.0f} KiB")
    return 0


if __name__ == "__main__":
    sys.exit(main())
