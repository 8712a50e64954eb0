"""An output is opened again and proved: every damage is found and named with exit code 1, and a
sound one is passed.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from fixtures.signed_manifest import change_tensors, forge, sign
from fixtures.toy_scheme import TOY, install_toy
from hypothesis import HealthCheck, given, settings, strategies as st
from safetensors.torch import save_file

import bitpress
from bitpress.conformance.commands import command, install, plugins, refusal
from bitpress.conformance.models import files_of, llama_tensors, write_model

LAYER = "model.layers.1.mlp.up_proj"
NORM = "model.layers.0.input_layernorm.weight"
FILE = "model.safetensors"
INDEX = "model.safetensors.index.json"


@pytest.fixture(scope="module")
def outputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `plugins`, `model`, its output `out`, and `sharded`, the output of the same in
    two shards.
    """
    folder = tmp_path_factory.mktemp("made")
    tensors = {**llama_tensors(), LAYER + ".bias": torch.ones(256).bfloat16()}
    with plugins(install_toy(folder / "plugins")):
        bitpress.compress(
            write_model(folder / "model", tensors),
            folder / "out",
            scheme="toy",
            ignore=["*.o_proj"],
        )
        bitpress.compress(
            write_model(folder / "m2", tensors, shards=2),
            folder / "sharded",
            scheme="toy",
            ignore=["*.o_proj"],
        )
    return folder


@pytest.fixture
def with_plugins(outputs: Path) -> Iterator[None]:
    """The scheme of the outputs is found by this process."""
    with plugins(outputs / "plugins"):
        yield


def copy(outputs: Path, name: str, to: Path) -> Path:
    """A copy of an output, to be damaged."""
    for file, data in files_of(outputs / name).items():
        (to / file).parent.mkdir(parents=True, exist_ok=True)
        (to / file).write_bytes(data)
    return to


def tensors(change: Callable[[dict[str, torch.Tensor]], Any]) -> Callable[[Path], None]:
    """A damage to the tensors of the output's one file."""

    def damage(out: Path) -> None:
        change_tensors(out / FILE, change)

    return damage


def table(name: str, change: Callable[[dict[str, Any]], Any]) -> Callable[[Path], None]:
    """A damage to a JSON file."""

    def damage(out: Path) -> None:
        value = json.loads((out / name).read_text())
        change(value)
        (out / name).write_text(json.dumps(value))

    return damage


def scale(value: float) -> Callable[[Path], None]:
    return tensors(lambda stored: stored[f"{LAYER}.weight_scale"][7].fill_(value))


def quantized(change: Callable[[dict[str, Any]], Any]) -> Callable[[Path], None]:
    return table("config.json", lambda config: change(config["quantization_config"]))


def flip_a_code(stored: dict[str, torch.Tensor]) -> None:
    stored[f"{LAYER}.weight"][200, 100] ^= 2


def swap_two_rows(stored: dict[str, torch.Tensor]) -> None:
    for suffix in ("weight", "weight_scale"):
        stored[f"{LAYER}.{suffix}"][[3, 4]] = stored[f"{LAYER}.{suffix}"][[4, 3]]


def cut_a_row(stored: dict[str, torch.Tensor]) -> None:
    stored[f"{LAYER}.weight"] = stored[f"{LAYER}.weight"][:-1].clone()


def widen_a_scale(stored: dict[str, torch.Tensor]) -> None:
    stored[f"{LAYER}.weight_scale"] = stored[f"{LAYER}.weight_scale"].double()


