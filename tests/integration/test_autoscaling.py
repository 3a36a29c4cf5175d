"""A cluster that grows for a job's backlog and shrinks afterwards; nodes are processes on this machine."""

import time

import pyarrow.parquet as pq
import pytest

from jobs.measure.soak import Tally, judge, undisturbed, write_manifest
from tests.integration import clusters
from tests.integration.jobs import started

pytestmark = pytest.mark.integration

# One model actor per node: it needs a GPU, which only worker nodes declare. Worker nodes declare no CPUs, so decode
# tasks never cause a new one. The head's two decoders decode two units per second, however fast the machine is.
POOL = [
    "model.device=cpu",
    "decode.backend=tests.integration.backends:slow",
    "model.max_new_tokens=24",
    "ray.actors.num_gpus=1",
    "ray.actors.min=1",
    "ray.actors.max=2",
    "ray.actors.batch_units=1",
    "sink.rows_per_file=2",
]


def test_nodes_come_for_a_backlog_and_go_when_idle(tmp_path):
    out = tmp_path / "out"
    expected = write_manifest(tmp_path / "units.jsonl", undisturbed(tmp_path / "videos"), 100)
    often = {"RAY_DATA_MIN_GAP_BETWEEN_AUTOSCALING_REQUESTS": "3"}  # s; 10 otherwise
    with clusters.autoscaling(head_cpus=2, worker={"GPU": 1}, most=2, idle_s=5) as cluster:
        where = [f"source.uri={tmp_path}/units.jsonl", f"sink.uri={out}"]
        with started("caption", *where, *POOL, RAY_ADDRESS=cluster.address, **often) as job:
            counts = [len(cluster.nodes())]
            while job.poll() is None:
                counts.append(len(cluster.nodes()))
                time.sleep(0.5)
        assert job.returncode == 0, job.stderr.read()
        assert (counts[0], max(counts)) == (1, 3), "the head, and a node for each of the pool's actors"
        cluster.wait_for_nodes(1)
    rows, tally = pq.read_table(out).to_pylist(), Tally()
    judge(rows, expected, tally)
    assert tally.clean, tally
    assert len({row["actor"] for row in rows}) == 2, "the actors of both nodes answered units"
