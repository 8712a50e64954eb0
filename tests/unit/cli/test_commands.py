"""What commands print for people and for scripts, and how they end."""

from __future__ import annotations

import json
from importlib.metadata import version
from pathlib import Path

import pytest
from fixtures.learner_scheme import runnable_model

from bitpress.conformance.commands import bitpress, command, refusal
from bitpress.conformance.models import files_of, llama_tensors, write_model

LAYERS = [f"model.layers.{i}.{n}" for i in (0, 1) for n in ("mlp.down_proj", "self_attn.o_proj")]
STACKS = [
    f"model.layers.{i}.{n}"
    for i in (0, 1)
    for n in ("mlp.[gate_proj, up_proj]", "self_attn.[q_proj, k_proj, v_proj]")
]


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return write_model(tmp_path / "model")


def test_the_installed_command_is_the_module(toy: Path) -> None:
    done = bitpress("schemes", path=toy)
    assert done.returncode == 0
    assert done.stdout == command("schemes", path=toy).stdout


def test_the_version_is_the_package_s() -> None:
    assert command("--version").stdout.startswith(f"bitpress {version('bitpress-core')} ")


@pytest.mark.parametrize("words", [[], ["--help"], ["-h"]], ids=str)
def test_help_lists_the_commands(words: list[str]) -> None:
    done = command(*words)
    assert done.returncode == 0
    for name in (
        "schemes",
        "plan",
        "compress",
        "verify",
        "eval",
        "inspect",
        "report",
        "decompress",
        "new-scheme",
    ):
        assert f" {name} " in done.stdout


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["compres"], "No such command 'compres'"),
        (["plan"], "Missing argument 'MODEL'"),
        (["plan", "a", "b"], "unexpected extra argument"),
        (["verify", "--agianst", "x"], "No such option"),
        (["schemes", "--serve-on", "H1000"], "no known device 'H1000'; did you mean NVIDIA H100, "),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_bad_usage_is_one_line_with_exit_code_2(words: list[str], message: str) -> None:
    assert message in refusal(*words)


