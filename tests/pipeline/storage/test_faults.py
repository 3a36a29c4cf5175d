"""Tests of storage faults: transient ones are retried; lasting ones raise an error that names the file."""

import os
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.config import Storage
from pipeline.decoding.media import Media
from pipeline.errors import UnitError
from pipeline.storage import files as st
from pipeline.storage import s3
from tests.faults import Rule, proxy
from tests.s3 import CREDENTIALS, server

CONTENT = os.urandom(300_000)
TABLE = pa.table({"x": list(range(10_000))})
ATTEMPTS = 3


@pytest.fixture(scope="module")
def whole():
    """A server without faults, with one file per reading operation."""
    with server("videos") as storage:
        for name in ("read", "copy", "range", "stat", "list/file"):
            st.write_bytes_atomic(f"s3://videos/{name}", CONTENT, storage)
        pq.write_table(TABLE, "videos/arrow-read", filesystem=st.arrow_filesystem("s3://videos", storage)[0])
        yield storage


@pytest.fixture(scope="module")
def behind_proxy(whole):
    """A proxy in front of the server, and the configuration that uses it."""
    with proxy(whole.endpoint_url) as broken:
        yield broken, Storage(endpoint_url=broken.endpoint_url, region="us-east-1", max_attempts=ATTEMPTS, timeout_s=10)


@pytest.fixture
def faulty(behind_proxy, monkeypatch):
    """The proxy without rules, with short pauses between attempts."""
    monkeypatch.setattr(s3, "_PAUSE_S", 0.01)
    behind_proxy[0].rules, behind_proxy[0].hits = [], 0
    return behind_proxy


def _copied(uri, storage):
    with closing(Media(uri, storage)) as media, open(media.local_path(1 << 30), "rb") as file:
        return file.read() == CONTENT


def _ranged(uri, storage):
    with closing(Media(uri, storage)) as media:
        file = media.ranged()
        file.seek(len(CONTENT) - 5000)
        found = file.read()
        media.check()
        return found == CONTENT[-5000:]


def _written(uri, storage):
    st.write_bytes_atomic(uri, CONTENT, storage)
    return True


def _arrow_read(uri, storage):
    filesystem, path = st.arrow_filesystem(uri, storage)
    with st.faults(uri):
        return pq.read_table(path, filesystem=filesystem).equals(TABLE)


def _arrow_written(uri, storage):
    filesystem, path = st.arrow_filesystem(uri, storage)
    with st.faults(uri):
        pq.write_table(TABLE, path, filesystem=filesystem)
    return True


# object name → the request that fails, and the operation, which must return True
OURS = {
    "read": ("GET", lambda uri, storage: st.read_bytes(uri, storage) == CONTENT),
    "copy": ("GET", _copied),
    "range": ("GET", _ranged),
    "stat": ("HEAD", lambda uri, storage: st.stat(uri, storage).size_bytes == len(CONTENT)),
    "list": ("GET", lambda uri, storage: [e.size_bytes for e in st.list_files(uri, storage)] == [len(CONTENT)]),
    "write": ("PUT", _written),
    "create": ("PUT", lambda uri, storage: st.create_exclusive(uri, b"owner", storage)),
    "delete": ("DELETE", lambda uri, storage: st.delete(uri, storage) is None),
}
ARROWS = {"arrow-read": ("GET", _arrow_read), "arrow-write": ("PUT", _arrow_written)}


def rules(operations, fault, times=None):
    """One rule per operation, for its own object only; a listing has its folder in the query."""
    return [
        Rule(fault, method, f"videos/{name}($|[?])|prefix={name}", times) for name, (method, _) in operations.items()
    ]


def ask_all(operations, storage):
    """The result or error of each operation, run concurrently."""

    def ask(name, operation):
        try:
            return operation(f"s3://videos/{name}", storage)
        except (st.StorageError, UnitError) as error:
            return error

    with ThreadPoolExecutor(len(operations)) as pool:
        asked = {name: pool.submit(ask, name, operation) for name, (_, operation) in operations.items()}
        return {name: answer.result() for name, answer in asked.items()}


