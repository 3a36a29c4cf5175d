"""Which units the graph passes to an actor in one call."""

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import ray

from pipeline.cluster.connect import connect
from pipeline.cluster.graph import build
from pipeline.config import load_config
from pipeline.planning.plan import plan_units
from pipeline.run.directory import RunDirectory

pytestmark = pytest.mark.integration


class _Tasks:
    """Returns, instead of rows, each call's task and number of units."""

    def __init__(self, *_):
        pass

    def __call__(self, batch):
        return pa.table({"task": [ray.get_runtime_context().get_task_id()], "units": [batch.num_rows]})


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")  # Ray's about its own settings
def test_a_block_that_is_not_full_does_not_wait_for_another(tmp_path):
    """With two blocks in one task an actor would get the second only after it has returned the first one's rows."""
    manifest = tmp_path / "units.parquet"
    pq.write_table(pa.table({"uri": [f"{number}.mp4" for number in range(401)]}), manifest)
    settings = [f"source.uri={manifest}", f"sink.uri={tmp_path / 'out'}", "ray.num_cpus=2", "ray.actors.num_gpus=0"]
    job = load_config(None, [*settings, "ray.actors.batch_units=2", "source.probe=false"])
    work = RunDirectory(job).open()
    work.write_manifest(plan_units(job))
    work.prepare()
    with connect(job):
        calls = build(job, work, None, _Tasks).take_all()
    assert sorted(call["units"] for call in calls) == [1] + [2] * 200
    assert len({call["task"] for call in calls}) == len(calls)
