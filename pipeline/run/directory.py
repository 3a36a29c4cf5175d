"""Reads and writes a run's directory: units, rows, and what is committed, under one `sink.uri`.

    uri/data/*.parquet             the rows: one per unit
    uri/_run/config.yaml           the resolved configuration
    uri/_run/run.json              run id, configuration hash, start
    uri/_run/manifest.parquet      every unit of the run
    uri/_run/open.parquet          the units without a row at this start
    uri/_run/checkpoint/           ids whose rows are committed
    uri/_run/attempts.json         starts per unit that has no row yet
    uri/_run/lock/                 the job that is running
    uri/_run/retry-N/              the N-th retry of error rows, with the same files
    uri/_run/summary.json          counts, times and errors
    uri/_run/samples/              units with some frames and their surviving tokens
    uri/_run/report.html           the report page

Readers that ignore names with a leading underscore (pyarrow, Spark, DuckDB's hive layout) read `uri` as one table.
"""

import datetime
import json
import secrets
from collections.abc import Iterator
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.dataset as ds
import pyarrow.parquet as pq

from pipeline.config import JobConfig, Storage
from pipeline.errors import RunError
from pipeline.run.lock import RunLock
from pipeline.schema import ROW_SCHEMA
from pipeline.storage import files as storage

_FILES_AT_ONCE = 256
_ROWS_PER_GROUP = 100_000


class Work:
    """One pass over units: its manifest, its rows, and the ids whose rows are committed."""

    def __init__(self, config: Storage, run_id: str, folder: str, data: str) -> None:
        self.run_id = run_id
        self.data = data
        self.manifest = f"{folder}/manifest.parquet"
        self.open_units = f"{folder}/open.parquet"
        self.checkpoint = f"{folder}/checkpoint"
        self.attempts = f"{folder}/attempts.json"
        self._config = config

    def has_manifest(self) -> bool:
        """Whether the units are already planned."""
        return storage.exists(self.manifest, self._config)

    def write_manifest(self, units: pa.Table) -> None:
        """Write the units of this pass."""
        write_table(units, self.manifest, self._config)

    def prepare(self) -> tuple[int, int]:
        """Write `open.parquet`, the units without a row; return (all units, units already done)."""
        units = read_table(self.manifest, self._config)
        open_units = self._open(units)
        write_table(open_units, self.open_units, self._config)
        return units.num_rows, units.num_rows - open_units.num_rows

    def counts(self) -> tuple[int, int]:
        """(all units, units whose rows are committed)."""
        units = read_table(self.manifest, self._config, ["id"])
        return units.num_rows, units.num_rows - self._open(units).num_rows

    def rows(
        self, columns: list[str] | dict[str, pc.Expression] | None = None, ids: pa.Array | None = None
    ) -> pa.Table:
        """The rows written so far: only `columns`, by name or computed, and only of the units `ids`."""
        wanted = None if ids is None else pc.field("id").isin(ids)
        none = ds.dataset(ROW_SCHEMA.empty_table()).to_table(columns)
        parts = self._parts(self.data_files(), ROW_SCHEMA)
        with storage.faults(self.data):
            return pa.concat_tables([none, *(part.to_table(columns, filter=wanted) for part in parts)])

    def files_of(self, ids: pa.Array) -> list[str]:
        """The URIs of the data files with rows of these units."""
        uris = {storage.arrow_filesystem(uri, self._config)[1]: uri for uri in self.data_files()}
        found: list[str] = []
        with storage.faults(self.data):
            for part in self._parts(list(uris.values()), ROW_SCHEMA):
                rows = part.to_table(["__filename"], filter=pc.field("id").isin(ids))
                found += [uris[path] for path in rows["__filename"].unique().to_pylist()]
        return found

    def data_files(self) -> list[str]:
        """The URIs of all data files."""
        return self._files(self.data)

    def arrow_path(self, uri: str) -> tuple[Any, str]:
        """pyarrow's file system for `uri`, and the path in it."""
        return storage.arrow_filesystem(uri, self._config)

    def _open(self, units: pa.Table) -> pa.Table:
        return units.filter(pc.invert(pc.is_in(units["id"], value_set=self._done_ids())))

    def _done_ids(self) -> pa.Array:
        committed = [uri for uri in self._files(self.checkpoint) if not uri.endswith(".pending.parquet")]
        parts = self._parts(committed, pa.schema([("id", pa.string())]))
        with storage.faults(self.checkpoint):
            ids = [part.to_table()["id"].combine_chunks() for part in parts]
        return pa.concat_arrays([pa.array([], pa.string()), *ids])

    def _parts(self, uris: list[str], schema: pa.Schema) -> Iterator[ds.Dataset]:
        """The files as datasets of at most `_FILES_AT_ONCE`: a dataset keeps the metadata of every file it read."""
        for start in range(0, len(uris), _FILES_AT_ONCE):
            filesystem, _ = storage.arrow_filesystem(uris[start], self._config)
            paths = [storage.arrow_filesystem(uri, self._config)[1] for uri in uris[start : start + _FILES_AT_ONCE]]
            yield ds.dataset(paths, schema=schema, format="parquet", filesystem=filesystem)

    def _files(self, folder: str) -> list[str]:
        return [e.uri for e in storage.list_files(folder, self._config, missing_ok=True) if e.uri.endswith(".parquet")]


