"""What engines do with the layers of an architecture, as they answered when they were asked.

`tox run -e facts` asks vLLM and transformers, and writes one file for each in `engines/`.
"""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from importlib import resources
from typing import Any

from attrs import frozen

from bitpress.checkpoint import layer_names
from bitpress.checkpoint.safetensors import TensorSpec

# Kinds of layers that an engine asks its quantization config for.
QUANTIZABLE = ("linear", "experts")

# Others, for which it is asked if a model passes it on, and by name alone.
HEAD_KIND, EMBEDDING_KIND = "head", "embedding"
BY_NAME = (HEAD_KIND, EMBEDDING_KIND)

# The target that names the class of all linear layers.
EVERY_LINEAR = "Linear"

# Characters of the longest name of a layer that is matched with expressions.
MAX_NAME_LENGTH = 200


@frozen
class EngineLayer:
    """What an engine does with a layer of the files.

    Attributes:
        kind: "linear" or "experts", which may be quantized; "never", a linear layer that may not;
            "head", "embedding", "attention" or "other".
        asked_as: the names under which the engine looks for it in the quantization config.
        listed_as: what its name in the files becomes, where the config lists it: vLLM renames it.
    """

    kind: str
    asked_as: tuple[str, ...]
    listed_as: str

    @property
    def is_quantizable(self) -> bool:
        """Whether the engine asks how it is quantized: for heads and embeddings, under a name."""
        has_names = bool(self.asked_as) and all(self.asked_as)
        return self.kind in QUANTIZABLE or (self.is_by_name and has_names)

    @property
    def is_by_name(self) -> bool:
        """Whether it is a head or embeddings: the target `EVERY_LINEAR` does not stand for it."""
        return self.kind in BY_NAME


@frozen(eq=False, slots=False)
class EngineFacts:
    """An engine's answers for one architecture.

    Attributes:
        engine: its name and version.
        layers: by the name in files, with stars for numbers: the kind, or a table of it.
        packed: names of layers that the engine makes one of, by the name of that one.
        expert_leaves: names of the layers of an expert, by whose first it asks for all experts.
        tied: heads that files need not hold, and the embeddings that they are tied to.
        unnamed: its names, with stars, of linear layers that no tensor of the files is: they are
            made of others while these are loaded.
        limits: by the name in files, with stars: why a layer must stay as it is ("never"), may only
            be stored in tensors that have a row for each of its own ("rows_only"), or not with a
            tensor of the name given; why experts must stay in one tensor ("whole").
    """

    engine: str
    layers: Mapping[str, Any]
    packed: Mapping[str, Sequence[str]]
    expert_leaves: Sequence[str]
    tied: Mapping[str, str]
    unnamed: Sequence[str]
    limits: Mapping[str, Mapping[str, str]]

    @functools.cached_property
    def fused(self) -> tuple[tuple[str, ...], ...]:
        """The last parts of names of layers that the engine makes one of."""
        leaves: dict[tuple[str, str], list[str]] = {}
        for name, fact in self.layers.items():
            asked_as = fact.get("linear") if isinstance(fact, dict) else None
            if isinstance(asked_as, str):
                parent, _, leaf = name.rpartition(".")
                leaves.setdefault((parent, asked_as), []).append(leaf)
        return tuple(dict.fromkeys(tuple(group) for group in leaves.values() if len(group) > 1))

    @property
    def heads(self) -> list[str]:
        """The layers, by their names in files, whose outputs are logits."""
        return [
            name
            for name, fact in self.layers.items()
            if HEAD_KIND in (fact if isinstance(fact, dict) else [fact])
            or name.rpartition(".")[2] == "lm_head"
        ]

    @property
    def unnamed_examples(self) -> list[str]:
        """The layers of towers that no tensor of the files is, those of the first blocks for all.

        Those of the decoder are made of layers that may be compressed, and are then so too.
        """
        towers = filter(layer_names.OUTSIDE.search, self.unnamed)
        return [name.replace("*", "0") for name in towers]

    def layer(self, name: str) -> EngineLayer | None:
        """What the engine does with a layer; None where it was not asked for such a one.

        Args:
            name: in the files, without `.weight`.
        """
        return _layer(self, name)

    def why_not_quantized(self, name: str) -> str | None:
        """Why a layer must stay as it is; None where the engine may quantize it, or does not know
        it.
        """
        if limit := self._limit(name, "never"):
            return limit
        layer = self.layer(name)
        if layer is None or layer.is_quantizable:
            return None
        if layer.is_by_name:
            return f"{self.engine} looks for it under no name, and reads it as it is"
        return f"{self.engine} never quantizes it"

    def expert_names(self, module: str) -> tuple[str, Sequence[str]] | None:
        """What the engine calls the layers of single experts that the files hold in one tensor.

        Args:
            module: of the experts.

        Returns:
            The name before an expert's number, and the layers' names: gate, up, down; None where it
            reads no such layers.
        """
        for parent in (module, f"{module}.experts"):
            for leaves in layer_names.GATED_EXPERT:
                layers = [self.layer(f"{parent}.0.{leaf}") for leaf in leaves]
                if all(layer is not None and layer.kind == "experts" for layer in layers):
                    return parent, leaves
        return None

    def why_whole(self, module: str) -> str | None:
        """Why experts that files hold in one tensor must stay so; None where nothing is known.

        Args:
            module: of the experts.
        """
        return self._limit(module, "whole")

    def why_unreadable(self, name: str, suffix: str, spec: TensorSpec, num_rows: int) -> str | None:
        """Why the engine cannot read one of the tensors that are stored of a layer; None where it
        can.

        Args:
            suffix: what the tensor is called in the layer.
            num_rows: of the layer.
        """
        if reason := self._limit(name, suffix):
            return reason
        return None if spec.shape[:1] == (num_rows,) else self._limit(name, "rows_only")

    def _limit(self, name: str, kind: str) -> str | None:
        # Few architectures have any, and this is asked of every layer.
        if not self.limits:
            return None
        reason = self.limits.get(layer_names.star(name), {}).get(kind)
        return f"{self.engine}: {reason}" if reason else None


