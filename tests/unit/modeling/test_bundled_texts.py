"""The texts that ship with bitpress: what they hold, and how a model is calibrated on them."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pytest
from fixtures.learner_scheme import TINY_CONFIG, tokenizer_folder

from bitpress.errors import DataError
from bitpress.modeling import bundled_texts
from bitpress.modeling.tokens import CalibrationData, load_calibration_data
from bitpress.planning.calibration_config import CalibrationConfig

FOLDER = Path(bundled_texts.__file__).parent
TEMPLATE = "{% for m in messages %}<{{ m.role }}>{{ m.content }}\n{% endfor %}"
REFUSING = "{{ raise_exception('no system') if messages[0].role == 'system' }}" + TEMPLATE
DATED = "{{ strftime_now('%Y-%m-%d') }}" + TEMPLATE


def loaded(
    folder: Path, template: str | None, source: str | None = None, samples: int = 32
) -> CalibrationData:
    if template is not None:
        config = json.loads((folder / "tokenizer_config.json").read_text())
        (folder / "tokenizer_config.json").write_text(
            json.dumps(config | {"chat_template": template})
        )
    return load_calibration_data(
        CalibrationConfig(source, samples=samples, sequence_length=128), folder, TINY_CONFIG
    )


def text_of(data: CalibrationData, folder: Path) -> str:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    return "".join(tokenizer.batch_decode(data.input_ids))


def test_the_mixed_text_is_small_and_its_start_is_as_mixed_as_all_of_it() -> None:
    assert sum(file.stat().st_size for file in FOLDER.glob("*.xz")) < 300_000
    rows = list(bundled_texts.read_rows("mixed"))
    for part in (rows, rows[:40]):
        share = Counter("messages" in row for row in part)[True] / len(part)
        assert 0.5 < share < 0.75
    texts = "\n".join(str(row) for row in rows[:40])
    for word in ("def ", "```", "Why ", "Menschen", "'system'"):
        assert word in texts, word
    for row in rows:
        roles = [message["role"] for message in row.get("messages", [])]
        turns = roles[1:] if roles[:1] == ["system"] else roles
        assert turns == ["user", "assistant"] * (len(turns) // 2)
        assert roles or row["text"].strip()


def test_the_source_and_licence_of_every_part_stand_beside_it() -> None:
    notice = (FOLDER / "TEXTS.md").read_text()
    for file in FOLDER.glob("*.xz"):
        assert f"`{file.name}`" in notice
    for licence in ("PSF-2.0", "MIT", "BSD-3-Clause", "CC0-1.0", "public domain"):
        assert licence in notice


def test_a_model_with_a_chat_template_is_calibrated_on_the_mixed_text_in_it(
    tmp_path: Path,
) -> None:
    folder = tokenizer_folder(tmp_path / "chats")
    data = loaded(folder, TEMPLATE)
    assert data.source == "the mixed text that ships with bitpress"
    assert not data.warnings
    assert "<user>" in text_of(data, folder)
    assert loaded(folder, None).digest == data.digest
    assert loaded(folder, None, "mixed").digest == data.digest
    assert loaded(folder, None, "prose").source == "the text that ships with bitpress"


def test_without_a_template_prose_is_the_default_and_chats_are_text(tmp_path: Path) -> None:
    folder = tokenizer_folder(tmp_path / "plain")
    assert loaded(folder, None).digest == loaded(folder, None, "prose").digest
    mixed = loaded(folder, None, "mixed")
    assert mixed.digest != loaded(folder, None).digest
    assert not mixed.warnings


def test_a_template_that_refuses_some_chats_gets_them_as_text_without_a_warning(
    tmp_path: Path,
) -> None:
    data = loaded(tokenizer_folder(tmp_path / "m"), REFUSING, samples=1000)
    assert all("left out" not in text for text in data.warnings)


def test_a_template_that_writes_the_date_writes_the_same_on_any_day(tmp_path: Path) -> None:
    folder = tokenizer_folder(tmp_path / "dated")
    data = loaded(folder, DATED)
    assert not data.depends_on_day
    assert "2024-07-26" in text_of(data, folder).replace(" ", "")


def test_a_file_of_that_name_comes_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mixed").mkdir()
    (tmp_path / "mixed/a.txt").write_text("a text of my own " * 200)
    assert loaded(tokenizer_folder(tmp_path / "m"), None, "mixed").source == "mixed"


@pytest.mark.parametrize("name", ["mixed", "prose"])
def test_a_text_that_is_cut_short_is_refused_in_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    for file in FOLDER.glob("*.xz"):
        (tmp_path / file.name).write_bytes(file.read_bytes()[:1000])
    monkeypatch.setattr(bundled_texts.resources, "files", lambda package: tmp_path)
    with pytest.raises(DataError, match=rf"{name}\.\w+\.xz: .*; install bitpress-core again"):
        list(bundled_texts.read_rows(name))
