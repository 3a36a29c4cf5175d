"""A Ray head node for tests that submit jobs and read metrics from outside."""

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
_HOST = "127.0.0.2"  # not 127.0.0.1: Ray would replace it by the host's outer address


@dataclass(frozen=True)
class Head:
    """Addresses of a running head."""

    address: str  # of the job server
    metrics: str  # of the Prometheus endpoint

    def submit(self, *overrides, job="caption"):
        """Run `ray job submit` for a job with small settings and wait for its end."""
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
    """A head with two CPUs. It is ended by its process group, because `ray stop` would end other clusters too."""
    port, dashboard, agent, client, metrics = (_free_port() for _ in range(5))
    options = [f"--node-ip-address={_HOST}", f"--port={port}", "--num-cpus=2", "--object-store-memory=200000000"]
    options += [f"--dashboard-host={_HOST}", f"--dashboard-port={dashboard}", f"--metrics-export-port={metrics}"]
    # These ports have fixed defaults, which another Ray here may use; without its agent a head accepts no jobs.
    options += [f"--dashboard-agent-listen-port={agent}", f"--ray-client-server-port={client}"]
    command = [RAY, "start", "--head", "--block", *options]
    address = f"http://{_HOST}:{dashboard}"
    with log_file.open("w+") as log:
        process = _started(command, address, log, environment(**extra))
        try:
            yield Head(address, f"http://{_HOST}:{metrics}/metrics")
        finally:
            _end(process)


def _started(command, address, log, env, tries=3):
    """Start a head that accepts jobs; retries, as Ray gives up after 30 seconds, too short for a busy machine."""
    for _ in range(tries):
        log.seek(0)
        log.truncate()
        process = subprocess.Popen(command, env=env, stdout=log, stderr=subprocess.STDOUT, start_new_session=True)
        deadline = time.monotonic() + 120
        while process.poll() is None and time.monotonic() < deadline:
            if "Ray runtime started" in Path(log.name).read_text() and _answers(f"{address}/api/version"):
                return process
            time.sleep(0.2)
        _end(process)
    raise AssertionError(Path(log.name).read_text())


def _end(process):
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGTERM)
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(5)
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
