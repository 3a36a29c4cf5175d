"""A killed driver, and the same command again: every unit has exactly one row, on disk and on S3."""

import boto3
import pyarrow.dataset as ds
import pyarrow.fs
import pyarrow.parquet as pq
import pytest
from moto.server import ThreadedMotoServer

from pipeline.mini.world import render_demo
from tests.integration.jobs import committed, run, run_and_kill

pytestmark = pytest.mark.integration

# One row per file and per block, so that a kill falls between many commits.
STEPS = ["clips.length_s=1", "sink.rows_per_file=1", "ray.actors.batch_units=1", "ray.num_cpus=2"]
CREDENTIALS = {"AWS_ACCESS_KEY_ID": "test", "AWS_SECRET_ACCESS_KEY": "test", "AWS_DEFAULT_REGION": "us-east-1"}


@pytest.fixture(scope="module")
def videos(tmp_path_factory):
    folder = tmp_path_factory.mktemp("videos")
    render_demo(folder, 3)
    return folder


def test_killed_job_finishes_on_local_disk_with_every_unit_once(videos, tmp_path):
    out = tmp_path / "out"
    overrides = [f"source.uri={videos}", f"sink.uri={out}", *STEPS]
    killed_early = run_and_kill(
        "caption",
        *overrides,
        when=lambda: len(committed(out)) >= 3,
    )
    done = run("caption", *overrides)
    ids = pq.read_table(out)["id"].to_pylist()
    planned = pq.read_table(out / "_run" / "manifest.parquet")["id"].to_pylist()
    assert killed_early
    assert sorted(ids) == sorted(planned)
    assert len(planned) == 24
    assert "24 of 24 finished (0 before" not in done.stdout
    assert not list(out.rglob("*.tmp"))


@pytest.fixture
def s3():
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0)
    server.start()
    host, port = server.get_host_and_port()
    yield f"http://{host}:{port}"
    server.stop()


def test_killed_job_finishes_on_s3_with_every_unit_once(videos, s3):
    client = boto3.client(
        "s3", endpoint_url=s3, aws_access_key_id="test", aws_secret_access_key="test", region_name="us-east-1"
    )
    client.create_bucket(Bucket="bucket")
    for path in videos.glob("*.mp4"):
        client.upload_file(str(path), "bucket", f"videos/{path.name}")
    overrides = [
        "source.uri=s3://bucket/videos",
        "sink.uri=s3://bucket/out",
        f"storage.endpoint_url={s3}",
        "storage.path_style=true",
        "run.lock_timeout_s=10",
        *STEPS,
    ]

    def committed_there():
        found = client.list_objects_v2(Bucket="bucket", Prefix="out/_run/checkpoint/").get("Contents", [])
        return len([o for o in found if o["Key"].endswith(".parquet") and "pending" not in o["Key"]]) >= 3

    assert run_and_kill("caption", *overrides, when=committed_there, **CREDENTIALS)
    run("caption", *overrides, **CREDENTIALS)
    filesystem = pyarrow.fs.S3FileSystem(
        endpoint_override=s3.removeprefix("http://"),
        scheme="http",
        access_key="test",
        secret_key="test",
        region="us-east-1",
    )
    planned = pq.read_table("bucket/out/_run/manifest.parquet", filesystem=filesystem)["id"].to_pylist()
    ids = ds.dataset("bucket/out", filesystem=filesystem, format="parquet").to_table(["id"])["id"].to_pylist()
    assert sorted(ids) == sorted(planned)
    assert len(ids) == 24
