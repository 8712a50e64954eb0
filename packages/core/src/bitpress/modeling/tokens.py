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

from bitpress.checkpoint.model_config import ModelConfig
from bitpress.errors import CheckpointError, DataError, first_line
from bitpress.modeling import text_sources
from bitpress.planning.calibration_config import CalibrationConfig

# tokens: a lone sequence shorter than this says nothing about a model
SHORTEST = 16

# characters read per token wanted; a token of prose has three to five
GENEROUS = 16


@frozen(eq=False)
class Sequences:
    """Token sequences, every one full.

    Attributes:
        ids: (sequences, length) int64.
        source: for people: a file's name, a dataset's, or "the text that ships with bitpress".
        digest: SHA-256 of shape and ids: the same ids have the same digest, wherever they come
            from.
        warnings: what the user should know, such as that there was less text than asked for.
        seed: that they were drawn with.
        all_experts: whether every expert is given all of them.
    """

    ids: Tensor
    source: str
    digest: str
    warnings: tuple[str, ...]
    seed: int = 0
    all_experts: bool = False


@frozen(eq=False)
class Stretch:
    """The tokens from a text's start in full sequences, and for each token the one that follows it.

    Attributes:
        inputs: (sequences, length) int64.
        targets: (sequences, length) int64.
        source: for people, a file's name or a dataset's.
        digest: SHA-256 of shape and ids of the inputs.
    """

    inputs: Tensor
    targets: Tensor
    source: str
    digest: str


def stretch(
    source: str,
    length: int,
    most: int,
    folder: Path,
    config: Mapping[str, Any],
    trust_remote_code: bool = False,
) -> Stretch:
    """At most so many tokens of a text, tokenized as `load` does, in sequences of `length` that do
    not overlap.

    Raises:
        DataError: the numbers are none, or the text cannot be read or is too short.
        CheckpointError: the folder has no usable tokenizer, or one that does not belong to this
            config.
    """
    if length < 1 or most < 1:
        raise DataError(f"{most} tokens in sequences of {length}: both are at least 1")
    tokenizer = _tokenizer(folder, trust_remote_code)
    tokens, name = _tokenize(CalibrationConfig(source), most + 1, tokenizer)
    _check_vocabulary(tokens, tokenizer, folder, config)
    tokens = tokens[: most + 1]
    if len(tokens) <= SHORTEST:
        raise DataError(
            f"{name}: it gives {len(tokens)} tokens, too few to judge a model by; give a longer "
            "text"
        )
    longest = ModelConfig.from_json(config).max_position_embeddings or length
    size = min(length, len(tokens) - 1, longest)
    count = (len(tokens) - 1) // size
    inputs, targets = (tokens[start : start + count * size].view(count, size) for start in (0, 1))
    return Stretch(inputs, targets, name, _digest(inputs))


