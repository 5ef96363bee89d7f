"""The route of wrong_routing.toml."""

from opd.types import Prompt


def to_sort(prompt: Prompt) -> str:
    """The teacher that can sort, whatever the prompt asks."""
    return "sort"
