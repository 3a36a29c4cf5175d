"""Compiles kernels for GPUs without a GPU, in a separate process with Triton's interpreter off.

The interpreter accepts code that the compiler rejects. Triton includes its own assembler, so no GPU is needed.
"""

import importlib
import json
import os
import re
import subprocess
import sys
import tempfile
import types
from pathlib import Path
from typing import Any

SHARED_BYTES = {80: 163 * 1024, 90: 227 * 1024}  # shared memory limit of a block by compute capability


def compile_kernel(
    module: str, kernel: str, signature: dict[str, str], constants: dict[str, Any], **options: int
) -> int:
    """Compiles for every capability in SHARED_BYTES; raises AssertionError with the compiler's message if one fails.

    Returns the most bytes that a thread spills to local memory.

    signature: every argument's type in order, e.g. {"x": "*bf16", "stride": "i64", "n": "i32", "BLOCK": "constexpr"}.
    Pointers and int64 (strides) are declared as multiples of 16, as in real models, so that loads are vectorised.
    options: num_warps, num_stages and the like.
    """
    job = json.dumps([module, kernel, signature, constants, options])
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, str(Path(__file__)), job], capture_output=True, text=True, env=environment, cwd=os.getcwd()
    )
    assert done.returncode == 0, done.stderr[-3000:]
    used = json.loads(done.stdout.splitlines()[-1])
    over = {name: shared for name, (shared, _) in used.items() if shared > SHARED_BYTES[int(name)]}
    assert not over, f"bytes of shared memory by compute capability: {over}, allowed {SHARED_BYTES}"
    return max(stack for _, stack in used.values())


def _main(job: str) -> None:
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    module, kernel, signature, constants, options = json.loads(job)
    sys.path.insert(0, os.getcwd())
    package = types.ModuleType("lightkv")  # skips the imports of its __init__: kernels need only torch and Triton
    package.__path__ = [str(Path("lightkv").resolve())]
    sys.modules["lightkv"] = package
    wide = [place for place, kind in enumerate(signature.values()) if kind.startswith("*") or kind == "i64"]
    attributes = {(place,): [["tt.divisibility", 16]] for place in wide}
    source = ASTSource(getattr(importlib.import_module(module), kernel), signature, constants, attributes)
    used = {}
    for capability in SHARED_BYTES:
        compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
        assert compiled.asm["cubin"]
        used[capability] = compiled.metadata.shared, _stack_bytes(compiled.asm["cubin"])
    print(json.dumps(used))


def _stack_bytes(cubin: bytes) -> int:
    """Stack size of a thread, which holds spilled registers."""
    from triton import knobs

    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        told = subprocess.run([knobs.nvidia.cuobjdump.path, "-res-usage", file.name], capture_output=True, check=True)
    return int(re.findall(rb"STACK:(\d+)", told.stdout)[-1])


if __name__ == "__main__":
    _main(sys.argv[1])
