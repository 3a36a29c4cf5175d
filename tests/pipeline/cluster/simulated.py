"""A simulated Ray for frame streams, without processes or time: CPUs, decode tasks, and the count of read messages.

The decode tasks run the project's own task code. A random generator draws the next event: a queued task starts on a
free CPU, or a running task makes its next message, waits for its reader, or dies. A waiting task holds no CPU, and
needs a free one to continue.
"""

from collections import deque
from types import SimpleNamespace

import ray

from pipeline.cluster import decode_tasks

QUEUED, WORKS, WAITS, ENDED = "queued", "works", "waits", "ended"


class Ref:
    """An object in Ray's store: a value, or the error that getting it raises."""

    def __init__(self, value):
        self.value = value


class Task:
    """A decode task, which is also the generator of its messages that the reader holds."""

    def __init__(self, ray_, unit, name, deaths):
        self.unit, self.name, self.deaths = unit, name, deaths
        self.state, self.messages, self.came = QUEUED, None, deque()
        self.made = self.sent = 0  # messages of this start, and of all starts; the initial None included
        self.over = False
        self._ray = ray_

    def __iter__(self):
        return self

    def __next__(self):
        if self.came:
            return self.came.popleft()
        assert self.over, "asked for a message that has not come"
        raise StopIteration

    @property
    def ready(self):
        return bool(self.came) or self.over


class SimulatedRay:
    """Replaces the modules `ray` and `pipeline.cluster.decode_tasks` in `pipeline.cluster.frame_streams`."""

    exceptions = ray.exceptions

    def __init__(self, cpus, random, deaths=0.0, retries=2):
        self.cpus, self.random, self.deaths, self.retries = cpus, random, deaths, retries
        self.tasks, self.read, self.most_ahead = [], {}, 0
        self.counts = SimpleNamespace(
            read=SimpleNamespace(remote=self._note_read), close=SimpleNamespace(remote=self._note_closed)
        )

    # --- called by pipeline.cluster.frame_streams ---

    def remote(self, _):
        return SimpleNamespace(options=lambda **_: SimpleNamespace(remote=lambda: self.counts))

    def options(self, **_):
        return SimpleNamespace(remote=self._submit)

    def wait(self, tasks, num_returns, timeout):
        assert timeout == 0, "reading never waits"
        return [task for task in tasks if task.ready], []

    def get(self, ref):
        if isinstance(ref.value, ray.exceptions.RayError):
            raise ref.value
        return ref.value

    def cancel(self, task, force):
        self._end(task)

    def _submit(self, unit, settings, name, counts):
        self.tasks.append(Task(self, unit, name, self.retries))
        return self.tasks[-1]

    def _note_read(self, name, count):
        self.read[name] = max(count, self.read.get(name, 0))

    def _note_closed(self, name):
        self.read.pop(name, None)

    # --- events ---

    def moves(self):
        """All events that can happen next."""
        free = self.cpus - sum(task.state == WORKS for task in self.tasks)
        assert free >= 0
        return [
            task
            for task in self.tasks
            if task.state == WORKS
            or (free and (task.state == QUEUED or (task.state == WAITS and not self._held(task))))
        ]

    def move(self):
        """Let one possible event happen; return whether there was one."""
        moves = self.moves()
        if not moves:
            return False
        task = self.random.choice(moves)
        if task.state == QUEUED:
            task.messages = decode_tasks.decode_stream._function(task.unit, b"", task.name, self.counts)
            task.state, task.made = WORKS, 0
        elif task.state == WAITS:
            task.state = WORKS
        elif self._held(task):
            task.state = WAITS
        elif self.random.random() < self.deaths:
            self._die(task)
        else:
            self._make(task)
        return True

    def _held(self, task):
        """Whether the task waits for its reader before its next message; `made` counts the initial None, too."""
        wanted = task.made - decode_tasks.AHEAD
        return wanted > 0 and self.read.get(task.name, 0) < wanted

    def _make(self, task):
        message = next(task.messages, ...)
        if message is ...:
            self._end(task)
            return
        task.made += 1
        if task.made > task.sent:  # messages that an earlier start sent are not sent again
            task.sent += 1
            task.came.append(Ref(message))
        self.most_ahead = max(self.most_ahead, task.made - 1 - self.read.get(task.name, 0))

    def _die(self, task):
        if task.deaths:
            task.deaths -= 1
            task.state, task.made = QUEUED, 0
            return
        task.came.append(Ref(ray.exceptions.WorkerCrashedError()))
        self._end(task)

    def _end(self, task):
        task.state, task.over = ENDED, True
        self.tasks = [other for other in self.tasks if other is not task]


def on_ray(monkeypatch, simulated, messages_of):
    """Run `pipeline.cluster.frame_streams` on a simulated Ray; a unit's messages are `messages_of(unit)`."""
    from pipeline.cluster import frame_streams as stream

    def wait_until_read(counts, name, count):
        assert simulated.read.get(name, 0) >= count, "a decoder at work waits with its CPU"

    monkeypatch.setattr(decode_tasks, "wait_until_read", wait_until_read)
    monkeypatch.setattr(decode_tasks, "decoded", lambda unit, settings: messages_of(unit))
    monkeypatch.setattr(stream, "ray", simulated)
    monkeypatch.setattr(stream, "decode_stream", simulated)
    return simulated
