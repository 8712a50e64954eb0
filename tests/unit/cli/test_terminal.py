"""What commands show in a terminal: nothing that must be typed or that decides is cut."""

from __future__ import annotations

import contextlib
import fcntl
import os
import pty
import re
import shlex
import struct
import subprocess
import sys
import termios
from pathlib import Path

import pytest
from fixtures.learner_scheme import CONFIG, install_learner, runnable_model
from fixtures.toy_scheme import install_toy

from bitpress.cli.plan_output import format_duration
from bitpress.conformance.commands import command
from bitpress.conformance.models import LLAMA, write_model

# Of a run that takes seconds.
SLOW = ("--scheme", "learner", "--samples", "64", "--sequence-length", "100", "--threads", "1")

LONG = "toy-of-a-name-that-fills-most-of-a-line-of-a-terminal"


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return write_model(tmp_path / "model")


def write_deep_model(folder: Path) -> Path:
    """A model of twelve blocks."""
    return write_model(folder, config={**LLAMA, "num_hidden_layers": 12})


def in_terminal(columns: int, *arguments: object, path: Path | None = None) -> str:
    """What a command shows in a pseudo-terminal of so many columns, standard error included."""
    master, slave = pty.openpty()
    fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
    environment = {
        name: text for name, text in os.environ.items() if name not in ("COLUMNS", "LINES")
    }
    environment |= {"TERM": "xterm", "PYTHONPATH": str(path or "")}
    argv = [sys.executable, "-m", "bitpress", *map(str, arguments)]
    with subprocess.Popen(
        argv, stdin=slave, stdout=slave, stderr=slave, env=environment, start_new_session=True
    ):
        os.close(slave)
        shown = b""
        # Linux reports the end of a terminal as an error
        with contextlib.suppress(OSError):
            while piece := os.read(master, 65536):
                shown += piece
    os.close(master)
    return shown.decode().replace("\r\n", "\n")


@pytest.mark.parametrize("columns", [40, 80, 99, 100, 120])
def test_names_levels_and_findings_are_never_cut(tmp_path: Path, columns: int) -> None:
    plugins = install_toy(tmp_path / "plugins")
    (entry_points,) = plugins.glob("*.dist-info/entry_points.txt")
    entry_points.write_text(entry_points.read_text().replace("toy =", f"{LONG} ="))
    shown = in_terminal(columns, "schemes", path=plugins)
    assert "…" not in shown
    assert LONG in shown
    assert "bitpress-scheme-toy 1.0" in shown
    shown = in_terminal(columns, "schemes", LONG, path=plugins)
    assert "…" not in shown
    for words in ("levels", "whole number", "the largest code", "supported", "runs anywhere"):
        assert words in shown


@pytest.mark.parametrize("columns", [80, 120])
def test_layers_of_plan_and_inspect_are_never_cut(toy: Path, model: Path, columns: int) -> None:
    out = model.parent / "out"
    command("compress", model, out, "--scheme", "toy", path=toy)
    for words in (["plan", model, "--scheme", "toy"], ["inspect", out]):
        shown = in_terminal(columns, *words, "--all", path=toy)
        assert "…" not in shown
        for i in (0, 1):
            assert f"model.layers.{i}.mlp.down_proj" in shown
            assert f"model.layers.{i}.self_attn.o_proj" in shown


def test_a_narrow_terminal_has_records_of_lines_that_fit(toy: Path) -> None:
    lines = in_terminal(80, "schemes", path=toy).splitlines()
    assert lines[1:3] == ["scheme        toy", "package       bitpress-scheme-toy 1.0"]
    assert max(map(len, lines)) <= 80


def test_rows_alike_are_one_after_the_summary(toy: Path, tmp_path: Path) -> None:
    model = write_deep_model(tmp_path / "deep")
    shown = command("plan", model, "--scheme", "toy", path=toy).stdout
    lines = shown.splitlines()
    (row,) = [line for line in lines if "down_proj" in line]
    assert row.split()[:2] == ["model.layers.0-11.mlp.down_proj", "x12"]
    assert "model.layers.0-11.input_layernorm.weight x12" in shown
    assert lines[0].startswith("84 layers compressed, ")
    assert lines[-1] == "every layer by itself: --all"
    shown = command("plan", model, "--scheme", "toy", "--all", path=toy).stdout
    assert shown.count("mlp.down_proj") == 12
    assert "--all" not in shown


def test_layers_that_are_missing_from_a_run_of_numbers_show(toy: Path, tmp_path: Path) -> None:
    model = write_deep_model(tmp_path / "deep")
    ignored = [f"--ignore=model.layers.{i}.mlp.down_proj" for i in (1, 2, 7)]
    shown = command("plan", model, "--scheme", "toy", *ignored, path=toy).stdout
    assert "model.layers.0,3-6,8-11.mlp.down_proj x9" in shown


def test_inspect_shows_the_largest_error_of_layers_alike(toy: Path, model: Path) -> None:
    out = model.parent / "out"
    command("compress", model, out, "--scheme", "toy", path=toy)
    errors = [
        line.split()[-1]
        for line in command("inspect", out, "--all").stdout.splitlines()
        if "down_proj" in line
    ]
    shown = command("inspect", out).stdout.splitlines()
    (row,) = [line.split() for line in shown if "down_proj" in line]
    assert row[:2] == ["model.layers.0-1.mlp.down_proj", "x2"]
    assert row[-1] == max(errors)


