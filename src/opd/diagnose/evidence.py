"""What a probe has seen of a student and its teacher: numbers of rows and responses, no text."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from opd.errors import DataError
from opd.types import unpack_rows

DRAWS = 1000
"""Bootstrap samples behind an interval."""
LEVEL = 0.95
"""Of every interval."""


@dataclass(frozen=True)
class Estimate:
    """A number with its 95 % interval; all NaN where nothing is known."""

    value: float = math.nan
    low: float = math.nan
    high: float = math.nan
    n: int = 0

    @property
    def known(self) -> bool:
        """Whether there is a number at all."""
        return not math.isnan(self.value)


@dataclass(frozen=True)
class Recovery:
    """The teacher's continuations of the student's responses, cut at one depth.

    Attributes:
        depth: share of the response that the student has written; 0: the prompt alone.
        prompt: which prompt each continuation belongs to.
        teacher: its verdicts.
        student: the verdicts of the same responses as the student ended them.
    """

    depth: float
    prompt: Int[Tensor, " M"]
    teacher: Float[Tensor, " M"]
    student: Float[Tensor, " M"]


@dataclass(frozen=True)
class Privilege:
    """What an extra context is worth to a view: verdicts per prompt with it and without it."""

    view: str
    with_context: Float[Tensor, " P"]
    without: Float[Tensor, " P"]


@dataclass(frozen=True)
class Evidence:
    """One batch of the student's answers to held-out prompts, as student and teacher see it.

    Attributes:
        tokens, mask: the responses; row n of `rows` is the n-th True of `mask`, row by row.
        group: which prompt each response answers.
        verdict: the verifier's scores; NaN where there is none.
        stop_reason: why each response ended.
        rows: per-row numbers by the names of `opd.diagnose`; NaN on rows without an answer.
        k: entries of the lists that `rows` compares.
        vocab_size: tokens that are compared.
        absent: what could not be measured, and why.
        teacher_verdict: of the teacher's own answers, one for each prompt; empty: it wrote none.
        teacher_on_data: per-row surprise of the teacher at the data's own responses; empty: the
            data has none, or the teacher does not say.
        recoveries: the teacher's continuations, by rising depth.
        privileges: of the views with a context that can be measured.
        contexts: names of all views with a context.
        gradient_cosine: of the run's gradient with the verifier's policy gradient.
    """

    tokens: Int[Tensor, "B T"]
    mask: Bool[Tensor, "B T"]
    group: Int[Tensor, " B"]
    verdict: Float[Tensor, " B"]
    stop_reason: tuple[str, ...]
    rows: Mapping[str, Tensor]
    k: int
    vocab_size: int
    absent: Mapping[str, str] = field(default_factory=dict)
    teacher_verdict: Float[Tensor, " P"] = field(default_factory=lambda: torch.empty(0))
    teacher_on_data: Float[Tensor, " M"] = field(default_factory=lambda: torch.empty(0))
    recoveries: tuple[Recovery, ...] = ()
    privileges: tuple[Privilege, ...] = ()
    contexts: tuple[str, ...] = ()
    gradient_cosine: Estimate = field(default_factory=Estimate)

    @property
    def prompts(self) -> int:
        """How many prompts were answered."""
        return int(self.group.max()) + 1 if len(self.group) else 0

    @property
    def prompt_of_row(self) -> Int[Tensor, " N"]:
        """Which prompt a row belongs to."""
        return self.group.unsqueeze(1).expand_as(self.mask)[self.mask]

    def row(self, name: str) -> Float[Tensor, " N"]:
        """One number per row.

        Raises:
            DataError: it was not measured; says why.
        """
        if name not in self.rows:
            raise DataError(f"{name} was not measured: {self.absent.get(name, 'nobody asked')}")
        return self.rows[name]

    def per_token(self, name: str) -> tuple[Float[Tensor, "B T"], Bool[Tensor, "B T"]]:
        """A row's number at its place in its response, and where there is one."""
        values = self.row(name)
        known = unpack_rows((~values.isnan()).float(), self.mask) > 0
        return unpack_rows(torch.where(values.isnan(), 0.0, values), self.mask), known

    def per_response(self, name: str) -> Float[Tensor, " B"]:
        """The mean of a row's number over each response; NaN of one without rows."""
        values, known = self.per_token(name)
        return values.double().sum(1) / known.sum(1)

    # -- intervals over prompts --------------------------------------------------------------

    def mean_of_rows(
        self, values: Float[Tensor, " N"], chosen: Bool[Tensor, " N"] | None = None
    ) -> Estimate:
        """The mean over rows, its interval from prompts drawn again."""
        known = ~values.isnan() if chosen is None else chosen & ~values.isnan()
        return mean_over_groups(values[known], self.prompt_of_row[known], self.prompts)

    def mean_of_responses(self, values: Float[Tensor, " B"]) -> Estimate:
        """The mean over responses, its interval from prompts drawn again."""
        known = ~values.isnan()
        return mean_over_groups(values[known], self.group[known], self.prompts)

    def of_responses(self, statistic: Callable[[Tensor], float], draws: int = 200) -> Estimate:
        """Any statistic of response indices, its interval from prompts drawn again.

        Args:
            statistic: of the indices of some responses, one standing there as often as its prompt
                was drawn.
        """
        members = [torch.where(self.group == prompt)[0] for prompt in range(self.prompts)]
        value = statistic(torch.arange(len(self.group)))
        found = []
        for chosen in _draws(self.prompts, draws).tolist():
            found.append(statistic(torch.cat([members[prompt] for prompt in chosen])))
        return interval_of(value, torch.tensor(found, dtype=torch.float64), self.prompts)


