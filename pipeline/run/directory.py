"""A run's directory: what is to be done, what is done, and the answers, under one `sink.uri`.

    uri/data/*.parquet             the rows: one per unit
    uri/_run/config.yaml           the resolved configuration
    uri/_run/run.json              run id, configuration hash, start
    uri/_run/manifest.parquet      every unit of the run
    uri/_run/open.parquet          the units this start still has to do
    uri/_run/checkpoint/           ids whose rows are committed
    uri/_run/attempts.json         units that were started and have not ended, and how often
    uri/_run/lock/                 who is running
    uri/_run/retry-N/              a repetition of error rows, in the same form
    uri/_run/summary.json          what happened
    uri/_run/samples/              units with their frames and what compression left of them
    uri/_run/report.html           the inspection page

Readers that skip names with a leading underscore (pyarrow, Spark, DuckDB's hive layout) read `uri` as one table.
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
        """Whether the units are planned already."""
        return storage.exists(self.manifest, self._config)

    def write_manifest(self, units: pa.Table) -> None:
        """Fix what this pass is to do."""
        write_table(units, self.manifest, self._config)

    def prepare(self) -> tuple[int, int]:
        """Write the units that are still open; returns (units in all, units done before)."""
        units = read_table(self.manifest, self._config)
        open_units = self._open(units)
        write_table(open_units, self.open_units, self._config)
        return units.num_rows, units.num_rows - open_units.num_rows

    def counts(self) -> tuple[int, int]:
        """Units in all, and units whose rows are committed."""
        units = read_table(self.manifest, self._config, ["id"])
        return units.num_rows, units.num_rows - self._open(units).num_rows

    def rows(
        self, columns: list[str] | dict[str, pc.Expression] | None = None, ids: pa.Array | None = None
    ) -> pa.Table:
        """The rows written so far. `columns`: these alone, by name or computed; `ids`: of these units alone."""
        wanted = None if ids is None else pc.field("id").isin(ids)
        none = ds.dataset(ROW_SCHEMA.empty_table()).to_table(columns)
        parts = self._parts(self.data_files(), ROW_SCHEMA)
        with storage.faults(self.data):
            return pa.concat_tables([none, *(part.to_table(columns, filter=wanted) for part in parts)])

    def files_of(self, ids: pa.Array) -> list[str]:
        """The URIs of the files that hold rows of these units."""
        uris = {storage.arrow_filesystem(uri, self._config)[1]: uri for uri in self.data_files()}
        found: list[str] = []
        with storage.faults(self.data):
            for part in self._parts(list(uris.values()), ROW_SCHEMA):
                rows = part.to_table(["__filename"], filter=pc.field("id").isin(ids))
                found += [uris[path] for path in rows["__filename"].unique().to_pylist()]
        return found

    def data_files(self) -> list[str]:
        """The URIs of the files that hold rows."""
        return self._files(self.data)

    def arrow_path(self, uri: str) -> tuple[Any, str]:
        """`uri` as pyarrow's filesystem and path."""
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
        """The files as data sets of some each: one data set keeps the metadata of every file it has read."""
        for start in range(0, len(uris), _FILES_AT_ONCE):
            filesystem, _ = storage.arrow_filesystem(uris[start], self._config)
            paths = [storage.arrow_filesystem(uri, self._config)[1] for uri in uris[start : start + _FILES_AT_ONCE]]
            yield ds.dataset(paths, schema=schema, format="parquet", filesystem=filesystem)

    def _files(self, folder: str) -> list[str]:
        return [e.uri for e in storage.list_files(folder, self._config, missing_ok=True) if e.uri.endswith(".parquet")]


class RunDirectory:
    """The run under `job.sink.uri`, new or found there."""

    def __init__(self, job: JobConfig) -> None:
        self.job = job
        self.uri = job.sink.uri.rstrip("/")
        self.meta = f"{self.uri}/_run"

    def lock(self) -> RunLock:
        """Keeps other jobs out for a `with` block."""
        return RunLock(f"{self.meta}/lock", self.job.storage, self.job.run.lock_timeout_s)

    def open(self) -> Work:
        """Start the run, or take it up again; raises `RunError` if another configuration wrote here."""
        found = self._read_json("run.json")
        if found is None:
            if storage.list_files(f"{self.uri}/data", self.job.storage, missing_ok=True):
                raise RunError(f"{self.uri}: holds data of no known run; choose an empty sink.uri")
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
                "prompts, clips, frames, model or lightkv differ); repeat that one, or choose another sink.uri"
            )
        return Work(self.job.storage, found["run_id"], self.meta, f"{self.uri}/data")

    def resume_only(self) -> Work:
        """The run that is there; raises `RunError` if there is none."""
        if self._read_json("run.json") is None:
            raise RunError(f"{self.uri}: holds no run; expected one that `python -m jobs.caption` wrote")
        return self.open()

    def retry(self, main: Work, number: int) -> Work:
        """The `number`-th repetition of the error rows of `main`, this run's work."""
        folder = f"{self.meta}/retry-{number}"
        return Work(self.job.storage, main.run_id, folder, f"{folder}/data")

    def has(self, name: str) -> bool:
        """Whether `_run/name` exists."""
        return storage.exists(f"{self.meta}/{name}", self.job.storage)

    def write(self, name: str, content: bytes) -> None:
        """Write `_run/name`, whole or not at all."""
        storage.write_bytes_atomic(f"{self.meta}/{name}", content, self.job.storage)

    def _read_json(self, name: str) -> dict[str, Any] | None:
        if not self.has(name):
            return None
        loaded: dict[str, Any] = json.loads(storage.read_bytes(f"{self.meta}/{name}", self.job.storage))
        return loaded


def read_table(uri: str, config: Storage, columns: list[str] | None = None) -> pa.Table:
    """A Parquet file as a table; `columns`: these alone."""
    filesystem, path = storage.arrow_filesystem(uri, config)
    with storage.faults(uri):
        return pq.read_table(path, columns=columns, filesystem=filesystem)


def write_table(table: pa.Table, uri: str, config: Storage, compression: str = "zstd") -> None:
    """A table as a Parquet file: readers see the old one or the new, never a part."""
    buffer = pa.BufferOutputStream()
    pq.write_table(table, buffer, compression=compression, row_group_size=_ROWS_PER_GROUP)
    storage.write_bytes_atomic(uri, buffer.getvalue().to_pybytes(), config)
