"""Kernels run in Triton's interpreter here: triton.jit looks at the variable when a kernel module is imported."""

import os

os.environ.setdefault("TRITON_INTERPRET", "1")
