"""The evaluation from end to end with the embedded model, and its figures for hand-made answers."""

import json
import math
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from PIL import Image

from jobs.exact_match import words
from jobs.measure.evaluate import __main__ as evaluate
from jobs.measure.evaluate.answers import SCHEMA, Shard, Shards
from jobs.measure.evaluate.config import PLAIN, Cell, EvaluateConfig, cell_key, cells_of, load_evaluate_config
from jobs.measure.evaluate.figure import draw
from jobs.measure.evaluate.summary import pools_of, summarise, with_plain
from pipeline.errors import ConfigError

SMALL = {
    "model": {"name": "mini", "dtype": "float32", "max_new_tokens": 24},
    "batch_prompts": 16,
    "split": "validation",
    "retentions": [0.5],
    "resamples": 200,
    "counts_from": 0.0,
    "suites": {
        "stills": {"kind": "image", "scenes": 4, "families": ["caption", "count", "shape"]},
        "clips": {"kind": "video", "frames": 4, "scenes": 3, "families": ["caption", "exist", "motion"]},
    },
    "methods": {"random": {"preset": "random"}, "few": {"preset": "fewer_frames"}},
}


def _config(**changes):
    return EvaluateConfig.model_validate_json(json.dumps({**SMALL, **changes}))


def _run(folder, *arguments):
    (folder / "evaluate.yaml").write_text(yaml.safe_dump(SMALL, sort_keys=False))
    evaluate.main(["--config", str(folder / "evaluate.yaml"), "--out", str(folder / "out"), *arguments])
    return folder / "out"


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    return _run(tmp_path_factory.mktemp("evaluate"))


def test_every_question_is_answered_by_every_method(finished):
    answers = pq.read_table(finished / "answers.parquet").to_pylist()
    asked = {}
    for row in answers:
        if not row["error"]:
            asked.setdefault((row["suite"], row["method"]), []).append((row["scene"], row["question"], row["truth"]))
            assert row["right"] == (words(row["answer"]) == words(row["truth"]))
            assert row["agrees"] == (row["answer"] == row["plain_answer"])
    assert asked["stills", PLAIN] == asked["stills", "random"]
    assert asked["clips", PLAIN] == asked["clips", "random"] == asked["clips", "few"]
    assert {scene for scene, *_ in asked["stills", PLAIN]} == {0, 1, 2, 3}
    refused = [(row["suite"], row["method"], row["scene"], row["answer"]) for row in answers if row["error"]]
    assert refused == [("stills", "few", None, None)]


def test_cost_is_what_the_method_leaves(finished):
    rows = pq.read_table(finished / "answers.parquet").to_pylist()
    clips = {method: [row for row in rows if (row["suite"], row["method"]) == ("clips", method)] for method in
             (PLAIN, "random", "few")}  # fmt: skip
    assert {(row["vision_tokens"], row["reached"]) for row in clips[PLAIN]} == {(72, 1.0)}
    assert {(row["vision_tokens"], row["reached"]) for row in clips["few"]} == {(36, 0.5)}
    assert {row["vision_tokens"] for row in clips["random"]} == {72}
    assert all(row["reached"] == pytest.approx(0.5, abs=0.02) for row in clips["random"])
    for plain, drawn, few in zip(*clips.values(), strict=True):
        assert plain["kv_bytes"] > drawn["kv_bytes"] >= few["kv_bytes"] * 0.95
        assert plain["flops"] > drawn["flops"] > 0.95 * few["flops"] > 0


def test_table_summary_and_figure_say_what_the_answers_say(finished):
    rows = pq.read_table(finished / "answers.parquet").to_pylist()
    summary = json.loads((finished / "summary.json").read_text())
    table = (finished / "table.md").read_text()
    short = [row["right"] for row in rows if row["method"] == "random" and row["family"] in ("exist", "motion")]
    told = [row["right"] for row in rows if (row["suite"], row["method"]) == ("clips", "random")
            and row["family"] == "caption"]  # fmt: skip
    (line,) = [f for f in summary["figures"] if (f["suite"], f["method"]) == ("clips", "random")]
    assert line["accuracy"] == pytest.approx(np.mean(short))
    assert line["captions"] == pytest.approx(np.mean(told))
    assert line["questions"] == len(short)
    clips = table.split("## clips")[1].split("## ")[0]
    assert f"| random | 50% | {100 * line['reached']:.1f} | {100 * np.mean(short):.1f} [" in clips
    assert "| few | 50% | – |" in table.split("## stills")[1]
    assert "few at 50%: frames can be left out of a video only" in table
    assert (
        f"stills, clips together; {sum(row['family'] != 'caption' for row in rows if row['method'] == PLAIN)} " in table
    )
    assert summary["run"]["answers"] == len(rows)
    assert len(summary["run"]["code_versions"]) == 1
    with Image.open(finished / "figure.png") as drawn:
        assert drawn.width > 3 * 460
        assert len({color for _, color in drawn.convert("RGB").getcolors(1 << 24)}) > 20


