"""From texts to token sequences: what a model is run on, the same for the same choice, with no
padding.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import attrs
import torch
from attrs import frozen
from torch import Tensor

from bitpress.checkpoint.digests import read_stamp
from bitpress.checkpoint.model_config import ModelConfig
from bitpress.errors import CheckpointError, DataError, first_line
from bitpress.modeling import bundled_texts, metrics, sequences, text_sources
from bitpress.modeling.chat_templates import ChatRenderer
from bitpress.planning.calibration_config import CalibrationConfig
from bitpress.planning.evaluation_config import EvaluationConfig

# Tokens of a lone sequence: a shorter one says nothing about a model.
MIN_TOKENS = 16

# Characters that are read at first for each token that is needed; a token of prose has three to
# five. Every character that is tokenized takes some 200 bytes.
CHARACTERS_PER_TOKEN = 6


@frozen(eq=False)
class CalibrationData:
    """Token sequences, every one full.

    Attributes:
        input_ids: (sequences, length) int64.
        source: for people: a file's name, a dataset's, or "the text that ships with bitpress".
        digest: SHA-256 of shape and ids: the same ids have the same digest, wherever they come
            from.
        warnings: what the user should know, such as that there was less text than asked for.
        seed: that they were drawn with.
        all_experts: whether every expert is given all of them.
        depends_on_day: whether a chat template has written the date into them.
        text_stamp: size in bytes and time of change in ns of the file of texts; None for others.
        prefix: what the tokenizer begins a text with, and so every sequence: "<s>"; mostly BOS.
    """

    input_ids: Tensor
    source: str
    digest: str
    warnings: tuple[str, ...]
    seed: int = 0
    all_experts: bool = False
    depends_on_day: bool = False
    text_stamp: tuple[int, int] | None = None
    prefix: str = ""

    def with_tokens(self, input_ids: Tensor) -> CalibrationData:
        """The same with other tokens, (sequences, length) int64."""
        return attrs.evolve(self, input_ids=input_ids, digest=_digest(input_ids))


@frozen(eq=False)
class EvaluationText:
    """The tokens from a text's start in full sequences, and for each token the one that follows it.
    With BOS before them, every token of the text is predicted once, the first of a sequence too.

    Attributes:
        input_ids: (sequences, length) int64.
        target_ids: (sequences, length) int64, `metrics.NO_TARGET` where what follows is of the
            prefix that every sequence begins with.
        source: for people, a file's name or a dataset's.
        digest: SHA-256 of shape and ids of the inputs.
        warnings: what the user should know, such as which chats were left out.
    """

    input_ids: Tensor
    target_ids: Tensor
    source: str
    digest: str
    warnings: tuple[str, ...] = ()


def load_evaluation_text(
    config: EvaluationConfig,
    folder: Path,
    model_config: Mapping[str, Any],
    trust_remote_code: bool = False,
) -> EvaluationText:
    """Tokens of a text, made as those of `load_calibration_data`, in sequences that do not overlap.

    Args:
        folder: of the model whose tokenizer makes them.
        model_config: the content of that model's config.json.

    Raises:
        DataError: the numbers are none, or the text cannot be read or is too short.
        CheckpointError: the folder has no usable tokenizer, or one that does not belong to this
            config.
    """
    length, num_tokens = config.sequence_length, config.max_tokens
    if length < 1 or num_tokens < 1:
        raise DataError(f"{num_tokens} tokens in sequences of {length}: both are at least 1")
    tokenizer = _load_tokenizer(folder, trust_remote_code)
    # one more than is judged: each is judged by the token that follows it
    text = _tokenize(CalibrationConfig(config.text), num_tokens + 1, tokenizer)
    _check_vocabulary(text, tokenizer, folder, model_config)
    text = text.with_room_for_prefix(length).first(num_tokens + 1)
    if len(text) <= MIN_TOKENS:
        raise DataError(
            f"{text.source}: it gives {len(text)} tokens, too few to judge a model by; give a "
            "longer text"
        )

    max_length = ModelConfig.from_json(model_config).max_position_embeddings or length
    length = min(length, len(text) - 1, max_length)
    windows = text.cut(length + 1, overlap=1)
    input_ids, target_ids = windows[:, :-1].clone(), windows[:, 1:].clone()
    # what predicts the rest of a prefix of several tokens was never asked to
    target_ids[:, : max(len(text.prefix) - 1, 0)] = metrics.NO_TARGET
    return EvaluationText(input_ids, target_ids, text.source, _digest(input_ids), text.warnings)


def load_calibration_data(
    config: CalibrationConfig,
    folder: Path,
    model_config: Mapping[str, Any],
    trust_remote_code: bool = False,
) -> CalibrationData:
    """Full sequences of tokens, made by the tokenizer of a model folder from the texts chosen.

    Texts are joined by single newlines and tokenized once, as one string, which is cut into
    sequences from its start; a last one that is not full is left out. Every sequence begins as the
    tokenizer begins a text, with BOS where it adds that: some models (Gemma) never see a text
    without, and compute other hidden states there. A chat becomes a text through the tokenizer's
    chat template.

    Args:
        folder: of the model whose tokenizer makes them.
        model_config: the content of that model's config.json.

    Raises:
        DataError: the config's numbers are none, or the texts cannot be read or are too short for
            even one short sequence.
        CheckpointError: the folder has no usable tokenizer, or one that does not belong to this
            config.
    """
    config.require_valid()
    length, warnings = _limit_length(config.sequence_length, model_config)
    tokenizer = _load_tokenizer(folder, trust_remote_code)
    text = _tokenize(config, config.samples * length, tokenizer)
    warnings += text.warnings
    if text.depends_on_day:
        warnings.append(
            "the model's chat template writes the date: on another day the same command has other "
            "tokens, and makes other files"
        )
    _check_vocabulary(text, tokenizer, folder, model_config)
    text = text.with_room_for_prefix(length)
    if len(text) < min(length, MIN_TOKENS):
        raise DataError(
            f"{text.source}: it gives {len(text)} tokens, too few to run a model on; give a longer "
            "text"
        )

    cut_length = min(length, len(text))
    all_ids = text.cut(cut_length)
    num_sequences = len(all_ids)
    input_ids = _draw(all_ids, config.seed)[: config.samples].clone()

    if (num_sequences < config.samples or cut_length < length) and not _is_default(config):
        num_full, shorter = num_sequences, ""
        if cut_length < length:
            num_full, shorter = 0, f", one of {cut_length} tokens"
        warnings.append(
            f"{num_full} of {config.samples} sequences of {length} tokens{shorter}: {text.source} "
            f"holds {len(text):,} tokens"
        )
    return CalibrationData(
        input_ids,
        text.source,
        _digest(input_ids),
        tuple(warnings),
        config.seed,
        config.all_experts,
        text.depends_on_day,
        _read_text_stamp(config.source),
        "".join(tokenizer.convert_ids_to_tokens(text.prefix.tolist())),
    )


def _is_default(config: CalibrationConfig) -> bool:
    """Whether the numbers are nobody's wish, and the text that ships is as long as it is."""
    is_bundled = config.source is None or bundled_texts.is_bundled(config.source)
    return is_bundled and config.shape == CalibrationConfig().shape


