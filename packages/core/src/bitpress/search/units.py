"""What one choice is made for: a stack of layers, or all experts of a block."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from fnmatch import fnmatchcase

from attrs import frozen

from bitpress import stacks
from bitpress.planning import Plan
from bitpress.shards import Stack, nbytes


@frozen(eq=False)
class Unit:
    """Layers that must get the same steps.

    Attributes:
        choices: for each candidate, the stacks as its plan has them.
    """

    choices: tuple[tuple[Stack, ...], ...]

    @property
    def modules(self) -> list[str]:
        """Names of the layers."""
        return [module for stack in self.choices[0] for module in stack.members]

    @property
    def name(self) -> str:
        """For people: the stack's name, or that of the first of many."""
        first, *more = self.choices[0]
        return f"{first.name} and {len(more)} like it" if more else first.name

    @property
    def weights(self) -> int:
        """How many there are."""
        return sum(entry.numel for stack in self.choices[0] for entry in stack.members.values())

    @property
    def sizes(self) -> list[int]:
        """Stored bytes with each candidate, scales included."""
        return [sum(nbytes(*t) for s in choice for m in s.members for t in s.stored(m)[0].values()) for choice in self.choices]

    def block(self, container: str) -> int:
        """The number of the block that holds it."""
        found = stacks.block_index(self.modules[0], container)
        assert found is not None
        return found


def units(plans: Sequence[Plan]) -> list[Unit]:
    """The units of a model, of which each candidate has a plan of its own, in the order of blocks."""
    together = {module: names[0] for names in stacks.experts(plans[0].fragments) for module in names}
    found: dict[str, list[list[Stack]]] = {}
    for number, plan in enumerate(plans):
        for stack in plan.stacks:
            first = next(iter(stack.members))
            choices = found.setdefault(together.get(first, first), [[] for _ in plans])
            choices[number].append(stack)
    ordered = [[tuple(sorted(choice, key=lambda stack: stack.name)) for choice in choices] for choices in found.values()]
    made = [Unit(tuple(choices)) for choices in ordered]
    return sorted(made, key=lambda unit: unit.block(plans[0].container))


def pattern(names: Sequence[str], modules: Iterable[str], *guessed: str) -> list[str]:
    """Patterns of a recipe that match these layers of a model, and no others: one where one does, guessed or of a usual form."""
    parent, _, leaf = names[0].rpartition(".")
    first = "".join(name.rpartition(".")[2][0] for name in names)
    guesses = (*guessed, f"{parent}.*", f"{parent}.[{first}]{leaf[1:]}", f"{names[0].partition('.experts.')[0]}.experts.*")
    for guess in guesses if len(names) > 1 else guessed:
        if {module for module in modules if fnmatchcase(module, guess)} == set(names):
            return [guess]
    return list(names)
