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

from bitpress.checkpoint.engine_facts import architecture_of
from bitpress.checkpoint.filenames import MODEL_CARD
from bitpress.checkpoint.model_config import KEY
from bitpress.errors import printable
from bitpress.output.manifest import Check, Manifest
from bitpress.planning.loaders import Loaders

# Bytes of a card whose front matter is read.
MAX_CARD_BYTES = 1 << 20

# Characters of front matter that are read: parsing many takes long.
MAX_FRONT_MATTER = 1 << 16

# Characters of a value that is carried over.
MAX_VALUE = 200

# Front matter as the Hub finds it. huggingface_hub 2.4 would read it too, but refuses a whole
# card for one odd key (a number, `tags: 3`), reads front matter of any size, and logs a warning for
# a card that has none.
FRONT_MATTER = re.compile(r"\ufeff?---\r?\n(.*?)\r?\n---", re.DOTALL)

HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")

CARRIED = ("license", "license_name", "license_link", "language", "pipeline_tag")


@frozen
class RunDetails:
    """What the manifest does not say of a run.

    Attributes:
        command: that makes the same model again.
        source_bytes: size of the source's weight files.
        output_bytes: size of the output's weight files.
        source: the folder whose card is carried over.
        source_card: the name that the source's card has in the output; None where it has none.
        base_model: the Hub name of the source; None where it is not known.
        config: the content of the output's `config.json`.
        loaders: what is known of how loaders take the output.
        cache: how keys and values are kept while serving; None: as the model computes them.
    """

    command: str
    source_bytes: int
    output_bytes: int
    source: Path
    source_card: str | None
    base_model: str | None
    config: Mapping[str, Any]
    loaders: Loaders
    cache: str | None = None


def format_command(model: str, options: Mapping[str, object]) -> str:
    """The command line, folders left out: `bitpress compress MODEL OUT --scheme ...`.

    Args:
        options: with their values; None and False are left out, True has no value, of a list each
            is given.
    """
    words = ["bitpress", "compress", model, "OUT"]
    for option, option_value in options.items():
        values = option_value if isinstance(option_value, (list, tuple)) else [option_value]
        for value in values:
            if value is True:
                words.append(option)
            elif value is not None and value is not False:
                words += [option, value.name if isinstance(value, Path) else str(value)]
    return shlex.join(words)


def render_card(manifest: Manifest, details: RunDetails) -> str:
    """The content of the card."""
    import yaml

    metadata = yaml.safe_dump(_metadata(manifest, details), sort_keys=False, allow_unicode=True)
    body = "\n".join(_render_body(manifest, details))
    return f"---\n{metadata}---\n\n{body}\n"


def _metadata(manifest: Manifest, details: RunDetails) -> dict[str, Any]:
    """The front matter, in the order in which it is written."""
    metadata: dict[str, Any] = {}
    if details.base_model is not None:
        metadata |= {"base_model": details.base_model, "base_model_relation": "quantized"}
    if (task := find_task(details.config)) is not None:
        metadata["pipeline_tag"] = task
    source_metadata = _read_metadata(details.source / MODEL_CARD)
    metadata |= {key: source_metadata[key] for key in CARRIED if key in source_metadata}
    formats = ["compressed-tensors"] if KEY in details.config else []
    return metadata | {
        "library_name": "transformers",
        "tags": ["bitpress", *formats, *manifest.schemes],
    }


def find_task(config: Mapping[str, Any]) -> str | None:
    """The Hub's name of what a model does, by its architecture; None where that does not say."""
    architecture = architecture_of(config)
    has_images, has_sounds = (
        any(isinstance(config.get(f"{part}_config"), dict) for part in parts)
        for parts in (("vision",), ("audio", "thinker", "speech"))
    )
    if has_images and has_sounds:
        return "any-to-any"
    if has_images or has_sounds:
        return f"{'image' if has_images else 'audio'}-text-to-text"
    if architecture.endswith(("ForCausalLM", "LMHeadModel")):
        return "text-generation"
    if architecture.endswith(("ForSequenceClassification", "ForTokenClassification")):
        return "text-classification" if "Sequence" in architecture else "token-classification"
    return None


def _read_metadata(file: Path) -> Mapping[str, Any]:
    """The front matter of a card; empty where there is none that can be read."""
    import yaml

    if not file.is_file() or file.stat().st_size > MAX_CARD_BYTES:
        return {}
    match = FRONT_MATTER.match(file.read_text(encoding="utf-8", errors="replace"))
    if not match or len(match[1]) > MAX_FRONT_MATTER:
        return {}
    try:
        table = yaml.safe_load(match[1])
    except Exception:
        # Of any kind (ValueError for a bad date, RecursionError): a stranger has written it.
        return {}
    return {
        key: value
        for key, value in (table.items() if isinstance(table, dict) else ())
        if _is_plain(value) or (isinstance(value, list) and all(map(_is_plain, value)))
    }


