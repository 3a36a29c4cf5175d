"""The whole job on failing storage: a few faults all the time, and a sink that fails until it is repaired."""

import subprocess
import time

import pyarrow.parquet as pq
import pytest

from pipeline.mini.world import render_demo
from pipeline.storage import files as st
from tests.faults import Rule, proxy
from tests.integration.jobs import ROOT, command, environment, run
from tests.s3 import CREDENTIALS, server

pytestmark = pytest.mark.integration

# One row per file and per block: many requests, and faults fall between many commits.
STEPS = ["clips.length_s=1", "sink.rows_per_file=1", "ray.actors.batch_units=1", "ray.num_cpus=2"]
UNITS = 24


@pytest.fixture(scope="module")
def storage(tmp_path_factory):
    """A server with three videos, reached without the proxy."""
    folder = tmp_path_factory.mktemp("videos")
    render_demo(folder, 3)
    with server("bucket") as found:
        for path in folder.glob("*.mp4"):
            st.write_bytes_atomic(f"s3://bucket/videos/{path.name}", path.read_bytes(), found)
        yield found


@pytest.fixture
def broken(storage):
    with proxy(storage.endpoint_url) as found:
        yield found


def overrides(broken, out, *more):
    return [
        "source.uri=s3://bucket/videos",
        f"sink.uri=s3://bucket/{out}",
        f"storage.endpoint_url={broken.endpoint_url}",
        *STEPS,
        *more,
    ]


def rows(storage, out):
    filesystem, path = st.arrow_filesystem(f"s3://bucket/{out}/data", storage)
    return pq.read_table(path, filesystem=filesystem).to_pylist()


def test_a_job_on_storage_that_fails_every_dozenth_request_finishes_with_every_unit_once(storage, broken):
    faults = {"slow_down": 0.02, "internal_error": 0.02, "drop": 0.02, "reset": 0.01, "truncate": 0.01}
    refused = Rule("slow_down", method="PUT", path="/bucket/shaky/data", times=7)  # more than the tries of one write
    broken.rules = [refused, *(Rule(fault, share=share) for fault, share in faults.items())]
    done = run("caption", *overrides(broken, "shaky"))
    found = rows(storage, "shaky")
    assert len({row["id"] for row in found}) == len(found) == UNITS
    assert {row["error_type"] for row in found} == {None}
    assert broken.hits > broken.requests / 25
    assert CREDENTIALS["AWS_SECRET_ACCESS_KEY"] not in done.stdout + done.stderr


def test_a_sink_that_refuses_ends_the_job_and_the_same_command_finishes_it(storage, broken):
    job = overrides(broken, "closed", "run.lock_timeout_s=10")
    process = subprocess.Popen(
        command("caption", *job), cwd=ROOT, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    try:
        while len(committed(storage, "closed")) < 3:
            assert process.poll() is None, process.communicate()[1]
            time.sleep(0.1)
        broken.rules = [Rule("forbidden", path="/bucket/closed|prefix=closed")]
        said = "".join(process.communicate(timeout=120))
    finally:
        process.kill()
        process.wait()
    last = said.strip().splitlines()[-1]
    assert process.returncode == 2
    assert last.startswith("error: ")
    assert "s3://bucket/closed" in last
    assert CREDENTIALS["AWS_SECRET_ACCESS_KEY"] not in said
    assert 3 <= len(committed(storage, "closed")) < UNITS
    broken.rules = []
    run("caption", *job)
    found = rows(storage, "closed")
    assert len({row["id"] for row in found}) == len(found) == UNITS
    assert {row["error_type"] for row in found} == {None}


def committed(storage, out):
    files = st.list_files(f"s3://bucket/{out}/_run/checkpoint", storage)
    return [entry for entry in files if entry.uri.endswith(".parquet") and "pending" not in entry.uri]
