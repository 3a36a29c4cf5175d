from functools import partial

import pytest
import torch
from transformers import AutoModelForImageTextToText, AutoTokenizer

from jobs import train_mini
from pipeline.mini.data import Task
from pipeline.mini.train import TrainConfig, Trainer

TINY_VALIDATION = ((Task("image", 1, 96, 96, 2, 2), 1),)


@pytest.fixture
def tiny(monkeypatch):
    """The command's own settings, with less of everything."""
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
def test_measuring_prints_a_table_per_kind_of_input(tmp_path, capsys, monkeypatch):
    weights = tmp_path / "weights"
    train_mini.main(["--out", str(tmp_path), "--minutes", "0.01", "--export", str(weights)])
    monkeypatch.setattr(train_mini, "MEASURED", {"small images": ((Task("image", 1, 96, 96, 2, 2), 1),)})
    train_mini.main(["--measure", str(weights), "--split", "test", "--videos", "0"])
    assert "**small images, test seeds**" in capsys.readouterr().out


@pytest.mark.parametrize("arguments", [[], ["--minutes", "0", "--export", "x", "--out", "/nonexistent"]])
def test_what_cannot_be_done_is_refused(arguments):
    with pytest.raises(SystemExit):
        train_mini.main(arguments)


def test_several_processes_on_one_gpu_are_refused(tmp_path):
    with pytest.raises(ValueError, match="one process on cuda"):
        train_mini.train(TrainConfig(tmp_path, minutes=1, procs=2, device="cuda"))
