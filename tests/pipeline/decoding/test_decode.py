"""Tests of decoding: every kind of file gives the requested frames or one error with the reason."""

import gc
import os
import subprocess
import sys
import textwrap
import weakref
from fractions import Fraction

import numpy as np
import pytest
from PIL import Image

import pipeline.decoding.backends
import pipeline.decoding.video_index
from pipeline.config import Decode, Frames, Storage
from pipeline.decoding.decode import decode_unit
from pipeline.decoding.frames import Sizing
from pipeline.decoding.media import Media
from pipeline.errors import ConfigError, UnitError
from pipeline.storage import files as st
from tests.s3 import server
from tests.videos import PATCHES, encoders, picture, read_colours, read_index, render, render_audio, render_trimmed

EVERY = Frames(strategy="uniform", count=1000, batch_frames=7)  # every frame of the test videos
AT_ONCE = Frames(strategy="uniform", count=1000, batch_frames=24)  # all in one batch
FROM_KEYS = Frames(strategy="uniform", count=1000, batch_frames=8)  # batches start at key frames
SIZING = Sizing(16, 64 * 64, 128 * 192)
BACKENDS = ("auto", "decord", "pyav")


def unit(uri, start_s=None, end_s=None, etag=None, kind="video"):
    uris = [str(u) for u in (uri if isinstance(uri, list) else [uri])]
    return {"id": "u", "kind": kind, "uris": uris, "etag": etag, "start_s": start_s, "end_s": end_s}


def batches(uri, *, backend="auto", frames=EVERY, storage=None, sizing=SIZING, decode=None, **window):
    return decode_unit(
        unit(uri, **window),
        frames=frames,
        decode=Decode(backend=backend, **(decode or {})),
        storage=storage or Storage(),
        sizing=sizing,
    )


def decoded(uri, **options):
    """All indices that the frames show, their times, and the frames."""
    parts = list(batches(uri, **options))
    frames = np.concatenate([part.frames for part in parts])
    return [read_index(f) for f in frames], np.concatenate([part.times_s for part in parts]), frames


def failure(uri, **options):
    with pytest.raises(UnitError) as caught:
        list(batches(uri, **options))
    assert "\n" not in str(caught.value)
    return caught.value.stage, caught.value.error_type


def outcome(uri, **options):
    """The decoded indices, or the error."""
    try:
        return decoded(uri, **options)[0]
    except UnitError as error:
        return error.stage, error.error_type


VIDEOS = {
    "h264.mp4": {},
    "h264.mkv": {},
    "h264-long-group.mp4": {"gop": 100, "bframes": 3},
    "h264-open-groups.mp4": {"open_gop": True},
    "h264.ts": {},
    "h264.flv": {},
    "h264-with-sound.mp4": {"audio_s": 3.0},
    "hevc.mp4": {"codec": "libx265"},
    "hevc-open-groups.mp4": {"codec": "libx265", "open_gop": True},
    "vp8.webm": {"codec": "libvpx"},
    "vp9.webm": {"codec": "libvpx-vp9"},
    "av1.mkv": {"codec": "libsvtav1"},
    "av1.mp4": {"codec": "libsvtav1"},
    "mpeg4.avi": {"codec": "mpeg4"},
    "h264.avi": {},
    "turned-90.mov": {"quarters": 1},
    "turned-180.mp4": {"quarters": 2},
    "turned-270.mp4": {"quarters": 3, "height": 144, "width": 96},
    "bt709.mp4": {"colorspace": 1},
    "odd-size.mp4": {"height": 90, "width": 154},
}
DECORD_REFUSES = {"h264.avi", "h264-open-groups.mp4", "hevc-open-groups.mp4", "h264.ts", "av1.mkv", "av1.mp4"}


