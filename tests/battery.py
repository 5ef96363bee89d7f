"""What every formula must satisfy, run over all of them: a new one is tested once it is named.

Arguments are made from the annotation (shape) and the name (meaning) of each parameter. A formula
with knobs must have an entry in `KNOBS`.
"""

from __future__ import annotations

import importlib
import inspect
import pkgutil
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import opd.formula
from opd.types import Count, Unembedding

N = 6
SIZES = {"K": 6, "J": 6, "V": 7, "S": 2, "H": 4, "B": 3, "T": 5, "L": 7, "1": 1, "K_plus_1": 7}
MODULES = tuple(module.name for module in pkgutil.iter_modules(opd.formula.__path__))

KNOBS: dict[str, dict[str, Any]] = {
    "numerics.log_mixture": {"weight": 0.3},
    "divergence.generalized_jsd": {"teacher_weight": 0.3},
    "divergence.skew_forward_kl": {"skew": 0.3},
    "divergence.skew_reverse_kl": {"skew": 0.3},
    "divergence.alpha_divergence": {"alpha": 0.3},
    "divergence.power_divergence": {"power": 0.7},
    "support.student_top_k": {"k": 3},
    "support.teacher_top_k": {"k": 3},
    "support.union": {"teacher_k": 2, "student_k": 3},
    "support.intersection": {"teacher_k": 4, "student_k": 3},
    "support.routing_support": {"teacher_k": 2, "student_k": 3},
    "support.restrict_by_tail": {"tail": "bucket", "side": "student"},
    "support.entries_by_tail": {"tail": "bucket", "side": "student"},
    "support.smooth": {"smoothing": 0.1, "vocab_size": 7},
    "support.floor_outweighs": {"smoothing": 0.1, "vocab_size": 7},
    "credit.discounted": {"gamma": 0.9, "meaning": "task"},
    "credit.windowed": {"window": 3},
    "credit.damped_future": {"future_weight": 0.6},
    "credit.length_neutral_future": {"future_weight": 0.6},
    "credit.gae": {"gae_lambda": 0.7},
    "reward.clipped_log_ratio": {"low": -0.8, "high": 0.6},
    "reward.floored_log_ratio": {"floor_nats": -0.7},
    "reward.tanh_log_ratio": {"scale": 0.9},
    "reward.proximal_log_ratio": {"teacher_share": 0.4},
    "reward.power_reward": {"power": 1.7},
    "reward.generalized_jsd_reward": {"teacher_weight": 0.3},
    "reward.skew_forward_kl_reward": {"skew": 0.3},
    "reward.skew_reverse_kl_reward": {"skew": 0.3},
    "reward.alpha_divergence_reward": {"alpha": 0.4},
    "reward.overlong_cost": {"start": 2, "limit": 5},
    "outcome.terminal_verdict": {"scale": 0.7},
    "outcome.add_group_advantage": {"scale": 0.7},
    "outcome.mix_group_advantage": {"share": 0.4},
    "outcome.sigmoid_gate": {"sharpness": 1.5},
    "outcome.magnitude_only": {"low": 0.5, "high": 0.8},
    "surrogate.clipped": {"low": 0.2, "high": 0.3},
    "surrogate.dual_clipped": {"low": 0.2, "high": 0.3, "negative_cap": 2.0},
    "surrogate.truncated_importance": {"cap": 1.2},
    "surrogate.masked_importance": {"low": 0.6, "high": 1.7},
    "surrogate.shaped_probability": {"half_at": 0.2},
    "surrogate.geometric_ratio": {"old_share": 0.6, "low": 0.2, "high": 0.3},
    "regulariser.entropy_floor": {"nats": 0.9},
    "routing.endorsed_and_reachable": {"teacher_k": 3, "student_k": 4},
    "routing.endorsed_or_likely": {"teacher_k": 3, "student_k": 1, "min_probability": 0.3},
    "routing.teacher_top": {"teacher_k": 3},
    "routing.by_powers": {"teacher_power": 0.5, "student_power": 1.0, "score_power": 0.7},
    "routing.by_score": {"temperature": 0.5},
    "routing.candidate_mass": {"at_least": 0.5},
    "routing.evidence": {"full_at": 0.5},
    "weight.student_entropy_above": {"nats": 0.5},
    "weight.student_entropy_below": {"nats": 0.5},
    "weight.teacher_entropy_above": {"nats": 0.5},
    "weight.teacher_entropy_below": {"nats": 0.5},
    "weight.confident_wrong": {"below_nats": 1.0, "above": 0.3},
    "weight.surprise": {"boost": 1.0},
    "weight.trusted": {"at_least": 0.5},
    "weight.untrusted": {"below": 0.5},
    "weight.top_k_overlap": {"k": 3},
    "weight.overlap_above": {"k": 3, "at_least": 0.5},
    "weight.position_decay": {"half_life": 2.0},
    "weight.relative_position": {"start": 1.5, "end": 0.5},
    "weight.prefix": {"tokens": 3},
    "weight.prefix_share": {"share": 0.6},
    "weight.cumulative_drift": {"boost": 0.5},
    "weight.drift_budget": {"nats": 1.0},
    "selection.keep_high_entropy": {"share": 0.4},
    "selection.keep_low_entropy": {"share": 0.4},
    "selection.keep_large_divergence": {"share": 0.4},
    "selection.keep_unlikely": {"share": 0.4},
    "weight.endorsement": {"sharpness": 1.5},
    "weight.importance": {"cap": 1.2},
    "selection.keep_overrated": {"share": 0.4},
    "selection.keep_uncertain_or_wrong": {"share": 0.4},
    "weight.overlap_decay": {"k": 3, "at_least": 0.6, "drop": 0.3, "base": 0.1},
    "weight.sigmoid_position": {"least": 0.25, "centre": 0.3, "width": 0.1},
    "weight.teacher_confidence": {"nats": 0.5, "least": 0.2},
    "weight.confidence": {"teacher_gain": 1.0, "student_gain": 0.5},
    "selection.keep_soft_or": {"share": 0.4},
    "selection.keep_teachable": {"k": 3, "share": 0.4},
    "selection.keep_high_signal": {"share": 0.4},
    "response.likely_for_teacher": {"drop_share": 0.4},
    "response.pivotal": {
        "at_least": 0.1,
        "ratio_cap": 1.5,
        "temperature": 0.8,
        "weight_cap": 1.3,
    },
    "outcome.reversed_magnitude": {"width": 0.5, "strength": 0.7},
    "outcome.relative_magnitude": {"cap": 1.5},
    "outcome.bounded_shift": {"temperature": 0.4, "scale": 0.5, "at_least": 0.1},
    "outcome.deliberation_bonus": {"scale": 0.5},
    "outcome.add_verdict_sign": {"scale": 0.7},
    "outcome.agreement_scale": {"agreeing": 1.5, "other": 0.5},
    "outcome.agreement_gate": {"sharpness": 1.5},
    "outcome.add_verdict_residual": {"scale": 0.7, "limit": 1.5},
    "outcome.margin_shift": {"margin": 0.4, "correct_share": 0.5},
    "credit.scaled_by_turn": {"gain_cap": 0.5},
    "divergence.capped_forward_kl": {"cap": 0.05},
    "numerics.rounded_share": {"share": 0.4},
    "selection.keep_large_forward_kl": {"share": 0.4},
    "selection.keep_entropy_mismatch": {"share": 0.4},
    "divergence.renyi_divergence": {"order": 0.7},
    "credit.bounded_return": {"gamma": 0.9, "meaning": "task"},
    "weight.update_ratio": {"cap": 1.2},
    "weight.engine_ratio": {"cap": 1.2},
    "weight.engine_ratio_within": {"low": 0.6, "high": 1.7},
    "weight.after": {"tokens": 2},
    "response.share_of_correct": {"temperature": 0.8},
    "response.share_of_wrong": {"temperature": 0.8},
    "response.sure_teacher_where_wrong": {"sharpness": 1.2},
    "response.difficulty": {"pass_power": 1.0, "fail_power": 2.0},
    "weight.teacher_passes": {"at_least": 0.5},
    "weight.teacher_fails": {"below": 0.5},
    "reduce.token_mean": {"count": Count(rows=9.0, sequences=4.0)},
    "reduce.sequence_mean": {"count": Count(rows=9.0, sequences=4.0)},
    "reduce.sequence_sum": {"count": Count(rows=9.0, sequences=4.0)},
}
"""Values of the knobs by `module.function`."""

