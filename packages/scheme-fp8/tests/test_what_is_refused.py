"""Shapes and options that engines cannot serve are refused when the plan is made, and the message's
way out works.
"""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from bitpress.conformance.commands import command, refusal
from bitpress.conformance.models import LLAMA, write_model
from bitpress.schemes.hardware import DEVICES, find_device
from bitpress.schemes.registry import discover

# down_proj is 192 wide; gate and up have 192 rows and are fused
NARROW = LLAMA | {"intermediate_size": 192}
# k and v have 64 rows and are fused with q
SLIM = LLAMA | {"num_key_value_heads": 2}


@pytest.mark.parametrize(
    ("config", "words"),
    [
        (
            NARROW,
            [
                "model.layers.0.mlp.down_proj",
                "width 192 is not a multiple of 128",
                "scheme fp8 takes any width",
            ],
        ),
        (
            SLIM,
            [
                "model.layers.0.self_attn.k_proj",
                "64 rows are not a multiple of 128",
                "q_proj, k_proj, v_proj",
            ],
        ),
    ],
    ids=["width", "fused rows"],
)
def test_blocks_that_do_not_fit_are_refused_naming_the_layer(
    tmp_path: Path, config: dict, words: list[str]
) -> None:
    line = refusal(
        "compress",
        write_model(tmp_path / "m", config=config),
        tmp_path / "o",
        "--scheme",
        "fp8-block",
    )
    assert all(word in line for word in words), line
    assert not (tmp_path / "o").exists()


def test_following_the_advice_of_each_refusal_leads_to_a_result(tmp_path: Path) -> None:
    model, ignore = write_model(tmp_path / "m", config=NARROW), []
    while (
        done := command("compress", model, tmp_path / "o", "--scheme", "fp8-block", *ignore)
    ).returncode == 2:
        advice = re.findall(r"--ignore '([^']+)'", done.stderr)
        assert not set(advice) & set(ignore), done.stderr
        ignore += [word for pattern in advice for word in ("--ignore", pattern)]
    assert done.returncode == 0, done.stderr
    assert ignore[1::2] == ["*.down_proj", "*.gate_proj", "*.up_proj"]


def test_narrow_and_odd_shapes_are_taken_per_channel(tmp_path: Path) -> None:
    done = command(
        "compress", write_model(tmp_path / "m", config=NARROW), tmp_path / "o", "--scheme", "fp8"
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("scheme", "setting", "words"),
    [
        ("fp8-block", "block=64,64", ["[64, 64]", "[128, 128]"]),
        ("fp8-block", "block=[128]", ["block", "list of 2"]),
        ("fp8", "weights=row", ["weights", "channel, tensor"]),
        ("fp8", "activations=fast", ["activations", "dynamic, static"]),
        ("fp8", "weight=tensor", ["no option 'weight'", "did you mean 'weights'"]),
    ],
)
def test_options_that_cannot_be_served_are_refused(
    tmp_path: Path, scheme: str, setting: str, words: list[str]
) -> None:
    line = refusal("plan", write_model(tmp_path / "m"), "--scheme", scheme, "--set", setting)
    assert all(word in line for word in words), line


@pytest.mark.parametrize(
    ("device", "options", "level"),
    [
        ("H100", {}, "recommended"),
        ("B200", {}, "recommended"),
        ("L40S", {}, "supported"),
        ("A100", {}, "degraded"),
        ("T4", {}, "degraded"),
        ("V100", {}, "unsupported"),
        ("MI300X", {}, "supported"),
        ("MI250X", {}, "unsupported"),
        ("CPU x86", {}, "supported"),
        ("CPU x86", {"weights": "tensor"}, "unsupported"),
        ("Google TPU", {}, "unsupported"),
    ],
)
def test_hardware_is_judged_by_what_its_engine_runs(device: str, options: dict, level: str) -> None:
    assert (
        discover()
        .get("fp8")
        .step(options)
        .call("validate_hardware", hardware=find_device(device))[0]
        .level
        == level
    )


def test_blocks_on_cpus_need_amx() -> None:
    levels = {
        d.name: discover().get("fp8-block").step().call("validate_hardware", hardware=d)[0].level
        for d in DEVICES
    }
    assert (levels["CPU x86"], levels["CPU x86 with AMX"]) == ("unsupported", "supported")


def test_a_named_device_is_answered_for_without_having_it() -> None:
    shown = command("schemes", "fp8", "--serve-on", "NVIDIA A100")
    assert shown.returncode == 0
    assert "degraded" in shown.stdout
    assert "NVIDIA A100" in shown.stdout
    assert "H100" not in shown.stdout
