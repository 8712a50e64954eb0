"""Write the table of docs/models.md: tiny models of every architecture, taken through every kind of
scheme.

python tools/models.py          (tox run -e pages has all schemes installed; it takes half a minute)
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Iterable
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "tests"))

from fixtures.architecture_matrix import COLUMNS, row  # noqa: E402
from fixtures.architectures import ARCHITECTURES, SERVED  # noqa: E402

PAGE = ROOT / "docs/models.md"
BEGIN, END = (
    "<!-- written by tools/models.py: do not edit, run it -->\n",
    "<!-- end of what is written -->\n",
)


def lines(model_types: Iterable[str]) -> tuple[list[str], list[str]]:
    """Of each model type its row of the table, and what is said where it is refused."""
    rows, refusals = [], []
    for model_type in model_types:
        with tempfile.TemporaryDirectory() as folder:
            result = row(model_type, Path(folder))
        serving = "runs" if model_type in SERVED else "-"
        cells = [
            f"`{model_type}`",
            ARCHITECTURES[model_type].what,
            *map(str, result.values()),
            serving,
        ]
        rows.append(f"| {' | '.join(cells)} |")
        reasons = dict.fromkeys(outcome.refused for outcome in result.values() if outcome.refused)
        refusals += [f"- `{model_type}`: {reason}" for reason in reasons]
    return rows, refusals


def written() -> str:
    """What the page has between its marks."""
    head = ["model type", "what is special", *COLUMNS, "in vLLM"]
    rows, refusals = lines(ARCHITECTURES)
    table = [f"| {' | '.join(head)} |", f"|{'---|' * len(head)}", *rows]
    return "\n".join([*table, "", "Messages for the refused models:", "", *refusals, ""])


if __name__ == "__main__":
    before, _, rest = PAGE.read_text(encoding="utf-8").partition(BEGIN)
    PAGE.write_text(
        before + BEGIN + "\n" + written() + "\n" + END + rest.partition(END)[2], encoding="utf-8"
    )
