"""The accuracy check of a run: on a text, what was written, run as it will be served, is compared
with its source.
"""

from __future__ import annotations

from pathlib import Path

from attrs import frozen

from bitpress.checkpoint.reader import Reader
from bitpress.checkpoint.rotated_source import unrotate
from bitpress.compression.resources import Resources
from bitpress.errors import VerificationError
from bitpress.modeling.block_runner import RunnableModel
from bitpress.modeling.decoder import Decoder, DecoderOptions
from bitpress.modeling.tokens import EvaluationText, load_evaluation_text
from bitpress.output import compressed_model, evaluate, evaluation_memory
from bitpress.output.manifest import Check
from bitpress.output.written_model import WrittenModel
from bitpress.planning.calibration_config import TextSource
from bitpress.planning.evaluation_config import EvaluationConfig
from bitpress.planning.plan import Plan
from bitpress.runtime.progress import Progress
from bitpress.schemes import activation_quantizer


def load_check_text(plan: Plan, source: TextSource, trust_remote_code: bool) -> EvaluationText:
    """The tokens of a text on which the result is compared with its source.

    That transformers can run the source, and that schemes say how the result's activations are
    quantized, is seen to here: before the run, and not after hours of it.

    Raises:
        BitpressError: one of the two cannot be run, or the text cannot be used.
    """
    for stack in plan.stacks:
        _, config = stack.describe_stored(next(iter(stack.members)))
        activation_quantizer.quantizes_activations(config, stack.steps)
    with Reader() as reader:
        options = DecoderOptions(trust_remote_code=trust_remote_code)
        Decoder(plan.source, plan.container, reader, options).require_parameters()

    return load_evaluation_text(
        EvaluationConfig(source), plan.source.folder, plan.source.config, trust_remote_code
    )


@frozen(eq=False)
class AccuracyCheck:
    """A comparison of the result with its source that fits into memory.

    Attributes:
        text: on which the models are compared.
        hidden_states_folder: where hidden states are kept; None keeps them in memory.
        max_brought_bytes: as a `DecoderOptions` has it.
    """

    plan: Plan
    text: EvaluationText
    hidden_states_folder: Path | None
    max_brought_bytes: int | None

    def measure(self, written: WrittenModel, resources: Resources, progress: Progress) -> Check:
        """Compare what was written with its source."""
        with Reader(pinned=resources.device.type != "cpu") as reader:
            source = _open_source(self.plan, reader)
            result = compressed_model.open_compressed(
                written, reader, self.plan.container, self.plan.source.folder
            )
            models = [result, source]
            return evaluate.evaluate(
                models,
                self.text,
                DecoderOptions(
                    resources.device,
                    trust_remote_code=resources.trust_remote_code,
                    max_brought_bytes=self.max_brought_bytes,
                ),
                self.hidden_states_folder,
                progress("checking", evaluate.count_bytes(models)),
            )


def prepare_check(
    plan: Plan, text: EvaluationText, resources: Resources, folder: Path
) -> AccuracyCheck:
    """A check that keeps its hidden states in memory if they fit, and otherwise in a folder.

    Args:
        folder: on whose disk there is room for them.

    Raises:
        RecipeError: a limit is too low even with hidden states on disk, and blocks in the host's
            memory where a GPU computes.
    """
    with Reader() as reader:
        models = [_open_source(plan, reader)] * 2
        hidden_states_folder = evaluation_memory.choose_folder(
            models, text.input_ids, resources.max_memory, folder
        )
        brought_bytes = evaluation_memory.choose_brought_bytes(
            models, text.input_ids.shape[1], resources.device, resources.max_device_memory
        )
    return AccuracyCheck(plan, text, hidden_states_folder, brought_bytes)


def _open_source(plan: Plan, reader: Reader) -> RunnableModel:
    """The source as its files hold it: what a rotation loses counts as well."""
    return RunnableModel(unrotate(plan.source), reader, plan.container)


def require_accuracy(check: Check, max_kl: float | None, folder: Path) -> None:
    """See that a result predicts as its source does.

    Args:
        max_kl: nats per token.

    Raises:
        VerificationError: the KL divergence is over the limit, or NaN.
    """
    # `not <=` and not `>`: NaN is over every limit
    if max_kl is not None and check.kl is not None and not check.kl <= max_kl:
        raise VerificationError(
            f"{folder}: the KL divergence from the source is {check.kl:.6f} nats per token, more "
            f"than --max-kl {max_kl}; config.json is not written; with a higher limit the same "
            "command resumes from the finished shards"
        )
