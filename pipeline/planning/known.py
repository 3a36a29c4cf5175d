"""Reads from earlier runs which units have a row and which videos were probed, so that a plan skips both.

A unit is identified by a 128-bit digest of its uris, etag, size, window and prompts. A manifest's ids do not count, nor
do model and frames: write the answers of another model to another folder. Reads every run's manifest and three columns
of its rows once. Takes 20 bytes of memory per known unit and, with `source.probe`, one row per known video.
"""

import hashlib
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.dataset as ds
import pyarrow.parquet as pq

from pipeline.config import JobConfig, Storage
from pipeline.errors import SourceError
from pipeline.planning.probe import Probe
from pipeline.planning.sources import Item
from pipeline.schema import ROW_SCHEMA, UNIT_SCHEMA
from pipeline.storage import files as st

_MANIFEST = "/_run/manifest.parquet"
_PENDING = ".pending.parquet"
_ASKED = ["id", "uris", "etag", "size_bytes", "start_s", "end_s", "prompts"]
_PROBED = ["uri", "etag", "size_bytes", "duration_s", "width", "height", "fps", "codec"]
_PROBES = pa.schema([("uri", pa.string()), *(UNIT_SCHEMA.field(name) for name in _PROBED[1:])])
_ANSWERED = np.iinfo(np.int32).max  # stored as attempts of a row without an error
_BATCH_ROWS = 65_536
_RUNS_AT_ONCE = 8
_UNIT, _FIELD = "\x1e", "\x1f"  # separators that occur in no uri or prompt


@dataclass(frozen=True)
class _Run:
    uri: str
    data: list[str]  # data files with committed rows only


class Known:
    """The known units and probes of all runs under one folder; empty if the folder has none."""

    def __init__(self, config: JobConfig, folder: str) -> None:
        """Read all runs under `folder`. Raises `SourceError` if the folder or a run in it cannot be read."""
        self._storage, self._workers = config.storage, config.source.probe_workers
        self._enough = config.source.known_attempts
        runs = _runs(folder, config.storage)
        self.runs = len(runs)
        with ThreadPoolExecutor(_RUNS_AT_ONCE) as pool:
            read = list(pool.map(lambda run: _read(run, config.storage, probes=config.source.probe), runs))
        digests = np.concatenate([_no_digests(), *(one[0] for one in read)])
        tries = np.concatenate([np.zeros(0, np.int32), *(one[1] for one in read)])
        order, starts = _groups(digests)
        self._units = digests[order[starts]]
        self._tries = np.maximum.reduceat(tries[order], starts) if len(starts) else tries
        probes = pa.concat_tables([_PROBES.empty_table(), *(one[2] for one in read)])
        latest, self._uris = _latest(probes)
        self._probes = probes.take(latest)

    def open(self, units: pa.Table) -> pa.Table:
        """The rows of `units` (UNIT_SCHEMA) that still have to run, with the attempts of earlier runs."""
        place = _find(self._units, _digests(_asked(units)))
        tries = np.where(place >= 0, self._tries[place], 0) if len(self._units) else np.zeros(len(units), np.int32)
        fresh = tries < self._enough
        position = UNIT_SCHEMA.get_field_index("attempts")
        column = pa.array(tries[fresh].astype(np.int32))
        return units.filter(pa.array(fresh)).set_column(position, UNIT_SCHEMA.field("attempts"), column)

    def probes(self, items: Sequence[Item]) -> dict[str, Probe]:
        """URI → probe of the videos whose etag has not changed since an earlier run probed them."""
        videos = [item for item in items if item.kind == "video"]
        place = _find(self._uris, _digests(pa.array([item.uris[0] for item in videos], pa.string())))
        seen = self._probes.take(pa.array(place[place >= 0])).to_pylist()
        pairs = list(zip((videos[i] for i in np.flatnonzero(place >= 0)), seen, strict=True))
        with ThreadPoolExecutor(self._workers) as pool:
            now = list(pool.map(lambda pair: self._etag(pair[0]), pairs))
        return {
            row["uri"]: Probe(**row)
            for (item, row), etag in zip(pairs, now, strict=True)
            if item.uris[0] == row["uri"] and etag == row["etag"]
        }

    def _etag(self, item: Item) -> str | None:
        if item.entry is not None:
            return item.entry.etag
        try:
            return st.stat(item.uris[0], self._storage).etag
        except st.StorageError:  # the probe reports it
            return None


def _runs(folder: str, storage: Storage) -> list[_Run]:
    """Every run in `folder` and below, sorted by name, without data files whose commit is pending."""
    manifests: list[str] = []
    data: dict[str, list[str]] = {}
    pending: dict[str, list[str]] = {}
    for entry in st.list_files(folder, storage, missing_ok=True):
        if entry.uri.endswith(_MANIFEST):
            manifests.append(entry.uri.removesuffix(_MANIFEST))
        elif entry.uri.endswith(_PENDING):
            run, _, name = entry.uri.removesuffix(_PENDING).rpartition("/_run/checkpoint/")
            pending.setdefault(run, []).append(f"{run}/data/{name}")
        elif entry.uri.endswith(".parquet") and entry.uri.split("/")[-2] == "data":
            data.setdefault(entry.uri.rsplit("/", 2)[0], []).append(entry.uri)
    return [
        _Run(run, [uri for uri in data.get(run, []) if not uri.startswith(tuple(pending.get(run, [])))])
        for run in manifests
    ]


