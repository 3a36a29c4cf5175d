"""The benchmark: its measurements, its result file after failures, and its tables."""

import dataclasses
import json
import os
import re
import sys
from pathlib import Path

import pytest
import torch

from jobs.measure.benchmark import __main__ as benchmark
from jobs.measure.benchmark import timer
from jobs.measure.benchmark.cell import Cell, parts
from jobs.measure.benchmark.decoder import weight_bytes
from jobs.measure.benchmark.derive import COPY, LAYER, PLAIN, derive
from jobs.measure.benchmark.model import Load
from jobs.measure.benchmark.ops.attend import FLEX, decode, flex, flex_attention, packed, prefill, torch_only
from jobs.measure.benchmark.ops.bytes import (
    angles_bytes,
    attend_bytes,
    attend_packed_bytes,
    causal_flops,
    compact_bytes,
    merge_bytes,
    nearest_bytes,
    votes_bytes,
)
from jobs.measure.benchmark.ops.op import KERNEL, TWIN, Op, OpWork
from jobs.measure.benchmark.ops.suite import ANGLES
from jobs.measure.benchmark.ops.tokens import (
    GATHERED,
    MERGE_GATHER,
    angles,
    compacting,
    merging,
    nearest_in_blocks,
    nearest_in_windows,
    votes,
)
from jobs.measure.benchmark.prompt import Prompt, grid_of, three_axes
from jobs.measure.benchmark.readme import NOT_MEASURED, speed
from jobs.measure.benchmark.result import ResultFile
from jobs.measure.benchmark.run import OUT_OF_TIME, SHARES, ends, run
from jobs.measure.benchmark.scale import on_cpu, on_gpu
from jobs.measure.benchmark.timer import Timer, Timing
from lightkv import ConfigError, VisionLayout
from tests.lightkv.tiny import IMAGE, tiny_model

CPU = torch.device("cpu")
TINY = dataclasses.replace(
    on_cpu(CPU), op_tokens=(64,), stage_tokens=(64,), prefill_vision=(64,), prefill_batches=(2,), decode_vision=64,
    decode_batches=(2,), copy_bytes=1 << 12, matmul_side=8, budget_s=0.0,
)  # fmt: skip
H200_BYTES = 150_754_820_096


def work(seconds=None, **values):
    return lambda timer: {"seconds": vars(Timing.of(seconds or [1.0]))} | values


def fail(error):
    def measure(timer):
        raise error

    return measure


def cells_of(*measures, suite="stage", **options):
    return [Cell(suite, f"cell {n}", {"tokens": n}, measure, **options) for n, measure in enumerate(measures)]


def run_all(cells, path, clock=lambda: 0.0, limit_s=60.0):
    result = ResultFile(path, {"command": "run"}, cells)
    run(cells, result, Timer(CPU, 0.0), dict.fromkeys(SHARES, limit_s), clock, say=lambda line: None)
    return json.loads(path.read_text())["cells"]


# --- the job ---


@pytest.fixture(scope="module")
def result(tmp_path_factory):
    path = tmp_path_factory.mktemp("benchmark") / "benchmark-cpu.json"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(benchmark, "scale_of", lambda kind: TINY)
        assert benchmark.main(["--device", "cpu", "--json", str(path)]) == 0
    return json.loads(path.read_text())


def of(result, suite, name, **at):
    (cell,) = (c for c in result["cells"] if (c["suite"], c["name"]) == (suite, name) and c["at"].items() >= at.items())
    return cell


def test_the_file_says_what_was_run_where_and_with_what(result):
    assert result["command"] == "python -m jobs.measure.benchmark --device cpu --json benchmark-cpu.json"
    assert result["device"]["type"] == "cpu"
    assert result["dtype"] == "float32"
    assert result["versions"]["torch"] == torch.__version__
    assert {"python", "triton", "transformers", "lightkv"} < set(result["versions"])
    assert 0 < result["spent_s"] < result["limit_s"] == 450


def test_every_cell_of_every_suite_is_measured(result):
    assert {cell["suite"] for cell in result["cells"]} == set(SHARES)
    assert {cell["status"] for cell in result["cells"]} == {"measured"}
    timed = [part["seconds"] for cell in result["cells"] for part in parts(cell) if "seconds" in part]
    assert timed
    assert all(0 < s["min_s"] <= s["median_s"] <= s["max_s"] and s["repeats"] >= 2 for s in timed)


