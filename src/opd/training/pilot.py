"""What a run would meet at its first step, seen without a step: answers, verdicts, distributions.

The student answers held-out prompts, the run's verifier judges, the run's teacher scores, all
through the parts of a step. Distributions exist for a chunk of rows at a time; what stays is one
number per row.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from opd import diagnose
from opd.diagnose.evidence import Evidence, Privilege, Recovery
from opd.diagnose.numbers import mass
from opd.errors import ConfigError, DataError, OpdError
from opd.formula import divergence, reward
from opd.formula.divergence import student_entropy, teacher_entropy
from opd.head import linear_head
from opd.head.distribution import merged_tokens
from opd.models import LoadedModel, unembedding
from opd.objective import Dense, Method, Objective, Sampled
from opd.rollout.edit import continued, take
from opd.rollout.local import LocalSampler
from opd.rollout.pack import count_rows, merge_rollouts, pack_rollout
from opd.teacher.local import LocalTeacher
from opd.training import step as steps
from opd.training.config import Run
from opd.training.evaluate import verify_rollout
from opd.training.loop import train_run
from opd.training.plan import Plan, is_scored, make_plan
from opd.training.session import Session, positions
from opd.training.teachers import entries_by_view
from opd.types import (
    Batch,
    FieldKey,
    Need,
    Prompt,
    Rollout,
    SamplerSettings,
    TeacherView,
    TokenBatch,
    pack_rows,
    with_parts,
)

SEED = 4_000_037
"""Added to the run's seed: a probe draws from streams of its own."""
LIST_K = 16
"""Entries of the lists that are compared; an eighth of a vocabulary that has fewer than 128."""
CHUNK_BYTES = 32 * 2**20
"""One distribution of a chunk of rows; a diagnostic holds a few of them at once."""
DEPTHS = (0.0, 0.25, 0.5, 0.75)

Doing = Callable[[str], None]
"""Is told what happens next."""


def nothing(what: str) -> None:
    """Tells nobody."""


@dataclass(frozen=True)
class PilotSettings:
    """How much a probe looks at.

    Attributes:
        responses: of the student, to held-out prompts.
        samples: to each prompt.
        continued: prompts of which the teacher writes answers and continuations.
    """

    responses: int = 256
    samples: int = 4
    continued: int = 64

    def __post_init__(self) -> None:
        if self.responses < 2 * self.samples:
            raise ConfigError(
                f"a probe needs the answers to two prompts at least, {2 * self.samples} responses, "
                f"got {self.responses}; raise --responses"
            )


@dataclass(frozen=True)
class Pilot:
    """A probe in progress: the parts of a step, held still.

    Attributes:
        session: of the run.
        settings: of the probe.
        method, plan: of the run's distillation, at its first step.
        view: whose distribution the student is compared with.
        rollout: the student's answers, judged.
        batch: the same, packed and scored.
        whole: whether the view tells its whole distribution.
        texts: the answers, decoded.
        seconds: wall-clock time of `sample` and `score`.
    """

    session: Session
    settings: PilotSettings
    method: Method
    plan: Plan
    view: str
    rollout: Rollout
    batch: Batch
    whole: bool
    texts: tuple[str, ...]
    seconds: Mapping[str, float] = field(default_factory=dict)

    @property
    def temperature(self) -> float:
        """At which the objective compares."""
        return self.method.objective.temperature


def quiet(run: Run, folder: str) -> Run:
    """The run with its records kept to itself, in a folder of the probe's."""
    log = replace(run.config.log, trackers=(), token_share=0.0, samples_per_step=0)
    config = replace(run.config, log=log, output=folder, name="warmup")
    return replace(run, config=config)


def warm_up(session: Session, doing: Doing = nothing) -> LoadedModel:
    """The student as distillation would find it: after the run's own warm-up, through the loop.

    The session is spent: its teachers are closed.

    Args:
        session: of a `quiet` run.
    """
    phase = session.phases[0]
    if phase.name == "warmup":
        reports = train_run(session.run, session=session)
        for report in reports:
            doing(f"the run's own warm-up, step {report.step} of {report.steps}")
            if report.step == phase.steps:
                break
        reports.close()  # type: ignore[attr-defined]
    return session.student.loaded


