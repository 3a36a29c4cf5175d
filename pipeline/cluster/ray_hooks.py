"""Callbacks for Ray Data: clean-up before a resumed write, and an early end of the graph.

Every worker process of a job imports this module, so it imports neither a model nor torch: that takes seconds and
memory.
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
    """Removes files that a killed run left half committed; it filters no rows, as the manifest has open units only.

    Ray's own filter is an actor that holds a CPU: on a one-CPU cluster the read would then never start.
    """

    def load_checkpoint(self, data_file_dir: str | None = None, data_file_filesystem: Any = None) -> tuple[None, int]:
        self._finish_commits()
        self._clean_pending_checkpoints(data_file_dir, data_file_filesystem)
        return None, 0

    def _finish_commits(self) -> None:
        """Delete the pending twin of each committed checkpoint.

        An object store renames by copy and delete. If a commit was killed between the two, both names exist. Ray looks
        only at the pending name, and would delete data of units that count as done.
        """
        folder = FileSelector(self.checkpoint_path_unwrapped, allow_not_found=True)
        names = {file.path for file in self.filesystem.get_file_info(folder)}
        for path in sorted(name for name in names if name.endswith(_PENDING)):
            if path.removesuffix(_PENDING) + ".parquet" in names:
                self.filesystem.delete_file(path)


class Drain(ExecutionCallback):
    """Ends the graph early once the job drains: actors finish the blocks they have, queued units stay open.

    Raises `RunError` with the reason if the job has stalled.

    The queued units are not sent through the actors, which return no rows for them: hundreds of thousands of units
    would take minutes.
    """

    def __init__(self, attempts: ActorHandle) -> None:
        self._attempts = attempts
        self._reply: ray.ObjectRef | None = None
        self._asked_at = 0.0
        self._draining = False

    def on_execution_step(self, executor: Any) -> None:
        """Ray Data's scheduling loop calls this many times a second."""
        topology = executor._topology
        draining, stalled = self._orders()
        if stalled is not None:
            raise RunError(stalled)
        if draining and not self._draining:
            self._draining = True
            actors = next(operator for operator in topology if isinstance(operator, ActorPoolMapOperator))
            actors.clear_internal_input_queue()
            if not topology[actors].inputs_done_called:
                topology[actors].input_queues.clear()  # clears the list itself: nothing reaches the actors any more
                topology[actors].inputs_done_called = True
                actors.all_inputs_done()
        if self._draining:
            for operator in takewhile(lambda operator: not isinstance(operator, ActorPoolMapOperator), topology):
                operator.mark_execution_finished()
                topology[operator].output_queue.clear()

    def _orders(self) -> tuple[bool, str | None]:
        """Return the last known answer of `Attempts.orders`; never blocks."""
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
