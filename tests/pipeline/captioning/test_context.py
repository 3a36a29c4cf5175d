"""Which units are refused before they are decoded; no unit that fits is refused."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.captioning.context import ContextLimit
from pipeline.captioning.encode import encoder_for
from pipeline.captioning.models import describe
from pipeline.config import Frames, Model
from pipeline.decoding.frames import choose_frames
from pipeline.errors import UnitError
from tests.models import save_tiny_llava


@pytest.fixture(scope="module")
def card(tmp_path_factory):
    """A model with 512 positions, 16 per frame."""
    return describe(Model(name="tiny", path=str(save_tiny_llava(tmp_path_factory.mktemp("model")))))


@pytest.fixture(scope="module")
def encoder(card):
    return encoder_for(card.config, card.preprocessor)


def video(duration_s=10.0, **changes):
    known = {"kind": "video", "start_s": None, "end_s": None, "duration_s": duration_s, "fps": 24.0}
    return known | {"width": 640, "height": 360} | changes


def images(count):
    return video(None, kind="images", uris=["a.png"] * count)


@pytest.mark.parametrize(
    ("unit", "refused"),
    [
        (video(10.0), False),
        (video(60.0), True),
        (video(60.0, start_s=55.0), False),
        (video(60.0, end_s=9.0), False),
        (video(None), False),
        (video(60.0, width=None, height=None), False),
        (images(10), False),
        (images(32), True),
    ],
)
def test_what_cannot_fit_is_refused_by_its_plan(card, encoder, unit, refused):
    found = ContextLimit(card.config, encoder, max_new_tokens=8).refusal(unit, Frames(fps=1.0))
    assert (found is not None) is refused
    if found is not None:
        assert (found.stage, found.error_type) == ("prepare", "ContextTooLong")
        assert "expected at most 512 positions" in found.message


@settings(deadline=None)
@given(st.floats(0.5, 60.0), st.floats(-0.05, 0.05), st.sampled_from([0.5, 1.0, 3.0]), st.integers(1, 64))
def test_no_unit_is_refused_that_fits(card, encoder, duration_s, wrong, fps, new_tokens):
    """The header may be wrong by 5 %, and the text is not counted beforehand."""
    context, rule = ContextLimit(card.config, encoder, new_tokens), Frames(fps=fps)
    if context.refusal(video(duration_s * (1 + wrong)), rule) is None:
        return
    frames = len(choose_frames(np.arange(0.0, duration_s, 1 / 24), None, None, rule))
    with pytest.raises(UnitError, match="ContextTooLong"):
        context.check(1, [encoder.grid(frames, 32, 32)])
