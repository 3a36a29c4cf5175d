"""A real S3 server on loopback: Ceph's gateway with a monitor and an OSD, all in memory and a temporary folder.

As a program it prints one JSON line {endpoint, access_key, secret_key} and serves until its standard input ends, so
that nothing is left of it when its parent is killed. `running()` starts it as one.
"""

import contextlib
import json
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

PROGRAMS = ("ceph-mon", "ceph-osd", "radosgw", "radosgw-admin", "ceph", "monmaptool")
START_S = 90.0  # 15 s on two idle cores


class Gateway(NamedTuple):
    """Where the server listens, and the keys of a user who may make buckets."""

    endpoint: str
    access_key: str
    secret_key: str


def missing_programs() -> list[str]:
    """What must be installed before a gateway can start."""
    return [program for program in PROGRAMS if shutil.which(program) is None]


@contextlib.contextmanager
def running() -> Iterator[Gateway]:
    """A gateway for the block. Raises RuntimeError when it does not come up, with what its daemons said."""
    if missing := missing_programs():
        raise RuntimeError(f"expected Ceph's gateway, found no {', '.join(missing)}; run infra/test-packages.sh")
    process = subprocess.Popen(
        [sys.executable, __file__],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        start_new_session=True,
        text=True,
    )
    assert process.stdin is not None
    assert process.stdout is not None
    assert process.stderr is not None
    try:
        line = process.stdout.readline()
        if not line:
            raise RuntimeError(f"Ceph's gateway did not start:\n{process.stderr.read()}")
        yield Gateway(**json.loads(line))
    finally:
        process.stdin.close()
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(30)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        process.stdout.close()
        process.stderr.close()


class _Cluster:
    """The daemons in `folder`; `stop` ends those that were started."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._daemons: list[subprocess.Popen[bytes]] = []

    def start(self) -> Gateway:
        monitor, gateway = _free_port(), _free_port()
        fsid = str(uuid.uuid4())
        address = f"v2:127.0.0.1:{monitor}"
        (self._folder / "ceph.conf").write_text(_configuration(fsid, address, self._folder))
        for name in ("mon", "osd"):
            (self._folder / name).mkdir()
        monmap = str(self._folder / "monmap")
        self._run("monmaptool", "--create", "--clobber", "--fsid", fsid, "--addv", "a", f"[{address}]", monmap)
        self._run("ceph-mon", "--mkfs", "-i", "a", "--monmap", monmap)
        self._daemon("ceph-mon", "-i", "a")
        osd = str(uuid.uuid4())
        self._run("ceph", "osd", "new", osd)
        self._run("ceph-osd", "--mkfs", "-i", "0", "--osd-uuid", osd)
        self._daemon("ceph-osd", "-i", "0")
        self._daemon("radosgw", "-n", "client.gateway", f"--rgw-frontends=beast endpoint=127.0.0.1:{gateway}")
        keys = f"K{secrets.token_hex(8).upper()}", secrets.token_hex(20)
        user = ("--uid=tests", "--display-name=tests", f"--access-key={keys[0]}", f"--secret-key={keys[1]}")
        self._run("radosgw-admin", "user", "create", *user)
        endpoint = f"http://127.0.0.1:{gateway}"
        self._wait_for(endpoint)
        return Gateway(endpoint, *keys)

    def stop(self) -> None:
        for daemon in reversed(self._daemons):
            daemon.kill()  # nothing it holds is wanted
        for daemon in self._daemons:
            daemon.wait()

    def _daemon(self, program: str, *arguments: str) -> None:
        with open(self._folder / f"{program}.log", "wb") as log:
            self._daemons.append(
                subprocess.Popen(self._command(program, *arguments, "-f"), stdout=log, stderr=subprocess.STDOUT)
            )

    def _run(self, program: str, *arguments: str) -> None:
        command = [program, *arguments] if program == "monmaptool" else self._command(program, *arguments)
        done = subprocess.run(command, capture_output=True, text=True, timeout=START_S, check=False)
        if done.returncode != 0:
            raise RuntimeError(f"{program} {' '.join(arguments)}: exit code {done.returncode}\n{done.stderr}")

    def _command(self, program: str, *arguments: str) -> list[str]:
        return [program, f"--conf={self._folder / 'ceph.conf'}", *arguments]

    def _wait_for(self, endpoint: str) -> None:
        deadline = time.monotonic() + START_S
        while True:
            with contextlib.suppress(OSError), urllib.request.urlopen(endpoint, timeout=5):
                return
            if time.monotonic() > deadline or any(daemon.poll() is not None for daemon in self._daemons):
                logs = (log.read_text(errors="replace")[-2000:] for log in sorted(self._folder.glob("*.log")))
                raise RuntimeError("the gateway does not answer\n" + "\n".join(logs))
            time.sleep(0.1)


def _configuration(fsid: str, address: str, folder: Path) -> str:
    options = {
        "fsid": fsid,
        "mon host": f"[{address}]",
        "mon data": folder / "mon",
        "osd data": folder / "osd",
        "run dir": folder,
        "admin socket": "",
        "log file": "",
        "log to stderr": "true",
        "public addr": "127.0.0.1",
        "cluster addr": "127.0.0.1",
        "ms bind msgr1": "false",
        "keyring": "/dev/null",
        # On loopback nobody else listens; without keys the monitors' messages must be plain.
        **dict.fromkeys(("auth cluster required", "auth service required", "auth client required"), "none"),
        **dict.fromkeys(("ms mon client mode", "ms mon service mode", "ms mon cluster mode"), "crc"),
        "osd objectstore": "memstore",
        "memstore device bytes": 2 << 30,
        "osd crush chooseleaf type": 0,
        "osd pool default size": 1,
        "osd pool default min size": 1,
        "osd pool default pg num": 4,
        "osd pool default pg autoscale mode": "off",
        "mon allow pool size one": "true",
        "mon max pg per osd": 1000,
        "mon data avail crit": 1,
        "rgw enable usage log": "false",
        "rgw run sync thread": "false",
        "rgw dns name": "localhost",
    }
    return "[global]\n" + "".join(f"{name} = {value}\n" for name, value in options.items())


def _free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


def main() -> None:
    """Serve until standard input ends or a signal comes."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    with tempfile.TemporaryDirectory(prefix="radosgw-") as folder:
        cluster = _Cluster(Path(folder))
        try:
            print(json.dumps(cluster.start()._asdict()), flush=True)
            with contextlib.suppress(KeyboardInterrupt):
                sys.stdin.read()
        finally:
            cluster.stop()


if __name__ == "__main__":
    main()
