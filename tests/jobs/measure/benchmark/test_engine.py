"""The engine's suite: its measurements, its arithmetic and its tables."""

import dataclasses
import json
from functools import partial
from pathlib import Path

import pytest
import torch

from jobs.measure.benchmark import __main__ as benchmark
from jobs.measure.benchmark.decoder import QWEN2_5_VL
from jobs.measure.benchmark.engine import hours, memory, suite
from jobs.measure.benchmark.engine.rounds import in_turns, ratios, spread
from jobs.measure.benchmark.engine.scale import BUDGETED, PLAIN, STREAMED, VARIANTS, on_cpu, on_gpu
from jobs.measure.benchmark.engine.subject import Drawn, Mini, Video, request
from jobs.measure.benchmark.engine.throughput import ENGINE, LOOP, OURS
from jobs.measure.benchmark.readme import engine
from jobs.measure.benchmark.scale import on_cpu as tiny_scale
from lightkv import Engine, Memory

ROOT = Path(__file__).parents[4]
CPU = torch.device("cpu")
SIZES = dict(
    minutes=(1,), plain_minutes=1, units=(tuple(Video(number, 4, 96, 2.0) for number in range(2)),), answers=2,
    prompts=(1, 2), asked=Video(0, 4, 96, 4.0), compared=(Video(7, 8, 96, 2.0),), pieces=40, chunk_tokens=200, rounds=1,
    budget_s=0.0,
)  # fmt: skip
TINY = dataclasses.replace(on_cpu(), subject=partial(Mini, 6), **SIZES)
DECODER = next(decoder for decoder in tiny_scale(CPU).decoders if decoder.kind == QWEN2_5_VL)


def drawn(new_tokens=5):
    torch.manual_seed(0)
    return Drawn(DECODER, CPU, torch.float32, new_tokens)


# --- the whole suite ---


@pytest.fixture(scope="module")
def result(tmp_path_factory):
    path = tmp_path_factory.mktemp("benchmark") / "engine-cpu.json"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(suite, "scale_of", lambda device: TINY)
        assert benchmark.main(["--device", "cpu", "--suite", "engine", "--json", str(path)]) == 0
    return json.loads(path.read_text())


def of(result, part, name):
    (cell,) = (cell for cell in result["cells"] if (cell["suite"], cell["name"]) == (part, name))
    return cell


def test_the_file_says_what_was_run_and_every_part_is_measured(result):
    assert result["command"] == "python -m jobs.measure.benchmark --device cpu --json engine-cpu.json --suite engine"
    assert result["device"]["type"] == "cpu"
    assert result["versions"]["torch"] == torch.__version__
    assert {cell["suite"] for cell in result["cells"]} == set(suite.SHARES)
    assert {cell["status"] for cell in result["cells"]} == {"measured"}


def test_memory_counts_the_cache_of_every_variant(result):
    cells = {name: of(result, "memory", name) for name in (PLAIN, *VARIANTS)}
    text = cells[PLAIN]["kv_bytes"] - 480 * 3072  # 30 steps of 16 tokens; 6 layers, k and v, 2 heads of 32, fp32
    assert 0 < text < 40 * 3072
    assert cells[STREAMED]["kv_bytes"] == cells[PLAIN]["kv_bytes"]
    held = [cells[name]["kv_bytes"] for name in VARIANTS if name != BUDGETED]
    assert held == sorted(held, reverse=True)
    assert held[1] == pytest.approx(480 * 3072 / 4 + text, rel=0.05)
    assert cells[BUDGETED]["kv_bytes"] == cells["+ folded"]["kv_bytes"]  # a budget that half a minute does not reach
    assert all(cell["peak_bytes"] > 0 for cell in cells.values())


def test_throughput_compares_the_same_captions_in_turns(result):
    cell = of(result, "throughput", "captions")
    assert cell["equal_to_loop"][ENGINE] == 1.0
    assert cell["times_loop"][LOOP] == {"median": 1.0, "min": 1.0, "max": 1.0}
    for name in (LOOP, ENGINE, OURS):
        seconds, units = cell["seconds_per_round"][name]["median"], cell["units_per_hour"][name]["median"]
        assert units == pytest.approx(3600 * 2 / seconds)


@pytest.mark.parametrize("method", ["lightkv", "spacetime"])
def test_prompts_are_compared_with_one_of_them(result, method):
    cell = of(result, "prompts", method)
    assert cell["vision_tokens"] == 2 * 36
    assert cell["times_one"]["1"]["median"] == cell["times_one_with_tower"]["1"]["median"] == 1.0
    assert set(cell["times_one"]) == {"1", "2"}


def test_without_compression_pieces_change_no_answer(result):
    cell = of(result, "streamed", "plain")
    assert cell["equal"] == cell["answers"] > 3
    assert (cell["vision_tokens"], cell["pieces"]) == (144, 4)
    assert 0 <= of(result, "streamed", "lightkv 25%")["share"] <= 1


def test_the_suite_runs_by_itself(tmp_path, capsys):
    with pytest.raises(SystemExit):
        benchmark.main(["--device", "cpu", "--suite", "engine", "ops", "--json", str(tmp_path / "x.json")])
    assert "expected no other suite" in capsys.readouterr().err


# --- an hour of video ---


