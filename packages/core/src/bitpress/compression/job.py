"""What a run is asked to do: a plan, and the texts that it needs."""

from __future__ import annotations

from pathlib import Path

from attrs import evolve, frozen

from bitpress.checkpoint import layer_names
from bitpress.checkpoint.hub import resolve, split_revision
from bitpress.checkpoint.reader import Reader, open_checkpoint
from bitpress.compression import accuracy_check
from bitpress.errors import RecipeError
from bitpress.modeling.decoder import Decoder, DecoderOptions
from bitpress.modeling.tokens import (
    CalibrationData,
    EvaluationText,
    load_calibration_data,
)
from bitpress.output import model_card
from bitpress.planning.calibration_config import CalibrationConfig, TextSource
from bitpress.planning.evaluation_config import CHECK_TEXT
from bitpress.planning.plan import Plan
from bitpress.planning.planner import make_plan, with_calibration
from bitpress.planning.recipe_source import RecipeSource
from bitpress.planning.run_options import RunOptions
from bitpress.runtime.operating_system import require_posix
from bitpress.schemes.registry import discover


@frozen(eq=False)
class Job:
    """A plan, and the texts that carrying it out needs.

    Attributes:
        calibration: the sequences that it is calibrated on; None where it needs none.
        model: its name as the user gave it.
        check_text: on which the result is compared with its source; None where it is not.
        command: a command line that asks for the same.
        remarks: on what was asked for and is not used.
        base_model: the Hub name of the source; None where it has none that is known.
    """

    plan: Plan
    calibration: CalibrationData | None
    model: str
    check_text: EvaluationText | None = None
    command: str = ""
    remarks: tuple[str, ...] = ()
    base_model: str | None = None

    @property
    def calibration_shape(self) -> tuple[int, int] | None:
        """(sequences, length) of the calibration data; None where there are none."""
        if self.calibration is None:
            return None
        num_sequences, length = self.calibration.input_ids.shape
        return num_sequences, length

    def with_calibration(self, calibration: CalibrationData) -> Job:
        """The same job on other calibration data, which the digest of its plan covers."""
        data = calibration.digest + " all experts" * calibration.all_experts
        return evolve(self, plan=with_calibration(self.plan, data), calibration=calibration)

    @property
    def warnings(self) -> tuple[str, ...]:
        """What the user should know before starting."""
        texts = [text for text in (self.calibration, self.check_text) if text]
        text_warnings = tuple(line for text in texts for line in text.warnings)
        return self.plan.warnings + text_warnings + self.remarks


def prepare_job(
    model: str | Path,
    recipe_source: RecipeSource,
    calibration: CalibrationConfig | None = None,
    options: RunOptions | None = None,
) -> Job:
    """Make the plan; read the calibration data if the recipe needs some, and the text of a check.

    Raises:
        BitpressError: the model, the recipe, the texts or their combination cannot be used.
    """
    options = options or RunOptions()
    recipe_source.require_one()
    # before a model is downloaded
    require_posix()
    base_model = _find_base_model(str(model), options.base_model)
    source = open_checkpoint(resolve(model), copy=recipe_source.copy)
    recipe = recipe_source.resolve(discover())

    # what headers can refuse is refused before texts are read
    plan = make_plan(source, recipe, options.serve_on)
    check_text = None
    if options.check is not None:
        check_text = accuracy_check.load_check_text(plan, options.check, options.trust_remote_code)
    config = (calibration or CalibrationConfig()) if plan.calibrated else None
    command = _command(str(model), recipe_source, config, options)
    job = Job(plan, None, str(model), check_text, command, base_model=base_model)
    if config is None:
        if calibration is not None and calibration.source is not None:
            remark = "no layer needs data: --calibration is not used"
            return evolve(job, remarks=(remark,))
        return job

    with Reader() as reader:
        decoder_options = DecoderOptions(trust_remote_code=options.trust_remote_code)
        Decoder(plan.source, plan.container, reader, decoder_options).require_blocks()
    sequences = load_calibration_data(
        config, source.folder, source.config, options.trust_remote_code
    )
    if config.all_experts and not any(
        layer_names.group_experts(stack.members) for stack in plan.stacks
    ):
        raise RecipeError("--all-experts: no experts of this model are compressed; leave it out")
    return job.with_calibration(sequences)


def display_name(model: str) -> str:
    """The Hub name of a model, or its folder's own name."""
    return model if "/" in model and not Path(model).exists() else Path(model).resolve().name


def _find_base_model(model: str, base_model: str | None) -> str | None:
    """The Hub name of a model, where it has one: a folder's own name is none."""
    if base_model is not None and not model_card.HUB_NAME.fullmatch(str(base_model)):
        raise RecipeError(f"--base-model {base_model!r}: a name on the Hub, ORGANISATION/MODEL")
    # the card's field knows no revision
    name, _ = split_revision(base_model or display_name(model))
    return name if model_card.HUB_NAME.fullmatch(name) else None


def _check_value(check: TextSource | None) -> Path | str | bool:
    """The value of `--check` on a command line; True for the option alone."""
    if check is None or check == CHECK_TEXT:
        return check is not None
    # whoever repeats the run writes the texts into one
    return Path(check) if isinstance(check, str) else "FILE"


def _command(
    model: str, recipe_source: RecipeSource, config: CalibrationConfig | None, options: RunOptions
) -> str:
    """The command line that the model card shows."""
    command_options = {
        **recipe_source.command_options,
        **(config.command_options if config else {}),
        "--check": _check_value(options.check),
        "--base-model": options.base_model,
    }
    return model_card.format_command(display_name(model), command_options)