@frozen(eq=False)
class NamePatterns:
    """Names and regular expressions (`re:...`), as compressed-tensors matches them."""

    names: frozenset[str]
    expressions: tuple[re.Pattern[str], ...]

    @classmethod
    def parse(cls, patterns: Iterable[Any]) -> NamePatterns:
        """The patterns of a list in a quantization config."""
        texts = list(map(str, patterns))
        return cls(
            frozenset(text for text in texts if not text.startswith("re:")),
            tuple(re.compile(text[3:]) for text in texts if text.startswith("re:")),
        )

    def match(self, name: str) -> bool:
        """Whether one of them matches a name."""
        if name in self.names:
            return True
        # A longer one is no layer's, and would take long.
        return len(name) <= MAX_NAME_LENGTH and any(x.match(name) for x in self.expressions)


@frozen(eq=False)
class QuantizedLayers:
    """Which layers an engine takes for quantized, by a quantization config.

    Attributes:
        facts: of the engine.
        ignored: what the config leaves out, as the engine reads the names.
        groups: the targets of its groups, likewise.
    """

    facts: EngineFacts
    ignored: NamePatterns
    groups: Mapping[str, NamePatterns]

    @classmethod
    def read(cls, facts: EngineFacts, table: Mapping[str, Any]) -> QuantizedLayers:
        """What the engine makes of `quantization_config`."""

        def listed(names: Any) -> NamePatterns:
            return NamePatterns.parse(_as_listed(facts, str(name)) for name in names or ())

        groups = {
            name: listed(group.get("targets"))
            for name, group in (table.get("config_groups") or {}).items()
            if isinstance(group, dict)
        }
        return cls(facts, listed(table.get("ignore")), groups)

    def groups_of(self, layer: EngineLayer) -> list[str | None]:
        """The groups that a layer is in, once each; None stands for a name that is ignored, or is
        no target.
        """
        by_class = not layer.is_by_name
        return list(dict.fromkeys(self.group(name, by_class=by_class) for name in layer.asked_as))

    def group(self, name: str, *, by_class: bool = True) -> str | None:
        """The group in which the engine finds one of its layers; None: it is not quantized.

        Args:
            by_class: whether the target of all linear layers stands for it.
        """
        if self._match(self.ignored, name):
            return None
        for group, targets in self.groups.items():
            if (by_class and EVERY_LINEAR in targets.names) or self._match(targets, name):
                return group
        return None

    def _match(self, patterns: NamePatterns, name: str) -> bool:
        """Whether a layer is named, or all of those that the engine makes one layer of."""
        if patterns.match(name):
            return True
        parent, _, leaf = name.rpartition(".")
        parts = self.facts.packed.get(leaf, ())
        return bool(parts) and all(patterns.match(f"{parent}.{part}") for part in parts)


