"""Arguments and options that several commands share, how they are declared, and how those that
belong together become one value.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import attrs
import click
from attrs import frozen

from bitpress.cli.click_classes import Argument
from bitpress.cli.completion import (
    complete_computing_device,
    complete_device,
    complete_file,
    complete_scheme,
    complete_setting,
)
from bitpress.cli.text import store_is_quiet, store_is_verbose, store_wants_json, warn
from bitpress.planning.arguments import read_size
from bitpress.planning.evaluation_config import CHECK_TEXT
from bitpress.schemes.hardware import Hardware, find_device
from bitpress.schemes.values import EFFORT_LEVELS, NORMAL_EFFORT

# Where the value of an option's old name is kept in click's context.
OLD_NAME_VALUE = "bitpress.old_name_value"

# Gives a command an argument, or several.
Decorator = Callable[[Any], Any]


def argument(name: str, metavar: str, help: str, **kwargs: Any) -> Decorator:
    """A decorator that adds an argument to a command."""
    return click.argument(name, cls=Argument, metavar=metavar, help=help, **kwargs)


def number(name: str, help: str, default: int) -> Decorator:
    """A decorator that adds an option whose value is a whole number."""
    return click.option(name, metavar="N", type=int, default=default, help=help)


def combine(*decorators: Decorator) -> Decorator:
    """Several decorators as one, in the order in which `--help` shows their options."""

    def decorate(command: Any) -> Any:
        # click lists first what is applied last
        for decorator in reversed(decorators):
            command = decorator(command)
        return command

    return decorate


def collect(**values: type) -> Decorator:
    """A decorator that builds attrs values out of a command's options, by the names of their
    fields: `collect(recipe=RecipeSource)` hands one `recipe` on in place of `scheme`, `file`,
    `settings` and `ignore`. It stands next to the command, under what declares the options.
    """

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        @functools.wraps(command)
        def call(**arguments: Any) -> None:
            for name, cls in values.items():
                names = [field for field in attrs.fields_dict(cls) if field in arguments]
                arguments[name] = cls(**{field: arguments.pop(field) for field in names})
            command(**arguments)

        return call

    return decorate


def _parse_size(context: click.Context, parameter: click.Parameter, text: str | None) -> int | None:
    return read_size(parameter.opts[0], text)


def _negate(context: click.Context, parameter: click.Parameter, is_set: bool) -> bool:
    return not is_set


def serve_on(help: str, old_name: str | None = None) -> Decorator:
    """The option that names the device on which a result will be served, as a Hardware or None.

    Args:
        old_name: of the release before, which works in this one still and warns.
    """

    def store_old_value(
        context: click.Context, parameter: click.Parameter, name: str | None
    ) -> None:
        if name is not None:
            warn([f"{old_name} is now --serve-on; the old name goes with the next release"])
            context.meta[OLD_NAME_VALUE] = name

    def find_hardware(
        context: click.Context, parameter: click.Parameter, name: str | None
    ) -> Hardware | None:
        # click looks at options that were given before those that were not
        name = name or context.meta.get(OLD_NAME_VALUE)
        return None if name is None else find_device(name)

    option = click.option(
        "--serve-on",
        metavar="DEVICE",
        shell_complete=complete_device,
        callback=find_hardware,
        help=help,
    )
    if old_name is None:
        return option
    old_option = click.option(old_name, hidden=True, expose_value=False, callback=store_old_value)
    return combine(option, old_option)


def calibration_size(samples: int) -> Decorator:
    """The options of a CalibrationConfig that say how much is run."""
    return combine(
        number("--samples", "Number of calibration sequences.", samples), sequence_length
    )


def calibration(samples: int) -> Decorator:
    """The options of a CalibrationConfig, `samples` sequences if the user asks for no number."""
    return combine(
        click.option(
            "--calibration",
            "source",
            metavar="FILE|FOLDER|DATASET",
            shell_complete=complete_file,
            help="Calibration texts: a file, a folder, a dataset, or mixed or prose, which ship.",
        ),
        calibration_size(samples),
        number("--seed", "0 takes sequences from the start; others draw them at random.", 0),
        click.option(
            "--all-experts",
            is_flag=True,
            help="Fit every expert to all tokens, not only to those sent to it.",
        ),
    )


FILE = click.Path(path_type=Path)

model = argument(
    "model",
    "MODEL",
    "A model folder, or a name on the Hugging Face Hub.",
    shell_complete=complete_file,
)

out = argument("out", "OUT", "A folder that bitpress wrote.", type=FILE)

as_json = click.option(
    "--json",
    is_flag=True,
    expose_value=False,
    callback=store_wants_json,
    help="Print one JSON document and nothing else.",
)

lists_all = click.option(
    "--all", "lists_all", is_flag=True, help="List every layer, also those that are alike."
)

# How much is said of the work.
verbosity = combine(
    click.option(
        "-q",
        "--quiet",
        is_flag=True,
        expose_value=False,
        callback=store_is_quiet,
        help="Show no progress.",
    ),
    click.option(
        "-v",
        "--verbose",
        is_flag=True,
        expose_value=False,
        callback=store_is_verbose,
        help="Print a line for each layer, and what computes; with an error, its traceback.",
    ),
)

effort = click.option(
    "--effort",
    type=click.Choice(EFFORT_LEVELS),
    metavar="|".join(EFFORT_LEVELS),
    default=NORMAL_EFFORT,
    help="low: as little data and time as a scheme can do with; high: its best rounding.",
)

settings = combine(
    effort,
    click.option(
        "--set",
        "settings",
        metavar="[SCHEME.]OPTION=VALUE",
        multiple=True,
        shell_complete=complete_setting,
        help="Set an option of a scheme; may be repeated.",
    ),
    click.option(
        "--ignore",
        metavar="PATTERN",
        multiple=True,
        help="Leave matching layers unchanged; may be repeated.",
    ),
)

# The options of a RecipeSource.
recipe = combine(
    click.option(
        "--scheme",
        metavar="NAME[+NAME]",
        shell_complete=complete_scheme,
        help="A scheme, or several joined by +.",
    ),
    click.option(
        "--recipe",
        "file",
        metavar="FILE",
        type=FILE,
        help="A TOML file that gives each layer its steps.",
    ),
    settings,
    click.option(
        "--copy",
        metavar="PATTERN",
        multiple=True,
        help="Copy matching files of the model's folder too; may be repeated.",
    ),
    click.option(
        "--head",
        metavar="SCHEME",
        shell_complete=complete_scheme,
        help="Compress the head (lm_head) too; fitted to the texts where the layers are.",
    ),
    click.option(
        "--embeddings",
        metavar="SCHEME",
        shell_complete=complete_scheme,
        help="Compress the embeddings too, without data.",
    ),
    click.option(
        "--more-bits",
        is_flag=True,
        help="Allow more bits per weight than the source holds.",
    ),
)

device_memory = click.option(
    "--memory",
    metavar="SIZE",
    callback=_parse_size,
    help="Memory of that device, for example 24GB; without it everything is taken to fit.",
)

sequence_length = number("--sequence-length", "Tokens per sequence.", 512)

threads = click.option(
    "--threads",
    "num_threads",
    metavar="N",
    type=click.IntRange(min=1),
    help="Number of threads (default: one per core).",
)

device = click.option(
    "--device",
    metavar="auto|cpu|cuda|cuda:N",
    default="cpu",
    shell_complete=complete_computing_device,
    help="Device that computes: auto takes a GPU where there is one; without calibration, cuda "
    "is every GPU.",
)

# Those of RunOptions that say what computes.
machine = combine(
    click.option(
        "--trust-remote-code", is_flag=True, help="Allow code in the model's folder to run."
    ),
    device,
    click.option(
        "--max-memory",
        metavar="SIZE",
        callback=_parse_size,
        help="Memory limit, for example 4GB; a run that needs more is refused.",
    ),
    threads,
)

devices = click.option(
    "--devices",
    metavar="auto|N,N",
    help="GPUs of this machine that share the run, in a process each: their numbers, or auto for "
    "all.",
)

max_device_memory = click.option(
    "--max-device-memory",
    metavar="SIZE",
    callback=_parse_size,
    help="Limit of the GPU's memory in a calibrated run, for example 20GB (default: what is free).",
)

# Those of RunOptions that say what the result must pass.
proof = combine(
    click.option(
        "--check",
        is_flag=False,
        flag_value=CHECK_TEXT,
        metavar="[TEXT]",
        shell_complete=complete_file,
        help="Compare the result's predictions with its source's, on a text that ships or on TEXT.",
    ),
    click.option(
        "--max-kl",
        metavar="X",
        type=float,
        help="Limit of the KL divergence (nats per token); if exceeded, exit code 1.",
    ),
    click.option(
        "--no-verify",
        "verify",
        is_flag=True,
        callback=_negate,
        help="Do not read the output back; compute no digests.",
    ),
)


base_model = click.option(
    "--base-model",
    metavar="NAME",
    help="Hub name of the model, for the model card of a local folder.",
)


@frozen
class Deployment:
    """For what a plan is made.

    Attributes:
        tensor_parallel: ranks of the engine that will serve the result.
        serve_on: the device that will serve it; None: this machine's.
        world_size: processes that will share the run.
        num_threads: of each; None: its share of the cores.
    """

    tensor_parallel: int = 1
    serve_on: Hardware | None = None
    world_size: int = 1
    num_threads: int | None = None


# The options of a Deployment.
deployment = combine(
    click.option(
        "--tensor-parallel",
        metavar="N",
        default=1,
        help="Ranks of the engine that will serve the result.",
    ),
    serve_on(
        "Device that will serve the result, for example H100 (default: this machine's).",
        old_name="--hardware",
    ),
    click.option(
        "--world-size",
        metavar="N",
        type=click.IntRange(min=1),
        default=1,
        help="Processes that torchrun starts for the run.",
    ),
    threads,
)
