"""`ray job submit` against a running head: the job runs there, and its exit code comes back."""

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest

from pipeline.mini.world import render_demo
from tests.integration.jobs import ROOT, SMALL, environment, rows_by_name

pytestmark = pytest.mark.integration
RAY = str(Path(sys.executable).with_name("ray"))


def _free_port():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


@pytest.fixture(scope="module")
def head(tmp_path_factory):
    """A head node of its own, ended by its own process group: `ray stop` would end other clusters too."""
    port, dashboard, agent, client = (_free_port() for _ in range(4))
    log = (tmp_path_factory.mktemp("head") / "log").open("w+")
    # Loopback of its own: 127.0.0.1 would be rewritten to the host's outer address.
    options = ["--node-ip-address=127.0.0.2", f"--port={port}", "--num-cpus=2", "--object-store-memory=200000000"]
    options += ["--dashboard-host=127.0.0.2", f"--dashboard-port={dashboard}"]
    # These have fixed defaults, which another Ray on this machine may hold; without its agent a head takes no jobs.
    options += [f"--dashboard-agent-listen-port={agent}", f"--ray-client-server-port={client}"]
    process = subprocess.Popen(
        [RAY, "start", "--head", "--block", *options],
        env=environment(),
        stdout=log,
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )
    address = f"http://127.0.0.2:{dashboard}"
    deadline = time.monotonic() + 90
    while not _answers(f"{address}/api/version"):
        log.seek(0)
        assert process.poll() is None, log.read()
        assert time.monotonic() < deadline, log.read()
        time.sleep(0.5)
    yield address
    os.killpg(process.pid, signal.SIGTERM)
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(20)
    subprocess.run(["pkill", "-9", "-g", str(process.pid)], check=False)


def _answers(url):
    try:
        with urllib.request.urlopen(url, timeout=2) as answer:
            return answer.status == 200
    except OSError:
        return False


def _submit(head, *overrides):
    job = ["python", "-m", "jobs.caption", *(f"--set={o}" for o in [*SMALL, *overrides])]
    return subprocess.run(
        [RAY, "job", "submit", "--address", head, "--working-dir", ".", "--", *job],
        cwd=ROOT,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=300,
    )


def test_submitted_job_captions_on_the_cluster(head, tmp_path):
    render_demo(tmp_path / "videos", 2)
    done = _submit(head, f"source.uri={tmp_path / 'videos'}", f"sink.uri={tmp_path / 'out'}")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "2 of 2 finished" in done.stdout
    rows = rows_by_name(tmp_path / "out")
    assert {row["status"] for row in rows.values()} <= {"ok", "truncated"}
    assert len(rows) == 2


def test_submitted_job_that_is_refused_fails_the_submission(head, tmp_path):
    done = _submit(head, "source.uri=/nowhere", f"sink.uri={tmp_path / 'out'}", "frames.fsp=1")
    assert done.returncode != 0
    assert "did you mean fps?" in done.stdout + done.stderr
