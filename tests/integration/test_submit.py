"""`ray job submit` against a running head: jobs run there and return their exit codes; stopped ones can be resumed."""

import json
import shutil
import subprocess
import sys
import time

import boto3
import pyarrow.parquet as pq
import pytest
from ray.job_submission import JobSubmissionClient

from jobs.schedule.submission import Cluster
from pipeline.config import load_config
from pipeline.errors import RunError
from pipeline.mini.world import render_demo
from tests.integration.head import RAY, running_head
from tests.integration.jobs import ROOT, SMALL, environment, rows_by_name
from tests.s3 import CREDENTIALS, server

pytestmark = pytest.mark.integration


@pytest.fixture(scope="module")
def head(tmp_path_factory):
    with running_head(tmp_path_factory.mktemp("head") / "log") as head:
        yield head


@pytest.fixture(scope="module")
def videos(tmp_path_factory):
    folder = tmp_path_factory.mktemp("videos")
    render_demo(folder, 2)
    return folder


def _ended(client, id, timeout_s=240):
    """The job's details, once it has ended."""
    deadline = time.monotonic() + timeout_s
    while not (found := client.get_job_info(id)).status.is_terminal():
        assert time.monotonic() < deadline, client.get_job_logs(id)
        time.sleep(0.2)
    return found


def test_submitted_job_that_is_refused_fails_the_submission_with_exit_code_2(head, tmp_path):
    done = head.submit("source.uri=/nowhere", f"sink.uri={tmp_path / 'out'}", "frames.fsp=1")
    assert done.returncode != 0
    assert "did you mean fps?" in done.stdout + done.stderr
    failed = [job for job in JobSubmissionClient(head.address).list_jobs() if str(tmp_path) in job.entrypoint]
    assert [(job.status.value, job.driver_exit_code) for job in failed] == [("FAILED", 2)]


def test_submitted_job_captions_on_the_cluster_with_the_code_and_the_credentials_of_its_submission(head, videos):
    """Only the runtime environment has the S3 keys, and every worker needs them."""
    with server("submitted") as storage:
        keys = {
            "aws_access_key_id": CREDENTIALS["AWS_ACCESS_KEY_ID"],
            "aws_secret_access_key": CREDENTIALS["AWS_SECRET_ACCESS_KEY"],
        }
        client = boto3.client("s3", endpoint_url=storage.endpoint_url, region_name="us-east-1", **keys)
        for path in videos.glob("*.mp4"):
            client.upload_file(str(path), "submitted", f"in/{path.name}")
        overrides = ["source.uri=s3://submitted/in", "sink.uri=s3://submitted/out", *SMALL]
        overrides += [f"storage.endpoint_url={storage.endpoint_url}", "storage.region=us-east-1"]
        options = ["--working-dir", ".", "--runtime-env-json", json.dumps({"env_vars": CREDENTIALS})]
        done = subprocess.run(
            [RAY, "job", "submit", "--address", head.address, *options, "--", "python", "-m", "jobs.caption"]
            + [f"--set={override}" for override in overrides],
            cwd=ROOT,
            env=environment(),
            capture_output=True,
            text=True,
            timeout=500,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        assert "2 of 2 finished" in done.stdout
        assert "error 0" in done.stdout
        found = client.list_objects_v2(Bucket="submitted", Prefix="out/data/")["Contents"]
        assert any(one["Key"].endswith(".parquet") for one in found)


def _job(videos, out, *overrides):
    return load_config(None, [*SMALL, f"source.uri={videos}", f"sink.uri={out}", *overrides])


def test_stopped_job_ends_on_request_and_the_same_job_submitted_again_does_the_rest(head, videos, tmp_path):
    """One decoder hangs, so the first job never ends by itself."""
    source, out = tmp_path / "source", tmp_path / "out"
    shutil.copytree(videos, source)
    shutil.copy(source / "clip-000.mp4", source / "hang.mp4")
    # The other two arrive as one block, then one at a time with the hanging one, which may be first in the model.
    small = ["sink.rows_per_file=1", "ray.actors.batch_units=2", "run.grace_s=2"]
    job = _job(source, out, *small, "decode.backend=tests.integration.backends:dangerous", "decode.timeout_s=3600")
    cluster, client = Cluster(head.address, str(ROOT)), JobSubmissionClient(head.address)
    assert cluster.submit("stopped-1", job)
    deadline = time.monotonic() + 240
    while not any((out / "data").glob("*.parquet")):
        assert not client.get_job_info("stopped-1").status.is_terminal(), client.get_job_logs("stopped-1")
        assert time.monotonic() < deadline
        time.sleep(0.05)
    subprocess.run(
        [RAY, "job", "stop", "--address", head.address, "stopped-1"], env=environment(), check=True, timeout=240
    )
    assert _ended(client, "stopped-1").status.value == "STOPPED"
    assert "the job was asked to end" in client.get_job_logs("stopped-1")
    before = pq.read_table(out)["id"].to_pylist()
    assert before
    assert cluster.submit("stopped-2", _job(source, out, *small))
    assert _ended(client, "stopped-2").driver_exit_code == 0, client.get_job_logs("stopped-2")
    assert sorted(rows_by_name(out)) == ["clip-000.mp4", "clip-001.mp4", "hang.mp4"]
    assert set(before) < set(pq.read_table(out)["id"].to_pylist())
    assert json.loads((out / "_run" / "summary.json").read_text())["this_start"]["done_before"] == len(before)


def test_a_submission_of_one_id_runs_once(head, videos, tmp_path):
    cluster = Cluster(head.address, None)
    refused = _job(videos, tmp_path / "out", "model.name=nobody/nothing")
    assert cluster.find("once") is None
    assert cluster.submit("once", refused)
    assert not cluster.submit("once", refused)
    with pytest.raises(RunError, match="submission once belongs to"):
        cluster.submit("once", _job(videos, tmp_path / "other"))
    _ended(JobSubmissionClient(head.address), "once")
    found = cluster.find("once")
    assert (found.status, found.exit_code, found.run) == ("FAILED", 2, str(tmp_path / "out"))
    assert "error: model.name nobody/nothing" in cluster.log_tail("once", 5)
    assert not cluster.submit("once", refused)


def test_a_head_that_goes_stops_its_jobs(head):
    client = JobSubmissionClient(head.address)
    id = client.submit_job(entrypoint="sleep 600")
    subprocess.run(
        [sys.executable, "-m", "jobs.drain", "--address", head.address],
        cwd=ROOT,
        env=environment(),
        check=True,
        timeout=120,
    )
    assert client.get_job_status(id).value == "STOPPED"
