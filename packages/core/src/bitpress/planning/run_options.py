"""How a run computes and what it must prove, as asked for at the border."""

from __future__ import annotations

from attrs import frozen

from bitpress.planning.calibration_config import TextSource
from bitpress.schemes.hardware import Hardware


@frozen
class RunOptions:
    """How a run computes, and what its result must pass.

    Attributes:
        device: "auto" (a GPU where there is one), "cpu", "cuda" or "cuda:N"; without calibration
            data "cuda" is every GPU.
        num_threads: layers worked on side by side; None: one per core, or fewer where
            `max_memory` has no room for so many.
        max_memory: bytes of the process; a run that would need more is refused. None: no limit.
        max_device_memory: bytes of a GPU that a calibrated run may take; None: what is free there.
        verify: whether what was written is read back and compared with its source.
        check: texts, as EvaluationConfig has them, on which the result's predictions are compared
            with its source's; None: no check.
        max_kl: largest KL divergence of that check, in nats per token; None: no limit.
        trust_remote_code: whether code in the model's folder may run.
        serve_on: the device that will serve the result; None: this machine's.
        base_model: the Hub name of the model that the source is, for the model card; None: that by
            which the source was fetched, if it was.
    """

    device: str = "cpu"
    num_threads: int | None = None
    max_memory: int | None = None
    max_device_memory: int | None = None
    verify: bool = True
    check: TextSource | None = None
    max_kl: float | None = None
    trust_remote_code: bool = False
    serve_on: Hardware | None = None
    base_model: str | None = None
