"""How schemes are shown, and where they can be served."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any, get_type_hints

import attrs
from attrs import frozen

from bitpress.cli.text import print_table, say
from bitpress.errors import BitpressError, printable_line
from bitpress.schemes.hardware import Hardware, describe_devices
from bitpress.schemes.options import describe_type, format_value
from bitpress.schemes.registry import NO_SCHEMES, Registry, Step
from bitpress.schemes.values import NOTHING_KNOWN, USABLE, Finding


@frozen
class RegistrySummary:
    """Installed schemes, and what is broken."""

    registry: Registry
    devices: tuple[Hardware, ...]

    def as_json(self) -> dict[str, Any]:
        """Every scheme as SchemeSummary has it, and the problems."""
        schemes = [
            SchemeSummary(scheme.step(), self.devices).as_json()
            for scheme in self.registry.schemes.values()
        ]
        problems = [attrs.asdict(problem) for problem in self.registry.problems]
        return {"schemes": schemes, "problems": problems}

    def print_text(self) -> None:
        """A table of schemes; problems go to standard error."""
        rows = []
        for scheme in self.registry.schemes.values():
            step = scheme.step()
            rows.append(
                (
                    scheme.name,
                    f"{scheme.package} {scheme.version}",
                    "-" if step.options.bits is None else f"{step.options.bits:g}",
                    "needed" if scheme.calibrated(step.options) else "none",
                    serves(step, self.devices),
                    scheme.summary,
                )
            )
        print_table(("scheme", "package", "bits", "data", "serves on", "what it does"), rows)
        if not rows:
            say(NO_SCHEMES)
        for problem in self.registry.problems:
            print(
                printable_line(
                    f"problem: {problem.name} of {problem.package} cannot be used: {problem.text}"
                ),
                file=sys.stderr,
            )


@frozen
class SchemeSummary:
    """One scheme's options, and what it says of devices."""

    step: Step
    devices: tuple[Hardware, ...]

    def as_json(self) -> dict[str, Any]:
        """The scheme with its package, options and findings."""
        scheme = self.step.scheme
        hints = get_type_hints(scheme.options_type)
        options = {}
        for field in attrs.fields(scheme.options_type):
            default = getattr(self.step.options, field.name)
            options[field.name] = {
                "values": describe_type(hints[field.name]),
                "default": list(default) if isinstance(default, tuple) else default,
                "help": field.metadata.get("help", ""),
            }
        findings = [
            {"device": device.name, **attrs.asdict(finding)}
            for device in self.devices
            for finding in _findings(self.step, device)
        ]
        return {
            "name": scheme.name,
            "package": scheme.package,
            "version": scheme.version,
            "summary": scheme.summary,
            "bits": self.step.options.bits,
            "data": scheme.calibrated(self.step.options),
            "options": options,
            "efforts": {level: dict(values) for level, values in scheme.efforts.items()},
            "hardware": findings,
        }

    def print_text(self) -> None:
        """A table of options, and one of findings with the devices that share them."""
        value = self.as_json()
        say(f"{value['name']} ({value['package']} {value['version']}): {value['summary']}")
        rows = [
            (name, option["values"], format_value(option["default"]), option["help"])
            for name, option in value["options"].items()
        ]
        print_table(("option", "values", "default", "what it sets"), rows)
        for level, values in value["efforts"].items():
            settings = " ".join(f"{name}={format_value(v)}" for name, v in values.items())
            say(f"--effort {level}: {settings}")
        devices: dict[tuple[str, str], list[str]] = {}
        for finding in value["hardware"]:
            devices.setdefault((finding["level"], finding["text"]), []).append(finding["device"])
        print_table(
            ("level", "what to expect", "devices"),
            [(*finding, ", ".join(names)) for finding, names in devices.items()],
        )


def serves(step: Step, devices: Sequence[Hardware]) -> str:
    """In a few words where a scheme is supported or better: `NVIDIA 8.9+, some AMD`."""
    if len(devices) == 1:
        return _findings(step, devices[0])[0].level
    usable = [device for device in devices if _findings(step, device)[0].level in USABLE]
    return describe_devices(usable, devices)


def _findings(step: Step, device: Hardware) -> Sequence[Finding]:
    try:
        findings = step.call("validate_hardware", hardware=device)
    except BitpressError as e:
        # one scheme's fault must not hide the others
        return [Finding("unsupported", str(e))]
    return findings or [NOTHING_KNOWN]
