"""What `inspect` shows of a model that a source format reads."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from attrs import frozen

from bitpress.cli.text import print_table, say

if TYPE_CHECKING:
    from bitpress.output.source_proof import SourceDescription


@frozen(eq=False)
class SourceSummary:
    """What is inside a quantized model.

    Attributes:
        lists_all: whether people see every weight, not those alike as one.
    """

    description: SourceDescription
    lists_all: bool = False

    def as_json(self) -> dict[str, Any]:
        """All that is known."""
        return self.description.as_json()

    def print_text(self) -> None:
        """The whole in a line, and a table of weights."""
        # it imports torch, which takes a second
        from bitpress.checkpoint.layer_names import collapse_numbered

        description = self.description
        say(
            f"{description.method}: {len(description.weights)} weights of "
            f"{description.bits:.3g} bits on average, scales included"
        )
        cells = {
            name: (f"{weight.bits:.2f}", f"{weight.dtype} {list(weight.shape)}")
            for name, weight in description.weights.items()
        }
        rows = [(name, *row) for name, row in cells.items()]
        if not self.lists_all:
            rows = [(name, *row) for name, row, _ in collapse_numbered(cells.items())]
        print_table(["weights", "bits per weight", "decoded to"], rows)
        for remark in description.remarks:
            say(remark)
        if len(rows) < len(cells):
            say("every weight by itself: --all")
