"""Which files of a model folder, beside its weights, belong to the model: those that a loader
reads, and its papers. Whatever else lies there (logs, training state, keys) stays there.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from attrs import frozen

from bitpress.checkpoint.filenames import CONFIG, INDEX, MANIFEST, SOURCE_CARD, WEIGHT_SUFFIXES
from bitpress.errors import CheckpointError

# Files with settings that may name code in `auto_map`.
CONFIGS = (
    CONFIG,
    "tokenizer_config.json",
    "processor_config.json",
    "preprocessor_config.json",
    "video_preprocessor_config.json",
    "audio_tokenizer_config.json",
)

# What loaders read, in small letters; a star does not stand for a slash.
READ_BY_LOADERS = (
    *CONFIGS,
    "generation_config.json",
    # transformers 5.24: utils/hub.py. vLLM's --chat-template takes a file of any name.
    *("chat_template.json", "*.jinja", "chat_templates/*.jinja"),
    "additional_chat_templates/*.jinja",
    # tokenization_utils_base.py and tokenization_utils_tokenizers.py
    *("tokenizer.json", "tokenizer.model", "tokenizer.model.v*", "tokenizer.vocab"),
    *("special_tokens_map.json", "added_tokens.json"),
    # VOCAB_FILES_NAMES of models/*/tokenization_*.py
    *("vocab.json", "vocab.txt", "vocab.bpe", "vocab-src.json", "vocab-tgt.json"),
    *("entity_vocab.json", "target_vocab.json", "merges.txt", "bpe.codes", "dict.txt"),
    *("spiece.model", "spm.model", "spm_char.model", "source.spm", "target.spm"),
    *("sentencepiece.model", "sentencepiece.bpe.model", "*.tiktoken", "tiktoken.model"),
    *("word_shape.json", "word_pronunciation.json", "prophetnet.tokenizer", "normalizer.json"),
    *("emoji.json", "byte_maps.json"),
    # mistral-common
    "tekken.json",
    # generate() of the model itself, transformers' generation/utils.py
    *("custom_generate/*.py", "custom_generate/requirements.txt"),
    # sentence-transformers' modules, which vLLM's pooling models read too
    *("modules.json", "config_sentence_transformers.json", "sentence_*_config.json"),
    *("[0-9]_*/config.json", "[0-9]_*/sentence_*_config.json"),
)

# Papers, which a model is not passed on without.
PAPERS = re.compile(
    r"(README|[^/]*LICEN[SC]E([^./]|\.\d)*|COPYING[^./]*|NOTICE[^./]*|[^/]*USE_POLICY[^./]*)"
    r"(\.(md|txt|rst|html|pdf))?",
    re.IGNORECASE,
)

# Code that an `auto_map` names: a module of this folder and a class in it. One of another
# repository (`owner/name--module.Class`) is no file of this one.
CODE_REFERENCE = re.compile(r"(\w+)\.\w+")

# Modules that a module imports from its own folder, as transformers finds them
# (dynamic_module_utils.py).
RELATIVE_IMPORT = re.compile(r"^\s*(?:import\s+\.(\w+)\s*$|from\s+\.(\w+)\s+import)", re.MULTILINE)

# Bytes of a file that is searched for the names of others.
MAX_SEARCHED_BYTES = 1 << 22


@frozen
class SideFiles:
    """The files of a model folder beside its weights.

    Attributes:
        copied: relative paths of those that belong to the model, or that the user wants copied.
        left: of all others.
    """

    copied: tuple[str, ...]
    left: tuple[str, ...]


def choose_side_files(
    folder: Path, config: Mapping[str, Any], weights: Collection[str], patterns: Sequence[str] = ()
) -> SideFiles:
    """The files of a folder, told apart.

    Args:
        config: the content of its `config.json`.
        weights: names of the files that hold its tensors.
        patterns: further files to copy.

    Raises:
        CheckpointError: a file cannot be copied, or a pattern matches none that may be.
    """
    names = list(_list_files(folder))
    code = _find_code(folder, config, names)
    wanted = set()
    for pattern in patterns:
        matching = {name for name in names if fnmatchcase(name, pattern)}
        allowed = {name for name in matching if not is_weight_file(name)}
        if not allowed:
            fact = "matches only weights, which are not copied" if matching else "matches no file"
            raise CheckpointError(f"--copy {pattern}: it {fact} in {folder}")
        wanted |= allowed

    copied = [name for name in names if name in code or name in wanted or _belongs(name)]
    for name in copied:
        check_side_file(folder, folder / name)
    known = {*copied, *weights, INDEX, MANIFEST}
    return SideFiles(tuple(copied), tuple(name for name in names if name not in known))


def is_weight_file(name: str) -> bool:
    """Whether a file's name ends as those of weights do, in any format."""
    return name.lower().endswith(WEIGHT_SUFFIXES)