def _read(run: _Run, storage: Storage, *, probes: bool) -> tuple[np.ndarray, np.ndarray, pa.Table]:
    """Digests of the run's units with a row, their attempts, and the run's probed videos."""
    digests, tries, probed = [_no_digests()], [np.zeros(0, np.int32)], [_PROBES.empty_table()]
    try:
        rows = _rows(run, storage)
        ids, attempts = rows["id"].combine_chunks(), rows["attempts"].combine_chunks()
        for units in _manifest(run, storage, [*_ASKED, *(["kind", "probe_error", *_PROBED[3:]] if probes else [])]):
            place = pc.index_in(units["id"], value_set=ids)
            done = pc.is_valid(place)
            digests.append(_digests(_asked(units.filter(done))))
            tries.append(attempts.take(place.drop_null()).to_numpy().astype(np.int32))
            if probes:
                probed.append(_probed(units))
    except (pa.ArrowException, OSError) as error:
        raise SourceError(f"source.known: cannot read run {run.uri} ({' '.join(str(error).split())[:200]})") from error
    return np.concatenate(digests), np.concatenate(tries), pa.concat_tables(probed)


def _rows(run: _Run, storage: Storage) -> pa.Table:
    """`id` and `attempts` of the run's rows; the attempts of rows without an error are `_ANSWERED`."""
    if not run.data:
        return ROW_SCHEMA.empty_table().select(["id", "attempts"])
    filesystem, _ = st.arrow_filesystem(run.uri, storage)
    paths = [st.arrow_filesystem(uri, storage)[1] for uri in run.data]
    dataset = ds.dataset(paths, schema=ROW_SCHEMA, format="parquet", filesystem=filesystem)
    failed = pc.equal(ds.field("status"), "error")
    attempts = pc.if_else(failed, ds.field("attempts"), pa.scalar(_ANSWERED, pa.int32()))
    return dataset.to_table({"id": ds.field("id"), "attempts": attempts}, fragment_readahead=32)


def _manifest(run: _Run, storage: Storage, columns: list[str]) -> Iterator[pa.Table]:
    filesystem, path = st.arrow_filesystem(run.uri + _MANIFEST, storage)
    with filesystem.open_input_file(path) as source:
        for batch in pq.ParquetFile(source).iter_batches(_BATCH_ROWS, columns=columns):
            yield pa.Table.from_batches([batch])


def _probed(units: pa.Table) -> pa.Table:
    """The videos of `units` that were probed without an error, each once."""
    good = pc.and_(
        pc.equal(units["kind"], "video"), pc.and_(pc.is_null(units["probe_error"]), pc.is_valid(units["etag"]))
    )
    units = units.filter(pc.and_(good, pc.is_valid(units["width"])))
    table = pa.table([pc.list_element(units["uris"], 0), *(units[name] for name in _PROBED[1:])], schema=_PROBES)
    return table.take(_latest(table)[0])


def _latest(probes: pa.Table) -> tuple[np.ndarray, np.ndarray]:
    """Per URI the index of its last row, and the URI's digest, sorted by digest."""
    digests = _digests(probes["uri"])
    order, starts = _groups(digests)
    ends = np.append(starts[1:], len(order)) - 1 if len(starts) else starts
    return order[ends], digests[order[starts]]


def _asked(units: pa.Table) -> pa.ChunkedArray:
    """The identity of each unit as one string: uris, etag, size, window and prompts."""
    prompts = units["prompts"].combine_chunks()
    pairs = prompts.values
    questions = pc.binary_join_element_wise(pairs.field("prompt_id"), pairs.field("prompt"), _FIELD)
    parts = [
        pc.binary_join(units["uris"], _FIELD),
        *(pc.coalesce(pc.cast(units[name], pa.string()), "") for name in ("etag", "size_bytes", "start_s", "end_s")),
        pc.binary_join(pa.ListArray.from_arrays(prompts.offsets, questions), _FIELD),
    ]
    return pc.binary_join_element_wise(*parts, _UNIT)


def _digests(texts: pa.Array | pa.ChunkedArray) -> np.ndarray:
    """A 128-bit hash of every string, as uint64 [N, 2]."""
    whole = b"".join(hashlib.blake2b(text.encode(), digest_size=16).digest() for text in texts.to_pylist())
    return np.frombuffer(whole, np.uint64).reshape(-1, 2)


def _no_digests() -> np.ndarray:
    return np.zeros((0, 2), np.uint64)


def _groups(digests: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """A stable sort order of the digests, and the index in it where each distinct digest starts."""
    order = np.lexsort((digests[:, 1], digests[:, 0]))
    ordered = digests[order]
    new = np.ones(len(order), bool)
    new[1:] = (ordered[1:] != ordered[:-1]).any(axis=1)
    return order, np.flatnonzero(new)


def _find(known: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    """The index of each digest in `known` (sorted, distinct); −1 if it is not known.

    Of known digests with an equal first half only the first is found; the other counts as new. With a million units
    this happens once in 10⁷ runs.
    """
    if not len(known):
        return np.full(len(wanted), -1)
    place = np.minimum(np.searchsorted(known[:, 0], wanted[:, 0]), len(known) - 1)
    return np.where((known[place] == wanted).all(axis=1), place, -1)
