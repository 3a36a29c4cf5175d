import json
from functools import partial

import pytest
import torch
from transformers import AutoModelForImageTextToText, AutoTokenizer

from jobs import train_mini
from pipeline.mini.card import BEGIN, END, accuracy
from pipeline.mini.data import Task
from pipeline.mini.measure import Plan, weights_sha256
from pipeline.mini.train import TrainConfig, Trainer
from pipeline.mini.world import DemoStyle

TINY_VALIDATION = ((Task("image", 1, 96, 96, 2, 2), 1),)


@pytest.fixture
def tiny(monkeypatch):
    """The command's settings with smaller sizes."""
    small = partial(TrainConfig, token_budget=200, validation=TINY_VALIDATION)
    monkeypatch.setattr(train_mini, "TrainConfig", small)


@pytest.mark.usefixtures("tiny")
def test_one_command_trains_exports_and_resumes(tmp_path, capsys):
    out, weights = tmp_path / "run", tmp_path / "weights"
    arguments = ["--out", str(out), "--export", str(weights)]
    train_mini.main([*arguments, "--minutes", "0.02"])
    assert "starting from step 0" in capsys.readouterr().out
    assert {path.name for path in weights.iterdir()} >= {
        "config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json",
        "chat_template.jinja", "preprocessor_config.json",
    }  # fmt: skip

    trainer = Trainer(TrainConfig(out, 1.0))
    assert trainer.resume()
    loaded = AutoModelForImageTextToText.from_pretrained(weights)
    assert loaded.dtype == torch.bfloat16
    for name, param in trainer.ema.named_parameters():
        assert torch.equal(loaded.get_parameter(name), param.to(torch.bfloat16)), name
    assert len(AutoTokenizer.from_pretrained(weights)) == len(trainer.tokenizer)

    train_mini.main([*arguments, "--minutes", "0.03"])
    assert f"resuming at step {trainer.step}" in capsys.readouterr().out


def test_two_processes_average_their_gradients_and_save_once(tmp_path):
    train_mini.train(TrainConfig(tmp_path, minutes=0.02, procs=2, token_budget=200, validation=TINY_VALIDATION))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint.pt"]


@pytest.mark.usefixtures("tiny")
def test_measuring_writes_a_result_and_the_card_takes_its_tables(tmp_path, capsys, monkeypatch):
    weights, result = tmp_path / "weights", tmp_path / "mini.json"
    train_mini.main(["--out", str(tmp_path), "--minutes", "0.01", "--export", str(weights)])
    image, pair = Task("image", 1, 96, 96, 2, 2), Task("set", 2, 96, 96, 2, 1)
    plan = Plan(known=((image, 2), (pair, 1)), held_out=((image, 1),), coded=(DemoStyle(),), videos=1)
    monkeypatch.setattr(train_mini, "CARD", plan)
    train_mini.main(["--measure", str(weights), "--split", "test", "--json", str(result)])
    assert "test image 96×96" in capsys.readouterr().out
    found = json.loads(result.read_text())
    assert found["weights_sha256"] == weights_sha256(weights)
    assert [(i["split"], i["kind"], i["scenes"]) for i in found["inputs"]] == [
        ("test", "image", 4), ("test", "set", 2), ("held_out", "image", 2),
    ]  # fmt: skip
    assert set(found["inputs"][1]["tasks"]) >= {"set_caption"}
    assert found["coded"][0]["videos"] == 1
    assert {"code", "python", "torch", "transformers", "numpy"} == set(found["versions"])

    card = weights / "README.md"
    card.write_text(f"# card\n{BEGIN}\n{END}\n")
    train_mini.main(["--card", str(weights), "--json", str(result)])
    assert card.read_text() == f"# card\n{BEGIN}\n{accuracy(found)}\n{END}\n"


@pytest.mark.parametrize(
    "arguments", [[], ["--minutes", "0", "--export", "x", "--out", "/nonexistent"], ["--card", "x"]]
)
def test_what_cannot_be_done_is_refused(arguments):
    with pytest.raises(SystemExit):
        train_mini.main(arguments)


def test_several_processes_on_one_gpu_are_refused(tmp_path):
    with pytest.raises(ValueError, match="one process on cuda"):
        train_mini.train(TrainConfig(tmp_path, minutes=1, procs=2, device="cuda"))