FAR, SCALE = "further from the source's than rounding can move it", "zero, infinite or NaN"
CONFIG = "config.json: its quantization_config does not describe what is stored"
# damages whose digests are mended: found by looking at what is stored. (damage, what is named)
FORGED = {
    "a code is off by two": (tensors(flip_a_code), [LAYER, FAR]),
    "two rows are swapped": (tensors(swap_two_rows), [LAYER, FAR]),
    "a scale is doubled": (tensors(lambda t: t[f"{LAYER}.weight_scale"][7].mul_(2)), [LAYER, FAR]),
    "a scale is zero": (scale(0), [LAYER, "weight_scale", SCALE]),
    "a scale is NaN": (scale(torch.nan), [LAYER, "weight_scale", SCALE]),
    "a scale is infinite": (scale(torch.inf), [LAYER, "weight_scale", SCALE]),
    "a scale is negative": (scale(-1), [LAYER, "weight_scale", "scale"]),
    "the codes are gone": (
        tensors(lambda t: t.pop(f"{LAYER}.weight")),
        [f"{LAYER}.weight is missing"],
    ),
    "the scale is gone": (
        tensors(lambda t: t.pop(f"{LAYER}.weight_scale")),
        [f"{LAYER}.weight_scale is missing"],
    ),
    "a row is missing": (
        tensors(cut_a_row),
        [f"{LAYER}.weight is I8 [255, 128], planned was I8 [256, 128]"],
    ),
    "a scale has another dtype": (
        tensors(widen_a_scale),
        [f"{LAYER}.weight_scale is F64 [256, 1], planned was F32"],
    ),
    "a zero point was added": (
        tensors(lambda t: t.update({f"{LAYER}.weight_zero_point": torch.ones(1)})),
        ["not planned"],
    ),
    "a stranger was added": (
        tensors(lambda t: t.update(stranger=torch.ones(1))),
        ["stranger", "not planned"],
    ),
    "a copied tensor differs": (
        tensors(lambda t: t[NORM][5].add_(1)),
        [NORM, "differs from the source's"],
    ),
    "a copied tensor has another dtype": (
        tensors(lambda t: t.update({NORM: t[NORM].float()})),
        [NORM, "differs"],
    ),
    "a copied tensor is gone": (
        tensors(lambda t: t.pop(NORM)),
        [NORM, "the source's tensor is missing"],
    ),
    "a layer that was left alone differs": (
        tensors(lambda t: t["model.layers.0.self_attn.o_proj.weight"][0].zero_()),
        ["o_proj.weight", "differs"],
    ),
    "the bias of a layer differs": (
        tensors(lambda t: t[f"{LAYER}.bias"].zero_()),
        [f"{LAYER}.bias", "differs"],
    ),
    "the bias of a layer is gone": (
        tensors(lambda t: t.pop(f"{LAYER}.bias")),
        [f"{LAYER}.bias", "missing"],
    ),
    "the config says other bits": (
        quantized(lambda q: q["config_groups"]["group_0"]["weights"].update(num_bits=4)),
        [CONFIG],
    ),
    "the config ignores too little": (
        quantized(lambda q: q["ignore"].pop()),
        ["it is stored as it was, and", "takes it for quantized"],
    ),
    "the config ignores a compressed layer": (
        quantized(lambda q: q["ignore"].append(LAYER)),
        [f"{LAYER}: it is compressed, and none of the config's groups"],
    ),
    "the config ignores what is not there": (
        quantized(lambda q: q["ignore"].append("model.layers.9.mlp.up_proj")),
        ["it ignores model.layers.9.mlp.up_proj, which is not there"],
    ),
    "the config has no status": (quantized(lambda q: q.pop("quantization_status")), [CONFIG]),
    "the config says nothing": (
        table("config.json", lambda c: c.pop("quantization_config")),
        [CONFIG],
    ),
    "the config is gone": (lambda out: (out / "config.json").unlink(), ["config.json"]),
    "the config is no JSON": (
        lambda out: (out / "config.json").write_text("{"),
        ["config.json", "not valid JSON"],
    ),
    "the weights are gone": (lambda out: (out / FILE).unlink(), ["safetensors"]),
    "the weights are cut short": (lambda out: os.truncate(out / FILE, 9000), [FILE, "cut short"]),
}


