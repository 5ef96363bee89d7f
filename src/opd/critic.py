"""The learned value of GAE-OPD: what the rest of a response is expected to cost, in nats.

    V(prefix) = -E_student[sum of this and all later reverse KLs | prefix]

A small head reads the student's hidden states and sends no gradient back. In one optimizer step:

    values = critic.values(hidden)                        # hidden [N, H]: a no-gradient visit
    bootstrap = critic.bootstrap(hidden_after, cut_off)   # [B]; 0 where the response ended
    advantage = credit.gae(reward, values, bootstrap, mask, gae_lambda=...)
    ...                                                   # the student's update, skipped while
    targets = critic_targets(reverse_kl, bootstrap, mask)     # critic.warming_up
    stats = critic.fit(hidden, targets, place, generator)

Every advantage is computed before the critic sees its response, so that the baseline is
independent of what it is subtracted from.
"""

from __future__ import annotations

import copy
from collections import deque
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from opd.formula import credit
from opd.types import Stat

__all__ = [
    "Critic",
    "CriticSettings",
    "ValueHead",
    "critic_targets",
    "explained_variance",
    "value_loss",
]

BINS = 8
"""Parts of equal length into which a response is cut to see where the critic is wrong."""


@dataclass(frozen=True)
class CriticSettings:
    """How the critic is built and taught.

    Attributes:
        hidden_units: units of the one hidden layer; 0 makes the head linear.
        learning_rate: of the critic's AdamW, which has no weight decay.
        updates_per_step: updates of the critic after each optimizer step of the student.
        rows_per_update: most rows of one update, drawn without replacement.
        warmup_steps: first steps, in which only the critic learns.
        replay_steps: recent steps whose rows are taught again; 0 for none. Their targets belong
            to older students.
        clip_nats: furthest a value may move within a step and still be taught; None for no limit.
            AdamW's momentum may carry it a few updates further.
    """

    hidden_units: int = 0
    learning_rate: float = 1e-3
    updates_per_step: int = 4
    rows_per_update: int = 8192
    warmup_steps: int = 0
    replay_steps: int = 0
    clip_nats: float | None = None

    def __post_init__(self) -> None:
        for name, least in (
            ("hidden_units", 0),
            ("updates_per_step", 1),
            ("rows_per_update", 1),
            ("warmup_steps", 0),
            ("replay_steps", 0),
        ):
            if getattr(self, name) < least:
                raise ValueError(f"critic.{name} must be >= {least}, got {getattr(self, name)}")
        if not self.learning_rate > 0:
            raise ValueError(f"critic.learning_rate must be > 0, got {self.learning_rate}")
        _check_clip(self.clip_nats)


class ValueHead(nn.Module):
    """A value in nats for each hidden state; exactly 0 until it is taught.

        V = unit * output(layer_norm(hidden)),   output linear or with one hidden layer

    Computes in float32 and sends no gradient to the hidden states.

    Attributes:
        unit: nats per unit of output: the scale of what is learned, so that a learning rate means
            the same for responses of ten tokens and of ten thousand.
    """

    unit: Tensor

    def __init__(
        self, input_size: int, hidden_units: int = 0, *, generator: torch.Generator | None = None
    ) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(input_size)
        layers: list[nn.Module] = []
        if hidden_units:
            first = nn.Linear(input_size, hidden_units)
            nn.init.normal_(first.weight, std=input_size**-0.5, generator=generator)
            nn.init.zeros_(first.bias)
            layers = [first, nn.GELU()]
        last = nn.Linear(hidden_units or input_size, 1)
        nn.init.zeros_(last.weight)
        nn.init.zeros_(last.bias)
        self.output = nn.Sequential(*layers, last)
        self.register_buffer("unit", torch.zeros(()))

    def forward(self, hidden: Float[Tensor, "N H"]) -> Float[Tensor, " N"]:
        """One value per row, in nats."""
        result: Tensor = self.output(self.norm(hidden.detach().float()))
        return self.unit * result.squeeze(1)


def critic_targets(
    reverse_kl: Float[Tensor, "B T"],
    bootstrap_value: Float[Tensor, " B"],
    mask: Bool[Tensor, "B T"],
    *,
    gamma: float = 1.0,
) -> Float[Tensor, "B T"]:
    """What each state's value should have been, in nats.

        target_t = -sum_{k >= t} gamma^(k - t) D_k + gamma^(T + 1 - t) V_{T+1}

    The expectations D of the rewards rather than the rewards: the same mean, less noise. Unbiased
    for the student's exact value where the response ended and D is over the whole vocabulary; where
    it was cut off at the length limit, the critic's own value of what comes next stands for it.

    Args:
        reverse_kl: D, per state; anything where the mask is False.
        bootstrap_value: V of the state after the last token; 0 where the response ended.
        mask: False on tool results and padding; those positions take no time.
        gamma: the discount of the `gae` that the values are for.

    Returns:
        Detached; 0 where the mask is False.

    Source: Eq. 21 of arXiv:2606.22793, with E[r_k | prefix] = -D_k. Bootstrap at truncation: ours.
    """
    # Against values of 0 and with lambda = 1 the advantage is the return. A discount below 1 has
    # been given its meaning where the advantages are computed.
    nothing = torch.zeros_like(reverse_kl)
    return credit.gae(
        -reverse_kl, nothing, bootstrap_value, mask, gae_lambda=1.0, gamma=gamma, meaning="task"
    )