def look(session: Session, settings: PilotSettings, doing: Doing = nothing) -> Pilot:
    """Let the student answer, judge and score the answers; nothing is trained."""
    method, plan = first_step(session)
    view = subject(method, plan)
    doing(f"the student answers {settings.responses} times")
    started = time.perf_counter()
    rollout, texts = answers(session, plan.sampler, settings)
    sampled = time.perf_counter()
    doing(f"the teacher scores {int(rollout.mask.sum()):,} tokens")
    whole = _tells_all(session, view)
    asked = time.perf_counter()
    batch = scored(session, comparing(method, view, whole=whole), rollout)
    seconds = {"sample": sampled - started, "score": time.perf_counter() - asked}
    found = session, settings, method, plan, view, rollout, batch, whole, tuple(texts)
    return Pilot(*found, seconds)


def first_step(session: Session) -> tuple[Method, Plan]:
    """The method at its first step, its schedules settled, with its plan."""
    phase = session.phases[-1]
    method, _ = phase.method.at(0, {}, None)
    views = with_parts(method.objective.views(), method.views)
    return method, replace(phase.plan, views=views)


def subject(method: Method, plan: Plan) -> str:
    """The view that a probe is about: the teacher, or the first that a term compares with.

    Raises:
        ConfigError: the method compares with nobody.
    """
    # the student at step 0 is nobody to learn from, unless it is told more
    names = [view.name for view in plan.views if view.source != "initial_student" or view.context]
    against = [term.against for _, term in method.objective.parts() if term.against in names]
    found = [name for name in ("teacher", *against) if name in names]
    if not found:
        raise ConfigError(
            f"{method.name!r} compares the student with no teacher, so there is no feedback to "
            "probe; name a method that does, such as --method reverse_kl_opd"
        )
    return found[0]


def comparing(method: Method, view: str, *, whole: bool) -> Method:
    """A method that asks one view for all that it can tell of the run's comparison."""
    term = (
        Dense(divergence=divergence.reverse_kl, against=view)
        if whole
        else Sampled(reward=reward.teacher_log_ratio, against=view)
    )
    return Method(Objective(term, temperature=method.objective.temperature), views=method.views)


