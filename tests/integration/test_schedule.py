"""`jobs.schedule` against a running head: a firing answers new videos, and the same firing runs once."""

import json
import shutil
import signal
import subprocess
import sys
import time

import pyarrow.dataset as ds
import pytest
from ray.job_submission import JobSubmissionClient

from pipeline.mini.world import render_demo
from tests.integration.head import running_head
from tests.integration.jobs import ROOT, SMALL, environment

pytestmark = pytest.mark.integration


@pytest.fixture(scope="module")
def head(tmp_path_factory):
    with running_head(tmp_path_factory.mktemp("head") / "log") as head:
        yield head


def _command(address, *options, overrides):
    sets = [f"--set={override}" for override in [*SMALL, *overrides]]
    return [sys.executable, "-m", "jobs.schedule", "--name=nightly", "--address", address, *options, *sets]


def _rows(base):
    """Video → run folder, over all runs of a schedule; checks that every unit has one row."""
    partitions = ds.partitioning(flavor="hive")
    table = ds.dataset(base, format="parquet", partitioning=partitions).to_table(columns=["id", "uri", "run", "status"])
    assert len(set(table["id"].to_pylist())) == len(table)
    assert set(table["status"].to_pylist()) <= {"ok", "truncated"}
    return {row["uri"].rsplit("/", 1)[1]: row["run"] for row in table.to_pylist()}


def test_firings_answer_what_is_new_each_in_a_folder_of_its_own(head, tmp_path):
    stock, videos, base = tmp_path / "stock", tmp_path / "videos", tmp_path / "captions"
    render_demo(stock, 3)
    videos.mkdir()

    def fire(time):
        overrides = [f"source.uri={videos}", f"sink.uri={base}"]
        command = _command(head.address, "--once", time, "--working-dir=.", overrides=overrides)
        done = subprocess.run(command, cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=500)
        assert done.returncode == 0, done.stdout + done.stderr
        return [json.loads(line) for line in done.stderr.splitlines() if line.startswith("{")]

    for name in ("clip-000.mp4", "clip-001.mp4"):
        shutil.copy(stock / name, videos / name)
    events = fire("2026-11-23T02:00")
    assert [event["event"] for event in events] == ["submitted", "ended"]
    assert (events[1]["status"], events[1]["exit_code"]) == ("SUCCEEDED", 0)
    first = {"clip-000.mp4": "2026-11-23T02-00-00Z", "clip-001.mp4": "2026-11-23T02-00-00Z"}
    assert _rows(base) == first

    shutil.copy(stock / "clip-002.mp4", videos / "clip-002.mp4")
    fire("2026-11-24T02:00")
    assert _rows(base) == first | {"clip-002.mp4": "2026-11-24T02-00-00Z"}

    assert fire("2026-11-24T02:00") == []  # this firing has ended already
    fire("2026-11-25T02:00")  # nothing is new
    assert _rows(base) == first | {"clip-002.mp4": "2026-11-24T02-00-00Z"}
    client = JobSubmissionClient(head.address)
    jobs = [job.submission_id for job in client.list_jobs() if str(base) in job.entrypoint]
    assert sorted(jobs) == [f"nightly-2026-11-{day}T02-00-00Z" for day in (23, 24, 25)]
    log = client.get_job_logs("nightly-2026-11-25T02-00-00Z")
    assert f"3 units have their row under {base}, nothing is new" in log
    assert "0 of 0 finished" in log


def test_sigterm_ends_a_waiting_scheduler_whose_head_is_away(tmp_path):
    overrides = ["source.uri=/videos", f"sink.uri={tmp_path}"]
    command = _command("http://127.0.0.2:9", "--cron=* * * * *", overrides=overrides)
    process = subprocess.Popen(command, cwd=ROOT, env=environment(), stderr=subprocess.PIPE, text=True)
    assert json.loads(process.stderr.readline())["event"] == "started"
    time.sleep(0.5)
    process.send_signal(signal.SIGTERM)
    rest = process.communicate(timeout=60)[1]
    assert process.returncode == 0
    assert json.loads(rest.splitlines()[-1])["event"] == "stopped"
