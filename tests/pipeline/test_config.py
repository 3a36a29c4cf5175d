"""Tests of the configuration: an error names the key, the expected and the actual value."""

import re
from pathlib import Path

import pydantic
import pytest
import yaml

from pipeline.config import JobConfig, load_config
from pipeline.errors import ConfigError

LEAST = ["source.uri=in", "sink.uri=out"]


def config(*overrides):
    return load_config(None, [*LEAST, *overrides])


def refusal(*overrides, path=None):
    with pytest.raises(ConfigError) as caught:
        load_config(path, [*LEAST, *overrides])
    return str(caught.value)


def test_two_keys_are_enough():
    job = config()
    assert (job.source.uri, job.sink.uri, job.model.name) == ("in", "out", "mini")


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("frames.fsp=2", "frames.fsp: unknown key; did you mean fps?"),
        ("frame.fps=2", "frame: unknown key; did you mean frames?"),
        ("ray.actors.gpus=1", "ray.actors.gpus: unknown key"),
        ("storage.secret_key=x", "storage.secret_key: unknown key; the keys here are endpoint_url, region"),
    ],
)
def test_unknown_keys_are_named_with_the_likely_one(override, message):
    assert message in refusal(override)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("frames.fps=fast", r"frames\.fps: .*number.*, got 'fast'"),
        ("frames.fps='2'", r"frames\.fps: .*number.*, got '2'"),
        ("frames.max_frames=1.5", r"frames\.max_frames: .*integer.*, got 1\.5"),
        ("frames.max_frames=true", r"frames\.max_frames: .*integer.*, got True"),
        ("source.probe=1", r"source\.probe: .*boolean.*, got 1"),
        ("source.uri=7", r"source\.uri: .*string.*, got 7"),
        ("frames=3", r"frames: .*object.*, got 3|--set 'frames=3'"),
        ("prompts=text", r"prompts: .*, got 'text'"),
        ("prompts=[{id: a}]", r"prompts\.0\.text: missing"),
    ],
)
def test_wrong_types_are_not_guessed_at(override, message):
    assert re.search(message, refusal(override))


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["frames.fps=0"], r"frames\.fps: .*greater than 0, got 0"),
        (["frames.strategy=scene"], r"frames\.strategy: .*'fps' or 'uniform', got 'scene'"),
        (["frames.min_frames=9", "frames.max_frames=4"], r"frames: min_frames \(9\) must be at most max_frames \(4\)"),
        (["frames.min_px=500000"], r"frames: min_px \(500000\) must be at most max_px"),
        (["clips.stride_s=5"], "clips: stride_s needs length_s"),
        (["clips.length_s=5", "clips.min_length_s=6"], r"min_length_s \(6\.0\) must be at most length_s \(5\.0\)"),
        (["ray.actors.min=3"], r"ray\.actors: min \(3\) must be at most max \(1\)"),
        (
            ["lightkv.guidance=question"],
            r"lightkv: guidance \(question\) needs method: published; remove it, or change method \(l",
        ),
        (
            ["lightkv={method: spacetime, windows: spatiotemporal}"],
            r"windows \(spatiotemporal\) needs method: pub",
        ),
        (["lightkv={method: published, window_frames: 2}"], "lightkv: window_frames needs windows: spatiotemporal"),
        (["lightkv.method=fastv"], r"lightkv\.method: .*'lightkv', 'published' or 'spacetime', got 'fastv'"),
        (["lightkv.stages=0"], r"lightkv\.stages: .*greater than or equal to 1, got 0"),
        (["lightkv.retention=1.5"], r"lightkv\.retention: .*less than or equal to 1, got 1\.5"),
        (["decode.backend=opencv"], r"decode\.backend: .*, got 'opencv'"),
        (["model.device=tpu"], r"model\.device: .*, got 'tpu'"),
        (["prompts=[]"], "prompts: expected at least one, got none"),
        (["prompts=[{id: a, text: x}, {id: a, text: y}]"], r"every id must be unique, got \['a', 'a'\]"),
        (["source.uri=''"], r"source\.uri: .*at least 1 character"),
    ],
)
def test_impossible_values_are_refused(overrides, message):
    assert re.search(message, refusal(*overrides))


def test_a_missing_key_is_named():
    with pytest.raises(ConfigError, match=r"source: missing, and it has no default"):
        load_config(None, ["sink.uri=out"])


def test_every_wrong_key_is_shown_at_once():
    text = refusal("frames.fps=-1", "frames.fsp=2", "model.seed=x")
    assert all(key in text for key in ("frames.fps", "frames.fsp", "model.seed"))


