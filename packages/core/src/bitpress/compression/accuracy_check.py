"""The check of a run: what was written, run as it will be served, is compared with its source on a
text.
"""

from __future__ import annotations

from pathlib import Path

import torch

from bitpress.checkpoint.reader import Reader
from bitpress.errors import VerificationError
from bitpress.modeling import block_runner
from bitpress.modeling.decoder import Decoder
from bitpress.modeling.tokens import Stretch, stretch
from bitpress.output import compressed_model, evaluate
from bitpress.output.manifest import Check
from bitpress.output.written_model import WrittenModel
from bitpress.planning.plan import Plan
from bitpress.runtime.progress import Progress
from bitpress.schemes import activation_quantizer


def text(plan: Plan, source: str, trust: bool) -> Stretch:
    """The text, once it is known that the plan's source and its result can be run; raises
    BitpressError where they cannot.
    """
    for stack in plan.stacks:
        activation_quantizer.known(stack.describe_stored(next(iter(stack.members)))[1], stack.steps)
    with Reader() as reader:
        Decoder(
            plan.source, plan.container, reader, torch.device("cpu"), torch.float32, trust
        ).require()
    return stretch(
        source, evaluate.LENGTH, evaluate.TOKENS, plan.source.folder, plan.source.config, trust
    )


def place(plan: Plan, text: Stretch, limit: int | None, folder: Path) -> Path | None:
    """Where hidden states will be kept; raises RecipeError where the limit, in bytes, is too low
    for a check.
    """
    with Reader() as reader:
        source = block_runner.plain(plan.source, reader, plan.container)
        return evaluate.spill(source, source, text.inputs.numel(), limit, folder)


def check(
    written: WrittenModel,
    plan: Plan,
    text: Stretch,
    device: torch.device,
    place: Path | None,
    trust: bool,
    progress: Progress,
) -> Check:
    """The figures."""
    with Reader() as reader:
        source = block_runner.plain(plan.source, reader, plan.container)
        result = compressed_model.served(written, reader, plan.container, plan.source.folder)
        told = progress("checking", evaluate.work(result, source))
        return evaluate.evaluate(result, source, text, device, place, trust, told)


def limit(found: Check, most: float | None, folder: Path) -> None:
    """Raise VerificationError where the KL divergence is over a limit in nats per token."""
    if most is not None and found.kl is not None and not found.kl <= most:
        raise VerificationError(
            f"{folder}: the KL divergence from the source is {found.kl:.6f} nats per token, more "
            f"than --max-kl {most}; "
            "config.json is not written; with a higher limit the same command goes on from the "
            "finished shards"
        )
