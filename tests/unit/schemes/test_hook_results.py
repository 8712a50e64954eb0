"""Whatever fails during a run, plugin or disk, is named; nothing wrong reaches a file, and finished
shards are kept.
"""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest
from fixtures.forked import ForkedCommand
from fixtures.learner_scheme import LEARNER, runnable_model
from fixtures.toy_scheme import TOY, install_toy

from bitpress.conformance.commands import command, install, refusal
from bitpress.conformance.models import files_of, write_model

ENTRY = "[bitpress.schemes]\ntoy = bitpress_scheme_toy\n"
RETURN_LAYER = (
    'return attrs.evolve(layer, weight=codes * scale, codes=codes.char(), qparams={"scale": scale})'
)
RETURN_STORED = next(line.strip() for line in TOY.splitlines() if "return StoredLayer(" in line)
RETURN_WEIGHT = 'return tensors["weight"].float() * tensors["weight_scale"]'
SERIALIZE = "@hookimpl\ndef serialize"


def toy_with(text: str, replacement: str) -> str:
    """The source of the toy scheme, with a text of it replaced."""
    assert text in TOY
    return TOY.replace(text, replacement)


def quantize_with(text: str, replacement: str) -> str:
    """The source of the toy scheme, with a text of what `quantize` returns replaced."""
    assert text in RETURN_LAYER
    return toy_with(RETURN_LAYER, RETURN_LAYER.replace(text, replacement))


def toy_and(hook: str) -> str:
    """The source of the toy scheme, with one hook more."""
    return toy_with(SERIALIZE, f"@hookimpl\n{hook}\n{SERIALIZE}")


# what is wrong: (the scheme's source, part of the message)
BROKEN = {
    "quantize raises": (
        toy_with(RETURN_LAYER, "raise KeyError('moon')"),
        "failed in quantize: KeyError: 'moon'",
    ),
    "quantize raises with a message of several lines": (
        toy_with(RETURN_LAYER, "raise KeyError('moon\\nand stars')"),
        "failed in quantize: KeyError",
    ),
    "quantize ends the process": (
        toy_with(RETURN_LAYER, "raise SystemExit(0)"),
        "failed in quantize: SystemExit: 0",
    ),
    "quantize returns no layer": (
        toy_with(RETURN_LAYER, "return {'weight': codes}"),
        "quantize returned dict, not a Layer",
    ),
    "quantize transposes the weight": (
        quantize_with("codes * scale,", "(codes * scale).T,"),
        "quantize made a weight of [",
    ),
    "quantize drops a column": (
        quantize_with("codes * scale,", "(codes * scale)[:, 1:],"),
        "quantize made a weight of",
    ),
    "quantize returns a float16 weight": (
        quantize_with("codes * scale,", "(codes * scale).half(),"),
        "torch.float16",
    ),
    "quantize returns a list": (
        quantize_with("codes * scale,", "[1],"),
        "quantize made weight a list, not a tensor",
    ),
    "quantize drops a row of codes": (
        quantize_with("codes.char()", "codes.char()[1:]"),
        "quantize made codes of shape",
    ),
    "quantize returns too many scales": (
        quantize_with("{", "{'x': scale.repeat(2, 1), "),
        "quantize made x of shape",
    ),
    "quantize returns a scale that is no tensor": (
        quantize_with("{", "{'x': 1.0, "),
        "quantize made x a float",
    ),
    "pack drops a row": (
        toy_and("def pack(layer): return attrs.evolve(layer, codes=layer.codes[1:])"),
        "pack made codes of shape",
    ),
    "serialize returns no StoredLayer": (
        toy_with("return StoredLayer(tensors", "return dict(tensors"),
        "serialize",
    ),
    "serialize stores a number": (
        toy_with("layer.codes, ", "3, "),
        "serialize made weight a int, not a tensor",
    ),
    "serialize stores nothing": (
        toy_with(RETURN_STORED, "return StoredLayer({}, None)"),
        "serialize returned no tensors by name",
    ),
    "serialize's config is not JSON": (
        toy_with(RETURN_STORED, RETURN_STORED.replace("weights}", "{1, 2}}")),
        "a config that is not JSON",
    ),
    "observe returns a number": (
        toy_and("def observe(weight): return {'size': 3}"),
        "observe returned dict, not Statistics by name",
    ),
    "observe claims rows that are not there": (
        toy_and("def observe(weight): return {'s': bitpress.Statistic(weight.sum(), 'sum', True)}"),
        "observe made s of shape [] for",
    ),
    "validate_hardware returns a text": (
        toy_with('[Finding("supported", "runs anywhere")]', '["fine"]'),
        "validate_hardware returned",
    ),
}


def refuse_to_compress(tmp_path: Path, module: str) -> str:
    """The message with which a run by a toy scheme of that source ends; it leaves no file."""
    path = install(tmp_path / "plugins", "bitpress-scheme-toy", module, ENTRY)
    model, out = write_model(tmp_path / "model"), tmp_path / "out"
    line = refusal("compress", model, out, "--scheme", "toy", path=path)
    assert not out.exists() or files_of(out) == {}
    return line


