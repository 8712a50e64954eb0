"""The same bytes whoever computes them and however often the run is killed; and nothing looks
finished before it is.
"""

from __future__ import annotations

import json
import signal
from pathlib import Path
from unittest.mock import patch

import pytest
import torch
from fixtures.forked import ForkedCommand
from fixtures.learner_scheme import runnable_model
from fixtures.toy_scheme import TOY, install_deadly, install_toy

import bitpress
from bitpress import SchemeError, VerificationError
from bitpress.checkpoint.filenames import LOCK, RUN_RECORD
from bitpress.checkpoint.reader import Reader
from bitpress.checkpoint.safetensors import read_header
from bitpress.checkpoint.writer import OutputFolder
from bitpress.compression import data_free
from bitpress.compression.resources import Resources
from bitpress.conformance.commands import command, install, plugins, refusal
from bitpress.conformance.models import files_of, llama_tensors, write_model
from bitpress.schemes import stored_layout

ENTRY = "[bitpress.schemes]\ntoy = bitpress_scheme_toy\n"
SHARDS = [f"model-0000{i}-of-00004.safetensors" for i in (1, 2, 3, 4)]


@pytest.fixture
def deadly(tmp_path: Path) -> Path:
    return install_deadly(tmp_path / "deadly")


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return write_model(tmp_path / "model", shards=4)


@pytest.fixture
def expected(tmp_path: Path, model: Path, deadly: Path) -> dict[str, bytes]:
    """What a run that nothing disturbs writes."""
    with plugins(deadly):
        bitpress.compress(model, tmp_path / "undisturbed", scheme="toy", threads=1)
    return files_of(tmp_path / "undisturbed")


@pytest.mark.parametrize("threads", [1, 4, 17])
def test_the_files_do_not_depend_on_threads(
    tmp_path: Path, model: Path, deadly: Path, expected: dict[str, bytes], threads: int
) -> None:
    with plugins(deadly):
        bitpress.compress(model, tmp_path / "out", scheme="toy", threads=threads)
    assert files_of(tmp_path / "out") == expected


@pytest.mark.parametrize("tile", [1, 1000])
def test_the_weights_do_not_depend_on_the_size_of_tiles(
    tmp_path: Path, model: Path, deadly: Path, expected: dict[str, bytes], tile: int
) -> None:
    with plugins(deadly), patch.object(stored_layout, "WEIGHTS_PER_TILE", tile):
        bitpress.compress(model, tmp_path / "out", scheme="toy")
    for name in SHARDS:
        assert (tmp_path / "out" / name).read_bytes() == expected[name]


def test_the_files_do_not_depend_on_the_order_of_shards(
    tmp_path: Path, model: Path, deadly: Path, expected: dict[str, bytes]
) -> None:
    with plugins(deadly), Reader() as reader:
        plan = bitpress.plan(model, scheme="toy")
        for shard in reversed(plan.shards):
            data_free.write_shard(
                shard,
                OutputFolder(tmp_path),
                reader,
                Resources(num_threads=2),
                lambda done, what="": None,
            )
    assert {name: (tmp_path / name).read_bytes() for name in SHARDS} == {
        name: expected[name] for name in SHARDS
    }


# what dies when it is called, in the moments that no hook of a scheme sees
DEADLY_FUNCTIONS = {
    "verification": "bitpress.output.file_proof.hash_shard",
    "side files": "bitpress.checkpoint.writer.OutputFolder.copy_file",
    "model card": "bitpress.compression.run.write_model_card",
}
DIE_IN = """
import os
from unittest.mock import patch
patch("{}", lambda *arguments: os.kill(os.getpid(), 9)).start()
"""

# where a run dies: (stack, finished shards)
PLACES = {
    "in the first shard": ("model.layers.1.mlp.[gate_proj, up_proj]", 0),
    "in the second shard": ("model.layers.0.mlp.down_proj", 1),
    "in the last shard": ("model.layers.1.self_attn.o_proj", 3),
    "while side files are copied": ("side files", 4),
    "while it is verified": ("verification", 4),
    "before it is described": ("model card", 4),
}
DEATHS = [
    ("in the first shard", signal.SIGKILL, 4),
    ("in the second shard", signal.SIGKILL, 1),
    ("in the last shard", signal.SIGKILL, 4),
    ("while side files are copied", signal.SIGKILL, 1),
    ("while it is verified", signal.SIGKILL, 1),
    ("before it is described", signal.SIGKILL, 4),
    ("in the second shard", signal.SIGTERM, 4),
    ("in the second shard", signal.SIGINT, 1),
    ("in the last shard", signal.SIGINT, 4),
]


