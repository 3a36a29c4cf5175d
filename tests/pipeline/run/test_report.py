"""Tests of the report page: its content, that no string becomes markup, and that it never fails a run."""

import base64
import hashlib
import json
import re
from html.parser import HTMLParser

import numpy as np
import pyarrow.parquet as pq
import pytest

from pipeline.config import load_config
from pipeline.errors import RunError
from pipeline.run import report
from pipeline.run.directory import RunDirectory
from pipeline.run.report import build_report, write_report
from pipeline.run.samples import Sampling, folder_of
from tests.pipeline.rows import row, rows, units

HOSTILE = "</script><script>alert(1)</script><img src=x onerror=alert(1)>'\"&amp;\u2028\u2029\x00🎬"


def _answer(text="a red circle", prompt="describe the video .", prompt_id="caption"):
    tokens = {"status": "ok", "prompt_tokens": 20, "output_tokens": 4}
    return {"prompt_id": prompt_id, "prompt": prompt, "text": text} | tokens


def _run(folder, *written, planned=None, configure=()):
    job = load_config(None, ["source.uri=/videos", f"sink.uri={folder}", *configure])
    run = RunDirectory(job)
    work = run.open()
    work.write_manifest(units(*(planned or [one["id"] for one in written])))
    (folder / "data").mkdir()
    pq.write_table(rows(*written), folder / "data" / "a.parquet")
    return run, work


def _record(run, unit_id):
    from pipeline.decoding.decode import FrameBatch

    sample = Sampling(folder_of(run.uri), 1.0, 2, run.job.storage).sample(unit_id)
    sample.see(FrameBatch(unit_id, 0, np.zeros((2, 8, 8, 3), np.uint8), np.arange(2.0), 0.0))
    sample.write("ok")


class _Elements(HTMLParser):
    """Collects every element with its attributes, and the content of scripts and styles."""

    def __init__(self, html):
        super().__init__()
        self.found = []
        self.feed(html)

    def handle_starttag(self, tag, attrs):
        self.found.append([tag, dict(attrs), ""])

    def handle_data(self, data):
        if self.cdata_elem:  # within a script or a style
            self.found[-1][2] += data


def _parts(run):
    html = build_report(run.uri, run.job.storage).decode()
    elements = _Elements(html).found
    scripts = {attrs.get("id", "code"): text for tag, attrs, text in elements if tag == "script"}
    return html, elements, scripts


def _listed(scripts):
    data = json.loads(scripts["data"])
    return [dict(zip(data["columns"], values, strict=True)) for values in data["rows"]], data


def test_every_row_is_on_the_page_with_its_answers_and_its_error(tmp_path):
    answered = row("a", answers=[_answer(), _answer("two", "how many ?", "count")], frame_times_s=[0.0, 0.5, 1.0])
    run, _ = _run(tmp_path, answered, row("b", "error", uris=["b.jpg", "c.jpg"]))
    _, _, scripts = _parts(run)
    (first, second), data = _listed(scripts)
    assert (first["uri"], first["status"], first["frames"]) == ("a.mp4", "ok", [3, 0.0, 1.0])
    assert [(data["prompts"][prompt], text) for prompt, text, *_ in first["answers"]] == [
        (["caption", "describe the video ."], "a red circle"),
        (["count", "how many ?"], "two"),
    ]
    assert (second["error_stage"], second["error_type"], second["error_message"]) == ("decode", "Broken", "bad")
    assert (first["uris"], second["uris"]) == (None, ["b.jpg", "c.jpg"])
    assert data["versions"][first["version"]]["model"] == "m"


def test_the_overview_counts_units_that_are_open(tmp_path):
    run, _ = _run(tmp_path, row("a"), row("b", "error"), planned=["a", "b", "c"])
    html, _, _ = _parts(run)
    text = " ".join(re.sub("<[^>]+>", " ", html).split())
    for said in ("2 of 3", "1 ok", "1 error", "1 open", "Broken"):
        assert said in text


def test_nothing_that_a_run_holds_becomes_markup(tmp_path):
    hostile = row(
        "a",
        "error",
        uri=HOSTILE,
        uris=[HOSTILE, HOSTILE],
        etag=HOSTILE,
        error_type=HOSTILE,
        error_stage=HOSTILE,
        error_message=HOSTILE,
        answers=[_answer(HOSTILE, HOSTILE, HOSTILE)],
        model=HOSTILE,
        model_revision=HOSTILE,
        lightkv=HOSTILE,
        code_version=HOSTILE,
        config_hash=HOSTILE,
    )
    benign, _ = _run(tmp_path / "benign", row("a", "error", answers=[_answer()], model_revision="r"))
    run, _ = _run(tmp_path / "run", hostile)
    for one in (benign, run):
        _record(one, "a")
    meta = tmp_path / "run" / "_run"
    (meta / "config.yaml").write_text(HOSTILE.replace("\x00", ""))
    (sample,) = (meta / "samples").glob("*.json")
    sample.write_text(json.dumps(json.loads(sample.read_text()) | {"prompts": [{"prompt_id": HOSTILE}]}))
    html, elements, scripts = _parts(run)
    expected = _Elements(build_report(benign.uri, benign.job.storage).decode()).found
    assert [tag for tag, *_ in elements] == [tag for tag, *_ in expected]
    assert [sorted(attrs) for _, attrs, _ in elements] == [sorted(attrs) for _, attrs, _ in expected]
    (listed,), data = _listed(scripts)
    assert listed["uri"] == listed["error_message"] == listed["answers"][0][1] == HOSTILE
    assert data["versions"][0]["model"] == HOSTILE
    assert json.loads(scripts["sample-0"])["prompts"] == [{"prompt_id": HOSTILE}]
    for island in (scripts["data"], scripts["sample-0"]):
        assert not set("<>&\u2028\u2029\x00") & set(island)
    assert "<script>alert" not in html


