"""How Ray Data interprets the graph's numbers, and the error when the graph ends early."""

import pytest
from ray.data import ExecutionResources
from ray.exceptions import RayError

from pipeline.cluster import graph
from pipeline.cluster.actor import BLOCKS_AT_ONCE
from pipeline.config import load_config
from pipeline.errors import RunError
from pipeline.run.directory import RunDirectory


@pytest.mark.parametrize("gpus", [0.25, 0.5, 1.0, 2.0])
def test_the_blocks_of_two_actors_need_the_gpus_of_two(gpus):
    """Ray Data divides GPU shares of blocks to find how many actors it needs, and rounds down."""
    one = ExecutionResources(gpu=gpus)
    of_two = one.scale(1 / BLOCKS_AT_ONCE).scale(2 * BLOCKS_AT_ONCE)
    assert of_two.floordiv(one).gpu == 2


class _Stopped:
    """A graph that ends with an error of one of its parts."""

    def __init__(self, error):
        self.error = error

    def write_parquet(self, *_, **__):
        raise self.error


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # Ray's about its own settings
@pytest.mark.parametrize(
    ("error", "told"),
    [
        (RunError("the job has stalled: waiting 600 s for frames"), "^the job has stalled"),
        (RayError("Traceback\n  in a worker\nOSError: the disk is full"), "cannot go on: OSError: the disk is full;"),
    ],
)
def test_what_ends_the_graph_is_told_in_a_line(tmp_path, monkeypatch, error, told):
    one = load_config(None, ["source.uri=/videos", f"sink.uri={tmp_path}", "ray.actors.num_gpus=0"])
    monkeypatch.setattr(graph, "build", lambda *_: _Stopped(error))
    with pytest.raises(RunError, match=told) as raised:
        graph.execute(one, RunDirectory(one).open(), None)
    assert "\n" not in str(raised.value)