# what is added, removed or changed beside the weights, and what is named
BESIDE: dict[str, tuple[Callable[[Path], Any], list[str]]] = {
    "a chat template is added": (
        lambda out: (out / "chat_template.jinja").write_text("{{ 1 }}"),
        ["chat_template.jinja", "not written by the run"],
    ),
    "code is added": (
        lambda out: (out / "modeling_x.py").write_text("import os"),
        ["modeling_x.py", "not written by the run"],
    ),
    "a pickle is added": (
        lambda out: (out / "pytorch_model.bin").write_bytes(b"x"),
        ["pytorch_model.bin", "not written by the run"],
    ),
    "weights are added in a subfolder": (
        lambda out: [(out / "more").mkdir(), (out / "more/model.safetensors").write_bytes(b"x")],
        ["more/model.safetensors", "not written by the run"],
    ),
    "a folder is linked": (
        lambda out: (out / "more").symlink_to(out.parent),
        ["more", "not written by the run"],
    ),
    "the tokenizer differs": (
        lambda out: (out / "tokenizer_config.json").write_text("{}"),
        ["tokenizer_config.json", "not the source's"],
    ),
    "the tokenizer is gone": (
        lambda out: (out / "tokenizer_config.json").unlink(),
        ["tokenizer_config.json", "missing"],
    ),
    "the config has another rope_theta": (
        table("config.json", lambda config: config.update(rope_theta=1.0)),
        ["config.json", "its rope_theta is not the source's"],
    ),
    "the config names code": (
        table("config.json", lambda config: config.update(auto_map={"AutoModel": "x.Y"})),
        ["config.json", "its auto_map is not the source's"],
    ),
    "the config lacks a key": (
        table("config.json", lambda config: config.pop("rms_norm_eps")),
        ["config.json", "its rms_norm_eps is not the source's"],
    ),
}


def found_at_fault(outputs: Path, out: Path, *arguments: object) -> str:
    """What `verify` says: exit code 1, the faults and a last line with their number on standard
    error.
    """
    done = command("verify", out, *arguments, path=outputs / "plugins")
    assert done.returncode == 1, (done.stdout, done.stderr)
    assert done.stdout == ""
    assert done.stderr.splitlines()[-1].startswith(f"bitpress: {out}: ")
    return done.stderr


def require_found(
    outputs: Path, out: Path, damage: Callable[[Path], Any], words: list[str]
) -> None:
    """A damage whose digests are made again is found against the source, and is named."""
    copy(outputs, "out", out)
    damage(out)
    forge(out)
    messages = found_at_fault(outputs, out, "--against", outputs / "model")
    for word in words:
        assert word in messages


@pytest.mark.parametrize("what", FORGED)
def test_a_damage_is_found_in_what_is_stored_even_where_the_digests_agree(
    outputs: Path, tmp_path: Path, what: str
) -> None:
    require_found(outputs, tmp_path / "out", *FORGED[what])


@pytest.mark.parametrize("what", BESIDE)
def test_what_was_changed_beside_the_weights_is_found_even_where_the_digests_agree(
    outputs: Path, tmp_path: Path, what: str
) -> None:
    require_found(outputs, tmp_path / "out", *BESIDE[what])


@pytest.mark.parametrize("name", [".gitattributes", ".cache/x", "model.sig"])
def test_what_no_loader_reads_may_lie_beside_an_output(
    outputs: Path, with_plugins: None, tmp_path: Path, name: str
) -> None:
    out = copy(outputs, "out", tmp_path / "out")
    (out / name).parent.mkdir(exist_ok=True)
    (out / name).write_text("x")
    assert not bitpress.verify(out, against=outputs / "model").faults


def zero_a_byte(out: Path) -> None:
    data = bytearray((out / FILE).read_bytes())
    data[-1] ^= 1
    (out / FILE).write_bytes(data)


# damages of files, found without the source: (which output, damage, what is named)
CHANGED = {
    "a bit of a weight": ("out", zero_a_byte, [FILE, "SHA-256 differs"]),
    "a scale": ("out", scale(1), [FILE]),
    "a key of the config that says nothing of weights": (
        "out",
        table("config.json", lambda c: c.update(rope_theta=1.0)),
        ["config.json"],
    ),
    "another file": (
        "out",
        lambda out: (out / "tokenizer_config.json").write_text('{"made": "UP"}'),
        ["tokenizer_config.json"],
    ),
    "another file is gone": (
        "out",
        lambda out: (out / "tokenizer_config.json").unlink(),
        ["tokenizer_config.json", "missing"],
    ),
    "weights were added": (
        "out",
        lambda out: save_file({"x": torch.ones(1)}, out / "adapter.safetensors"),
        ["adapter.safetensors", "not written"],
    ),
    "a shard is gone": (
        "sharded",
        lambda out: (out / "model-00002-of-00002.safetensors").unlink(),
        ["model-00002", "missing"],
    ),
    "shards changed places": (
        "sharded",
        lambda out: (out / "model-00002-of-00002.safetensors").rename(
            out / "model-00001-of-00002.safetensors"
        ),
        ["model-00001-of-00002.safetensors", "missing"],
    ),
    "the index is gone": ("sharded", lambda out: (out / INDEX).unlink(), [INDEX, "missing"]),
    "the index points elsewhere": (
        "sharded",
        table(INDEX, lambda i: i["weight_map"].update({NORM: "model-00009-of-00002.safetensors"})),
        [INDEX],
    ),
    "the index forgets a tensor": (
        "sharded",
        table(INDEX, lambda i: i["weight_map"].pop(NORM)),
        [NORM, "not in"],
    ),
}


