"""What the gradient of a run and of its neighbours is on one frozen batch; no step is taken.

A neighbour differs from the run's objective in one of the survey's variables. All go through the
functions of a step: observe, score, signal, update.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from opd import catalog
from opd.diagnose import gradient_variance, self_distillation_residual
from opd.diagnose.evidence import Estimate, cosine_of_sums
from opd.diagnose.records import Gathered
from opd.errors import OpdError
from opd.formula import credit, divergence, reward, support, surrogate, weight
from opd.objective import Dense, Method, Objective, Routed, Sampled, Term
from opd.rollout.edit import take
from opd.rollout.pack import select, with_token
from opd.student import Student
from opd.teacher.local import LocalTeacher
from opd.training import step as steps
from opd.training.pilot import Doing, Pilot, comparing, nothing, scored
from opd.training.plan import make_plan
from opd.types import Batch, Rollout, TeacherRequest

RESPONSES = 64
"""Of the frozen batch, whole prompts."""
ENTRIES = 200_000
"""Of a gradient, evenly spread, behind a variance; a small model has fewer."""
VALUE = "value"
"""The critic's, which before any training says 0."""

Gradient = Mapping[str, Tensor]


@dataclass(frozen=True)
class Neighbour:
    """An objective on the frozen batch.

    Attributes:
        name: what differs, or `this run`.
        variable: the one of the survey's nine that differs; empty for the run itself.
        objective: the composition.
        cosine: of its gradient with that of the reverse KL over the whole vocabulary; NaN where
            one of them is zero.
        seconds: CPU-seconds of a step on the frozen batch, without its rollout.
        wire_bytes: of a served teacher's answer, per token; NaN of one in this process.
        why_not: why it could not be tried; empty where it was.
    """

    name: str
    variable: str
    objective: Objective
    cosine: float = math.nan
    seconds: float = math.nan
    wire_bytes: float = math.nan
    why_not: str = ""

    @property
    def per_second(self) -> float:
        """Cosine per CPU-second, by which neighbours are ranked; NaN where it was not tried."""
        return self.cosine / self.seconds if self.seconds else math.nan


@dataclass(frozen=True)
class CreditNoise:
    """How much a way to give credit differs from response to response.

    Attributes:
        name: of the credit.
        variance: trace of the covariance of one response's gradient.
        signal: squared norm of the mean over the responses, less what noise alone adds to it.
        cosine: of the batch's gradient with that of the reverse KL over the whole vocabulary.
    """

    name: str
    variance: float
    signal: float
    cosine: float

    @property
    def noise_to_signal(self) -> float:
        """Responses whose mean gradient would be as much noise as signal; inf: no signal is seen"""
        return self.variance / self.signal if self.signal > 0 else math.inf


@dataclass(frozen=True)
class Gradients:
    """All that is known of the gradients at the first step.

    Attributes:
        neighbours: the best first; the run itself among them.
        credits: of the sampled-token estimators, each on the same responses.
        verifier_cosine: of the run's gradient with the verifier's policy gradient.
        self_loss, self_gradient: what is left where the student is its own teacher, the second as
            a share of the run's gradient; NaN where the method's stationary set has no say.
        responses: of the frozen batch.
    """

    neighbours: tuple[Neighbour, ...] = ()
    credits: tuple[CreditNoise, ...] = ()
    verifier_cosine: Estimate = field(default_factory=Estimate)
    self_loss: float = math.nan
    self_gradient: float = math.nan
    responses: int = 0