class RunDirectory:
    """The run under `job.sink.uri`, new or existing."""

    def __init__(self, job: JobConfig) -> None:
        self.job = job
        self.uri = job.sink.uri.rstrip("/")
        self.meta = f"{self.uri}/_run"

    def lock(self) -> RunLock:
        """A context manager that locks the run for this job."""
        return RunLock(f"{self.meta}/lock", self.job.storage, self.job.run.lock_timeout_s)

    def open(self) -> Work:
        """Start or resume the run. Raises `RunError` if another configuration wrote here."""
        found = self._read_json("run.json")
        if found is None:
            if storage.list_files(f"{self.uri}/data", self.job.storage, missing_ok=True):
                raise RunError(
                    f"{self.uri}: expected a run or an empty folder, got data of no run; choose an empty sink.uri"
                )
            now = datetime.datetime.now(datetime.UTC)
            found = {
                "run_id": f"{now:%Y%m%d-%H%M%S}-{secrets.token_hex(3)}",
                "config_hash": self.job.hash(),
                "started": now.isoformat(timespec="seconds"),
            }
            self.write("config.yaml", self.job.to_yaml().encode())
            self.write("run.json", json.dumps(found).encode())
        elif found["config_hash"] != self.job.hash():
            raise RunError(
                f"{self.uri}: holds run {found['run_id']} of another configuration (see _run/config.yaml: source, "
                "prompts, clips, frames, model or lightkv differ); use that configuration, or choose another sink.uri"
            )
        return Work(self.job.storage, found["run_id"], self.meta, f"{self.uri}/data")

    def resume_only(self) -> Work:
        """Resume the existing run. Raises `RunError` if there is none."""
        if self._read_json("run.json") is None:
            raise RunError(f"{self.uri}: holds no run; expected one that `python -m jobs.caption` wrote")
        return self.open()

    def retry(self, main: Work, number: int) -> Work:
        """The `number`-th retry of the error rows of `main`."""
        folder = f"{self.meta}/retry-{number}"
        return Work(self.job.storage, main.run_id, folder, f"{folder}/data")

    def has(self, name: str) -> bool:
        """Whether `_run/name` exists."""
        return storage.exists(f"{self.meta}/{name}", self.job.storage)

    def write(self, name: str, content: bytes) -> None:
        """Write `_run/name` atomically."""
        storage.write_bytes_atomic(f"{self.meta}/{name}", content, self.job.storage)

    def _read_json(self, name: str) -> dict[str, Any] | None:
        if not self.has(name):
            return None
        loaded: dict[str, Any] = json.loads(storage.read_bytes(f"{self.meta}/{name}", self.job.storage))
        return loaded


def read_table(uri: str, config: Storage, columns: list[str] | None = None) -> pa.Table:
    """Read a Parquet file, all of it or only `columns`."""
    filesystem, path = storage.arrow_filesystem(uri, config)
    with storage.faults(uri):
        return pq.read_table(path, columns=columns, filesystem=filesystem)


def write_table(table: pa.Table, uri: str, config: Storage, compression: str = "zstd") -> None:
    """Write a table as a Parquet file, atomically."""
    buffer = pa.BufferOutputStream()
    pq.write_table(table, buffer, compression=compression, row_group_size=_ROWS_PER_GROUP)
    storage.write_bytes_atomic(uri, buffer.getvalue().to_pybytes(), config)
