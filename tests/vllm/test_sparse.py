"""Real vLLM with the plugin of packages/vllm-sparse: files without their zeros are served as those
with them, and products are those of sparse tensor cores (on a CPU, of a slow form of torch's
operators).
"""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from bitpress import compress
from bitpress.conformance.commands import install

ROOT = Path(__file__).parents[2]
TINY = ROOT / "examples/tiny-llama"
JUDGE = ROOT / "../shared/oracles/vllm_check.py"
TEXT = ROOT / "../shared/eval/heldout.txt"
PACKAGES = [ROOT / "packages" / name / "src" for name in ("core", "scheme-sparse", "vllm-sparse")]
KERNELS = ROOT / "packages/vllm-sparse/tests"
# vLLM's form of FP8 for CPUs takes half a second a token
NUM_TOKENS = 64

# By scheme: settings of what follows the zeros.
CASES = {
    "2:4": (),
    "2:4+fp8": (),
    "2:4+int8": ("int8.algorithm=rtn",),
    "6:8+fp8": (),
    "sparse+w4a16": ("w4a16.algorithm=rtn", "w4a16.group_size=64"),
}

# A GPU's operators in a process of vLLM: what is installed there is found as the plugin is.
FAKE_GPU = """
import cslt_reference
from bitpress_vllm_sparse import activations

installed = []

def register():
    installed.append(cslt_reference.install())
    activations.explain_dense = lambda first: None
"""

Serve = Callable[..., dict[str, Any]]


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, str], Path]:
    """The folder of a scheme in a layout."""
    root = tmp_path_factory.mktemp("sparse")

    def files(scheme: str, layout: str) -> Path:
        out = root / scheme.replace(":", "-") / layout
        first = "sparse" if scheme.startswith("sparse") else "sparse-2of4"
        settings = [f"{first}.algorithm=magnitude", f"{first}.layout={layout}", *CASES[scheme]]
        if not out.exists():
            compress(TINY, out, scheme=scheme, settings=settings)
        return out

    return files


@pytest.fixture(scope="module")
def serve(python: str, tmp_path_factory: pytest.TempPathFactory) -> Serve:
    """What the judge says of a folder, with or without the plugin and a GPU's operators."""
    root = tmp_path_factory.mktemp("plugins")
    entry = "[vllm.general_plugins]\nbitpress-sparse = bitpress_vllm_sparse:register\n"
    plugin = install(root / "plugin", "bitpress-vllm-sparse", "", entry)
    entry = "[vllm.general_plugins]\na-gpu = bitpress_scheme_gpu:register\n"
    gpu = install(root / "gpu", "bitpress-scheme-gpu", FAKE_GPU, entry)

    def serve(folder: Path, has_plugin: bool = True, on_gpu: bool = False) -> dict[str, Any]:
        others = os.environ.get("PYTHONPATH", "").split(os.pathsep)
        paths = [*PACKAGES, *[plugin] * has_plugin, *[gpu, KERNELS] * on_gpu, *others]
        arguments = [JUDGE, folder, TEXT, "--tokens", NUM_TOKENS]
        done = subprocess.run(
            [python, *map(str, arguments)],
            capture_output=True,
            text=True,
            check=False,
            env=os.environ | {"PYTHONPATH": os.pathsep.join(map(str, paths))},
        )
        document: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
        return document

    return serve


def answer(document: dict[str, Any]) -> tuple[float, list[int]]:
    """Mean log probability of the text's tokens, and how vLLM goes on."""
    assert document["ok"], document["error"]
    return document["mean_logprob"], document["greedy_ids"]


@pytest.mark.parametrize("scheme", CASES)
def test_files_without_zeros_are_served_as_those_with_them(
    serve: Serve, files: Callable[[str, str], Path], scheme: str
) -> None:
    before = answer(serve(files(scheme, "dense"), has_plugin=False))
    assert answer(serve(files(scheme, "bitmask"))) == before
    # the plugin finds no sparse tensor cores, and leaves these as they are
    assert answer(serve(files(scheme, "dense"))) == before


@pytest.mark.parametrize("scheme", CASES)
def test_files_without_zeros_are_refused_without_the_plugin(
    serve: Serve, files: Callable[[str, str], Path], scheme: str
) -> None:
    document = serve(files(scheme, "bitmask"), has_plugin=False)
    assert not document["ok"]
    assert "Sparsity support has been removed" in document["error"]


@pytest.mark.parametrize("scheme", [name for name in CASES if "w4a16" not in name])
def test_products_of_sparse_tensor_cores_are_near(
    serve: Serve, files: Callable[[str, str], Path], scheme: str
) -> None:
    for layout in ("dense", "bitmask"):
        # of plain weights with zeros a config says nothing
        if (scheme, layout) == ("2:4", "dense"):
            continue
        expected, _ = answer(serve(files(scheme, layout)))
        result, _ = answer(serve(files(scheme, layout), on_gpu=True))
        # bfloat16 is rounded at other places
        assert 0 < abs(result - expected) < 0.01


def test_biases_and_scales_of_fused_layers_are_those_of_each_row(python: str) -> None:
    others = os.environ.get("PYTHONPATH", "").split(os.pathsep)
    path = os.pathsep.join(map(str, [*PACKAGES, KERNELS, *others]))
    done = subprocess.run(
        [python, Path(__file__).with_name("sparse_layers.py")],
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | {"PYTHONPATH": path},
    )
    assert done.returncode == 0, done.stderr[-2000:]
    distances = json.loads(done.stdout.splitlines()[-1])
    assert len(distances) == 6
    # one rounding to bfloat16, and another once products are scaled
    assert all(distance < 0.005 for distance in distances.values()), distances
