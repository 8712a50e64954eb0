"""From texts to token sequences: nothing lost, nothing repeated, and the same every time."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from fixtures.learner_scheme import TINY, TINY_CONFIG as CONFIG, tokenizer_folder
from transformers import AutoTokenizer

from bitpress import DataError
from bitpress.modeling.tokens import CalibrationData, load_calibration_data
from bitpress.planning.calibration_config import CalibrationConfig

TEXTS = [
    f"On day {i} the ship's {word} was seen at noon, {i * 7} miles from land.\n"
    for i in range(40)
    for word in ("mast", "boat")
]
CHATS = [
    [{"role": "user", "content": text}, {"role": "assistant", "content": "Noted."}]
    for text in TEXTS
]
TEMPLATE = "{{ bos_token }}{% for m in messages %}[{{ m.role }}] {{ m.content }}{% endfor %}"


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A folder with tiny-llama's tokenizer, which has no chat template."""
    return tokenizer_folder(tmp_path / "model")


def give_template(model: Path, template: str = TEMPLATE) -> None:
    file = model / "tokenizer_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "chat_template": template}))


def json_lines(file: Path, column: str = "text", values: Sequence[Any] = TEXTS) -> Path:
    file.write_text("".join(json.dumps({column: value}) + "\n" for value in values))
    return file


def parquet(file: Path, column: str = "text", values: Sequence[Any] = TEXTS) -> Path:
    pyarrow = pytest.importorskip("pyarrow")
    pytest.importorskip("pyarrow.parquet").write_table(
        pyarrow.table({"id": range(len(values)), column: values}), file
    )
    return file


def plain(file: Path) -> Path:
    file.write_text("\n".join(TEXTS))
    return file


def tokens_of(text: str, special: bool = True) -> list[int]:
    return AutoTokenizer.from_pretrained(TINY)(text, add_special_tokens=special)["input_ids"]


def loaded(
    model: Path, source: object, samples: int = 10_000, length: int = 32, seed: int = 0
) -> CalibrationData:
    return load_calibration_data(
        CalibrationConfig(str(source), samples, length, seed), model, CONFIG
    )


# --- packing
# ----------------------------------------------------------------------