@pytest.mark.parametrize(
    "death", DEATHS, ids=[f"{moment}-{kind.name}-{threads}" for moment, kind, threads in DEATHS]
)
def test_a_run_that_was_killed_goes_on_from_the_finished_shards_to_the_same_bytes(
    tmp_path: Path,
    model: Path,
    deadly: Path,
    expected: dict[str, bytes],
    death: tuple[str, signal.Signals, int],
) -> None:
    moment, kind, threads = death
    out, (where, finished) = tmp_path / "out", PLACES[moment]
    (deadly / "die").write_text(f"{where}|{int(kind)}")
    arguments = ("compress", model, out, "--scheme", "toy", "--threads", threads)
    setup = DIE_IN.format(DEADLY_FUNCTIONS[where]) if where in DEADLY_FUNCTIONS else ""
    running = ForkedCommand(*arguments, path=deadly, setup=setup)
    _, error = running.communicate(timeout=120)
    assert running.returncode == (130 if kind is signal.SIGINT else -kind), error
    if kind is signal.SIGINT:
        assert error == "bitpress: interrupted; the same command resumes from the finished shards\n"
        assert not list(out.glob("*.part"))
    assert not (out / "config.json").exists()
    shards = {file.name: file.stat() for file in out.glob("*.safetensors")}
    assert sorted(shards) == SHARDS[:finished]
    for name in shards:
        assert (out / name).read_bytes() == expected[name]
    (deadly / "die").unlink()
    assert command(*arguments, path=deadly).returncode == 0
    assert files_of(out) == expected
    for name, before in shards.items():
        after = (out / name).stat()
        assert (after.st_ino, after.st_mtime_ns) == (before.st_ino, before.st_mtime_ns), (
            "a finished shard was written again"
        )


RENAME_KILLS = """
import os, pathlib, sys
rename, left = pathlib.Path.rename, [int(sys.argv.pop(1))]
def deadly(self, target):
    left[0] -= 1
    if left[0] < 0:
        os.kill(os.getpid(), 9)
    return rename(self, target)
pathlib.Path.rename = deadly
"""


@pytest.mark.parametrize("renames", range(10), ids=lambda n: f"after {n} files")
def test_until_every_other_file_has_its_name_the_folder_is_no_model(
    tmp_path: Path, model: Path, deadly: Path, expected: dict[str, bytes], renames: int
) -> None:
    out = tmp_path / "out"
    words = [renames, "compress", model, out, "--scheme", "toy"]
    assert ForkedCommand(*words, path=deadly, setup=RENAME_KILLS).wait(120) == -signal.SIGKILL
    left = [name for name in files_of(out) if not name.endswith((".part", LOCK))]
    assert len(left) == renames
    assert "config.json" not in left
    if renames == 9:
        assert {*left, "config.json"} == {*expected, RUN_RECORD}
    assert command("compress", model, out, "--scheme", "toy", path=deadly).returncode == 0
    assert files_of(out) == expected


def test_a_run_that_was_killed_while_it_was_checked_goes_on_to_the_same_bytes(
    tmp_path: Path, deadly: Path
) -> None:
    model, text = runnable_model(tmp_path / "runnable"), tmp_path / "text.txt"
    words = ["compress", model, tmp_path / "out", "--scheme", "toy", "--check", text]
    setup = DIE_IN.format("bitpress.compression.accuracy_check.AccuracyCheck.measure")
    assert ForkedCommand(*words, path=deadly, setup=setup).wait(120) == -signal.SIGKILL
    assert not (tmp_path / "out/config.json").exists()
    assert command(*words, path=deadly).returncode == 0
    words[2] = tmp_path / "whole"
    assert command(*words, path=deadly).returncode == 0
    assert files_of(tmp_path / "out") == files_of(tmp_path / "whole")


