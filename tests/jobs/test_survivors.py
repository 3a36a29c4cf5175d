import numpy as np
import pytest
import torch
from PIL import Image

from jobs import survivors
from jobs.survivors import Overlap, Seen, look, pairs
from lightkv import LightKVConfig, Stage, compress
from pipeline.mini.answer import answer, image_inputs
from pipeline.mini.model import build_model, export, tokenizer

CONFIG = LightKVConfig((Stage(1, 2, 0.5), Stage(2, 1, 0.6)))


@pytest.fixture(scope="module")
def model():
    return build_model(tokenizer(), seed=0).eval()


@pytest.fixture(scope="module")
def image():
    return next(pairs("test", 1))[0]


def test_survivors_are_as_many_as_the_report_says_and_each_stage_keeps_some_of_the_last_ones(model, image):
    seen = look(model, tokenizer(), image, "what color is the star?", CONFIG)
    with compress(model, CONFIG) as report:
        said = answer(model, tokenizer(), image_inputs([image]), "what color is the star?", 1)
    assert seen.alive.sum(-1).tolist() == [stage.tokens_after for stage in report.stages]
    assert bool((seen.alive[0] | ~seen.alive[1]).all())
    assert (seen.answer, seen.retention) == (said, report.retention)
    assert seen.guidance.shape == (144,)
    assert float(seen.guidance.sum()) == pytest.approx(1)


def test_the_first_stage_keeps_the_same_patches_whatever_is_asked_after_them(model):
    """Vision comes before the question, and causal attention hides the question from it.

    On noise: between the equal patches of a plain background rounding decides, and it depends on the prompt's length.
    """
    noise = np.random.default_rng(0).integers(0, 256, (192, 192, 3), np.uint8)
    one = look(model, tokenizer(), noise, "what color is the star?", CONFIG)
    other = look(model, tokenizer(), noise, "how many objects are there?", CONFIG)
    assert torch.equal(one.alive[0], other.alive[0])
    assert not torch.equal(one.guidance, other.guidance)


def test_looking_leaves_the_model_as_it_was(model, image):
    def state():
        hooks = sum(len(part._forward_pre_hooks) + len(part._forward_hooks) for part in model.modules())
        return hooks, model.config.text_config._attn_implementation, "generate" in vars(model), len(survivors.LISTENERS)

    before = state()
    look(model, tokenizer(), image, "what number is written?", CONFIG)
    assert state() == before
    compact = LightKVConfig(CONFIG.stages, positions="compact")
    with pytest.raises(ValueError, match="positions='compact'"):
        look(model, tokenizer(), image, "what number is written?", compact)
    assert state() == before


def test_overlap_is_intersection_over_union_and_half_the_absolute_difference():
    one = Seen("", "", torch.tensor([[1, 1, 1, 0], [1, 0, 0, 0]]).bool(), torch.tensor([0.4, 0.3, 0.2, 0.1]), 0.5)
    other = Seen("", "", torch.tensor([[0, 1, 1, 1], [0, 0, 0, 1]]).bool(), torch.tensor([0.1, 0.2, 0.3, 0.4]), 0.5)
    overlap = Overlap.of(one, other)
    assert overlap.iou == (0.5, 0.0)
    assert overlap.moved == pytest.approx(0.4)
    mean = Overlap.mean([overlap, Overlap((1.0, 1.0), 0.0)])
    assert mean.iou == (0.75, 0.5)
    assert mean.moved == pytest.approx(0.2)


def test_pairs_are_two_different_questions_each_and_the_same_every_time():
    found, again = list(pairs("test", 5)), list(pairs("test", 5))
    assert len(found) == 5
    assert all(first != second for _, first, second in found)
    assert all(np.array_equal(a[0], b[0]) and a[1:] == b[1:] for a, b in zip(found, again, strict=True))


def test_one_command_prints_the_figures_and_draws_the_picture(model, tmp_path, capsys):
    export(model, tmp_path / "weights")
    out = tmp_path / "deep" / "survivors.png"
    survivors.main(["--model", str(tmp_path / "weights"), "--out", str(out), "--images", "2", "--retention", "0.4"])
    printed = capsys.readouterr().out
    assert "| the same question again | 1.000 | 1.000 | 1.000 | 0.0% |" in printed
    assert "| another question | 1.000 |" in printed
    assert out.stat().st_size <= 200 * 1024
    with Image.open(out) as drawn:
        assert drawn.size == (1088, 916)
        colors = {color for _, color in drawn.convert("RGB").getcolors(1 << 24)}
    assert len(colors) > 1000


@pytest.mark.parametrize("arguments", [["--model", "/nonexistent"], ["--images", "0"]])
def test_what_cannot_be_done_is_refused(arguments):
    with pytest.raises(SystemExit):
        survivors.main(arguments)