def _held_back(
    values: Float[Tensor, " N"],
    old_values: Float[Tensor, " N"],
    targets: Float[Tensor, " N"],
    *,
    clip_nats: float | None,
) -> Bool[Tensor, " N"]:
    """Values that have moved `clip_nats` towards their target, and are not taught further."""
    if clip_nats is None:
        return torch.zeros_like(values, dtype=torch.bool)
    near = old_values + (values - old_values).clamp(-clip_nats, clip_nats)
    return (near - targets).abs() > (values - targets).abs()


def value_loss(
    values: Float[Tensor, " N"],
    old_values: Float[Tensor, " N"],
    targets: Float[Tensor, " N"],
    *,
    clip_nats: float | None,
) -> Float[Tensor, " N"]:
    """Half the squared error of a value, in nats squared, clipped as PPO does.

        near = old + clip(V - old, -c, c)
        loss = 1/2 max((V - target)^2, (near - target)^2)

    Pessimistic: a value that moved by more than c towards its target has no gradient, one that
    moved away keeps it. Stationary at V = target; without a limit it is the squared error.

    Args:
        values: V; carries the gradient.
        old_values: V before this step's updates.
        targets: as from `critic_targets`.
        clip_nats: c, > 0; None for no limit.

    Returns:
        One loss per row, >= 0.

    Source: value clipping as in the reference implementation of PPO, arXiv:1707.06347; the limit
    in nats is ours.
    """
    _check_clip(clip_nats)
    error = (values - targets).square()
    if clip_nats is None:
        return 0.5 * error
    near = old_values + (values - old_values).clamp(-clip_nats, clip_nats)
    return 0.5 * torch.maximum(error, (near - targets).square())


def explained_variance(stats: Mapping[str, Stat]) -> float:
    """The share of the targets' variance that the values explain, from the sums `fit` returns.

        EV = 1 - Var(target - V) / Var(target)

    1 is perfect up to a constant, 0 what a constant explains, negative worse than that; NaN where
    the targets do not vary. Sums of several steps or ranks, added first, give the exact joint
    number, which averages of the shares would not.
    """
    variance = _variance(stats, "target")
    return 1 - _variance(stats, "residual") / variance if variance > 0 else float("nan")