def test_operations_have_their_twin_and_no_kernel_on_a_cpu(result):
    cell = of(result, "ops", "attend, prefill", tokens=64)
    assert cell["forms"][KERNEL] == {"status": "not measured", "why": "no kernel on cpu"}
    twin = cell["forms"][TWIN]
    rate = of(result, "ops", COPY)
    assert rate["bytes"] == 2 << 12
    per_second = rate["bytes"] / rate["seconds"]["median_s"]
    assert twin["share_of_copy"] == pytest.approx(cell["bytes"] / twin["seconds"]["median_s"] / per_second)
    assert set(cell["forms"]) == {KERNEL, TWIN, "sdpa", "no kernel", FLEX}
    assert cell["forms"][FLEX] == {"status": "not measured", "why": "flex, compiled, is for GPUs"}
    assert set(of(result, "ops", "merge and compact half", tokens=64)["forms"]) == {KERNEL, TWIN, MERGE_GATHER}
    assert set(of(result, "ops", ANGLES, tokens=64)["forms"]) == {TWIN, GATHERED}


def test_stages_leave_what_their_schedule_says(result):
    layer = of(result, "stage", LAYER)["seconds"]["median_s"]
    for name in ("lightkv, first stage", "lightkv, second stage", "published, first stage"):
        cell = of(result, "stage", name)
        assert cell["share_of_layer"] == pytest.approx(cell["seconds"]["median_s"] / layer)
        assert cell["kept"] == 64 + 64 - int(64 * cell["drop"] + 1e-9)


@pytest.mark.parametrize("model", ["tiny llama", "tiny qwen2.5-vl"])
def test_prefill_holds_the_share_of_the_cache_that_was_asked_for(result, model):
    plain = of(result, "prefill", PLAIN, model=model)
    assert plain["kv_bytes"] == 2 * 4 * 2 * (64 + 64) * 2 * 16 * 4  # batch, layers, k and v, tokens, heads, dims, fp32
    for share in (0.55, 0.25):
        cell = of(result, "prefill", f"lightkv {share:.0%}", model=model)
        assert cell["retention"] == pytest.approx(share, abs=2 / 64)  # each of two stages may keep a token more
        assert cell["kv_bytes"] == pytest.approx(plain["kv_bytes"] * (1 + cell["retention"]) / 2)
        assert cell["analytic_speedup"] > 1
        assert cell["speedup"] == pytest.approx(plain["seconds"]["median_s"] / cell["seconds"]["median_s"])
    assert of(result, "prefill", "published", model=model)["retention"] < 1
    assert of(result, "decode", "lightkv 25%", model=model)["kv_bytes"] == cell["kv_bytes"]


def test_a_missing_gpu_is_refused(capsys, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit):
        benchmark.main(["--device", "cuda", "--json", str(tmp_path / "x.json")])
    assert "--device cpu" in capsys.readouterr().err
    assert not (tmp_path / "x.json").exists()


def test_it_needs_neither_the_pipeline_nor_what_that_needs():
    files = [file for file in Path(benchmark.__file__).parent.rglob("*.py") if file.name != "readme.py"]
    files = [file for file in files if file.parent.name != "engine"]
    imports = {name for file in files for name in re.findall(r"^(?:from|import) ([\w.]+)", file.read_text(), re.M)}
    others = {name.split(".")[0] for name in imports if not name.startswith("jobs.measure.benchmark")}
    assert others - sys.stdlib_module_names == {
        "lightkv",
        "torch",
        "transformers",
    }


# --- time, memory, failures ---


def test_a_failure_is_the_exit_code(tmp_path, monkeypatch):
    for error, code in ((ZeroDivisionError(), 1), (torch.OutOfMemoryError(), 0)):
        monkeypatch.setattr(benchmark, "cells", lambda *_, error=error: cells_of(fail(error)))
        assert benchmark.main(["--device", "cpu", "--json", str(tmp_path / "r.json"), "--suite", "stage"]) == code


def test_what_is_left_when_time_is_up_is_written_down(tmp_path):
    now = iter(range(0, 1000, 4))
    found = run_all(cells_of(work(), work(), work()), tmp_path / "r.json", lambda: next(now), limit_s=20.0)
    assert [cell["status"] for cell in found] == ["measured", "measured", "not measured"]
    assert found[2]["why"] == OUT_OF_TIME


def test_a_cell_that_would_end_too_late_is_not_begun(tmp_path):
    (found,) = run_all(cells_of(fail(AssertionError("begun")), estimate_s=61.0), tmp_path / "r.json")
    assert found["why"] == OUT_OF_TIME