@pytest.fixture(scope="module")
def videos(tmp_path_factory):
    folder = tmp_path_factory.mktemp("videos")

    def get(name):
        options = VIDEOS[name]
        if not encoders(options.get("codec", "libx264")):
            pytest.skip(f"this build of PyAV cannot write {options['codec']}")
        path = folder / name
        return path if path.exists() else render(path, **options)

    return get


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", VIDEOS)
def test_every_frame_comes_once_in_order_and_in_colour(videos, name, backend):
    path = videos(name)
    if backend == "decord" and name in DECORD_REFUSES:
        assert failure(path, backend=backend)[0] == "decode"
        return
    indices, times, frames = decoded(path, backend=backend)
    assert indices == list(range(24))
    assert np.allclose(times, np.arange(24) / 12, atol=1.1e-3)
    assert frames.dtype == np.uint8
    upright = VIDEOS[name].get("height", 96) < VIDEOS[name].get("width", 144)
    assert (frames.shape[1] < frames.shape[2]) == upright
    assert np.abs(read_colours(frames[-1]) - PATCHES).max() < 12


@pytest.mark.parametrize("window", [(None, None), (0.7, None), (None, 0.9), (0.6, 1.6), (1.75, 30.0)])
@pytest.mark.parametrize("name", VIDEOS)
@pytest.mark.parametrize(
    "frames",
    [Frames(fps=3, batch_frames=2), Frames(strategy="uniform", count=5), Frames(fps=100, max_frames=3, batch_frames=1)],
    ids=["fps", "uniform", "capped"],
)
def test_both_decoders_choose_the_same_frames(videos, name, window, frames):
    path = videos(name)
    start, end = window
    found = {b: decoded(path, backend=b, frames=frames, start_s=start, end_s=end) for b in ("auto", "pyav")}
    indices, times, _ = found["auto"]
    assert indices == found["pyav"][0]
    assert np.array_equal(times, found["pyav"][1])
    assert indices == [round(t * 12) for t in times]
    assert all((start or 0) <= t < (end or 99) for t in times)
    assert np.abs(found["auto"][2].astype(int) - found["pyav"][2]).mean() < 2


def test_auto_takes_decord_where_decord_is_right(videos, monkeypatch):
    opened = []
    plain = pipeline.decoding.backends.DecordSource
    monkeypatch.setattr(pipeline.decoding.backends, "DecordSource", lambda *a: opened.append(a[0]) or plain(*a))
    for name in VIDEOS:
        decoded(videos(name), frames=AT_ONCE)
    expected = [name for name in VIDEOS if name not in DECORD_REFUSES or name.startswith("av1")]
    assert [os.path.basename(path) for path in opened] == expected


def test_auto_takes_pyav_where_decord_would_go_back_for_every_batch(videos, monkeypatch):
    monkeypatch.setattr(pipeline.decoding.backends, "DecordSource", pytest.fail)
    assert decoded(videos("h264.mp4"))[0] == decoded(videos("h264-long-group.mp4"))[0] == list(range(24))


def test_irregular_timestamps_are_kept(tmp_path):
    times = [0.0, 0.1, 0.15, 0.4, 0.41, 1.5, 1.6, 2.2, 4.0, 4.05]
    path = render(tmp_path / "v.mp4", times_s=times)
    for backend in BACKENDS:
        rule = Frames(strategy="uniform", count=10)
        indices, found, _ = decoded(path, backend=backend, frames=rule)
        assert indices == list(range(10))
        assert np.allclose(found, times, atol=1e-3)
        assert decoded(path, backend=backend, frames=Frames(fps=1))[0] == [0, 4, 6, 7, 8]


def test_what_an_edit_list_cuts_away_is_not_seen(tmp_path):
    path = render_trimmed(tmp_path / "v.mp4", 0.5, count=48, gop=12)
    for backend in ("auto", "pyav"):
        indices, times, _ = decoded(path, backend=backend)
        assert indices == list(range(6, 48))
        assert np.allclose(times, np.arange(42) / 12, atol=1e-3)
        assert decoded(path, backend=backend, start_s=1.0, end_s=1.5)[0] == list(range(18, 24))
    assert failure(path, backend="decord") == ("decode", "Unsupported")


