"""Kernels run in Triton's interpreter here: asked for before anything, such as transformers, imports Triton."""

import os

os.environ.setdefault("TRITON_INTERPRET", "1")
