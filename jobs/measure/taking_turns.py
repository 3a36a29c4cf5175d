"""Run two process trees in turns, so that changes of the machine's speed affect both.

All processes of one are stopped (SIGSTOP) while those of the other run. Times that a process measures itself include
the turns of the other; `Process.ran` returns the part in which it ran.
"""

import os
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack, suppress
from pathlib import Path

import psutil


class Process:
    """A Python module as a process with its children. Keeps its output; is killed at the end of the block."""

    def __init__(self, module: str, *arguments: str, **environment: str) -> None:
        self._name = " ".join([module, *arguments])
        self._command = [sys.executable, "-m", module, *arguments]
        self._environment = os.environ | environment
        self._windows: list[tuple[float, float]] = []  # when it ran: (begin, end), seconds since the epoch
        self._files = ExitStack()

    def __enter__(self) -> "Process":
        self._out = Path(self._files.enter_context(tempfile.TemporaryDirectory()), "out")
        with self._out.open("w") as out:
            self._popen = subprocess.Popen(
                self._command, env=self._environment, stdin=subprocess.PIPE, stdout=out, stderr=subprocess.STDOUT
            )
        self._tree = [psutil.Process(self._popen.pid)]
        self._since = time.time()
        return self

    def __exit__(self, *_: object) -> None:
        self._signal(signal.SIGKILL, [*self._started(), *self._tree])
        self._popen.communicate()
        self._files.close()

    def output(self) -> str:
        """Its output so far. Raises `RuntimeError` with the end of it if the process has failed."""
        said = self._out.read_text(encoding="utf-8")
        if self._popen.poll():
            raise RuntimeError(f"{self._name} ended with {self._popen.returncode}:\n{said[-4000:]}")
        return said

    def tell(self, line: str) -> None:
        """Write a line to its standard input."""
        assert self._popen.stdin is not None
        self._popen.stdin.write(f"{line}\n".encode())
        self._popen.stdin.flush()

    def wait(self, seconds: float | None = None) -> bool:
        """Wait up to `seconds`; return whether it has ended."""
        with suppress(subprocess.TimeoutExpired):
            self._popen.wait(seconds)
            self._windows.append((self._since, time.time()))
        return self._popen.poll() is not None

    def stop(self) -> None:
        """Stop the process and all its children."""
        self._signal(signal.SIGSTOP, self._tree)
        self._windows.append((self._since, time.time()))
        new = self._started()  # after the first signal: finding children takes milliseconds of CPU
        self._signal(signal.SIGSTOP, new)
        self._tree += new

    def go_on(self) -> None:
        """Let it run again."""
        self._since = time.time()
        self._signal(signal.SIGCONT, self._tree)

    def ran(self, begin: float, end: float) -> float:
        """Seconds between `begin` and `end` (since the epoch) in which it was not stopped."""
        return sum(max(0.0, min(end, until) - max(begin, since)) for since, until in self._windows)

    def _started(self) -> list[psutil.Process]:
        with suppress(psutil.NoSuchProcess):
            return [process for process in self._tree[0].children(recursive=True) if process not in self._tree]
        return []

    @staticmethod
    def _signal(number: signal.Signals, processes: list[psutil.Process]) -> None:
        for process in processes:
            with suppress(psutil.NoSuchProcess):
                process.send_signal(number)


def take_turns(one: Process, other: Process, turn_s: float) -> None:
    """Run two running processes to their ends, never at the same time: each has `turn_s` seconds per turn."""
    other.stop()
    running, waiting = one, other
    while not running.wait(turn_s):
        running.stop()
        waiting.go_on()
        running, waiting = waiting, running
    waiting.go_on()
    waiting.wait()
