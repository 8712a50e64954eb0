"""What commands about an output have to say: compress, verify, eval, inspect."""

from __future__ import annotations

import shlex
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

# How many outliers are shown.
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
        """The verdict: how much smaller, how near to the source, and what to do next."""
        # it imports torch, which takes a second
        from bitpress.planning import attention_caches

        manifest, plan = self.manifest, self.job.plan
        before, after = plan.source_bytes, plan.output_bytes
        if manifest.layers:
            say(
                f"{self.out}: {format_bytes(before)} -> {format_bytes(after)} ("
                f"{before / after:.2f}x smaller), {manifest.bits:.2f} bits per weight"
            )
        else:
            say(f"{self.out}: {format_bytes(after)}, all weights as they were")
        if plan.caches:
            say(f"cache: {attention_caches.describe_caches(plan.caches)}")
        # those before are on the screen since the run began
        warn(text for text in manifest.warnings if text not in self.job.warnings)
        self._print_calibration()
        if self.is_verified:
            say(f"verified: {len(manifest.layers)} layers read back and compared with the source")
            self._print_exact()
            self._print_outliers()
        else:
            say("not verified (--no-verify)")
        if manifest.check:
            _print_loss(manifest.check)
        for text in plan.device_remarks:
            say(text)
        say_what_is_left(plan.source.left_files)
        self._print_next_step()

    def _print_next_step(self) -> None:
        """What is not known yet is to be found out first."""
        out, model = shlex.quote(str(self.out)), shlex.quote(self.job.model)
        if not self.is_verified:
            say(f"verify it: bitpress verify {out} --against {model}")
        elif self.manifest.check is None:
            say(f"measure the loss: bitpress eval {out} --against {model}")
        else:
            say(f"serve it: vllm serve {out}")

    def _print_exact(self) -> None:
        """How many layers have lost nothing."""
        layers, kept = self.manifest.layers, self.job.plan.kept_codes
        exact = [module for module, layer in layers.items() if layer.error == 0]
        num_kept = sum(module in kept for module in exact)
        if num_kept:
            say(f"{num_kept} of them keep the source's codes: nothing was rounded again")
        if others := len(exact) - num_kept:
            say(f"{others} of them hold the source's very numbers: nothing was rounded again")

    def _print_outliers(self) -> None:
        """Layers whose weights fit the format badly, if there are any."""
        # it imports torch, which takes a second
        from bitpress.output.outliers import OUTLIER_RATIO, find_outliers

        outliers = find_outliers(self.manifest.layers)
        if not outliers:
            return
        count = f"{len(outliers)} layer{'s fit' if len(outliers) > 1 else ' fits'}"
        say(
            f"{count} the format badly: rounding moves the weights over {OUTLIER_RATIO:g} times as "
            "far as those of most layers"
        )
        rows = [
            (outlier.module, f"{outlier.error:.5f}", f"{outlier.median:.5f}")
            for outlier in outliers[:NUM_WORST]
        ]
        print_table(("layer", "error", "median of its format"), rows)
        if len(outliers) > NUM_WORST:
            say(f"and {len(outliers) - NUM_WORST} more: bitpress inspect {self.out} --all")

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
        if manifest.layers:
            say(f"{len(manifest.layers)} layers, {manifest.bits:.2f} bits per weight")
        if manifest.caches:
            say(f"scales for the caches of {len(manifest.caches)} attentions")
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


def _print_loss(check: Check) -> None:
    """A check of a run in two lines."""
    if check.kl is None or check.top1 is None or check.source_perplexity is None:
        return
    say(
        f"loss: KL divergence {check.kl:.6f} nats per token, top-1 agreement {check.top1:.2%}, "
        f"perplexity {check.perplexity:.2f} (the source's {check.source_perplexity:.2f})"
    )
    say(f"      on {check.tokens:,} tokens of {check.text}, run as it will be served")


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