@pytest.mark.parametrize(
    ("words", "help_command"),
    [
        (["compres"], "(bitpress --help)"),
        (["compress"], "(bitpress compress --help)"),
        (["plan", "model", "--shceme", "x"], "(bitpress plan --help)"),
        (["plan", "model", "--scheme"], "(bitpress plan --help)"),
        (["eval", "a", "--text", "t", "--threads", "0"], "(bitpress eval --help)"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_bad_usage_of_a_command_names_its_help(words: list[str], help_command: str) -> None:
    assert refusal(*words).endswith(help_command)


def test_without_schemes_the_list_says_where_they_come_from() -> None:
    done = command("schemes")
    assert (done.returncode, done.stderr) == (0, "")
    assert (
        done.stdout == "no schemes are installed; each is a package of its own: pip install "
        "bitpress-scheme-NAME\n"
    )


def test_the_list_of_schemes_says_what_each_needs_and_where_it_serves(toy: Path) -> None:
    head, row = [
        line.split("  ")
        for line in command("schemes", path=toy).stdout.splitlines()
        if "toy" in line or "scheme" in line
    ]
    assert [cell.strip() for cell in head if cell.strip()] == [
        "scheme",
        "package",
        "bits",
        "data",
        "serves on",
        "what it does",
    ]
    assert [cell.strip() for cell in row if cell.strip()] == [
        "toy",
        "bitpress-scheme-toy 1.0",
        "8",
        "none",
        "NVIDIA 6.0+, AMD, Intel, Google, CPU",
        "Toy integers, for tests.",
    ]


def test_one_scheme_is_shown_with_its_options_and_a_named_device(toy: Path) -> None:
    shown = command("schemes", "toy", "--serve-on", "nvidia a100", path=toy).stdout
    for words in (
        "levels",
        "whole number",
        "127",
        "the largest code",
        "supported",
        "runs anywhere",
        "NVIDIA A100",
    ):
        assert words in shown
    assert "H100" not in shown


def test_the_schemes_as_json(toy: Path) -> None:
    document = json.loads(command("schemes", "--json", "--serve-on", "A100", path=toy).stdout)
    expected = {
        "name": "toy",
        "package": "bitpress-scheme-toy",
        "version": "1.0",
        "summary": "Toy integers, for tests.",
        "bits": 8,
        "data": False,
        "options": {
            "levels": {"values": "whole number", "default": 127, "help": "the largest code"},
            "multiple": {
                "values": "whole number",
                "default": 1,
                "help": "what the width must be a multiple of",
            },
        },
        "efforts": {},
        "hardware": [{"device": "NVIDIA A100", "level": "supported", "text": "runs anywhere"}],
    }
    assert document == {"schemes": [expected], "problems": []}
    assert (
        json.loads(command("schemes", "toy", "--json", "--serve-on", "A100", path=toy).stdout)
        == expected
    )


def test_a_plan_shows_stacks_sizes_and_memory_and_writes_nothing(toy: Path, model: Path) -> None:
    before = files_of(model), sorted(f.name for f in model.parent.iterdir())
    done = command("plan", model, "--scheme", "toy", "--ignore", "*.1.mlp.*", "--all", path=toy)
    assert (done.returncode, done.stderr) == (0, "")
    for stack in STACKS:
        assert (stack in done.stdout) == ("1.mlp" not in stack)
    assert "11 layers compressed, 10 tensors copied unchanged" in done.stdout
    assert "8.25" in done.stdout
    assert (files_of(model), sorted(f.name for f in model.parent.iterdir())) == before


def test_a_plan_as_json_names_every_layer_and_every_byte(toy: Path, model: Path) -> None:
    document = json.loads(
        command("plan", model, "--scheme", "toy", "--set", "levels=7", "--json", path=toy).stdout
    )
    assert len(document["layers"]) == 14
    assert {layer["stack"] for layer in document["layers"]} == {*LAYERS, *STACKS}
    assert document["layers"][0] == {
        "name": "model.layers.0.mlp.down_proj",
        "steps": [{"use": "toy", "levels": 7, "multiple": 1}],
        "stack": "model.layers.0.mlp.down_proj",
        "shape": [128, 256],
        "bits": 8.125,
        "reason": "the rule for '*'",
    }
    assert {"lm_head.weight", "model.embed_tokens.weight", "model.norm.weight"} <= set(
        document["copied"]
    )
    assert document["before"] == (model / "model.safetensors").stat().st_size
    assert document["after"] == sum(shard["bytes"] for shard in document["shards"])
    assert document["warnings"] == []
    assert document["hardware"] == [
        {"scheme": "toy", "level": "supported", "text": "runs anywhere"}
    ]


def test_compress_says_how_much_smaller_how_near_and_what_is_next(toy: Path, model: Path) -> None:
    done = command("compress", model, model.parent / "out", "--scheme", "toy", path=toy)
    assert (done.returncode, done.stderr) == (0, "")
    assert "0.71 MB -> 0.39 MB (1.80x smaller), 8.22 bits per weight" in done.stdout
    assert "verified: 14 layers read back and compared with the source" in done.stdout
    out = model.parent / "out"
    assert done.stdout.endswith(f"measure the loss: bitpress eval {out} --against {model}\n")
    # all layers are alike
    assert "fits the format badly" not in done.stdout
    assert "fit the format badly" not in done.stdout
    other = command(
        "compress", model, model.parent / "unproved", "--scheme", "toy", "--no-verify", path=toy
    )
    assert "not verified (--no-verify)" in other.stdout
    unproved = model.parent / "unproved"
    assert other.stdout.endswith(f"verify it: bitpress verify {unproved} --against {model}\n")


def test_compress_names_layers_that_fit_the_format_badly(toy: Path, tmp_path: Path) -> None:
    tensors = llama_tensors()
    # one channel of inputs is so much larger that all others lose their last bits
    tensors["model.layers.1.mlp.down_proj.weight"][:, 3] *= 50
    model = write_model(tmp_path / "outlier", tensors)
    done = command("compress", model, tmp_path / "out", "--scheme", "toy", path=toy)
    assert "1 layer fits the format badly" in done.stdout
    (row,) = (line for line in done.stdout.splitlines() if "down_proj" in line)
    assert row.split()[0] == "model.layers.1.mlp.down_proj"


def test_check_alone_takes_the_text_that_ships(toy: Path, tmp_path: Path) -> None:
    model, out = runnable_model(tmp_path / "model"), tmp_path / "out"
    done = command("compress", model, out, "--scheme", "toy", "--check", "--threads", 1, path=toy)
    assert done.returncode == 0, done.stderr
    assert "loss: KL divergence 0.0" in done.stdout
    assert "tokens of the check text that ships with bitpress, run as it" in done.stdout
    assert done.stdout.endswith(f"serve it: vllm serve {out}\n")
    assert "OUT --scheme toy --check\n" in (out / "README.md").read_text()
    line = refusal("compress", model, "--check", tmp_path / "x", "--scheme", "toy", path=toy)
    assert "'OUT'. --check takes the word after it: write it last, or before an option" in line
    # and so does eval
    words = ["eval", out, "--against", model, "--threads", 1]
    document = json.loads(command(*words, "--json", path=toy).stdout)
    check = json.loads((out / "bitpress.json").read_text())["check"]
    assert document["sha256"] == check["sha256"]
    assert document["kl"] == pytest.approx(check["kl"], rel=1e-4)


def test_inspect_shows_every_layer_with_bits_and_error(toy: Path, model: Path) -> None:
    out = model.parent / "out"
    command("compress", model, out, "--scheme", "toy", path=toy)
    # which needs no scheme
    done = command("inspect", out, "--all")
    assert done.returncode == 0
    assert done.stdout.startswith(
        f"from model, by bitpress {version('bitpress-core')} with bitpress-scheme-toy 1.0\n"
    )
    manifest = json.loads(command("inspect", out, "--json").stdout)
    assert manifest["bits"] == pytest.approx(8.225)
    for name, layer in manifest["layers"].items():
        (row,) = [line.split() for line in done.stdout.splitlines() if line.split()[:1] == [name]]
        assert row == [name, "toy", f"{layer['bits']:.2f}", f"{layer['error']:.5f}"]


def test_decompress_says_where_it_wrote(toy: Path, model: Path) -> None:
    out, dense = model.parent / "out", model.parent / "dense"
    command("compress", model, out, "--scheme", "toy", path=toy)
    done = command("decompress", out, dense, path=toy)
    assert (done.returncode, done.stdout, done.stderr) == (0, f"{dense}: written\n", "")
    assert "already holds a model" in refusal("decompress", out, dense, path=toy)


@pytest.mark.parametrize(
    ("finding", "warned"),
    [("recommended", False), ("supported", False), ("degraded", True), ("unsupported", True)],
)
def test_a_device_that_serves_badly_is_a_warning_and_no_refusal(
    toy: Path, model: Path, finding: str, warned: bool
) -> None:
    module = toy / "bitpress_scheme_toy.py"
    module.write_text(module.read_text().replace('"supported", "runs', f'"{finding}", "runs'))
    for words in (["plan", model], ["compress", model, model.parent / "out"]):
        done = command(*words, "--scheme", "toy", path=toy)
        assert done.returncode == 0
        line = f"warning: toy is {finding} on this machine's device: runs anywhere\n"
        assert done.stderr == (line if warned else "")


ABOUT = """
@hookimpl
def validate_hardware(hardware):
    good = hardware.capability and hardware.capability >= (9, 0)
    return [Finding("recommended" if good else "degraded", f"as {hardware.name} goes")]

@hookimpl
def validate_shape(shape, hardware):
    return [Finding("unsupported", f"too wide for {hardware.name}")] if shape[1] > 128 else []
"""


def test_a_plan_can_be_made_for_another_device(toy: Path, model: Path) -> None:
    module = toy / "bitpress_scheme_toy.py"
    module.write_text(module.read_text().rpartition("@hookimpl")[0] + ABOUT)
    done = command("plan", model, "--scheme", "toy", "--serve-on", "h100", path=toy)
    assert "device  NVIDIA H100: toy is recommended, as NVIDIA H100 goes\n" in done.stdout
    assert "down_proj (2 layers): unsupported: too wide for NVIDIA H100\n" in done.stderr
    assert "degraded" not in done.stderr
    done = command("plan", model, "--scheme", "toy", "--serve-on", "NVIDIA T4", "--json", path=toy)
    document = json.loads(done.stdout)
    assert document["device"] == "NVIDIA T4"
    assert document["hardware"] == [
        {"scheme": "toy", "level": "degraded", "text": "as NVIDIA T4 goes"}
    ]
    assert [remark["text"] for remark in document["serving"]] == ["too wide for NVIDIA T4"]
    done = command("plan", model, "--scheme", "toy", "--serve-on", "NVIDIA T4", path=toy)
    assert "warning: toy is degraded on NVIDIA T4: as NVIDIA T4 goes\n" in done.stderr
    assert "did you mean NVIDIA H100, " in refusal(
        "plan", model, "--scheme", "toy", "--serve-on", "H101", path=toy
    )


ALIASES = """
ALIASES = {"T7": {}, "toy_coarse": {"levels": 7}}
"""


@pytest.fixture
def toy_with_aliases(toy: Path) -> Path:
    module = toy / "bitpress_scheme_toy.py"
    module.write_text(module.read_text() + ALIASES)
    return toy


@pytest.mark.parametrize(
    ("name", "levels", "line"),
    [
        ("TOY", 127, "TOY: taken as toy with its defaults\n"),
        ("t7", 127, "t7: taken as toy with its defaults\n"),
        ("Toy-Coarse", 7, "Toy-Coarse: taken as toy with levels=7\n"),
    ],
)
def test_a_known_name_of_a_scheme_is_taken_and_a_line_says_for_what(
    toy_with_aliases: Path, model: Path, name: str, levels: int, line: str
) -> None:
    recipe = model.parent / "recipe.toml"
    recipe.write_text(f'[[layers]]\nmatch = "*"\nsteps = ["{name}"]\n')
    for words in (["--scheme", name], ["--recipe", recipe]):
        done = command("plan", model, *words, path=toy_with_aliases)
        assert (done.returncode, done.stderr) == (0, line)
        document = json.loads(
            command("plan", model, *words, "--json", path=toy_with_aliases).stdout
        )
        assert document["layers"][0]["steps"] == [{"use": "toy", "levels": levels, "multiple": 1}]


def test_a_setting_overrides_what_a_known_name_stands_for(
    toy_with_aliases: Path, model: Path
) -> None:
    for option in ("levels", "toy.levels", "TOY_COARSE.levels"):
        words = ["--scheme", "toy_coarse", "--set", f"{option}=9", "--json"]
        document = json.loads(command("plan", model, *words, path=toy_with_aliases).stdout)
        assert document["layers"][0]["steps"][0]["levels"] == 9


@pytest.mark.parametrize("aliases", ["ALIASES = ['x']", "ALIASES = {'x': {'level': 3}}"])
def test_a_scheme_with_broken_aliases_is_reported(toy: Path, aliases: str) -> None:
    module = toy / "bitpress_scheme_toy.py"
    module.write_text(f"{module.read_text()}\n{aliases}\n")
    assert "problem: toy of bitpress-scheme-toy" in command("schemes", path=toy).stderr


@pytest.mark.parametrize("name", ["toy4", "tay8"])
def test_another_format_is_no_misspelled_name(toy: Path, model: Path, name: str) -> None:
    assert "did you mean" not in refusal("plan", model, "--scheme", name, path=toy)


@pytest.mark.parametrize(
    "pattern", ["lm_head", "re:.*lm_head", "model.embed_tokens", "re:.*norm$", "*.input_layernorm"]
)
def test_a_layer_that_is_left_alone_in_any_case_may_be_ignored(
    toy: Path, model: Path, pattern: str
) -> None:
    shown = command("plan", model, "--scheme", "toy", path=toy).stdout
    done = command("plan", model, "--scheme", "toy", "--ignore", pattern, path=toy)
    assert (done.returncode, done.stdout, done.stderr) == (0, shown, "")


def test_a_pattern_of_llm_compressor_is_understood(toy: Path, model: Path) -> None:
    done = command("plan", model, "--scheme", "toy", "--ignore", "re:.*down_proj$", path=toy)
    assert done.stdout.startswith("12 layers compressed")
    assert "'re:.*dawn_proj$' matches none of the 14 linear layers" in refusal(
        "plan", model, "--scheme", "toy", "--ignore", "re:.*dawn_proj$", path=toy
    )


def test_old_names_of_serve_on_work_and_warn(toy: Path, model: Path) -> None:
    for option, *words in (
        ["--hardware", "plan", model, "--scheme", "toy"],
        ["--device", "schemes", "toy"],
    ):
        new = command(*words, "--serve-on", "t4", path=toy)
        old = command(*words, option, "t4", path=toy)
        assert old.stdout == new.stdout
        assert "NVIDIA T4" in new.stdout
        notice = f"warning: {option} is now --serve-on; the old name goes with the next release\n"
        assert old.stderr == notice + new.stderr
        assert f"{option} " not in command(words[0], "--help").stdout


def test_compress_warns_for_the_device_that_will_serve(toy: Path, model: Path) -> None:
    words = ["compress", model, model.parent / "out", "--scheme", "toy", "--serve-on", "h101"]
    done = command(*words, path=toy)
    assert (done.returncode, done.stdout) == (2, "")
    assert "did you mean NVIDIA H100" in done.stderr


def test_a_line_says_what_auto_computes_on(toy: Path, model: Path) -> None:
    words = ["compress", model, model.parent / "out", "--scheme", "toy", "--device", "auto"]
    done = command(*words, path=toy)
    assert done.returncode == 0
    line, *others = done.stderr.splitlines()
    assert line.startswith("--device auto: computes on ")
    assert not others
