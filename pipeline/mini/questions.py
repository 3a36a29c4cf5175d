"""Questions about a scene, or about a set of still scenes, with exact answers: one short function per task family.

A family returns None if it has no unambiguous question. All words are in `pipeline.mini.vocabulary`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from typing import NamedTuple, TypeVar

import numpy as np

from pipeline.mini.scene import HELD_OUT, Scene, Thing
from pipeline.mini.vocabulary import CHOICES, COLORS, NUMBERS, ORDINALS, PLURALS, SHAPES

Option = TypeVar("Option")
MIN_GAP_PX = 16  # two centres this far apart along an axis are clearly left/right or above/below


class QA(NamedTuple):
    family: str
    question: str
    answer: str


def ask(scene: Scene, family: str, rng: np.random.Generator) -> QA | None:
    """One question of the family about the scene; None if the scene offers none."""
    found = FAMILIES[family](scene, rng)
    return None if found is None else QA(family, *found)


def ask_set(scenes: Sequence[Scene], family: str, rng: np.random.Generator) -> QA | None:
    """One question of the family about a set of two to six still scenes."""
    found = SET_FAMILIES[family](scenes, rng)
    return None if found is None else QA(family, *found)


def caption(scene: Scene) -> str:
    """Every thing in telling order with its motion, then the sign: `a red circle moves left. the sign reads 47.`"""
    sentences = [_sentence(thing, scene.is_video) for thing in scene.in_telling_order()]
    sentences[:1] = [first.removeprefix("then ") for first in sentences[:1]]
    if scene.sign is not None:
        sentences.append(f"the sign reads {scene.sign.text}.")
    return " ".join(sentences) or "nothing."


def _sentence(thing: Thing, is_video: bool) -> str:
    name = f"{_article(thing.color)} {thing.name}"
    if not is_video:
        return f"{name}."
    motion = "stays still" if thing.motion == "still" else f"moves {thing.motion}"
    return f"then {name} appears and {motion}." if thing.appear_s > 0 else f"{name} {motion}."


def _article(word: str) -> str:
    return "an" if word[0] in "aeiou" else "a"


def _pick(rng: np.random.Generator, options: Sequence[Option]) -> Option:
    return options[int(rng.integers(len(options)))]


def _yes(value: bool) -> str:
    return "yes" if value else "no"


def _alone(things: Sequence[Thing], attribute: str) -> list[Thing]:
    """Things whose colour (or shape) no other thing shares."""
    counts = Counter(getattr(thing, attribute) for thing in things)
    return [thing for thing in things if counts[getattr(thing, attribute)] == 1]


def _caption(scene: Scene, rng: np.random.Generator) -> tuple[str, str]:
    noun = "video" if scene.is_video else "image"
    plain = f"describe the {noun}."
    others = (f"what happens in the {noun}?", f"caption this {noun}.", "describe the scene.", f"describe this {noun}.")
    return (plain if rng.random() < 0.6 else _pick(rng, others)), caption(scene)


def _exist(scene: Scene, rng: np.random.Generator) -> tuple[str, str] | None:
    """Half of the answers are yes; a no is often a near miss: a colour and a shape that both occur, but not together.

    Held-out combinations are named only if one is shown; else training would learn that they never exist.
    """
    things, wanted = scene.things, rng.random() < 0.5
    kind = int(rng.integers(4))
    if wanted:
        if not things:
            return None
        thing = _pick(rng, things)
        color, shape = thing.color, thing.shape
    else:
        absent_colors = [c for c in COLORS if c not in {t.color for t in things}]
        absent_shapes = [s for s in SHAPES if s not in {t.shape for t in things}]
        color, shape = _pick(rng, absent_colors or COLORS), _pick(rng, absent_shapes or SHAPES)
        if kind >= 2 and things and rng.random() < 0.7:
            color = _pick(rng, things).color if rng.random() < 0.6 else color
            shape = _pick(rng, things).shape if rng.random() < 0.6 else shape
    name = (f"{color} object", shape, f"{color} {shape}", f"{color} {shape}")[kind]
    if kind >= 2 and (color, shape) in HELD_OUT and not any((t.color, t.shape) in HELD_OUT for t in things):
        return None
    truth = any((kind == 1 or t.color == color) and (kind == 0 or t.shape == shape) for t in things)
    if truth != wanted:
        return None
    return f"is there {_article(name)} {name}?", _yes(truth)


def _count(scene: Scene, rng: np.random.Generator) -> tuple[str, str]:
    kind = int(rng.integers(3))
    if kind == 0 or not scene.things:
        return "how many objects are there?", NUMBERS[len(scene.things)]
    known = rng.random() < 0.85
    if kind == 1:
        shape = _pick(rng, scene.things).shape if known else _pick(rng, SHAPES)
        return f"how many {PLURALS[shape]} are there?", NUMBERS[sum(t.shape == shape for t in scene.things)]
    color = _pick(rng, scene.things).color if known else _pick(rng, COLORS)
    return f"how many {color} objects are there?", NUMBERS[sum(t.color == color for t in scene.things)]


def _color(scene: Scene, rng: np.random.Generator) -> tuple[str, str] | None:
    options = _alone(scene.things, "shape")
    if not options:
        return None
    thing = _pick(rng, options)
    return f"what color is the {thing.shape}?", thing.color


def _shape(scene: Scene, rng: np.random.Generator) -> tuple[str, str] | None:
    options = _alone(scene.things, "color")
    if not options:
        return None
    thing = _pick(rng, options)
    return f"what shape is the {thing.color} object?", thing.shape


def _size(scene: Scene, rng: np.random.Generator) -> tuple[str, str] | None:
    if not scene.things:
        return None
    thing = _pick(rng, scene.things)
    return f"is the {thing.name} small or large?", thing.size


def _position(scene: Scene, rng: np.random.Generator) -> tuple[str, str] | None:
    """Thirds of the frame, for things that do not move; None near a border between thirds."""
    still = [t for t in scene.things if t.motion == "still"]
    if not still:
        return None
    thing = _pick(rng, still)
    x, y = 3 * thing.x_px / scene.width_px, 3 * thing.y_px / scene.height_px
    if min(abs(x - 1), abs(x - 2), abs(y - 1), abs(y - 2)) < 0.12:
        return None
    row, column = ("top", "", "bottom")[int(y)], ("left", "", "right")[int(x)]
    return f"where is the {thing.name}?", f"{row} {column}".strip() or "center"


def _relation(scene: Scene, rng: np.random.Generator) -> tuple[str, str] | None:
    still = [t for t in scene.things if t.motion == "still"]
    if len(still) < 2:
        return None
    first, second = (still[i] for i in rng.permutation(len(still))[:2].tolist())
    dx, dy = first.x_px - second.x_px, first.y_px - second.y_px
    relation, gap = (("left of", -dx), ("right of", dx), ("above", -dy), ("below", dy))[int(rng.integers(4))]
    if abs(gap) < MIN_GAP_PX:
        return None
    return f"is the {first.name} {relation} the {second.name}?", _yes(gap > 0)


def _digits(scene: Scene, rng: np.random.Generator) -> tuple[str, str] | None:
    if scene.sign is None or not scene.sign.text.isdigit():
        return None
    return "what number is written?", scene.sign.text


def _word(scene: Scene, rng: np.random.Generator) -> tuple[str, str] | None:
    if scene.sign is None or scene.sign.text.isdigit():
        return None
    return "what word is written?", scene.sign.text


def _choice(scene: Scene, rng: np.random.Generator) -> tuple[str, str] | None:
    """The colour question with options; the answer is a letter."""
    asked = _color(scene, rng)
    if asked is None:
        return None
    question, right = asked
    wrong = [c for c in COLORS if c != right]
    options = [wrong[i] for i in rng.permutation(len(wrong))[: len(CHOICES) - 1].tolist()]
    place = int(rng.integers(len(CHOICES)))
    options.insert(place, right)
    listed = ", ".join(f"{letter}. {option}" for letter, option in zip(CHOICES, options, strict=True))
    return f"{question} {listed}.", CHOICES[place]


def _unanswerable(scene: Scene, rng: np.random.Generator) -> tuple[str, str] | None:
    """A question about something that is not shown; the answer says so."""
    kind = int(rng.integers(3))
    if kind == 0:
        return None if scene.sign is not None else ("what number is written?", "there is no number.")
    if kind == 1:
        absent = [s for s in SHAPES if s not in {t.shape for t in scene.things}]
        shape = _pick(rng, absent or [""])
        return (f"what color is the {shape}?", f"there is no {shape}.") if shape else None
    missing = [c for c in COLORS if c not in {t.color for t in scene.things}]
    color = _pick(rng, missing or [""])
    return (f"what shape is the {color} object?", f"there is no {color} object.") if color else None


def _motion(scene: Scene, rng: np.random.Generator) -> tuple[str, str] | None:
    if not scene.is_video or not scene.things:
        return None
    thing = _pick(rng, scene.things)
    return f"which way does the {thing.name} move?", "it stays still." if thing.motion == "still" else thing.motion


def _first(scene: Scene, rng: np.random.Generator) -> tuple[str, str] | None:
    return _extreme(scene, "first", min)


def _last(scene: Scene, rng: np.random.Generator) -> tuple[str, str] | None:
    return _extreme(scene, "last", max)


def _extreme(scene: Scene, word: str, choose: Callable) -> tuple[str, str] | None:
    if len(scene.things) < 2:
        return None
    time_s = choose(t.appear_s for t in scene.things)
    found = [t for t in scene.things if t.appear_s == time_s]
    return (f"which object appears {word}?", f"the {found[0].name}") if len(found) == 1 else None


def _order(scene: Scene, rng: np.random.Generator) -> tuple[str, str] | None:
    if len(scene.things) < 2:
        return None
    first, second = (scene.things[i] for i in rng.permutation(len(scene.things))[:2].tolist())
    if first.appear_s == second.appear_s:
        return None
    return f"does the {first.name} appear before the {second.name}?", _yes(first.appear_s < second.appear_s)


def _when(scene: Scene, rng: np.random.Generator) -> tuple[str, str] | None:
    """At the start, or in which half; None close to the middle."""
    if not scene.is_video or not scene.things:
        return None
    late = [t for t in scene.things if t.appear_s > 0]
    thing = _pick(rng, late if late and rng.random() < 0.75 else scene.things)
    share = thing.appear_s / scene.duration_s
    if abs(share - 0.5) < 0.08:
        return None
    answer = "at the start" if share == 0 else "in the first half" if share < 0.5 else "in the second half"
    return f"when does the {thing.name} appear?", answer


def _later(scene: Scene, rng: np.random.Generator) -> tuple[str, str] | None:
    """Counting over time: how many things appear after the start."""
    if not scene.is_video or not scene.things:
        return None
    return "how many objects appear later?", NUMBERS[sum(t.appear_s > 0 for t in scene.things)]


def _set_caption(scenes: Sequence[Scene], rng: np.random.Generator) -> tuple[str, str]:
    told = [f"{ordinal} image, {caption(scene)}" for ordinal, scene in zip(ORDINALS, scenes, strict=False)]
    return "describe the images.", " ".join(told)


def _which_image(scenes: Sequence[Scene], rng: np.random.Generator) -> tuple[str, str] | None:
    """Which image shows a thing that exactly one image shows."""
    counts = Counter(thing.name for scene in scenes for thing in scene.things)
    single = [(i, t) for i, scene in enumerate(scenes) for t in scene.things if counts[t.name] == 1]
    if not single:
        return None
    index, thing = _pick(rng, single)
    return f"which image shows {_article(thing.color)} {thing.name}?", f"the {ORDINALS[index]} image"


def _image_count(scenes: Sequence[Scene], rng: np.random.Generator) -> tuple[str, str]:
    return "how many images are there?", NUMBERS[len(scenes)]


def _set_exist(scenes: Sequence[Scene], rng: np.random.Generator) -> tuple[str, str] | None:
    """Whether a thing from one of the images is in a given image."""
    names = [t.name for scene in scenes for t in scene.things]
    if not names:
        return None
    index, name = int(rng.integers(len(scenes))), _pick(rng, names)
    truth = name in {t.name for t in scenes[index].things}
    return f"is there {_article(name)} {name} in the {ORDINALS[index]} image?", _yes(truth)


def _difference(scenes: Sequence[Scene], rng: np.random.Generator) -> tuple[str, str] | None:
    """For two images that differ in exactly one thing: what the second lacks or adds."""
    if len(scenes) != 2:
        return None
    before, after = ({t.name for t in scene.things} for scene in scenes)
    if len(before ^ after) != 1:
        return None
    name = next(iter(before ^ after))
    verb = "is missing" if name in before else "is new"
    return "what is different in the second image?", f"the {name} {verb}."


Family = Callable[[Scene, np.random.Generator], tuple[str, str] | None]
SetFamily = Callable[[Sequence[Scene], np.random.Generator], tuple[str, str] | None]

FAMILIES: dict[str, Family] = {
    "caption": _caption,
    "exist": _exist,
    "count": _count,
    "color": _color,
    "shape": _shape,
    "size": _size,
    "position": _position,
    "relation": _relation,
    "digits": _digits,
    "word": _word,
    "choice": _choice,
    "unanswerable": _unanswerable,
    "motion": _motion,
    "first": _first,
    "last": _last,
    "order": _order,
    "when": _when,
    "later": _later,
}
SET_FAMILIES: dict[str, SetFamily] = {
    "set_caption": _set_caption,
    "which_image": _which_image,
    "image_count": _image_count,
    "set_exist": _set_exist,
    "difference": _difference,
}
