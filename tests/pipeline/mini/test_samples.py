"""Samples over the whole range of difficulty, and the combinations that training never shows."""

import re

import numpy as np
import pytest

from pipeline.mini.data import Task, build_batch
from pipeline.mini.model import tokenizer
from pipeline.mini.questions import FAMILIES
from pipeline.mini.samples import Look, image_sample, pair_sample, set_sample, video_sample
from pipeline.mini.scene import HELD_OUT, MAX_SET, MAX_THINGS, sample_pair, sample_scene, sample_set
from pipeline.mini.vocabulary import COLORS, NUMBERS, SHAPES
from pipeline.mini.world import SPLITS, demo_scene, questions_of

KNOWN = [split for split in SPLITS if split != "held_out"]
BUSY = Look(112, 112, max_things=6, sign_words=True)
HELD_OUT_NAMES = re.compile("|".join(f"{color} {shape}" for color, shape in HELD_OUT))


def samples(split, count, look=BUSY):
    """Samples of every kind."""
    for index in range(count):
        yield image_sample(split, index, look)
        yield set_sample(split, index, look=look)
        yield pair_sample(split, index, look)
        yield video_sample(split, index, frames=4, look=look)


def shown(sample):
    return {(thing.color, thing.shape) for scene in sample.scenes for thing in scene.things}


def texts(sample):
    return [f"{qa.question} {qa.answer}" for qa in sample.questions]


@pytest.mark.parametrize("split", KNOWN)
def test_no_scene_of_the_other_splits_shows_a_held_out_combination_and_no_question_names_one(split):
    for sample in samples(split, 25):
        assert not shown(sample) & HELD_OUT
        assert not any(HELD_OUT_NAMES.search(text) for text in texts(sample))


def test_questions_asked_again_and_again_never_name_a_held_out_combination_that_is_not_there():
    rng = np.random.default_rng(0)
    scene = sample_scene(rng, max_things=6)
    told = [qa for _ in range(200) for qa in questions_of(scene, rng)]
    assert not any(HELD_OUT_NAMES.search(f"{qa.question} {qa.answer}") for qa in told)


def test_demo_and_training_show_no_held_out_combination():
    assert not any(demo_scene(index, seed)[0].shows_held_out for index in range(40) for seed in (0, 1))
    words = tokenizer()
    for task in (Task("image", 1, 96, 96, 12, 4), Task("video", 2, 96, 96, 12, 4), Task("set", 3, 96, 96, 8, 2)):
        for split in ("train", "validation"):
            asked = [qa for questions in build_batch(words, task, split, 0).questions for qa in questions]
            assert not any(HELD_OUT_NAMES.search(f"{qa.question} {qa.answer}") for qa in asked)


@pytest.mark.parametrize("look", [BUSY, Look(64, 64, max_things=1, sign_share=1.0)])
def test_every_held_out_sample_shows_a_held_out_combination(look):
    for sample in samples("held_out", 20, look):
        assert shown(sample) & HELD_OUT
        if sample.kind != "set":
            assert HELD_OUT_NAMES.search(sample.questions[0].answer)  # the caption


def test_every_colour_and_every_shape_occurs_in_training_with_several_of_the_other():
    seen = set().union(*(shown(image_sample("train", index)) for index in range(300)))
    for color in COLORS:
        assert len({shape for c, shape in seen if c == color}) >= 4
    for shape in SHAPES:
        assert len({color for color, s in seen if s == shape}) >= 6


ENDS = [
    (Look(112, 112, max_things=1, max_clutter=0, sign_share=0.0), 2, 49),
    (Look(112, 112, max_things=MAX_THINGS, max_clutter=60, sign_share=1.0, sign_words=True), 64, 1568),
    (Look(448, 112, max_things=MAX_THINGS, max_clutter=60), 16, 1568),
    (Look(112, 448, max_things=4), 16, 1568),
    (Look(448, 448, max_things=1, max_clutter=0), 2, 784),
    (Look(448, 448, max_things=MAX_THINGS, max_clutter=60, sign_share=1.0, sign_words=True), 64, 25088),
]


@pytest.mark.parametrize(("look", "frames", "tokens"), ENDS)
def test_samples_at_the_ends_of_the_range(look, frames, tokens):
    film = video_sample("test", 3, frames, 2.0, look)
    assert film.vision_tokens == tokens
    assert film.frames.shape == (frames, look.height_px, look.width_px, 3)
    per_image = look.height_px * look.width_px // 256
    for still, images in ((image_sample("test", 3, look), 1), (set_sample("test", 3, MAX_SET, look), MAX_SET)):
        assert still.vision_tokens == images * per_image
        assert still.frames.shape == (images, look.height_px, look.width_px, 3)
    for sample in (film, still, image_sample("test", 4, look)):
        assert "caption" in sample.questions[0].family
        assert len(sample.questions) >= 4
        assert all(len(scene.things) + (scene.sign is not None) >= 1 for scene in sample.scenes)


def test_more_things_are_shown_and_counted_where_more_are_asked_for():
    def counts(look):
        return [len(image_sample("test", index, look).scenes[0].things) for index in range(60)]

    few, many = counts(Look(448, 448, max_things=2)), counts(Look(448, 448, max_things=MAX_THINGS))
    assert set(few) <= {0, 1, 2}
    assert max(many) == MAX_THINGS
    assert np.mean(many) > 2 * np.mean(few)
    index = many.index(MAX_THINGS)
    scene = image_sample("test", index, Look(448, 448, max_things=MAX_THINGS)).scenes[0]
    told = {qa.question: qa.answer for seed in range(20) for qa in questions_of(scene, np.random.default_rng(seed))}
    assert told["how many objects are there?"] == NUMBERS[MAX_THINGS]


