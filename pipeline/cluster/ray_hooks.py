"""What Ray Data calls on its way: cleaning up before a resumed write, and ending the graph early.

It travels to every worker process of a job, so nothing here imports a model or torch, which takes seconds and memory.
"""

import time
from itertools import takewhile
from typing import Any

import ray
from pyarrow.fs import FileSelector
from ray.actor import ActorHandle
from ray.data._internal.execution.execution_callback import ExecutionCallback
from ray.data._internal.execution.operators.actor_pool_map_operator import ActorPoolMapOperator
from ray.data.checkpoint.checkpoint_filter import IdColumnCheckpointManager
from ray.data.checkpoint.checkpoint_writer import PENDING_CHECKPOINT_SUFFIX

from pipeline.errors import RunError

_ASK_EVERY_S = 0.5
_PENDING = f"{PENDING_CHECKPOINT_SUFFIX}.parquet"


class CleanOnly(IdColumnCheckpointManager):
    """Undoes files that a killed run left half committed; the manifest that is read holds open units only.

    Ray's own filter is an actor that keeps a CPU, with which a one-CPU cluster would never get to read.
    """

    def load_checkpoint(self, data_file_dir: str | None = None, data_file_filesystem: Any = None) -> tuple[None, int]:
        self._finish_commits()
        self._clean_pending_checkpoints(data_file_dir, data_file_filesystem)
        return None, 0

    def _finish_commits(self) -> None:
        """Take away the pending twin of what is committed.

        An object store renames by a copy and a deletion. A commit that ended in between has both names, and Ray, which
        looks at the pending one alone, would delete data of units that count as done.
        """
        folder = FileSelector(self.checkpoint_path_unwrapped, allow_not_found=True)
        names = {file.path for file in self.filesystem.get_file_info(folder)}
        for path in sorted(name for name in names if name.endswith(_PENDING)):
            if path.removesuffix(_PENDING) + ".parquet" in names:
                self.filesystem.delete_file(path)


class Drain(ExecutionCallback):
    """Once the job drains, ends the graph behind the blocks that the actors have; queued units stay for later.

    A job that stalls ends at once: `RunError` with the reason.

    Sent through the actors, which give no rows of them, hundreds of thousands of units would take minutes.
    """

    def __init__(self, attempts: ActorHandle) -> None:
        self._attempts = attempts
        self._reply: ray.ObjectRef | None = None
        self._asked_at = 0.0
        self._draining = False

    def on_execution_step(self, executor: Any) -> None:
        """Called by Ray Data's scheduling loop, many times a second."""
        topology = executor._topology
        draining, stalled = self._orders()
        if stalled is not None:
            raise RunError(stalled)
        if draining and not self._draining:
            self._draining = True
            actors = next(operator for operator in topology if isinstance(operator, ActorPoolMapOperator))
            actors.clear_internal_input_queue()
            if not topology[actors].inputs_done_called:
                topology[actors].input_queues.clear()  # the list: nothing reaches the actors any more
                topology[actors].inputs_done_called = True
                actors.all_inputs_done()
        if self._draining:
            for operator in takewhile(lambda operator: not isinstance(operator, ActorPoolMapOperator), topology):
                operator.mark_execution_finished()
                topology[operator].output_queue.clear()

    def _orders(self) -> tuple[bool, str | None]:
        """What `Attempts.orders` said a moment ago; never waits."""
        if self._reply is None:
            if time.monotonic() - self._asked_at < _ASK_EVERY_S:
                return self._draining, None
            self._asked_at = time.monotonic()
            self._reply = self._attempts.orders.remote()
        ready, _ = ray.wait([self._reply], timeout=0)
        if not ready:
            return self._draining, None
        orders: tuple[bool, str | None] = ray.get(self._reply)
        self._reply = None
        return orders
