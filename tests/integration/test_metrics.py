"""What a job on a cluster shows to the outside: metrics over HTTP, logs in Ray's folder, events in its output."""

import json
import time
import urllib.request
from collections import defaultdict

import pyarrow.parquet as pq
import pytest
from prometheus_client.parser import text_string_to_metric_families

from pipeline.cluster.metrics import SPECS
from pipeline.mini.world import render_demo
from tests.integration.head import running_head

pytestmark = pytest.mark.integration


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A finished job of five videos and one file that is no video; its output, its rows, and how to scrape the head."""
    folder = tmp_path_factory.mktemp("metrics")
    render_demo(folder / "videos", 5)
    (folder / "videos" / "text.mp4").write_text("no video\n")
    with running_head(folder / "log", RAY_metrics_report_interval_ms="1000") as head:
        out = folder / "out"
        done = head.submit(f"source.uri={folder / 'videos'}", f"sink.uri={out}", "run.log_format=json")
        assert done.returncode == 0, done.stdout + done.stderr
        yield head, done, pq.read_table(out).to_pylist()


def _scraped(head):
    """Sums over processes: sample name → our own labels → value."""
    text = urllib.request.urlopen(head.metrics, timeout=10).read().decode()
    ours = {name: spec.labels for spec in SPECS for name in spec.exported()}
    sums = defaultdict(lambda: defaultdict(float))
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            if sample.name in ours:
                sums[sample.name][tuple(sample.labels[label] for label in ours[sample.name])] += sample.value
    return sums


def _settled(head, units):
    deadline = time.monotonic() + 30
    while sum((sums := _scraped(head))["ray_lightkv_units_total"].values()) < units and time.monotonic() < deadline:
        time.sleep(0.5)
    return sums


def test_totals_on_the_metrics_endpoint_are_those_of_the_rows(finished):
    head, _, rows = finished
    sums = _settled(head, len(rows))
    statuses = defaultdict(float)
    for row in rows:
        statuses[(row["status"],)] += 1
    assert sums["ray_lightkv_units_total"] == statuses
    assert sums["ray_lightkv_errors_total"] == {("decode", "NotAVideo"): 1}
    answered = [row for row in rows if row["status"] != "error"]
    for column in ("vision_tokens", "kept_tokens", "kv_bytes"):
        assert sums[f"ray_lightkv_{column}_total"][()] == sum(row[column] for row in answered)
    assert sums["ray_lightkv_frames_total"][()] == sum(len(row["frame_times_s"]) for row in rows)
    seconds = sums["ray_lightkv_actor_seconds_total"]
    for stage in ("encode", "prefill", "generate"):
        assert seconds[(stage,)] == pytest.approx(sum(row[f"{stage}_s"] or 0 for row in rows))
    assert seconds[("wait",)] + seconds[("queue",)] == pytest.approx(sum(row["wait_s"] for row in rows))
    covered, until = 0.0, min(row["started_at"] for row in rows)  # time with units in the model
    for row in sorted(rows, key=lambda row: row["finished_at"]):
        covered += (row["finished_at"] - max(row["started_at"], until)).total_seconds()
        until = row["finished_at"]
    assert sum(seconds.values()) >= covered * 0.999


def test_every_unit_has_its_line_in_a_log_that_ray_collects(finished):
    head, _, rows = finished
    listed = json.load(urllib.request.urlopen(f"{head.address}/api/v0/logs?node_ip=127.0.0.2&glob=lightkv-*"))
    names = [name for group in listed["data"]["result"].values() for name in group]
    lines = []
    for name in names:
        url = f"{head.address}/api/v0/logs/file?node_ip=127.0.0.2&lines=-1&filename={name}"
        text = urllib.request.urlopen(url).read().decode()
        lines += [json.loads(line[line.index("{") :]) for line in text.splitlines() if "{" in line]
    events = {line["unit"]: line["event"] for line in lines if "unit" in line}
    assert events == {row["id"]: "unit failed" if row["status"] == "error" else "unit finished" for row in rows}
    assert {line["run"] for line in lines} == {rows[0]["run_id"]}
    assert [line["event"] for line in lines].count("actor started") == 1


def test_driver_with_json_logs_prints_events(finished):
    _, done, rows = finished
    events = [json.loads(line) for line in (done.stdout + done.stderr).splitlines() if line.startswith("{")]
    assert [e["event"] for e in events if e["event"] != "progress"] == ["run started", "run ended"]
    assert events[-1]["summary"]["units"]["finished"] == len(rows)
    assert "bottleneck   " not in done.stdout
