"""What commands about an output have to say: compress, verify, eval, inspect."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import attrs
from attrs import frozen

from bitpress.cli.text import print_table, say, say_what_is_left, warn
from bitpress.runtime.memory import format_bytes

if TYPE_CHECKING:
    from bitpress.compression.job import Job
    from bitpress.output.manifest import Check, Manifest
    from bitpress.output.verify import VerificationReport

# How many of the largest errors are shown.
NUM_WORST = 5


@frozen(eq=False)
class CompressSummary:
    """What a run has written into the folder `out`.

    Attributes:
        is_verified: whether it was read back and compared with its source.
    """

    manifest: Manifest
    job: Job
    out: Path
    is_verified: bool

    def as_json(self) -> dict[str, Any]:
        """Sizes, whether it is verified, and the manifest."""
        return {
            "before": self.job.plan.source_bytes,
            "after": self.job.plan.output_bytes,
            "verified": self.is_verified,
            **self.manifest.as_json(),
        }

    def print_text(self) -> None:
        """How much smaller, how near to the source, and how to serve it."""
        manifest, plan = self.manifest, self.job.plan
        before, after = plan.source_bytes, plan.output_bytes
        say(
            f"{self.out}: {format_bytes(before)} -> {format_bytes(after)} ("
            f"{before / after:.2f}x smaller), {manifest.bits:.2f} bits per weight"
        )
        # those before are on the screen since the run began
        warn(text for text in manifest.warnings if text not in self.job.warnings)
        self._print_calibration()
        if self.is_verified:
            say(
                f"verified: {len(manifest.layers)} layers read back and compared with the source; "
                "largest relative errors:"
            )
            worst = sorted(manifest.layers.items(), key=lambda item: -(item[1].error or 0))
            rows = [(name, f"{layer.error:.5f}") for name, layer in worst[:NUM_WORST]]
            print_table(("layer", "error"), rows)
        else:
            say("not verified (--no-verify)")
        if manifest.check:
            say("checked, run as it will be served: ", end="")
            _print_check(manifest.check)
        for text in self.job.plan.device_remarks:
            say(text)
        say_what_is_left(self.job.plan.source.left_files)
        say(f"serve it: vllm serve {self.out}")

    def _print_calibration(self) -> None:
        data, layers = self.manifest.data, self.manifest.layers
        if data:
            hint = ""
            if "ships" in data["source"]:
                hint = "; texts like those the model will serve are better: --calibration FILE"
            say(f"calibrated on {int(data['tokens']):,} tokens of {data['source']}{hint}")

        num_tokens = sorted(layer.tokens for layer in layers.values() if layer.tokens is not None)
        if num_tokens:
            median = num_tokens[(len(num_tokens) - 1) // 2]
            say(
                f"tokens sent to an expert: {num_tokens[0]:,} to {num_tokens[-1]:,}, to half of "
                f"them at most {median:,}"
            )

        errors = {
            name: layer.output_error
            for name, layer in layers.items()
            if layer.output_error is not None
        }
        if errors:
            say("largest relative errors of a layer's output on calibration data:")
            worst = sorted(errors.items(), key=lambda item: -item[1])[:NUM_WORST]
            print_table(
                ("layer", "output error"), [(name, f"{error:.5f}") for name, error in worst]
            )


@frozen(eq=False)
class VerifySummary:
    """What a proof of the folder `out` has shown, with the source's name where there was one."""

    report: VerificationReport
    out: Path
    against: str | None

    def as_json(self) -> dict[str, Any]:
        """Faults, errors and remarks."""
        return {
            "ok": not self.report.faults,
            "faults": [str(fault) for fault in self.report.faults],
            "errors": self.report.errors,
            "remarks": self.report.remarks,
        }

    def print_text(self) -> None:
        """One line if nothing is wrong; faults are an error, told elsewhere."""
        if self.report.faults:
            return
        comparison = "no source given: weights not compared"
        if self.against:
            comparison = f"{len(self.report.errors)} layers compared with {self.against}"
        say(f"{self.out}: nothing wrong ({comparison})")


@frozen
class EvalSummary:
    """How well a model predicts a text, and how far its predictions are from another's."""

    check: Check
    model: str
    against: str | None

    def as_json(self) -> dict[str, Any]:
        """The models' names and all figures."""
        return {"model": self.model, "against": self.against, **attrs.asdict(self.check)}

    def print_text(self) -> None:
        """A line for each figure."""
        _print_check(self.check)


@frozen(eq=False)
class InspectSummary:
    """What is inside an output.

    Attributes:
        lists_all: whether people see every layer, not those alike as one.
    """

    manifest: Manifest
    lists_all: bool = False

    def as_json(self) -> dict[str, Any]:
        """The manifest, and bits per weight."""
        return self.manifest.as_json() | {"bits": self.manifest.bits}

    def print_text(self) -> None:
        """What was measured of the whole, and a table of layers."""
        manifest = self.manifest
        packages = ", ".join(manifest.schemes.values())
        say(f"from {manifest.source}, by bitpress {manifest.bitpress} with {packages}")
        say(f"{len(manifest.layers)} layers, {manifest.bits:.2f} bits per weight")
        if manifest.blocks:
            drift = list(manifest.blocks.values())[-1]
            say(
                f"hidden states after the last block are {drift:.5f} from the source's on "
                "calibration data"
            )
        if manifest.check:
            say("checked on ", end="")
            _print_check(manifest.check)
        self._print_layers()

    def _print_layers(self) -> None:
        # it imports torch, which takes a second
        from bitpress.checkpoint.layer_names import collapse_numbered

        layers = self.manifest.layers
        descriptions = {
            name: (" + ".join(layer.steps), f"{layer.bits:.2f}") for name, layer in layers.items()
        }
        if self.lists_all:
            groups = [(name, cells, [name]) for name, cells in descriptions.items()]
        else:
            groups = collapse_numbered(descriptions.items())
        has_collapsed = len(groups) < len(layers)

        largest = "largest " if has_collapsed else ""
        columns = ["layers", "steps", "bits per weight", f"{largest}relative error"]
        if any(layer.output_error is not None for layer in layers.values()):
            columns.append(f"{largest}output error")
        rows = []
        for shown_name, cells, names in groups:
            errors = (
                _format_largest([layers[name].error for name in names]),
                _format_largest([layers[name].output_error for name in names]),
            )
            rows.append((shown_name, *cells, *errors)[: len(columns)])
        print_table(columns, rows)
        if has_collapsed:
            say("every layer by itself: --all")


def _format_largest(errors: Sequence[float | None]) -> str:
    measured = [error for error in errors if error is not None]
    return f"{max(measured):.5f}" if measured else "-"


def _print_check(check: Check) -> None:
    say(f"{check.tokens:,} tokens of {check.text} in sequences of {check.sequence_length}")
    if check.kl is None:
        say(f"perplexity       {check.perplexity:.4f}")
        return
    say(
        f"perplexity       {check.perplexity:.4f}, the source's {check.source_perplexity:.4f} ("
        f"{check.rise:+.6f} nats per token)"
    )
    say(f"KL divergence    {check.kl:.6f} nats per token")
    say(f"top-1 agreement  {check.top1:.3%}")
