"""Retries the units with error rows of a run, and replaces those rows with the new ones.

Every data file with a retried unit is rewritten and replaced atomically under its own name. The output has exactly one
row per unit at any time, also after a kill.
"""

from concurrent.futures import ThreadPoolExecutor

import pyarrow as pa
import pyarrow.compute as pc

from pipeline.run.directory import RunDirectory, Work, read_table, write_table
from pipeline.schema import UNIT_SCHEMA

_FILES_AT_ONCE = 8


def open_retry(run: RunDirectory, main: Work) -> tuple[int, Work]:
    """The retry to run, and its number: an unfinished one, else a new one of the current error rows."""
    number = 1
    while run.has(f"retry-{number}/merged"):
        number += 1
    work = run.retry(main, number)
    if not work.has_manifest():
        failed = main.rows(["id", "status", "attempts"])
        failed = failed.filter(pc.equal(failed["status"], "error"))
        work.write_manifest(_units_again(read_table(main.manifest, run.job.storage), failed))
    return number, work


def merge_rows(run: RunDirectory, main: Work, number: int) -> int:
    """Replace retried rows in the run's data files; return how many. Idempotent."""
    job, work = run.job, run.retry(main, number)
    repeated = work.rows()

    def renew(uri: str) -> None:
        old = read_table(uri, job.storage)
        fresh = repeated.filter(pc.is_in(repeated["id"], value_set=old["id"].combine_chunks()))
        kept = old.filter(pc.invert(pc.is_in(old["id"], value_set=fresh["id"].combine_chunks())))
        whole = pa.concat_tables([kept, fresh.cast(kept.schema)])
        write_table(whole, uri, job.storage, job.sink.compression)

    with ThreadPoolExecutor(_FILES_AT_ONCE) as pool:
        list(pool.map(renew, main.files_of(repeated["id"].combine_chunks())))
    run.write(f"retry-{number}/merged", b"")
    return repeated.num_rows


def _units_again(manifest: pa.Table, failed: pa.Table) -> pa.Table:
    units = manifest.filter(pc.is_in(manifest["id"], value_set=failed["id"].combine_chunks()))
    attempts = dict(zip(failed["id"].to_pylist(), failed["attempts"].to_pylist(), strict=True))
    column = pa.array([attempts[id_] for id_ in units["id"].to_pylist()], pa.int32())
    position = UNIT_SCHEMA.get_field_index("attempts")
    return units.set_column(position, UNIT_SCHEMA.field("attempts"), column)
