"""What the gradient of a run and of its neighbours is on one frozen batch; no step is taken.

A neighbour differs from the run in one of the survey's variables. All go through the functions of
a step: observe, score, signal, update.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from opd import catalog
from opd.diagnose import gradient_variance, self_distillation_residual
from opd.diagnose.evidence import Estimate, cosine_of_sums
from opd.diagnose.records import Gathered
from opd.errors import DataError, OpdError
from opd.formula import credit, divergence, regulariser, reward, support, surrogate, weight
from opd.methods.parts import REFERENCE
from opd.methods.variables import regularises
from opd.objective import Dense, Method, Objective, Regulariser, Routed, Sampled, Term
from opd.rollout.edit import cut, take
from opd.rollout.pack import merge_rollouts, select, with_token
from opd.student import Student
from opd.teacher.local import LocalTeacher
from opd.training import step as steps
from opd.training.evaluate import verify_rollout
from opd.training.pilot import SEED, Doing, Pilot, comparing, nothing, scored
from opd.training.plan import make_plan
from opd.types import (
    Batch,
    Bound,
    Prompt,
    Rollout,
    Stat,
    StateSource,
    TeacherRequest,
    TeacherView,
    with_parts,
)

RESPONSES = 64
"""Of the frozen batch, whole prompts."""
ENTRIES = 200_000
"""Of a gradient, evenly spread, behind a variance; a small model has fewer."""
VALUE = "value"
"""The critic's, which before any training says 0."""
SMALL = 0.01
"""The coefficient of a regulariser that a run does not have."""
BY_STUDENT = StateSource()
BY_DATA = StateSource(student=0.0, data=1.0)
BY_TEACHER = StateSource(student=0.0, teacher=1.0)

Gradient = Mapping[str, Tensor]


@dataclass(frozen=True)
class Neighbour:
    """A composition, and its gradient on answers to the prompts of the frozen batch.

    Attributes:
        name: what differs, or `this run`.
        variable: the one of the survey's nine that differs; empty for the run itself.
        objective: its terms.
        cosine: of its gradient with that of the reverse KL over the whole vocabulary; NaN where
            one of them is zero.
        seconds: of a step on the frozen batch, without its rollout: CPU-seconds of this process,
            and the wait for served teachers.
        wall_seconds: of the same step by the clock, on whatever else the machine does.
        wire_bytes: of a served teacher's answer, per token; NaN of one in this process.
        why_not: why it could not be tried; empty where it was.
        views: what the objective compares with; None: the run's.
        states: who wrote the answers.
        seen: share of the run's divergence over the whole vocabulary that its support sees, of the
            run and of other supports; NaN where what is outside is cut off or driven to zero.
    """

    name: str
    variable: str
    objective: Objective
    cosine: float = math.nan
    seconds: float = math.nan
    wire_bytes: float = math.nan
    why_not: str = ""
    views: tuple[TeacherView, ...] | None = None
    states: StateSource = BY_STUDENT
    seen: float = math.nan
    wall_seconds: float = math.nan

    @property
    def per_second(self) -> float:
        """Cosine per second, by which neighbours are ranked; NaN where it was not tried."""
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
    whole = judge.whole()
    found = []
    for each in neighbours(pilot):
        doing(f"the gradient of {each.name}")
        found.append(_tried(pilot, frozen, each, full, whole))
    # all are held to the run's own time, which comes first and so is often slow
    again = _tried(pilot, frozen, found[0], full, whole)
    found[0] = min(found[0], again, key=lambda each: each.seconds)
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


def _tried(
    pilot: Pilot, frozen: Rollout, neighbour: Neighbour, full: Gradient, whole: float = math.nan
) -> Neighbour:
    """With its cosine and its cost, or why it has none."""
    try:
        text = answers_by(pilot, frozen, neighbour.states)
    except OpdError as error:
        return replace(neighbour, why_not=str(error))
    return _Judge(pilot, text, neighbour.views, neighbour.states).tried(neighbour, full, whole)


# --------------------------------------------------------------------------------------------
# The neighbours


