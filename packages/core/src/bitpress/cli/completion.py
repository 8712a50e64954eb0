"""What a shell completes: names of schemes, of their options and of devices, and files."""

from __future__ import annotations

import attrs
import click
from click.shell_completion import CompletionItem

from bitpress.schemes.hardware import DEVICES
from bitpress.schemes.registry import discover


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
    return [
        CompletionItem(f"{before}{plus}{scheme.name}", help=scheme.summary)
        for scheme in discover().schemes.values()
        if scheme.name.startswith(name.lower())
    ]


def complete_setting(
    context: click.Context, parameter: click.Parameter, incomplete: str
) -> list[CompletionItem]:
    """Options of the schemes that stand before it on the line, or of all."""
    registry = discover()
    chosen = (context.params.get("scheme") or "").split("+")
    names = set(map(registry.canonical_name, chosen))
    schemes = [scheme for name, scheme in registry.schemes.items() if name in names]
    settings = {
        f"{field.name}=": field.metadata.get("help")
        for scheme in schemes or registry.schemes.values()
        for field in attrs.fields(scheme.options_type)
    }
    return [
        CompletionItem(setting, help=help)
        for setting, help in settings.items()
        if setting.startswith(incomplete)
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
