"""Healthy runs and planted faults for `benchmarks/alarms.py`: what is changed, and how strongly.

A fault is planted into the live parts of a session: its teacher, its sampler, its verifier. Nothing
in the library knows of it.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from opd.models import LoadedModel
from opd.rollout.local import LocalSampler
from opd.teacher.local import LocalTeacher
from opd.training.session import Session
from opd.types import (
    Need,
    Prompt,
    Rollout,
    SamplerSettings,
    Teacher,
    TeacherRequest,
    TeacherScores,
    Verdict,
    pack_rows,
)

Changes = Mapping[str, Any]
Plant = Callable[[Session, float], None]


@dataclass(frozen=True)
class World:
    """A kind of run.

    Attributes:
        name: of the kind or of the fault.
        alarms: those that name the fault; none of a healthy kind.
        changes: to the run file, dotted keys.
        plant: what is done to the session, at a strength.
        fixing: strengths with which thresholds are fixed.
        testing: strengths with which figures are made.
        task: whose warm start and prompts.
        seeds: at most so many of each group.
    """

    name: str
    alarms: tuple[str, ...] = ()
    changes: Changes = field(default_factory=dict)
    plant: Plant | None = None
    fixing: tuple[float, ...] = (1.0,)
    testing: tuple[float, ...] = (1.0,)
    task: str = "sort"
    seeds: int = 20


# --------------------------------------------------------------------------------------------
# Teachers that are wrong


@dataclass
class Around:
    """A teacher around another one; what it answers is decided by the two functions.

    Attributes:
        asks: changes the request.
        says: changes the reply to a request.
    """

    inner: Teacher
    asks: Callable[[TeacherRequest], TeacherRequest] = lambda request: request
    says: Callable[[TeacherRequest, TeacherScores], TeacherScores] = lambda _, scores: scores

    def can(self, need: Need) -> bool:
        return self.inner.can(need)

    def score(self, request: TeacherRequest) -> TeacherScores:
        return self.says(request, self.inner.score(self.asks(request)))


def _teacher(session: Session) -> LocalTeacher:
    found = session.teachers["teacher"]
    assert isinstance(found, LocalTeacher)
    return found


def shifted(session: Session, strength: float) -> None:
    """Positions are off by one, in so large a share of the sequences."""

    def asks(request: TeacherRequest) -> TeacherRequest:
        batch = request.batch
        sequence = batch.token.mask.nonzero()[:, 0]
        wrong = sequence < round(strength * len(batch.token.mask))
        index = torch.where(wrong, batch.row_index - 1, batch.row_index)
        return replace(request, batch=replace(batch, row_index=index))

    session.teachers["teacher"] = Around(_teacher(session), asks)


def other_template(session: Session, strength: float) -> None:
    """The teacher expects a header where the response begins: so sure is it of another sign."""
    sign = int(session.tokenizer.convert_tokens_to_ids("#"))
    inner = _teacher(session)

    def says(request: TeacherRequest, scores: TeacherScores) -> TeacherScores:
        token = request.batch.token
        place = pack_rows(token.mask.long().cumsum(1) - 1, token.mask)
        header = _mostly(torch.full_like(place, sign), session.student.vocab_size, strength)
        if scores.hidden is None:
            assert scores.sampled_logp is not None
            own = header.gather(-1, pack_rows(token.tokens, token.mask).unsqueeze(-1)).squeeze(-1)
            return replace(scores, sampled_logp=torch.where(place == 0, own, scores.sampled_logp))
        said = _log_probs(inner, request, scores)
        said = torch.where((place == 0).unsqueeze(-1), header, said)
        return replace(scores, hidden=None, unembedding=None, log_probs=said)

    session.teachers["teacher"] = Around(inner, says=says)


def _log_probs(teacher: LocalTeacher, request: TeacherRequest, scores: TeacherScores) -> Tensor:
    """What hidden states say."""
    from opd.models import project, unembedding

    head = unembedding(teacher.loaded.model, teacher.vocab_size)
    assert scores.hidden is not None
    return (project(scores.hidden, head) / request.temperature).log_softmax(-1)


def permuted(session: Session, strength: float) -> None:
    """So large a share of the ids means other tokens to the teacher."""
    count = max(2, round(strength * 50))
    draw = torch.Generator().manual_seed(7)
    ids = torch.randperm(50, generator=draw)[:count] + 3
    _rename(session, dict(zip(ids.tolist(), ids.roll(1).tolist(), strict=True)))


def renamed_end(session: Session, strength: float) -> None:
    """The teacher's end token has another id."""
    end = session.student.loaded.eos_ids[0]
    other = int(session.tokenizer.convert_tokens_to_ids("ABCDEFGHIJ"[int(strength)]))
    _rename(session, {end: other, other: end})