def test_finished_cells_are_not_asked_again_and_a_lost_one_is(finished, monkeypatch):
    asked = []
    ask = Shards.ask
    monkeypatch.setattr(Shards, "ask", lambda shards, cell: asked.append(cell) or ask(shards, cell))
    before = pq.read_table(finished / "answers.parquet")
    _run(finished.parent)
    assert asked == []
    next(finished.glob("cells/clips.random.0.5.*")).unlink()
    _run(finished.parent)
    assert asked == [Cell("clips", "random", 0.5)]
    assert pq.read_table(finished / "answers.parquet").equals(before)


def test_report_only_remakes_what_the_answers_say(finished):
    kept = {name: (finished / name).read_bytes() for name in ("table.md", "summary.json", "figure.png")}
    for name in kept:
        (finished / name).unlink()
    _run(finished.parent, "--report-only")
    assert {name: (finished / name).read_bytes() for name in kept} == kept


def test_report_of_nothing_is_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"expected .*answers\.parquet, found none"):
        _run(tmp_path, "--report-only")


def test_shards_together_answer_what_one_answers():
    config, cell = _config(), Cell("clips", "random", 0.5)
    whole = Shard(config).ask(cell)
    parts = [row for number in range(2) for row in Shard(config, number, 2).ask(cell)]
    columns = ("scene", "family", "question", "answer", "right")
    assert sorted(tuple(row[c] for c in columns) for row in parts) == [tuple(row[c] for c in columns) for row in whole]


def test_words_are_compared_without_spaces_and_case():
    assert words("A red circle.  then 47 .") == words("a red circle . then 47.")
    assert words("47") != words("4 7")
    assert words("yes.") != words("yes")


def test_a_cell_is_known_by_what_its_answers_depend_on():
    cell, config = Cell("clips", "random", 0.5), _config()
    key = cell_key(config, cell, "w")
    same = _config(
        resamples=500,
        counts_from=0.5,
        batch_prompts=1,
        suites={**SMALL["suites"], "more": SMALL["suites"]["stills"]},
        methods={**SMALL["methods"], "stride": {"preset": "stride"}},
    )
    assert cell_key(same, cell, "w") == key
    others = [
        cell_key(config, cell, "other weights"),
        cell_key(_config(seed=1), cell, "w"),
        cell_key(_config(split="held_out"), cell, "w"),
        cell_key(config.narrowed(scenes=2), cell, "w"),
        cell_key(_config(methods={"random": {"preset": "random", "options": {"seed": 1}}}), cell, "w"),
        cell_key(config, Cell("clips", PLAIN, 1.0), "w"),
    ]
    assert len({key, *others}) == 7


def test_narrowing_leaves_the_plain_model_in():
    config = _config(reference="few").narrowed(["clips"], ["random"], scenes=2)
    assert list(cells_of(config)) == [Cell("clips", PLAIN, 1.0), Cell("clips", "random", 0.5)]
    assert config.suites["clips"].scenes == 2
    assert config.compared_with == "random"
    with pytest.raises(ConfigError, match="--suites: expected some of stills, clips, got films"):
        _config().narrowed(["films"])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"speed": 1}, "speed"),
        ({"reference": "magic"}, "expected one of .*'random', 'few'"),
        ({"methods": {"plain": {"preset": "random"}}}, "plain is always asked"),
        ({"retentions": [0.5, 0.5]}, "distinct shares"),
        ({"methods": {"random": {"preset": "random", "at": {"0.3": {}}}}}, r"methods.random.at: \[0.3\]"),
        ({"suites": {"s": {"kind": "set", "frames": 3, "scenes": 2, "families": ["motion"]}}}, "not asked about a set"),
        ({"suites": {"s": {"kind": "video", "scenes": 2, "families": ["motion"]}}}, "frames: expected 2 to"),
        ({"model": {"temperature": 1.0}}, "greedy"),
    ],
)
def test_wrong_configurations_are_refused_by_key(tmp_path, change, message):
    (tmp_path / "wrong.yaml").write_text(yaml.safe_dump({**SMALL, **change}, sort_keys=False))
    with pytest.raises(ConfigError, match=message):
        load_evaluate_config(tmp_path / "wrong.yaml")


