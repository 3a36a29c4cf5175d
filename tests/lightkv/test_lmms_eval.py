"""Tests lmms-eval on a local task of six generated images and tiny random checkpoints; skipped if not installed."""

import tomllib
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.lightkv.tiny import IMAGE, VIDEO, tiny_model

pytest.importorskip("lmms_eval", reason="lmms-eval is not installed: pip install 'lightkv[lmms-eval]'")
datasets = pytest.importorskip("datasets")

from lmms_eval.evaluator import simple_evaluate  # noqa: E402  # only if it is installed
from lmms_eval.models import MODEL_REGISTRY_V2, get_model  # noqa: E402
from lmms_eval.models.model_utils.gen_metrics import reset_logged_metrics  # noqa: E402
from lmms_eval.tasks import TaskManager  # noqa: E402
from tokenizers import Regex, Tokenizer, models, pre_tokenizers  # noqa: E402
from transformers import (  # noqa: E402
    CLIPImageProcessor,
    LlavaNextImageProcessor,
    LlavaNextProcessor,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)

from lightkv import ConfigError, LightKVConfig, UnsupportedCallError, UnsupportedModelError, compress  # noqa: E402
from lightkv.lmms_eval import LightKV, load, manifest, schedule  # noqa: E402

VIDEO_STACK = pytest.mark.skipif(find_spec("torchvision") is None, reason="its processor needs torchvision")
FAMILIES = [
    "llava",
    "llava_next",
    pytest.param("qwen2_5_vl", marks=VIDEO_STACK),
    pytest.param("internvl", marks=VIDEO_STACK),
]
TEMPLATE = (
    "{%% for message in messages %%}{%% for part in message['content'] %%}"
    "{%% if part['type'] == 'image' %%}%s {%% else %%}{{ part['text'] }} {%% endif %%}{%% endfor %%}{%% endfor %%}"
)
TASK = """
task: shades
dataset_path: parquet
dataset_kwargs:
  data_files: {folder}/shades.parquet
  cache_dir: {folder}/cache
test_split: train
output_type: generate_until
doc_to_visual: !function shades.visual
doc_to_text: question
doc_to_target: answer
generation_kwargs:
  max_new_tokens: 8
  temperature: 0
metric_list:
  - metric: exact_match
"""
FUNCTIONS = """
def visual(doc):
    return [doc["image"].convert("RGB")]
"""


@pytest.fixture(scope="module", autouse=True)
def plugin():
    """Registers the model like the entry point, even if this project is not installed."""
    MODEL_REGISTRY_V2.register_manifest(manifest(), overwrite=True)


@pytest.fixture(scope="module")
def task(tmp_path_factory):
    """A folder with a task of six noise images of two sizes, and questions of different length."""
    folder, rng = tmp_path_factory.mktemp("task"), np.random.default_rng(0)
    pictures = [Image.fromarray(rng.integers(0, 255, (40 + 8 * (n % 2), 48, 3), np.uint8)) for n in range(6)]
    rows = {"image": pictures, "question": [f"w11 w{12 + n} " + "w9 " * n for n in range(6)], "answer": ["w1"] * 6}
    datasets.Dataset.from_dict(rows).cast_column("image", datasets.Image()).to_parquet(folder / "shades.parquet")
    (folder / "shades.yaml").write_text(TASK.format(folder=folder))
    (folder / "shades.py").write_text(FUNCTIONS)
    return folder


def tokenizer(family):
    """A word-level tokenizer, w0 … w95; special tokens of a family's processor have the ids of the tiny model."""
    named = {
        "llava": {IMAGE: "<image>"},
        "llava_next": {IMAGE: "<image>"},
        "qwen2_5_vl": {IMAGE: "<|image_pad|>", VIDEO: "<|video_pad|>"},
        "internvl": {IMAGE: "<IMG_CONTEXT>", VIDEO: "<video>", 92: "<img>", 93: "</img>"},
    }[family]
    words = Tokenizer(models.WordLevel({named.get(n, f"w{n}"): n for n in range(96)}, unk_token="w2"))
    words.add_special_tokens(list(named.values()))
    words.pre_tokenizer = pre_tokenizers.Split(Regex(r"\s+"), "removed")
    extra = {}
    if family == "internvl":
        extra = {
            "start_image_token": "<img>", "end_image_token": "</img>", "context_image_token": "<IMG_CONTEXT>",
            "video_token": "<video>",
        }  # fmt: skip
    return PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="w0", bos_token="w1", eos_token="w95", unk_token="w2",
        extra_special_tokens=extra,
    )  # fmt: skip