def neighbours(pilot: Pilot) -> Iterator[Neighbour]:
    """The run, and what differs from it in one variable."""
    objective = pilot.method.objective
    yield Neighbour("this run", "", objective)
    yield from _other_terms(pilot)
    yield from _other_regularisers(pilot)
    yield from _other_privileges(pilot)
    yield Neighbour("text of the data", "state source", objective, states=BY_DATA)
    yield Neighbour("text by the teacher", "state source", objective, states=BY_TEACHER)


def _other_terms(pilot: Pilot) -> Iterator[Neighbour]:
    """The main term in other words."""
    objective, vocabulary = pilot.method.objective, pilot.session.student.vocab_size
    place, main = _main_term(objective, pilot.view)
    if main is None:
        return
    seen = {objective}
    for name, variable, term in _variations(main, vocabulary, pilot.session.verifier is not None):
        terms = (*objective.terms[:place], term, *objective.terms[place + 1 :])
        changed = _composed(terms, objective.temperature)
        if changed is not None and changed not in seen:
            seen.add(changed)
            yield Neighbour(name, variable, changed)


def _composed(terms: Sequence[Term], temperature: float) -> Objective | None:
    """The terms as an objective; None where one reads what no other has any more."""
    try:
        return Objective(*terms, temperature=temperature) if terms else None
    except ValueError:
        return None


def _main_term(objective: Objective, view: str) -> tuple[int, Term | None]:
    """The first term that compares with the view, and its place."""
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


def _other_regularisers(pilot: Pilot) -> Iterator[Neighbour]:
    """Without those the run has; with a small entropy bonus, or held near the student at step 0."""
    method, variable = pilot.method, "regulariser"
    terms, temperature = method.objective.terms, method.objective.temperature
    teaching = [term for term in terms if not regularises(term)]
    without = _composed(teaching, temperature) if len(teaching) < len(terms) else None
    if without is not None:
        yield Neighbour("no regulariser", variable, without)
    _, main = _main_term(method.objective, pilot.view)
    shared: dict[str, Any] = {"coef": SMALL}
    if main is not None:
        shared |= {"rows": main.rows, "reduction": main.reduction}
    penalties = [term.penalty for term in terms if isinstance(term, Regulariser)]
    if not any(Bound.of(penalty).function is regulariser.entropy_bonus for penalty in penalties):
        bonus = Regulariser(penalty=regulariser.entropy_bonus, against=pilot.view, **shared)
        changed = Objective(*terms, bonus, temperature=temperature)
        yield Neighbour(f"with an entropy bonus x {SMALL:g}", variable, changed)
    named = [view for view in method.views if view.name == REFERENCE.name]
    if named in ([], [REFERENCE]) and not any(term.against == REFERENCE.name for term in terms):
        pull = Dense(divergence=divergence.reverse_kl, against=REFERENCE.name, **shared)
        yield Neighbour(
            f"with a pull to the student at step 0 x {SMALL:g}",
            variable,
            Objective(*terms, pull, temperature=temperature),
            views=method.views if named else (*method.views, REFERENCE),
        )


def _other_privileges(pilot: Pilot) -> Iterator[Neighbour]:
    """Each view that reads a context, reading what the student reads instead."""
    method = pilot.method
    for view in with_parts(method.objective.views(), method.views):
        if not view.context:
            continue
        plain = without_context(view)
        views = tuple(plain if each.name == view.name else each for each in method.views)
        name = f"{view.name!r} without its context"
        yield Neighbour(name, "privilege", method.objective, views=views)


def without_context(view: TeacherView) -> TeacherView:
    """The same view, reading what the student reads."""
    return replace(view, context="", context_role="user", chat_template_kwargs=())


def ways_to_give(pilot: Pilot) -> Iterator[tuple[str, Objective]]:
    """The sampled-token estimators whose noise is compared, by the name of their credit."""
    ways = {name: slot for name, slot in _CREDITS.items() if name != "windowed (4)"}
    ways["GAE (value 0, lambda 0.95)"] = partial(credit.gae, gae_lambda=0.95)
    for name, slot in ways.items():
        if pilot.whole or name != "Rao-Blackwell":
            term = Sampled(reward=reward.teacher_log_ratio, credit=slot, against=pilot.view)
            yield name, Objective(term, temperature=pilot.temperature)


# --------------------------------------------------------------------------------------------
# Whose answers


