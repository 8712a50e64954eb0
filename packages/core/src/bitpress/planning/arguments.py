"""What callers of the Python API write, as the types that are meant: a text for a list of one, a
number as a text, a path in place of a text. Anything else is an error that names the argument.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from bitpress.errors import BitpressError, DataError, RecipeError
from bitpress.planning.calibration_config import CalibrationConfig, TextSource
from bitpress.planning.evaluation_config import CHECK_TEXT
from bitpress.planning.recipe_source import RecipeSource
from bitpress.planning.run_options import RunOptions
from bitpress.planning.search_goal import Budget
from bitpress.schemes.hardware import Hardware, find_device
from bitpress.schemes.values import EFFORT_LEVELS, NORMAL_EFFORT

# What takes several values: a list, or one alone.
Texts = str | Iterable[str] | None

# The same, or a table of options, of which those of a scheme may be one themselves.
Settings = Texts | Mapping[str, Any]

# Texts to calibrate or to evaluate on.
Calibration = str | Path | Iterable[str | Mapping[str, Any]] | None

# A size for people: `4GB`, `500 MB`, `1.5g`, `4GiB`, which is taken for 4GB.
SIZE = re.compile(r"\s*([\d.]+)\s*([kmgt]?)i?b?\s*")


def read_recipe_source(
    scheme: object, recipe: object, changes: tuple[object, ...], copy: object
) -> RecipeSource:
    """A scheme or a recipe, and what is changed in it.

    Args:
        changes: settings, patterns of layers to ignore, the level of effort, the schemes of head
            and embeddings, and whether layers may get more bits than the source has.
    """
    settings, ignore, effort, head, embeddings, more_bits = changes
    recipe = read_recipe(recipe)
    return RecipeSource(
        read_scheme(scheme),
        recipe if isinstance(recipe, Path) else None,
        read_settings(settings),
        read_texts("ignore", ignore),
        read_texts("copy", copy),
        recipe if isinstance(recipe, dict) else None,
        read_effort(effort),
        read_scheme(head),
        read_scheme(embeddings),
        read_flag("more_bits", more_bits),
    )


def read_calibration_config(
    source: object, size: tuple[object, object, object], defaults: CalibrationConfig
) -> CalibrationConfig:
    """What a model is calibrated on.

    Args:
        size: samples, sequence length and seed.
        defaults: which hold for those that are None.
    """
    samples, length, seed = size
    return CalibrationConfig(
        read_source("calibration", source),
        read_count("samples", samples, defaults.samples),
        read_count("sequence_length", length, defaults.sequence_length),
        read_count("seed", seed, defaults.seed),
        read_flag("all_experts", defaults.all_experts),
    )


def read_run_options(
    device: object, threads: object, max_memory: object, trust_remote_code: object
) -> RunOptions:
    """What computes, and with how much."""
    return RunOptions(
        read_device(device),
        read_threads(threads),
        read_size("max_memory", max_memory),
        trust_remote_code=read_flag("trust_remote_code", trust_remote_code),
    )


def read_path(name: str, value: Any) -> Path:
    """A file or a folder."""
    if not isinstance(value, (str, os.PathLike)) or not os.fspath(value):
        raise BitpressError(f"{name}: a path is expected, not {_describe(value)}")
    return Path(os.fspath(value))


def read_check(value: Any) -> TextSource | None:
    """A text to check a result on, or whether to check it on the one that ships."""
    if value is None or isinstance(value, bool):
        return CHECK_TEXT if value else None
    return read_source("check", value)


def read_model(name: str, value: Any) -> str:
    """A model folder, or a name on the Hub."""
    if isinstance(value, (str, os.PathLike)) and os.fspath(value):
        return str(os.fspath(value))
    fix = "; save it with save_pretrained, and give that folder"
    raise BitpressError(
        f"{name}: a folder or a Hub name is expected, not {_describe(value)}"
        f"{fix if hasattr(value, 'save_pretrained') else ''}"
    )


def read_texts(name: str, value: Any) -> tuple[str, ...]:
    """A list of texts, of which a lone one may stand for itself."""
    if value is None:
        return ()
    if isinstance(value, (str, Path)):
        return (str(value),)
    if isinstance(value, Iterable) and not isinstance(value, (Mapping, bytes)):
        texts = tuple(value)
        if all(isinstance(text, (str, Path)) for text in texts):
            return tuple(map(str, texts))
        value = next(text for text in texts if not isinstance(text, (str, Path)))
    raise RecipeError(f"{name}: a text or a list of texts is expected, not {_describe(value)}")


def read_settings(value: Any) -> tuple[str, ...]:
    """`[SCHEME.]OPTION=VALUE` texts, or a table of them, of which a scheme's may be one itself."""
    if not isinstance(value, Mapping):
        return read_texts("settings", value)
    settings: list[str] = []
    for key, item in value.items():
        if isinstance(item, Mapping):
            settings += [f"{key}.{setting}" for setting in read_settings(item)]
        else:
            text = item if isinstance(item, str) else json.dumps(item, default=str)
            settings.append(f"{key}={text}")
    return tuple(settings)


def read_scheme(value: Any) -> str | None:
    """A scheme's name, or several that become one text joined by `+`."""
    if isinstance(value, (list, tuple)) and value and all(isinstance(n, str) for n in value):
        return "+".join(value)
    if value is None or isinstance(value, str):
        return value
    raise RecipeError(
        f"scheme: the name of a scheme is expected, not {_describe(value)}; `bitpress schemes` "
        "lists them, and recipe= takes a file or a table"
    )


