"""How a recommendation is shown."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Any

import attrs
from attrs import frozen

from bitpress.cli.plan_output import format_duration
from bitpress.cli.text import print_record, print_table, say
from bitpress.runtime.memory import format_bytes

if TYPE_CHECKING:
    from bitpress.planning.recommendation import Alternative, Recommendation


@frozen(eq=False)
class RecommendSummary:
    """Which scheme to take for a model, with its name as the user gave it."""

    recommendation: Recommendation
    model: str

    def as_json(self) -> dict[str, Any]:
        """The device, and every alternative with its figures, best first."""
        recommendation = self.recommendation
        return {
            "model": self.model,
            "device": recommendation.device.name,
            "memory": recommendation.memory,
            "before": recommendation.source_bytes,
            "threads": recommendation.num_threads,
            "alternatives": [self._alternative_json(a) for a in recommendation.alternatives],
            "rejected": [attrs.asdict(rejected) for rejected in recommendation.rejected],
        }

    def _alternative_json(self, alternative: Alternative) -> dict[str, Any]:
        variant = alternative.variant
        return {
            "scheme": variant.scheme,
            "settings": list(variant.settings),
            "level": alternative.level,
            "reason": alternative.reason,
            "after": alternative.num_bytes,
            "bits": alternative.bits,
            "quantizes_activations": alternative.quantizes_activations,
            "data": alternative.needs_data,
            "run_memory": alternative.run_memory,
            "run_seconds": alternative.run_seconds,
            "max_tokens": alternative.max_tokens,
            "measured": [{"model": loss.model, "kl": loss.kl} for loss in variant.losses],
            "command": self._command(alternative),
        }

    def print_text(self) -> None:
        """The best with its command; what else runs, best first; and why the others are out."""
        recommendation = self.recommendation
        memory = recommendation.memory
        size = f", {format_bytes(memory)}" if memory is not None else ""
        say(f"{self.model} on {recommendation.device.name}{size}")
        say(f"uncompressed: {format_bytes(recommendation.source_bytes)}")
        if recommendation.best is not None:
            self._print_best(recommendation.best)
        others = recommendation.alternatives[1:]
        if others:
            say()
            say("what else runs, best first:")
            rows = [
                (
                    _name(alternative),
                    format_bytes(alternative.num_bytes),
                    _quantized(alternative),
                    "needed" if alternative.needs_data else "none",
                    _losses(alternative),
                    f"{alternative.level}: {alternative.reason}",
                )
                for alternative in others
            ]
            print_table(("scheme", "size", "quantized", "data", "measured", "on the device"), rows)
        if recommendation.rejected:
            say()
            say("what is out, and why:")
            print_table(
                ("scheme", "because of", "reason"),
                [(out.scheme, f"the {out.cause}", out.reason) for out in recommendation.rejected],
            )

    def _print_best(self, best: Alternative) -> None:
        recommendation = self.recommendation
        smaller = recommendation.source_bytes / best.num_bytes
        size = (
            f"{format_bytes(best.num_bytes)} on disk and in the device's memory "
            f"({smaller:.2f}x smaller)"
        )
        if best.max_tokens is not None:
            size += f"; beside it {best.max_tokens:,} tokens of context at most"
            if best.max_tokens < (recommendation.max_context or 0):
                size += (
                    f", less than the model's {recommendation.max_context:,}: vllm serve needs "
                    "--max-model-len"
                )
        threads = f"{recommendation.num_threads} thread{'s' * (recommendation.num_threads > 1)}"
        needs = (
            f"{'calibration data' if best.needs_data else 'no data'}; about "
            f"{format_bytes(best.run_memory)} of memory and {format_duration(best.run_seconds)} "
            f"with {threads} (an estimate: see bitpress plan)"
        )
        rows = [
            ("take", _name(best)),
            ("size", size),
            ("device", f"{best.level}: {best.reason}"),
            ("quantized", _quantized(best)),
            ("needs", needs),
            ("loss", _describe_loss(best)),
        ]
        print_record(*zip(*rows, strict=True))
        say(f"  {self._command(best)}")

    def _command(self, alternative: Alternative) -> str:
        """The command that compresses the model."""
        variant = alternative.variant
        name = Path(self.model).name or Path(self.model).resolve().name
        words = ["bitpress", "compress", self.model, f"{name}-{variant.scheme}"]
        words += ["--scheme", variant.scheme]
        for setting in variant.settings:
            words += ["--set", setting]
        return shlex.join(words)


def _name(alternative: Alternative) -> str:
    return " ".join((alternative.variant.scheme, *alternative.variant.settings))


def _quantized(alternative: Alternative) -> str:
    return "weights and activations" if alternative.quantizes_activations else "weights only"


def _losses(alternative: Alternative) -> str:
    losses = [f"KL {loss.kl:.2g} on {loss.model}" for loss in alternative.variant.losses]
    return ", ".join(losses) or "-"


def _describe_loss(alternative: Alternative) -> str:
    measured = "; ".join(
        f"measured on {loss.model}: KL {loss.kl:.2g} nats per token"
        for loss in alternative.variant.losses
    )
    return f"{measured or 'not measured yet'}; for your model: add --check to the command"