def test_what_does_not_decode_to_what_was_quantized_is_never_written(
    tmp_path: Path, model: Path
) -> None:
    liar = TOY.replace('tensors["weight"].float()', 'tensors["weight"].float() * 2')
    with (
        plugins(install(tmp_path / "liar", "bitpress-scheme-toy", liar, ENTRY)),
        pytest.raises(SchemeError, match="does not decode to the weight that `quantize` returned"),
    ):
        bitpress.compress(model, tmp_path / "out", scheme="toy")
    assert not list((tmp_path / "out").glob("*.safetensors"))


def test_a_result_that_fails_its_proof_gets_no_config(tmp_path: Path, model: Path) -> None:
    coarse = TOY.replace('tensors["weight_scale"] * 0.501', 'tensors["weight_scale"] * 0.01')
    with (
        plugins(install(tmp_path / "coarse", "bitpress-scheme-toy", coarse, ENTRY)),
        pytest.raises(VerificationError) as refusal,
    ):
        bitpress.compress(model, tmp_path / "out", scheme="toy")
    assert len(refusal.value.faults) == 14
    assert "further from the source's than rounding can move it" in refusal.value.faults[0].text
    assert not (tmp_path / "out/config.json").exists()


@pytest.mark.parametrize("position", [100, 2000, -1, -5000], ids=lambda n: f"byte {n}")
def test_a_finished_shard_that_has_changed_since_is_written_again(
    tmp_path: Path, model: Path, deadly: Path, expected: dict[str, bytes], position: int
) -> None:
    out = tmp_path / "out"
    (deadly / "die").write_text(f"{PLACES['in the second shard'][0]}|{int(signal.SIGKILL)}")
    arguments = ("compress", model, out, "--scheme", "toy")
    ForkedCommand(*arguments, path=deadly).communicate(timeout=120)
    (deadly / "die").unlink()
    shard = bytearray((out / SHARDS[0]).read_bytes())
    shard[position] ^= 1
    (out / SHARDS[0]).write_bytes(shard)
    done = command(*arguments, path=deadly)
    assert done.returncode == 0, done.stderr
    assert SHARDS[0] in done.stderr
    assert "is written again" in done.stderr
    assert files_of(out) == expected


def test_finished_shards_without_the_record_of_their_run_are_refused(
    tmp_path: Path, model: Path, deadly: Path
) -> None:
    out = tmp_path / "out"
    (deadly / "die").write_text(f"{PLACES['in the second shard'][0]}|{int(signal.SIGKILL)}")
    ForkedCommand("compress", model, out, "--scheme", "toy", path=deadly).communicate(timeout=120)
    (out / RUN_RECORD).unlink()
    other = write_model(tmp_path / "other", llama_tensors(seed=1), shards=4)
    line = refusal("compress", other, out, "--scheme", "toy", "--no-verify", path=deadly)
    assert "finished shards and no .bitpress.run" in line


def test_the_digest_of_a_plan_tells_apart_what_would_be_written_otherwise(tmp_path: Path) -> None:
    def digest(folder: str, version: str = "1.0", seed: int = 0, **arguments: object) -> str:
        install_toy(tmp_path / f"p{version}", version)
        tensors = llama_tensors(seed) if seed < 2 else llama_tensors() | {"more": torch.zeros(2)}
        if not (tmp_path / folder).exists():
            write_model(tmp_path / folder, tensors)
        with plugins(tmp_path / f"p{version}"):
            return bitpress.plan(tmp_path / folder, scheme="toy", **arguments).digest  # type: ignore[arg-type]

    assert digest("a") == digest("a")
    others = [
        digest("a", version="2.0"),
        digest("b", seed=2),
        digest("a", settings=["levels=7"]),
        digest("a", ignore=["*.o_proj"]),
    ]
    assert len({digest("a"), *others}) == 5


def test_a_shard_carries_the_plan_s_digest(tmp_path: Path, with_toy: Path, model: Path) -> None:
    bitpress.compress(model, tmp_path / "out", scheme="toy")
    digest = bitpress.plan(model, scheme="toy").digest
    for name in SHARDS:
        metadata = read_header(tmp_path / "out" / name).metadata
        assert metadata.keys() == {"format", "bitpress", "sha256"}
        assert metadata["bitpress"] == digest
    assert "bitpress" not in json.loads((tmp_path / "out/config.json").read_text())