def _draw(sequences: Tensor, seed: int) -> Tensor:
    """Sequences in an order drawn by lot; with seed 0 in their own."""
    if not seed:
        return sequences
    generator = torch.Generator().manual_seed(seed)
    return sequences[torch.randperm(len(sequences), generator=generator)]


def _limit_length(length: int, model_config: Mapping[str, Any]) -> tuple[int, list[str]]:
    """The length of sequences that a model takes, and a warning where it is another."""
    max_length = ModelConfig.from_json(model_config).max_position_embeddings
    if max_length is None or length <= max_length:
        return length, []
    return max_length, [
        f"sequences of {length} tokens cut to {max_length}, the model's max_position_embeddings"
    ]


def _read_text_stamp(source: object) -> tuple[int, int] | None:
    """The stamp of a file of texts; None for folders, datasets and lists."""
    is_file = isinstance(source, str) and Path(source).is_file()
    return read_stamp(Path(str(source))) if is_file else None


@frozen(eq=False)
class _TokenizedText:
    """A text's tokens, and what the tokenizer begins a text with.

    Attributes:
        tokens: (tokens,) int64.
        prefix: (prefix tokens,) int64; none for many tokenizers.
        depends_on_day: whether a chat template has written the date into it.
    """

    tokens: Tensor
    prefix: Tensor
    source: str
    warnings: tuple[str, ...]
    depends_on_day: bool

    def __len__(self) -> int:
        """The tokens of the text as one sequence, its prefix included."""
        return len(self.tokens) + self._num_inserted

    @property
    def _num_inserted(self) -> int:
        # a chat template writes the token that begins a sequence itself
        return 0 if sequences.begins_with(self.tokens, self.prefix) else len(self.prefix)

    def first(self, num_tokens: int) -> _TokenizedText:
        """No more than so many tokens, the prefix included."""
        return attrs.evolve(self, tokens=self.tokens[: num_tokens - self._num_inserted])

    def with_room_for_prefix(self, length: int) -> _TokenizedText:
        """Without the prefix where sequences are so short that nothing else would be in them."""
        return self if len(self.prefix) < length else attrs.evolve(self, prefix=self.prefix[:0])

    def cut(self, length: int, overlap: int = 0) -> Tensor:
        """Full sequences, each with the prefix; (sequences, length) int64."""
        return sequences.cut_sequences(self.tokens, self.prefix, length, overlap)


