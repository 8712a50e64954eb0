"""What a shell completes: names of schemes, of their options and of devices, and files."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

import attrs
import click
from click.shell_completion import CompletionItem

from bitpress.schemes.hardware import DEVICES
from bitpress.schemes.registry import Scheme, discover

# Of --device, with what each computes on.
COMPUTING_DEVICES = {
    "auto": "a GPU where there is one",
    "cpu": "the CPU",
    "cuda": "the first GPU, or all",
    "cuda:0": "one GPU by its number",
}


def complete_file(
    context: click.Context, parameter: click.Parameter, incomplete: str
) -> list[CompletionItem]:
    """Files and folders, which the shell finds."""
    return [CompletionItem(incomplete, type="file")]


def complete_scheme(
    context: click.Context, parameter: click.Parameter, incomplete: str
) -> list[CompletionItem]:
    """Installed schemes; after a `+` another one."""
    before, plus, name = incomplete.rpartition("+")
    names = {scheme.name: scheme.summary for scheme in discover().schemes.values()}
    return _starting_with(name.lower(), names, f"{before}{plus}")


def complete_candidate(
    context: click.Context, parameter: click.Parameter, incomplete: str
) -> list[CompletionItem]:
    """Installed schemes and `none`, after a comma another one; after `NAME:` the options of that
    scheme.
    """
    start = re.split(r"[,+:]", incomplete)[-1]
    before = incomplete.removesuffix(start)
    registry = discover()
    if before.endswith(":"):
        # the scheme itself stands before its first option
        name = re.split(r"[,+]", before)[-1].partition(":")[0]
        scheme = registry.schemes.get(registry.canonical_name(name))
        settings = {} if scheme is None else _settings([scheme])
        return _starting_with(start, settings, before)
    names = {scheme.name: scheme.summary for scheme in registry.schemes.values()}
    if not before.endswith("+"):
        names["none"] = "leave the layer as it is"
    return _starting_with(start.lower(), names, before)


def complete_setting(
    context: click.Context, parameter: click.Parameter, incomplete: str
) -> list[CompletionItem]:
    """Options of the schemes that stand before it on the line, or of all."""
    registry = discover()
    chosen = (context.params.get("scheme") or "").split("+")
    names = set(map(registry.canonical_name, chosen))
    schemes = [scheme for name, scheme in registry.schemes.items() if name in names]
    return _starting_with(incomplete, _settings(schemes or registry.schemes.values()))


def _settings(schemes: Iterable[Scheme]) -> dict[str, str | None]:
    """The options of schemes as they are typed, each with its help."""
    return {
        f"{field.name}=": field.metadata.get("help")
        for scheme in schemes
        for field in attrs.fields(scheme.options_type)
    }


def _starting_with(
    start: str, helps: Mapping[str, str | None], before: str = ""
) -> list[CompletionItem]:
    return [
        CompletionItem(f"{before}{word}", help=help)
        for word, help in helps.items()
        if word.startswith(start)
    ]


def complete_device(
    context: click.Context, parameter: click.Parameter, incomplete: str
) -> list[CompletionItem]:
    """Devices whose name is one word without the vendor, which no shell splits."""
    names = [device.name.split(maxsplit=1)[1] for device in DEVICES]
    return [
        CompletionItem(name)
        for name in names
        if " " not in name and name.lower().startswith(incomplete.lower())
    ]


def complete_computing_device(
    context: click.Context, parameter: click.Parameter, incomplete: str
) -> list[CompletionItem]:
    """What --device takes."""
    return _starting_with(incomplete, COMPUTING_DEVICES)