def measure_gradients(pilot: Pilot, doing: Doing = nothing) -> Gradients:
    """Neighbours, credits, the verifier's gradient and the student as its own teacher."""
    frozen = frozen_batch(pilot)
    judge = _Judge(pilot, frozen)
    full = judge.gradient(comparing(pilot.method, pilot.view, whole=pilot.whole).objective)
    found = []
    for each in neighbours(pilot):
        doing(f"the gradient of {each.name}")
        found.append(judge.tried(each, full))
    own = judge.gradient(pilot.method.objective)
    verifier = Estimate()
    if pilot.session.verifier is not None:
        doing("the verifier's policy gradient")
        # of all responses: few groups of a batch hold both a right and a wrong one
        everything = _Judge(pilot, pilot.rollout)
        by_verdict = Objective(Sampled(reward=reward.group_advantage))
        verifier = cosine_of_sums(
            everything.by_prompt(pilot.method.objective), everything.by_prompt(by_verdict)
        )
    doing("the variance of ways to give credit")
    credits = tuple(judge.noise(name, objective, full) for name, objective in ways_to_give(pilot))
    loss, left = _own_teacher(pilot, judge)
    size = _length(own)
    order = sorted(found, key=lambda each: -each.per_second if each.cosine == each.cosine else 1e9)
    return Gradients(
        tuple(order),
        credits,
        verifier,
        loss,
        left / size if size else math.nan,
        len(frozen.prompt_ids),
    )