def _rename(session: Session, ids: Mapping[int, int]) -> None:
    teacher = _teacher(session)
    loaded = _copied(teacher.loaded)
    weight: Any = loaded.model.get_input_embeddings().weight
    with torch.no_grad():
        before = weight.clone()
        for old, new in ids.items():
            weight[new] = before[old]
    _replace(session, loaded)


def noise(session: Session, strength: float) -> None:
    """So large a part of the teacher's weights is that of a model which has learnt nothing."""
    from opd.models import load_model

    loaded = _copied(_teacher(session).loaded)
    nothing = load_model("builtin:sort-teacher-init", seed=11).model.state_dict()
    with torch.no_grad():
        for name, value in loaded.model.state_dict().items():
            value.copy_((1 - strength) * value + strength * nothing[name])
    _replace(session, loaded)


def _copied(loaded: LoadedModel) -> LoadedModel:
    return replace(loaded, model=copy.deepcopy(loaded.model))


def _replace(session: Session, loaded: LoadedModel) -> None:
    old = _teacher(session)
    session.teachers["teacher"] = LocalTeacher(
        loaded, vocab_size=old.vocab_size, max_tokens=old.max_tokens
    )


def _scripted(session: Session, script: Callable[[TeacherRequest], Tensor]) -> None:
    """A teacher that says what a function of the request says."""

    def says(request: TeacherRequest, scores: TeacherScores) -> TeacherScores:
        return replace(scores, hidden=None, unembedding=None, log_probs=script(request))

    session.teachers["teacher"] = Around(session.teachers["teacher"], says=says)


def looping(session: Session, strength: float) -> None:
    """The teacher is sure that the token four places before comes again."""

    def script(request: TeacherRequest) -> Tensor:
        token = request.batch.token
        before = torch.roll(token.tokens, 4, dims=1)
        before[:, :4] = 3  # a digit
        return _mostly(pack_rows(before, token.mask), session.student.vocab_size, strength)

    _scripted(session, script)


def dictating(session: Session, strength: float) -> None:
    """The teacher spells out what only it was told."""
    code = session.tokenizer("ABCDEFGH", add_special_tokens=False)["input_ids"]
    end = session.student.loaded.eos_ids[0]

    def script(request: TeacherRequest) -> Tensor:
        token = request.batch.token
        place = token.mask.long().cumsum(1) - 1
        said = torch.tensor([*code, end])[place.clamp(max=len(code))]
        return _mostly(pack_rows(said, token.mask), session.student.vocab_size, strength)

    _scripted(session, script)


def unreachable(session: Session, strength: float) -> None:
    """The teacher takes mass from what the student would say and gives it to nobody in particular.

    What it takes goes in equal parts to all tokens outside the student's likeliest.
    """
    from opd.training.step import visit
    from opd.types import FieldKey

    def script(request: TeacherRequest) -> Tensor:
        key = FieldKey("student_log_probs")
        own = visit(session.student, request.batch, frozenset({key}), 1.0, session.max_tokens)[key]
        list_size = 16
        likely = torch.zeros_like(own, dtype=torch.bool).scatter(
            -1, own.topk(list_size, -1).indices, True
        )
        rest = strength / (own.shape[-1] - list_size)
        return (own.exp() * (1 - strength) + torch.where(likely, 0.0, rest)).log()

    _scripted(session, script)


def fading(session: Session, strength: float) -> None:
    """The teacher's answer gives way to a uniform one, up to so large a share at the end."""
    inner = _teacher(session)

    def says(request: TeacherRequest, scores: TeacherScores) -> TeacherScores:
        token = request.batch.token
        place = token.mask.long().cumsum(1) - 1
        along = place / token.mask.sum(1, keepdim=True).sub(1).clamp(min=1)
        lost = strength * pack_rows(along, token.mask).unsqueeze(-1)
        said = _log_probs(inner, request, scores).exp()
        said = (said * (1 - lost) + lost / said.shape[-1]).log()
        return replace(scores, hidden=None, unembedding=None, log_probs=said)

    session.teachers["teacher"] = Around(inner, says=says)