@pytest.mark.parametrize("override", ["frames.fps", "=3", "a..b=3", "frames.fps=[1", "source.uri.x=1"])
def test_overrides_that_are_none_are_refused(override):
    assert "--set" in refusal(override)


def test_files_that_cannot_be_read_are_named(tmp_path):
    assert "cannot read the configuration" in refusal(path=tmp_path / "absent.yaml")
    wrong = {
        "a: [": "not valid YAML",
        "- a\n- b\n": "expected keys and values",
        "model: {name: 2024-01-01}": "strings, numbers, lists and keys only",
    }
    for text, message in wrong.items():
        (tmp_path / "bad.yaml").write_text(text)
        assert message in refusal(path=tmp_path / "bad.yaml")


def test_yaml_cannot_run_code(tmp_path):
    (tmp_path / "evil.yaml").write_text("source: !!python/object/apply:os.system ['true']\n")
    assert "not valid YAML" in refusal(path=tmp_path / "evil.yaml")


def test_the_resolved_configuration_reads_back_as_itself(tmp_path):
    job = config("frames.fps=2.5", "source.extensions=[MP4, .mov]", "prompts=[{id: q, text: 'Größe: wie viel?'}]")
    (tmp_path / "config.yaml").write_text(job.to_yaml(), encoding="utf-8")
    again = load_config(tmp_path / "config.yaml")
    assert again == job
    assert again.hash() == job.hash()
    assert again.source.extensions == (".mp4", ".mov")


def test_overrides_win_over_the_file(tmp_path):
    (tmp_path / "c.yaml").write_text("source: {uri: a}\nsink: {uri: b}\nframes: {fps: 2, max_frames: 9}\n")
    job = load_config(tmp_path / "c.yaml", ["frames.fps=3", "clips={length_s: 4}"])
    assert (job.frames.fps, job.frames.max_frames, job.clips.length_s) == (3.0, 9, 4.0)


def test_a_configuration_cannot_be_changed_afterwards():
    job = config()
    with pytest.raises(pydantic.ValidationError):
        job.frames.fps = 3.0


ANSWERS = [
    "source.uri=other",
    "prompts=[{id: caption, text: Other.}]",
    "clips.length_s=5",
    "frames.fps=2",
    "frames.max_px=100000",
    "model.name=other",
    "model.max_new_tokens=7",
    "model.temperature=0.5",
    "lightkv.retention=0.4",
    "lightkv.method=published",
    "lightkv.method=spacetime",
    "lightkv.stages=1",
    "lightkv={method: published, guidance: question}",
    "lightkv.enabled=false",
]
CIRCUMSTANCES = [
    "sink.uri=elsewhere",
    "sink.rows_per_file=3",
    "storage.endpoint_url=http://host",
    "storage.max_attempts=2",
    "source.probe_workers=2",
    "decode.backend=pyav",
    "decode.prefetch_units=3",
    "ray.actors.max=4",
    "run.progress_interval_s=3",
]


def test_the_hash_tells_apart_what_answers_depend_on():
    hashes = {config(change).hash() for change in ANSWERS} | {config().hash()}
    assert len(hashes) == len(ANSWERS) + 1
    assert all(re.fullmatch("[0-9a-f]{16}", one) for one in hashes)


@pytest.mark.parametrize("change", CIRCUMSTANCES)
def test_the_hash_ignores_where_and_how_fast(change):
    assert config(change) != config()
    assert config(change).hash() == config().hash()


def test_every_key_has_a_unit_or_needs_none():
    """A float key is in seconds and ends in `_s`, except ratios, rates and brightness levels."""
    bare = {"fps", "retention", "temperature", "num_cpus", "num_gpus", "repeat_tolerance"}

    def keys(section, prefix=""):
        for name, field in section.model_fields.items():
            kind = field.annotation
            if isinstance(kind, type) and issubclass(kind, pydantic.BaseModel):
                yield from keys(kind, f"{prefix}{name}.")
            else:
                yield name, kind

    for name, kind in keys(JobConfig):
        if kind in (float, float | None) and name not in bare:
            assert name.endswith("_s"), name


def test_shipped_configurations_are_valid():
    folder = Path(__file__).parents[2] / "configs"
    files = [file for file in folder.rglob("*.yaml") if file.name != "evaluate.yaml"]  # not a job
    assert files
    for file in files:
        given = yaml.safe_load(file.read_text(encoding="utf-8"))
        load_config(file, [f"{key}.uri=x" for key in ("source", "sink") if key not in given])