def frozen_batch(pilot: Pilot) -> Rollout:
    """The first responses of the probe, whole prompts."""
    count = max(1, RESPONSES // pilot.settings.samples)
    rows = [row for row, group in enumerate(pilot.rollout.group.tolist()) if group < count]
    return take(pilot.rollout, rows)


# --------------------------------------------------------------------------------------------
# The neighbours


def neighbours(pilot: Pilot) -> Iterator[Neighbour]:
    """The run's objective, and what differs from it in one variable."""
    objective, vocabulary = pilot.method.objective, pilot.session.student.vocab_size
    yield Neighbour("this run", "", objective)
    place, main = _main_term(objective, pilot.view)
    if main is None:
        return
    seen = {objective}
    for name, variable, term in _variations(main, vocabulary, pilot.session.verifier is not None):
        terms = (*objective.terms[:place], term, *objective.terms[place + 1 :])
        try:
            changed = Objective(*terms, temperature=objective.temperature)
        except ValueError:  # another term reads what this one no longer has
            continue
        if changed not in seen:
            seen.add(changed)
            yield Neighbour(name, variable, changed)


def _main_term(objective: Objective, view: str) -> tuple[int, Term | None]:
    """The first term that compares with the view."""
    for place, term in enumerate(objective.terms):
        if isinstance(term, Dense | Sampled | Routed) and term.against == view:
            return place, term
    return 0, None


def _variations(
    term: Term, vocabulary: int, judged: bool
) -> Iterator[tuple[str, str, Dense | Sampled]]:
    """One variable at a time: support, divergence, update route, credit, gate."""
    if isinstance(term, Routed):
        yield "no route for suppressed mass", "vocabulary routing", term.source
        return
    if not isinstance(term, Dense | Sampled):
        return
    shared: dict[str, Any] = {
        name: getattr(term, name)
        for name in ("weights", "coef", "against", "rows", "reduction", "name")
    }
    if isinstance(term, Dense):
        yield "full vocabulary", "support", replace(term, support=support.full, tail="")
        for k in (4, 16):
            if k < vocabulary:
                top = partial(support.student_top_k, k=k)
                yield (
                    f"student's top {k}, rest in a bucket",
                    "support",
                    replace(term, support=top, tail="bucket"),
                )
        if vocabulary > 16:
            top = partial(support.teacher_top_k, k=16)
            yield (
                "teacher's top 16, rest in a bucket",
                "support",
                replace(term, support=top, tail="bucket"),
            )
        whole = replace(term, smoothing=0.0)
        yield "reverse KL", "divergence", replace(whole, divergence=divergence.reverse_kl)
        yield "forward KL", "divergence", replace(whole, divergence=divergence.forward_kl)
        jsd = partial(divergence.generalized_jsd, teacher_weight=0.5)
        yield "Jensen-Shannon", "divergence", replace(whole, divergence=jsd)
        yield (
            "sampled token, immediate credit",
            "update route",
            Sampled(reward=reward.teacher_log_ratio, surrogate=surrogate.score, **shared),
        )
    else:
        for name, slot in _CREDITS.items():
            yield f"{name} credit", "temporal credit", replace(term, credit=slot)
        yield (
            "full vocabulary, differentiated",
            "update route",
            Dense(divergence=divergence.reverse_kl, **shared),
        )
    half = partial(weight.prefix_share, share=0.5)
    yield "first half of the answers", "gate", replace(term, weights=(*term.weights, half))
    if judged:
        for name, gate in (("right", weight.correct), ("wrong", weight.incorrect)):
            yield f"{name} answers only", "gate", replace(term, weights=(*term.weights, gate))


_CREDITS: Mapping[str, Any] = {
    "immediate": credit.immediate,
    "windowed (4)": partial(credit.windowed, window=4),
    "return-to-go": credit.return_to_go,
    "Rao-Blackwell": credit.rao_blackwell,
}


def ways_to_give(pilot: Pilot) -> Iterator[tuple[str, Objective]]:
    """The sampled-token estimators whose noise is compared, by the name of their credit."""
    ways = {name: slot for name, slot in _CREDITS.items() if name != "windowed (4)"}
    ways["GAE (value 0, lambda 0.95)"] = partial(credit.gae, gae_lambda=0.95)
    for name, slot in ways.items():
        if pilot.whole or name != "Rao-Blackwell":
            term = Sampled(reward=reward.teacher_log_ratio, credit=slot, against=pilot.view)
            yield name, Objective(term, temperature=pilot.temperature)


# --------------------------------------------------------------------------------------------
# Gradients


class _Judge:
    """Takes gradients on one rollout and leaves none behind."""

    def __init__(self, pilot: Pilot, rollout: Rollout) -> None:
        self.pilot, self.rollout = pilot, rollout
        self.student: Student = pilot.session.student

    def ready(self, objective: Objective) -> Batch:
        """The batch of a step, its coupled quantities settled."""
        session = self.pilot.session
        method = Method(objective, views=self._views(objective))
        batch = scored(session, method, self.rollout)
        if objective.critic_term is not None:
            zero = torch.zeros(batch.token.mask.shape, device=batch.input_ids.device)
            batch = with_token(batch, values=zero, bootstrap_value=zero[:, 0])
        sampler = session.phases[-1].plan.sampler
        plan = make_plan(method, sampler, merge_ids=session.merge_ids)
        return steps.signal(self.student, batch, objective, plan, session.max_tokens, fresh=True)

    def _views(self, objective: Objective) -> Any:
        return self.pilot.method.views if objective.views() else ()

    def gradient(self, objective: Objective, batch: Batch | None = None) -> Gradient:
        """Of the whole rollout; empty where nothing depends on the student."""
        if objective.is_off:
            return {}
        ready = self.ready(objective) if batch is None else batch
        self.student.zero_grad(set_to_none=True)
        try:
            steps.update(self.student, ready, objective, self.pilot.session.max_tokens, step=0)
            return {
                name: weights.grad
                for name, weights in self.student.trainable().items()
                if weights.grad is not None
            }
        finally:
            self.student.zero_grad(set_to_none=True)

    def by_prompt(self, objective: Objective) -> Tensor:
        """What each prompt adds to the gradient, some entries of it."""
        batch, group = self.ready(objective), self.rollout.group
        parts = [
            select(batch, torch.where(group == prompt)[0].tolist()).batch
            for prompt in range(int(group.max()) + 1)
        ]
        return torch.stack([_some(self.gradient(objective, part), self.student) for part in parts])

    def tried(self, neighbour: Neighbour, full: Gradient) -> Neighbour:
        """With its cosine and its cost, or why it has none."""
        started = time.process_time()
        try:
            own = self.gradient(neighbour.objective)
        except OpdError as error:
            return replace(neighbour, why_not=str(error))
        return replace(
            neighbour,
            cosine=cosine(own, full),
            seconds=time.process_time() - started,
            wire_bytes=self._wire(neighbour.objective),
        )

    def _wire(self, objective: Objective) -> float:
        from opd.training.teachers import entries_by_view

        session = self.pilot.session
        method = Method(objective, views=self._views(objective))
        plan = make_plan(method, session.phases[-1].plan.sampler, merge_ids=session.merge_ids)
        entries = entries_by_view(session.teachers, session.config, method, plan)
        return float(sum(each.bytes_per_token for each in entries.values())) or math.nan

    def noise(self, name: str, objective: Objective, full: Gradient) -> CreditNoise:
        """The spread of the gradient from response to response, and what is left in the mean."""
        batch = self.ready(objective)
        drawn, total = [], len(self.rollout.prompt_ids)
        for row in range(total):
            part = select(batch, [row]).batch
            drawn.append(_some(self.gradient(objective, part), self.student))
        gradients = torch.stack(drawn) * total  # of one response, were it the batch
        variance = gradient_variance(gradients)
        mean = float(gradients.double().mean(0).square().sum())
        return CreditNoise(
            name,
            variance,
            mean - variance / total,
            cosine(self.gradient(objective, batch), full),
        )


def _own_teacher(pilot: Pilot, judge: _Judge) -> tuple[float, float]:
    """The largest loss and gradient where the student scores in its teacher's place."""
    entry = catalog.methods().get(pilot.method.name)
    objective = pilot.method.objective
    stationary = entry is not None and entry.section("Stationary").startswith("teacher")
    views = {view.name: view for view in pilot.plan.views}
    asked = [name for name, view in views.items() if view.source == "teacher"]
    plain = not any(view.context or view.parts for view in views.values())
    if not (stationary and plain and asked) or objective.critic_term is not None:
        return math.nan, math.nan
    session = pilot.session
    own = LocalTeacher(
        session.student.loaded,
        vocab_size=session.student.vocab_size,
        max_tokens=session.max_tokens,
    )
    batch = scored(session, pilot.method, judge.rollout)
    reply = own.score(TeacherRequest(batch=batch, temperature=pilot.temperature))
    batch = with_token(batch, views={**batch.token.views, **dict.fromkeys(asked, reply)})
    batch = steps.signal(
        session.student, batch, objective, pilot.plan, session.max_tokens, fresh=False
    )
    gathered = Gathered()
    session.student.zero_grad(set_to_none=True)
    try:
        steps.update(
            session.student, batch, objective, session.max_tokens, step=0, gathered=gathered
        )
        gradients = [
            weights.grad.flatten()
            for weights in session.student.trainable().values()
            if weights.grad is not None
        ]
    finally:
        session.student.zero_grad(set_to_none=True)
    rows = gathered.joined(len(batch.row_index))
    losses = torch.cat([value for name, value in rows.items() if name.startswith("loss/")])
    flat = torch.cat(gradients)
    loss, _ = self_distillation_residual(losses, flat)
    return loss, float(flat.double().norm())


def cosine(one: Gradient, other: Gradient) -> float:
    """Of two gradients, weight by weight; NaN where one is zero, or not finite."""

    def product(first: Gradient, second: Gradient) -> float:
        return sum(
            float(first[name].flatten().double() @ second[name].flatten().double())
            for name in first.keys() & second.keys()
        )

    lengths = product(one, one) * product(other, other)
    if not 0.0 < lengths < math.inf:
        return math.nan
    return max(-1.0, min(1.0, product(one, other) / math.sqrt(lengths)))


def _length(gradient: Gradient) -> float:
    return math.sqrt(sum(float(part.double().square().sum()) for part in gradient.values()))


def _some(gradient: Gradient, student: Student) -> Tensor:
    """Evenly spread entries of a gradient, zeros where a weight has none, scaled to its norm."""
    total = sum(weights.numel() for weights in student.trainable().values())
    every = max(1, math.ceil(total / ENTRIES))
    parts = [
        gradient.get(name, torch.zeros_like(weights)).flatten()[::every]
        for name, weights in student.trainable().items()
    ]
    return torch.cat(parts).float().cpu() * math.sqrt(every)