def test_pixels_become_square(tmp_path):
    path = render(tmp_path / "v.mp4", pixel_aspect=Fraction(4, 3))
    for backend in BACKENDS:
        assert decoded(path, backend=backend)[2].shape[1:3] == (96, 192)


def test_times_count_from_the_first_frame(tmp_path):
    path = render(tmp_path / "v.mkv", times_s=[5 + i / 10 for i in range(10)])
    for backend in BACKENDS:
        assert np.allclose(decoded(path, backend=backend)[1], np.arange(10) / 10, atol=1.1e-3)


def test_batches_are_small_carry_the_id_and_have_one_size(videos):
    parts = list(batches(videos("h264.mp4"), frames=EVERY.model_copy(update={"batch_frames": 5})))
    assert [len(part.frames) for part in parts] == [5, 5, 5, 5, 4]
    assert {part.frames.shape[1:] for part in parts} == {(96, 144, 3)}
    assert {(part.unit_id, part.item) for part in parts} == {("u", 0)}
    assert all(part.decode_s > 0 and len(part.times_s) == len(part.frames) for part in parts)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_square_crop_keeps_the_middle(videos, backend):
    frames = decoded(videos("h264.mp4"), backend=backend, sizing=Sizing.square(64))[2]
    assert frames.shape[1:] == (64, 64, 3)
    whole = np.asarray(Image.fromarray(picture(0)).resize((96, 64)))[:, 16:80]
    assert np.abs(frames[0].astype(int) - whole).mean() < 6


@pytest.mark.parametrize("backend", BACKENDS)
def test_frames_are_dropped_as_the_consumer_goes_on(videos, backend):
    alive, most = [], 0
    for part in batches(videos("h264.mp4"), backend=backend, frames=EVERY.model_copy(update={"batch_frames": 2})):
        alive.append(weakref.ref(part.frames))
        del part
        gc.collect()
        most = max(most, sum(ref() is not None for ref in alive))
    assert len(alive) == 12
    assert most <= 1


@pytest.mark.parametrize("backend", ["decord", "pyav"])
def test_two_hours_at_one_frame_per_second_fit_into_little_memory(tmp_path_factory, backend):
    """All 7,200 frames are 0.7 GB; the kernel measures the peak memory of the process."""
    path = tmp_path_factory.getbasetemp() / "two-hours.mp4"
    if not path.exists():
        render(path, count=7200, fps=1, height=48, width=64, gop=60)
    script = f"""
        import resource
        from pipeline.config import Decode, Frames, Storage
        from pipeline.decoding.decode import decode_unit
        from pipeline.decoding.frames import Sizing
        unit = {unit(path)!r}
        options = dict(decode=Decode(backend={backend!r}), storage=Storage())
        start, frames = None, 0
        rule = Frames(fps=1, max_frames=7200, batch_frames=16)
        for part in decode_unit(unit, frames=rule, sizing=Sizing(16, 160 * 208, 160 * 224), **options):
            start = start or resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
            frames += len(part.frames)
        print(frames, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - start)
    """
    out = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script)], capture_output=True, text=True, check=True
    ).stdout
    frames, grown_kb = map(int, out.split())
    assert frames == 7200
    assert grown_kb < 150_000


# --- files that cannot be decoded ---------------------------------------------------------------------------------


