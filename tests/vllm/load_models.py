"""Let vLLM's loader place the tensors of many folders: python load_models.py FOLDER ...

What vLLM's build for CPUs lacks, and does not matter to names and shapes, has stand-ins.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import sys
from pathlib import Path

from bitpress.modeling import vllm_loader

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT / folder) for folder in ("tools/engine_facts", "../shared/oracles")]

from stubs import install_backend, install_stubs  # noqa: E402

if __name__ == "__main__":
    os.environ |= vllm_loader.ENVIRONMENT
    install_stubs()
    install_backend()
    # After vLLM's own modules have been found.
    import vllm_emulate

    vllm_emulate.install()
    vllm_emulate.install_moe()

    # A process for each: vLLM keeps what it once set up.
    with multiprocessing.get_context("fork").Pool(1, maxtasksperchild=1) as pool:
        faults = pool.map(vllm_loader.find_load_faults, map(Path, sys.argv[1:]), chunksize=1)
    print(json.dumps(dict(zip(sys.argv[1:], faults, strict=True))))
