"""Kernels are not recompiled for other token counts.

Triton specialises a kernel on integer arguments that are 1 or multiples of 16, except those in do_not_specialize.
"""

import json
import os
import subprocess
import sys

KERNELS = {
    "attend_kernel": ["prefill_kernel", "decode_kernel", "combine_kernel"],
    "compact_kernel": ["compact_kernel"],
    "merge_kernel": ["weigh_kernel", "mean_kernel"],
    "nearest_kernel": ["nearest_kernel"],
    "quantised_kernel": ["quantised_kernel", "combine_parts_kernel"],
    "votes_kernel": ["peaks_kernel", "votes_kernel"],
}
LOOKED_AT = """
import importlib, json, sys
found = {}
for module, kernels in json.loads(sys.argv[1]).items():
    for name in kernels:
        kernel = getattr(importlib.import_module(f"lightkv.ops.{module}"), name)
        found[f"{module}.{name}"] = [p.name for p in kernel.params if not p.is_constexpr and not p.do_not_specialize]
print(json.dumps(found))
"""
OF_ONE_LAUNCH = {
    *("most_q", "most_k", "slots", "tokens", "tail", "chunk", "chunks", "parts", "tail_parts"),
    *("pairs", "count", "survivors", "stride_c", "tiles", "length", "short_tiles", "long_tiles"),
}


def test_no_kernel_is_compiled_anew_for_another_number_of_tokens():
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-c", LOOKED_AT, json.dumps(KERNELS)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=os.getcwd())
    assert done.returncode == 0, done.stderr[-3000:]
    looked_at = json.loads(done.stdout)
    assert {kernel: OF_ONE_LAUNCH & set(names) for kernel, names in looked_at.items()} == {k: set() for k in looked_at}
    assert "width" not in looked_at["votes_kernel.peaks_kernel"] + looked_at["votes_kernel.votes_kernel"]
