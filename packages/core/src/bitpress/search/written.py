"""A recipe that people can read and change, as a search writes it."""

from __future__ import annotations

import json
import tempfile
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import attrs

from bitpress.errors import OutputError
from bitpress.schemes import Step
from bitpress.search import Found
from bitpress.search.units import pattern


def free(file: Path) -> None:
    """Raise OutputError where there is a file already: a recipe may have been changed by hand."""
    if file.exists():
        raise OutputError(f"{file} exists already; delete it, or name another with --out")
    if not file.absolute().parent.is_dir():
        raise OutputError(f"{file}: there is no folder {file.absolute().parent}")


def write(found: Found, file: Path, model: str, budget: float) -> None:
    """Write the recipe whole, or not at all."""
    with tempfile.NamedTemporaryFile("w", encoding="utf-8", dir=file.absolute().parent, delete=False) as new:
        new.write(text(found, model, budget))
    Path(new.name).replace(file)


def text(found: Found, model: str, budget: float) -> str:
    """TOML: what most units get is the last rule, what others get comes before it, with what it saves."""
    default = Counter(found.chosen).most_common(1)[0][0]
    lines = [
        f"# {model}, at most {budget:g} bits per weight: {_figures(found, found.chosen)}",
        *(f"# {name} for all: {_figures(found, [i] * len(found.units))}" for i, name in enumerate(found.names)),
        "# KL: of the model as it is from what is left of it, in nats per token, expected from what each change costs alone",
    ]
    if ignored := found.plans[0].recipe.ignore:
        lines.append(f"ignore = {json.dumps(list(ignored))}")
    modules, container = list(found.plans[0].fragments), found.plans[0].container
    parts: dict[tuple[int, int], list[int]] = {}
    for number, (unit, choice) in enumerate(zip(found.units, found.chosen, strict=True)):
        if choice != default:
            parts.setdefault((unit.block(container), choice), []).append(number)
    for (block, choice), numbers in parts.items():
        names = [found.units[number].modules for number in numbers]
        whole = pattern([name for unit in names for name in unit], modules, f"{container}.{block}.*")
        saved = [found.damages[number][default] - found.damages[number][choice] for number in numbers]
        if len(whole) == 1:
            lines += _rule(whole[0], found.plans[choice].recipe.rules[0].steps, sum(saved))
            continue
        for members, less in zip(names, saved, strict=True):
            for match in pattern(members, modules):
                lines += _rule(match, found.plans[choice].recipe.rules[0].steps, less)
    return "\n".join([*lines, *_rule("*", found.plans[default].recipe.rules[0].steps), ""])


def _figures(found: Found, chosen: Sequence[int]) -> str:
    return f"{found.bits(chosen):.2f} bits, KL {found.damage(chosen):.5f}"


def _rule(match: str, steps: Sequence[Step], saved: float | None = None) -> list[str]:
    told = "" if saved is None else f"  # KL {-saved:+.6f}"
    return ["", "[[layers]]", f"match = {json.dumps(match)}{told}", f"steps = [{', '.join(map(_step, steps))}]"]


def _step(step: Step) -> str:
    """A scheme's name, with the options that are not its defaults."""
    usual = step.scheme.step().options
    set_to = {
        f.name: value for f in attrs.fields(type(usual)) if (value := getattr(step.options, f.name)) != getattr(usual, f.name)
    }
    if not set_to:
        return json.dumps(step.scheme.name)
    return f"{{ use = {json.dumps(step.scheme.name)}, {', '.join(f'{k} = {json.dumps(v)}' for k, v in set_to.items())} }}"
