"""A Ray head node of its own: to submit jobs to, and to be looked at from outside."""

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from tests.integration.jobs import ROOT, SMALL, environment

RAY = str(Path(sys.executable).with_name("ray"))
_HOST = "127.0.0.2"  # loopback of its own: 127.0.0.1 would be rewritten to the host's outer address


@dataclass(frozen=True)
class Head:
    """Where a running head listens."""

    address: str  # of the job server
    metrics: str  # of the Prometheus endpoint

    def submit(self, *overrides, job="caption"):
        """`ray job submit` of a job with small settings, to its end."""
        command = ["python", "-m", f"jobs.{job}", *(f"--set={o}" for o in [*SMALL, *overrides])]
        return subprocess.run(
            [RAY, "job", "submit", "--address", self.address, "--working-dir", ".", "--", *command],
            cwd=ROOT,
            env=environment(),
            capture_output=True,
            text=True,
            timeout=300,
        )


@contextlib.contextmanager
def running_head(log_file: Path, **extra: str) -> Iterator[Head]:
    """A head with two CPUs, ended by its own process group: `ray stop` would end other clusters too."""
    port, dashboard, agent, client, metrics = (_free_port() for _ in range(5))
    options = [f"--node-ip-address={_HOST}", f"--port={port}", "--num-cpus=2", "--object-store-memory=200000000"]
    options += [f"--dashboard-host={_HOST}", f"--dashboard-port={dashboard}", f"--metrics-export-port={metrics}"]
    # These have fixed defaults, which another Ray on this machine may hold; without its agent a head takes no jobs.
    options += [f"--dashboard-agent-listen-port={agent}", f"--ray-client-server-port={client}"]
    with log_file.open("w+") as log:
        process = subprocess.Popen(
            [RAY, "start", "--head", "--block", *options],
            env=environment(**extra),
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        address = f"http://{_HOST}:{dashboard}"
        deadline = time.monotonic() + 90
        try:
            while not _answers(f"{address}/api/version"):
                log.seek(0)
                assert process.poll() is None, log.read()
                assert time.monotonic() < deadline, log.read()
                time.sleep(0.5)
            yield Head(address, f"http://{_HOST}:{metrics}/metrics")
        finally:
            os.killpg(process.pid, signal.SIGTERM)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(20)
            subprocess.run(["pkill", "-9", "-g", str(process.pid)], check=False)


def _free_port():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def _answers(url):
    try:
        with urllib.request.urlopen(url, timeout=2) as answer:
            return answer.status == 200
    except OSError:
        return False
