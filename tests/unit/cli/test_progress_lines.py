"""What a log says of a run."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from bitpress.cli import progress_lines
from bitpress.cli.progress_lines import ProgressLines
from bitpress.conformance.commands import command
from bitpress.conformance.models import write_model


def test_there_is_a_line_for_each_block(clock, capsys: pytest.CaptureFixture[str]) -> None:
    lines = ProgressLines()
    report_progress = lines("compressing", 80)
    for seconds, layer in [
        (1, "loading"),
        (100, "mlp.up_proj · fitting"),
        (125, "mlp.down_proj · done"),
    ] * 8:
        block = clock.ticks // 3 + 1
        clock.ticks += 1
        clock.seconds = 125 * (block - 1) + seconds
        report_progress(10 * layer.endswith("done"), f"block {block}/8 · {layer}")
    lines.finish()
    shown = capsys.readouterr().err.splitlines()
    assert shown[:3] == [
        "12:00:00 compressing 0% · block 1/8 · mlp.up_proj · fitting · 1:40 elapsed",
        "12:00:00 compressing 12% · block 1/8 done · 2:06 elapsed · about 15 min left",
        "12:00:00 compressing 12% · block 2/8 · mlp.up_proj · fitting · 3:45 elapsed · "
        "about 13 min left",
    ]
    assert shown[-1] == "12:00:00 compressing 100% · block 8/8 done · 16:40 elapsed"
    assert sum("done" in line for line in shown) == 8


def test_blocks_of_a_small_model_say_little(clock, capsys: pytest.CaptureFixture[str]) -> None:
    lines = ProgressLines()
    report_progress = lines("compressing", 80)
    for block in range(1, 9):
        clock.seconds += 0.2
        report_progress(10, f"block {block}/8 · mlp.up_proj · done")
    lines.finish()
    assert capsys.readouterr().err == ""


def test_work_without_blocks_has_a_line_a_minute(clock, capsys: pytest.CaptureFixture[str]) -> None:
    report_progress = ProgressLines()("verifying", 4000)
    for seconds in range(2, 4002, 10):
        clock.seconds = seconds
        report_progress(10)
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 67
    assert lines[0] == "12:00:00 verifying 0% · 0:12 elapsed · about 40 min left"
    assert lines[-1] == "12:00:00 verifying 99% · 1:06:12 elapsed · less than 1 min left"


def test_off_a_terminal_quiet_says_nothing(
    toy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(progress_lines, "FIRST_SECONDS", 0)
    monkeypatch.setattr(progress_lines, "MAX_SECONDS", 0)
    words = ["compress", write_model(tmp_path / "model")]
    done = command(*words, tmp_path / "told", "--scheme", "toy", path=toy)
    assert re.search(r"^\d\d:\d\d:\d\d compressing \d+% · .* elapsed", done.stderr)
    assert re.search(r"^\d\d:\d\d:\d\d verifying \d+%", done.stderr, re.MULTILINE)
    for option in ("-q", "--quiet", "--json"):
        done = command(*words, tmp_path / option, "--scheme", "toy", option, path=toy)
        assert (done.returncode, done.stderr) == (0, "")