def read_recipe(value: Any) -> Path | dict[str, Any] | None:
    """A recipe's file, or what is in one as a table."""
    if value is None:
        return None
    if isinstance(value, (str, os.PathLike)):
        return read_path("recipe", value)
    if isinstance(value, Mapping):
        try:
            # tuples become lists, as a file has them
            table: dict[str, Any] = json.loads(json.dumps(dict(value)))
            return table
        except (TypeError, ValueError, RecursionError) as e:
            raise RecipeError(f"recipe: it is no table as a recipe file holds it ({e})") from None
    raise RecipeError(
        f"recipe: a TOML file or a table as it holds is expected, not {_describe(value)}"
    )


def read_source(name: str, value: Any) -> TextSource | None:
    """A file, a folder, a dataset's name, or texts or rows themselves."""
    if value is None:
        return None
    if isinstance(value, (str, os.PathLike)):
        return str(os.fspath(value))
    hint = ""
    if isinstance(value, Mapping):
        hint = "; a lone row goes into a list, and of several splits choose one"
    elif hasattr(value, "to_dict") and hasattr(value, "columns"):
        hint = '; for a pandas frame give frame.to_dict("records")'
    elif isinstance(value, (set, frozenset)):
        hint = ": a set has no order"
    if hint or not isinstance(value, Iterable) or isinstance(value, bytes):
        raise DataError(
            f"{name}: a file, a dataset's name, or a list of texts or rows is expected, not "
            f"{_describe(value)}{hint}"
        )
    return tuple(value)


def read_count(name: str, value: Any, default: int) -> int:
    """A whole number, perhaps as a text; the default for None."""
    if value is None:
        return default
    count = _read_int(value)
    if count is None:
        raise BitpressError(f"{name}: a whole number is expected, not {_describe(value)}")
    return count


def read_threads(value: Any) -> int | None:
    """How many threads; None leaves it to the run."""
    if value is None:
        return None
    num_threads = read_count("threads", value, 1)
    if num_threads < 1:
        raise BitpressError(f"threads: {num_threads} is not 1 or more; None takes one per core")
    return num_threads


def read_number(name: str, value: Any) -> float:
    """A number, perhaps as a text."""
    try:
        if isinstance(value, bool):
            raise TypeError
        return float(value)
    except (TypeError, ValueError):
        raise BitpressError(f"{name}: a number is expected, not {_describe(value)}") from None


def read_size(name: str, value: Any) -> int | None:
    """Bytes, or a text such as `4GB`; None for no limit.

    Raises:
        RecipeError: it is neither.
    """
    if value is None:
        return None
    num_bytes = _read_int(value)
    if num_bytes is None and isinstance(value, str):
        num_bytes = _parse_size(value)
    if num_bytes is None or num_bytes < 0:
        shown = value if isinstance(value, str) else _describe(value)
        raise RecipeError(f"{name} {shown}: a size such as 4GB or 500MB is expected")
    return num_bytes


def read_budget(name: str, value: Any) -> Budget:
    """Bits per weight as a number, perhaps as a text, or a text such as `4GB`.

    Raises:
        RecipeError: it is neither.
    """
    text = f"{value:g}" if isinstance(value, float) else str(value).strip()
    try:
        return Budget(text, bits=read_number(name, value))
    except BitpressError:
        num_bytes = _parse_size(value) if isinstance(value, str) else None
    if num_bytes is None:
        raise RecipeError(
            f"{name}: a number of bits, or a size such as 4GB, is expected, not {_describe(value)}"
        )
    return Budget(text, num_bytes=num_bytes)


def _parse_size(text: str) -> int | None:
    match = SIZE.fullmatch(text.lower())
    try:
        return round(float(match[1]) * 1000 ** " kmgt".index(match[2] or " ")) if match else None
    except ValueError:
        return None


def read_effort(value: Any) -> str:
    """A level of effort; None for the normal one."""
    if value is None:
        return NORMAL_EFFORT
    if value not in EFFORT_LEVELS:
        levels = ", ".join(EFFORT_LEVELS)
        raise RecipeError(f"effort: one of {levels} is expected, not {_describe(value)}")
    return str(value)


def read_flag(name: str, value: Any) -> bool:
    """True or False."""
    if not isinstance(value, bool):
        raise BitpressError(f"{name}: True or False is expected, not {_describe(value)}")
    return value


def read_device(value: Any) -> str:
    """What computes, by its name: a text, a `torch.device`, or None for the CPU."""
    if value is None:
        return "cpu"
    # by its name, since importing torch takes a second
    if not isinstance(value, str) and type(value).__name__ != "device":
        raise BitpressError(
            f'device: "cpu", "cuda", "cuda:N" or a torch.device is expected, not {_describe(value)}'
        )
    return str(value)


def read_hardware(name: str, value: Any) -> Hardware | None:
    """What will serve a model: a known device's name, or a `Hardware`; None for the one present."""
    if value is None or isinstance(value, Hardware):
        return value
    if isinstance(value, str):
        return find_device(value)
    raise BitpressError(
        f'{name}: a device that serves, such as "H100", is expected, not {_describe(value)}'
    )


def _read_int(value: Any) -> int | None:
    """A whole number, as a text and as a float too; None for anything else."""
    if isinstance(value, bool):
        return None
    try:
        return int(value) if int(value) == float(value) else None
    except (TypeError, ValueError, OverflowError):
        return None


def _describe(value: Any) -> str:
    """A value for a message: a short text itself, of others the type."""
    if value is None or isinstance(value, (bool, int, float)):
        return repr(value)
    if isinstance(value, str):
        return f"{value[:60]!r}"
    return f"{type(value).__name__}" if not isinstance(value, type) else f"the class {value}"