DETACHED_MODULES = ("reward", "weight", "selection", "response", "outcome", "credit")
"""Modules whose results never carry a gradient."""

TRANSFERS = (
    "routing.bounded_cross_entropy",
    "routing.linear_transfer",
    "routing.pairwise_logistic",
)
"""The routing formulas that carry a gradient, through the student's distribution alone."""

STOP_GRADIENT = (
    "divergence.candidate_advantage_loss",
    "divergence.hybrid_policy",
    "divergence.truncated_reverse_kl",
    "routing.bounded_cross_entropy",
    "surrogate.masked_importance",
    "surrogate.tail_residual",
    "surrogate.truncated_importance",
)
"""Losses with a detached part that moves with the student: by design their gradient is not the
slope of their value. What it is instead is held by the tests of their module."""

STEP_WIDE = (
    "credit.batch_mean",
    "credit.group_mean",
    "credit.length_neutral_future",
    "credit.position_mean",
    "credit.standardised",
    "outcome.add_group_advantage",
    "outcome.add_verdict_residual",
    "outcome.bounded_shift",
    "outcome.deliberation_bonus",
    "outcome.relative_magnitude",
    "outcome.reversed_magnitude",
    "outcome.magnitude_only",
    "outcome.margin_shift",
    "outcome.mix_group_advantage",
    "outcome.sigmoid_gate",
    "reward.group_advantage",
    "reward.group_deviation",
    "response.difficulty",
    "response.group_all_fail",
    "response.group_some_pass",
    "response.likely_for_teacher",
    "response.pivotal",
    "response.share_of_correct",
    "response.share_of_wrong",
    "response.sure_teacher_where_wrong",
    "weight.confidence",
    "selection.keep_soft_or",
    "selection.keep_teachable",
    "selection.keep_high_signal",
    "selection.keep_high_entropy",
    "selection.keep_large_divergence",
    "selection.keep_low_entropy",
    "selection.keep_entropy_mismatch",
    "selection.keep_large_forward_kl",
    "selection.keep_overrated",
    "selection.keep_uncertain_or_wrong",
    "selection.keep_unlikely",
)
"""Formulas that look at the whole optimizer step, so that responses do depend on each other."""


