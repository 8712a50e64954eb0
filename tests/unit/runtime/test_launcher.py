"""One command starts the ranks of a run on this machine, and ends with them."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest
from fixtures.forked import torchrun
from fixtures.learner_scheme import LEARNER, install_learner, runnable_model

from bitpress.conformance.commands import bitpress, install, process
from bitpress.conformance.models import files_of

SAMPLES = ["--samples", 4, "--sequence-length", 48, "--threads", 1]

# at the layer that a test names, the user interrupts the process that has started the ranks
INTERRUPTED = LEARNER.replace(
    'os.kill(os.getpid(), signal.SIGKILL if "kill" in file.name else signal.SIGINT)',
    '(os.kill(os.getppid(), signal.SIGINT), __import__("time").sleep(60))',
)


def words(tmp_path: Path, out: str, *settings: object) -> list[object]:
    model = tmp_path / "model"
    if not model.exists():
        runnable_model(model)
    text = ["--calibration", tmp_path / "text.txt"]
    return ["compress", model, tmp_path / out, "--scheme", "learner", *text, *SAMPLES, *settings]


def processes_of(out: Path) -> list[str]:
    """Processes with the folder on their command lines."""
    commands = [
        subprocess.run(
            ["ps", "-ww", "-o", "args=", "-p", folder.name],
            capture_output=True,
            text=True,
            check=False,
        ).stdout
        for folder in Path("/proc").glob("[0-9]*")
    ]
    return [command for command in commands if str(out) in command]


def test_the_files_are_those_of_ranks_that_torchrun_has_started(tmp_path: Path) -> None:
    path = install_learner(tmp_path / "plugins")
    done = bitpress(*words(tmp_path, "a", "--devices", "cpu,cpu"), path=path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("verified:") == 1
    assert torchrun(2, *words(tmp_path, "b"), path=path).returncode == 0
    assert files_of(tmp_path / "a") == files_of(tmp_path / "b")


def test_what_is_wrong_is_said_once_with_its_exit_code(tmp_path: Path) -> None:
    path = install_learner(tmp_path / "plugins")
    done = bitpress(*words(tmp_path, "o", "--devices", "cpu,cpu", "--set", "x=1"), path=path)
    assert done.returncode == 2
    assert done.stdout == ""
    assert len(done.stderr.splitlines()) == 1, done.stderr


def test_a_rank_that_dies_is_named_and_the_same_command_resumes(tmp_path: Path) -> None:
    path = install_learner(tmp_path / "plugins")
    deadly = ["--devices", "cpu,cpu", "--set", f"deadly={tmp_path / 'kill.7'}"]
    done = bitpress(*words(tmp_path, "o", *deadly), path=path)
    assert done.returncode == 2
    messages = [line for line in done.stderr.splitlines() if line.startswith("bitpress: ")]
    assert len(messages) == 1, done.stderr
    assert "was ended by SIGKILL" in messages[0]
    assert "Traceback" not in done.stderr
    assert not processes_of(tmp_path / "o")
    assert not (tmp_path / "o/config.json").exists()
    again = bitpress(*words(tmp_path, "o", *deadly), path=path)
    assert again.returncode == 0, again.stderr


def test_an_interrupt_ends_all_ranks_in_one_line(tmp_path: Path) -> None:
    path = install(
        tmp_path / "plugins",
        "bitpress-scheme-learner",
        INTERRUPTED,
        "[bitpress.schemes]\nlearner = bitpress_scheme_learner\n",
    )
    deadly = ["--devices", "cpu,cpu", "--set", f"deadly={tmp_path / 'interrupt.7'}"]
    running = process(*words(tmp_path, "o", *deadly), path=path)
    _, error = running.communicate(timeout=120)
    assert running.returncode == 130, error
    messages = [line for line in error.splitlines() if line.startswith("bitpress: ")]
    assert messages == ["bitpress: interrupted; the same command resumes from the finished shards"]
    assert "Traceback" not in error
    assert not processes_of(tmp_path / "o")
    assert not (tmp_path / "o/config.json").exists()


@pytest.mark.parametrize("words_too", [["--device", "cpu"], ["--device", "auto"]])
def test_one_device_and_several_cannot_be_asked_for_together(
    tmp_path: Path, words_too: list[str]
) -> None:
    path = install_learner(tmp_path / "plugins")
    done = bitpress(*words(tmp_path, "o", "--devices", "cpu,cpu", *words_too), path=path)
    assert done.returncode == 2
    assert "--device and --devices cannot be combined" in done.stderr