def test_files_that_are_no_videos_say_so(tmp_path):
    (tmp_path / "text.mp4").write_text("this is not a video\n")
    (tmp_path / "empty.mp4").touch()
    render_audio(tmp_path / "sound.mp4")
    render_audio(tmp_path / "cover.mp4", cover=True)
    for backend in BACKENDS:
        assert failure(tmp_path / "text.mp4", backend=backend) == ("decode", "NotAVideo")
        assert failure(tmp_path / "empty.mp4", backend=backend) == ("fetch", "Empty")
        assert failure(tmp_path / "sound.mp4", backend=backend) == ("decode", "NoVideoStream")
        assert failure(tmp_path / "cover.mp4", backend=backend) == ("decode", "NoVideoStream")
        assert failure(tmp_path / "absent.mp4", backend=backend) == ("fetch", "NotFound")
        assert failure(tmp_path, backend=backend) == ("fetch", "NotAFile")
        assert failure("ftp://host/v.mp4", backend=backend) == ("fetch", "InvalidUri")


def test_a_playlist_opens_no_other_file(videos, tmp_path):
    target = videos("h264.ts")
    playlists = {
        "hls.mp4": f"#EXTM3U\n#EXT-X-TARGETDURATION:2\n#EXTINF:2,\n{target}\n#EXT-X-ENDLIST\n",
        "concat.mp4": f"ffconcat version 1.0\nfile '{target}'\n",
    }
    for name, text in playlists.items():
        (tmp_path / name).write_text(text)
        for backend in BACKENDS:
            assert failure(tmp_path / name, backend=backend) == ("decode", "NotAVideo")


def test_an_empty_window_says_what_there_is(videos):
    for backend in BACKENDS:
        assert failure(videos("h264.mp4"), backend=backend, start_s=5.0, end_s=6.0) == ("decode", "EmptyWindow")
        assert failure(videos("h264.mp4"), backend=backend, start_s=0.01, end_s=0.05) == ("decode", "EmptyWindow")


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("v.mp4", {"options": {"movflags": "faststart"}}),
        ("v.mkv", {}),
        ("v.webm", {"codec": "libvpx-vp9"}),
        ("v.avi", {"codec": "mpeg4"}),
    ],
)
def test_a_cut_off_file_gives_right_frames_or_an_error(tmp_path, name, options, backend):
    whole = render(tmp_path / name, count=48, **options).read_bytes()
    for share in (0.4, 0.6, 0.8, 0.95, 0.999):
        (tmp_path / name).write_bytes(whole[: int(len(whole) * share)])
        assert failure(tmp_path / name, backend=backend) == ("decode", "Truncated")
        part = outcome(tmp_path / name, backend=backend, end_s=1.0)
        assert part == list(range(12)) or part[0] == "decode"
    if backend != "decord":  # decord needs the complete index
        assert outcome(tmp_path / name, backend=backend, end_s=1.0) == list(range(12))


def test_a_file_cut_off_before_its_index_says_so(tmp_path):
    path = render(tmp_path / "v.mp4")  # the index is at the end
    path.write_bytes(path.read_bytes()[:-600])
    assert failure(path) == ("decode", "NotAVideo")


@pytest.mark.parametrize("backend", BACKENDS)
def test_damaged_data_is_never_a_shorter_answer(tmp_path, backend):
    path = render(tmp_path / "v.mp4", count=60, options={"movflags": "faststart"})
    whole, seen = path.read_bytes(), set()
    start = whole.index(b"mdat") + 4
    rng = np.random.default_rng(0)
    for _ in range(25):
        data = bytearray(whole)
        hole = int(rng.integers(start, len(data) - 200))
        data[hole : hole + 150] = bytes(150)
        path.write_bytes(data)
        seen.add(tuple(outcome(path, backend=backend)))
    assert len({kind for kind in seen if kind[0] == "decode"}) >= 1
    assert all(len(kind) == 60 for kind in seen - {("decode", "Corrupt"), ("decode", "MissingFrame")})


# --- choice of decoder --------------------------------------------------------------------------------------------


