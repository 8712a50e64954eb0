"""Layers by decoder block and by kind, which is what charts of a whole model show."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from attrs import frozen

from bitpress.checkpoint.layer_names import BLOCK, star
from bitpress.output.manifest import LayerRecord


@frozen
class LayerGrid:
    """The layers of one list of blocks.

    Attributes:
        container: the name of that list, such as `model.layers`.
        blocks: numbers of its blocks that hold compressed layers, in order.
        kinds: names of layers in a block, in the order of the first one, such as `mlp.up_proj`;
            the experts of a block are one kind, with a star for their number.
        layers: by block and kind, the layers there.
    """

    container: str
    blocks: tuple[int, ...]
    kinds: tuple[str, ...]
    layers: Mapping[tuple[int, str], list[LayerRecord]]

    def summarize(
        self, value_of: Callable[[LayerRecord], float | None]
    ) -> dict[tuple[int, str], float]:
        """The largest value of each block and kind that has one."""
        summary = {}
        for position, layers in self.layers.items():
            values = [value for layer in layers if (value := value_of(layer)) is not None]
            if values:
                summary[position] = max(values)
        return summary


def arrange_layers(layers: Mapping[str, LayerRecord]) -> list[LayerGrid]:
    """The grids of a model's layers; those outside blocks are in none."""
    containers: dict[str, dict[tuple[int, str], list[LayerRecord]]] = {}
    for name, layer in layers.items():
        if match := BLOCK.fullmatch(f"{name}.weight"):
            # a leading dot makes a number at the beginning a part of a name too
            kind = star(f".{match['inside']}").removeprefix(".")
            grid = containers.setdefault(match["container"], {})
            grid.setdefault((int(match["index"]), kind), []).append(layer)
    return [
        LayerGrid(
            container,
            tuple(sorted({block for block, _ in grid})),
            tuple(dict.fromkeys(kind for _, kind in grid)),
            grid,
        )
        for container, grid in containers.items()
    ]