@pytest.mark.parametrize("fault", ["slow_down", "internal_error", "drop", "lost", "reset", "truncate"])
def test_faults_that_pass_are_not_noticed(faulty, whole, fault):
    broken, storage = faulty
    operations = OURS | ARROWS
    broken.rules = rules(OURS, fault, times=ATTEMPTS - 1) + rules(ARROWS, fault, times=1)
    assert ask_all(operations, storage) == dict.fromkeys(operations, True)
    assert broken.hits == sum(ATTEMPTS - 1 for _ in OURS) + len(ARROWS)
    assert st.read_bytes("s3://videos/write", whole) == CONTENT
    assert st.read_bytes("s3://videos/create", whole) == b"owner"
    st.delete("s3://videos/create", whole)


def test_a_server_that_falls_silent_is_asked_again(faulty):
    broken, storage = faulty
    readers = {name: OURS[name] for name in ("read", "copy", "range", "list")}
    broken.rules = rules(readers, "stall", times=1)
    assert ask_all(readers, storage.model_copy(update={"timeout_s": 2.0})) == dict.fromkeys(readers, True)
    assert broken.hits == len(readers)


@pytest.mark.parametrize(
    ("fault", "kind"),
    [
        ("slow_down", "Unavailable"),
        ("internal_error", "Unavailable"),
        ("drop", "Unreachable"),
        ("reset", "Unreachable"),
        ("truncate", "Unreachable"),
    ],
)
def test_faults_that_last_end_in_an_error_that_names_the_file(faulty, fault, kind):
    broken, storage = faulty
    operations = OURS | ARROWS
    broken.rules = rules(operations, fault)
    for name, error in ask_all(operations, storage).items():
        assert isinstance(error, (st.StorageError, UnitError)), f"{name}: expected an error, got {error}"
        assert (name, error.error_type if isinstance(error, UnitError) else error.kind) == (name, kind)
        assert f"s3://videos/{name}" in str(error)
        assert CREDENTIALS["AWS_SECRET_ACCESS_KEY"] not in str(error)
        assert "\n" not in str(error)


def test_a_request_is_tried_as_often_as_configured(faulty):
    broken, storage = faulty
    broken.rules = [Rule("slow_down")]
    for ask in (st.read_bytes, st.list_files):
        broken.requests = 0
        with pytest.raises(st.StorageError):
            ask("s3://videos/read", storage)
        assert broken.requests == ATTEMPTS


def test_refusals_are_not_tried_again(faulty):
    broken, storage = faulty
    for ask, requests in ((st.read_bytes, 1), (st.stat, 2)):  # stat also looks for a folder of that name
        broken.requests = 0
        with pytest.raises(st.StorageError, match="no such file"):
            ask("s3://videos/absent", storage)
        assert broken.requests == requests


def test_an_answer_that_claims_to_be_whole_is_measured(faulty):
    """A body that a proxy truncates, with matching headers, is detected by copy and by range."""
    broken, storage = faulty
    readers = {name: OURS[name] for name in ("copy", "range")}
    broken.rules = rules(readers, "short", times=1)
    assert ask_all(readers, storage) == dict.fromkeys(readers, True)
    broken.rules = rules(readers, "short")
    for error in ask_all(readers, storage).values():
        assert (error.stage, error.error_type) == ("fetch", "Unreachable")
        assert "truncated" in str(error)


def test_a_lock_file_whose_answer_was_lost_is_ones_own(faulty, whole):
    broken, storage = faulty
    broken.rules = [Rule("lost", "PUT", times=1)]
    assert st.create_exclusive("s3://videos/mine", b"me", storage)
    broken.rules = [Rule("lost", "PUT", times=1)]
    assert not st.create_exclusive("s3://videos/mine", b"other", storage)
    assert st.read_bytes("s3://videos/mine", whole) == b"me"


def test_a_listing_of_one_level_does_not_hide_an_error(faulty):
    broken, storage = faulty
    broken.rules = [Rule("slow_down")]
    with pytest.raises(st.StorageError) as caught:
        st.list_files("s3://videos/list", storage, recursive=False)
    assert caught.value.kind == "Unavailable"


def test_an_object_that_is_replaced_is_never_mixed_with_its_old_content(faulty, whole):
    _, storage = faulty
    st.write_bytes_atomic("s3://videos/replaced", CONTENT, whole)
    with closing(Media("s3://videos/replaced", storage)) as media:
        st.write_bytes_atomic("s3://videos/replaced", CONTENT[::-1], whole)
        for read in (media.read, media.head, lambda: media.local_path(1 << 30)):
            with pytest.raises(UnitError) as caught:
                read()
            assert (caught.value.stage, caught.value.error_type) == ("fetch", "Changed")
