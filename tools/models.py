"""Write the table of docs/models.md: small models of every architecture, taken through every kind
of scheme.

python tools/models.py          (tox run -e pages has all schemes installed; it takes half an hour)
"""

from __future__ import annotations

import sys
import tempfile
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "tests"))

from fixtures.architecture_matrix import COLUMNS, row  # noqa: E402
from fixtures.small_model_tables import ARCHITECTURES, LOADED_BY_VLLM  # noqa: E402

PAGE = ROOT / "docs/models.md"
BEGIN, END = (
    "<!-- written by tools/models.py: do not edit, run it -->\n",
    "<!-- end of what is written -->\n",
)


def lines(architectures: Iterable[str]) -> tuple[list[str], list[str]]:
    """Of each architecture its row of the table, and what is said where it is refused."""
    rows, refusals = [], []
    for architecture in architectures:
        with tempfile.TemporaryDirectory() as folder:
            result = row(architecture, Path(folder))
        in_vllm = "loads" if architecture in LOADED_BY_VLLM else "-"
        cells = [f"`{architecture}`", *map(str, result.values()), in_vllm]
        rows.append(f"| {' | '.join(cells)} |")
        reasons = dict.fromkeys(outcome.refused for outcome in result.values() if outcome.refused)
        refusals += [f"- `{architecture}`: {reason}" for reason in reasons]
    return rows, refusals


def written() -> str:
    """What the page has between its marks."""
    head = ["architecture", *COLUMNS, "in vLLM"]
    rows, refusals = lines(sorted(ARCHITECTURES))
    table = [f"| {' | '.join(head)} |", f"|{'---|' * len(head)}", *rows]
    return "\n".join(
        [_count(rows), "", *table, "", "Messages for what is refused:", "", *refusals, ""]
    )


def _count(rows: list[str]) -> str:
    """How many models came to what, in a sentence."""
    cells = Counter(cell for row in rows for cell in row.strip("| ").split(" | ")[1:-1])
    in_vllm = sum(row.endswith("| loads |") for row in rows)
    counts = ", ".join(f"{count} {what}" for what, count in sorted(cells.items()))
    return (
        f"Of {len(rows)} architectures with {len(COLUMNS)} schemes each: {counts}. vLLM loads "
        f"{in_vllm} of them."
    )


if __name__ == "__main__":
    before, _, rest = PAGE.read_text(encoding="utf-8").partition(BEGIN)
    PAGE.write_text(
        before + BEGIN + "\n" + written() + "\n" + END + rest.partition(END)[2], encoding="utf-8"
    )
