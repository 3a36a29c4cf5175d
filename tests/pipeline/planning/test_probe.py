"""Tests of probes: results per kind of file, and files that crash or hang the probe."""

import json
import os
import signal
import subprocess
import sys
import textwrap
import time

import numpy as np
import pytest
from PIL import Image

from pipeline.config import Storage
from pipeline.errors import SourceError
from pipeline.planning.probe import Probe, probe, probe_all
from pipeline.storage import files as st
from tests.s3 import server
from tests.videos import picture, render, render_audio


def test_a_video_as_displayed(tmp_path):
    path = render(tmp_path / "v.mp4", count=24, fps=12, height=144, width=96, quarters=1)
    seen = probe(str(path), Storage())
    assert (seen.height, seen.width, seen.codec, seen.error) == (144, 96, "h264", None)
    assert seen.duration_s == pytest.approx(2.0, abs=0.1)
    assert seen.fps == pytest.approx(12, rel=0.05)
    assert (seen.size_bytes, seen.etag) == (path.stat().st_size, st.stat(str(path), Storage()).etag)


@pytest.mark.parametrize(("name", "codec"), [("v.mkv", "libx264"), ("v.webm", "libvpx-vp9"), ("v.avi", "mpeg4")])
def test_containers_without_a_length_per_stream(tmp_path, name, codec):
    seen = probe(str(render(tmp_path / name, codec=codec)), Storage())
    assert seen.duration_s == pytest.approx(2.0, abs=0.1)
    assert (seen.height, seen.width, seen.error) == (96, 144, None)


def test_an_image_as_displayed(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 8
    Image.fromarray(np.zeros((40, 70, 3), np.uint8)).save(tmp_path / "i.JPG", format="jpeg", exif=exif)
    seen = probe(str(tmp_path / "i.JPG"), Storage())
    assert (seen.height, seen.width, seen.codec, seen.duration_s, seen.error) == (70, 40, "jpeg", None, None)


def test_broken_files_say_why(tmp_path):
    (tmp_path / "text.mp4").write_text("no video")
    (tmp_path / "text.png").write_text("no image")
    (tmp_path / "empty.mp4").touch()
    render_audio(tmp_path / "sound.mp4")
    cut = render(tmp_path / "cut.mp4", count=48, options={"movflags": "faststart"})
    cut.write_bytes(cut.read_bytes()[:-500])
    expected = {
        "text.mp4": "decode: NotAVideo",
        "text.png": "decode: NotAnImage",
        "empty.mp4": "fetch: Empty",
        "sound.mp4": "decode: NoVideoStream",
        "cut.mp4": "decode: Truncated: 500 bytes",
        "absent.mp4": "fetch: NotFound",
        "": "fetch: NotAFile",
    }
    for name, error in expected.items():
        seen = probe(str(tmp_path / name), Storage())
        assert seen.error is not None
        assert seen.error.startswith(error)
        assert "\n" not in seen.error
    assert probe(str(cut), Storage()).duration_s == pytest.approx(4.0, abs=0.1)


def test_objects_are_probed_like_files(tmp_path):
    path = render(tmp_path / "v.mp4", count=60)
    Image.fromarray(picture(1)).save(tmp_path / "i.png")
    with server("videos") as storage:
        for name in ("v.mp4", "i.png"):
            st.write_bytes_atomic(f"s3://videos/{name}", (tmp_path / name).read_bytes(), storage)
        uris = ["s3://videos/v.mp4", "s3://videos/i.png", "s3://videos/absent.mp4", "s3://absent/v.mp4"]
        found = probe_all(uris, storage, workers=1)
    local = probe(str(path), Storage())
    video, image = found[uris[0]], found[uris[1]]
    assert (video.duration_s, video.width, video.size_bytes) == (local.duration_s, 144, local.size_bytes)
    assert (image.width, image.height, image.error) == (144, 96, None)
    assert "no such file" in found[uris[2]].error
    assert "no such bucket" in found[uris[3]].error


def test_many_files_in_few_processes(tmp_path):
    render(tmp_path / "v.mp4", count=6)
    uris = []
    for number in range(12):
        uris.append(str(tmp_path / f"{number}.mp4"))
        os.link(tmp_path / "v.mp4", uris[-1])
    found = probe_all([*uris, *uris], Storage(), workers=2)
    assert list(found) == uris
    assert all(seen.width == 144 and seen.error is None for seen in found.values())


@pytest.fixture
def hostile(tmp_path, monkeypatch):
    """Worker processes in which a file named `crash*` kills the process and `hang*` never returns."""
    (tmp_path / "sitecustomize.py").write_text(
        textwrap.dedent("""
            import av, os, time
            real = av.open
            def hostile(file, *args, **options):
                if "crash" in str(file):
                    os.kill(os.getpid(), 11)
                while "hang" in str(file):
                    time.sleep(1)
                return real(file, *args, **options)
            av.open = hostile
        """)
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    render(tmp_path / "good.mp4", count=6)
    names = ["good0", "crash0", "good1", "hang0", "good2", "crash1", "good3", "good4", "good5"]
    for name in names:
        os.link(tmp_path / "good.mp4", tmp_path / f"{name}.mp4")
    return [str(tmp_path / f"{name}.mp4") for name in names]


def test_crashes_and_hangs_cost_their_own_file_only(hostile):
    found = probe_all(hostile, Storage(), workers=2, timeout_s=3)
    for uri, seen in found.items():
        if "crash" in uri:
            assert seen == Probe(uri, error=f"decode: DecoderCrashed: the process that opened the file died: {uri}")
        elif "hang" in uri:
            assert seen == Probe(uri, error=f"decode: Timeout: not opened within 3 s: {uri}")
        else:
            assert (seen.width, seen.error) == (144, None)
    assert len(found) == len(hostile)


def test_a_worker_that_is_killed_at_rest_is_replaced(tmp_path):
    from pipeline.planning.probe import _Pool

    path = str(render(tmp_path / "v.mp4", count=6))
    with _Pool(Storage(), 60) as pool:
        assert pool.run([path], 1)[path].width == 144
        os.kill(pool._workers[0].process.pid, signal.SIGKILL)
        time.sleep(0.2)
        again = pool.run([path], 1)[path]
        assert again.width == 144 or "DecoderCrashed" in again.error
        assert pool.run([path], 1)[path].width == 144
    listing = subprocess.run(["ps", "-o", "args=", "--ppid", str(os.getpid())], capture_output=True, text=True).stdout
    assert "pipeline.planning.probe" not in listing


def test_what_libraries_print_does_not_mix_with_answers(tmp_path):
    path = str(render(tmp_path / "v.mp4", count=6))
    noisy = (
        "import os, pipeline.planning.probe as p; "
        f"p.probe = lambda *a: os.write(1, b'noise') and p.Probe({path!r}); p._serve()"
    )
    task = f'{{"uri": "{path}", "storage": {{}}}}\n'
    done = subprocess.run([sys.executable, "-c", noisy], input=task, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[0] == ""
    assert json.loads(done.stdout.splitlines()[1])["uri"] == path
    assert "noise" in done.stderr


def test_processes_that_cannot_start_are_an_error(tmp_path, monkeypatch):
    (tmp_path / "sitecustomize.py").write_text("raise SystemExit(3)")
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(SourceError, match="run it to see the error"):
        probe_all([str(tmp_path / "v.mp4")], Storage(), workers=1)
