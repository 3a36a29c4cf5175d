import json

import numpy as np
import pytest
import torch
from PIL import Image

from jobs.measure import survivors
from jobs.measure.survivors import Overlap, look, pairs
from jobs.measure.survivors_figure import Seen
from lightkv import LightKVConfig, Stage, compress
from lightkv.hooks.attention import HOOKS
from pipeline.mini.answer import answer, image_inputs
from pipeline.mini.model import build_model, export, tokenizer

CONFIGS = {
    "published": LightKVConfig((Stage(1, 2, 0.5), Stage(2, 1, 0.6))),
    "lightkv": LightKVConfig((Stage(-1, drop=0.5), Stage(1, drop=0.6)), method="lightkv"),
    "compact": LightKVConfig((Stage(-1, drop=0.5), Stage(1, drop=0.6)), method="lightkv", positions="compact"),
}


@pytest.fixture(scope="module")
def model():
    return build_model(tokenizer(), seed=0).eval()


@pytest.fixture(scope="module")
def image():
    return next(pairs("test", 1))[0]


@pytest.mark.parametrize("name", CONFIGS)
def test_survivors_are_as_many_as_the_report_says_and_each_stage_keeps_some_of_the_last_ones(model, image, name):
    seen = look(model, tokenizer(), image, "what color is the star?", CONFIGS[name])
    with compress(model, CONFIGS[name]) as report:
        said = answer(model, tokenizer(), image_inputs([image]), "what color is the star?", 1)
    assert seen.alive.shape == (2, 144)
    assert seen.alive.sum(-1).tolist() == [stage.tokens_after for stage in report.stages]
    assert bool((seen.alive[0] | ~seen.alive[1]).all())
    assert (seen.answer, seen.retention) == (said, report.retention)
    assert not bool(seen.alive[0].all())
    if name == "published":
        assert seen.weight.shape == (144,)
        assert float(seen.weight.sum()) == pytest.approx(1)
    else:
        assert seen.weight is None


@pytest.mark.parametrize("name", ["published", "lightkv"])
def test_the_first_stage_keeps_the_same_patches_whatever_is_asked_after_them(model, name):
    """Vision comes before the question, and causal attention hides the question from it.

    On noise: on a plain background the patches are equal, and rounding, which depends on the prompt's length, decides.
    """
    noise = np.random.default_rng(0).integers(0, 256, (192, 192, 3), np.uint8)
    one = look(model, tokenizer(), noise, "what color is the star?", CONFIGS[name])
    other = look(model, tokenizer(), noise, "how many objects are there?", CONFIGS[name])
    assert torch.equal(one.alive[0], other.alive[0])
    overlap = Overlap.of(one, other)
    assert overlap.moved > 0 if name == "published" else overlap.moved is None
    assert overlap.iou[1] == 1.0 if name == "published" else overlap.iou[1] < 1.0


@pytest.mark.parametrize("name", ["published", "lightkv"])
def test_looking_leaves_the_model_as_it_was(model, image, name):
    def state():
        hooks = sum(len(part._forward_pre_hooks) + len(part._forward_hooks) for part in model.modules())
        return hooks, model.config.text_config._attn_implementation, "generate" in vars(model), len(HOOKS)

    before = state()
    look(model, tokenizer(), image, "what number is written?", CONFIGS[name])
    assert state() == before
    with pytest.raises(ValueError, match="expected uint8 frames"):
        look(model, tokenizer(), image.astype(np.float32), "what number is written?", CONFIGS[name])
    assert state() == before


def test_overlap_is_intersection_over_union_and_half_the_absolute_difference():
    one, other = (
        Seen("", "", torch.tensor(alive).bool(), torch.tensor(weight), 0.5)
        for alive, weight in (
            ([[1, 1, 1, 0], [1, 0, 0, 0]], [0.4, 0.3, 0.2, 0.1]),
            ([[0, 1, 1, 1], [0, 0, 0, 1]], [0.1, 0.2, 0.3, 0.4]),
        )
    )
    overlap = Overlap.of(one, other)
    assert overlap.iou == (0.5, 0.0)
    assert overlap.moved == pytest.approx(0.4)


def test_pairs_are_two_different_questions_each_and_the_same_every_time():
    found, again = list(pairs("test", 5)), list(pairs("test", 5))
    assert len(found) == 5
    assert all(first != second for _, first, second in found)
    assert all(np.array_equal(a[0], b[0]) and a[1:] == b[1:] for a, b in zip(found, again, strict=True))


def test_one_command_writes_the_figures_and_draws_the_picture(model, tmp_path, capsys):
    export(model, tmp_path / "weights")
    out = tmp_path / "deep"
    survivors.main(["--model", str(tmp_path / "weights"), "--out", str(out), "--images", "2"])
    printed = capsys.readouterr().out
    assert "| lightkv | 55% |" in printed
    assert "| published | 25% |" in printed
    result = json.loads((out / "survivors.json").read_text())
    assert (result["images"], len(result["weights_sha256"])) == (2, 64)
    assert {"device", "versions", "command"} <= result.keys()
    figures = {(entry["method"], entry["retention"]): entry for entry in result["figures"]}
    assert set(figures) == {(method, share) for method in ("lightkv", "published") for share in (0.55, 0.25)}
    for (method, _), entry in figures.items():
        assert (entry["weight_moved"] is None) == (method == "lightkv")
        assert len(entry["iou"]) == len(entry["stages"])
        assert 0 <= entry["iou"][-1]["mean"] <= 1
    assert figures["lightkv", 0.25]["iou"][0] == {"mean": 1.0, "standard_deviation": 0.0}
    assert figures["lightkv", 0.25]["patches_left"]["mean"] < figures["lightkv", 0.55]["patches_left"]["mean"]
    assert (out / "survivors.png").stat().st_size <= 200 * 1024
    with Image.open(out / "survivors.png") as drawn:
        assert drawn.size == (1088, 896)
        colors = {color for _, color in drawn.convert("RGB").getcolors(1 << 24)}
    assert len(colors) > 1000


@pytest.mark.parametrize("arguments", [["--model", "/nonexistent"], ["--images", "0"]])
def test_what_cannot_be_done_is_refused(arguments):
    with pytest.raises(SystemExit):
        survivors.main(arguments)
