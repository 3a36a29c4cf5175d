import numpy as np
import pytest

from pipeline.mini.questions import FAMILIES, SET_FAMILIES, ask, ask_set, caption
from pipeline.mini.scene import Background, Scene, Sign, Thing, sample_scene

PLAIN = Background("plain", (40, 40, 40), (40, 40, 40), 0)
CIRCLE = Thing("red", "circle", "small", 20.0, 20.0, 9.0, "right", 8.0)
STAR = Thing("orange", "star", "large", 64.0, 64.0, 15.0)
RING = Thing("blue", "ring", "small", 110.0, 20.0, 9.0, "down", 9.0, appear_s=5.0)
FILM = Scene(128, 128, 8.0, (RING, STAR, CIRCLE), Sign("47", 30.0, 100.0, 13.0), PLAIN)


def still(*things, sign=None):
    return Scene(128, 128, 0.0, things, sign, PLAIN)


def answers(scene, family, tries=60):
    """question → answer over many draws."""
    found = [ask(scene, family, np.random.default_rng(seed)) for seed in range(tries)]
    return {qa.question: qa.answer for qa in found if qa is not None}


def test_a_video_caption_tells_what_is_there_then_what_appears_then_the_sign():
    assert caption(FILM) == (
        "a red circle moves right. an orange star stays still. then a blue ring appears and moves down. "
        "the sign reads 47."
    )


def test_an_image_caption_names_things_in_the_order_of_colours():
    assert caption(still(STAR, CIRCLE)) == "a red circle. an orange star."


def test_a_caption_does_not_start_with_then():
    assert caption(Scene(128, 128, 8.0, (RING,), None, PLAIN)) == "a blue ring appears and moves down."


EXPECTED = {
    "exist": {
        "is there a red circle?": "yes",
        "is there an orange star?": "yes",
        "is there a blue star?": "no",
        "is there a circle?": "yes",
        "is there a cyan object?": "no",
    },
    "count": {
        "how many objects are there?": "three",
        "how many stars are there?": "one",
        "how many red objects are there?": "one",
    },
    "color": {"what color is the star?": "orange", "what color is the ring?": "blue"},
    "shape": {"what shape is the red object?": "circle"},
    "size": {"is the orange star small or large?": "large", "is the red circle small or large?": "small"},
    "position": {"where is the orange star?": "center"},
    "digits": {"what number is written?": "47"},
    "unanswerable": {"what color is the cross?": "there is no cross."},
    "motion": {
        "which way does the red circle move?": "right",
        "which way does the orange star move?": "it stays still.",
        "which way does the blue ring move?": "down",
    },
    "last": {"which object appears last?": "the blue ring"},
    "order": {
        "does the red circle appear before the blue ring?": "yes",
        "does the blue ring appear before the orange star?": "no",
    },
    "when": {
        "when does the blue ring appear?": "in the second half",
        "when does the red circle appear?": "at the start",
    },
    "later": {"how many objects appear later?": "one"},
}


@pytest.mark.parametrize("family", EXPECTED)
def test_answers_about_a_known_film(family):
    found = answers(FILM, family, tries=400)
    assert EXPECTED[family].items() <= found.items()


def test_nothing_is_asked_where_the_answer_would_be_ambiguous():
    assert answers(FILM, "first") == {}  # two things are visible from the start
    assert answers(FILM, "word") == {}
    assert answers(still(STAR), "motion") == answers(still(STAR), "order") == answers(still(STAR), "when") == {}
    twin = Thing("red", "star", "small", 20.0, 20.0, 9.0)
    assert answers(still(STAR, twin), "color") == {}
    near_border = Thing("red", "cross", "small", 128 / 3, 20.0, 9.0)
    assert answers(still(near_border), "position") == {}


def test_words_and_positions_and_relations_on_a_still_picture():
    left, low = Thing("red", "cross", "small", 20.0, 20.0, 9.0), Thing("cyan", "ring", "small", 100.0, 110.0, 9.0)
    scene = still(left, low, sign=Sign("taxi", 64.0, 64.0, 13.0))
    assert answers(scene, "word") == {"what word is written?": "taxi"}
    assert answers(scene, "position") == {
        "where is the red cross?": "top left",
        "where is the cyan ring?": "bottom right",
    }
    relations = answers(scene, "relation", 200)
    assert relations["is the red cross left of the cyan ring?"] == "yes"
    assert relations["is the cyan ring above the red cross?"] == "no"
    assert len(relations) == 8


def test_the_right_option_of_a_choice_is_the_colour():
    for question, letter in answers(FILM, "choice").items():
        asked, options = question.rstrip(".").split("? ")
        listed = dict(option.split(". ") for option in options.split(", "))
        assert listed[letter] == answers(FILM, "color")[f"{asked}?"]
        assert len(set(listed.values())) == 4


def test_yes_and_no_are_balanced():
    scenes = [sample_scene(np.random.default_rng(seed), duration_s=8.0) for seed in range(800)]
    for family in ("exist", "order"):
        found = [ask(scene, family, np.random.default_rng(i)) for i, scene in enumerate(scenes)]
        told = [qa.answer for qa in found if qa is not None]
        assert 0.4 < told.count("yes") / len(told) < 0.6


def test_questions_about_a_set_of_images():
    scenes = [still(CIRCLE, STAR), still(STAR)]

    def of(family):
        found = [ask_set(scenes, family, np.random.default_rng(seed)) for seed in range(60)]
        return {qa.question: qa.answer for qa in found if qa is not None}

    assert of("set_caption") == {
        "describe the images.": "first image, a red circle. an orange star. second image, an orange star."
    }
    assert of("which_image") == {"which image shows a red circle?": "the first image"}
    assert of("image_count") == {"how many images are there?": "two"}
    assert of("difference") == {"what is different in the second image?": "the red circle is missing."}
    assert of("set_exist")["is there a red circle in the second image?"] == "no"


def test_every_family_finds_something_to_ask_in_some_scene():
    rng = np.random.default_rng(0)
    scenes = [sample_scene(rng, 192, 192, 8.0 * (i % 2), sign_words=True) for i in range(120)]
    for family in FAMILIES:
        assert any(ask(scene, family, rng) for scene in scenes), family
    for family in SET_FAMILIES:
        pairs = [(scenes[i], scenes[i + 2]) for i in range(0, 100, 2)]
        if family != "difference":  # two independent scenes hardly ever differ in one thing
            assert any(ask_set(pair, family, rng) for pair in pairs), family