def processor(family):
    words, template = tokenizer(family), TEMPLATE % tokenizer(family).convert_ids_to_tokens(IMAGE)
    if family == "llava":
        pixels = CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
        return LlavaProcessor(
            pixels, words, patch_size=4, vision_feature_select_strategy="default", chat_template=template,
            num_additional_image_tokens=1,
        )  # fmt: skip
    if family == "llava_next":
        pixels = LlavaNextImageProcessor(
            size={"shortest_edge": 24}, crop_size={"height": 24, "width": 24},
            image_grid_pinpoints=[[24, 48], [48, 24], [48, 48]],
        )  # fmt: skip
        return LlavaNextProcessor(
            pixels, words, patch_size=4, vision_feature_select_strategy="default", chat_template=template,
            num_additional_image_tokens=1,
        )  # fmt: skip
    if family == "qwen2_5_vl":
        from transformers import Qwen2_5_VLProcessor, Qwen2VLImageProcessor, Qwen2VLVideoProcessor

        sizes = {"patch_size": 4, "merge_size": 2, "temporal_patch_size": 2}
        return Qwen2_5_VLProcessor(
            Qwen2VLImageProcessor(**sizes), words, Qwen2VLVideoProcessor(**sizes), chat_template=template
        )
    from transformers import GotOcr2ImageProcessor, InternVLProcessor, InternVLVideoProcessor

    side = {"height": 32, "width": 32}
    return InternVLProcessor(
        GotOcr2ImageProcessor(size=side), words, InternVLVideoProcessor(size=side), image_seq_length=16,
        chat_template=template,
    )  # fmt: skip


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """family → folder of its tiny model and processor, for `from_pretrained`."""

    def saved(family):
        folder = tmp_path_factory.getbasetemp() / f"checkpoint-{family}"
        if not folder.exists():
            tiny_model(family).save_pretrained(folder)
            processor(family).save_pretrained(folder)
        return str(folder)

    return saved


def arguments(family, folder, **ours):
    small = {"llava": "dtype=float32", "llava_next": "dtype=float32", "internvl": "max_patches=4"}
    small["qwen2_5_vl"] = "min_pixels=784,max_pixels=3136"
    return ",".join([f"pretrained={folder}", small[family], *(f"{key}={value}" for key, value in ours.items())])


def tasks_in(folder):
    """A task manager without lmms-eval's own tasks: reading their 1,400 files takes most of a minute."""
    return TaskManager(include_path=str(folder), include_defaults=False)


def evaluate(model, args, task, batch_size=1):
    """Runs the task: the answers per document, and the results that lmms-eval would write."""
    reset_logged_metrics()
    if model != "lightkv":
        args += ",device_map=cpu"
    results = simple_evaluate(
        model=model,
        model_args=args,
        tasks=["shades"],
        batch_size=batch_size,
        device="cpu",
        task_manager=tasks_in(task),
    )
    samples = sorted(results["samples"]["shades"], key=lambda sample: sample["doc_id"])
    return [sample["filtered_resps"][0] for sample in samples], results


PLAIN = {"llava": "llava_hf", "llava_next": "llava_hf", "qwen2_5_vl": "qwen2_5_vl", "internvl": "internvl_hf"}


