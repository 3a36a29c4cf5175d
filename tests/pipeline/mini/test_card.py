"""The model card: its figures are those of the committed measurement of the shipped weights; the prose has none."""

import json
import re
from pathlib import Path

import pytest

from pipeline.mini import weights_path
from pipeline.mini.card import BEGIN, END, accuracy, with_accuracy, without_accuracy
from pipeline.mini.data import IMAGE_FAMILIES, SET_FAMILIES, VIDEO_FAMILIES
from pipeline.mini.measure import CARD, weights_sha256

CARD_TEXT = (weights_path() / "README.md").read_text(encoding="utf-8")
RESULT = json.loads((Path(__file__).parents[3] / "jobs/results/mini.json").read_text(encoding="utf-8"))


def cell(right, asked):
    return {"right": right, "asked": asked}


def entry(split="test", kind="image", frames=1, **tasks):
    sizes = {"height_px": 96, "width_px": 128, "max_things": 3, "scenes": 20}
    return {"split": split, "kind": kind, "frames": frames, **sizes, "tasks": tasks}


def result(*inputs, coded=()):
    versions = {"torch": "2", "transformers": "5"}
    head = {"parameters": 1000, "dtype": "float32", "versions": versions, "split": "test", "weights_sha256": "ab" * 32}
    return {**head, "inputs": inputs, "coded": coded}


def test_the_figures_of_the_card_are_those_of_the_committed_result():
    assert with_accuracy(CARD_TEXT, RESULT) == CARD_TEXT, (
        "write them: python -m jobs.train_mini --card WEIGHTS --json …"
    )


def test_the_committed_result_is_that_of_the_shipped_weights():
    assert RESULT["weights_sha256"] == weights_sha256(weights_path())
    assert RESULT["split"] == "test"


def test_the_committed_result_measures_what_is_planned_and_every_trained_task():
    measured = [(i["kind"], i["height_px"], i["width_px"], i["vision_tokens"], i["scenes"]) for i in RESULT["inputs"]]
    planned = [
        (task.kind, task.height_px, task.width_px, task.grid.tokens, task.scenes * batches)
        for task, batches in (*CARD.known, *CARD.held_out)
    ]
    assert measured == planned
    assert len(RESULT["coded"]) == len(CARD.coded)
    for kind, families in (("image", IMAGE_FAMILIES), ("video", VIDEO_FAMILIES), ("set", SET_FAMILIES)):
        found = {task for i in RESULT["inputs"] if i["kind"] == kind for task in i["tasks"]}
        assert set(families) <= found


def test_the_prose_of_the_card_has_no_figures_but_in_the_recipe():
    prose = without_accuracy(CARD_TEXT)
    prose = prose[: prose.index("## Recipe")] + prose[prose.index("## Exact match") :]
    for name in ("Qwen2.5-VL", "Qwen2_5_VLForConditionalGeneration", "Apache-2.0", "H.264"):
        prose = prose.replace(name, "")
    assert re.findall(r".*\d.*", prose) == []


def test_a_table_has_a_row_per_task_with_captions_first_and_a_column_per_input():
    told = accuracy(result(entry(shape=cell(3, 4), caption=cell(1, 2)), entry(color=cell(0, 3))))
    rows = [line.split(" | ")[0].strip("| ") for line in told.splitlines() if line.startswith("| ")]
    assert rows == ["task", "caption", "color", "shape"]
    assert "| shape | 0.75 ± 0.20 | – |" in told
    assert "| color | – | 0.00 ± 0.17 |" in told
    assert "| task | 96×128, ≤ 3 things (20) | 96×128, ≤ 3 things (20) |" in told


def test_strong_and_weak_tasks_are_told_over_all_inputs_of_the_split():
    known = [entry(shape=cell(9, 10), order=cell(5, 10), color=cell(7, 10)), entry(shape=cell(7, 10))]
    told = accuracy(result(*known, entry("held_out", shape=cell(0, 100))))
    strong, weak = re.search(r"0\.80\): (.*)\. Weak .*half\): (.*)\.\n", told).groups()
    assert (strong, weak) == ("shape (0.80)", "order (0.50)")


def test_held_out_scenes_stand_beside_known_ones_of_the_same_kind():
    kinds = {"shape": cell(1, 2)}
    told = accuracy(result(entry(**kinds), entry("test", "video", 8, **kinds), entry("held_out", "video", 8, **kinds)))
    table = told[told.index("**Combinations") :]
    assert "| task | videos 96×128, 8 frames, ≤ 3 things | videos 96×128, 8 frames, ≤ 3 things, with one never" in table


@pytest.mark.parametrize("text", ["# no markers", f"{BEGIN}\n{END}\n{BEGIN}\n{END}", f"{END}\n{BEGIN}"])
def test_a_card_without_one_pair_of_markers_is_refused(text):
    with pytest.raises(ValueError, match="expected one <!-- accuracy -->"):
        with_accuracy(text, result())
