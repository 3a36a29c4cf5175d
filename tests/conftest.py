"""Settings of libraries that they read when they are imported."""

import os

os.environ.setdefault("TRITON_INTERPRET", "1")  # kernels run in Triton's interpreter; transformers may import Triton
os.environ.setdefault("RAY_ENABLE_AUTO_CONNECT", "0")  # a stray call to Ray fails instead of starting a cluster
