"""Let vLLM's loader place the tensors of many folders: python load_models.py FOLDER ...

What vLLM's build for CPUs lacks, and does not matter to names and shapes, has stand-ins.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
FOLDERS = ("tools/engine_facts", "packages/core/src/bitpress/modeling", "../shared/oracles")
sys.path[:0] = [str(ROOT / folder) for folder in FOLDERS]

import vllm_loader  # noqa: E402
from stubs import install_stubs  # noqa: E402


def skip_backends() -> None:
    """Take a backend of attention that is never run, where there is none for CPUs."""
    from vllm.platforms import current_platform

    platform = type(current_platform)
    choose_backend = platform.get_attn_backend_cls.__func__

    def get_attn_backend_cls(cls: type, *args: Any, **kwargs: Any) -> str:
        try:
            return str(choose_backend(cls, *args, **kwargs))
        except NotImplementedError:
            return "vllm.v1.attention.backends.mla.flashmla_sparse.FlashMLASparseBackend"

    platform.get_attn_backend_cls = classmethod(get_attn_backend_cls)


if __name__ == "__main__":
    os.environ |= vllm_loader.ENVIRONMENT
    install_stubs()
    skip_backends()
    # After vLLM's own modules have been found.
    import vllm_emulate

    vllm_emulate.install()
    vllm_emulate.install_moe()
    vllm_loader.main(sys.argv[1:])