def test_pyav_goes_on_where_decord_fails_in_the_middle(videos, monkeypatch):
    read, calls = pipeline.decoding.backends.DecordSource.read, []

    def fails_at_the_third(self, indices):
        calls.append(len(indices))
        if len(calls) == 3:
            raise RuntimeError("decord lost the stream")
        return read(self, indices)

    monkeypatch.setattr(pipeline.decoding.backends.DecordSource, "read", fails_at_the_third)
    assert decoded(videos("h264.mp4"), frames=FROM_KEYS)[0] == list(range(24))
    assert len(calls) == 3
    calls.clear()
    assert failure(videos("h264.mp4"), frames=FROM_KEYS, backend="decord") == ("decode", "Corrupt")


@pytest.mark.parametrize(
    "damage",
    [lambda f: f[:-1], lambda f: f[:, :-1], lambda f: f.astype(np.int32), lambda f: f[:0]],
    ids=["fewer", "other size", "other type", "none"],
)
def test_a_decoder_that_gives_other_than_asked_is_replaced(videos, monkeypatch, damage):
    read = pipeline.decoding.backends.DecordSource.read
    monkeypatch.setattr(pipeline.decoding.backends.DecordSource, "read", lambda self, i: damage(read(self, i)))
    assert decoded(videos("h264.mp4"))[0] == list(range(24))
    assert failure(videos("h264.mp4"), backend="decord") == ("decode", "Unsupported")


def test_decord_is_not_given_one_long_group_in_small_batches(tmp_path, monkeypatch):
    path = render(tmp_path / "v.mp4", count=200, gop=1000)
    monkeypatch.setattr(pipeline.decoding.backends.DecordSource, "__init__", None)
    assert decoded(path, frames=Frames(fps=12, max_frames=999, batch_frames=4))[0] == list(range(200))


