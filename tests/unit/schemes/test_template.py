"""`bitpress new-scheme` writes a whole package that installs, is listed, keeps every law, and is
short.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from fixtures.processes import kit

from bitpress.conformance.commands import command, refusal
from bitpress.conformance.models import write_model
from bitpress.schemes.hookspecs import VERSION


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The package of a new scheme `my-ternary`, as the command wrote it."""
    folder = tmp_path_factory.mktemp("author")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        done = command("new-scheme", "my-ternary")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith(
        "bitpress-scheme-my-ternary: written; edit bitpress_my_ternary.py there"
    )
    return folder / "bitpress-scheme-my-ternary"


@pytest.fixture(scope="module")
def installed(written: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder that pip installed it into."""
    target = tmp_path_factory.mktemp("site")
    pip = [
        sys.executable,
        "-m",
        "pip",
        "install",
        "--quiet",
        "--no-deps",
        "--no-build-isolation",
        "--no-index",
        "--target",
    ]
    subprocess.run([*pip, str(target), str(written)], check=True)
    return target


def test_it_is_a_package_of_at_most_70_lines(written: Path) -> None:
    files = {
        file.relative_to(written).as_posix(): file.read_text()
        for file in written.rglob("*")
        if file.is_file()
    }
    assert set(files) == {
        "README.md",
        "bitpress_my_ternary.py",
        "pyproject.toml",
        "tests/test_bitpress_my_ternary.py",
    }
    assert sum(len(text.splitlines()) for text in files.values()) <= 70
    assert f'"bitpress-core>={VERSION},<1"' in files["pyproject.toml"]


def test_installed_it_is_listed_and_compresses(installed: Path, tmp_path: Path) -> None:
    done = command("schemes", path=installed)
    assert (done.returncode, done.stderr) == (0, "")
    assert "bitpress-scheme-my-ternary 0.1.0" in done.stdout
    model, out = write_model(tmp_path / "m"), tmp_path / "out"
    done = command("compress", model, out, "--scheme", "my-ternary", path=installed)
    assert done.returncode == 0
    assert "verified: 14 layers read back and compared with the source" in done.stdout


def test_its_own_tests_and_every_law_pass_as_they_stand(written: Path, installed: Path) -> None:
    done = kit(installed, where=written)
    assert done.returncode == 0, done.stdout
    assert "failed" not in done.stdout
    assert "the scheme has no `observe` hook" in done.stdout


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("Ternary", "'Ternary' is no name for a scheme: small letters"),
        ("a+b", "is no name for a scheme"),
        ("toy", "toy is a scheme of bitpress-scheme-toy: take another name"),
        ("there", "bitpress-scheme-there is there already: move it away, or take another name"),
    ],
)
def test_a_name_that_cannot_be_had_is_refused(
    toy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, words: str
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "bitpress-scheme-there").mkdir()
    assert words in refusal("new-scheme", name, path=toy)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["bitpress-scheme-there", "plugins"]
