"""Each sequence begins as the tokenizer begins a text, and no token of the text is lost."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from fixtures.learner_scheme import tokenizer_folder
from tokenizers import Tokenizer, models, pre_tokenizers
from tokenizers.processors import TemplateProcessing
from transformers import AutoTokenizer

from bitpress.compression.job import Job
from bitpress.compression.run_manifest import describe_calibration
from bitpress.modeling import metrics
from bitpress.modeling.sequences import find_prefix
from bitpress.modeling.tokens import load_calibration_data, load_evaluation_text
from bitpress.planning.calibration_config import CalibrationConfig
from bitpress.planning.evaluation_config import EvaluationConfig

WORDS = [f"w{number}" for number in range(200)]
SPECIAL = ["<unk>", "<s>", "<sop>", "</s>"]
WORD_IDS = list(range(len(SPECIAL), len(SPECIAL) + len(WORDS)))


def word_model(folder: Path, begin: str = "", end: str = "", template: str = "") -> Path:
    """A folder with a tokenizer whose tokens are words, which puts tokens around a text."""
    vocabulary = {word: number for number, word in enumerate([*SPECIAL, *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.add_special_tokens(SPECIAL)
    tokenizer.post_processor = TemplateProcessing(
        single=f"{begin} $A {end}".split(),
        special_tokens=[(name, vocabulary[name]) for name in SPECIAL],
    )
    folder = tokenizer_folder(folder)
    (folder / "tokenizer.json").write_text(tokenizer.to_str())
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "unk_token": "<unk>"}
    settings |= {"bos_token": "<s>", "chat_template": template} if begin else {}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return folder


def text_file(folder: Path, text: str = " ".join(WORDS)) -> str:
    (folder / "a.txt").write_text(text)
    return str(folder / "a.txt")


def words_of(ids: torch.Tensor) -> list[list[str]]:
    names = [*SPECIAL, *WORDS]
    return [[names[number] for number in row] for row in ids.tolist()]


@pytest.mark.parametrize(
    ("begin", "end", "prefix"),
    [
        ("", "", []),
        ("<s>", "", ["<s>"]),
        ("<s>", "</s>", ["<s>"]),
        ("<s> <sop>", "", ["<s>", "<sop>"]),
        ("", "</s>", []),
    ],
)
def test_the_prefix_is_what_the_tokenizer_puts_before_a_text(
    tmp_path: Path, begin: str, end: str, prefix: list[str]
) -> None:
    tokenizer: Any = AutoTokenizer.from_pretrained(word_model(tmp_path / "model", begin, end))
    assert words_of(find_prefix(tokenizer)[None]) == [prefix]


def test_each_sequence_begins_as_the_tokenizer_begins_a_text(tmp_path: Path) -> None:
    model = word_model(tmp_path / "model", "<s>", "</s>")
    data = load_calibration_data(CalibrationConfig(text_file(tmp_path), 100, 32), model, {})
    assert data.input_ids.shape == (200 // 31, 32)
    rows = words_of(data.input_ids)
    assert {row[0] for row in rows} == {"<s>"}
    assert data.input_ids[:, 1:].flatten().tolist() == WORD_IDS[: 31 * len(rows)]
    assert (describe_calibration(Job(cast("Any", None), data, "model")) or {})["prefix"] == "<s>"


def test_every_token_after_bos_is_predicted_once_and_bos_itself_never(tmp_path: Path) -> None:
    model = word_model(tmp_path / "model", "<s>")
    text = load_evaluation_text(EvaluationConfig(text_file(tmp_path), 32), model, {})
    assert text.target_ids.flatten().tolist() == WORD_IDS[: text.target_ids.numel()]
    assert torch.equal(text.input_ids[:, 1:], text.target_ids[:, :-1])
    assert {row[0] for row in words_of(text.input_ids)} == {"<s>"}


def test_no_token_of_a_longer_prefix_is_a_target(tmp_path: Path) -> None:
    model = word_model(tmp_path / "model", "<s> <sop>")
    text = load_evaluation_text(EvaluationConfig(text_file(tmp_path), 32), model, {})
    assert set(text.target_ids[:, 0].tolist()) == {metrics.NO_TARGET}
    targets = text.target_ids[:, 1:].flatten().tolist()
    assert targets == WORD_IDS[: len(targets)]


def test_a_tokenizer_without_bos_gives_the_text_cut_as_it_is(tmp_path: Path) -> None:
    model = word_model(tmp_path / "model", end="</s>")
    config = CalibrationConfig(text_file(tmp_path), 100, 32)
    data = load_calibration_data(config, model, {})
    assert data.input_ids.flatten().tolist() == WORD_IDS[: 200 // 32 * 32]
    text = load_evaluation_text(EvaluationConfig(config.source or "", 32), model, {})
    assert text.target_ids.flatten().tolist() == WORD_IDS[1 : 1 + 200 // 32 * 32]
    assert data.prefix == ""


def test_a_chat_that_begins_with_bos_gets_no_second(tmp_path: Path) -> None:
    template = "{{ bos_token }}{% for m in messages %} {{ m.content }}{% endfor %}"
    model = word_model(tmp_path / "model", "<s>", template=template)
    chat = {"messages": [{"role": "user", "content": " ".join(WORDS[:15])}]}
    (tmp_path / "a.jsonl").write_text((json.dumps(chat) + "\n") * 4)
    config = CalibrationConfig(str(tmp_path / "a.jsonl"), 10, 16)
    rows = words_of(load_calibration_data(config, model, {}).input_ids)
    assert rows == [["<s>", *WORDS[:15]]] * 4


def test_sequences_that_have_room_for_a_prefix_alone_have_none(tmp_path: Path) -> None:
    model = word_model(tmp_path / "model", "<s>")
    data = load_calibration_data(CalibrationConfig(text_file(tmp_path), 3, 1), model, {})
    assert words_of(data.input_ids) == [[word] for word in WORDS[:3]]
    assert data.prefix == ""
