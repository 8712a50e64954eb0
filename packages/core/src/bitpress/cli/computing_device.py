"""The device that a command computes on, of those that its options name. Torch is imported only
where they are read.
"""

from __future__ import annotations

import sys

import attrs
import click
from click.core import ParameterSource

from bitpress.planning.run_options import RunOptions


def resolve_device(run_options: RunOptions) -> tuple[RunOptions, tuple[str, ...]]:
    """The options with the device that `--device auto` takes, and a line that names it."""
    from bitpress.runtime import devices

    if run_options.device != devices.AUTO:
        return run_options, ()
    device = devices.resolve_name(run_options.device)
    return attrs.evolve(run_options, device=device), (devices.describe_choice(device),)


def choose_rank_device(names: str) -> str:
    """The device that this process takes of those that `--devices` names; the process that a user
    has started ends with the ranks that it starts.
    """
    from bitpress.runtime.operating_system import require_posix

    # before torch's launcher is imported, which needs more than Windows has
    require_posix()
    from bitpress.runtime import devices, launcher

    context = click.get_current_context()
    if context.get_parameter_source("device") is ParameterSource.COMMANDLINE:
        raise click.UsageError("--device and --devices cannot be combined", context)
    all_devices = devices.read_names(names)
    device = launcher.choose_rank_device(all_devices)
    if device is None:
        context.exit(launcher.launch_ranks(len(all_devices), sys.argv[1:]))
    return device
