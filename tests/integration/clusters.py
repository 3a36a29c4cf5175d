"""Ray clusters of several nodes on this machine: nodes are added, killed, or started by an autoscaler."""

import contextlib
import json
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import psutil
from ray._private.state import GlobalState
from ray._raylet import GcsClientOptions
from ray.exceptions import RaySystemError

from tests.integration.jobs import environment

RAY = str(Path(sys.executable).with_name("ray"))
_HEAD_HOST = "127.0.0.2"  # not 127.0.0.1: Ray would replace it by the host's outer address
_STORE_BYTES = 100_000_000
_START_S = 180.0
_HEAD_ID, _HEAD_TYPE = "f" * 51 + "00000", "ray.head.default"  # the provider of fake nodes expects these for the head
_LISTS = (  # required in every configuration
    *(f"{name}_commands" for name in ("initialization", "setup", "head_setup", "worker_setup")),
    *("head_start_ray_commands", "worker_start_ray_commands"),
    *("cluster_synced_files", "rsync_exclude", "rsync_filter"),
)


@dataclass
class Cluster:
    """A running head, and the nodes added to it."""

    address: str
    folder: Path
    _workers: list[subprocess.Popen] = field(default_factory=list)

    def add_worker(self, *options: str) -> subprocess.Popen:
        """Add a node; return when it is alive."""
        number = len(self._workers)
        host = f"127.0.0.{3 + number}"
        # Its own folder, as on another machine: there the node unpacks the code that the job sends.
        folder = f"--temp-dir={self.folder}/{number}"
        options = (f"--address={self.address}", f"--node-ip-address={host}", folder, *options)
        worker = _start(options, self.folder / f"worker-{number}.log", environment())
        self._workers.append(worker)
        _wait(lambda: host in self.nodes(), lambda: f"no node on {host}, but {self.nodes()}")
        return worker

    def kill(self, worker: subprocess.Popen) -> None:
        """Send SIGKILL to every process of a node."""
        for process in [*psutil.Process(worker.pid).children(recursive=True), psutil.Process(worker.pid)]:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        worker.wait()

    def nodes(self) -> list[str]:
        """Addresses of the live nodes; empty while the head does not answer."""
        state = GlobalState()
        try:
            state._initialize_global_state(GcsClientOptions.create(self.address, None, True, True))
            return [node["NodeManagerAddress"] for node in state.node_table() if node["Alive"]]
        except RaySystemError:
            return []
        finally:
            state.disconnect()

    def wait_for_nodes(self, count: int) -> None:
        """Wait until this many nodes are alive."""
        _wait(lambda: len(self.nodes()) == count, lambda: f"expected {count} nodes, got {self.nodes()}")


def _wait(condition: Callable[[], bool], otherwise: Callable[[], str]) -> None:
    deadline = time.monotonic() + _START_S
    while not condition():
        assert time.monotonic() < deadline, f"{otherwise()}, for {_START_S:g} s"
        time.sleep(0.25)


@contextlib.contextmanager
def fixed(num_cpus: int) -> Iterator[Cluster]:
    """A head with this many CPUs, to which a test adds nodes."""
    with _head([f"--num-cpus={num_cpus}"], environment()) as cluster:
        yield cluster


@contextlib.contextmanager
def autoscaling(head_cpus: int, worker: dict[str, float], most: int, idle_s: float) -> Iterator[Cluster]:
    """A head that starts up to `most` nodes with resources `worker` on demand, and ends nodes idle for `idle_s`."""
    worker_type = {"resources": worker, "node_config": {}, "min_workers": 0, "max_workers": most}
    head_type = {"resources": {"CPU": head_cpus}, "node_config": {}, "max_workers": 0}
    port = _free_port()
    config = {
        "cluster_name": "fake",
        "max_workers": most,
        "provider": {
            "type": "external",  # the provider's own name, fake_multinode, needs a file that Ray's wheel lacks
            "module": "ray.autoscaler._private.fake_multi_node.node_provider.FakeMultiNodeProvider",
            "use_node_id_as_ip": True,
            "disable_node_updaters": True,
            "disable_launch_config_check": True,
            "launch_multiple": True,
            "head_node_id": _HEAD_ID,
            "gcs_address": f"{_HEAD_HOST}:{port}",
        },
        "available_node_types": {_HEAD_TYPE: head_type, "worker": worker_type},
        "head_node_type": _HEAD_TYPE,
        "auth": {},
        "upscaling_speed": 1.0,
        "idle_timeout_minutes": idle_s / 60,
        **{key: {} for key in ("docker", "file_mounts")},
        **{key: [] for key in _LISTS},
    }
    variables = environment(
        AUTOSCALER_UPDATE_INTERVAL_S="1",
        RAY_FAKE_CLUSTER="1",
        RAY_enable_autoscaler_v2="1",
        RAY_CLOUD_INSTANCE_ID=_HEAD_ID,
        RAY_OVERRIDE_NODE_ID_FOR_TESTING=_HEAD_ID,
    )
    with tempfile.NamedTemporaryFile("w", suffix=".json") as file:
        json.dump(config, file)
        file.flush()
        options = [f"--num-cpus={head_cpus}", f"--autoscaling-config={file.name}"]
        with _head(options, variables, port) as cluster:
            yield cluster


@contextlib.contextmanager
def _head(options: list[str], variables: dict[str, str], port: int | None = None) -> Iterator[Cluster]:
    """A head in its own folder; all processes started below it end with the block."""
    # Not pytest's folder: the path of a socket must be short.
    with tempfile.TemporaryDirectory(prefix="ray-", ignore_cleanup_errors=True) as name:
        port, client = port or _free_port(), _free_port()
        head = [
            "--head",
            f"--port={port}",
            f"--node-ip-address={_HEAD_HOST}",
            f"--temp-dir={name}",
            f"--ray-client-server-port={client}",
            "--include-dashboard=false",
            *options,
        ]
        cluster = Cluster(f"{_HEAD_HOST}:{port}", Path(name))
        process = _start(head, Path(name, "head.log"), variables)
        try:
            _wait_for_head(cluster, process)
            yield cluster
        finally:
            for started in [*cluster._workers, process]:
                _end(started)


def _start(options: list[str] | tuple[str, ...], log: Path, variables: dict[str, str]) -> subprocess.Popen:
    # Separate worker ports: nodes on one machine would share the default range.
    fixed = ["--block", "--min-worker-port=0", "--max-worker-port=0", f"--object-store-memory={_STORE_BYTES}"]
    with log.open("w") as file:
        return subprocess.Popen(
            [RAY, "start", *options, *fixed], env=variables, stdout=file, stderr=file, start_new_session=True
        )


def _wait_for_head(cluster: Cluster, process: subprocess.Popen) -> None:
    def alive() -> bool:
        assert process.poll() is None, (cluster.folder / "head.log").read_text()
        return bool(cluster.nodes())

    _wait(alive, lambda: (cluster.folder / "head.log").read_text())


def _end(process: subprocess.Popen) -> None:
    """End a node and all processes it started, fake nodes too; `ray stop` would end other clusters."""
    below = []
    with contextlib.suppress(psutil.NoSuchProcess):
        below = psutil.Process(process.pid).children(recursive=True)
    process.send_signal(signal.SIGTERM)
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(20)
    for left in [process, *below]:
        with contextlib.suppress(psutil.NoSuchProcess, ProcessLookupError):
            left.kill()
    process.wait()


def _free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]