def unsure(session: Session, strength: float) -> None:
    """So large a share of the teacher's answer is a uniform one."""
    inner = _teacher(session)

    def says(request: TeacherRequest, scores: TeacherScores) -> TeacherScores:
        said = _log_probs(inner, request, scores).exp()
        said = (said * (1 - strength) + strength / said.shape[-1]).log()
        return replace(scores, hidden=None, unembedding=None, log_probs=said)

    session.teachers["teacher"] = Around(inner, says=says)


def outliers(session: Session, strength: float) -> None:
    """A token of every 16th response has a log-probability that is lower by so many nats."""

    def says(request: TeacherRequest, scores: TeacherScores) -> TeacherScores:
        if scores.sampled_logp is None:  # a look
            return scores
        mask = request.batch.token.mask
        every = torch.arange(len(mask)).unsqueeze(1) % 16 == 0
        hit = pack_rows((mask.long().cumsum(1) == 4) & every, mask)
        return replace(scores, sampled_logp=scores.sampled_logp - strength * hit)

    session.teachers["teacher"] = Around(_teacher(session), says=says)


def _mostly(ids: Tensor, vocab_size: int, share: float) -> Tensor:
    """Distributions with a share of their mass on one token, the rest in equal parts."""
    rest = torch.full((len(ids), vocab_size), (1 - share) / (vocab_size - 1))
    return rest.scatter(-1, ids.unsqueeze(-1), share).log()


# --------------------------------------------------------------------------------------------
# Samplers and verifiers that are wrong


class Stale:
    """Writes with the student of some steps ago."""

    def __init__(self, loaded: LoadedModel, every: int) -> None:
        self._live, self._every, self._calls = loaded, every, 0
        self._kept = _copied(loaded)
        self._inner = LocalSampler(self._kept)

    def sample(
        self,
        prompts: Any,
        settings: SamplerSettings,
        *,
        generator: torch.Generator,
        policy_version: int = 0,
    ) -> Rollout:
        if self._calls % self._every == 0:
            self._kept.model.load_state_dict(self._live.model.state_dict())
        self._calls += 1
        return self._inner.sample(
            prompts, settings, generator=generator, policy_version=policy_version
        )


def stale(session: Session, strength: float) -> None:
    """The sampler has the weights of up to so many steps ago."""
    session.student_sampler = Stale(session.student.loaded, int(strength))


def misranked(session: Session, strength: float) -> None:
    """The verifier calls right what is wrong, and the other way round, in so many cases."""
    inner = session.verifier
    assert inner is not None
    draw = torch.Generator().manual_seed(5)

    def verifier(prompt: Prompt, response: str, *, finished: bool) -> Verdict:
        found = inner(prompt, response, finished=finished)
        turned = float(torch.rand((), generator=draw)) < strength
        return replace(found, score=1 - found.score) if turned else found

    session.verifier = verifier


# --------------------------------------------------------------------------------------------
# The lists

SAMPLED: Changes = {"method": {"name": "sampled_token_opd"}, "train": {"learning_rate": 3e-4}}


def custom(*terms: Changes, **method: Any) -> Changes:
    return {"method": {"name": "custom", "objective": {"terms": list(terms)}, **method}}


def merged(*trees: Changes) -> dict[str, Any]:
    both: dict[str, Any] = {}
    for tree in trees:
        for key, value in tree.items():
            below = both.get(key)
            nested = isinstance(value, Mapping) and isinstance(below, Mapping)
            both[key] = merged(both[key], value) if nested else value
    return both


SAME = {
    "method": {
        "name": "custom",
        "objective": {"terms": [{"kind": "dense", "divergence": "reverse_kl"}]},
        "views": [{"name": "teacher", "source": "teacher", "context": "{prompt}"}],
    }
}
REPLAY = custom(
    {"kind": "dense", "divergence": {"use": "skew_forward_kl", "skew": 0.1}},
    states={"student": 0.5, "replay": 0.5, "replay_steps": 8},
)
TOLD = {"name": "teacher", "source": "teacher", "context": "ABCDEFGH{prompt}"}
LONGER = custom(
    {"kind": "sampled", "reward": "teacher_log_ratio"},
    {"kind": "sampled", "name": "longer", "reward": "one", "credit": "return_to_go", "coef": 1.0},
)
SURE = custom(
    {"kind": "dense", "divergence": "reverse_kl"},
    {"kind": "regulariser", "penalty": "entropy_bonus", "coef": -1.0},
)
CERTAIN = custom(
    {"kind": "dense", "divergence": "reverse_kl", "coef": 0.02},
    {"kind": "regulariser", "penalty": "entropy_bonus", "coef": -1.0},
)
GOLDEN = {
    "evaluate": {"every": 5, "test_prompts": 128, "sets": {"sort": "task:sort"}},
    "monitor": {"golden": ("sort",)},
}
ADD = {"data": {"prompts": "task:add"}, "teacher": {"model": "builtin:add-teacher"}}
TWO = custom(
    {"kind": "dense", "divergence": "reverse_kl", "coef": 0.5},
    {
        "kind": "dense",
        "name": "two",
        "divergence": "reverse_kl",
        "coef": 0.5,
        "against": "teacher.other",
    },
    views=[{"name": "teacher.other", "source": "teacher"}],
)

