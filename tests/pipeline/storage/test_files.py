"""Tests of storage: local files and S3 behave the same, and errors are one line."""

import pickle
import threading
from pathlib import Path

import pyarrow.fs
import pytest

from pipeline.config import Storage
from pipeline.storage import files as st
from tests.s3 import server


@pytest.fixture(scope="module")
def bucket():
    with server("videos") as storage:
        yield storage


@pytest.fixture(params=["local", "file", "s3"])
def place(request, tmp_path):
    """The URI of a folder that does not exist yet, and its storage configuration."""
    if request.param == "s3":
        name = request.node.name.replace("[", "-").replace("]", "")
        return f"s3://videos/{name}", request.getfixturevalue("bucket")
    base = tmp_path / "new folder"
    return (base.as_uri() if request.param == "file" else str(base)), Storage()


def test_what_is_written_is_read_back_and_replaced_whole(place):
    base, storage = place
    uri = st.join(base, "a", "b.bin")
    assert not st.exists(uri, storage)
    st.write_bytes_atomic(uri, b"first", storage)
    st.write_bytes_atomic(uri, b"second", storage)
    assert st.read_bytes(uri, storage) == b"second"
    assert st.exists(uri, storage)
    assert st.is_folder(base, storage)
    assert not st.is_folder(uri, storage)
    assert [entry.size_bytes for entry in st.list_files(base, storage)] == [6]


def test_listing_is_sorted_and_recursive_only_when_asked(place):
    base, storage = place
    for name in ("z.txt", "a/y.txt", "b #?[1]*.txt"):
        st.write_bytes_atomic(st.join(base, name), name.encode(), storage)
    found = [entry.uri for entry in st.list_files(base, storage)]
    assert [uri.split("/")[-1] for uri in found] == ["y.txt", "b #?[1]*.txt", "z.txt"]
    assert all(st.read_bytes(uri, storage).decode().endswith(uri.split("/")[-1]) for uri in found)
    flat = [entry.uri.split("/")[-1] for entry in st.list_files(base, storage, recursive=False)]
    assert flat == ["b #?[1]*.txt", "z.txt"]


def test_numbered_files_are_found_in_order_and_others_passed_over(place):
    base, storage = place
    assert st.numbered(base, storage) == []
    for name in ("00010.json", "00009.json", "00011.json.tmp", "x.json", "00012.txt"):
        st.write_bytes_atomic(st.join(base, name), b"{}", storage)
    assert st.numbered(base, storage) == [9, 10]


def test_an_etag_changes_with_the_content(place):
    base, storage = place
    uri = st.join(base, "x")
    st.write_bytes_atomic(uri, b"one", storage)
    before = st.stat(uri, storage)
    assert st.stat(uri, storage) == before
    assert st.list_files(base, storage)[0].etag == before.etag
    st.write_bytes_atomic(uri, b"three", storage)
    after = st.stat(uri, storage)
    assert (before.size_bytes, after.size_bytes) == (3, 5)
    assert after.etag != before.etag