def test_only_the_pages_own_script_and_style_may_run_and_nothing_is_loaded(tmp_path):
    run, _ = _run(tmp_path, row("a"))
    _, elements, scripts = _parts(run)
    (policy,) = [attrs["content"] for _, attrs, _ in elements if attrs.get("http-equiv") == "Content-Security-Policy"]
    rules = dict(rule.strip().split(" ", 1) for rule in policy.split(";"))
    (style,) = [text for tag, _, text in elements if tag == "style"]
    for rule, content in (("script-src", scripts["code"]), ("style-src", style)):
        assert rules[rule] == f"'sha256-{base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()}'"
    assert (rules["default-src"], rules["img-src"]) == ("'none'", "data:")
    assert not [attrs for _, attrs, _ in elements if {"src", "style"} & set(attrs) or str(attrs).count("://")]
    assert not re.search(r"url\(|@import|https?://", style + scripts["code"])
    assert not re.search("innerHTML|outerHTML|insertAdjacent|document.write|eval", scripts["code"])


def test_figures_that_are_no_numbers_are_left_empty(tmp_path):
    run, _ = _run(tmp_path, row("a", retention=float("nan"), decode_s=float("inf")))
    (listed,), _ = _listed(_parts(run)[2])
    assert (listed["retention"], listed["decode_s"]) == (None, None)


def test_what_gives_access_is_not_on_the_page(tmp_path):
    broken = row("a", "error", error_message="no answer from https://user:secret1@host/a?X-Amz-Signature=secret2")
    run, _ = _run(tmp_path, broken, configure=["prompts=[{id: p, text: see https://user:secret3@host}]"])
    html, _, _ = _parts(run)
    assert "no answer from https://host/a" in html
    assert "secret" not in html


def test_samples_stand_beside_their_rows_alone(tmp_path):
    run, _ = _run(tmp_path, row("a"), row("b"))
    for unit_id in ("b", "no row yet"):
        _record(run, unit_id)
    _, _, scripts = _parts(run)
    assert _listed(scripts)[1]["samples"] == {"b": 0}
    assert json.loads(scripts["sample-0"])["id"] == "b"
    assert "sample-1" not in scripts


def test_frames_beyond_the_pages_size_are_counted(tmp_path, monkeypatch):
    run, _ = _run(tmp_path, row("a"), row("b"))
    for unit_id in ("a", "b"):
        _record(run, unit_id)
    sizes = [path.stat().st_size for path in (tmp_path / "_run" / "samples").iterdir()]
    monkeypatch.setattr(report, "MAX_SAMPLE_BYTES", max(sizes))
    html, _, scripts = _parts(run)
    assert len(_listed(scripts)[1]["samples"]) == 1
    assert "Frames of 1 more are omitted" in html


def test_large_runs_list_frames_and_errors_first(tmp_path, monkeypatch):
    run, _ = _run(tmp_path, *(row(f"{n:03}", "error" if n % 40 == 7 else "ok") for n in range(200)))
    _record(run, "199")
    monkeypatch.setattr(report, "MAX_ROWS", 10)
    html, _, scripts = _parts(run)
    listed, _ = _listed(scripts)
    assert len(listed) == 10
    assert {"007", "047", "087", "127", "167", "199"} < {one["id"] for one in listed}
    assert "10 of 200 rows are listed" in html
    assert "195 ok" in html


def test_rows_are_in_the_order_of_their_files_and_times(tmp_path):
    run, _ = _run(
        tmp_path, row("x", uri="b.mp4"), row("y", uri="a.mp4", start_s=9.0), row("z", uri="a.mp4", start_s=0.0)
    )
    assert [one["id"] for one in _listed(_parts(run)[2])[0]] == ["z", "y", "x"]


def test_a_run_without_rows_has_a_page(tmp_path):
    run, work = _run(tmp_path, planned=["a"])
    html, _, scripts = _parts(run)
    assert _listed(scripts)[0] == []
    assert work.run_id in html


def test_the_summary_of_the_run_is_shown_unless_rows_came_since(tmp_path):
    run, work = _run(tmp_path, row("a"))
    write_report(run)
    made = report._summary(run.meta, run.job.storage, work, 1)
    run.write("summary.json", json.dumps(made | {"bottleneck": "told by the run"}).encode())
    assert "told by the run" in _parts(run)[0]
    pq.write_table(rows(row("b")), tmp_path / "data" / "b.parquet")
    assert "told by the run" not in _parts(run)[0]


def test_a_folder_without_a_run_is_refused(tmp_path):
    with pytest.raises(RunError, match="holds no run"):
        build_report(str(tmp_path), load_config(None, ["source.uri=/v", "sink.uri=/o"]).storage)


def test_a_run_writes_its_page(tmp_path):
    run, _ = _run(tmp_path, row("a"))
    assert write_report(run) == f"{tmp_path}/_run/report.html"
    assert (tmp_path / "_run" / "report.html").read_bytes().startswith(b"<!doctype html>")


def test_a_run_that_wants_no_page_gets_none(tmp_path):
    run, _ = _run(tmp_path, row("a"), configure=["report.enabled=false"])
    assert write_report(run) is None
    assert not (tmp_path / "_run" / "report.html").exists()


def test_a_page_that_cannot_be_written_costs_a_line_in_the_log(tmp_path, monkeypatch, caplog):
    run, _ = _run(tmp_path, row("a"))

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(run, "write", full)
    assert write_report(run) is None
    assert "No space left" in caplog.text
