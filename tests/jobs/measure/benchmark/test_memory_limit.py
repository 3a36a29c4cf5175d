"""A long video under a hard memory limit: too much for one whole prompt, enough for the engine."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from jobs.measure.benchmark.engine.scale import PLAIN

ROOT = Path(__file__).parents[4]
LIMIT_BYTES = 96 << 20  # on top of the process with its model
MINUTES, SIDE_PX = 20, 112  # 29,400 vision tokens: 88 MiB of cache in fp32, a quarter of it 22
CODE = f"""
import dataclasses, resource, sys
import torch
from jobs.measure.benchmark.engine.memory import _resident, answer
from jobs.measure.benchmark.engine.scale import on_cpu
from jobs.measure.benchmark.engine.subject import Mini, Video
from lightkv.errors import out_of_memory

name = sys.argv[1]
scale, subject = dataclasses.replace(on_cpu(), chunk_tokens=1024), Mini(8)
answer(scale, subject, name, Video(1, 60, {SIDE_PX}))
most = _resident("VmData") + {LIMIT_BYTES}
resource.setrlimit(resource.RLIMIT_DATA, (most, most))
try:
    with torch.inference_mode():
        said = answer(scale, subject, name, Video(0, 60 * {MINUTES}, {SIDE_PX}))
    print("answered", said.kv_bytes, said.text)
except (RuntimeError, MemoryError) as error:
    print("out of memory" if out_of_memory(error) or isinstance(error, MemoryError) else repr(error))
"""


@pytest.mark.parametrize(("name", "end"), [(PLAIN, "out of memory"), ("lightkv 25%", "answered")])
def test_twenty_minutes_of_video_in_less_than_their_plain_cache_takes(name, end):
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", CODE, name], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.startswith(end), done.stdout + done.stderr
