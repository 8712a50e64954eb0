"""Arguments and options that several commands share."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

Json = Annotated[bool, typer.Option("--json", help="Print one JSON document and nothing else.")]
Scheme = Annotated[str | None, typer.Option("--scheme", metavar="NAME[+NAME]", help="A scheme, or several joined by +.")]
RecipeFile = Annotated[Path | None, typer.Option("--recipe", metavar="FILE", help="A TOML file: which layers get which steps.")]
Set = Annotated[list[str] | None, typer.Option("--set", metavar="[SCHEME.]OPTION=VALUE", help="Set an option; may be repeated.")]
Ignore = Annotated[
    list[str] | None, typer.Option("--ignore", metavar="PATTERN", help="Leave matching layers alone; may be repeated.")
]
Threads = Annotated[int | None, typer.Option("--threads", min=1, help="Layers worked on side by side (default: one per core).")]
TrustRemoteCode = Annotated[bool, typer.Option("--trust-remote-code", help="Let code in the model's folder run.")]
Device = Annotated[str, typer.Option("--device", metavar="cpu|cuda|cuda:N", help="What computes.")]
MaxMemory = Annotated[str | None, typer.Option("--max-memory", metavar="SIZE", help="Refuse if more is needed: 4GB.")]
Model = Annotated[str, typer.Argument(metavar="MODEL", help="A model folder, or a Hub name.")]
Out = Annotated[Path, typer.Argument(metavar="OUT", help="A folder that bitpress wrote.")]
Calibration = Annotated[
    str | None,
    typer.Option("--calibration", metavar="FILE|DATASET", help="Texts like those it will serve: .jsonl, .txt, .parquet."),
]
Samples = Annotated[int, typer.Option("--samples", help="Sequences taken of them.")]
SequenceLength = Annotated[int, typer.Option("--sequence-length", help="Tokens of a sequence.")]
Seed = Annotated[int, typer.Option("--seed", help="0 takes sequences from the start, others draw them.")]
AllExperts = Annotated[bool, typer.Option("--all-experts", help="Fit every expert to all tokens, not to those sent to it.")]
