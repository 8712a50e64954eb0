"""Code and texts of a stranger's model: neither is obeyed, wherever the command is started."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from fixtures.forked import COMMAND

from bitpress.conformance.commands import install
from bitpress.conformance.models import write_model

# Modules that bitpress imports, or would if they were there.
MODULES = ["torch", "transformers", "click", "bitpress_evil"]


@pytest.fixture
def trap(tmp_path: Path) -> Path:
    """A model whose folder holds modules and a plugin, all of which leave a file when they run."""
    model = write_model(tmp_path / "model")
    code = f"open({str(tmp_path / 'code-ran')!r}, 'w')\n"
    for name in MODULES:
        (model / f"{name}.py").write_text(code)
    return install(model, "bitpress-evil", code, "[bitpress]\nevil = bitpress_evil\n")


def run_in(folder: Path, *words: object) -> subprocess.CompletedProcess[str]:
    """A program, started in a folder."""
    return subprocess.run(
        list(map(str, words)), cwd=folder, capture_output=True, text=True, check=False
    )


def test_the_module_runs_no_code_of_the_current_folder(tmp_path: Path, trap: Path) -> None:
    done = run_in(trap, sys.executable, "-m", "bitpress", "schemes")
    assert done.returncode == 0, done.stderr
    assert "evil" not in done.stdout + done.stderr
    assert not (tmp_path / "code-ran").exists()


def test_under_torchrun_the_command_runs_no_code_of_the_current_folder(
    tmp_path: Path, trap: Path
) -> None:
    (trap / "bitpress.py").write_text((trap / "torch.py").read_text())
    words = [sys.executable, "-P", "-m", "torch.distributed.run", "--standalone"]
    done = run_in(trap, *words, "--nproc-per-node", 2, *COMMAND, "schemes")
    assert done.returncode == 0, done.stderr
    assert "evil" not in done.stdout
    assert not (tmp_path / "code-ran").exists()


def test_a_folder_on_the_path_by_the_user_s_wish_stays_there(tmp_path: Path, trap: Path) -> None:
    environment = os.environ | {"PYTHONPATH": str(trap)}
    words = [sys.executable, "-m", "bitpress", "schemes"]
    subprocess.run(words, cwd=tmp_path, env=environment, capture_output=True, check=False)
    assert (tmp_path / "code-ran").exists()
