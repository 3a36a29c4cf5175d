"""What travels to every worker process of a job."""

import subprocess
import sys


def test_worker_processes_import_no_model_library():
    code = "import sys, pipeline.ray_hooks; print(sorted({'torch', 'transformers', 'lightkv'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True)
    assert done.stdout == "[]\n"