def test_the_shipped_configuration_is_sound():
    config = load_evaluate_config(Path(__file__).parents[4] / "configs" / "evaluate.yaml")
    assert config.compared_with in config.methods


def _row(suite, method, scene, family, right, **more):
    known = {"suite": suite, "method": method, "retention": 1.0 if method == PLAIN else 0.5, "error": ""}
    answer = "yes" if right else f"no, says {method}"
    return {**known, "scene": scene, "family": family, "question": f"{family} {scene}?", "truth": "yes",
            "answer": answer, "right": right, "reached": 0.5, "vision_tokens": 1, "text_tokens": 1,
            "kv_bytes": 10 if method == PLAIN else 6, "flops": 100 if method == PLAIN else 40, **more}  # fmt: skip


def _summary(rows, **changes):
    config = _config(counts_from=0.9, **changes)
    return summarise(with_plain(pa.Table.from_pylist(rows, schema=SCHEMA)), config)


def _by_hand():
    """Ten scenes: plain knows every count and half of the shapes; random loses four counts and nine captions."""
    rows = []
    for method in (PLAIN, "random"):
        for scene in range(10):
            plain = method == PLAIN
            rows.append(_row("stills", method, scene, "caption", scene != 9 if plain else scene == 0))
            rows.append(_row("stills", method, scene, "count", plain or scene >= 4))
            rows.append(_row("stills", method, scene, "shape", scene % 2 == 0))
    return rows


def test_figures_of_answers_made_by_hand():
    summary = _summary(_by_hand())
    plain, drawn = summary.figures
    assert summary.counting == {"stills": ("count",)}
    assert (plain.accuracy, plain.captions, plain.agreement, plain.kv) == (1.0, 0.9, 1.0, 1.0)
    assert math.isnan(plain.p_plain)
    assert (drawn.accuracy, drawn.kept, drawn.captions, drawn.agreement) == (0.6, 0.6, 0.1, 0.6)
    assert (drawn.questions, drawn.reached, drawn.kv, drawn.flops) == (10, 0.5, 0.6, 0.4)
    assert drawn.p_plain == pytest.approx(2 / 16, abs=0.07)
    assert drawn.kept_interval[0] < 0.6 < drawn.kept_interval[1]
    assert summary.tasks[Cell("stills", "random", 0.5)] == {"caption": (1, 10), "count": (6, 10), "shape": (5, 10)}


def test_cells_that_are_missing_are_left_out_and_those_out_of_reach_are_not():
    refused = dict.fromkeys(SCHEMA.names) | {"suite": "stills", "method": "few", "retention": 0.5, "error": "no video"}
    summary = _summary([row for row in _by_hand() if row["method"] == PLAIN] + [refused])
    assert [(line.method, line.error) for line in summary.figures] == [(PLAIN, ""), ("few", "no video")]
    assert _summary([row for row in _by_hand() if row["method"] == "random"]).figures == []


@pytest.mark.parametrize(
    ("kinds", "pools"),
    [
        ({"a": "video"}, {}),
        ({"a": "video", "b": "video"}, {"all suites": ["a", "b"]}),
        ({"a": "video", "b": "image", "c": "video"}, {"all suites": ["a", "b", "c"], "all video suites": ["a", "c"]}),
        ({"a": "video", "alone": "image", "c": "video"}, {"all suites": ["a", "c"]}),
    ],
)
def test_pools_are_all_suites_that_pool_and_those_of_a_kind(kinds, pools):
    suites = {
        name: {"kind": kind, "scenes": 2, "families": ["color"], "frames": 2 if kind == "video" else 1,
               "pooled": name != "alone"}
        for name, kind in kinds.items()
    }  # fmt: skip
    config = EvaluateConfig.model_validate(
        {"suites": suites, "methods": {"random": {"preset": "random"}}, "retentions": [0.5]}, strict=False
    )
    assert pools_of(config, suites) == pools


def test_picture_has_a_line_where_there_are_figures():
    figures = _summary(_by_hand()).figures
    line, empty = draw(figures, "title"), draw(figures[:1], "title")
    red = (213, 62, 20)
    assert (np.asarray(line) == red).all(-1).sum() > (np.asarray(empty) == red).all(-1).sum() == 0
