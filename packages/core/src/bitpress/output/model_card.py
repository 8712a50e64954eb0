"""The model card of an output: `README.md`, with the front matter that the Hub reads, and what was
done with which result.

Nothing in it depends on the folders, the device or the threads of a run: the same run writes the
same card anywhere.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from attrs import frozen

from bitpress.checkpoint.filenames import MODEL_CARD
from bitpress.output.manifest import Manifest

# bytes of a card whose front matter is read
LARGEST = 1 << 20

# characters of front matter that are read: parsing many takes long
FRONT = 1 << 16

# characters of a value that is carried over
LONGEST = 200

ON_HUB = re.compile(r"[\w.-]+(/[\w.-]+)?")

CARRIED = ("license", "license_name", "license_link", "language", "pipeline_tag")


@frozen
class Made:
    """What the manifest does not say of a run.

    Attributes:
        command: that makes the same model again.
        before: bytes of the source's weight files.
        after: of the output's.
        source: the folder whose card is carried over.
        kept: the name that the source's card has now; None where it has none.
    """

    command: str
    before: int
    after: int
    source: Path
    kept: str | None


def command(model: str, words: Mapping[str, object]) -> str:
    """The command line, folders left out: `bitpress compress MODEL OUT --scheme ...`.

    Args:
        words: options with their values; None and False are left out, True has no value, of a list
            each is given.
    """
    found = ["bitpress", "compress", model, "OUT"]
    for option, value in words.items():
        for one in value if isinstance(value, (list, tuple)) else [value]:
            if one is not None and one is not False:
                found += (
                    [option]
                    if one is True
                    else [option, Path(one).name if isinstance(one, Path) else str(one)]
                )
    return shlex.join(found)


def text(note: Manifest, made: Made) -> str:
    """The card."""
    import yaml

    front = yaml.safe_dump(_front(note, made), sort_keys=False, allow_unicode=True)
    return f"---\n{front}---\n\n" + "\n".join(_body(note, made)) + "\n"


def _front(note: Manifest, made: Made) -> dict[str, Any]:
    base = (
        {"base_model": note.source, "base_model_relation": "quantized"}
        if ON_HUB.fullmatch(note.source)
        else {}
    )
    carried = _metadata(made.source / MODEL_CARD)
    own = {
        "library_name": "transformers",
        "tags": ["bitpress", "compressed-tensors", *note.schemes],
    }
    return {**base, **{key: carried[key] for key in CARRIED if key in carried}, **own}


def _metadata(file: Path) -> Mapping[str, Any]:
    """The front matter of a card; empty where there is none that can be read."""
    import yaml

    if not file.is_file() or file.stat().st_size > LARGEST:
        return {}
    found = re.match(
        r"\ufeff?---\r?\n(.*?)\r?\n---",
        file.read_text(encoding="utf-8", errors="replace"),
        re.DOTALL,
    )
    try:
        table = yaml.safe_load(found[1]) if found and len(found[1]) <= FRONT else {}
    except Exception:
        # of any kind: whatever a stranger has written
        return {}
    return {
        key: value
        for key, value in (table.items() if isinstance(table, dict) else ())
        if _is_plain(value) or (isinstance(value, list) and all(map(_is_plain, value)))
    }


def _is_plain(value: Any) -> bool:
    """A line of text, or true or false."""
    return isinstance(value, bool) or (
        isinstance(value, str) and len(value) <= LONGEST and value.isprintable()
    )


def _body(note: Manifest, made: Made) -> Iterator[str]:
    name = _escaped(note.source)
    yield f"# {name}, {' + '.join(note.schemes)}\n"
    yield (
        f"{name}, made smaller by bitpress {note.bitpress} with "
        f"{', '.join(note.schemes.values())}:\n"
    )
    yield f"```\n{made.command}\n```\n"
    if made.kept:
        yield f"What the model is and may be used for says [its own card]({made.kept}).\n"
    yield "| | |\n|---|---|"
    ratio = made.before / made.after
    yield (
        f"| weight files | {made.before / 1e6:,.2f} MB before, {made.after / 1e6:,.2f} MB now "
        f"({ratio:.2f}x smaller) |"
    )
    yield (
        f"| compressed layers | {len(note.layers)}, {note.bits:.2f} bits per weight, scales "
        "included |"
    )
    if note.data:
        yield (
            f"| calibrated on | {int(note.data['tokens']):,} tokens of "
            f"{_escaped(note.data['source'])} |"
        )
    errors = {layer: found.error for layer, found in note.layers.items() if found.error is not None}
    if errors:
        worst = max(errors, key=lambda layer: errors[layer])
        yield (
            f"| relative error of a layer's weights | at most {errors[worst]:.5f} "
            f"({_escaped(worst)}), measured on the files |"
        )
    if note.check and note.check.kl is not None and note.check.top1 is not None:
        found = note.check
        yield (
            f"| measured on | {found.tokens:,} tokens of {_escaped(found.text)}, run as it will "
            "be served |"
        )
        yield f"| KL divergence from the source | {found.kl:.6f} nats per token |"
        yield f"| the same most likely token | {found.top1:.3%} |"
        yield f"| perplexity | {found.perplexity:.4f}, the source's {found.source_perplexity:.4f} |"
    yield (
        "\n`vllm serve` reads it as it is, and so does transformers with the "
        "`compressed-tensors` library."
    )
    yield (
        "`bitpress.json` holds the recipe with every option, the error of every layer, and the "
        "SHA-256 of every file, by which"
    )
    yield "`bitpress verify` proves them."


def _escaped(text: str) -> str:
    """One line without Markdown's or HTML's signs, whatever a stranger has named a model."""
    line = "".join(sign if sign.isprintable() else " " for sign in text)
    return re.sub(r"([\\`*\[\]<>|#])", r"\\\1", line)