def _tokenize(config: CalibrationConfig, num_tokens: int, tokenizer: Any) -> _TokenizedText:
    """The tokens of the texts: all, or with seed 0 the first ones, so many or more where there are
    so many.
    """
    prefix = sequences.find_prefix(tokenizer)
    # Where the first tokens are all that is needed, the beginning of the text is all that is read:
    # a tokenizer hardly looks further than a word ahead, so that they are the same, and nobody
    # waits for gigabytes to be tokenized for them.
    max_characters = None if config.seed else CHARACTERS_PER_TOKEN * num_tokens
    source = config.source
    if source is None:
        source = bundled_texts.choose_default(bool(getattr(tokenizer, "chat_template", None)))
    day = bundled_texts.DAY if bundled_texts.is_bundled(source) else None
    with ChatRenderer(tokenizer, day) as renderer:
        while True:
            texts = text_sources.read(source, max_characters, renderer.render)
            if texts.input_ids:
                # as they are: whoever made them has begun them as the model needs it
                tokens = torch.tensor(texts.input_ids, dtype=torch.int64)
                return _TokenizedText(tokens, prefix[:0], texts.source, texts.warnings, False)
            text = texts.text
            has_bos = bool(tokenizer.bos_token) and text.startswith(tokenizer.bos_token)
            # with a prefix each sequence gets its own, and none the token that ends a text
            add_special_tokens = not len(prefix) and not has_bos
            ids = tokenizer(text, add_special_tokens=add_special_tokens, verbose=False)["input_ids"]
            if max_characters is None or len(text) < max_characters or len(ids) >= num_tokens:
                tokens = torch.tensor(ids, dtype=torch.int64)
                return _TokenizedText(
                    tokens, prefix, texts.source, texts.warnings, renderer.writes_date
                )
            # a text of uncommonly long tokens
            max_characters *= CHARACTERS_PER_TOKEN


def _load_tokenizer(folder: Path, trust_remote_code: bool) -> Any:
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(
            folder, local_files_only=True, trust_remote_code=trust_remote_code
        )
    except Exception as e:
        # whatever the parsers of its files raise
        hint = ""
        if "trust_remote_code" in str(e):
            hint = "; if you trust that code, --trust-remote-code runs it"
        raise CheckpointError(
            f"{folder}: no usable tokenizer, which running the model on text needs "
            f"({first_line(e)}){hint}"
        ) from None


def _check_vocabulary(
    text: _TokenizedText, tokenizer: Any, folder: Path, model_config: Mapping[str, Any]
) -> None:
    """Raise CheckpointError where a tokenizer gives ids that the model has no embedding for."""
    vocab_size = ModelConfig.from_json(model_config).vocab_size
    largest = max((int(ids.max()) for ids in (text.prefix, text.tokens) if len(ids)), default=0)
    if vocab_size is not None and largest >= vocab_size:
        raise CheckpointError(
            f"{folder}: its tokenizer gives the token id {largest} "
            f"({tokenizer.convert_ids_to_tokens(largest)!r}) and the config's vocab_size is "
            f"{vocab_size}; they are not of one model"
        )


def _digest(ids: Tensor) -> str:
    """SHA-256 of shape and numbers; as little-endian int64 on every machine."""
    digest = hashlib.sha256(repr(tuple(ids.shape)).encode())
    digest.update(ids.numpy().astype("<i8").tobytes())
    return digest.hexdigest()