def _list_files(folder: Path) -> Iterator[str]:
    """Relative paths of all files that are not hidden."""
    for root, folders, files in os.walk(folder):
        folders[:] = sorted(f for f in folders if not f.startswith((".", "__pycache__")))
        for name in sorted(files):
            if not name.startswith("."):
                yield (Path(root) / name).relative_to(folder).as_posix()


def _belongs(name: str) -> bool:
    """Whether a file's name alone says that it belongs to a model."""
    if PAPERS.fullmatch(name) or SOURCE_CARD.fullmatch(name):
        return True
    return any(
        fnmatchcase(name.lower(), pattern) and name.count("/") == pattern.count("/")
        for pattern in READ_BY_LOADERS
    )


def _find_code(folder: Path, config: Mapping[str, Any], names: Collection[str]) -> set[str]:
    """The Python files that configs name, and those that these import."""
    modules = list(_named_modules(config))
    for name in CONFIGS[1:]:
        if name in names:
            modules += _named_modules(_read_json(folder / name))
    code: set[str] = set()
    while modules:
        name = f"{modules.pop()}.py"
        if name in names and name not in code:
            code.add(name)
            text = _read_start(folder / name).decode(errors="replace")
            modules += [first or second for first, second in RELATIVE_IMPORT.findall(text)]
    return code


def _named_modules(value: Any) -> Iterator[str]:
    """Modules that the `auto_map` of a config, or of a part of it, names."""
    tables = [value]
    while tables:
        table = tables.pop()
        if not isinstance(table, dict):
            continue
        for text in _texts(table.get("auto_map")):
            if match := CODE_REFERENCE.fullmatch(text):
                yield match[1]
        tables += table.values()


def _texts(value: Any) -> Iterator[str]:
    """All texts in a JSON value."""
    values = [value]
    while values:
        value = values.pop()
        if isinstance(value, str):
            yield value
        elif isinstance(value, (dict, list)):
            values += value.values() if isinstance(value, dict) else value


def _read_json(file: Path) -> Any:
    """A JSON value; None where a loader could not read it either."""
    try:
        return json.loads(_read_start(file))
    except (ValueError, RecursionError):
        return None


def _read_start(file: Path) -> bytes:
    try:
        # Opening a pipe would wait forever.
        if not file.is_file():
            return b""
        with file.open("rb") as f:
            return f.read(MAX_SEARCHED_BYTES)
    except OSError:
        return b""


def check_side_file(folder: Path, file: Path) -> None:
    """Raise CheckpointError unless a file can be copied: regular, readable, and no link out of the
    model folder, to a private key for example.

    The Hub's cache keeps a model's files as links into the `blobs` beside its `snapshots`.
    """
    if not file.is_file() or not os.access(file, os.R_OK):
        raise CheckpointError(
            f"{file}: not a regular file that can be read; mend it or take it away"
        )
    real, home = file.resolve(), folder.resolve()
    blobs = home.parents[1] / "blobs" if home.parent.name == "snapshots" else home
    if not real.is_relative_to(home) and not real.is_relative_to(blobs):
        raise CheckpointError(
            f"{file}: a link that leads out of the model's folder, to {real}; put the file itself "
            "there, if it belongs"
        )
