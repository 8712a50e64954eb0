"""What fails during a run, plugin or disk, is named; nothing wrong reaches a file, and what was
finished is kept.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from unittest.mock import patch

import pytest
from fixtures.learner_scheme import LEARNER, runnable_model
from fixtures.toy_scheme import TOY, install_toy

from bitpress.conformance.commands import command, install, refusal
from bitpress.conformance.models import files_of, write_model

ENTRY = "[bitpress.schemes]\ntoy = bitpress_scheme_toy\n"
GIVEN = (
    'return attrs.evolve(layer, weight=codes * scale, codes=codes.char(), qparams={"scale": scale})'
)
STORED = next(line.strip() for line in TOY.splitlines() if "return StoredLayer(" in line)
RESTORED = 'return tensors["weight"].float() * tensors["weight_scale"]'
# what stands there, what stands there instead, what is said
BROKEN = {
    "quantize raises": (GIVEN, "raise KeyError('moon')", "failed in quantize: KeyError: 'moon'"),
    "quantize raises what has several lines": (
        GIVEN,
        "raise KeyError('moon\\nand stars')",
        "failed in quantize: KeyError",
    ),
    "quantize ends the process": (
        GIVEN,
        "raise SystemExit(0)",
        "failed in quantize: SystemExit: 0",
    ),
    "quantize turns the weight": (
        GIVEN,
        GIVEN.replace("codes * scale,", "(codes * scale).T,"),
        "quantize made a weight of [",
    ),
    "quantize drops a column": (
        GIVEN,
        GIVEN.replace("codes * scale,", "(codes * scale)[:, 1:],"),
        "quantize made a weight of",
    ),
    "quantize makes halves": (
        GIVEN,
        GIVEN.replace("codes * scale,", "(codes * scale).half(),"),
        "torch.float16",
    ),
    "quantize makes a list": (
        GIVEN,
        GIVEN.replace("codes * scale,", "[1],"),
        "quantize made weight a list, not a tensor",
    ),
    "quantize drops a row of codes": (
        GIVEN,
        GIVEN.replace("codes.char()", "codes.char()[1:]"),
        "quantize made codes of shape",
    ),
    "quantize makes too many scales": (
        GIVEN,
        GIVEN.replace("{", "{'x': scale.repeat(2, 1), "),
        "quantize made x of shape",
    ),
    "quantize makes a scale that is a number": (
        GIVEN,
        GIVEN.replace("{", "{'x': 1.0, "),
        "quantize made x a float",
    ),
    "pack drops a row": (
        "@hookimpl\ndef serialize",
        "@hookimpl\ndef pack(layer): return attrs.evolve(layer, codes=layer.codes[1:])\n@hookimpl\n"
        "def serialize",
        "pack made codes of shape",
    ),
    "serialize stores a number": (
        "layer.codes, ",
        "3, ",
        "serialize made weight a int, not a tensor",
    ),
    "serialize stores nothing": (
        STORED,
        "return StoredLayer({}, None)",
        "a StoredLayer without tensors",
    ),
    "serialize's config is not JSON": (
        STORED,
        STORED.replace("weights}", "{1, 2}}"),
        "a config that is not JSON",
    ),
    "observe returns a number": (
        "@hookimpl\ndef serialize",
        "@hookimpl\ndef observe(weight): return {'size': 3}\n@hookimpl\ndef serialize",
        "observe returned dict, not Statistics by name",
    ),
    "observe claims rows that it has not": (
        "@hookimpl\ndef serialize",
        "@hookimpl\ndef observe(weight): return {'size': bitpress.Statistic(weight.sum(), 'sum', "
        "True)}\n@hookimpl\ndef serialize",
        "observe made size of shape [] for",
    ),
    "validate_hardware returns a text": (
        '[Finding("supported", "runs anywhere")]',
        '["fine"]',
        "validate_hardware returned",
    ),
}


@pytest.mark.parametrize("what", BROKEN)
def test_a_hook_that_gives_back_what_it_must_not_is_caught_at_the_border(
    tmp_path: Path, what: str
) -> None:
    sound, broken, words = BROKEN[what]
    assert sound in TOY
    path = install(tmp_path / "plugins", "bitpress-scheme-toy", TOY.replace(sound, broken), ENTRY)
    line = refusal(
        "compress", write_model(tmp_path / "model"), tmp_path / "out", "--scheme", "toy", path=path
    )
    assert "scheme toy (bitpress-scheme-toy 1.0)" in line
    assert words in line
    assert not (tmp_path / "out").exists() or files_of(tmp_path / "out") == {}


def test_a_hook_that_goes_wrong_on_real_numbers_only_is_caught_too(tmp_path: Path) -> None:
    late = GIVEN.replace("codes * scale,", "(codes * scale)[:, int(codes.any()):],")
    path = install(tmp_path / "plugins", "bitpress-scheme-toy", TOY.replace(GIVEN, late), ENTRY)
    line = refusal(
        "compress", write_model(tmp_path / "model"), tmp_path / "out", "--scheme", "toy", path=path
    )
    assert "quantize made a weight of" in line
    assert files_of(tmp_path / "out") == {}


@pytest.mark.parametrize(
    "wrong",
    [f"{RESTORED[:-1]}][1:]", f"return ({RESTORED[7:]}).T", "return [1.0]"],
    ids=["a row less", "turned", "no tensor"],
)
def test_a_restore_of_another_shape_is_a_fault_of_every_layer(tmp_path: Path, wrong: str) -> None:
    path = install(tmp_path / "plugins", "bitpress-scheme-toy", TOY.replace(RESTORED, wrong), ENTRY)
    completed = command(
        "compress", write_model(tmp_path / "model"), tmp_path / "out", "--scheme", "toy", path=path
    )
    assert completed.returncode == 1
    assert "scheme toy (bitpress-scheme-toy 1.0)" in completed.stderr
    assert "dequantize" in completed.stderr
    assert "Traceback" not in completed.stderr


CALIBRATED = {
    "inputs rounded to another shape": (
        "return (inputs / step).round() * step",
        "return inputs[1:]",
        "quantize_activations returned the shape",
        ["--set", "coarse=0.5"],
    ),
    "factors that are not positive": (
        "return factors.repeat",
        "return -factors.repeat",
        "rescale returned factors",
        ["--set", "factors=2"],
    ),
    "too few factors": (
        "[:width]",
        "[:3]",
        "rescale returned factors of shape [3]",
        ["--set", "factors=2"],
    ),
    "sums that grow with the batch": (
        '"seen": inputs.float().sum(0)',
        '"seen": inputs.sum(0), "all": inputs.sum(1)',
        "statistics 'all' of two batches",
        [],
    ),
}


@pytest.mark.parametrize("what", CALIBRATED)
def test_a_calibrated_hook_that_breaks_its_contract_is_caught_at_the_border(
    tmp_path: Path, what: str
) -> None:
    sound, broken, words, arguments = CALIBRATED[what]
    assert sound in LEARNER
    entry = "[bitpress.schemes]\nlearner = bitpress_scheme_learner\n"
    path = install(
        tmp_path / "plugins", "bitpress-scheme-learner", LEARNER.replace(sound, broken), entry
    )
    model = runnable_model(tmp_path / "model")
    words_ = [
        "--scheme",
        "learner",
        "--samples",
        110,
        "--sequence-length",
        60,
        "--calibration",
        tmp_path / "text.txt",
        *arguments,
    ]
    line = refusal("compress", model, tmp_path / "out", *words_, path=path)
    assert words in line
    assert not (tmp_path / "out/config.json").exists()


# --- others' work is kept, whatever fails
# ----------------------------------------------------------------------

THIRD = "model-00003-of-00004.safetensors"


def test_what_was_finished_before_a_plugin_failed_is_kept_and_not_made_again(
    tmp_path: Path,
) -> None:
    failing = TOY.replace(
        "    scale = layer",
        "    if layer.name.endswith('1.mlp.down_proj') and mended(): raise ValueError('no')\n    "
        "scale = layer",
    )
    failing += (
        "\nimport pathlib\ndef mended(): return not "
        "pathlib.Path(__file__).with_name('mended').exists()\n"
    )
    path = install(tmp_path / "plugins", "bitpress-scheme-toy", failing, ENTRY)
    model, out = write_model(tmp_path / "model", shards=4), tmp_path / "out"
    words = ["compress", model, out, "--scheme", "toy"]
    assert "scheme toy (bitpress-scheme-toy 1.0) failed in quantize: ValueError: no" in refusal(
        *words, path=path
    )
    times = {file: file.stat().st_mtime_ns for file in out.glob("*.safetensors")}
    assert times
    (path / "mended").touch()
    assert command(*words, path=path).returncode == 0
    assert {file: file.stat().st_mtime_ns for file in times} == times


FULL = """
import errno, os, sys, bitpress.cli
write, left = os.pwrite, [int(sys.argv.pop(1))]
def full(descriptor, data, at):
    left[0] -= 1
    if left[0] < 0:
        raise OSError(errno.ENOSPC, "No space left on device")
    return write(descriptor, data, at)