@pytest.mark.parametrize("words", [["schemes"], ["plan"], ["--help"]])
@pytest.mark.parametrize("redirection", ["", "2>&1"])
def test_a_reader_that_has_seen_enough_ends_a_command_quietly(
    toy: Path, model: Path, words: list[str], redirection: str
) -> None:
    if words == ["plan"]:
        words = ["plan", str(model), "--scheme", "toy", "--all"]
    # the reader is gone before the first line
    line = f"{{ sleep 0.2; {shlex.join([sys.executable, '-m', 'bitpress', *words])} {redirection}; "
    line += "echo $? >&3; } 3>code | true"
    done = subprocess.run(
        ["sh", "-c", line],
        cwd=toy.parent,
        env={**os.environ, "PYTHONPATH": str(toy)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.stdout, done.stderr) == ("", "")
    assert (toy.parent / "code").read_text() == "141\n"


def test_a_message_that_nobody_reads_ends_a_command_quietly(tmp_path: Path) -> None:
    line = f"{{ sleep 0.2; {sys.executable} -m bitpress verify nothing; echo $? >&3; }} "
    line += "2>&1 3>code | true"
    subprocess.run(["sh", "-c", line], cwd=tmp_path, check=True)
    assert (tmp_path / "code").read_text() == "141\n"


def test_facts_of_a_plan_break_between_words(toy: Path, model: Path) -> None:
    words = ["plan", model, "--scheme", "toy", "--threads", "1"]
    whole = command(*words, path=toy).stdout.splitlines()
    (time,) = [line for line in whole if line.startswith("time")]
    assert len(time) > 80
    assert "with 1 thread, where" in time
    lines = in_terminal(80, *words, path=toy).splitlines()
    assert max(map(len, lines)) <= 80
    start = next(i for i, line in enumerate(lines) if line.startswith("time"))
    assert f"{lines[start]} {lines[start + 1].lstrip()}" == time


def test_one_rule_for_all_layers_is_no_column(toy: Path, model: Path) -> None:
    shown = command("plan", model, "--scheme", "toy", path=toy).stdout
    assert "the rule for" not in shown
    recipe = model.parent / "recipe.toml"
    recipe.write_text(
        '[[layers]]\nmatch = "*.mlp.*"\nsteps = ["toy"]\n[[layers]]\nmatch = "*"\nsteps = ["toy"]\n'
    )
    shown = command("plan", model, "--recipe", recipe, path=toy).stdout
    assert "the rule for '*.mlp.*'" in shown


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.381, "0.38 s"), (112.0, "110 s"), (121.0, "2 min"), (7199.0, "120 min"), (9e6, "100 days")],
)
def test_a_duration_has_no_exponent(seconds: float, text: str) -> None:
    assert format_duration(seconds) == text


def test_a_default_is_shown_as_it_is_typed(tmp_path: Path) -> None:
    plugins = install_toy(tmp_path / "plugins")
    module = plugins / "bitpress_scheme_toy.py"
    text = module.read_text()
    changed = text.replace("    levels: int", "    is_even: bool = True\n    levels: int", 1)
    assert changed != text
    module.write_text(changed)
    (line,) = [
        line
        for line in command("schemes", "toy", path=plugins).stdout.splitlines()
        if "is_even" in line
    ]
    assert line.split()[:5] == ["is_even", "true", "|", "false", "true"]


def test_a_calibrated_run_says_where_it_is_and_how_long_it_takes(tmp_path: Path) -> None:
    plugins = install_learner(tmp_path / "plugins")
    model = runnable_model(tmp_path / "model", config={**CONFIG, "num_hidden_layers": 4})
    words = ["compress", model, tmp_path / "out", *SLOW, "--calibration", tmp_path / "text.txt"]
    shown = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", in_terminal(80, *words, path=plugins))
    lines = re.split(r"[\r\n]+", shown)
    blocks = [line for line in lines if line.startswith("block ")]
    pattern = r"block \d/4( · [\w.]+( \+\d)?)?( · [a-z ]+)? · \d:\d\d elapsed"
    pattern += "( · (less than 1|about \\d+) min left)?"
    assert blocks
    assert [line for line in blocks if not re.fullmatch(pattern, line)] == []
    # no block is finished yet, and then some are
    assert not [line for line in blocks if line.startswith("block 1/4") and "left" in line]
    assert [line for line in blocks if line.startswith("block 4/4") and "left" in line]
    # embeddings and head, which are copied first, are no progress
    # the line above a text is the bar of the same moment
    first = lines.index(blocks[0]) - 1
    assert {line.split()[2] for line in lines[:first] if line.startswith("compressing")} == {"0%"}
    assert "…" not in shown


def test_verbose_says_what_is_done_to_each_layer_and_quiet_nothing(tmp_path: Path) -> None:
    plugins = install_learner(tmp_path / "plugins")
    model = runnable_model(tmp_path / "model")
    words = ["compress", model, *SLOW, "--calibration", tmp_path / "text.txt"]
    words[2:2] = [tmp_path / "out"]
    done = command(*words, "-v", path=plugins)
    assert done.returncode == 0
    assert done.stdout.startswith(f"{tmp_path / 'out'}: ")
    layer = r"^\d\d:\d\d:\d\d model\.layers\.1\.mlp\.down_proj: output error 0\.\d{5}, \d+\.\d\d s$"
    assert len(re.findall(layer, done.stderr, re.MULTILINE)) == 1
    for fact in ("on cpu", "1 threads on ", "of memory available, no limit", "block 2/3: "):
        assert fact in done.stderr
    words[2] = tmp_path / "other"
    assert command(*words, "-q", path=plugins).stderr == ""


def test_verbose_shows_where_an_error_comes_from(toy: Path, tmp_path: Path) -> None:
    words = ["verify", tmp_path / "nothing"]
    (message,) = command(*words, path=toy).stderr.splitlines()
    lines = command(*words, "-v", path=toy).stderr.splitlines()
    assert lines[-1] == message
    assert "Traceback (most recent call last):" in lines