def test_exclusive_creation_has_one_winner(place):
    base, storage = place
    uri = st.join(base, "lock")
    won = []

    def contend(i: int) -> None:
        if st.create_exclusive(uri, f"owner {i}".encode(), storage):
            won.append(i)

    threads = [threading.Thread(target=contend, args=(i,)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(won) == 1
    assert st.read_bytes(uri, storage) == f"owner {won[0]}".encode()
    st.delete(uri, storage)
    assert st.create_exclusive(uri, b"next", storage)


def test_deleting_twice_is_fine(place):
    base, storage = place
    uri = st.join(base, "gone")
    st.write_bytes_atomic(uri, b"x", storage)
    st.delete(uri, storage)
    st.delete(uri, storage)
    assert not st.exists(uri, storage)


def test_a_missing_file_is_not_found(place):
    base, storage = place
    for ask in (st.read_bytes, st.stat, st.is_folder):
        with pytest.raises(st.StorageError, match="no such file") as caught:
            ask(st.join(base, "absent.mp4"), storage)
        assert caught.value.kind == "NotFound"


def test_a_folder_is_not_a_file(place):
    base, storage = place
    st.write_bytes_atomic(st.join(base, "x"), b"", storage)
    with pytest.raises(st.StorageError, match="got a folder") as caught:
        st.stat(base, storage)
    assert caught.value.kind == "NotAFile"


def test_no_temporary_files_stay(tmp_path):
    st.write_bytes_atomic(str(tmp_path / "a"), b"x", Storage())
    assert st.create_exclusive(str(tmp_path / "b"), b"x", Storage())
    assert not st.create_exclusive(str(tmp_path / "b"), b"y", Storage())
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a", "b"]


def test_a_folder_marker_is_no_file(bucket):
    st.write_bytes_atomic("s3://videos/marked/", b"", bucket)
    st.write_bytes_atomic("s3://videos/marked/x", b"1", bucket)
    assert [entry.uri for entry in st.list_files("s3://videos/marked", bucket)] == ["s3://videos/marked/x"]


def test_a_missing_bucket_is_an_error_and_not_an_empty_folder(bucket):
    for ask in (st.list_files, st.exists, st.stat, st.read_bytes):
        with pytest.raises(st.StorageError, match="no such bucket: s3://absent/x"):
            ask("s3://absent/x", bucket)


def test_missing_credentials_name_the_remedy(bucket, monkeypatch, tmp_path):
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    for name in ("AWS_SHARED_CREDENTIALS_FILE", "AWS_CONFIG_FILE"):
        monkeypatch.setenv(name, str(tmp_path / "none"))
    storage = bucket.model_copy(update={"timeout_s": 4.0})  # another configuration, another connection
    with pytest.raises(st.StorageError, match="AWS_ACCESS_KEY_ID") as caught:
        st.read_bytes("s3://videos/x", storage)
    assert caught.value.kind == "Credentials"


def test_an_unreachable_host_is_named(bucket):
    storage = bucket.model_copy(update={"endpoint_url": "http://127.0.0.1:9"})
    with pytest.raises(st.StorageError, match=r"cannot reach .*127\.0\.0\.1:9.*storage\.endpoint_url") as caught:
        st.read_bytes("s3://videos/x", storage)
    assert caught.value.kind == "Unreachable"
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("uri", ["s3://", "ftp://host/x", "gs://bucket/x"])
def test_other_uris_are_refused(uri):
    with pytest.raises(st.StorageError) as caught:
        st.read_bytes(uri, Storage())
    assert caught.value.kind == "InvalidUri"


def test_errors_survive_the_way_between_processes():
    error = pickle.loads(pickle.dumps(st.StorageError("NotFound", "no such file: x")))
    assert (error.kind, str(error)) == ("NotFound", "no such file: x")


def test_arrow_and_fsspec_see_the_same_files(place):
    base, storage = place
    st.write_bytes_atomic(st.join(base, "table"), b"rows", storage)
    fs, path = st.arrow_filesystem(base, storage)
    fs = pickle.loads(pickle.dumps(fs))
    with fs.open_input_stream(f"{path}/table") as stream:
        assert stream.read() == b"rows"
    with fs.open_output_stream(f"{path}/written") as stream:
        stream.write(b"by arrow")
    assert st.read_bytes(st.join(base, "written"), storage) == b"by arrow"


def test_arrow_sends_no_new_checksums_to_other_servers(bucket, monkeypatch):
    for name in ("AWS_REQUEST_CHECKSUM_CALCULATION", "AWS_RESPONSE_CHECKSUM_VALIDATION"):
        monkeypatch.delenv(name, raising=False)
        fs, _ = st.arrow_filesystem("s3://videos/x", bucket)
        pickled = pickle.dumps(fs)
        monkeypatch.delenv(name)
        assert isinstance(pickle.loads(pickled), pyarrow.fs.S3FileSystem)
        assert st.os.environ[name] == "when_required"


def test_join_keeps_absolute_names():
    assert st.join("s3://b/x/", "y", "z") == "s3://b/x/y/z"
    assert st.join("/data", "s3://b/k") == "s3://b/k"
    assert st.join("/data", "/other/k") == "/other/k"


def test_file_uris_are_percent_decoded(tmp_path):
    path = tmp_path / "50% größer.bin"
    path.write_bytes(b"x")
    assert st.read_bytes(path.as_uri(), Storage()) == b"x"
    assert st.local_path(path.as_uri()) == str(path)
    assert st.local_path("~/v") == str(Path("~/v").expanduser())