def answers_by(pilot: Pilot, frozen: Rollout, states: StateSource) -> Rollout:
    """Judged answers to the prompts of the frozen batch by another writer, as many of each.

    Raises:
        DataError: it has none, or does not write.
    """
    if states == BY_STUDENT:
        return frozen
    session = pilot.session
    text = _from_data(pilot, frozen) if states == BY_DATA else _by_teacher(pilot, frozen)
    if not int(text.mask.sum()):
        raise DataError("its answers are empty, so there is nothing to learn from")
    return verify_rollout(text, session.verifier, session.tokenizer)[0]


def _from_data(pilot: Pilot, frozen: Rollout) -> Rollout:
    """The data's response to each prompt, as often as the student answers, so costs compare."""
    rows = [row for row, prompt in enumerate(frozen.prompts) if prompt.response_ids]
    if not rows:
        raise DataError("the data has no responses to these prompts")
    written = steps.rollout_from_data([frozen.prompts[row] for row in rows])
    _, group = torch.unique(frozen.group[rows], return_inverse=True)
    written = replace(written, group=group)
    limit = pilot.plan.sampler.max_new_tokens
    return cut(written, limit) if pilot.method.states.horizon else written


def _by_teacher(pilot: Pilot, frozen: Rollout) -> Rollout:
    session, samples = pilot.session, pilot.settings.samples
    sampler = session.teacher_sampler
    if sampler is None:
        raise DataError("the teacher only scores, it does not write")
    asked = replace(pilot.plan.sampler, samples_per_prompt=samples, student_top_k=0)
    generator = torch.Generator().manual_seed(session.config.seed + SEED + 3)
    per_call = max(1, session.config.sampler.max_sequences // samples)
    prompts = _prompts(frozen)
    parts = [
        sampler.sample(prompts[start : start + per_call], asked, generator=generator)
        for start in range(0, len(prompts), per_call)
    ]
    return merge_rollouts(parts, pad_id=session.student.loaded.pad_id)


def _prompts(rollout: Rollout) -> Sequence[Prompt]:
    """Each prompt once."""
    first = dict(zip(reversed(rollout.group.tolist()), reversed(rollout.prompts), strict=True))
    return [first[prompt] for prompt in sorted(first)]


# --------------------------------------------------------------------------------------------
# Gradients


class _Judge:
    """Takes gradients on one rollout and leaves none behind.

    Args:
        rollout: the text.
        views: what objectives compare with; None: the run's.
        states: who wrote the text.
    """

    def __init__(
        self,
        pilot: Pilot,
        rollout: Rollout,
        views: tuple[TeacherView, ...] | None = None,
        states: StateSource = BY_STUDENT,
    ) -> None:
        self.pilot, self.rollout, self.states = pilot, rollout, states
        self.views = pilot.method.views if views is None else views
        self.student: Student = pilot.session.student
        self.waited = 0.0

    def ready(self, objective: Objective) -> Batch:
        """The batch of a step, its coupled quantities settled.

        `waited` is then the time in which this process waited for served teachers.
        """
        session = self.pilot.session
        method = self._method(objective)
        started, cpu = time.perf_counter(), time.process_time()
        batch = scored(session, method, self.rollout)
        wall, cpu = time.perf_counter() - started, time.process_time() - cpu
        self.waited = max(0.0, wall - cpu) if session.opened.served else 0.0
        if objective.critic_term is not None:
            zero = torch.zeros(batch.token.mask.shape, device=batch.input_ids.device)
            batch = with_token(batch, values=zero, bootstrap_value=zero[:, 0])
        sampler = session.phases[-1].plan.sampler
        plan = make_plan(method, sampler, merge_ids=session.merge_ids)
        return steps.signal(self.student, batch, objective, plan, session.max_tokens, fresh=True)

    def _method(self, objective: Objective) -> Method:
        return Method(objective, self.states, self.views if objective.views() else ())

    def gradient(self, objective: Objective, batch: Batch | None = None) -> Gradient:
        """Of the whole rollout; empty where nothing depends on the student."""
        return self._graded(objective, batch)[0]

    def _graded(
        self, objective: Objective, batch: Batch | None = None
    ) -> tuple[Gradient, Mapping[str, Stat]]:
        """A gradient, and the losses of the terms."""
        if objective.is_off:
            return {}, {}
        ready = self.ready(objective) if batch is None else batch
        self.student.zero_grad(set_to_none=True)
        try:
            stats = steps.update(
                self.student, ready, objective, self.pilot.session.max_tokens, step=0
            )
            return {
                name: weights.grad
                for name, weights in self.student.trainable().items()
                if weights.grad is not None
            }, stats
        finally:
            self.student.zero_grad(set_to_none=True)

    def whole(self) -> float:
        """The run's divergence, taken over the whole vocabulary; NaN where it has none.

        The divergence of a list, with or without one entry for the rest, is a part of it.
        """
        objective = self.pilot.method.objective
        place, main = _main_term(objective, self.pilot.view)
        if not isinstance(main, Dense):
            return math.nan
        term = replace(main, support=support.full, tail="")
        terms = (*objective.terms[:place], term, *objective.terms[place + 1 :])
        changed = _composed(terms, objective.temperature)
        try:
            return math.nan if changed is None else self._of_main(changed, self._graded(changed)[1])
        except OpdError:
            return math.nan

    def _of_main(self, objective: Objective, stats: Mapping[str, Stat]) -> float:
        """The mean loss of the term that compares with the view."""
        place, _ = _main_term(objective, self.pilot.view)
        label, _ = list(objective.labelled())[place]
        found = stats.get(f"loss/{label}")
        return math.nan if found is None else found.mean

    def _seen(self, neighbour: Neighbour, stats: Mapping[str, Stat], whole: float) -> float:
        """The share of a whole divergence that a neighbour in its support, or the run, sees."""
        _, term = _main_term(neighbour.objective, self.pilot.view)
        if neighbour.variable not in ("", "support") or not isinstance(term, Dense):
            return math.nan
        if term.tail not in ("", "bucket", "renormalise") or not whole > 0:
            return math.nan
        return self._of_main(neighbour.objective, stats) / whole

    def by_prompt(self, objective: Objective) -> Tensor:
        """What each prompt adds to the gradient, some entries of it."""
        batch, group = self.ready(objective), self.rollout.group
        parts = [
            select(batch, torch.where(group == prompt)[0].tolist()).batch
            for prompt in range(int(group.max()) + 1)
        ]
        return torch.stack(
            [some_entries(self.gradient(objective, part), self.student) for part in parts]
        )

    def tried(self, neighbour: Neighbour, full: Gradient, whole: float = math.nan) -> Neighbour:
        """With its cosine and its cost, or why it has none."""
        self.waited = 0.0
        started, cpu = time.perf_counter(), time.process_time()
        try:
            own, stats = self._graded(neighbour.objective)
        except OpdError as error:
            return replace(neighbour, why_not=str(error))
        if self.pilot.session.device.type == "cuda":
            torch.cuda.synchronize(self.pilot.session.device)
        wall, cpu = time.perf_counter() - started, time.process_time() - cpu
        return replace(
            neighbour,
            cosine=cosine(own, full),
            seen=self._seen(neighbour, stats, whole),
            seconds=cpu + self.waited,
            wall_seconds=wall,
            wire_bytes=self._wire(neighbour.objective),
        )

    def _wire(self, objective: Objective) -> float:
        from opd.training.teachers import entries_by_view

        session = self.pilot.session
        method = self._method(objective)
        plan = make_plan(method, session.phases[-1].plan.sampler, merge_ids=session.merge_ids)
        entries = entries_by_view(session.teachers, session.config, method, plan)
        return float(sum(each.bytes_per_token for each in entries.values())) or math.nan

    def noise(self, name: str, objective: Objective, full: Gradient) -> CreditNoise:
        """The spread of the gradient from response to response, and what is left in the mean."""
        batch = self.ready(objective)
        drawn, total = [], len(self.rollout.prompt_ids)
        for row in range(total):
            part = select(batch, [row]).batch
            drawn.append(some_entries(self.gradient(objective, part), self.student))
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


def some_entries(gradient: Gradient, student: Student) -> Tensor:
    """Evenly spread entries of a gradient, zeros where a weight has none, scaled to its norm."""
    total = sum(weights.numel() for weights in student.trainable().values())
    every = max(1, math.ceil(total / ENTRIES))
    parts = [
        gradient.get(name, torch.zeros_like(weights)).flatten()[::every]
        for name, weights in student.trainable().items()
    ]
    return torch.cat(parts).float().cpu() * math.sqrt(every)
