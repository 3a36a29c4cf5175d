"""Storage's guarantees and a whole job, source and sink, on a real S3 server (Ceph's gateway)."""

import contextlib
import io
import os
import subprocess
import threading
from concurrent.futures import ThreadPoolExecutor
from unittest import mock

import boto3
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.config import Storage
from pipeline.decoding.media import Media
from pipeline.errors import UnitError
from pipeline.mini.world import render_demo
from pipeline.storage import files as st
from tests import radosgw
from tests.integration.jobs import ROOT, command, environment, run, run_and_kill

pytestmark = pytest.mark.integration

CONTENT = bytes(range(256)) * 4096


@pytest.fixture(scope="module")
def gateway():
    """The server with a bucket; its user's keys are in this process's environment."""
    with radosgw.running() as found, mock.patch.dict(os.environ, _credentials(found)):
        for name in ("AWS_PROFILE", "AWS_CA_BUNDLE"):
            os.environ.pop(name, None)
        _client(found).create_bucket(Bucket="bucket")
        yield found


@pytest.fixture(scope="module")
def storage(gateway):
    return Storage(endpoint_url=gateway.endpoint, region="us-east-1", timeout_s=20)


def _credentials(gateway):
    return {
        "AWS_ACCESS_KEY_ID": gateway.access_key,
        "AWS_SECRET_ACCESS_KEY": gateway.secret_key,
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_EC2_METADATA_DISABLED": "true",
    }


def _client(gateway):
    return boto3.client(
        "s3",
        endpoint_url=gateway.endpoint,
        aws_access_key_id=gateway.access_key,
        aws_secret_access_key=gateway.secret_key,
        region_name="us-east-1",
    )


# --- storage ------------------------------------------------------------------------------------------------------


def test_what_is_written_is_read_back_whole_and_by_range(storage):
    uri = "s3://bucket/files/a #?.bin"
    st.write_bytes_atomic(uri, b"old", storage)
    before = st.stat(uri, storage)
    st.write_bytes_atomic(uri, CONTENT, storage)
    entry = st.stat(uri, storage)
    assert (entry.size_bytes, entry.etag != before.etag) == (len(CONTENT), True)
    assert st.list_files("s3://bucket/files", storage) == [entry]
    assert st.read_bytes(uri, storage) == CONTENT
    with contextlib.closing(Media(uri, storage, etag=entry.etag)) as media:
        file = media.ranged()
        file.seek(70_000)
        assert file.read(5000) == CONTENT[70_000:75_000]
        with open(media.local_path(1 << 30), "rb") as copy:
            assert copy.read() == CONTENT
        media.check()


def test_folders_are_told_from_files_and_from_nothing(storage):
    for name in ("tree/a", "tree/sub/b", "tree2/c"):
        st.write_bytes_atomic(f"s3://bucket/{name}", b"x", storage)
    assert st.is_folder("s3://bucket/tree", storage)
    assert st.is_folder("s3://bucket", storage)
    assert not st.is_folder("s3://bucket/tree/a", storage)
    assert [e.uri for e in st.list_files("s3://bucket/tree", storage, recursive=False)] == ["s3://bucket/tree/a"]
    assert len(st.list_files("s3://bucket/tree", storage)) == 2
    st.delete("s3://bucket/tree/a", storage)
    st.delete("s3://bucket/tree/a", storage)
    assert not st.exists("s3://bucket/tree/a", storage)
    with pytest.raises(st.StorageError) as caught:
        st.is_folder("s3://bucket/nothing", storage)
    assert caught.value.kind == "NotFound"


def test_a_listing_of_more_than_a_page_is_whole(gateway, storage):
    client = _client(gateway)
    names = [f"{number:04d}" for number in range(1001)]
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda name: client.put_object(Bucket="bucket", Key=f"many/{name}", Body=b""), names))
    assert [entry.uri[-4:] for entry in st.list_files("s3://bucket/many", storage)] == names


