"""The demo without Ray: the same captioner over the same manifest, in this process."""

import json
import sys
from types import SimpleNamespace

import pytest

from jobs import demo
from pipeline.captioning.captioner import Captioner
from pipeline.config import load_config
from pipeline.decoding.decode import decode_unit
from pipeline.planning.plan import plan_units
from pipeline.schema import rows_table

TRUTH = {"a.mp4": {"caption": "a red circle. a blue star.", "count": "two"}, "b.mp4": {"caption": "a white ring."}}


def caption_here(job):
    """Replaces `pipeline.job.caption`: returns only the rows."""
    captioner = Captioner(job, "run")
    options = {"frames": job.frames, "decode": job.decode, "storage": job.storage, "sizing": captioner.sizing}
    units = plan_units(job).to_pylist()
    rows = [captioner.row(unit, decode_unit(unit, **options)) for unit in units]
    return SimpleNamespace(rows=lambda: rows_table(rows))


@pytest.fixture(scope="module")
def told(tmp_path_factory):
    """Output and folder of a demo over three videos."""
    out = tmp_path_factory.mktemp("demo")
    lines = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(demo, "caption", caption_here)
        patch.setattr(demo, "print", lambda *texts, **_: lines.append(" ".join(texts)), raising=False)
        patch.setattr(sys, "argv", ["demo", "--out", str(out), "--videos", "3"])
        assert demo.main() == 0
    return "\n".join(lines), out


def row(file, answers, kv_bytes=100):
    told = [{"prompt_id": task, "text": text} for task, text in answers.items()]
    uri, text = f"/videos/{file}", answers.get("caption")
    return {"uri": uri, "status": "ok", "text": text, "answers": told, "kv_bytes": kv_bytes}


def broken(file):
    failed = {"status": "error", "error_type": "NotAVideo", "error_message": "not a video"}
    return {"uri": f"/videos/{file}", "text": None, "answers": None, "kv_bytes": None, **failed}


ROWS = {
    "LightKV": [row("a.mp4", {"caption": "a red circle. a blue star .", "count": "three"}, 60), broken("b.mp4")],
    "plain": [row("a.mp4", {"caption": "a red circle.", "count": "two"}), row("b.mp4", {"caption": "a white ring."})],
}


def test_right_answers_are_counted_per_task_and_run():
    assert demo.compare(TRUTH, ROWS)["tasks"] == {
        "caption": {"asked": 2, "LightKV": 1, "plain": 1},
        "count": {"asked": 1, "LightKV": 0, "plain": 1},
    }


def test_answers_agree_where_both_runs_say_the_same_words():
    assert demo.compare(TRUTH, ROWS)["agree"] == 0
    assert demo.compare(TRUTH, {"LightKV": ROWS["plain"], "plain": ROWS["plain"]})["agree"] == 3


def test_kv_bytes_are_those_of_the_rows_that_have_them():
    assert demo.compare(TRUTH, ROWS)["kv_bytes"] == {"LightKV": 60, "plain": 200}


def test_the_report_shows_captions_beside_the_truth_and_ends_with_one_sentence():
    text = demo.report(TRUTH, ROWS, demo.compare(TRUTH, ROWS))
    assert "a.mp4  a red circle. a blue star .\ntruth  a red circle. a blue star." in text
    assert "b.mp4  error: NotAVideo: not a video" in text
    assert [line.split() for line in text.splitlines() if line.startswith("count")] == [["count", "1", "0", "1"]]
    assert text.splitlines()[-1] == (
        "With 30 % of the KV cache (60 B of 200 B), LightKV gave 1 of 2 captions and 0 of 1 short answers right; "
        "without it 1 and 1."
    )


def test_where_no_video_was_answered_the_last_line_says_so():
    rows = {name: [broken("a.mp4"), broken("b.mp4")] for name in demo.RUNS}
    assert demo.report(TRUTH, rows, demo.compare(TRUTH, rows)).splitlines()[-1].startswith("No video was answered")


def test_a_demo_without_videos_is_refused(monkeypatch, tmp_path):
    monkeypatch.setattr(sys, "argv", ["demo", "--out", str(tmp_path), "--videos", "0"])
    with pytest.raises(SystemExit):
        demo.main()


def test_every_video_has_its_own_questions_and_the_broken_file_one(tmp_path):
    truth = demo.prepare(tmp_path, 4)
    lines = [json.loads(line) for line in (tmp_path / "manifest.jsonl").read_text().splitlines()]
    assert {line["uri"] for line in lines} == {*truth, "broken.mp4"} == {p.name for p in tmp_path.glob("*.mp4")}
    for line in lines:
        asked = [prompt["prompt_id"] for prompt in line["prompts"]]
        assert asked == list(truth.get(line["uri"], ["caption"]))
        assert set(asked) <= set(demo.ASKED)
    questions = {tuple(prompt["prompt"] for prompt in line["prompts"]) for line in lines}
    assert len(questions) == len(lines)
    assert all(len(answers) >= 6 for answers in truth.values())


def test_the_demo_answers_every_question_with_and_without_compression(told):
    text, out = told
    result = json.loads((out / "accuracy.json").read_text())
    assert result["tasks"]["caption"]["asked"] == result["videos"] == 3
    total = sum(task["asked"] for task in result["tasks"].values())
    assert total >= 3 * 6
    assert 0 < result["agree"] <= total
    for name in demo.RUNS:
        assert 0 < sum(task[name] for task in result["tasks"].values()) <= total
    assert 0.4 < result["kv_bytes"]["LightKV"] / result["kv_bytes"]["plain"] < 0.8
    assert "broken.mp4  error: NotAVideo" in text
    assert text.splitlines()[-1].startswith("With ")


def test_a_run_of_an_earlier_demo_is_replaced_and_nothing_else(tmp_path, monkeypatch):
    run, other = tmp_path / "rows" / "plain", tmp_path / "rows" / "other"
    for folder in (run / "_run", other):
        folder.mkdir(parents=True)
        (folder / "run.json").write_text("{}")
    monkeypatch.setattr(demo, "caption", lambda job: SimpleNamespace(rows=lambda: rows_table([])))
    assert demo.answered(tmp_path, "plain", "lightkv.enabled=false") == []
    assert not run.exists()
    assert other.exists()


def test_the_second_run_differs_from_the_first_in_compression_alone():
    lightkv, plain = (
        load_config(demo.CONFIG, [switch]).model_dump(exclude={"lightkv": {"enabled"}}) for switch in demo.RUNS.values()
    )
    assert lightkv == plain
    assert [load_config(demo.CONFIG, [switch]).lightkv.enabled for switch in demo.RUNS.values()] == [True, False]