def answers(
    session: Session, sampler: SamplerSettings, settings: PilotSettings
) -> tuple[Rollout, list[str]]:
    """The student's judged answers to held-out prompts, and their texts."""
    known = session.validation.prompts
    prompts = known[: min(len(known), settings.responses // settings.samples)]
    if len(prompts) < 2:
        raise DataError(
            f"a probe needs two held-out prompts at least, {session.validation.source} leaves "
            f"{len(prompts)}; raise data.held_out or evaluate.prompts"
        )
    asked = replace(sampler, samples_per_prompt=settings.samples, student_top_k=0)
    generator = torch.Generator().manual_seed(session.config.seed + SEED)
    per_call = max(1, session.config.sampler.max_sequences // settings.samples)
    with session.student.for_generation():
        parts = [
            session.student_sampler.sample(
                prompts[start : start + per_call], asked, generator=generator
            )
            for start in range(0, len(prompts), per_call)
        ]
    rollout = merge_rollouts(parts, pad_id=session.student.loaded.pad_id)
    if not int(rollout.mask.sum()):
        raise DataError("the student's answers are empty, so there is nothing to score")
    return verify_rollout(rollout, session.verifier, session.tokenizer)


def scored(session: Session, method: Method, rollout: Rollout) -> Batch:
    """The rollout packed, observed and scored for a method, by the functions of a step."""
    student = session.student
    _stand_in(session, method)
    plan = make_plan(method, session.phases[-1].plan.sampler, merge_ids=session.merge_ids)
    if method.objective.support_size("student_top_ids") and rollout.sampler_top_ids is None:
        # the answers were sampled for all objectives at once, none of which told how many ids
        plan = replace(plan, observe=tuple({*plan.observe, "student_top_ids"}))
    batch = packed(session, method, rollout)
    batch = steps.observe(student, batch, rollout, method.objective, plan, session.max_tokens)
    contexts = steps.privileged(
        rollout, batch, plan, session.context_encoder, pad_id=student.loaded.pad_id
    )
    entries = entries_by_view(session.teachers, session.config, method, plan)
    with session.turns:
        return steps.score(
            session.teachers,
            batch,
            method.objective,
            plan,
            contexts=contexts,
            entries=entries,
            prompts=rollout.prompts,
        )


def packed(session: Session, method: Method, rollout: Rollout) -> Batch:
    """The rollout as the batch of a step."""
    return pack_rollout(
        rollout,
        pad_id=session.student.loaded.pad_id,
        special_ids=session.special_ids,
        merge_ids=session.merge_ids,
        extra=steps.extra_columns(rollout.prompts, method.objective),
        device=session.device,
    )


def _stand_in(session: Session, method: Method) -> None:
    """Before the first step the student at step 0 and its average are the student itself."""
    student = session.student
    for view in with_parts(method.objective.views(), method.views):
        if view.source in ("initial_student", "ema_student") and view.name not in session.teachers:
            session.teachers[view.name] = LocalTeacher(
                student.loaded, vocab_size=student.vocab_size, max_tokens=session.max_tokens
            )


def _tells_all(session: Session, view: str) -> bool:
    """Whether the whole distribution of a view can be had: of a combination, of all its parts."""
    method, _ = first_step(session)
    _stand_in(session, method)
    for each in with_parts([view], method.views):
        if is_scored(each) and not session.teachers[each.name].can(Need(view, "log_probs", "full")):
            return False
    if not all(each.normalised for each in with_parts([view], method.views)):
        return False
    dense = comparing(method, view, whole=True)
    plan = make_plan(dense, session.phases[-1].plan.sampler, merge_ids=session.merge_ids)
    try:
        return not entries_by_view(session.teachers, session.config, dense, plan)
    except OpdError:
        return False


# --------------------------------------------------------------------------------------------
# Numbers of rows


def gather(pilot: Pilot, doing: Doing = nothing) -> Evidence:
    """The evidence of a probe: numbers of rows, verdicts of the teacher, of its continuations."""
    session = pilot.session
    doing("comparing distributions")
    rows, absent = row_numbers(pilot)
    rollout = pilot.rollout
    views = [view for view in pilot.plan.views if view.context]
    found = Evidence(
        tokens=rollout.tokens,
        mask=rollout.mask,
        group=rollout.group,
        verdict=rollout.verdict.float(),
        stop_reason=rollout.stop_reason,
        rows=rows,
        k=list_size(session.student.vocab_size, LIST_K),
        vocab_size=session.student.vocab_size,
        absent=absent,
        contexts=tuple(view.name for view in views),
    )
    doing("the teacher reads the data's own responses")
    on_data = _on_data(pilot)
    recoveries, teacher, why = _recoveries(pilot, doing)
    privileges = tuple(_privilege(pilot, view) for view in _measurable(pilot, views))
    return replace(
        found,
        teacher_on_data=on_data,
        recoveries=recoveries,
        teacher_verdict=teacher,
        privileges=privileges,
        absent={**absent, **({"recoverability": why} if why else {})},
    )


def list_size(vocab_size: int, most: int) -> int:
    """Entries of a list: an eighth of a small vocabulary, so that overlap by chance stays small."""
    return max(2, min(most, vocab_size // 8))


def row_numbers(pilot: Pilot) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Numbers of every row by name, and what cannot be had and why.

    `student_gap` and `teacher_gap` are the two of `support_gap`; `candidate_mass` is the teacher's
    on `reachable`, 0 where that is empty.
    """
    session, batch = pilot.session, pilot.batch
    sampler_logp = pack_rows(pilot.rollout.sampler_logp, pilot.rollout.mask)
    if pilot.whole:
        eos_ids = session.student.loaded.eos_ids
        parts = [_of_chunk(*chunk, eos_ids) for chunk in distributions(pilot)]
        rows = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
        return {"sampler_logp": sampler_logp, **rows}, {}
    keys = {"student_logp": FieldKey("student_logp")}
    keys["student_entropy"] = FieldKey("student_entropy")
    keys["teacher_logp"] = FieldKey("teacher_logp", pilot.view)
    seen = steps.visit(
        session.student, batch, frozenset(keys.values()), pilot.temperature, session.max_tokens
    )
    rows = {name: seen[key].cpu() for name, key in keys.items()}
    rows["log_ratio"] = diagnose.log_ratio(rows["student_logp"], rows["teacher_logp"])
    rows["teacher_surprise"] = diagnose.teacher_surprise(rows["teacher_logp"])
    why = f"the view {pilot.view!r} tells single tokens, and it takes whole distributions"
    return {"sampler_logp": sampler_logp, **rows}, dict.fromkeys(WHOLE, why)


WHOLE = (
    "reverse_kl",
    "forward_kl",
    "teacher_entropy",
    "top_k_overlap",
    "student_overlap_mass",
    "teacher_overlap_mass",
    "teacher_top_mass",
    "overlap_advantage",
    "entropy_gap",
    "excess_surprise",
    "teacher_confidence",
    "teacher_margin",
    "student_gap",
    "teacher_gap",
    "candidate_mass",
    "leak",
    "gradient_proxy",
    "eos_divergence",
)
"""Numbers of rows that take whole distributions of both sides."""


def distributions(pilot: Pilot) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Student, view and sampled tokens of all rows, a chunk at a time: [n, V], [n, V], [n]."""
    session, batch = pilot.session, pilot.batch
    student = session.student
    hidden = FieldKey("student_hidden")
    states = steps.visit(student, batch, frozenset({hidden}), pilot.temperature, session.max_tokens)
    tokens = merged_tokens(pack_rows(batch.token.tokens, batch.token.mask), batch.merge_ids)
    keys = FieldKey("student_log_probs"), FieldKey("teacher_log_probs", pilot.view)
    head = unembedding(student.model, student.vocab_size)
    size = max(1, CHUNK_BYTES // (4 * student.vocab_size))
    for start in range(0, len(tokens), size):
        rows = slice(start, start + size)
        seen = linear_head(
            states[hidden][rows],
            head,
            _rows_alone(batch, tokens, rows),
            wanted=frozenset(keys),
            temperature=pilot.temperature,
        ).fields
        yield seen[keys[0]], seen[keys[1]], tokens[rows]


def _rows_alone(batch: Batch, tokens: Tensor, rows: slice) -> Batch:
    """Some rows for the head: each a response of one token, with what the views say of it."""
    own, token = tokens[rows].unsqueeze(1), batch.token
    open_rows = torch.ones_like(own, dtype=torch.bool)
    alone = TokenBatch(
        tokens=own,
        mask=open_rows,
        provenance=pack_rows(token.provenance, token.mask)[rows].unsqueeze(1),
        sampler_logp=torch.zeros(own.shape, device=own.device),
        group=torch.arange(len(own), device=own.device),
        verdict=torch.full((len(own),), torch.nan, device=own.device),
        views={name: view.rows(rows) for name, view in token.views.items()},
    )
    places = torch.arange(len(own), device=own.device)
    return replace(
        batch,
        input_ids=own,
        lengths=torch.ones_like(places),
        row_index=places,
        bootstrap_row=torch.full_like(places, -1),
        counts=count_rows(alone),
        token=alone,
    )


def _of_chunk(
    student: Tensor, teacher: Tensor, tokens: Tensor, eos_ids: Sequence[int]
) -> dict[str, Tensor]:
    """Every number of a chunk of rows; NaN of the view on rows that it has no answer for."""
    answered = ~teacher.isnan().any(-1)
    known = torch.where(answered.unsqueeze(-1), teacher, student)
    k = list_size(student.shape[-1], LIST_K)
    pair = student, known
    student_logp, teacher_logp = (
        each.gather(-1, tokens.unsqueeze(-1)).squeeze(-1) for each in pair
    )
    student_gap, teacher_gap = diagnose.support_gap(*pair, k=k)
    candidates = diagnose.reachable(*pair, tokens, k=k)
    ends = sorted({token for token in eos_ids if token < student.shape[-1]})
    of_pair = {
        "teacher_logp": teacher_logp,
        "log_ratio": diagnose.log_ratio(student_logp, teacher_logp),
        "teacher_surprise": diagnose.teacher_surprise(teacher_logp),
        "reverse_kl": diagnose.reverse_kl(*pair),
        "forward_kl": diagnose.forward_kl(*pair),
        "teacher_entropy": teacher_entropy(known),
        "top_k_overlap": diagnose.top_k_overlap(*pair, k=k),
        "student_overlap_mass": diagnose.student_overlap_mass(*pair, k=k),
        "teacher_overlap_mass": diagnose.teacher_overlap_mass(*pair, k=k),
        "teacher_top_mass": diagnose.teacher_top_mass(*pair, k=k),
        "overlap_advantage": diagnose.overlap_advantage(*pair, k=k),
        "entropy_gap": diagnose.entropy_gap(*pair),
        "excess_surprise": diagnose.excess_surprise(teacher_logp, known),
        "teacher_confidence": diagnose.teacher_confidence(known),
        "teacher_margin": diagnose.teacher_margin(*pair, k=k),
        "student_gap": student_gap,
        "teacher_gap": teacher_gap,
        "candidate_mass": mass(known, candidates),
        "leak": diagnose.leak(student, candidates, tokens),
        "eos_divergence": diagnose.eos_divergence(*pair, ends),
    }
    numbers = {
        "student_logp": student_logp,
        "student_entropy": student_entropy(student),
        "gradient_proxy": diagnose.gradient_proxy(student, tokens),
        **{name: torch.where(answered, value, torch.nan) for name, value in of_pair.items()},
    }
    return {name: value.detach().float().cpu() for name, value in numbers.items()}


# --------------------------------------------------------------------------------------------
# The teacher by itself


def _on_data(pilot: Pilot) -> Tensor:
    """The view's surprise at the data's own responses, row by row; empty where there are none.

    It tells a teacher that does not know the text at all from one that does not know the student's.
    """
    session, none = pilot.session, torch.empty(0)
    prompts = [p for p in session.validation.prompts if p.response_ids]
    prompts = prompts[: pilot.settings.continued]
    view = {each.name: each for each in pilot.plan.views}[pilot.view]
    if not prompts or view.context or view.parts:
        return none
    method = comparing(pilot.method, pilot.view, whole=False)
    batch = scored(session, method, steps.rollout_from_data(prompts))
    key = FieldKey("teacher_logp", pilot.view)
    seen = steps.visit(
        session.student, batch, frozenset({key}), pilot.temperature, session.max_tokens
    )
    return diagnose.teacher_surprise(seen[key]).float().cpu()


def _recoveries(pilot: Pilot, doing: Doing) -> tuple[tuple[Recovery, ...], Tensor, str]:
    """The teacher's continuations, its own answers among them, and why there are none.

    One response of each prompt, of which several samples would tell little more.
    """
    session, none = pilot.session, torch.empty(0)
    sampler = session.teacher_sampler
    if session.verifier is None:
        return (), none, "there is no verifier"
    if sampler is None:
        return (), none, "the teacher only scores, it does not write"
    view = {each.name: each for each in pilot.plan.views}[pilot.view]
    if view.source != "teacher" or session.router is not None:
        return (), none, f"the view {pilot.view!r} is not the model that would write"
    first = [
        int(torch.where(pilot.rollout.group == prompt)[0][0]) for prompt in range(_prompts(pilot))
    ]
    own = take(pilot.rollout, first[: pilot.settings.continued])
    settings = replace(pilot.plan.sampler, samples_per_prompt=1, student_top_k=0)
    generator = torch.Generator().manual_seed(session.config.seed + SEED + 1)

    def write(prompts: Sequence[Prompt], asked: SamplerSettings) -> list[Rollout]:
        at_once = session.config.sampler.max_sequences
        return [
            sampler.sample(prompts[start : start + at_once], asked, generator=generator)
            for start in range(0, len(prompts), at_once)
        ]

    found, lengths = [], own.lengths.tolist()
    limit = positions(sampler.loaded.model) if isinstance(sampler, LocalSampler) else None
    for depth in DEPTHS:
        doing(f"the teacher continues after {depth:.0%} of {len(lengths)} answers")
        keep = [min(int(depth * length), settings.max_new_tokens - 1) for length in lengths]
        ended = continued(own, keep, write, settings, tokenizer=session.tokenizer, positions=limit)
        judged, _ = verify_rollout(ended, session.verifier, session.tokenizer)
        found.append(Recovery(depth, own.group, judged.verdict.float(), own.verdict.float()))
    return tuple(found), found[0].teacher, ""


def _prompts(pilot: Pilot) -> int:
    return int(pilot.rollout.group.max()) + 1


def _measurable(pilot: Pilot, views: Sequence[TeacherView]) -> list[TeacherView]:
    """Views whose context is known before anything is written, and whose model can answer."""
    session = pilot.session
    if session.held_out is None or session.verifier is None:
        return []
    known = {view.name for view in session.held_out.views}
    return [view for view in views if view.name in known and _writer(session, view) is not None]


def _writer(session: Session, view: TeacherView) -> LocalSampler | None:
    """Who answers as a view: the student for its own selves, or the teacher."""
    sampler = session.teacher_sampler if view.source == "teacher" else session.student_sampler
    return sampler if isinstance(sampler, LocalSampler) else None


def _privilege(pilot: Pilot, view: TeacherView) -> Privilege:
    """Greedy verdicts of a view's own model, with its context and without, on the same prompts."""
    session = pilot.session
    sampler = _writer(session, view)
    assert session.held_out is not None
    assert sampler is not None
    prompts = session.validation.prompts[: _prompts(pilot)]
    told, _ = session.held_out.told(view, prompts)
    greedy = replace(
        pilot.plan.sampler,
        temperature=0.0,
        top_p=1.0,
        top_k=0,
        samples_per_prompt=1,
        student_top_k=0,
    )

    def verdicts(asked: Sequence[Prompt]) -> Tensor:
        generator = torch.Generator().manual_seed(session.config.seed + SEED + 2)
        at_once = session.config.sampler.max_sequences
        parts = [
            sampler.sample(asked[start : start + at_once], greedy, generator=generator)
            for start in range(0, len(asked), at_once)
        ]
        rollout = merge_rollouts(parts, pad_id=session.student.loaded.pad_id)
        return verify_rollout(rollout, session.verifier, session.tokenizer)[0].verdict.float()

    return Privilege(view.name, verdicts(told), verdicts(prompts))
