from pathlib import Path

import pytest
import torch

from pipeline.mini.accuracy import as_line, exact_match, standard_error
from pipeline.mini.data import Task
from pipeline.mini.train import TrainConfig, Trainer

TINY_VALIDATION = ((Task("image", 1, 96, 96, 2, 2), 1),)


def config(out: Path, **changes) -> TrainConfig:
    tiny = {"minutes": 60.0, "token_budget": 200, "warmup": 1e-4, "validation": TINY_VALIDATION}
    return TrainConfig(out, **{**tiny, **changes})


def steps(trainer: Trainer, count: int) -> list[float]:
    return [trainer.train_step()["answer"] for _ in range(count)]


def weights(trainer: Trainer) -> torch.Tensor:
    return torch.cat([param.detach().flatten() for param in (*trainer.model.parameters(), *trainer.ema.parameters())])


def test_twenty_steps_on_images_lower_the_loss(tmp_path):
    trainer = Trainer(config(tmp_path))
    trainer.elapsed_s = 0.15 * 3600  # past the stage without questions
    losses = steps(trainer, 20)
    assert sum(losses[-3:]) < 0.7 * sum(losses[:3])


def test_perceiving_trains_the_encoder_and_its_heads_alone(tmp_path):
    trainer = Trainer(config(tmp_path))
    before = {name: param.detach().clone() for name, param in trainer.model.named_parameters()}
    losses = [trainer.train_step() for _ in range(8)]
    assert {loss["answer"] for loss in losses} == {0.0}
    assert losses[-1]["dense"] < losses[0]["dense"]
    moved = {name for name, param in trainer.model.named_parameters() if not torch.equal(param, before[name])}
    assert moved == {name for name in before if ".visual." in name}


def test_a_resumed_run_continues_as_if_it_had_never_stopped(tmp_path, monkeypatch):
    monkeypatch.setattr("time.monotonic", lambda: 0.0)  # the schedule depends on time, which is constant here
    straight = Trainer(config(tmp_path / "straight"))
    steps(straight, 4)

    first = Trainer(config(tmp_path / "resumed"))
    steps(first, 2)
    first.elapsed_s = 0.0
    first.save()
    second = Trainer(config(tmp_path / "resumed"))
    assert second.resume()
    assert second.step == 2
    steps(second, 2)

    torch.testing.assert_close(weights(second), weights(straight))


def test_without_a_checkpoint_there_is_nothing_to_resume(tmp_path):
    trainer = Trainer(config(tmp_path))
    assert not trainer.resume()
    assert trainer.step == 0


def test_a_run_ends_with_its_time_or_its_steps_and_leaves_a_checkpoint(tmp_path, capsys):
    trainer = Trainer(config(tmp_path, max_steps=2))
    trainer.run()
    assert trainer.step == 2
    assert trainer.checkpoint.exists()
    assert "final caption" in capsys.readouterr().out

    late = Trainer(config(tmp_path, minutes=1e-6))
    assert late.resume()
    assert late.done
    assert late.progress == 1


def test_the_average_moves_towards_the_trained_weights(tmp_path):
    trainer = Trainer(config(tmp_path))
    before = weights(trainer)
    steps(trainer, 3)
    after = weights(trainer)
    half = len(before) // 2
    trained, averaged = (after - before)[:half], (after - before)[half:]
    assert 0 < averaged.norm() < trained.norm()
    assert torch.cosine_similarity(trained, averaged, dim=0) > 0.8


def test_training_goes_on_after_a_validation(tmp_path):
    trainer = Trainer(config(tmp_path))
    trainer.elapsed_s = 0.15 * 3600
    grid = trainer.next_batch().grid
    task = Task(grid.kind, grid.times, 16 * grid.rows, 16 * grid.columns, 2, 3)
    exact_match(trainer.ema, trainer.tokenizer, "validation", [(task, 1)])  # the first use of this grid
    assert steps(trainer, 1)[0] > 0


def test_validation_counts_right_answers_per_family(tmp_path):
    trainer = Trainer(config(tmp_path))
    tasks = [(Task("image", 1, 96, 96, 4, 3), 2)]
    scores = exact_match(trainer.ema, trainer.tokenizer, "validation", tasks)
    captions = [scores.get(row, (0, 0)) for row in ("caption", "caption with sign")]
    assert [sum(column) for column in zip(*captions, strict=True)] == [0, 8]
    assert scores == exact_match(trainer.ema, trainer.tokenizer, "validation", tasks)


def test_scores_are_told_as_shares():
    assert as_line({"caption": (3, 4), "shape": (0, 5)}) == "caption 0.75 shape 0.00"


def test_standard_error_is_the_binomial_one_for_many_and_not_zero_at_the_ends():
    assert standard_error(750, 1000) == pytest.approx((0.75 * 0.25 / 1000) ** 0.5, rel=0.01)
    assert [standard_error(right, 20) for right in (0, 20)] == pytest.approx([0.0333, 0.0333], abs=1e-4)


@pytest.mark.parametrize("name", ["muon_lr", "adam_lr"])
def test_each_learning_rate_reaches_its_parameters(tmp_path, name):
    still = Trainer(config(tmp_path, **{name: 0.0}))
    before = [param.detach().clone() for param in still.model.parameters()]
    steps(still, 2)
    moved = [not torch.equal(a, b) for a, b in zip(before, still.model.parameters(), strict=True)]
    assert any(moved)
    assert not all(moved)
