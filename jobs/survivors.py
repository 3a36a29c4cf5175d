"""What the question changes: a picture of the patches that survive two questions about one image, and the figures.

    python -m jobs.survivors                 # the embedded model; writes jobs/results/survivors.png, prints the figures
    python -m jobs.survivors --model PATH    # other weights of the mini model

The image is the first demo scene that offers a question of each family in ASKED; nothing is picked by its result. The
figures are means over the first images of the test split. Survivors are read off the RoPE angles that the layers after
a stage receive (every survivor keeps its own), guidance from the queries and keys of the first stage's layer.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
import torch
from torch import Tensor, nn
from transformers import (
    AttentionInterface,
    AttentionMaskInterface,
    AutoModelForImageTextToText,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from jobs.survivors_figure import draw
from lightkv import LightKVConfig, compress, prompt_guidance
from pipeline.mini import weights_path
from pipeline.mini.answer import answer, image_inputs
from pipeline.mini.model import TOKEN_PX
from pipeline.mini.questions import QA
from pipeline.mini.render import picture
from pipeline.mini.scene import sample_scene
from pipeline.mini.world import questions_of, scene_seed

SIDE_PX, RETENTION, IMAGES = 192, 0.55, 50
ASKED = ("color", "digits")
OUT = Path(__file__).with_name("results") / "survivors.png"


@dataclass(frozen=True)
class Seen:
    """One question about one image of N vision tokens (rows × columns).

    alive     bool [stages, N], the patches left after each stage
    guidance  fp32 [N] at the first stage: the share of the merge weight each patch has, sums to 1
    retention of vision KV entries, averaged over layers
    """

    question: str
    answer: str
    alive: Tensor
    guidance: Tensor
    retention: float


def look(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    image: np.ndarray,
    question: str,
    config: LightKVConfig,
    max_new_tokens: int = 1,
) -> Seen:
    """Answer under compression and watch the prefill; the model is left as it was."""
    with _watched(model, config) as prompt, compress(model, config) as report:
        said = answer(model, tokenizer, image_inputs([image]), question, max_new_tokens)
    ids = prompt["ids"]
    vision = ids == model.config.image_token_id
    everyone = prompt["angles"][0]
    alive = [_among(everyone, angles)[vision] for angles in prompt["angles"][1:]]
    guidance = prompt_guidance(prompt["q"], prompt["k"], ~vision, prompt["scale"])[vision]
    return Seen(question, said, torch.stack(alive), guidance / guidance.sum(), report.retention)


@contextmanager
def _watched(model: PreTrainedModel, config: LightKVConfig) -> Iterator[dict[str, Any]]:
    """Collect of the first forward: prompt ids, angles of layer 0 and after each stage, q and k of the first stage."""
    if config.positions != "keep":
        raise ValueError(f"survivors are known by the positions they keep, got positions={config.positions!r}")
    prompt: dict[str, Any] = {}
    layers = model.get_decoder().layers
    angles: dict[int, Tensor] = {}

    def note_ids(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        prompt.setdefault("ids", kwargs["input_ids"][0])

    def note_angles(place: int, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        if place not in angles:  # cos and sin [..., S, d] → [S, features]
            angles[place] = torch.cat(kwargs["position_embeddings"], dim=-1).movedim(-2, 0).flatten(1)

    def note_attention(q: Tensor, k: Tensor, scale: float) -> None:
        if "q" not in prompt:
            prompt.update(q=q[0], k=k[0], scale=scale)

    AttentionInterface.register("watched_sdpa", _attend)
    AttentionMaskInterface.register("watched_sdpa", sdpa_mask)
    before = model.config.text_config._attn_implementation
    listened = layers[config.stages[0].layer].self_attn
    with ExitStack() as undo:
        undo.callback(model.set_attn_implementation, {"text_config": before})
        model.set_attn_implementation({"text_config": "watched_sdpa"})
        undo.callback(LISTENERS.pop, listened)
        LISTENERS[listened] = note_attention
        undo.callback(model.register_forward_pre_hook(note_ids, with_kwargs=True).remove)
        for place in (0, *(stage.layer + 1 for stage in config.stages)):
            # A forward hook gets what the layer received after all pre-hooks: what the stage before it has left.
            hook = partial(note_angles, place)
            undo.callback(layers[place].register_forward_hook(hook, with_kwargs=True).remove)
        yield prompt
    prompt["angles"] = list(angles.values())


LISTENERS: WeakKeyDictionary[nn.Module, Callable[[Tensor, Tensor, float], None]] = WeakKeyDictionary()


def _attend(module: nn.Module, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, **options: Any) -> Any:
    """transformers' SDPA, which first shows q and k to the module's listener."""
    if module in LISTENERS:
        LISTENERS[module](q, k, options["scaling"])
    return sdpa_attention_forward(module, q, k, v, mask, **options)


def _among(everyone: Tensor, survivors: Tensor) -> Tensor:
    """Bool [S]: which rows of everyone [S, F] are among survivors [S', F], bit for bit."""
    same = (everyone[:, None] == survivors[None]).all(dim=-1)
    assert bool((same.sum(dim=0) == 1).all())
    return same.any(dim=1)


@dataclass(frozen=True)
class Overlap:
    """Of two looks at one image: intersection over union of the survivors per stage, share of merge weight moved."""

    iou: tuple[float, ...]
    moved: float

    @classmethod
    def of(cls, one: Seen, other: Seen) -> Overlap:
        both, either = (one.alive & other.alive).sum(-1), (one.alive | other.alive).sum(-1)
        moved = float((one.guidance - other.guidance).abs().sum()) / 2
        return cls(tuple((both / either).tolist()), moved)

    @classmethod
    def mean(cls, overlaps: Sequence[Overlap]) -> Overlap:
        iou = np.mean([overlap.iou for overlap in overlaps], axis=0)
        return cls(tuple(iou.tolist()), float(np.mean([overlap.moved for overlap in overlaps])))


def pairs(split: str, images: int) -> Iterator[tuple[np.ndarray, str, str]]:
    """Still images of a split with two questions each, drawn at random; scenes that offer fewer are left out."""
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


def measure(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, retention: float, images: int
) -> dict[str, Overlap]:
    """Mean overlap of a question's survivors with those of: itself, another question, equal weights."""
    config = LightKVConfig.for_model(model.config, retention=retention)
    uniform = LightKVConfig.for_model(model.config, retention=retention, guidance="uniform")
    found: dict[str, list[Overlap]] = {"the same question again": [], "another question": [], "equal weights": []}
    for image, first, second in pairs("test", images):
        seen = look(model, tokenizer, image, first, config)
        found["the same question again"].append(Overlap.of(seen, look(model, tokenizer, image, first, config)))
        found["another question"].append(Overlap.of(seen, look(model, tokenizer, image, second, config)))
        flat = look(model, tokenizer, image, first, uniform)
        even = torch.full_like(flat.guidance, 1 / len(flat.guidance))
        found["equal weights"].append(Overlap.of(seen, replace(flat, guidance=even)))
    return {name: Overlap.mean(overlaps) for name, overlaps in found.items()}


def example() -> tuple[np.ndarray, list[QA]]:
    """The first demo scene that offers a question of every family in ASKED, and those questions."""
    for index in count():
        rng = np.random.default_rng(scene_seed("demo", index))
        scene = sample_scene(rng, SIDE_PX, SIDE_PX, 0.0)
        offered = questions_of(scene, rng, ASKED)
        if len(offered) == len(ASKED):
            return picture(scene), offered
    raise AssertionError


def report(config: LightKVConfig, retention: float, found: dict[str, Overlap], images: int) -> str:
    """A Markdown table of the figures."""
    stages = [f"after layer {stage.layer}" for stage in config.stages]
    lines = [
        f"{images} images of {SIDE_PX}×{SIDE_PX} px, two random questions each, retention {retention:.0%}.",
        "",
        f"| survivors of a question against | {' | '.join(f'IoU {stage}' for stage in stages)} | merge weight moved |",
        f"|---|{'---|' * len(stages)}---|",
    ]
    for name, overlap in found.items():
        lines.append(f"| {name} | {' | '.join(f'{iou:.3f}' for iou in overlap.iou)} | {overlap.moved:.1%} |")
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=weights_path(), help="folder with weights of the mini model")
    parser.add_argument("--out", type=Path, default=OUT, help="the PNG")
    parser.add_argument("--retention", type=float, default=RETENTION)
    parser.add_argument("--images", type=int, default=IMAGES, help="images that the figures are means over")
    args = parser.parse_args(arguments)
    if not (args.model / "config.json").is_file():
        parser.error(f"--model: expected a folder with a model, got {args.model}")
    if args.images < 1:
        parser.error(f"--images: expected at least 1, got {args.images}")
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    model = AutoModelForImageTextToText.from_pretrained(args.model, dtype=torch.float32).eval()
    config = LightKVConfig.for_model(model.config, retention=args.retention)
    found = measure(model, tokenizer, args.retention, args.images)
    print(report(config, args.retention, found, args.images))
    image, questions = example()
    looks = [look(model, tokenizer, image, qa.question, config, max_new_tokens=16) for qa in questions]
    args.out.parent.mkdir(parents=True, exist_ok=True)
    draw(image, TOKEN_PX, looks, [stage.layer for stage in config.stages], footer(found, args.images)).save(
        args.out, optimize=True
    )
    print(f"\n{args.out}: {args.out.stat().st_size / 1024:.0f} KiB")
    return 0


def footer(found: dict[str, Overlap], images: int) -> list[str]:
    """What the figure says under the panels, from the figures alone."""
    other, even = found["another question"], found["equal weights"]
    return [
        f"Mean over {images} images. Survivors of two questions overlap (intersection over union) by "
        f"{other.iou[0]:.1%} after the first stage and {other.iou[-1]:.1%} after the last;",
        f"survivors of a question and of equal weights by {even.iou[0]:.1%} and {even.iou[-1]:.1%}. Another question "
        f"moves {other.moved:.1%} of the merge weight to other patches, equal weights {even.moved:.1%}.",
        "How alike two patches are decides whether they merge; the question decides how much each of them counts.",
    ]


if __name__ == "__main__":
    sys.exit(main())
