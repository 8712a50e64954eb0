"""What a plan counts of the schemes that ship with bitpress is what their runs do."""

from __future__ import annotations

from pathlib import Path

import pytest
from fixtures.learner_scheme import runnable_model
from torch import Tensor

import bitpress
from bitpress import numerics
from bitpress.planning.calibration_config import CalibrationConfig
from bitpress.planning.time_estimate import estimate_ranks


@pytest.mark.parametrize("symmetric", [True, False])
def test_columns_that_are_rounded_one_after_the_other_are_counted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, symmetric: bool
) -> None:
    num_columns, round_ = 0, numerics.NumberFormat.round_

    def count(numbers: numerics.NumberFormat, x: Tensor, zero: Tensor | None = None) -> Tensor:
        nonlocal num_columns
        num_columns += 1
        return round_(numbers, x, zero)

    monkeypatch.setattr(numerics.NumberFormat, "round_", count)
    model, settings = runnable_model(tmp_path / "model"), [f"symmetric={symmetric}".lower()]
    settings.append("group_size=auto")
    texts = CalibrationConfig(str(tmp_path / "text.txt"), samples=8, sequence_length=32)
    (work,) = estimate_ranks(bitpress.plan(model, scheme="w4a16", settings=settings), 1, texts)
    bitpress.compress(
        model,
        tmp_path / "out",
        scheme="w4a16",
        settings=settings,
        calibration=texts.source,
        samples=texts.samples,
        sequence_length=texts.sequence_length,
        threads=1,
        verify=False,
    )
    assert work.columns == num_columns > 0