def facts_of(config: Mapping[str, Any]) -> tuple[EngineFacts, ...]:
    """The facts of every engine that holds the architecture of a `config.json`."""
    return tuple(facts for facts in _facts(*_key(config)) if facts is not None)


def engines_without(config: Mapping[str, Any]) -> list[str]:
    """The engines whose facts do not hold the architecture of a `config.json`."""
    by_engine = zip(_documents(), _facts(*_key(config)), strict=True)
    return [_engine(document) for document, facts in by_engine if facts is None]


def fused_leaves(engines: Iterable[EngineFacts]) -> list[Sequence[str]]:
    """The last parts of names of layers that engines make one of: those of all models, then those
    of this one.
    """
    return [*layer_names.FUSED, *(leaves for facts in engines for leaves in facts.fused)]


def is_embedding(layer: str, engines: Iterable[EngineFacts]) -> bool:
    """Whether a matrix is one of embeddings, as engines say, or else its name.

    Args:
        layer: its name in the files, without `.weight`.
    """
    kinds = {fact.kind for facts in engines if (fact := facts.layer(layer))}
    return kinds == {EMBEDDING_KIND} or (not kinds and "embed" in layer.rpartition(".")[2])


def is_head(layer: str, engines: Iterable[EngineFacts]) -> bool:
    """Whether a layer's outputs are logits, as engines say, or else its name.

    Args:
        layer: its name in the files, without `.weight`.
    """
    kinds = {fact.kind for facts in engines if (fact := facts.layer(layer))}
    return HEAD_KIND in kinds or layer.rpartition(".")[2] == "lm_head"


def architecture_of(config: Mapping[str, Any]) -> str:
    """The architecture, or else the model type, that a `config.json` names."""
    architectures = config.get("architectures")
    if isinstance(architectures, list) and architectures:
        return str(architectures[0])
    return str(config.get("model_type") or "a model without a type")


@functools.cache
def _documents() -> tuple[Mapping[str, Any], ...]:
    folder = resources.files("bitpress.checkpoint") / "engines"
    files = sorted(folder.iterdir(), key=lambda file: file.name)
    return tuple(json.loads(file.read_text(encoding="utf-8")) for file in files)


def _engine(document: Mapping[str, Any]) -> str:
    return f"{document['engine']} {document['version']}"


def _key(config: Mapping[str, Any]) -> tuple[str, str | None]:
    """An architecture, and, where the config names none, a model type that one class may have."""
    model_type = None if config.get("architectures") else config.get("model_type")
    return architecture_of(config), None if model_type is None else str(model_type)


# Kept for the models of a few runs: every layer is looked up several times.
@functools.lru_cache(maxsize=8)
def _facts(architecture: str, model_type: str | None) -> tuple[EngineFacts | None, ...]:
    """The facts of each engine."""
    return tuple(_find(document, architecture, model_type) for document in _documents())


def _find(
    document: Mapping[str, Any], architecture: str, model_type: str | None
) -> EngineFacts | None:
    architectures = document["architectures"]
    table = architectures.get(architecture)
    if model_type is not None:
        tables = [table for table in architectures.values() if table["model_type"] == model_type]
        table = tables[0] if len(tables) == 1 else None
    if table is None:
        return None
    return EngineFacts(
        _engine(document),
        table["layers"],
        table.get("packed", {}),
        table.get("experts_asked_as", ()),
        table.get("tied", {}),
        table.get("unnamed", ()),
        table.get("limits", {}),
    )


@functools.lru_cache(maxsize=1 << 18)
def _layer(facts: EngineFacts, name: str) -> EngineLayer | None:
    pattern = layer_names.star(name)
    fact = facts.layers.get(pattern)
    if fact is None:
        return None
    if isinstance(fact, str):
        # Embeddings that an engine asks for have a table.
        return EngineLayer(fact, () if fact == EMBEDDING_KIND else (name,), name)
    table = dict(fact)
    numbers = layer_names.numbers(name)
    listed_as = layer_names.fill(table.pop("listed_as", pattern), numbers)
    ((kind, asked_as),) = table.items()
    patterns = [asked_as] if isinstance(asked_as, str) else asked_as
    names = [layer_names.fill(pattern, numbers) for pattern in patterns]
    if kind == "experts" and facts.expert_leaves:
        names = [f"{name}.0.{leaf}" for name in names for leaf in facts.expert_leaves]
    return EngineLayer(kind, tuple(names), listed_as)


def _as_listed(facts: EngineFacts, name: str) -> str:
    layer = None if name.startswith("re:") else facts.layer(name)
    return name if layer is None else layer.listed_as