def test_an_hour_of_plain_video_is_what_its_shape_says():
    plain = hours.hour(None)
    assert plain.kv_bytes == 460_800 * 28 * 2 * 4 * 128 * 2
    assert plain.most_bytes == plain.kv_bytes * 1.25 + plain.kv_bytes / 28 * 2
    assert plain.fit(24e9) == pytest.approx(6.5e9 / plain.most_bytes)
    assert plain.fit(17e9) == 0.0


def test_what_is_kept_folded_and_packed_takes_its_share_of_the_hour():
    rows = hours.rows()
    plain = rows["plain"].kv_bytes
    share = {name: row.kv_bytes / plain for name, row in rows.items()}
    assert share["published 55%"] == pytest.approx(0.55, abs=0.001)
    assert share["lightkv 25%"] == pytest.approx(0.25, abs=0.001)
    assert share["+ folded"] < share["lightkv 25%"]
    assert share["+ 8 bits"] == pytest.approx(share["+ folded"] * 9 / 16)
    assert share["+ 4 bits"] == pytest.approx(share["+ folded"] * 5 / 16)
    fits = [row.fit(24e9) for row in rows.values()]
    assert fits == sorted(fits)


# --- what is measured ---


def test_videos_are_made_as_they_are_asked_for():
    mini = Mini(4)
    batches = mini.batches(Video(0, 70, 64))
    assert next(batches).shape == (30, 64, 64, 3)
    assert [len(frames) for frames in batches] == [30, 10]
    parts = list(mini.vision(mini.batches(Video(0, 70, 64))))
    assert [(part.grid, part.first) for part in parts] == [((15, 4, 4), 0), ((15, 4, 4), 15), ((5, 4, 4), 30)]
    assert (next(mini.batches(Video(0, 8, 64))) != next(mini.batches(Video(1, 8, 64)))).any()


def test_the_loop_over_random_weights_says_what_the_engine_says():
    subject, video = drawn(), Video(3, 70, 84)
    plain = subject.plain(subject.batches(video))
    asked = request(subject, 0, subject.vision(subject.batches(video)))
    (result,) = Engine(subject.model, None, Memory(chunk_tokens=50)).run([asked])
    assert subject.said(result.answers[0]) == plain
    assert result.vision_tokens == 35 * 9
    assert plain.kv_bytes == (35 * 9 + 16 + 32) * 4 * 2 * 2 * 16 * 4


def test_every_part_runs_on_random_weights_as_on_a_gpu(monkeypatch):
    for name, found in (("reset_peak_memory_stats", None), ("memory_allocated", 5), ("max_memory_allocated", 12)):
        monkeypatch.setattr(torch.cuda, name, lambda device, found=found: found)
    sizes = (
        SIZES
        | {"minutes": (1,), "side_px": 56}
        | {name: dataclasses.replace(SIZES[name], side_px=56) for name in ("asked",)}
    )
    sizes["compared"] = tuple(dataclasses.replace(video, side_px=56) for video in SIZES["compared"])
    sizes["units"] = tuple(tuple(dataclasses.replace(video, side_px=56) for video in of) for of in SIZES["units"])
    scale = dataclasses.replace(TINY, subject=drawn, **sizes)
    found = memory.on_device(scale, "+ 4 bits", 1)
    assert found["peak_bytes"] == 7
    for cell in suite.cells(scale):
        if cell.suite not in ("memory", "hours"):
            with torch.inference_mode():
                cell.measure(None)


def test_a_gpu_gets_every_measurement_once():
    cells = suite.cells(on_gpu(CPU))
    keys = [json.dumps(cell.key) for cell in cells]
    assert len(set(keys)) == len(keys) > 30
    assert {cell.suite for cell in cells} == set(suite.SHARES)


def test_a_process_that_ends_without_a_word_is_an_error():
    with pytest.raises(RuntimeError, match="without a result"):
        memory.alone(dataclasses.replace(TINY, subject=partial(_ends, 3)), PLAIN, 1)


def _ends(code):
    import os

    os._exit(code)


def test_rounds_go_there_and_back_and_ratios_are_taken_within_them():
    order = []
    works = {name: partial(order.append, name) for name in "ab"}
    seconds = in_turns(works, 3, 0.0, CPU)
    assert "".join(order) == "ab" + "ab" + "ba" + "ab"
    assert [len(of) for of in seconds.values()] == [3, 3]
    assert ratios([2.0, 9.0, 4.0], [1.0, 3.0, 4.0]) == {"median": 2.0, "min": 1.0, "max": 3.0}
    assert spread([3.0, 1.0, 2.0]) == {"median": 2.0, "min": 1.0, "max": 3.0}


# --- the page ---


def test_the_page_has_a_table_per_part_and_says_what_was_not_measured(result):
    cells = [dict(cell) for cell in result["cells"]]
    lost = next(cell for cell in cells if (cell["suite"], cell["name"]) == ("memory", PLAIN))
    lost |= {"status": "not measured", "why": "out of time"}
    text = engine([result | {"cells": cells}])
    assert "| plain | 26.4 GB | 0 h 11 min | 1 h 47 min |" in text
    assert f"| {PLAIN} | – |" in text
    assert f"| 2 × 4, 96 px | 72 | {LOOP} | " in text
    assert "| lightkv, vision tower included | ×1.00 | " in text
    assert "answers are word for word the same" in text
    assert "– not measured: out of time (1)." in text
    assert text.endswith("in the shape of Qwen2.5-VL-7B).")
    assert "On a GPU" not in engine([result | {"device": {"type": "cuda", "name": "A GPU"}}])
    assert engine([]).startswith("Not measured")