def _is_plain(value: Any) -> bool:
    """A line of text, or true or false."""
    return isinstance(value, bool) or (
        isinstance(value, str) and len(value) <= MAX_VALUE and value.isprintable()
    )


def _render_body(manifest: Manifest, details: RunDetails) -> Iterator[str]:
    name = _escaped(manifest.source)
    yield f"# {name}, {_escaped(' + '.join(manifest.schemes))}\n"
    yield (
        f"{name}, made smaller by bitpress {_escaped(manifest.bitpress)} with "
        f"{_escaped(', '.join(manifest.schemes.values()))}:\n"
    )
    # The command may hold a name with backticks, which end no longer fence than they are.
    fence = "`" * max([3, *(len(run) + 1 for run in re.findall("`+", details.command))])
    yield f"{fence}\n{printable(details.command)}\n{fence}\n"
    if details.source_card:
        yield f"What the model is and may be used for says [its own card]({details.source_card}).\n"
    yield "| | |\n|---|---|"
    before, after = details.source_bytes, details.output_bytes
    yield (
        f"| weight files | {before / 1e6:,.2f} MB before, {after / 1e6:,.2f} MB now ("
        f"{before / after:.2f}x smaller) |"
    )
    if manifest.layers:
        yield (
            f"| compressed layers | {len(manifest.layers)}, {manifest.bits:.2f} bits per weight, "
            "scales included |"
        )
    if details.cache is not None:
        yield f"| keys and values, while serving | {_escaped(details.cache)} |"
    if manifest.data:
        yield (
            f"| calibrated on | {int(manifest.data['tokens']):,} tokens of "
            f"{_escaped(manifest.data['source'])} |"
        )
    errors = {
        layer: record.error for layer, record in manifest.layers.items() if record.error is not None
    }
    if errors:
        worst = max(errors, key=lambda layer: errors[layer])
        yield (
            f"| relative error of a layer's weights | at most {errors[worst]:.5f} ("
            f"{_escaped(worst)}), measured on the files |"
        )
    if manifest.check:
        yield from _render_check(manifest.check)
    yield ""
    yield from _render_loaders(details)
    yield from _render_proof(manifest)


def _render_loaders(details: RunDetails) -> Iterator[str]:
    """How it is served and loaded, as far as that is known of this output."""
    loaders, is_plain = details.loaders, KEY not in details.config
    if loaders.vllm_reason is None:
        yield f"Serve it with vLLM (on {_escaped(loaders.vllm_devices or '')}):\n"
        commands = [f"pip install {plugin}" for plugin in loaders.vllm_plugins]
        yield "\n".join(["```", *commands, "vllm serve OUT", "```\n"])
    else:
        yield f"Not known to be served by vLLM: {_escaped(loaders.vllm_reason)}.\n"
    if loaders.transformers_reason is not None:
        yield f"Not known to load in transformers: {_escaped(loaders.transformers_reason)}.\n"
    elif loaders.needs_dequantizing:
        yield (
            "transformers loads it, with the `compressed-tensors` library, if it is given "
            "`quantization_config=CompressedTensorsConfig(dequantize=True)`.\n"
        )
    elif is_plain:
        yield "transformers loads it like the model that it was made of.\n"
    else:
        yield "transformers loads it with the `compressed-tensors` library.\n"


def _render_proof(manifest: Manifest) -> Iterator[str]:
    """What `bitpress.json` holds of this output."""
    has_errors = all(layer.error is not None for layer in manifest.layers.values())
    has_digests = all(file.sha256 is not None for file in manifest.files.values())
    facts = ["the recipe with every option"]
    if has_errors:
        facts.append("the error of every layer")
    facts.append(
        "the SHA-256 of every file" if has_digests else "the SHA-256 of the header of every file"
    )
    yield f"`bitpress.json` holds {', '.join(facts[:-1])}, and {facts[-1]}, by which"
    yield "`bitpress verify` proves them."


def _render_check(check: Check) -> Iterator[str]:
    """How far the predictions are from the source's, where that was measured."""
    if check.kl is None or check.top1 is None:
        return
    yield (
        f"| measured on | {check.tokens:,} tokens of {_escaped(check.text)}, run as it will be "
        "served |"
    )
    yield f"| KL divergence from the source | {check.kl:.6f} nats per token |"
    yield f"| the same most likely token | {check.top1:.3%} |"
    yield f"| perplexity | {check.perplexity:.4f}, the source's {check.source_perplexity:.4f} |"


def _escaped(text: str) -> str:
    """One line without Markdown's or HTML's signs, whatever a stranger has named a model."""
    line = "".join(sign if sign.isprintable() else " " for sign in text)
    line = re.sub(r"([\\`*\[\]<>|#&~])", r"\\\1", line)
    # Underscores inside of a word are no emphasis.
    line = re.sub(r"(?<![^\W_])_|_(?![^\W_])", r"\\_", line)
    # GitHub makes links of addresses.
    return re.sub(r"(?i)\b(www)\.", r"\1\\.", line.replace("://", r"\://"))