def test_a_backend_of_ones_own(videos, tmp_path, monkeypatch):
    (tmp_path / "own_decoder.py").write_text(
        textwrap.dedent("""
            import numpy as np
            class Grey:
                def __init__(self, path, index, size):
                    assert open(path, "rb").read(8)[4:] == b"ftyp" and len(index.pts) == 24
                    self.size = size
                def read(self, indices):
                    return np.full((len(indices), self.size.resize_h, self.size.resize_w, 3), 7, np.uint8)
                def close(self):
                    pass
            def broken(path, index, size):
                raise LookupError("no such codec")
        """)
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    _, times, frames = decoded(videos("h264.mp4"), backend="own_decoder:Grey")
    assert np.unique(frames).tolist() == [7]
    assert len(times) == 24
    assert failure(videos("h264.mp4"), backend="own_decoder:broken") == ("decode", "Corrupt")
    with pytest.raises(ConfigError, match="own_decoder:absent"):
        list(batches(videos("h264.mp4"), backend="own_decoder:absent"))


# --- objects ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def bucket():
    with server("videos") as storage:
        yield storage


def put(bucket, path):
    uri = f"s3://videos/{os.path.basename(path)}"
    st.write_bytes_atomic(uri, path.read_bytes(), bucket)
    return uri


@pytest.mark.parametrize("name", ["h264.mp4", "h264.mkv", "av1.mkv", "h264.ts"])
def test_objects_decode_like_files_by_copy_and_by_range(videos, bucket, name):
    uri = put(bucket, videos(name))
    for options in ({}, {"decode": {"max_object_bytes": 1}}, {"backend": "pyav"}):
        assert decoded(uri, storage=bucket, **options)[0] == list(range(24))
        assert decoded(uri, storage=bucket, start_s=0.5, end_s=1.0, **options)[0] == list(range(6, 12))


def test_a_short_part_of_a_large_object_is_not_copied(videos, bucket, monkeypatch):
    monkeypatch.setattr("pipeline.decoding.decode._COPY_ALWAYS_BYTES", 0)
    copied = []
    copy = Media._copied
    monkeypatch.setattr(Media, "_copied", lambda self: copied.append(self.uri) or copy(self))
    uri = put(bucket, videos("h264.mp4"))
    assert decoded(uri, storage=bucket, start_s=0.5, end_s=1.0)[0] == list(range(6, 12))
    assert copied == []
    assert decoded(uri, storage=bucket, end_s=1.5)[0] == list(range(18))
    assert copied == [uri]


def test_copies_leave_nothing_behind(videos, bucket, tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    stream = batches(put(bucket, videos("h264.mp4")), storage=bucket)
    next(stream)
    before = len(os.listdir("/proc/self/fd"))
    assert os.listdir(tmp_path) == []
    stream.close()
    assert len(os.listdir("/proc/self/fd")) < before


def test_what_is_missing_or_changed_is_an_error_of_fetching(videos, bucket):
    uri = put(bucket, videos("h264.mp4"))
    etag = st.stat(uri, bucket).etag
    assert len(decoded(uri, storage=bucket, etag=etag)[0]) == 24
    for backend in BACKENDS:
        assert failure("s3://videos/absent.mp4", storage=bucket, backend=backend) == ("fetch", "NotFound")
        assert failure("s3://absent/v.mp4", storage=bucket, backend=backend) == ("fetch", "NotFound")
        assert failure(uri, storage=bucket, backend=backend, etag="another") == ("fetch", "Changed")
    assert failure(uri, storage=bucket, backend="decord", decode={"max_object_bytes": 10}) == ("fetch", "TooLarge")


def test_an_object_replaced_while_it_is_read_is_an_error(videos, bucket, tmp_path, monkeypatch):
    monkeypatch.setattr(pipeline.decoding.video_index, "_KEEP_BYTES", 0)
    monkeypatch.setattr("pipeline.decoding.media._RANGE_BLOCK_BYTES", 4096)
    path = render(tmp_path / "v.mkv", count=400, codec="mpeg4", gop=4)
    uri = put(bucket, path)
    stream = batches(uri, storage=bucket, backend="pyav", frames=EVERY)
    next(stream)
    st.write_bytes_atomic(uri, path.read_bytes()[::-1], bucket)
    with pytest.raises(UnitError) as caught:
        list(stream)
    assert (caught.value.stage, caught.value.error_type) == ("fetch", "Changed")


def test_a_few_frames_of_a_long_object_fetch_little_of_it(bucket, tmp_path, monkeypatch):
    path = render(
        tmp_path / "long.mp4", times_s=[i * 5.0 for i in range(1200)], codec="mpeg4", gop=4, height=480, width=720
    )
    uri, size = put(bucket, path), path.stat().st_size
    monkeypatch.setattr("pipeline.decoding.media._RANGE_BLOCK_BYTES", 4096)
    fetched = []
    fetch = Media._opened

    def counted(self, **caching):
        file = fetch(self, **caching)
        if not self.remote:
            return file
        ranged = file._fetch_range
        file.cache.fetcher = lambda a, b: fetched.append(b - a) or ranged(a, b)
        return file

    monkeypatch.setattr(Media, "_opened", counted)
    rule = Frames(strategy="uniform", count=5)
    assert decoded(uri, storage=bucket, backend="pyav", frames=rule)[0] == [0, 299, 599, 899, 1199]
    assert decoded(path, backend="decord", frames=rule)[0] == [0, 299, 599, 899, 1199]
    assert 0 < sum(fetched) < size / 4
    fetched.clear()
    assert decoded(uri, storage=bucket, backend="pyav", start_s=1000.0, end_s=1040.0)[0] == list(range(200, 208))
    assert 0 < sum(fetched) < size / 4


# --- image sets ---------------------------------------------------------------------------------------------------


def test_images_come_one_by_one_upright_and_in_rgb(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # stored rotated; displayed 90° clockwise
    Image.fromarray(np.rot90(picture(1)).copy()).save(tmp_path / "turned.jpg", exif=exif, quality=95)
    Image.fromarray(picture(2)).convert("P", palette=Image.Palette.ADAPTIVE).save(tmp_path / "palette.png")
    Image.fromarray(picture(3, 300, 450)).convert("CMYK").save(tmp_path / "cmyk.tif")
    Image.fromarray(picture(4)).save(tmp_path / "small.webp", quality=95)
    paths = [tmp_path / name for name in ("turned.jpg", "palette.png", "cmyk.tif", "small.webp")]
    parts = list(batches_of_images(paths))
    assert [part.item for part in parts] == [0, 1, 2, 3]
    assert [read_index(part.frames[0]) for part in parts] == [1, 2, 3, 4]
    assert all(len(part.frames) == 1 and part.times_s.tolist() == [0.0] for part in parts)
    assert all(np.abs(read_colours(part.frames[0]) - PATCHES).max() < 20 for part in parts)


def batches_of_images(paths, storage=None, sizing=SIZING, **options):
    return decode_unit(
        unit(paths, kind="images", **options),
        frames=EVERY,
        decode=Decode(),
        storage=storage or Storage(),
        sizing=sizing,
    )


def test_transparency_is_white_and_sixteen_bits_are_scaled(tmp_path):
    glass = np.zeros((64, 64, 4), dtype=np.uint8)
    glass[:, 32:] = (200, 0, 0, 255)
    Image.fromarray(glass).save(tmp_path / "glass.png")
    Image.fromarray(np.full((64, 64), 128 << 8, dtype=np.uint16)).save(tmp_path / "deep.png")
    see_through, deep = (part.frames[0] for part in batches_of_images([tmp_path / "glass.png", tmp_path / "deep.png"]))
    assert see_through[5, 5].tolist() == [255, 255, 255]
    assert see_through[5, 60].tolist() == [200, 0, 0]
    assert np.unique(deep).tolist() == [128]


def test_images_are_cropped_to_the_middle(tmp_path):
    Image.fromarray(picture(9, 64, 128)).save(tmp_path / "a.png")
    (part,) = batches_of_images([tmp_path / "a.png"], sizing=Sizing.square(32))
    assert part.frames.shape == (1, 32, 32, 3)
    assert part.frames[0, 24, 16].tolist() == list(PATCHES[1])


def test_images_that_cannot_be_used_name_the_file(tmp_path, monkeypatch):
    good = tmp_path / "good.png"
    Image.fromarray(picture(0)).save(good)
    (tmp_path / "text.png").write_text("not an image")
    (tmp_path / "empty.png").touch()
    noise = np.random.default_rng(0).integers(0, 256, (200, 200, 3), dtype=np.uint8)
    Image.fromarray(noise).save(tmp_path / "cut.jpg")
    (tmp_path / "cut.jpg").write_bytes((tmp_path / "cut.jpg").read_bytes()[:5000])
    expected = {
        "text.png": ("decode", "NotAnImage"),
        "empty.png": ("fetch", "Empty"),
        "cut.jpg": ("decode", "Corrupt"),
        "absent.png": ("fetch", "NotFound"),
    }
    for name, kind in expected.items():
        stream = batches_of_images([good, tmp_path / name])
        assert next(stream).item == 0
        with pytest.raises(UnitError, match=name) as caught:
            next(stream)
        assert (caught.value.stage, caught.value.error_type) == kind
    with pytest.raises(UnitError, match="Changed"):
        list(batches_of_images([good], etag="another"))


def test_a_decompression_bomb_is_refused_before_it_is_decoded(tmp_path):
    for name, side in (("bomb.png", 12_000), ("larger.png", 20_000)):
        Image.new("1", (side, side)).save(tmp_path / name)
        with pytest.raises(UnitError, match="pixels") as caught:
            list(batches_of_images([tmp_path / name]))
        assert (caught.value.stage, caught.value.error_type) == ("decode", "TooLarge")


def test_image_objects_are_read_from_s3(bucket, tmp_path):
    Image.fromarray(picture(77)).save(tmp_path / "i.png")
    (part,) = batches_of_images([put(bucket, tmp_path / "i.png")], storage=bucket)
    assert read_index(part.frames[0]) == 77