os.pwrite = full
bitpress.cli.main()
"""


@pytest.mark.parametrize("writes", [0, 12, 30])
def test_a_disk_that_is_full_in_the_middle_of_a_shard_is_told_and_the_run_goes_on_with_room(
    tmp_path: Path, toy: Path, writes: int
) -> None:
    model, out = write_model(tmp_path / "model", shards=4), tmp_path / "out"
    assert (
        command("compress", model, tmp_path / "whole", "--scheme", "toy", path=toy).returncode == 0
    )
    arguments = [
        sys.executable,
        "-c",
        FULL,
        writes,
        "compress",
        model,
        out,
        "--scheme",
        "toy",
        "--threads",
        1,
    ]
    with patch.dict("os.environ", {"PYTHONPATH": ":".join([str(toy), *sys.path])}):
        completed = subprocess.run(
            list(map(str, arguments)), capture_output=True, check=False, text=True
        )
    assert completed.returncode == 2
    assert "the disk is full; make room and run the same command again" in completed.stderr
    assert len(completed.stderr.splitlines()) == 1
    left = files_of(out)
    assert not [name for name in left if name.endswith(".part") or name == "config.json"]
    assert command("compress", model, out, "--scheme", "toy", path=toy).returncode == 0
    assert files_of(out) == files_of(tmp_path / "whole")


def test_an_output_that_cannot_be_written_is_told_before_work_starts(tmp_path: Path) -> None:
    out = tmp_path / "locked"
    out.mkdir()
    mounted = False
    # whom no permission stops
    if os.geteuid() == 0:
        mounted = not subprocess.run(
            ["mount", "-t", "tmpfs", "-o", "ro", "none", out], capture_output=True, check=False
        ).returncode
        if not mounted:
            pytest.skip("root can write everywhere, and no read-only disk can be made here")
    else:
        out.chmod(0o555)
    model = write_model(tmp_path / "model")
    try:
        for location in (out, out / "below"):
            line = refusal(
                "compress", model, location, "--scheme", "toy", path=install_toy(tmp_path / "p")
            )
            assert str(location) in line
            assert "permission" in line or "Read-only" in line
    finally:
        if mounted:
            subprocess.run(["umount", out], check=True)