@dataclass(frozen=True)
class Formula:
    """One public function of `opd.formula`."""

    name: str
    function: Callable[..., Any]
    exported: bool

    @property
    def module(self) -> str:
        return self.name.split(".")[0]

    @property
    def knobs(self) -> dict[str, Any]:
        required = {
            parameter.name
            for parameter in inspect.signature(self.function).parameters.values()
            if parameter.kind is inspect.Parameter.KEYWORD_ONLY
            and parameter.default is inspect.Parameter.empty
        }
        given = KNOBS.get(self.name, {})
        missing = required - set(given)
        assert not missing, f"say in tests/battery.py which {sorted(missing)} to give {self.name}"
        return given

    @property
    def annotations(self) -> dict[str, str]:
        return {
            parameter.name: str(parameter.annotation).replace("'", '"')
            for parameter in inspect.signature(self.function).parameters.values()
            if parameter.kind is not inspect.Parameter.KEYWORD_ONLY
        }

    @property
    def takes(self) -> list[str]:
        return list(self.annotations)

    def axes(self, argument: str) -> tuple[str, ...]:
        """Names of the axes of a tensor argument; none for other arguments."""
        found = re.search(r'\[Tensor, "([^"]*)"\]', self.annotations[argument])
        return tuple(found.group(1).split()) if found else ()

    @property
    def chooses(self) -> bool:
        """Whether the result says yes or no instead of holding numbers."""
        return str(inspect.signature(self.function).return_annotation).startswith("Bool")

    def has_rows(self, argument: str) -> bool:
        """Whether an argument's first axis is that of the rows."""
        axes = self.axes(argument)
        return bool(axes) and axes[0] != "S"

    def __call__(self, arguments: dict[str, Any]) -> Any:
        return self.function(*(arguments[name] for name in self.takes), **self.knobs)

    def arguments(
        self, seed: int = 0, *, dtype: torch.dtype = torch.float64, lead: tuple[int, ...] = (N,)
    ) -> dict[str, Any]:
        """Random arguments of the right shapes and meanings."""
        draw = torch.Generator().manual_seed(seed)
        return {name: self._argument(name, draw, dtype, lead) for name in self.takes}

    def _argument(
        self, name: str, draw: torch.Generator, dtype: torch.dtype, lead: tuple[int, ...]
    ) -> Any:
        if name == "unembedding":
            weight = torch.randn(SIZES["V"] + 2, SIZES["H"], generator=draw, dtype=dtype)
            bias = torch.randn(SIZES["V"] + 2, generator=draw, dtype=dtype)
            return Unembedding(weight, SIZES["V"], bias, logit_scale=0.7, soft_cap=2.0)
        axes, annotation = self.axes(name), self.annotations[name]
        assert axes, f"no generator in tests/battery.py for {name}: {annotation} of {self.name}"
        sizes = [lead if axis.startswith("*") else (SIZES[axis],) for axis in axes]
        shape = tuple(size for part in sizes for size in part)
        if annotation.startswith("Bool"):
            return torch.rand(shape, generator=draw) < 0.6
        if annotation.startswith("Int"):
            if name == "group":  # few enough that responses share one
                return torch.randint(2, shape, generator=draw)
            if name.endswith("ids"):  # distinct, likeliest first
                ids = torch.rand(shape, generator=draw).argsort(-1)
                absent = torch.rand(shape, generator=draw) < 0.15
                return torch.where(absent, -1, ids) if name == "support_ids" else ids
            return torch.randint(SIZES["V"], shape, generator=draw)
        values = torch.randn(shape, generator=draw, dtype=dtype)
        if name.endswith(("log_probs", "log_weights")) and axes[-1] in ("K", "V", "J"):
            return values.log_softmax(-1)
        if name == "inside" and axes[-1] == "K":  # a part of a distribution
            return values.log_softmax(-1) - 0.3
        if name.endswith(("log_probs", "logp", "log_mass", "log_tail")):
            return -values.abs() - 0.05
        if name == "routing":  # a share: some entries empty, the others sum to 1
            return torch.where(values < 0, -torch.inf, values).softmax(-1).nan_to_num()
        if name in ("total_variation", "jensen_shannon", "verdict"):
            return values.sigmoid()
        positive = (
            "count",
            "reverse_kl",
            "forward_kl",
            "student_entropy",
            "teacher_entropy",
            "amount",
        )
        return values.abs() if name in positive else values

    def distributions(self) -> list[str]:
        """Arguments that are log-distributions over a support."""
        return [
            name
            for name in self.takes
            if name.endswith(("log_probs", "log_weights")) and len(self.axes(name)) > 1
        ]

    def real_arguments(self) -> list[str]:
        """Arguments that are tensors of real numbers."""
        return [name for name in self.takes if self.annotations[name].startswith("Float")]


