"""The text a student wrote in its last steps, to be trained on again."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from opd.rollout.edit import FILL, take
from opd.types import Prompt, Rollout

__all__ = ["ReplayBuffer"]

PromptsAt = Callable[[int, int], Sequence[Prompt]]
"""The training prompts from a position of their stream: `(start, count)`."""


@dataclass(frozen=True)
class _Entry:
    """What the student wrote in one step; group g answers the prompt at position `start + g`."""

    step: int
    start: int
    rollout: Rollout

    @property
    def groups(self) -> list[int]:
        return sorted(set(self.rollout.group.tolist()))


class ReplayBuffer:
    """Rollouts of the last few steps, taken again prompt by prompt with all samples of a prompt.

    Args:
        steps: how many steps back it reaches.
        seed: of its draws.
    """

    def __init__(self, steps: int, *, seed: int) -> None:
        self._steps = steps
        self._entries: list[_Entry] = []
        self._generator = torch.Generator().manual_seed(seed)

    def __len__(self) -> int:
        """Prompts whose responses it holds."""
        return sum(len(entry.groups) for entry in self._entries)

    def forget(self, step: int) -> None:
        """Drop what was written more than `steps` steps before `step`."""
        oldest = step - self._steps
        self._entries = [entry for entry in self._entries if entry.step >= oldest]

    def add(self, rollout: Rollout, *, step: int, start: int) -> None:
        """Keep what the student wrote at `step` to the prompts from position `start` on."""
        self._entries.append(_Entry(step, start, take(rollout, range(len(rollout.prompt_ids)))))

    def draw(self, prompts: int) -> list[Rollout]:
        """Responses to so many of its prompts, at most to all; none twice, oldest first."""
        held = [(entry, group) for entry in self._entries for group in entry.groups]
        chosen = torch.randperm(len(held), generator=self._generator)[:prompts].tolist()
        drawn = []
        for entry in self._entries:
            groups = {held[place][1] for place in chosen if held[place][0] is entry}
            rows = [row for row, g in enumerate(entry.rollout.group.tolist()) if g in groups]
            if rows:
                drawn.append(take(entry.rollout, rows))
        return drawn

    def state(self) -> dict[str, Any]:
        """All it holds as tensors, numbers and texts; prompts by their position."""
        entries = [
            {
                "step": entry.step,
                "start": entry.start,
                "group": entry.rollout.group,
                "verdict": entry.rollout.verdict,
                "stop_reason": list(entry.rollout.stop_reason),
                "reasons": list(entry.rollout.reasons),
                **{name: getattr(entry.rollout, name) for name in FILL},
            }
            for entry in self._entries
        ]
        return {"generator": self._generator.get_state(), "entries": entries}

    def load_state(self, state: Mapping[str, Any], prompts_at: PromptsAt) -> None:
        """Hold again what `state` told."""
        self._generator.set_state(state["generator"])
        self._entries = [_restored(saved, prompts_at) for saved in state["entries"]]


def _restored(saved: Mapping[str, Any], prompts_at: PromptsAt) -> _Entry:
    groups = saved["group"].tolist()
    asked = prompts_at(saved["start"], max(groups) + 1)
    prompts = tuple(asked[group] for group in groups)
    rollout = Rollout(
        **{name: saved[name] for name in FILL},
        group=saved["group"],
        verdict=saved["verdict"],
        stop_reason=tuple(saved["stop_reason"]),
        reasons=tuple(saved.get("reasons", ())),
        prompt_ids=tuple(prompt.prompt_ids for prompt in prompts),
        prompts=prompts,
        model_inputs=tuple(prompt.model_inputs for prompt in prompts),
    )
    return _Entry(saved["step"], saved["start"], rollout)