class Critic:
    """A value head with its own optimizer and the rows it still learns from.

    Implements `opd.types.Critic`. Deterministic given the generators; `state_dict` holds all the
    rest, so that a critic that is loaded goes on bit for bit as the one that was saved.

    Args:
        input_size: H, the width of the student's hidden states.
        generator: draws the hidden layer's first weights.
    """

    def __init__(
        self,
        input_size: int,
        settings: CriticSettings,
        *,
        generator: torch.Generator | None = None,
        device: torch.device | str = "cpu",
    ) -> None:
        self.settings = settings
        self.head = ValueHead(input_size, settings.hidden_units, generator=generator).to(device)
        self.optimizer = torch.optim.AdamW(
            self.head.parameters(), lr=settings.learning_rate, weight_decay=0.0
        )
        self.replay: deque[tuple[Tensor, Tensor]] = deque(maxlen=settings.replay_steps)
        self.steps = 0

    @property
    def warming_up(self) -> bool:
        """Whether the coming step is one in which only the critic learns."""
        return self.steps < self.settings.warmup_steps

    @torch.no_grad()
    def values(self, hidden: Float[Tensor, "N H"]) -> Float[Tensor, " N"]:
        """The value of each state, in nats, detached."""
        chunks = torch.split(hidden, self.settings.rows_per_update)
        return torch.cat([self.head(rows) for rows in chunks])

    def bootstrap(
        self, hidden: Float[Tensor, "B H"], cut_off: Bool[Tensor, " B"]
    ) -> Float[Tensor, " B"]:
        """The value of the state after each response's last token, in nats.

        Args:
            hidden: the student's state there; anything where the response ended.
            cut_off: the response was cut off at the length limit.

        Returns:
            0 where the response ended: nothing follows.
        """
        return torch.where(cut_off, self.values(hidden), 0.0)

    def fit(
        self,
        hidden: Float[Tensor, "N H"],
        targets: Float[Tensor, " N"],
        place: Float[Tensor, " N"],
        generator: torch.Generator,
    ) -> dict[str, Stat]:
        """Teach the critic one step's rows, and those of the steps it still remembers.

        Args:
            hidden: the states whose values were used in this step.
            targets: as from `critic_targets`, packed.
            place: where in its response a row stands, from 0 (first token) to 1 (last).
            generator: draws the rows of each update; on the CPU.

        Returns:
            Of this step's rows, before they are taught: sums of targets, residuals and their
            squares (see `explained_variance`), residuals by place. Of the updates: loss and the
            share of values held back.
        """
        if not targets.numel():
            self.steps += 1
            return {}
        hidden, targets = hidden.detach(), targets.detach().float()
        self._set_unit(targets)
        measured = self._measure(self.values(hidden), targets, place)
        taught = self._teach(hidden, targets, generator)
        self.replay.append((hidden, targets))
        self.steps += 1
        return {**measured, **taught}

    def state_dict(self) -> dict[str, Any]:
        """All that a critic of the same settings needs to go on."""
        return {
            "head": copy.deepcopy(self.head.state_dict()),
            "optimizer": copy.deepcopy(self.optimizer.state_dict()),
            "replay": list(self.replay),  # rows are never written to
            "steps": self.steps,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where the critic that returned `state` was."""
        self.head.load_state_dict(state["head"])
        # The optimizer would keep the given tensors and write to them.
        self.optimizer.load_state_dict(copy.deepcopy(state["optimizer"]))
        device = self.head.unit.device
        self.replay.clear()
        self.replay.extend(
            (hidden.to(device), targets.to(device)) for hidden, targets in state["replay"]
        )
        self.steps = state["steps"]

    def _set_unit(self, targets: Float[Tensor, " N"]) -> None:
        """Choose the head's unit once, from the first targets that are not all 0.

        Until then the head has said 0 and learned nothing, so no value jumps.
        """
        if self.head.unit == 0:
            self.head.unit.copy_(targets.square().mean().sqrt())

    def _measure(
        self,
        values: Float[Tensor, " N"],
        targets: Float[Tensor, " N"],
        place: Float[Tensor, " N"],
    ) -> dict[str, Stat]:
        targets = targets.double()
        residual = targets - values
        stats = {
            "critic/value": _stat(values),
            "critic/target": _stat(targets),
            "critic/target_square": _stat(targets.square()),
            "critic/residual": _stat(residual),
            "critic/residual_square": _stat(residual.square()),
        }
        bins = (place * BINS).long().clamp(0, BINS - 1)
        sums = torch.zeros(BINS, dtype=torch.float64, device=bins.device)
        totals = sums.index_add(0, bins, residual).tolist()
        counts = torch.bincount(bins, minlength=BINS).tolist()
        for index, (total, count) in enumerate(zip(totals, counts, strict=True)):
            stats[f"critic/residual/bin_{index}"] = Stat(total, count)
        return stats

    def _teach(
        self,
        hidden: Float[Tensor, "N H"],
        targets: Float[Tensor, " N"],
        generator: torch.Generator,
    ) -> dict[str, Stat]:
        states = torch.cat([hidden, *(rows for rows, _ in self.replay)])
        wanted = torch.cat([targets, *(rows for _, rows in self.replay)])
        before = self.values(states)
        clip = self.settings.clip_nats
        loss, held_back = Stat(0, 0), Stat(0, 0)
        for rows in self._draws(wanted, generator):
            values, then, goal = self.head(states[rows]), before[rows], wanted[rows]
            losses = value_loss(values, then, goal, clip_nats=clip)
            self.optimizer.zero_grad()
            # In units, not in nats: Adam's eps then means the same at every scale.
            loss_in_units = losses.mean() / self.head.unit.clamp(min=1e-12).square()
            torch.autograd.backward(loss_in_units)
            self.optimizer.step()
            loss += _stat(losses)
            held_back += _stat(_held_back(values, then, goal, clip_nats=clip))
        return {"critic/loss": loss, "critic/clip_share": held_back}

    def _draws(self, rows: Float[Tensor, " M"], generator: torch.Generator) -> Iterator[Tensor]:
        for _ in range(self.settings.updates_per_step):
            order = torch.randperm(len(rows), generator=generator)
            yield order[: self.settings.rows_per_update].to(rows.device)


def _check_clip(clip_nats: float | None) -> None:
    if clip_nats is not None and not clip_nats > 0:
        raise ValueError(
            f"critic.clip_nats must be > 0, got {clip_nats}; leave it out (None) for no limit"
        )


def _stat(rows: Tensor) -> Stat:
    return Stat(float(rows.detach().sum(dtype=torch.float64)), rows.numel())


def _variance(stats: Mapping[str, Stat], name: str) -> float:
    return stats[f"critic/{name}_square"].mean - stats[f"critic/{name}"].mean ** 2