def test_suites_share_the_time_and_the_last_one_has_it_all():
    assert ends({name: SHARES[name] for name in ("ops", "decode")}, 90.0) == pytest.approx(
        {"ops": 60.0, "decode": 90.0}
    )
    assert ends(SHARES, 480.0)["decode"] == pytest.approx(480.0)


def test_want_of_memory_is_a_cell_and_so_is_an_error(tmp_path):
    bad = [fail(torch.OutOfMemoryError("CUDA out of memory.\nmore")), fail(ZeroDivisionError("by zero"))]
    found = run_all(cells_of(*bad, work(), work(), suite="ops"), tmp_path / "r.json")
    assert found[0]["status"] == "not measured"
    assert found[0]["why"] == "out of memory: CUDA out of memory."
    assert (found[1]["status"], found[1]["why"]) == ("failed", "ZeroDivisionError: by zero")
    assert [cell["status"] for cell in found[2:]] == ["measured", "measured"]


def test_a_form_that_fails_leaves_the_others():
    def broken():
        raise torch.OutOfMemoryError("too much")

    op = Op("op", lambda scale, tokens: OpWork(broken, broken, 8, 0, {"other": lambda: None}), twin_most=10)
    forms = op.measure(TINY, 10, Timer(CPU, 0.0))["forms"]
    assert [forms[name]["status"] for name in (KERNEL, TWIN, "other")] == ["not measured", "not measured", "measured"]
    assert op.measure(TINY, 11, Timer(CPU, 0.0))["forms"][TWIN]["why"] == "the twin takes too long above 10 tokens"


def test_a_killed_run_keeps_what_it_measured(tmp_path):
    path = tmp_path / "r.json"
    with pytest.raises(KeyboardInterrupt):
        run_all(cells_of(work(), fail(KeyboardInterrupt()), work()), path)
    found = json.loads(path.read_text())["cells"]
    assert [cell.get("why") for cell in found] == [None, "not reached", "not reached"]
    assert [file.name for file in tmp_path.iterdir()] == ["r.json"]


def test_what_cannot_fit_is_not_tried():
    scale = on_gpu(CPU, H200_BYTES)
    vicuna = scale.decoders[0]
    assert Load(vicuna, None, 65536, 8).skip(scale).startswith("needs about 341 GiB of 1")
    assert Load(vicuna, vicuna.ours(0.25), 65536, 8).skip(scale) == ""
    assert Load(vicuna, None, 65536, 1).skip(scale) == ""


def test_weights_are_estimated_as_they_are():
    for decoder in TINY.decoders:
        language = decoder.build(CPU, torch.float32)
        halves = (language.get_decoder(), language.get_output_embeddings())
        real = sum(parameter.nbytes for half in halves for parameter in half.parameters())
        assert weight_bytes(decoder.shape, 4) == pytest.approx(real, rel=0.02)  # norms and biases are left out


def test_a_gpu_gets_every_size_once_and_the_longest_last():
    found = benchmark.cells(on_gpu(CPU, H200_BYTES), list(SHARES))
    keys = [json.dumps(cell.key) for cell in found]
    assert len(set(keys)) == len(keys)
    tokens = {cell.at["tokens"] for cell in found if cell.name == "merge half"}
    assert tokens == {n * 1024 for n in (1, 4, 8, 32, 64, 256)}
    long = [cell.estimate_s > 20 for cell in found if cell.suite == "prefill"]
    assert long == sorted(long)


def test_models_that_are_not_named_are_left_out_of_prefill_and_decode_alone():
    every, some = (benchmark.cells(TINY, list(SHARES), models) for models in ((), ["tiny qwen2.5-vl"]))
    assert {cell.at["model"] for cell in some if "model" in cell.at} == {"tiny qwen2.5-vl"}
    rest = [[cell.key for cell in cells if "model" not in cell.at] for cells in (every, some)]
    assert rest[0] == rest[1]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [(["--models", "bert"], r"expected some of \['tiny llama', .*got \['bert'\]"),
     (["--models", "tiny llama", "--suite", "engine"], "has its own model")],
)  # fmt: skip
def test_models_that_are_not_there_are_refused(arguments, message, tmp_path, capsys):
    with pytest.raises(SystemExit):
        benchmark.main(["--device", "cpu", "--json", str(tmp_path / "x.json"), *arguments])
    assert re.search(message, capsys.readouterr().err)


# --- what is timed ---


