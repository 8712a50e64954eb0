"""What a log says of a run."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from bitpress.cli import progress_lines
from bitpress.cli.progress_lines import ProgressLines
from bitpress.conformance.commands import command
from bitpress.conformance.models import write_model


class Clock:
    """A clock that the test sets."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def monotonic(self) -> float:
        return self.seconds

    def strftime(self, form: str) -> str:
        return "12:00:00"


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(progress_lines, "time", clock)
    return clock


def test_there_is_a_line_for_each_block(clock: Clock, capsys: pytest.CaptureFixture[str]) -> None:
    report_progress = ProgressLines()("compressing", 100)
    for seconds, layer in [
        (15, "model.layers.0.mlp.up_proj: error 0.01"),
        (30, "model.layers.0.mlp.down_proj"),
        (40, "model.layers.1.mlp.up_proj"),
        (45, "model.layers.2.mlp.up_proj"),
        (250, "model.layers.2.mlp.down_proj"),
    ]:
        clock.seconds = seconds
        report_progress(10, layer)
    assert capsys.readouterr().err.splitlines() == [
        "12:00:00 compressing 10%, model.layers.0, 0:15 elapsed, about 2:15 left",
        "12:00:00 compressing 30%, model.layers.1, 0:40 elapsed, about 1:33 left",
        "12:00:00 compressing 50%, model.layers.2, 4:10 elapsed, about 4:10 left",
    ]


def test_a_long_block_and_work_without_names_have_a_line_a_minute(
    clock: Clock, capsys: pytest.CaptureFixture[str]
) -> None:
    report_progress = ProgressLines()("verifying", 4000)
    for seconds in range(2, 4002, 10):
        clock.seconds = seconds
        report_progress(10)
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 66
    assert lines[-1] == "12:00:00 verifying 99%, 1:06:02 elapsed, about 0:30 left"


def test_what_was_finished_earlier_does_not_shorten_the_time_left(
    clock: Clock, capsys: pytest.CaptureFixture[str]
) -> None:
    report_progress = ProgressLines()("compressing", 100)
    report_progress(80, "model-1.safetensors: finished earlier")
    clock.seconds = 60
    report_progress(10, "model.layers.8.mlp.up_proj")
    assert capsys.readouterr().err.endswith(
        "compressing 90%, model.layers.8, 1:00 elapsed, about 1:00 left\n"
    )


def test_off_a_terminal_quiet_says_nothing(
    toy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(progress_lines, "MIN_SECONDS", 0)
    monkeypatch.setattr(progress_lines, "MAX_SECONDS", 0)
    words = ["compress", write_model(tmp_path / "model")]
    done = command(*words, tmp_path / "told", "--scheme", "toy", path=toy)
    assert re.search(r"^\d\d:\d\d:\d\d compressing \d+%, .* elapsed", done.stderr)
    assert re.search(r"^\d\d:\d\d:\d\d verifying \d+%", done.stderr, re.MULTILINE)
    for option in ("-q", "--quiet", "--json"):
        done = command(*words, tmp_path / option, "--scheme", "toy", option, path=toy)
        assert (done.returncode, done.stderr) == (0, "")