@pytest.mark.parametrize("family", FAMILIES)
def test_answers_are_those_of_lmms_evals_own_model_compressed(family, checkpoint, task):
    folder = checkpoint(family)
    plain, _ = evaluate(PLAIN[family], arguments(family, folder), task)
    assert len(plain) == 6
    assert any(plain)

    untouched, results = evaluate("lightkv", arguments(family, folder, method="none"), task)
    assert untouched == plain
    assert results["throughput"]["avg_lightkv_retention"] == 1.0

    compressed, results = evaluate(
        "lightkv", arguments(family, folder, retention=0.4, stages=1, positions="compact"), task
    )
    assert compressed != plain
    assert results["throughput"]["avg_lightkv_retention"] == pytest.approx(0.4, abs=0.1)
    assert results["throughput"]["avg_lightkv_kv_bytes_kept"] < 0.75

    config = LightKVConfig.for_model(tiny_model(family).config, retention=0.4, stages=1, positions="compact")
    lmm = get_model(PLAIN[family]).create_from_arg_string(
        arguments(family, folder, device_map="cpu"), {"device": "cpu"}
    )
    with compress(lmm.model, config):
        by_hand = simple_evaluate(model=lmm, tasks=["shades"], task_manager=tasks_in(task))
    answers = {sample["doc_id"]: sample["filtered_resps"][0] for sample in by_hand["samples"]["shades"]}
    assert compressed == [answers[number] for number in range(6)]


@VIDEO_STACK
def test_batches_are_answered_where_the_model_takes_them(checkpoint, task):
    args = arguments("qwen2_5_vl", checkpoint("qwen2_5_vl"), retention=0.5, stages=1)
    answers, results = evaluate("lightkv", args, task, batch_size=3)
    assert len(answers) == 6
    assert results["throughput"]["avg_lightkv_retention"] == pytest.approx(0.5, abs=0.1)


def test_an_answer_that_cannot_be_generated_ends_the_run(checkpoint, task):
    """lmms-eval's LLaVA catches every exception and scores an empty string."""
    args = arguments("llava", checkpoint("llava"), use_cache=False)
    lmm = get_model("llava_hf").create_from_arg_string(f"{args},device_map=cpu", {"device": "cpu"})
    with compress(lmm.model, LightKVConfig.for_model(lmm.config)):
        swallowed = simple_evaluate(model=lmm, tasks=["shades"], task_manager=tasks_in(task))
    assert {sample["filtered_resps"][0] for sample in swallowed["samples"]["shades"]} == {""}

    with pytest.raises(UnsupportedCallError, match="use_cache"):
        evaluate("lightkv", args, task)


def test_what_would_run_uncompressed_is_refused(checkpoint):
    lmm = load(checkpoint("llava"), device="cpu", dtype="float32")
    with pytest.raises(NotImplementedError, match="multi-round"):
        lmm.generate_until_multi_round([])
    assert "generate" not in vars(lmm.model)


def test_unknown_arguments_and_models_are_refused(checkpoint, tmp_path):
    with pytest.raises(ConfigError, match=r"\['retentoin'\].*lmms-eval's llava_hf \['attn_implementation'"):
        load(checkpoint("llava"), retentoin=0.5)
    other = tmp_path / "other"
    tiny_model("qwen2_vl").config.save_pretrained(other)
    with pytest.raises(UnsupportedModelError, match="qwen2_vl"):
        load(str(other))


def test_schedules():
    shallow, deep = tiny_model("llava").config, tiny_model("llava").config.__class__()
    assert schedule(shallow, retention=0.5, stages=2) == LightKVConfig.for_model(shallow, retention=0.5, stages=2)
    assert schedule(shallow) == LightKVConfig.for_model(shallow)
    assert schedule(shallow).method == "lightkv"
    assert schedule(deep, "fastv", retention=0.3) == LightKVConfig.for_model(deep, 0.3, method="fastv")
    assert schedule(deep, "published", stages=2) == LightKVConfig.for_model(deep, stages=2, method="published")
    published = LightKVConfig.published("llava-1.5-7b", windows="released")
    assert schedule(deep, "published", windows="released") == published
    assert schedule(shallow, "none").stages == ()
    with pytest.raises(ConfigError, match="this decoder has 5"):
        schedule(shallow, "published")
    with pytest.raises(ConfigError, match=r"method=none compresses nothing: omit \['positions', 'retention'\]"):
        schedule(deep, "none", retention=0.3, positions="compact")
    with pytest.raises(ConfigError, match=r"method must be one of \['published', 'lightkv',.* 'none'\]"):
        schedule(deep, "default")


def test_the_entry_point_names_the_plugin():
    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["project"]
    assert project["entry-points"]["lmms_eval.models"] == {"lightkv": f"{manifest.__module__}:{manifest.__name__}"}
    assert get_model("lightkv") is LightKV