@pytest.mark.parametrize("what", CHANGED)
def test_a_changed_file_is_found_without_the_source(
    outputs: Path, tmp_path: Path, what: str
) -> None:
    name, damage, words = CHANGED[what]
    out = copy(outputs, name, tmp_path / "out")
    damage(out)
    messages = found_at_fault(outputs, out)
    for word in words:
        assert word in messages


@pytest.mark.parametrize("name", ["out", "sharded"])
@settings(
    deadline=None, max_examples=200, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(data=st.data())
def test_a_change_of_any_byte_of_any_file_is_found(
    outputs: Path, with_plugins: None, tmp_path: Path, name: str, data: st.DataObject
) -> None:
    out = tmp_path / "out"
    if not out.exists():
        copy(outputs, name, out)
    file = out / data.draw(st.sampled_from(sorted(files_of(out))), label="file")
    content = file.read_bytes()
    location = data.draw(
        st.integers(0, len(content) - 1) | st.integers(0, min(len(content), 4000) - 1), label="byte"
    )
    changed = bytearray(content)
    changed[location] ^= data.draw(st.integers(1, 255), label="bits")
    file.write_bytes(changed)
    try:
        report = bitpress.verify(out, threads=1)
    finally:
        file.write_bytes(content)
    assert any(str(fault).startswith(file.name) for fault in report.faults), report.faults


def test_a_damaged_manifest_is_a_fault_and_no_bad_input(outputs: Path, tmp_path: Path) -> None:
    for number, damage in enumerate(
        (
            lambda text: text[:-40],
            lambda text: text.replace("BF16", "bf16"),
            lambda text: "{}",
            lambda text: "",
        )
    ):
        out = copy(outputs, "out", tmp_path / str(number))
        (out / "bitpress.json").write_text(damage((out / "bitpress.json").read_text()))
        assert "bitpress.json: its bytes are not those that were written" in found_at_fault(
            outputs, out
        )


@pytest.mark.parametrize("name", ["out", "sharded"])
@pytest.mark.parametrize("source", ["model", "m2", None])
def test_a_sound_output_is_passed(outputs: Path, name: str, source: str | None) -> None:
    against = [] if source is None else ["--against", outputs / source]
    done = command("verify", outputs / name, *against, path=outputs / "plugins")
    assert (done.returncode, done.stderr) == (0, "")
    compared = "12 layers compared" if source else "weights not compared"
    assert compared in done.stdout


def test_every_step_is_asked_whether_its_promise_is_kept(outputs: Path, tmp_path: Path) -> None:
    check = (
        "@hookimpl\ndef validate_weight(weight, options):\n"
        "    return 'too large' if weight.abs().amax() > 0.1 * options.levels else None\n"
    )
    strict = install(
        tmp_path / "p",
        "bitpress-scheme-toy",
        TOY + check,
        "[bitpress.schemes]\ntoy = bitpress_scheme_toy\n",
    )
    out = copy(outputs, "out", tmp_path / "out")
    assert command("verify", out, path=strict).returncode == 0
    tensors(lambda t: t[f"{LAYER}.weight_scale"][7].mul_(1000))(out)
    forge(out)
    done = command("verify", out, path=strict)
    assert done.returncode == 1
    assert f"{LAYER}: toy: too large" in done.stderr


def test_a_bound_that_is_no_number_somewhere_hides_no_damage_elsewhere(
    outputs: Path, tmp_path: Path
) -> None:
    sound = 'return tensors["weight_scale"] * 0.501'
    assert TOY.count(sound) == 1
    # a tile's first row
    poor = (
        "\n    found = tensors['weight_scale'] * 0.501\n    found[0] = float('nan')\n    return "
        "found"
    )
    scheme = TOY.replace(sound, poor)
    plugin = install(
        tmp_path / "p",
        "bitpress-scheme-toy",
        scheme,
        "[bitpress.schemes]\ntoy = bitpress_scheme_toy\n",
    )
    out = copy(outputs, "out", tmp_path / "out")
    assert command("verify", out, "--against", outputs / "model", path=plugin).returncode == 0
    tensors(flip_a_code)(out)
    forge(out)
    done = command("verify", out, "--against", outputs / "model", path=plugin)
    assert done.returncode == 1
    assert f"{LAYER}: a stored weight is {FAR}" in done.stderr


def test_faults_are_told_as_json_too(outputs: Path, tmp_path: Path) -> None:
    out = copy(outputs, "out", tmp_path / "out")
    tensors(flip_a_code)(out)
    done = command(
        "verify", out, "--against", outputs / "model", "--json", path=outputs / "plugins"
    )
    assert done.returncode == 1
    document = json.loads(done.stdout)
    assert document["ok"] is False
    assert [fault.split(":")[0] for fault in document["faults"]] == [FILE, LAYER]


def test_what_was_written_without_proof_has_digests_all_the_same(
    outputs: Path, with_plugins: None, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    bitpress.compress(outputs / "model", out, scheme="toy", verify=False)
    assert not bitpress.verify(out).faults
    manifest = json.loads((out / "bitpress.json").read_text())
    assert manifest["files"][FILE]["sha256"] is None
    change_a_byte = bytearray((out / FILE).read_bytes())
    change_a_byte[-100] ^= 1
    (out / FILE).write_bytes(change_a_byte)
    assert [fault.subject for fault in bitpress.verify(out).faults] == [FILE]


def test_what_an_earlier_version_wrote_without_digests_is_said_to_have_none(
    outputs: Path, tmp_path: Path
) -> None:
    out = copy(outputs, "out", tmp_path / "out")

    def forget_digests(manifest: dict[str, Any]) -> None:
        manifest["files"][FILE] = {"bytes": manifest["files"][FILE]["bytes"]}

    forge(out, forget_digests)
    done = command("verify", out, "--json", path=outputs / "plugins")
    assert done.returncode == 0
    assert "no digests" in done.stderr
    assert "no digests" in json.loads(done.stdout)["remarks"][0]


def test_another_model_is_not_taken_for_the_source(outputs: Path, tmp_path: Path) -> None:
    other = write_model(tmp_path / "other", llama_tensors(seed=1))
    messages = found_at_fault(outputs, outputs / "out", "--against", other)
    assert messages.count(FAR) > 1
    assert "and 7 more" in messages
    # 12 layers, the bias, two layers left alone, embedding and head
    assert messages.endswith("17 faults\n")


def test_what_cannot_be_proved_at_all_is_bad_input(outputs: Path, tmp_path: Path) -> None:
    out = copy(outputs, "out", tmp_path / "out")
    assert "scheme 'toy'" in refusal("verify", out)
    manifest = json.loads((out / "bitpress.json").read_text())
    manifest["layers"][LAYER].pop("shape")
    sign(out, manifest)
    assert "bitpress.json" in refusal("verify", out, path=outputs / "plugins")
    (out / "bitpress.json").unlink()
    assert "was not written by bitpress" in refusal("verify", out, path=outputs / "plugins")
    assert "was not written by bitpress" in refusal(
        "verify", outputs / "model", path=outputs / "plugins"
    )
    assert "is not a folder" in refusal("verify", tmp_path / "nowhere", path=outputs / "plugins")


@pytest.mark.usefixtures("with_plugins")
@pytest.mark.parametrize("axis", ["columns", "rows"])
@pytest.mark.parametrize(("name", "subject"), [(NORM, NORM), (f"{LAYER}.weight", LAYER)])
def test_factors_that_do_not_fit_a_tensor_are_told_as_its_fault(
    outputs: Path, tmp_path: Path, axis: str, name: str, subject: str
) -> None:
    out = copy(outputs, "out", tmp_path / "out")
    forge(out, lambda manifest: manifest.update(rescaled={name: {axis: [0.5, 0.5]}}))
    (fault,) = bitpress.verify(out, outputs / "model", threads=1).faults
    assert fault.subject == subject
    assert f"bitpress.json rescales its {axis} by 2 exponents" in fault.text
