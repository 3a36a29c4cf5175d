import numpy as np
import torch

from pipeline.mini.data import DENSE_CLASSES, Task, build_batch, curriculum
from pipeline.mini.model import MAX_FRAMES, MAX_SIDE_PX, MIN_SIDE_PX, tokenizer
from pipeline.mini.vocabulary import IM_END

TOKENIZER = tokenizer()
TASKS = (Task("image", 1, 96, 96, 6, 4), Task("video", 3, 96, 128, 4, 4), Task("set", 3, 112, 96, 3, 2))


def test_a_batch_depends_on_its_seeds_alone():
    for task in TASKS:
        first, second = (build_batch(TOKENIZER, task, "train", 40) for _ in range(2))
        assert torch.equal(first.frames, second.frames)
        assert first.questions == second.questions
        other = build_batch(TOKENIZER, task, "validation", 40)
        assert not torch.equal(first.frames, other.frames)


def test_slots_hold_question_and_answer_and_targets_are_the_answer():
    for task in TASKS:
        batch = build_batch(TOKENIZER, task, "train", 0)
        for b, asked in enumerate(batch.questions):
            for slot, qa in enumerate(asked):
                here = batch.tail_slot[b] == slot
                ids, target = batch.tail_ids[b][here], batch.target[b][here]
                assert TOKENIZER.decode(ids, skip_special_tokens=True) == f"{qa.question} assistant {qa.answer}"
                assert ids.tolist().count(TOKENIZER.convert_tokens_to_ids(IM_END)) == 2
                assert TOKENIZER.decode(target[target >= 0], skip_special_tokens=True) == qa.answer
                assert target[-1] == -1
                assert target[-2] == TOKENIZER.eos_token_id
                assert batch.tail_offset[b][here].tolist() == list(range(len(ids)))
            assert (batch.target[b][batch.tail_slot[b] < 0] == -1).all()


def test_a_batch_to_perceive_has_labels_and_no_questions():
    batch = build_batch(TOKENIZER, Task("video", 1, 96, 96, 3, 4, asks=False), "train", 0)
    assert batch.tail_ids.shape == (3, 0)
    assert batch.questions == [[], [], []]
    assert (batch.dense["shape"] > 0).any()


def test_every_scene_is_captioned_and_asked_more():
    for task in TASKS:
        for asked in build_batch(TOKENIZER, task, "train", 0).questions:
            families = [qa.family for qa in asked]
            assert sum("caption" in family for family in families) == 1
            assert len(set(asked)) == len(asked) >= 2


def test_dense_labels_stay_in_their_classes_and_mark_where_things_are():
    for task in TASKS:
        batch = build_batch(TOKENIZER, task, "train", 8, degrade=False)
        for name, labels in batch.dense.items():
            assert labels.shape == (task.scenes, task.grid.tokens)
            assert 0 <= labels.min() <= labels.max() < DENSE_CLASSES[name]
        marked = batch.dense["color"] > 0
        cells = batch.frames.float().mean(2).unflatten(2, (-1, 16)).unflatten(4, (-1, 16)).mean((3, 5)).flatten(1, 3)
        colourful = cells.max(-1).values - cells.min(-1).values
        assert colourful[marked].mean() > 2 * colourful[~marked].mean()


def test_an_image_of_a_batch_is_its_frame_twice():
    batch = build_batch(TOKENIZER, Task("set", 2, 96, 96, 2, 2), "train", 0, degrade=False)
    assert torch.equal(batch.frames[:, :, 0], batch.frames[:, :, 1])


def test_the_curriculum_goes_from_perceiving_over_small_images_to_everything():
    rng = np.random.default_rng(0)
    assert not curriculum(rng, 0.0, 2200).asks
    start = [curriculum(rng, 0.15, 2200) for _ in range(50)]
    end = [curriculum(rng, 0.9, 2200) for _ in range(600)]
    assert {(task.kind, task.height_px, task.width_px) for task in start} == {("image", 96, 96)}
    assert {task.kind for task in end} == {"image", "video", "set"}
    assert {task.times for task in end if task.kind == "video"} == {1, 2, 3, 4, 6, MAX_FRAMES // 2}
    assert {task.times for task in end if task.kind == "set"} == {2, 3, 4}
    assert {MIN_SIDE_PX, 128, MAX_SIDE_PX} <= {task.height_px for task in end}
    assert max(task.height_px for task in end) == 256
    assert any(task.height_px != task.width_px for task in end)
    assert all(task.scenes * (task.grid.tokens + 60) <= 2200 or task.scenes == 2 for task in end)