def test_clutter_adds_strokes_and_nothing_else():
    plain, busy = (image_sample("test", 5, Look(max_clutter=clutter)) for clutter in (0, 200))
    assert plain.scenes[0].things == busy.scenes[0].things
    assert not np.array_equal(plain.frames, busy.frames)
    backgrounds = [image_sample("test", index, Look(max_clutter=200)).scenes[0].background for index in range(20)]
    assert max(background.clutter for background in backgrounds) > 100


@pytest.mark.parametrize("make", [image_sample, set_sample, pair_sample, video_sample])
def test_a_sample_depends_on_its_arguments_alone(make):
    first, second, other = make("test", 9), make("test", 9), make("test", 10)
    assert first.questions == second.questions
    assert np.array_equal(first.frames, second.frames)
    assert not np.array_equal(first.frames, other.frames)
    assert not np.array_equal(first.frames, make("validation", 9).frames)


def test_a_pair_differs_in_one_thing_and_the_question_names_it():
    verbs = set()
    for index in range(40):
        sample = pair_sample("test", index, Look(max_things=4))
        names = [{thing.name for thing in scene.things} for scene in sample.scenes]
        (changed,) = names[0] ^ names[1]
        assert names[0] & names[1]
        assert sample.scenes[0].background == sample.scenes[1].background
        (answer,) = (qa.answer for qa in sample.questions if qa.family == "difference")
        verb = "is missing" if changed in names[0] else "is new"
        assert answer == f"the {changed} {verb}."
        verbs.add(verb)
        thing = next(t for scene in sample.scenes for t in scene.things if t.name == changed)
        differs = (sample.frames[0] != sample.frames[1]).any(-1)
        rows, columns = np.nonzero(differs)
        assert abs(rows + 0.5 - thing.y_px).max() <= thing.radius_px + 1
        assert abs(columns + 0.5 - thing.x_px).max() <= thing.radius_px + 1
    assert verbs == {"is missing", "is new"}


def test_what_a_held_out_pair_differs_in_is_the_held_out_combination():
    for index in range(20):
        answers = {qa.family: qa.answer for qa in pair_sample("held_out", index).questions}
        assert HELD_OUT_NAMES.search(answers["difference"])


@pytest.mark.parametrize(("frames", "fps"), [(2, 4.0), (8, 2.0), (16, 2.0), (24, 1.0), (64, 8.0)])
def test_what_is_asked_of_a_video_can_be_seen_in_its_frames(frames, fps):
    late = 0
    for index in range(60):
        sample = video_sample("test", index, frames, fps, Look(max_things=4))
        times = sample.times_s
        for thing in sample.scenes[0].things:
            seen = times >= thing.appear_s
            assert seen.sum() >= 2
            if thing.appear_s > 0:
                late += 1
                assert not seen[0]
            if thing.motion != "still":
                x, y = (axis[seen] for axis in thing.position(times))
                assert max(np.ptp(x), np.ptp(y)) >= 5
        appearances = sorted({thing.appear_s for thing in sample.scenes[0].things})
        assert len({int((times < appear_s).sum()) for appear_s in appearances}) == len(appearances)
    assert (late > 0) == (frames / fps > 2.4)


def test_every_family_is_asked_somewhere_of_every_kind_of_input():
    families = {kind: set() for kind in ("image", "set", "video")}
    for index in range(40):
        for sample in (
            image_sample("test", index, Look(sign_words=True)),
            pair_sample("test", index),
            video_sample("test", index, look=Look(sign_words=True)),
        ):
            families[sample.kind] |= {qa.family for qa in sample.questions}
    moving = {"motion", "first", "last", "order", "when", "later"}
    assert families["video"] == set(FAMILIES)
    assert families["image"] == set(FAMILIES) - moving
    assert families["set"] == {"set_caption", "which_image", "image_count", "set_exist", "difference"}


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: image_sample("test", 0, Look(width_px=100)), "multiples of 16 px, got 100×96"),
        (lambda: image_sample("test", 0, Look(height_px=48)), "at least 64 px"),
        (lambda: image_sample("test", 0, Look(max_things=11)), "1 to 10 things"),
        (lambda: image_sample("test", 0, Look(max_things=0)), "1 to 10 things"),
        (lambda: set_sample("test", 0, images=7), "2 to 6 images, got 7"),
        (lambda: set_sample("test", 0, images=1), "2 to 6 images, got 1"),
        (lambda: video_sample("test", 0, frames=1), "span 0.25 s, got 1"),
        (lambda: video_sample("test", 0, frames=2, fps=24.0), "lower fps"),
        (lambda: video_sample("test", 0, frames=8, fps=1.0), r"at least 1\.76 fps"),
    ],
)
def test_what_no_honest_question_can_be_asked_about_is_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_sets_and_pairs_can_be_drawn_without_a_split():
    rng = np.random.default_rng(0)
    assert [len(sample_set(rng, count, width_px=96, height_px=96)) for count in (2, 6)] == [2, 6]
    assert all(not scene.is_video for scene in (*sample_set(rng, 3), *sample_pair(rng, max_things=1)))