def formulas() -> Iterator[Formula]:
    """Every public function of every module of `opd.formula`."""
    for name in MODULES:
        module = importlib.import_module(f"opd.formula.{name}")
        public = {
            key: value
            for key, value in vars(module).items()
            if inspect.isfunction(value)
            and value.__module__ == module.__name__
            and not key.startswith("_")
            and inspect.signature(value).return_annotation != "bool"  # asks about formulas
        }
        assert set(module.__all__) <= set(public), f"opd.formula.{name}.__all__ names no function"
        for key, function in public.items():
            yield Formula(f"{name}.{key}", function, key in module.__all__)


def tensors(value: Any) -> list[Tensor]:
    """The tensors of a result or of an argument."""
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, Unembedding):
        return [part for part in (value.weight, value.bias) if part is not None]
    return []


def on(value: Any, device: str) -> Any:
    """An argument on another device."""
    if isinstance(value, Tensor):
        return value.to(device)
    if isinstance(value, Unembedding):
        bias = None if value.bias is None else value.bias.to(device)
        return Unembedding(
            value.weight.to(device), value.vocab_size, bias, value.logit_scale, value.soft_cap
        )
    return value


def finite_differences(
    function: Callable[[Tensor], Tensor], at: Tensor, step: float = 1e-6
) -> Tensor:
    """Central differences of a scalar function, one coordinate at a time."""
    gradient = torch.zeros_like(at)
    for index in range(at.numel()):
        moved = []
        for sign in (1, -1):
            shifted = at.clone()
            shifted.view(-1)[index] += sign * step
            moved.append(function(shifted))
        gradient.view(-1)[index] = (moved[0] - moved[1]) / (2 * step)
    return gradient
