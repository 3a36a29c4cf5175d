"""Which units are skipped by their length, what messages contain, and how long a decode task waits for its reader."""

import asyncio
import pickle
import subprocess
import sys

import pytest
from PIL import Image

from pipeline.cluster.decode_tasks import AHEAD, ReadCounts, check_length, decoded
from pipeline.config import Clips, Decode, Frames, Storage
from pipeline.decoding.frames import Sizing
from pipeline.errors import SkippedError, UnitError

_LIMITS = Clips(skip_shorter_s=2.0, skip_longer_s=60.0)


def _unit(start_s=None, end_s=None, duration_s=None):
    return {"kind": "video", "uris": ["a.mp4"], "start_s": start_s, "end_s": end_s, "duration_s": duration_s}


@pytest.mark.parametrize("unit", [_unit(duration_s=2.0), _unit(duration_s=60.0), _unit(5.0, 10.0, 3600.0), _unit()])
def test_units_within_the_limits_or_of_unknown_length_are_captioned(unit):
    check_length(unit, _LIMITS)


@pytest.mark.parametrize(
    ("unit", "kind"),
    [(_unit(duration_s=1.9), "TooShort"), (_unit(59.0, None, 60.0), "TooShort"), (_unit(0.0, 61.0), "TooLong")],
)
def test_units_outside_the_limits_are_skipped(unit, kind):
    with pytest.raises(SkippedError) as error:
        check_length(unit, _LIMITS)
    assert error.value.error_type == kind


def test_nothing_is_skipped_by_default():
    check_length(_unit(duration_s=1e9), Clips())


@pytest.mark.parametrize(
    ("unit", "stage", "kind"),
    [
        (_unit(duration_s=1.0), "plan", "TooShort"),
        ({**_unit(), "id": "a", "uris": ["/nowhere/a.mp4"]}, "fetch", "NotFound"),
        ({}, "decode", "KeyError"),
    ],
)
def test_what_keeps_a_unit_from_being_decoded_is_its_last_item(unit, stage, kind):
    settings = pickle.dumps((_LIMITS, Frames(), Decode(), Storage(), Sizing(28, 28 * 28, 56 * 56)))
    (error,) = decoded(unit, settings)
    assert isinstance(error, UnitError)
    assert (error.stage, error.error_type) == (stage, kind)


def test_the_module_of_the_tasks_imports_no_decoder():
    """Decode processes and the counter load this module: no heavy imports."""
    heavy = {"av", "decord", "pyarrow.fs", "pipeline.config", "pipeline.decoding.decode"}
    code = f"import sys, pipeline.cluster.decode_tasks; print(*{heavy} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert not done.stdout.strip()


def _images(folder, count):
    for number in range(count):
        Image.new("RGB", (64, 64), (number, 0, 0)).save(folder / f"{number}.png")
    uris = [str(folder / f"{number}.png") for number in range(count)]
    return {"id": "a", "kind": "images", "uris": uris, "start_s": None, "end_s": None, "duration_s": None}


def test_images_of_a_set_come_in_messages_of_several(tmp_path):
    settings = pickle.dumps((Clips(), Frames(batch_frames=3), Decode(), Storage(), Sizing(28, 28 * 28, 56 * 56)))
    unit = _images(tmp_path, 7)
    messages = list(decoded(unit, settings))
    assert [[batch.item for batch in message] for message in messages] == [[0, 1, 2], [3, 4, 5], [6]]
    (tmp_path / "4.png").unlink()
    *messages, error = decoded(unit, settings)
    assert [[batch.item for batch in message] for message in messages] == [[0, 1, 2], [3]]
    assert error.error_type == "NotFound"


def test_a_decoder_waits_until_its_reader_has_read_so_many_messages():
    async def story():
        counts = ReadCounts()
        waits = asyncio.create_task(counts.wait("a", AHEAD))
        for count in range(1, AHEAD):
            await counts.read("a", count)
            await asyncio.sleep(0)
            assert not waits.done()
        await counts.read("b", AHEAD)
        await counts.read("a", AHEAD)
        assert await waits is True
        assert await counts.wait("a", AHEAD) is True

    asyncio.run(story())


def test_a_stream_that_is_closed_wakes_its_decoder_and_no_wait_lasts_for_ever():
    async def story():
        counts = ReadCounts()
        waits = asyncio.create_task(counts.wait("a", 1))
        await asyncio.sleep(0)
        await counts.close("a")
        assert await waits is True
        assert await counts.wait("a", 1, timeout_s=0.01) is False

    asyncio.run(story())
