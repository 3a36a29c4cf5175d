"""The stub model gives rows with the same form as the real one."""

from jobs.measure.scale import StubCaptioner
from pipeline.config import load_config
from pipeline.schema import rows_table
from tests.pipeline.rows import units


def test_rows_of_the_stub_fit_the_schema():
    job = load_config(None, ["source.uri=/videos", "sink.uri=/out"])
    captioner = StubCaptioner(job, "run")
    (unit,) = units("a").to_pylist()
    (row,) = rows_table([captioner.row(unit, ())]).to_pylist()
    assert (row["id"], row["run_id"], row["status"], row["attempts"]) == ("a", "run", "ok", 1)
