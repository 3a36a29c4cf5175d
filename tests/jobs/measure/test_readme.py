"""The sections of the pages say what the result files say."""

import json

import pytest

from jobs.measure.benchmark.readme import NOT_MEASURED
from jobs.measure.readme import PAGES, SECTIONS, filled, main
from pipeline.errors import ConfigError

PAGE = "before\n" + "".join(f"<!-- {name} -->\nold\n<!-- /{name} -->\n" for name in SECTIONS) + "after"
RUN = {"command": "run it", "machine": "2 CPUs", "versions": {"ray": "2.60", "torch": "2.13"}}
SIZE = {
    "units": 1000, "plan_s": 0.0431, "resume_s": 12.6, "summary_s": 1.0, "retry_s": 0.5, "memory_mib": 21.3,
}  # fmt: skip


def page(folder, **results):
    for name, result in results.items():
        (folder / f"{name}.json").write_text(json.dumps(result))
    return filled(PAGE, SECTIONS, folder)


def test_section_without_a_result_says_so(tmp_path):
    empty = page(tmp_path)
    assert "old" not in empty
    assert empty.count("No figure yet") + empty.count("ot measured (") + empty.count(NOT_MEASURED) == len(SECTIONS)
    assert empty.startswith("before\n")
    assert empty.endswith("\nafter")


def test_page_without_markers_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="expected one"):
        filled("no markers", SECTIONS, tmp_path)


def test_every_section_is_on_one_page():
    assert sorted(name for sections in PAGES.values() for name in sections) == sorted(SECTIONS)


def test_the_command_fills_every_page(tmp_path):
    for name, sections in PAGES.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("".join(f"<!-- {section} -->\n<!-- /{section} -->\n" for section in sections))
    (tmp_path / "results").mkdir()
    assert main(["--root", str(tmp_path), "--results", str(tmp_path / "results")]) == 0
    for name, sections in PAGES.items():
        text = (tmp_path / name).read_text()
        assert text == filled(text, sections, tmp_path / "results")
        assert "No figure yet" in text


def test_a_line_per_size_of_the_manifest(tmp_path):
    result = RUN | {"pyarrow": "26", "repeats": 3, "sizes": [SIZE, SIZE | {"units": 1_000_000}]}
    lines = page(tmp_path, manifest=result).splitlines()
    assert "| 1,000 | 0.043 s | 13 s | 1 s | 0.5 s | 21 MiB |" in lines
    assert "| 1,000,000 | 0.043 s | 13 s | 1 s | 0.5 s | 21 MiB |" in lines
    assert "`run it` (2 CPUs, pyarrow 26; median of 3 runs, spread in `jobs/results/manifest.json`):" in lines


def test_run_of_many_units_shows_the_higher_peak_of_its_two_starts(tmp_path):
    peaks = {"driver": 1.18e9, "object_store": 75e6, "attempts": 138.8e6}
    size = {
        "units": 1_000_000, "plan_s": 191.6, "manifest_bytes": 2_667_107, "summary_s": 29.8,
        "stopped": {"drain_s": 2.32, "done": 527_648, "peak_bytes": peaks},
        "resumed": {"units_per_s": 3016.1, "prepare_s": 9.15, "peak_bytes": peaks | {"object_store": 146.2e6}},
        "data_files": 463, "checkpoint_files": 1463,
    }  # fmt: skip
    lines = page(tmp_path, scale=RUN | {"sizes": [size]}).splitlines()
    assert "| planning; the manifest on disk | 192 s; 2.67 MB |" in lines
    assert "| graph and files | 3,016 units per second |" in lines
    assert any("with 472,352 units open" in line and line.endswith("| 2.3 s |") for line in lines)
    assert "| peak memory: driver, object store, count of attempts | 1.2 GB, 146 MB, 139 MB |" in lines
    assert "| data files, checkpoint files | 463, 1,463 |" in lines


def test_soak_names_every_victim_and_what_was_wrong(tmp_path):
    none, two = {"units": 0, "first": []}, {"units": 2, "first": ["a", "b"]}
    result = RUN | {"kills": {"model": 7, "driver": 0}, "units": 240, "driver_starts": 9}
    text = page(tmp_path, soak=result | {"lost": none, "doubled": two, "foreign": none})
    assert "hit at random model 7, driver 0; 9 starts of the driver; of 240 units 0 lost, 2 doubled, 0 foreign." in text


def test_overhead_of_the_pipeline_has_its_spread(tmp_path):
    spread = {"median": 0.081, "min": 0.0704, "max": 0.093}
    per_clip = {"engine_ms_per_clip": {"median": 73.04}, "added_ms_per_clip": {"median": 5.96}}
    text = page(tmp_path, pipeline=RUN | per_clip | {"overhead": spread, "clips": 200, "repeats": 5})
    assert "8.1% (7.0% to 9.3%) more, median of 5 runs over 200 clips, least to most: 6.0 ms on top of 73.0" in text