def load(
    choice: CalibrationConfig,
    folder: Path,
    config: Mapping[str, Any],
    trust_remote_code: bool = False,
) -> Sequences:
    """Full sequences of tokens, made by the tokenizer of a model folder from the texts chosen.

    Texts are joined by single newlines and tokenized once, as one string, which is cut into
    sequences from its start; a last one that is not full is left out. A chat becomes a text through
    the tokenizer's chat template.

    Raises:
        DataError: the choice is none, or the texts cannot be read or are too short for even one
            short sequence.
        CheckpointError: the folder has no usable tokenizer, or one that does not belong to this
            config.
    """
    if choice.samples < 1 or choice.sequence_length < 1 or not 0 <= choice.seed < 2**63:
        raise DataError(
            f"{choice.samples} sequences of {choice.sequence_length} tokens with seed "
            f"{choice.seed}: sequences and tokens are at least 1, a seed is from 0 to 2**63 - "
            "1"
        )
    warnings = []
    length = choice.sequence_length
    most = ModelConfig.from_json(config).max_position_embeddings
    if most is not None and length > most:
        warnings.append(
            f"sequences of {length} tokens cut to {most}, the model's max_position_embeddings"
        )
        length = most
    tokenizer = _tokenizer(folder, trust_remote_code)
    tokens, name = _tokenize(choice, choice.samples * length, tokenizer)
    _check_vocabulary(tokens, tokenizer, folder, config)
    if len(tokens) < min(length, SHORTEST):
        raise DataError(
            f"{name}: it gives {len(tokens)} tokens, too few to run a model on; give a longer text"
        )

    size = min(length, len(tokens))
    count = len(tokens) // size
    packed = tokens[: count * size].view(count, size)
    if choice.seed:
        packed = packed[torch.randperm(count, generator=torch.Generator().manual_seed(choice.seed))]
    ids = packed[: choice.samples].clone()

    # the default numbers are nobody's wish, and the text that ships is as long as it is
    if (count < choice.samples or size < length) and attrs.evolve(
        choice, seed=0, all_experts=False
    ) != CalibrationConfig():
        shorter = f", one of {size} tokens" if size < length else ""
        full = 0 if shorter else count
        warnings.append(
            f"{full} of {choice.samples} sequences of {length} tokens{shorter}: {name} holds "
            f"{len(tokens):,} tokens"
        )
    return Sequences(ids, name, _digest(ids), tuple(warnings), choice.seed, choice.all_experts)


def _tokenize(choice: CalibrationConfig, wanted: int, tokenizer: Any) -> tuple[Tensor, str]:
    """All tokens of the texts, or with seed 0 at least as many as wanted where there are so many;
    and the source's name.
    """

    def render(messages: list[Any]) -> str:
        if not tokenizer.chat_template:
            raise DataError(
                "a chat, and the model's tokenizer has no chat template; give it as one text"
            )
        try:
            return str(tokenizer.apply_chat_template(messages, tokenize=False))
        except Exception as e:
            # templates are programs, and raise what they like
            raise DataError(
                f"the tokenizer's chat template does not take these messages ({first_line(e)})"
            ) from None

    # Where the first tokens are all that is wanted, the beginning of the text is all that is read:
    # a tokenizer hardly looks further than a word ahead, so that they are the same, and nobody
    # waits for gigabytes to be tokenized for them.
    limit = None if choice.seed else GENEROUS * wanted
    while True:
        text, name = text_sources.read(choice.source, limit, render)
        # a chat template writes the token that begins a sequence itself
        begun = bool(tokenizer.bos_token) and text.startswith(tokenizer.bos_token)
        found = tokenizer(text, add_special_tokens=not begun, verbose=False)["input_ids"]
        if limit is None or len(text) < limit or len(found) >= wanted:
            return torch.tensor(found, dtype=torch.int64), name
        # a text of uncommonly long tokens
        limit *= GENEROUS


def _tokenizer(folder: Path, trust_remote_code: bool) -> Any:
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(
            folder, local_files_only=True, trust_remote_code=trust_remote_code
        )
    except Exception as e:
        # whatever the parsers of its files raise
        hint = (
            "; if you trust that code, --trust-remote-code runs it"
            if "trust_remote_code" in str(e)
            else ""
        )
        fact = first_line(e)
        raise CheckpointError(
            f"{folder}: no usable tokenizer, which running the model on text needs ({fact}){hint}"
        ) from None


def _check_vocabulary(
    tokens: Tensor, tokenizer: Any, folder: Path, config: Mapping[str, Any]
) -> None:
    size = ModelConfig.from_json(config).vocab_size
    if size is not None and len(tokens) and int(tokens.max()) >= size:
        token = int(tokens.max())
        raise CheckpointError(
            f"{folder}: its tokenizer gives the token id {token} ("
            f"{tokenizer.convert_ids_to_tokens(token)!r}) and the config's vocab_size is "
            f"{size}; they are not of one model"
        )


def _digest(ids: Tensor) -> str:
    return hashlib.sha256(
        repr(tuple(ids.shape)).encode() + ids.numpy().astype("<i8").tobytes()
    ).hexdigest()