def test_of_24_who_create_a_file_exactly_one_wins(storage):
    uri, start, won = "s3://bucket/lock", threading.Barrier(24), []

    def contend(number):
        start.wait()
        if st.create_exclusive(uri, f"owner {number}".encode(), storage):
            won.append(number)

    threads = [threading.Thread(target=contend, args=(number,)) for number in range(24)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(won) == 1
    assert st.read_bytes(uri, storage) == f"owner {won[0]}".encode()


def test_readers_see_the_old_content_or_the_new(storage):
    uri, contents, seen = "s3://bucket/replaced", (b"a" * 300_000, b"b" * 200_000), set()
    st.write_bytes_atomic(uri, contents[0], storage)
    ended = threading.Event()

    def read():
        while not ended.is_set():
            seen.add(st.read_bytes(uri, storage))

    readers = [threading.Thread(target=read) for _ in range(3)]
    for reader in readers:
        reader.start()
    for number in range(20):
        st.write_bytes_atomic(uri, contents[number % 2], storage)
    ended.set()
    for reader in readers:
        reader.join()
    assert seen <= set(contents)


def test_an_object_replaced_while_it_is_read_is_an_error(storage):
    uri = "s3://bucket/moving"
    st.write_bytes_atomic(uri, CONTENT, storage)
    with contextlib.closing(Media(uri, storage)) as media:
        st.write_bytes_atomic(uri, CONTENT[::-1], storage)
        with pytest.raises(UnitError) as caught:
            media.read()
    assert (caught.value.stage, caught.value.error_type) == ("fetch", "Changed")


def test_parquet_by_pyarrow_is_what_storage_reads(storage):
    table = pa.table({"x": list(range(100_000))})
    filesystem, path = st.arrow_filesystem("s3://bucket/table.parquet", storage)
    pq.write_table(table, path, filesystem=filesystem)
    assert pq.read_table(path, filesystem=filesystem).equals(table)
    assert pq.read_table(io.BytesIO(st.read_bytes("s3://bucket/table.parquet", storage))).equals(table)


def test_a_missing_bucket_is_named(storage):
    for ask in (st.stat, st.read_bytes, st.list_files, st.exists):
        with pytest.raises(st.StorageError, match="no such bucket: s3://absent/x"):
            ask("s3://absent/x", storage)


@pytest.mark.parametrize("wrong", ["AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"])
def test_wrong_credentials_are_refused_without_repeating_them(storage, monkeypatch, wrong):
    st.write_bytes_atomic("s3://bucket/private", b"x", storage)
    monkeypatch.setenv(wrong, "WRONG0123456789WRONG")
    other = storage.model_copy(update={"timeout_s": 19.0 if wrong.endswith("ID") else 18.0})  # a new connection
    filesystem, path = st.arrow_filesystem("s3://bucket/private", other)

    def by_pyarrow(uri, _):
        with st.faults(uri):
            filesystem.open_input_stream(path)

    for ask in (st.read_bytes, st.list_files, by_pyarrow):
        with pytest.raises(st.StorageError, match="s3://bucket/private") as caught:
            ask("s3://bucket/private", other)
        assert caught.value.kind == "AccessDenied"
        assert "\n" not in str(caught.value)
        assert not any(os.environ[name] in str(caught.value) for name in ("AWS_SECRET_ACCESS_KEY", "AWS_ACCESS_KEY_ID"))


# --- the job ------------------------------------------------------------------------------------------------------

# One row per file and per block, so that a kill falls between many commits.
STEPS = ["clips.length_s=1", "sink.rows_per_file=1", "ray.actors.batch_units=1", "ray.num_cpus=2"]


class Job:
    """One job from its start to its retry: killed, with two videos that change after planning, and a second driver."""

    def __init__(self, gateway, folder):
        self.client = _client(gateway)
        self.overrides = [
            "source.uri=s3://bucket/videos",
            "sink.uri=s3://bucket/out",
            f"storage.endpoint_url={gateway.endpoint}",
            "run.lock_timeout_s=10",
            *STEPS,
        ]
        render_demo(folder, 4)
        self.contents = {path.name: path.read_bytes() for path in sorted(folder.glob("*.mp4"))}
        for name, content in self.contents.items():
            self.client.put_object(Bucket="bucket", Key=f"videos/{name}", Body=content)
        self.replaced, self.deleted, *_ = self.contents
        self.rival, self.outputs = None, []

    def keys(self, prefix):
        pages = self.client.get_paginator("list_objects_v2").paginate(Bucket="bucket", Prefix=prefix)
        return [found["Key"] for page in pages for found in page.get("Contents", [])]

    def interfere(self):
        """Polled while the job runs; True once it may be killed."""
        if self.rival is None:
            if not self.keys("out/_run/manifest.parquet"):
                return False
            self.client.put_object(Bucket="bucket", Key=f"videos/{self.replaced}", Body=b"another " * 1000)
            self.client.delete_object(Bucket="bucket", Key=f"videos/{self.deleted}")
            self.rival = subprocess.Popen(
                command("caption", *self.overrides),
                cwd=ROOT,
                env=environment(),
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
        committed = [k for k in self.keys("out/_run/checkpoint/") if k.endswith(".parquet") and "pending" not in k]
        return self.rival.poll() is not None and len(committed) >= 3

    def rows(self, storage):
        filesystem, path = st.arrow_filesystem("s3://bucket/out/data", storage)
        return pq.read_table(path, filesystem=filesystem).to_pylist()


@pytest.fixture(scope="module")
def job(gateway, storage, tmp_path_factory):
    """The job after the kill and the second start; `first` are its rows."""
    made = Job(gateway, tmp_path_factory.mktemp("videos"))
    try:
        assert run_and_kill("caption", *made.overrides, when=made.interfere)
        made.refused = made.rival.communicate(timeout=60)
    finally:
        if made.rival is not None:
            made.rival.kill()
    finished = run("caption", *made.overrides)
    made.outputs += [*made.refused, finished.stdout, finished.stderr]
    made.first = made.rows(storage)
    made.finished = finished
    return made


def test_a_killed_job_finishes_with_every_unit_once(job, storage):
    filesystem, path = st.arrow_filesystem("s3://bucket/out/_run/manifest.parquet", storage)
    planned = pq.read_table(path, filesystem=filesystem)["id"].to_pylist()
    assert sorted(row["id"] for row in job.first) == sorted(planned)
    assert "(0 before" not in job.finished.stdout


def test_a_second_job_on_the_same_output_is_refused_in_one_line(job):
    assert job.rival.returncode == 2
    assert job.refused[1].startswith("error: s3://bucket/out/_run/lock: locked by process")
    assert job.refused[1].count("\n") == 1


def test_objects_that_changed_after_planning_cost_their_own_rows_only(job):
    found = {}
    for row in job.first:
        found.setdefault(row["uri"].rsplit("/", 1)[-1], set()).add((row["error_stage"], row["error_type"]))
    expected = {name: {(None, None)} for name in job.contents}
    assert found == expected | {job.replaced: {("fetch", "Changed")}, job.deleted: {("fetch", "NotFound")}}


def test_retry_heals_what_is_there_again(job, storage):
    for name in (job.replaced, job.deleted):
        job.client.put_object(Bucket="bucket", Key=f"videos/{name}", Body=job.contents[name])
    again = run("retry", *job.overrides)
    job.outputs += [again.stdout, again.stderr]
    healed = job.rows(storage)
    assert sorted(row["id"] for row in healed) == sorted(row["id"] for row in job.first)
    assert {row["error_type"] for row in healed} == {None}


def test_nothing_a_run_leaves_or_says_holds_the_secret(job, gateway):
    assert job.keys("out/_run/summary.json")
    for key in job.keys("out/"):
        content = job.client.get_object(Bucket="bucket", Key=key)["Body"].read()
        assert gateway.secret_key.encode() not in content, key
        if key.endswith(".parquet"):
            assert gateway.secret_key not in str(pq.read_table(io.BytesIO(content)).to_pylist()), key
    assert all(gateway.secret_key not in text and gateway.access_key not in text for text in job.outputs)
