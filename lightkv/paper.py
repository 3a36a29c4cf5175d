"""Computes the paper's cost table: `python -m lightkv.paper`.

Dimensions are those of the public checkpoints. The paper gives no prompt lengths; they follow from its uncompressed KV
column (in GiB, fp16): 141 to 174 text tokens. Compare ratios of FLOPs, not values: the paper also counts the vision
tower and the logits of every token, we count the decoder and the logits of the last token. The paper has no costs for
EVE and Qwen2.5-VL; their rows assume one image of typical size.
"""

from dataclasses import dataclass

from lightkv.cost import Cost, Shape, prefill_cost
from lightkv.methods.config import LightKVConfig
from lightkv.methods.schedule import derive_early
from lightkv.methods.settings import Stage
from lightkv.vision.families import EMBEDDINGS

VICUNA_7B = Shape(32, 4096, 11008, 32, 32, 128, 32064)
VICUNA_13B = Shape(40, 5120, 13824, 40, 40, 128, 32064)
INTERNLM2_7B = Shape(32, 4096, 14336, 32, 8, 128, 92553)
QWEN2_5_7B = Shape(28, 3584, 18944, 28, 4, 128, 152064)


@dataclass(frozen=True)
class PublishedModel:
    """A model of the paper, with the paper's own (plain, compressed) TFLOPs and KV GiB if it gives them."""

    name: str
    shape: Shape
    vision_tokens: int
    text_tokens: int
    paper_tflops: tuple[float, float] | None = None
    paper_kv_gib: tuple[float, float] | None = None

    def costs(self) -> tuple[Cost, Cost]:
        """(plain, with the paper's schedule): cost of the prefill in fp16."""
        schedule = LightKVConfig.published(self.name)
        plain, compressed = (
            prefill_cost(self.shape, self.vision_tokens, self.text_tokens, config, dtype_bytes=2, frames=1)
            for config in (None, schedule)
        )
        return plain, compressed


PUBLISHED_MODELS = (
    PublishedModel("llava-1.5-7b", VICUNA_7B, 576, 141, (10.2, 6.6), (0.35, 0.23)),
    PublishedModel("llava-1.5-13b", VICUNA_13B, 576, 145, (19.4, 12.6), (0.55, 0.37)),
    PublishedModel("llava-next-7b", VICUNA_7B, 2153, 141, (34.8, 22.3), (1.12, 0.67)),
    PublishedModel("llava-next-13b", VICUNA_13B, 2153, 141, (65.0, 37.3), (1.75, 1.05)),
    PublishedModel("internvl2-8b", INTERNLM2_7B, 1792, 174, (35.7, 22.9), (0.24, 0.14)),
    PublishedModel("eve-7b", VICUNA_7B, 576, 141),
    PublishedModel("eve-7b-hd", VICUNA_7B, 2304, 141),
    PublishedModel("qwen2.5-vl-7b", QWEN2_5_7B, 1024, 141),
)


def table() -> str:
    """The table of the eight models: computed and published TFLOPs and KV GiB, plain → compressed."""
    lines = [f"{'model':14} {'retention':>9} {'TFLOPs':>14} {'(paper)':>14} {'KV GiB':>14} {'(paper)':>14}"]
    for model in PUBLISHED_MODELS:
        plain, small = model.costs()
        flops = _arrow((plain.flops / 1e12, small.flops / 1e12), 1)
        kv = _arrow((plain.kv_bytes / 2**30, small.kv_bytes / 2**30), 2)
        lines.append(
            f"{model.name:14} {small.retention:9.1%} {flops:>14} {_arrow(model.paper_tflops, 1):>14} {kv:>14} "
            f"{_arrow(model.paper_kv_gib, 2):>14}"
        )
    return "\n".join(lines)


def hour_of_video() -> str:
    """Costs of an hour of video, 3600 frames of 448 × 448, a token per 28 × 28 × 2: the paper's schedule and ours."""
    hour, text = 1800 * 16 * 16, 141
    ours = {share: derive_early(QWEN2_5_7B.layers, EMBEDDINGS, None, share) for share in (0.25, 0.10)}
    methods = {
        "plain": None,
        "published": LightKVConfig.published("qwen2.5-vl-7b"),
        **{
            f"lightkv {share:.0%}": LightKVConfig(
                tuple(Stage(layer, drop=drop) for layer, drop in plan), method="lightkv"
            )
            for share, plan in ours.items()
        },
    }
    lines = [f"an hour of video at 1 fps, qwen2.5-vl-7b: {hour:,} vision tokens"]
    for name, config in methods.items():
        cost = prefill_cost(QWEN2_5_7B, hour, text, config, dtype_bytes=2, frames=1800)
        kv, flops = cost.kv_bytes / 2**30, cost.flops / 1e15
        lines.append(f"{name:14} {cost.retention:9.1%} {kv:6.1f} GiB {flops:7.1f} PFLOPs")
    return "\n".join(lines)


def _arrow(values: tuple[float, float] | None, digits: int) -> str:
    return "–" if values is None else f"{values[0]:.{digits}f} → {values[1]:.{digits}f}"


if __name__ == "__main__":
    print(table())
    print(hour_of_video())
