"""Nodes that die under a running job: every unit has one row, the one that an undisturbed run gives it."""

import subprocess
import time

import pyarrow.parquet as pq
import pytest

from jobs.soak import Tally, judge, undisturbed, write_manifest
from tests.integration import clusters
from tests.integration.jobs import ROOT, command, committed, environment

pytestmark = pytest.mark.integration

# The model asks for a GPU, which only worker nodes say they have; it runs on their CPUs.
ON_WORKERS = [
    "model.device=cpu",
    "decode.backend=tests.integration.backends:slow",
    "model.max_new_tokens=24",
    "ray.actors.num_gpus=1",
    "ray.actors.min=2",
    "ray.actors.max=2",
    "ray.actors.batch_units=2",
    "sink.rows_per_file=2",
]
WORKER = ("--num-cpus=1", "--num-gpus=1")


def test_lost_node_costs_no_unit(tmp_path):
    out = tmp_path / "out"
    expected = write_manifest(tmp_path / "units.jsonl", undisturbed(tmp_path / "videos"), 48)
    with clusters.fixed(num_cpus=1) as cluster:
        cluster.add_worker(*WORKER)
        doomed = cluster.add_worker(*WORKER)
        job = subprocess.Popen(
            command("caption", f"source.uri={tmp_path}/units.jsonl", f"sink.uri={out}", *ON_WORKERS),
            cwd=ROOT,
            env=environment(RAY_ADDRESS=cluster.address),
            stderr=subprocess.PIPE,
            text=True,
        )
        try:
            while len(committed(out)) < 3:
                assert job.poll() is None, job.stderr.read()
                time.sleep(0.1)
            cluster.kill(doomed)  # and no other comes: its units are done by the node that is left
            _, errors = job.communicate(timeout=240)
        finally:
            job.kill()
        assert job.returncode == 0, errors
    rows, tally = pq.read_table(out).to_pylist(), Tally()
    judge(rows, expected, tally)
    assert tally.clean, tally
    assert len({row["actor"] for row in rows}) == 2, "both nodes' actors answered units"