def mean_over_groups(
    values: Float[Tensor, " n"], group: Int[Tensor, " n"], groups: int
) -> Estimate:
    """A mean whose interval is that of whole groups drawn again with replacement.

    Rows of one prompt stand and fall together, so they are no independent draws.
    """
    if not values.numel():
        return Estimate()
    sums = torch.bincount(group, weights=values.double(), minlength=groups)
    counts = torch.bincount(group, minlength=groups).double()
    chosen = _draws(groups, DRAWS)
    drawn = sums[chosen].sum(1) / counts[chosen].sum(1)
    value = float(sums.sum() / counts.sum())
    return interval_of(value, drawn, int((counts > 0).sum()))


def interval_of(value: float, drawn: Float[Tensor, " n"], n: int) -> Estimate:
    """A value with the middle 95 % of what the draws gave.

    Without bounds where there is but one prompt, which drawn again is always itself.
    """
    known = drawn[~drawn.isnan()]
    if math.isnan(value):
        return Estimate(n=n)
    if n < 2 or not len(known):
        return Estimate(value, -math.inf, math.inf, n)
    edge = (1 - LEVEL) / 2
    ends = torch.tensor([edge, 1 - edge], dtype=torch.float64)
    low, high = known.quantile(ends, interpolation="nearest").tolist()
    return Estimate(value, min(low, value), max(high, value), n)


def cosine_of_sums(
    first: Float[Tensor, "P D"], second: Float[Tensor, "P D"], draws: int = DRAWS
) -> Estimate:
    """The cosine of two gradients, its interval from prompts drawn again.

    Args:
        first, second: what each prompt adds to the one and to the other.
    """
    prompts = len(first)
    pairs = (first, second), (first, first), (second, second)
    products = [one.double() @ other.double().T for one, other in pairs]
    chosen = torch.nn.functional.one_hot(_draws(prompts, draws), prompts).sum(1).double()
    weights = torch.cat([torch.ones(1, prompts, dtype=torch.float64), chosen])
    between, own, others = (((weights @ each) * weights).sum(1) for each in products)
    found = torch.where(own * others > 0, between / (own * others).sqrt(), math.nan)
    return interval_of(float(found[0].clamp(-1.0, 1.0)), found[1:].clamp(-1.0, 1.0), prompts)


def _draws(groups: int, draws: int) -> Int[Tensor, "draws groups"]:
    """The same draws for every number of a probe, so that numbers can be compared."""
    generator = torch.Generator().manual_seed(0)
    return torch.randint(max(1, groups), (draws, groups), generator=generator)
