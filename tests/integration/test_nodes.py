"""Nodes that die while a job runs: every unit has one row, equal to that of an undisturbed run."""

import pyarrow.parquet as pq
import pytest

from jobs.measure.soak import Tally, judge, undisturbed, write_manifest
from tests.integration import clusters
from tests.integration.jobs import committed, started, wait_for

pytestmark = pytest.mark.integration

# The model asks for a GPU, which only worker nodes declare; it runs on their CPUs.
ON_WORKERS = [
    "model.device=cpu",
    "decode.backend=tests.integration.backends:slow",
    "model.max_new_tokens=24",
    "ray.actors.num_gpus=1",
    "ray.actors.batch_units=2",
    "sink.rows_per_file=2",
]
WORKER = ("--num-cpus=1", "--num-gpus=1")


@pytest.fixture(scope="module")
def answers(tmp_path_factory):
    return undisturbed(tmp_path_factory.mktemp("undisturbed") / "videos")


def job_on(cluster, folder, *, actors):
    """The job over `folder/units.jsonl` on a cluster, with this many model actors."""
    where = [f"source.uri={folder}/units.jsonl", f"sink.uri={folder}/out"]
    pool = [f"ray.actors.min={actors}", f"ray.actors.max={actors}"]
    return started("caption", *where, *ON_WORKERS, *pool, RAY_ADDRESS=cluster.address)


def judged(folder, expected):
    """The rows of `folder/out`, checked: none is lost, doubled or another video's."""
    rows, tally = pq.read_table(folder / "out").to_pylist(), Tally()
    judge(rows, expected, tally)
    assert tally.clean, tally
    return rows


def test_lost_node_costs_no_unit(answers, tmp_path):
    expected = write_manifest(tmp_path / "units.jsonl", answers, 28)
    with clusters.fixed(num_cpus=1) as cluster:
        cluster.add_worker(*WORKER)
        doomed = cluster.add_worker(*WORKER)
        with job_on(cluster, tmp_path, actors=2) as job:
            wait_for(lambda: len(committed(tmp_path / "out")) >= 3, job)
            cluster.kill(doomed)  # without a replacement: the other node answers its units
            _, errors = job.communicate(timeout=480)
        assert job.returncode == 0, errors
    rows = judged(tmp_path, expected)
    assert len({row["actor"] for row in rows}) == 2, "both nodes' actors answered units"


def test_node_that_replaces_the_only_one_does_the_rest(answers, tmp_path):
    expected = write_manifest(tmp_path / "units.jsonl", answers, 12)
    with clusters.fixed(num_cpus=1) as cluster:
        doomed = cluster.add_worker(*WORKER)
        with job_on(cluster, tmp_path, actors=1) as job:
            wait_for(lambda: committed(tmp_path / "out"), job)
            cluster.kill(doomed)
            before = pq.read_table(tmp_path / "out").num_rows
            cluster.add_worker(*WORKER)
            _, errors = job.communicate(timeout=480)
        assert job.returncode == 0, errors
    assert before < len(judged(tmp_path, expected))
