"""What Ray Data makes of the graph's numbers, how long it may stand still, and what is told when it stands longer."""

import pytest
from ray.data import ExecutionResources
from ray.data.exceptions import ExecutionTimeoutError

from pipeline import graph
from pipeline.actor import BLOCKS_AT_ONCE
from pipeline.config import load_config
from pipeline.errors import RunError
from pipeline.run import RunDirectory


def job(*overrides):
    return load_config(None, ["source.uri=/videos", *overrides])


@pytest.mark.parametrize("gpus", [0.25, 0.5, 1.0, 2.0])
def test_the_blocks_of_two_actors_need_the_gpus_of_two(gpus):
    """Ray Data asks for as many GPUs as it finds actors in the shares of their blocks, rounded down."""
    one = ExecutionResources(gpu=gpus)
    of_two = one.scale(1 / BLOCKS_AT_ONCE).scale(2 * BLOCKS_AT_ONCE)
    assert of_two.floordiv(one).gpu == 2


def test_the_blocks_of_an_actor_may_take_all_starts_of_all_their_units():
    settings = ["sink.uri=/out", "ray.actors.batch_units=4", "run.max_attempts=3"]
    assert graph.longest_block_s(job(*settings, "model.timeout_s=600")) == 4 * 4 * 3 * 600


def test_small_limits_of_the_model_leave_time_to_load_it():
    settings = ["sink.uri=/out", "ray.actors.batch_units=1", "run.max_attempts=2"]
    assert graph.longest_block_s(job(*settings, "model.timeout_s=5")) == 1800


class _Stalled:
    def write_parquet(self, *_, **__):
        raise ExecutionTimeoutError(
            "Dataset execution made no progress for 1800s.\nOperators still running:\n  - Write"
        )


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # Ray's about its own settings
def test_a_graph_that_stands_still_ends_the_job_in_a_line(tmp_path, monkeypatch):
    stalled = job(f"sink.uri={tmp_path}", "ray.actors.num_gpus=0")
    monkeypatch.setattr(graph, "build", lambda *_: _Stalled())
    with pytest.raises(RunError, match="made no progress for 1800s") as raised:
        graph.execute(stalled, RunDirectory(stalled).open(), None)
    assert "\n" not in str(raised.value)
