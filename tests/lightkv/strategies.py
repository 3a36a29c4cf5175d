"""Strategies for hypothesis: layouts of any shape."""

import torch
from hypothesis import strategies as st

from lightkv import VisionLayout


@st.composite
def layouts(draw):
    """Several items of any size, with text before, between and after them; some tokens may already be removed."""
    spans, length = [], draw(st.integers(0, 3))
    for _ in range(draw(st.integers(0, 3))):
        t, h, w = draw(st.integers(1, 3)), draw(st.integers(1, 7)), draw(st.integers(1, 7))
        spans.append((length, t, h, w))
        length += t * h * w + draw(st.integers(0, 2))
    layout = VisionLayout.grids(spans, max(length, 1))
    if draw(st.booleans()):
        layout = layout.take(torch.rand(len(layout), generator=generator(draw(st.integers(0, 99)))) < 0.7)
    return layout


def generator(seed):
    return torch.Generator().manual_seed(seed)