def test_a_timer_warms_up_and_repeats_within_its_budget():
    calls = []
    timing = Timer(CPU, budget_s=0.0, least=4).time(lambda: calls.append("work"), lambda: calls.append("before"))
    assert timing.repeats == 4
    assert calls == ["work", *["before", "work"] * 4]
    assert Timer(CPU, budget_s=60.0, most=7).time(lambda: None).repeats == 7
    assert Timer(CPU, budget_s=60.0, longest_s=0.0).time(lambda: None).repeats == 2


def test_a_gpu_is_timed_by_its_events(monkeypatch):
    class Event:
        clock = 0.0

        def __init__(self, enable_timing):
            assert enable_timing

        def record(self):
            self.at = Event.clock

        def synchronize(self):
            pass

        def elapsed_time(self, other):
            return other.at - self.at  # ms

    def advance():
        Event.clock += 5.0

    monkeypatch.setattr(timer.torch.cuda, "Event", Event)
    assert Timer(torch.device("cuda"), 0.0).time(advance) == Timing(0.005, 0.005, 0.005, 3)


def test_the_median_and_the_ends():
    assert Timing.of([3.0, 1.0, 2.0]) == Timing(2.0, 1.0, 3.0, 3)


@pytest.mark.parametrize("setting", [prefill, decode])
def test_attention_without_the_kernel_is_the_same_attention(setting):
    form = setting(TINY, 40)
    torch.testing.assert_close(form.beside["no kernel"](), form.twin(), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(form.operation(), form.twin(), atol=1e-5, rtol=1e-5)
    assert form.beside["sdpa"]().transpose(1, 2).shape == form.twin().shape


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_flex_attention_with_the_bias_is_the_same_attention():
    form = prefill(TINY, 130)
    q, k, v, bias, _, scale = form.operation.args
    found = flex(q, k, v, bias[0], scale, flex_attention)()
    torch.testing.assert_close(found.transpose(1, 2), form.twin(), atol=1e-5, rtol=1e-5)


def test_packed_prefills_are_the_same_attention_in_every_form():
    form = packed(TINY, 100)
    _, keys, sequences, k_sequences, _ = form.operation.args
    lengths = sequences.starts.diff().tolist()
    assert lengths == [2, 6, 8, 11, 14, 17, 19, 23]
    assert (sequences.longest, len(keys.k)) == (23, 100)
    assert sequences is k_sequences
    twin = form.twin()
    torch.testing.assert_close(form.operation(), twin, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(torch.cat(form.beside["no kernel"](), 1)[0], twin, atol=1e-5, rtol=1e-5)
    in_rows = [row[-length:] for row, length in zip(form.beside["padded"](), lengths, strict=True)]
    torch.testing.assert_close(torch.cat(in_rows), twin, atol=1e-5, rtol=1e-5)
    assert [part.shape[2] for part in form.beside["sdpa"]()] == lengths
    assert form.flops == sum(prefill(TINY, length).flops for length in lengths)


def test_switching_kernels_off_is_undone(monkeypatch):
    for before in ("auto", None):
        monkeypatch.delenv("LIGHTKV_OPS", raising=False)
        if before:
            monkeypatch.setenv("LIGHTKV_OPS", before)
        with torch_only():
            assert os.environ["LIGHTKV_OPS"] == "torch"
        assert os.environ.get("LIGHTKV_OPS") == before


def test_nearest_is_set_up_with_half_of_every_group_in_a():
    form = nearest_in_blocks(TINY, 2048)
    _, _, _, groups, distance = form.operation.args
    assert groups.starts.tolist() == [0, 1024, 2048]
    assert groups.middles.tolist() == [512, 1536]
    assert sorted(groups.order.tolist()) == list(range(2048))
    assert (groups.largest, distance) == (1024, 0.02)
    assert form.flops == 2 * 2 * 512 * 512 * 64


def test_windows_are_those_of_the_published_stage():
    _, _, place, groups, _ = nearest_in_windows(TINY, 64, 0).operation.args
    assert place is None
    assert groups.starts.diff().tolist() == [4] * 16  # 4 × 4 windows on 8 × 8 tokens
    assert (groups.middles - groups.starts[:-1]).tolist() == [2] * 16
    assert groups.order[:4].tolist() == [0, 8, 1, 9]  # row by row 0, 1, 8, 9: every second one is in A
    assert groups.largest == 2


def test_merging_takes_sources_that_stay_nobodys_target():
    _, _, source, target = merging(TINY, 100, 10).operation.args
    assert len(source) == len(set(source.tolist())) == 10
    assert not set(source.tolist()) & set(target.tolist())


def test_compaction_in_one_pass_and_in_two_is_the_same():
    form = compacting(TINY, 100, 10)
    source, target, kept = form.operation.args[2:5]
    assert sorted([*source.tolist(), *kept.tolist()]) == list(range(100))
    assert kept.equal(kept.sort().values)
    assert set(target.tolist()) <= set(kept.tolist())
    (hidden, weight, columns), (rows, weights, places) = form.operation(), form.beside[MERGE_GATHER]()
    for one, other in ((hidden, rows), (weight, weights), (columns, torch.stack(places))):
        assert torch.equal(one, other)
    given = [*form.operation.args[:2], form.operation.args[-1], hidden, weight, columns]  # all but sources' integers
    read = sum(tensor.nbytes for tensor in given) + (2 * 10 + 90) * 8 - 10 * len(columns) * 8
    assert form.moved_bytes == read


@pytest.mark.parametrize("decoder", TINY.decoders, ids=lambda decoder: decoder.name)
def test_angles_are_the_same_computed_and_gathered(decoder):
    form = angles(dataclasses.replace(TINY, decoders=(decoder,)), 40)
    computed, gathered = form.twin(), form.beside[GATHERED]()
    assert computed[0].shape[-2:] == (20, TINY.shape.head_dim)
    for one, other in zip(computed, gathered, strict=True):
        torch.testing.assert_close(one, other)
    assert form.moved_bytes == sum(table.nbytes for table in computed) + 20 * 8 * decoder.kind.axes
    assert form.operation is None


@pytest.mark.parametrize(("reduce", "many"), [("sum", 64 + 64), ("max", 64)])
def test_votes_of_words_on_what_their_stage_scores(reduce, many):
    form = votes(TINY, 64, reduce)
    assert form.operation().shape == (many,)
    torch.testing.assert_close(form.operation(), form.twin())


def test_prompts_have_their_words_around_one_video():
    prompt = Prompt.of(512, 3, 8, 1, CPU, torch.float32)
    assert prompt.embeds.shape == (3, 512 + 64, 8)
    assert prompt.layouts[0].grid.tolist() == [[2, 16, 16]]
    alike = torch.cosine_similarity(prompt.embeds[:, 16:272], prompt.embeds[:, 272:528], dim=-1)
    assert alike.mean() > 0.8
    assert prompt.positions is None
    assert [grid_of(n) for n in (576, 1024)] == [(1, 24, 24), (4, 16, 16)]
    with pytest.raises(ConfigError, match="square or a multiple of 256, got 300"):
        grid_of(300)


def test_positions_of_three_axes_are_the_models_own():
    model = tiny_model("qwen2_5_vl")
    ids = torch.tensor([[7, 8, 9, *[IMAGE] * 24, 10, 11]])
    types = (ids == IMAGE).long()
    expected, _ = model.model.get_rope_index(ids, types, image_grid_thw=torch.tensor([[1, 8, 12]]))
    assert torch.equal(three_axes(VisionLayout.grids([(3, 1, 4, 6)], ids.shape[1])), expected[:, 0])
    prompt = Prompt.of(64, 2, 8, 3, CPU, torch.float32)
    assert prompt.next_positions(2)[:, 1, 0].tolist() == [16 + 8 + 48 + 2] * 3


# --- minimal bytes ---


def test_bytes_are_those_of_the_tensors():
    hidden, scores = torch.empty(10, 6, dtype=torch.bfloat16), torch.empty(10)
    index, places = torch.empty(10, dtype=torch.int64), torch.empty(10, 3)
    read = hidden.nbytes + scores.nbytes + places.nbytes + index.nbytes + 5 * 8
    assert nearest_bytes(10, 2, 6, 2, places=True) == read + index.nbytes + scores.nbytes
    assert nearest_bytes(10, 2, 6, 2, places=False) == read - places.nbytes + index.nbytes + scores.nbytes
    assert merge_bytes(3, 2, 6, 2) == (3 + 2 + 2) * (6 * 2 + 4) + 2 * 3 * 8
    assert compact_bytes(3, 7, 6, 2, 5) == (3 + 7 + 7) * (6 * 2 + 4) + 2 * 7 * 5 * 8 + (3 + 3 + 7) * 8
    assert angles_bytes(7, 3, 1, 16, 2) == 7 * 3 * 8 + 2 * 7 * 16 * 2
    assert attend_bytes(1, 100, 28, 4, 128, 2) == 2 * 28 * 128 * 2 + 2 * 100 * 4 * 128 * 2 + 100 * 4
    assert attend_packed_bytes(100, 8, 28, 4, 128, 2) == attend_bytes(100, 100, 28, 4, 128, 2) + 2 * 9 * 8
    assert votes_bytes(100, 28, 64, 4, 128, 2) == (100 * 28 + 64 * 4) * 256 + 164 * 8 + 400 + 32


def test_causal_products_are_counted_below_the_diagonal():
    pairs = sum(j <= i for i in range(5) for j in range(5))
    assert causal_flops(5, 3, 2) == 2 * 2 * pairs * 3 * 2


def test_shares_and_speedups_come_from_cells_of_the_same_place():
    def cell(suite, name, median_s, **more):
        return {"suite": suite, "name": name, "at": {"n": 1}, "status": "measured",
                "seconds": {"median_s": median_s}, **more}  # fmt: skip

    lost = {"suite": "decode", "name": PLAIN, "at": {"n": 1}, "status": "not measured", "why": "out of time"}
    cells = [cell("stage", LAYER, 2.0), cell("stage", "a stage", 0.5), cell("prefill", PLAIN, 9.0),
             cell("prefill", "ours", 3.0), lost, cell("decode", "ours", 1.0),
             {**cell("prefill", "ours", 3.0), "at": {"n": 2}}]  # fmt: skip
    found = derive(cells)
    assert found[1]["share_of_layer"] == 0.25
    assert found[3]["speedup"] == 3.0
    assert "speedup" not in found[5]
    assert "speedup" not in found[6]
    assert "share_of_layer" not in cells[1]


# --- the page ---


@pytest.fixture(scope="module")
def gpu_result(result):
    """The tiny run as if from a GPU: kernels take as long as the copy, twins four times as long."""
    copy = of(result, "ops", COPY)
    rate = copy["bytes"] / copy["seconds"]["median_s"]
    made = json.loads(json.dumps({**result, "device": {"type": "cuda", "name": "A GPU"}}))
    for cell in made["cells"]:
        if "forms" in cell:
            factors = {KERNEL: 1.0, TWIN: 4.0, MERGE_GATHER: 2.0, FLEX: 3.0, GATHERED: 5.0}
            for name in factors.keys() & cell["forms"].keys():
                seconds = vars(Timing.of([factors[name] * cell["bytes"] / rate] * 3))
                cell["forms"][name] = {"status": "measured", "seconds": seconds}
        if cell["suite"] == "prefill":
            seconds = 0.3 if cell["name"] == PLAIN else 0.1
            cell |= {"seconds": vars(Timing.of([seconds] * 3)), "peak_bytes": 3 << 30, "analytic_speedup": 4.0}
    lost = of(made, "decode", PLAIN, model="tiny llama")
    for value in ("seconds", "kv_bytes"):
        lost.pop(value)
    lost |= {"status": "not measured", "why": "needs about 178 GiB of 131 GiB"}
    for cell in made["cells"]:
        cell.pop("speedup", None)
    return {**made, "cells": derive(made["cells"])}


def test_a_gpus_result_is_a_table_per_suite(gpu_result):
    text = speed([gpu_result])
    assert text.startswith("A GPU, float32, python")
    assert "`python -m jobs.measure.benchmark --device cpu --json benchmark-cpu.json`" in text
    assert "| merge half | " in text
    assert "100% · ×4" in next(line for line in text.splitlines() if line.startswith("| merge half"))
    assert "| tiny llama | 2 | 64 | 300 ms · 3 GiB | 100 ms · ×3 (×4) · 3 GiB |" in text
    assert "at most" in text
    lines = text.split("**Survivors**")[1].split("\n\n")[1].splitlines()
    assert [line.split(" | ")[0] for line in lines[2:]] == [
        "| merge and compact a tenth", "| merge and compact half", "| angles of the half that is left"
    ]  # fmt: skip
    assert all(line.count(" / ") == 1 and "–" not in line for line in lines[2:])
    (attention,) = (line for line in text.splitlines() if line.startswith("| attend, prefill | ") and " / " in line)
    assert "–" not in attention
    decoding = [line for line in text.split("**Decoding**")[1].splitlines() if line.startswith("| tiny llama")]
    assert decoding[0].split(" | ")[3] == "–"
    assert "– not measured: needs about 178 GiB of 131 GiB (1)." in text


def test_a_cpus_result_makes_no_statement_on_speed(result):
    assert speed([]) == speed([result]) == NOT_MEASURED
    assert "python -m jobs.measure.benchmark --device cuda" in NOT_MEASURED