HEALTHY = (
    World("dense"),
    World("sampled", changes=SAMPLED),
    World("top-k", changes={"method": {"name": "top_k_opd", "options": {"k": 8}}}),
    World("chain", task="chain", changes={"train": {"learning_rate": 1e-3}}),
    World("gkd", changes={"method": {"name": "gkd"}}),
    World("cr_opd", changes={"method": {"name": "cr_opd"}, "train": {"learning_rate": 3e-4}}),
    World("replay", changes=REPLAY),
    World("add", task="add"),
    World("context", changes=SAME),
    World("to the end", changes={"train": {"steps": 320}}, seeds=2),
    World("golden set", changes=merged(GOLDEN, {"train": {"learning_rate": 3e-4}})),
)

FAULTS = (
    World("shifted positions", ("misaligned_events",), plant=shifted,
          fixing=(1.0, 0.5), testing=(0.75, 0.6)),
    World("another template", ("foreign_template",), plant=other_template,
          fixing=(0.999, 0.99), testing=(0.995,)),
    World("renamed EOS", ("end_token_mismatch",), plant=renamed_end,
          fixing=(0.0, 1.0), testing=(2.0, 3.0)),
    World("permuted vocabulary", ("misaligned_events",), plant=permuted,
          fixing=(1.0, 0.6), testing=(0.8, 0.4)),
    World("teacher out of its domain", ("teacher_out_of_domain", "misaligned_events"),
          changes={"teacher": {"model": "builtin:add-teacher"}}),
    World("noise teacher", ("noise_teacher",), plant=noise,
          fixing=(1.0, 0.9), testing=(0.95, 0.8)),
    World("leaking privilege", ("privilege_leak",), plant=dictating,
          changes={"method": {"name": "custom", "views": [TOLD], "objective": {
              "terms": [{"kind": "dense", "divergence": "forward_kl"}]}},
              "train": {"learning_rate": 3e-3}},
          fixing=(0.98, 0.9), testing=(0.95,)),
    World("stale sampler", ("stale_sampler",), plant=stale,
          fixing=(40.0, 20.0), testing=(30.0, 15.0)),
    World("length collapse", ("length_collapse",), changes=merged(
        custom({"kind": "sampled", "reward": "teacher_log_ratio", "credit": "return_to_go"}),
        {"train": {"learning_rate": 1e-3}})),
    World("length inflation", ("length_inflation",), changes=merged(
        LONGER, {"train": {"learning_rate": 1e-3}})),
    World("repetition", ("repetition",), plant=looping, fixing=(0.98, 0.95), testing=(0.97,)),
    World("un-routable suppression", ("unroutable_suppression",), plant=unreachable,
          fixing=(0.3, 0.6), testing=(0.45,)),
    World("conflicting teachers", ("conflicting_teachers",), changes=merged(
        TWO, {"teachers": {"other": {"model": "builtin:add-teacher"}},
              "teacher": {"conflict_every": 5}})),
    World("mis-ranked outcome", ("misranked_outcome",), plant=misranked,
          fixing=(1.0, 0.9), testing=(0.95,)),
    World("suffix fade", ("late_fade",), plant=fading,
          fixing=(0.9, 0.7), testing=(0.8, 0.6)),
    World("outlier log ratios", ("gradient_concentration",), plant=outliers, changes=SAMPLED,
          fixing=(9999.0, 4000.0), testing=(6000.0,)),
    World("another task", ("golden_regression",), changes=merged(
        GOLDEN, ADD, {"student": {"model": "builtin:sort-teacher"}})),
    World("unsure teacher, sure student", ("entropy_collapse",), plant=unsure, changes=SURE,
          fixing=(0.5, 0.3), testing=(0.4,)),
    World("certainty rewarded", ("calibration_drift",), changes=CERTAIN),
)  # fmt: skip