def test_packing_loses_and_repeats_no_token(model: Path, tmp_path: Path) -> None:
    sequences = loaded(model, json_lines(tmp_path / "a.jsonl"))
    bos, *tokens = tokens_of("\n".join(TEXTS))
    assert sequences.input_ids.shape == (len(tokens) // 31, 32)
    assert sequences.input_ids.dtype == torch.int64
    assert set(sequences.input_ids[:, 0].tolist()) == {bos}
    without_bos = sequences.input_ids[:, 1:].flatten().tolist()
    assert without_bos == tokens[: len(without_bos)]


@pytest.mark.parametrize("write", [json_lines, parquet])
def test_every_kind_of_file_gives_the_same_tokens(
    model: Path, tmp_path: Path, write: Callable[[Path], Path]
) -> None:
    kind = write.__name__.replace("json_lines", "jsonl")
    sequences = loaded(model, write(tmp_path / f"a.{kind}"))
    same = loaded(model, plain(tmp_path / "a.txt"))
    assert torch.equal(sequences.input_ids, same.input_ids)
    assert sequences.digest == same.digest
    assert (sequences.source, same.source) == (f"a.{kind}", "a.txt")


@pytest.mark.parametrize("write", [json_lines, plain, parquet])
def test_where_few_are_wanted_the_beginning_is_read_and_gives_the_same(
    model: Path, tmp_path: Path, write: Callable[[Path], Path]
) -> None:
    file = write(
        tmp_path
        / ("a" + {"json_lines": ".jsonl", "plain": ".txt", "parquet": ".parquet"}[write.__name__])
    )
    assert torch.equal(loaded(model, file, samples=2).input_ids, loaded(model, file).input_ids[:2])


def test_lines_that_are_not_needed_are_not_read(model: Path, tmp_path: Path) -> None:
    file = json_lines(tmp_path / "a.jsonl")
    file.write_text(file.read_text() + "not JSON\n")
    assert loaded(model, file, samples=2).input_ids.shape == (2, 32)
    with pytest.raises(DataError, match="line 81: not valid JSON"):
        loaded(model, file, samples=2, seed=1)


def test_text_of_uncommonly_long_tokens_is_read_as_far_as_needed(
    model: Path, tmp_path: Path
) -> None:
    (model / "tokenizer.json").write_text(word_tokenizer(200))
    (tmp_path / "a.txt").write_text(" ".join(["x" * 200] * 500))
    result = load_calibration_data(CalibrationConfig(str(tmp_path / "a.txt"), 4, 16), model, {})
    assert result.input_ids.shape == (4, 16)
    assert not result.warnings


def word_tokenizer(width: int) -> str:
    from tokenizers import Tokenizer, models, pre_tokenizers

    tokenizer = Tokenizer(models.WordLevel({"<unk>": 0, "x" * width: 1}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return tokenizer.to_str()


def test_the_same_choice_gives_the_same_and_another_seed_another_draw_of_the_same_sequences(
    model: Path, tmp_path: Path
) -> None:
    file = json_lines(tmp_path / "a.jsonl")
    everything = {tuple(row) for row in loaded(model, file).input_ids.tolist()}
    draws = [loaded(model, file, samples=8, seed=seed) for seed in (0, 0, 1, 1, 2)]
    assert [draws[0].digest == draw.digest for draw in draws] == [True, True, False, False, False]
    assert draws[2].digest == draws[3].digest != draws[4].digest
    for draw in draws:
        rows = [tuple(row) for row in draw.input_ids.tolist()]
        assert len(set(rows)) == 8
        assert set(rows) <= everything


def test_the_digest_depends_on_the_shape(model: Path, tmp_path: Path) -> None:
    # a tokenizer without BOS: one token of a text after another, however it is cut
    (model / "tokenizer.json").write_text(word_tokenizer(2))
    (tmp_path / "a.txt").write_text(" ".join(["xx"] * 500))
    one, other = loaded(model, tmp_path / "a.txt", 4, 32), loaded(model, tmp_path / "a.txt", 8, 16)
    assert torch.equal(one.input_ids.flatten(), other.input_ids.flatten())
    assert one.digest != other.digest


# --- chats
# ----------------------------------------------------------------------


@pytest.mark.parametrize("write", [json_lines, parquet])
def test_chats_go_through_the_template(
    model: Path, tmp_path: Path, write: Callable[..., Path]
) -> None:
    give_template(model)
    sequences = loaded(
        model,
        write(tmp_path / ("a.jsonl" if write is json_lines else "a.parquet"), "messages", CHATS),
    )
    rendered = "\n".join(f"<s>[user] {text}[assistant] Noted." for text in TEXTS)
    bos, *tokens = tokens_of(rendered, special=False)
    assert set(sequences.input_ids[:, 0].tolist()) == {bos}
    assert sequences.input_ids[:2, 1:].flatten().tolist() == tokens[:62]


def test_a_chat_without_a_template_is_refused(model: Path, tmp_path: Path) -> None:
    with pytest.raises(
        DataError, match="line 1: a chat, and the model's tokenizer has no chat template"
    ):
        loaded(model, json_lines(tmp_path / "a.jsonl", "messages", CHATS))


def test_a_template_that_refuses_is_quoted(model: Path, tmp_path: Path) -> None:
    give_template(model, "{{ raise_exception('roles must alternate') }}")
    with pytest.raises(
        DataError, match=r"line 1: the tokenizer's chat template .* \(roles must alternate\)"
    ):
        loaded(model, json_lines(tmp_path / "a.jsonl", "messages", CHATS))


# --- how much there is
# ----------------------------------------------------------------------


def test_the_default_text_needs_nothing(model: Path) -> None:
    result = load_calibration_data(
        CalibrationConfig(), model, {**CONFIG, "max_position_embeddings": 1024}
    )
    assert result.source == "the text that ships with bitpress"
    assert not result.warnings
    assert result.input_ids.shape[1] == 512
    assert result.input_ids.shape[0] > 128


def test_too_little_is_said_with_how_much_there_was(model: Path, tmp_path: Path) -> None:
    count = len(tokens_of("\n".join(TEXTS)))
    [warning] = loaded(model, json_lines(tmp_path / "a.jsonl"), samples=900).warnings
    # BOS takes one token of each sequence
    num_full = (count - 1) // 31
    assert warning == f"{num_full} of 900 sequences of 32 tokens: a.jsonl holds {count:,} tokens"
    [warning] = load_calibration_data(
        CalibrationConfig(samples=5000, sequence_length=64), model, CONFIG
    ).warnings
    assert "of 5000 sequences of 64 tokens: the text that ships with bitpress holds" in warning


def test_less_than_one_sequence_is_one_shorter_sequence(model: Path, tmp_path: Path) -> None:
    count = len(tokens_of(TEXTS[0] + "\n" + TEXTS[1]))
    sequences = loaded(
        model, json_lines(tmp_path / "a.jsonl", values=TEXTS[:2]), samples=4, length=100
    )
    assert sequences.input_ids.shape == (1, count)
    assert sequences.warnings == (
        f"0 of 4 sequences of 100 tokens, one of {count} tokens: a.jsonl holds {count} tokens",
    )


@pytest.mark.parametrize("nested", [False, True])
def test_a_length_beyond_the_model_s_is_cut_with_a_warning(
    model: Path, tmp_path: Path, nested: bool
) -> None:
    config = {"text_config": CONFIG} if nested else CONFIG
    result = load_calibration_data(
        CalibrationConfig(str(json_lines(tmp_path / "a.jsonl")), 2, 4096), model, config
    )
    assert result.input_ids.shape == (2, 128)
    assert result.warnings == (
        "sequences of 4096 tokens cut to 128, the model's max_position_embeddings",
    )


# --- parquet and datasets
# ----------------------------------------------------------------------


def test_a_parquet_file_without_texts_is_refused(model: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no column text or messages, but id, prompt"):
        loaded(model, parquet(tmp_path / "a.parquet", "prompt"))
    with pytest.raises(DataError, match=r"a\.parquet, row 2: an object"):
        loaded(model, parquet(tmp_path / "a.parquet", values=["a", None]))
    (tmp_path / "a.parquet").write_bytes(b"not parquet at all")
    with pytest.raises(DataError, match="cannot be read as parquet"):
        loaded(model, tmp_path / "a.parquet")


def test_a_dataset_is_streamed_by_name_and_subset(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    requests: list[tuple[Any, ...]] = []

    def load_dataset(
        name: str, subset: str | None, *, split: str, revision: str | None, streaming: bool
    ) -> list[dict[str, str]]:
        requests.append((name, subset, split, revision, streaming))
        if name == "gone":
            raise ConnectionError("Couldn't reach the Hub\nmore of it")
        return [{"text": text} for text in TEXTS]

    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset))
    sequences = loaded(model, "someone/texts:small")
    assert requests == [("someone/texts", "small", "train", None, True)]
    assert sequences.source == "someone/texts:small"
    assert torch.equal(sequences.input_ids, loaded(model, plain(tmp_path / "a.txt")).input_ids)
    with pytest.raises(
        DataError, match=r"gone: it is neither a file nor a dataset .* \(Couldn't reach the Hub\)$"
    ):
        loaded(model, "gone")
