"""The module that every worker process of a job imports, and its clean-up of checkpoints."""

import subprocess
import sys

import pyarrow.fs
import pytest
from ray.data import DataContext
from ray.data.checkpoint import CheckpointConfig

from pipeline.cluster.ray_hooks import CleanOnly


def test_worker_processes_import_no_model_library():
    code = (
        "import sys, pipeline.cluster.ray_hooks; print(sorted({'torch', 'transformers', 'lightkv'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True)
    assert done.stdout == "[]\n"


@pytest.mark.parametrize("there", [True, False])
def test_a_commit_that_ended_between_copy_and_deletion_is_finished_not_undone(tmp_path, monkeypatch, there):
    """Object stores rename by copy and delete: a pending name next to the committed one must not cost data."""
    for name in ("a.parquet", "a.pending.parquet", "b.pending.parquet", "c.parquet") if there else ():
        (tmp_path / name).touch()
    config = CheckpointConfig("id", str(tmp_path), override_filesystem=pyarrow.fs.LocalFileSystem())
    manager = CleanOnly(config, DataContext.get_current())
    left = []
    clean = "_clean_pending_checkpoints"  # Ray's, a task on a cluster: it deletes the data of what is pending
    monkeypatch.setattr(manager, clean, lambda *_: left.extend(sorted(path.name for path in tmp_path.iterdir())))
    assert manager.load_checkpoint("data") == (None, 0)
    assert left == (["a.parquet", "b.pending.parquet", "c.parquet"] if there else [])