@pytest.mark.parametrize("fault", BROKEN)
def test_a_hook_that_gives_back_what_it_must_not_is_caught_at_the_border(
    tmp_path: Path, fault: str
) -> None:
    module, message = BROKEN[fault]
    line = refuse_to_compress(tmp_path, module)
    assert "scheme toy (bitpress-scheme-toy 1.0)" in line
    assert message in line


def test_a_hook_that_goes_wrong_on_real_numbers_only_is_caught_too(tmp_path: Path) -> None:
    module = quantize_with("codes * scale,", "(codes * scale)[:, int(codes.any()):],")
    assert "quantize made a weight of" in refuse_to_compress(tmp_path, module)


def test_stored_tensors_that_were_not_planned_are_refused(tmp_path: Path) -> None:
    codes = "layer.codes.short() if layer.codes.any() else layer.codes"
    line = refuse_to_compress(tmp_path, toy_with('{"weight": layer.codes', f'{{"weight": {codes}'))
    for words in ("layer model.layers.0", "I16", "planned was", "I8"):
        assert words in line


def test_a_scheme_that_cannot_store_a_layer_is_refused(tmp_path: Path) -> None:
    line = refuse_to_compress(tmp_path, toy_with(SERIALIZE, "def serialize"))
    assert "none of the schemes toy has a `serialize` hook" in line


@pytest.mark.parametrize(
    "return_weight",
    [f"{RETURN_WEIGHT[:-1]}][1:]", f"return ({RETURN_WEIGHT[7:]}).T", "return [1.0]"],
    ids=["a row less", "transposed", "no tensor"],
)
def test_a_restore_of_another_shape_is_refused_before_it_is_written(
    tmp_path: Path, return_weight: str
) -> None:
    line = refuse_to_compress(tmp_path, toy_with(RETURN_WEIGHT, return_weight))
    assert "scheme toy (bitpress-scheme-toy 1.0)" in line
    assert "dequantize" in line
    assert not list((tmp_path / "out").glob("*.safetensors"))


# what is wrong: (a text of the scheme's source, its replacement, part of the message, options)
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
    "weights that decode to others": (
        'tensors["weight"].float() * tensors["weight_scale"]',
        'tensors["weight"].float() * tensors["weight_scale"] * 1.001',
        "what it stores does not decode to the weight that `quantize` returned",
        [],
    ),
    "sums that grow with the batch": (
        '"seen": inputs.float().sum(0)',
        '"seen": inputs.sum(0), "all": inputs.sum(1)',
        "statistics 'all' of two batches",
        [],
    ),
}


@pytest.mark.parametrize("fault", CALIBRATED)
def test_a_calibrated_hook_that_breaks_its_contract_is_caught_at_the_border(
    tmp_path: Path, fault: str
) -> None:
    text, replacement, message, options = CALIBRATED[fault]
    assert text in LEARNER
    entry = "[bitpress.schemes]\nlearner = bitpress_scheme_learner\n"
    module = LEARNER.replace(text, replacement)
    path = install(tmp_path / "plugins", "bitpress-scheme-learner", module, entry)
    model, out = runnable_model(tmp_path / "model"), tmp_path / "out"
    options = ["--scheme", "learner", "--samples", 110, "--sequence-length", 60, *options]
    options += ["--calibration", tmp_path / "text.txt"]
    assert message in refusal("compress", model, out, *options, path=path)
    assert not (out / "config.json").exists()


def test_what_was_finished_before_a_plugin_failed_is_kept_and_not_made_again(
    tmp_path: Path,
) -> None:
    failing = TOY.replace(
        "    scale = layer",
        "    if layer.name.endswith('1.mlp.down_proj') and is_broken(): raise ValueError('no')\n"
        "    scale = layer",
    )
    failing += (
        "\nimport pathlib\n"
        "def is_broken(): return not pathlib.Path(__file__).with_name('mended').exists()\n"
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
import errno, os, sys
write, writes_left = os.pwrite, [int(sys.argv.pop(1))]
def full(descriptor, data, at):
    writes_left[0] -= 1
    if writes_left[0] < 0:
        raise OSError(errno.ENOSPC, "No space left on device")
    return write(descriptor, data, at)
os.pwrite = full
"""


@pytest.mark.parametrize("writes", [0, 12, 30])
def test_a_disk_that_is_full_in_the_middle_of_a_shard_is_told_and_the_run_goes_on_with_room(
    tmp_path: Path, toy: Path, writes: int
) -> None:
    model, out = write_model(tmp_path / "model", shards=4), tmp_path / "out"
    assert (
        command("compress", model, tmp_path / "whole", "--scheme", "toy", path=toy).returncode == 0
    )
    arguments = ["compress", model, out, "--scheme", "toy", "--threads", 1]
    running = ForkedCommand(writes, *arguments, path=toy, setup=FULL)
    _, stderr = running.communicate(timeout=120)
    assert running.returncode == 2
    assert "the disk is full; make room and run the same command again" in stderr
    assert len(stderr.splitlines()) == 1
    assert not [name for name in files_of(out) if name.endswith(".part") or name == "config.json"]
    assert command("compress", model, out, "--scheme", "toy", path=toy).returncode == 0
    assert files_of(out) == files_of(tmp_path / "whole")


def test_an_output_that_cannot_be_written_is_told_before_work_starts(tmp_path: Path) -> None:
    out = tmp_path / "locked"
    out.mkdir()
    mounted = False
    # no permission stops root
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
