"""Every diagnostic moves, on a fault it is for, the way its `Reading:` says.

A fault is planted in a healthy case of random rows; what counts is by how much the number moves,
beyond `by`, which is far above what chance does to it. A diagnostic without a fault fails.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from opd import catalog, diagnose
from opd.formula.divergence import student_entropy
from tests.diagnose.worlds import Rows, by_sequence, draw, tempered, with_nothing

RISES, FALLS = 1.0, -1.0
K = 8


@dataclass(frozen=True)
class Fault:
    """What is wrong, where the number goes by at least how much, and how it is taken.

    Attributes:
        measure: of the healthy case, and with the fault.
    """

    says: str
    goes: float
    by: float
    measure: Callable[[], tuple[Any, Any]]


FAULTS: dict[str, list[Fault]] = {}


def fault(
    name: str, says: str, goes: float, by: float
) -> Callable[[Callable[[], tuple[Any, Any]]], Callable[[], tuple[Any, Any]]]:
    def keep(measure: Callable[[], tuple[Any, Any]]) -> Callable[[], tuple[Any, Any]]:
        FAULTS.setdefault(name, []).append(Fault(says, goes, by, measure))
        return measure

    return keep


def number(value: Any) -> float:
    return float(value.double().mean()) if isinstance(value, Tensor) else float(value)


# --------------------------------------------------------------------------------------------
# A teacher that does not fit


def teachers_swapped_for(name: str) -> Callable[[Rows, Tensor], Tensor]:
    """What the diagnostic says of these rows with another teacher."""
    function = getattr(diagnose, name)
    return {
        "teacher_surprise": lambda rows, teacher: function(rows.logp(teacher)),
        "excess_surprise": lambda rows, teacher: function(rows.logp(teacher), teacher),
        "log_ratio": lambda rows, teacher: function(rows.logp(rows.student), rows.logp(teacher)),
        "reverse_kl": lambda rows, teacher: function(rows.student, teacher),
        "forward_kl": lambda rows, teacher: function(rows.student, teacher),
        "marginal_info": lambda rows, teacher: function(diagnose.reverse_kl(rows.student, teacher)),
    }.get(name, lambda rows, teacher: function(rows.student, teacher, k=K))


# Two unrelated lists of 8 of 40 have 8 / 40 in common; the healthy ones have most.
# The surprise of unrelated rows of standard deviation 2 is about log 40 + 2, and that of the
# student's own tokens its entropy, about 2 nats.
MISFITS = {
    "top_k_overlap": (FALLS, 0.4),
    "student_overlap_mass": (FALLS, 0.4),
    "teacher_overlap_mass": (FALLS, 0.4),
    "teacher_surprise": (RISES, 2.0),
    "excess_surprise": (RISES, 2.0),
    "log_ratio": (FALLS, 2.0),
    "reverse_kl": (RISES, 2.0),
    "forward_kl": (RISES, 2.0),
    "marginal_info": (RISES, 2.0),
}
for _name, (_goes, _by) in MISFITS.items():
    for _fault in ("shifted", "swapped", "noise"):

        def _measure(name: str = _name, kind: str = _fault) -> tuple[Any, Any]:
            rows, ask = Rows.random(), teachers_swapped_for(name)
            return ask(rows, rows.teacher), ask(rows, getattr(rows, kind)())

        fault(_name, f"the teacher is {_fault}", _goes, _by)(_measure)


@fault("teacher_top_mass", "the teacher is undecided", FALLS, 0.3)
def _() -> tuple[Any, Any]:
    rows = Rows.random()
    return tuple(
        diagnose.teacher_top_mass(rows.student, teacher, k=K)
        for teacher in (rows.teacher, rows.lost())
    )


@fault("overlap_advantage", "the student is overconfident", FALLS, 0.1)
def _() -> tuple[Any, Any]:
    rows = Rows.random()
    return tuple(
        diagnose.overlap_advantage(student, rows.teacher, k=K)
        for student in (rows.student, tempered(rows.student, 0.3))
    )


@fault("entropy_gap", "the teacher branches where the student decides", RISES, 0.5)
def _() -> tuple[Any, Any]:
    rows = Rows.random()
    return tuple(diagnose.entropy_gap(rows.student, each) for each in (rows.teacher, rows.lost()))


@fault("teacher_confidence", "the teacher has lost the thread", FALLS, 0.2)
def _() -> tuple[Any, Any]:
    rows = Rows.random()
    return tuple(diagnose.teacher_confidence(each) for each in (rows.teacher, rows.lost()))


@fault("teacher_margin", "the teacher no longer tells the options apart", FALLS, 0.5)
def _() -> tuple[Any, Any]:
    rows = Rows.random()
    return tuple(
        diagnose.teacher_margin(rows.student, each, k=K) for each in (rows.teacher, rows.lost())
    )


@fault("support_gap", "mass of the student leaks out of the teacher's list", RISES, 0.3)
def _() -> tuple[Any, Any]:
    rows = Rows.random()
    leaking = tempered(rows.student, 8.0)
    return tuple(
        diagnose.support_gap(each, rows.teacher, k=K)[0] for each in (rows.student, leaking)
    )


@fault("support_gap", "the teacher's list cuts its own distribution", RISES, 0.3)
def _() -> tuple[Any, Any]:
    rows = Rows.random()
    return tuple(
        diagnose.support_gap(rows.student, each, k=K)[1] for each in (rows.teacher, rows.lost())
    )


# --------------------------------------------------------------------------------------------
# Along the response

LENGTH = 24


def fading(rows: Rows, *, mean: float = -0.5) -> tuple[Tensor, Tensor, Tensor]:
    """Log ratios that keep their spread, the same ones fading to a tenth of it, and the mask."""
    spread, mask = by_sequence(rows.normal(50 * LENGTH), LENGTH)
    return mean + spread, mean + spread * torch.linspace(1.0, 0.1, LENGTH), mask


@fault("dispersion_by_bin", "the contrast decays while the mean stays", FALLS, 0.5)
def _() -> tuple[Any, Any]:
    steady, faded, mask = fading(Rows.random())
    return tuple(diagnose.dispersion_by_bin(each, mask, 4)[-1] for each in (steady, faded))


@fault("suffix_fade", "the contrast decays while the mean stays", FALLS, 0.3)
def _() -> tuple[Any, Any]:
    steady, faded, mask = fading(Rows.random())
    return tuple(diagnose.suffix_fade((each + 0.5).abs(), mask) for each in (steady, faded))


def noise_from_the_middle(rows: Rows) -> Tensor:
    """The teacher, out of its domain in the second half of every response."""
    late = (torch.arange(len(rows.tokens)) % 20 >= 10)[:, None]
    return torch.where(late, rows.noise(), rows.teacher)


@fault("profile", "the teacher is lost from the tenth token on", FALLS, 0.4)
def _() -> tuple[Any, Any]:
    rows = Rows.random()
    found = []
    for teacher in (rows.teacher, noise_from_the_middle(rows)):
        overlap, mask = by_sequence(diagnose.top_k_overlap(rows.student, teacher, k=K), 20)
        early, late = diagnose.profile(overlap, mask, [0, 10, 20])
        assert early > 0.6
        found.append(late)
    return tuple(found)


@fault("drift_budget", "the teacher is lost from the tenth token on", RISES, 10.0)
def _() -> tuple[Any, Any]:
    rows = Rows.random()
    found = []
    for teacher in (rows.teacher, noise_from_the_middle(rows)):
        r, mask = by_sequence(rows.logp(teacher) - rows.logp(rows.student), 20)
        found.append(diagnose.drift_budget(r, mask)[:, -1])
    return tuple(found)


@fault("change_point", "the margin drops at the seventh of ten sentences", FALLS, 1.0)
def _() -> tuple[Any, Any]:
    steady = 2.0 + 0.1 * (torch.arange(10) % 2)
    dropped = torch.where(torch.arange(10) >= 6, steady - 1.5, steady)
    assert diagnose.change_point(dropped) == 6
    return math.inf if diagnose.change_point(steady) is None else 0.0, 6


@fault("first_token_spike", "the teacher expects another header", RISES, 5.0)
def _() -> tuple[Any, Any]:
    rows = Rows.random()
    r, mask = by_sequence(rows.r, 20)
    other = r.clone()
    other[:, 0] -= 8.0
    return tuple(diagnose.first_token_spike(each.abs(), mask) for each in (r, other))


# --------------------------------------------------------------------------------------------
# Other events


@fault("eos_divergence", "the teacher ends with another id", RISES, 1.0)
def _() -> tuple[Any, Any]:
    rows = Rows.random()
    other = rows.teacher[:, [1, 2, 0, *range(3, 40)]]
    ends = 3.0 * (torch.arange(400) % 2)  # it is likely to end at every other row
    both = []
    for teacher in (rows.teacher, other):
        place = 0 if teacher is rows.teacher else 2
        student, teacher = rows.student.clone(), teacher.clone()
        student[:, 0] += ends
        teacher[:, place] += ends
        both.append(diagnose.eos_divergence(student.log_softmax(-1), teacher.log_softmax(-1), [0]))
    return tuple(both)


@fault("excess_id_ratio", "the teacher never says token 7", RISES, 5.0)
def _() -> tuple[Any, Any]:
    rows = Rows.random()
    mean_sizes = []
    for teacher in (rows.teacher, rows.teacher - 12.0 * torch.eye(40)[7]):
        r = rows.logp(teacher.log_softmax(-1)) - rows.logp(rows.student)
        (found,) = diagnose.excess_id_ratio(r, rows.tokens, 1)
        mean_sizes.append(found[2])
    assert found[:2] == (7, int((rows.tokens == 7).sum()))
    return tuple(mean_sizes)


@fault("retokenised_share", "two letters come back as one token", FALLS, 0.3)
def _() -> tuple[Any, Any]:
    texts = [[1, 2, 3], [3, 1], [1, 2]]
    merged = [[12, 3], [3, 1], [12]]
    return diagnose.retokenised_share(texts, texts), diagnose.retokenised_share(texts, merged)


@fault("cache_drift", "the cache is of another checkpoint", RISES, 0.05)
def _() -> tuple[Any, Any]:
    rows = Rows.random()
    now = rows.logp(rows.teacher)
    rounding = now.float().double()
    other = now + 0.1 * rows.normal(len(now))
    return tuple(diagnose.cache_drift(kept, now)[0] for kept in (rounding, other))


@fault("cache_drift", "one kept answer belongs to another row", RISES, 3.0)
def _() -> tuple[Any, Any]:
    rows = Rows.random()
    now = rows.logp(rows.teacher)
    kept = now.clone()
    kept[now.argmax()] = now.min()
    return diagnose.cache_drift(now, now)[1], diagnose.cache_drift(kept, now)[1]


# --------------------------------------------------------------------------------------------
# The signal


@fault("forward_kl", "the student has lost one of the teacher's two modes", RISES, 1.0)
def _() -> tuple[Any, Any]:
    teacher = torch.tensor([[0.49, 0.49, 0.01, 0.01]]).log()
    collapsed = torch.tensor([[0.97, 0.01, 0.01, 0.01]]).log()
    forward = diagnose.forward_kl(collapsed, teacher)
    assert forward > 2 * diagnose.reverse_kl(collapsed, teacher)
    return diagnose.forward_kl(teacher, teacher), forward


@fault("quantiles", "two in a hundred tokens are impossible for the teacher", FALLS, 20.0)
def _() -> tuple[Any, Any]:
    rows = Rows.random()
    with_tail = rows.r.clone()
    with_tail[::50] = -30.0
    healthy, faulty = diagnose.quantiles(rows.r), diagnose.quantiles(with_tail)
    assert abs(faulty[0.5] - healthy[0.5]) < 0.05
    return healthy[0.01], faulty[0.01]


@fault("negative_share", "the teacher never says what the student does", RISES, 0.3)
def _() -> tuple[Any, Any]:
    rows = Rows.random()
    other = rows.logp(rows.noise()) - rows.logp(rows.student)
    return diagnose.negative_share(rows.r), diagnose.negative_share(other)


@fault("negative_mass", "a few tokens are impossible for the teacher", RISES, 0.2)
def _() -> tuple[Any, Any]:
    rows = Rows.random()
    with_tail = rows.r.clone()
    with_tail[::50] = -30.0
    # the mass is in the tail, the number of negative tokens is not
    assert diagnose.negative_share(with_tail) - diagnose.negative_share(rows.r) < 0.03
    return diagnose.negative_mass(rows.r), diagnose.negative_mass(with_tail)


@fault("mean_entropy", "the student has collapsed", FALLS, 1.0)
def _() -> tuple[Any, Any]:
    rows = Rows.random()
    return tuple(
        diagnose.mean_entropy(each) for each in (rows.student, tempered(rows.student, 0.2))
    )


@fault("pairwise_kl", "one teacher speaks another vocabulary", RISES, 1.0)
def _() -> tuple[Any, Any]:
    rows = Rows.random()
    pairs = [(rows.student, rows.teacher), (rows.student, rows.swapped())]
    return tuple(diagnose.pairwise_kl(torch.stack(pair))[0, 1] for pair in pairs)


def residual(teacher_of: Callable[[Tensor], Tensor]) -> tuple[float, float]:
    """Of a step of the reverse KL with the student, seen through some plumbing, as its teacher."""
    logits = (2 * Rows.random().normal()).requires_grad_()
    student = logits.log_softmax(-1)
    teacher = teacher_of(student.detach())
    loss = (student.exp() * (student - teacher)).sum(-1)
    (gradient,) = torch.autograd.grad(loss.sum(), logits)
    return diagnose.self_distillation_residual(loss, gradient.flatten())


@pytest.mark.parametrize("part", [0, 1])
@pytest.mark.parametrize("plumbing", ["positions", "temperature", "one row"])
def test_a_student_that_is_its_own_teacher_shows_every_plumbing_fault(
    part: int, plumbing: str
) -> None:
    faults: dict[str, Callable[[Tensor], Tensor]] = {
        "positions": lambda student: student.roll(1, 0),
        "temperature": lambda student: tempered(student, 0.9),
        "one row": lambda student: torch.cat([student[:-1], student[:1]]),
    }
    assert residual(lambda student: student)[part] < 1e-14
    assert residual(faults[plumbing])[part] > 0.01


@fault("self_distillation_residual", "positions are off by one", RISES, 1.0)
def _() -> tuple[Any, Any]:
    return residual(lambda student: student)[0], residual(lambda student: student.roll(1, 0))[0]


# --------------------------------------------------------------------------------------------
# The update


@fault("gradient_proxy", "the student is certain of what it drew", FALLS, 0.5)
def _() -> tuple[Any, Any]:
    rows = Rows.random()
    certain = rows.student.scatter(-1, rows.tokens[:, None], 20.0).log_softmax(-1)
    return tuple(diagnose.gradient_proxy(each, rows.tokens) for each in (rows.student, certain))


@fault("gradient_proxy", "the student is certain of another token", RISES, 0.3)
def _() -> tuple[Any, Any]:
    rows = Rows.random()
    others = (rows.tokens + 1) % 40
    certain = rows.student.scatter(-1, others[:, None], 20.0).log_softmax(-1)
    assert number(diagnose.gradient_proxy(certain, rows.tokens)) == pytest.approx(math.sqrt(2))
    return tuple(diagnose.gradient_proxy(each, rows.tokens) for each in (rows.student, certain))


def pushes(rows: Rows, outliers: bool) -> Tensor:
    advantage = rows.r.clone()
    if outliers:
        advantage[::100] = -300.0  # four of 400
    return advantage.abs() * diagnose.gradient_proxy(rows.student, rows.tokens)


@fault("effective_share", "four outliers are the update", FALLS, 0.2)
def _() -> tuple[Any, Any]:
    rows = Rows.random()
    return tuple(diagnose.effective_share(pushes(rows, each)) for each in (False, True))


@fault("top_share", "four outliers are the update", RISES, 0.7)
def _() -> tuple[Any, Any]:
    rows = Rows.random()
    return tuple(diagnose.top_share(pushes(rows, each), 0.01) for each in (False, True))


@fault("disagreement_map", "every tenth token both are sure, and of different ones", RISES, 0.5)
def _() -> tuple[Any, Any]:
    """The share of the disagreement in the cell where both are surest."""
    rows = Rows.random()
    student, teacher = rows.student.clone(), rows.teacher.clone()
    student[::10] = (20.0 * torch.eye(40)[3]).log_softmax(-1).double()
    teacher[::10] = student[::10].roll(1, -1)
    found = []
    for pair in ((rows.student, rows.teacher), (student, teacher)):
        entropies = (student_entropy(each) for each in pair)
        size = diagnose.reverse_kl(*pair)
        found.append(diagnose.disagreement_map(*entropies, size)[1, 0, 0])
    return found[0], found[1]


def gradient(student: Tensor, teacher: Tensor) -> Tensor:
    """Of the reverse KL on the logits."""
    ratio = student - teacher
    mean = (student.exp() * ratio).sum(-1, keepdim=True)
    return (student.exp() * (ratio - mean)).flatten()


@fault("cosine", "one teacher takes back what the other teaches", FALLS, 1.0)
def _() -> tuple[Any, Any]:
    rows = Rows.random()
    wanted = rows.teacher - rows.student
    like_minded = (rows.student + wanted + 0.1 * rows.normal()).log_softmax(-1)
    contrary = (rows.student - wanted).log_softmax(-1)
    found = [
        diagnose.cosine(gradient(rows.student, rows.teacher), gradient(rows.student, each))
        for each in (like_minded, contrary)
    ]
    assert found[1] < 0
    return tuple(found)


@fault("explained_variance", "the critic guesses", FALLS, 1.0)
def _() -> tuple[Any, Any]:
    rows = Rows.random()
    target = rows.normal(500)
    knows, guesses = target + 0.2 * rows.normal(500), rows.normal(500)
    found = [diagnose.explained_variance(each, target) for each in (knows, guesses)]
    assert found[1] < 0  # worse than a constant
    return tuple(found)


@fault("td_residual_by_bin", "the values of the last quarter are off", RISES, 0.3)
def _() -> tuple[Any, Any]:
    rows = Rows.random()
    reward, mask = by_sequence(rows.normal(200 * LENGTH), LENGTH)
    true = torch.zeros(200, LENGTH + 1)  # of rewards of mean 0
    wrong = true.clone()
    wrong[:, 18:24] = torch.arange(6, 0, -1) * 0.5  # it expects half a nat from each of them
    found = []
    for values in (true, wrong):
        delta = reward + values[:, 1:] - values[:, :-1]
        found.append(diagnose.td_residual_by_bin(delta, mask, 4)[-1].abs())
    return tuple(found)


@fault("gradient_variance", "every token is multiplied by a long noisy sum", RISES, 50.0)
def _() -> tuple[Any, Any]:
    rows = Rows.random()
    reward, score = rows.normal(300, LENGTH), rows.normal(300, LENGTH)
    return_to_go = reward.flip(1).cumsum(1).flip(1)
    # By hand: LENGTH at once, 1 + 2 + ... + LENGTH as sums.
    found = [diagnose.gradient_variance(score * each) for each in (reward, return_to_go)]
    assert found == pytest.approx([24, 300], rel=0.2)
    return tuple(found)


# --------------------------------------------------------------------------------------------
# Routing


def suppressed(rows: Rows, *, routable: bool) -> tuple[Tensor, Tensor]:
    """A teacher that takes the sampled token's mass: to the student's next best, or to the tail."""
    tail = ~torch.zeros_like(rows.student, dtype=torch.bool).scatter(
        -1, rows.student.topk(2 * K).indices, True
    )
    tail = tail.scatter(-1, rows.tokens[:, None], False)
    rest = rows.student.scatter(-1, rows.tokens[:, None], -math.inf)
    best = torch.zeros_like(tail).scatter(-1, rest.argmax(-1, keepdim=True), True)
    receivers = best if routable else tail
    moved = 0.2 * rows.logp(rows.student).exp()[:, None]
    teacher = rows.student.exp() + moved * receivers / receivers.sum(-1, keepdim=True)
    teacher = teacher.scatter_add(-1, rows.tokens[:, None], -moved).log()
    listed = diagnose.reachable(rows.student, teacher, rows.tokens, k=K)
    return teacher, listed


@fault("reachable", "what the teacher wants instead is in nobody's list", FALLS, 0.6)
def _() -> tuple[Any, Any]:
    return tuple(
        suppressed(Rows.random(), routable=each)[1].any(-1).double() for each in (True, False)
    )


@fault("routable_share", "what the teacher wants instead is in nobody's list", FALLS, 0.6)
def _() -> tuple[Any, Any]:
    rows = Rows.random()
    found = []
    for routable in (True, False):
        teacher, listed = suppressed(rows, routable=routable)
        advantage = rows.logp(teacher) - rows.logp(rows.student)
        found.append(diagnose.routable_share(advantage, listed, teacher, mass=0.01))
    return tuple(found)


@fault("leak", "what the teacher wants instead is in nobody's list", RISES, 0.2)
def _() -> tuple[Any, Any]:
    rows = Rows.random()
    return tuple(
        diagnose.leak(rows.student, suppressed(rows, routable=each)[1], rows.tokens)
        for each in (True, False)
    )


@fault("realised_routing", "plain suppression in place of a route", FALLS, 0.3)
def _() -> tuple[Any, Any]:
    rows = Rows.random()
    _, listed = suppressed(rows, routable=True)
    own = torch.zeros_like(rows.student).scatter(-1, rows.tokens[:, None], 1.0)
    shares = torch.where(listed, rows.student.exp(), 0.0)
    with_some, student = listed.any(-1), rows.student.exp()
    routed = shares / shares.sum(-1, keepdim=True).clamp(min=1e-9)
    found = []
    for released in (routed, student):  # the gradient e_y - released on the logits
        step = released - own
        after = (rows.student + 1e-4 * step).log_softmax(-1)
        chosen = (each[with_some] for each in (rows.student, after, listed, rows.tokens))
        found.append(diagnose.realised_routing(*chosen))
        # To first order a step z moves student(v) by student(v) * (z(v) - mean of z).
        moved = (student * (step - (student * step).sum(-1, keepdim=True)))[with_some]
        reached, lost = moved[listed[with_some]].sum(), -moved[own[with_some] > 0].sum()
        assert found[-1] == pytest.approx(float(reached / lost), rel=1e-3)
    return tuple(found)


# --------------------------------------------------------------------------------------------
# Stale text


def drawn_by(old: Tensor, rows: Rows, student: Tensor, *, said: Tensor) -> tuple[Tensor, Tensor]:
    """Log-probabilities of tokens that `old` drew: what is said to have drawn them, the student."""
    many = old.repeat(50, 1)
    tokens = draw(many, rows.generator)[:, None]
    return said.repeat(50, 1).gather(-1, tokens)[:, 0], student.repeat(50, 1).gather(-1, tokens)[
        :, 0
    ]


@fault("importance_ratio", "the text was drawn hotter than is said", RISES, 0.3)
def _() -> tuple[Any, Any]:
    rows = Rows.random()
    hot, cold = tempered(rows.student, 2.0), tempered(rows.student, 0.7)
    return tuple(
        diagnose.importance_ratio(*drawn_by(each, rows, rows.student, said=cold))
        for each in (cold, hot)
    )


@fault("importance_ratio", "the sampler never draws the unlikely half", FALLS, 0.02)
def _() -> tuple[Any, Any]:
    rows = Rows.random()
    half = rows.student < rows.student.median(-1, keepdim=True).values
    cut = with_nothing(rows.student, half)
    healthy = diagnose.importance_ratio(
        *drawn_by(rows.student, rows, rows.teacher, said=rows.student)
    )
    assert healthy == pytest.approx(1.0, abs=0.015)
    faulty = diagnose.importance_ratio(*drawn_by(cut, rows, rows.student, said=cut))
    # Exactly the mass that the student has where the sampler can go.
    assert faulty == pytest.approx(float(rows.student.exp()[~half].sum()) / 400, abs=1e-3)
    return healthy, faulty


def aged(rows: Rows, updates: float) -> tuple[Tensor, Tensor]:
    """Tokens of a policy from which the student has moved away."""
    student = (rows.student + updates * rows.normal()).log_softmax(-1)
    return drawn_by(rows.student, rows, student, said=rows.student)


@fault("kl_from_samples", "the policy is stale", RISES, 0.2)
def _() -> tuple[Any, Any]:
    rows = Rows.random()
    return tuple(diagnose.kl_from_samples(*aged(rows, each)) for each in (0.1, 1.0))


@fault("log_mismatch", "the engines differ", RISES, 0.05)
def _() -> tuple[Any, Any]:
    rows = Rows.random()
    logp = rows.logp(rows.student)
    return tuple(
        diagnose.log_mismatch(logp, logp + spread * rows.normal(400)) for spread in (1e-4, 0.1)
    )


@fault("masked_share", "the policy is stale", RISES, 0.2)
def _() -> tuple[Any, Any]:
    rows = Rows.random()
    found = []
    for updates in (0.1, 1.0):
        old, student = aged(rows, updates)
        found.append(diagnose.masked_share((student - old).exp(), 0.5, 2.0))
    return tuple(found)


@fault("importance_mass_masked", "the policy is stale", RISES, 0.2)
def _() -> tuple[Any, Any]:
    rows = Rows.random()
    found = []
    for updates in (0.1, 1.0):
        old, student = aged(rows, updates)
        found.append(diagnose.importance_mass_masked((student - old).exp(), 0.5, 2.0))
    return tuple(found)


# --------------------------------------------------------------------------------------------
# Outcomes


def judged_responses(rows: Rows) -> tuple[Tensor, Tensor]:
    """Scores that go with the verdicts, one in ten not judged."""
    verdict = (rows.normal(300) > 0).double()
    score = verdict + 0.7 * rows.normal(300)
    verdict[::10] = math.nan
    return score, verdict


@fault("align_auc", "what is wrong is ranked first", FALLS, 0.5)
def _() -> tuple[Any, Any]:
    score, verdict = judged_responses(Rows.random())
    found = diagnose.align_auc(score, verdict), diagnose.align_auc(-score, verdict)
    assert found[1] < 0.5
    assert sum(found) == pytest.approx(1.0)
    return found


@fault("outcome_correlation", "what is wrong is ranked first", FALLS, 0.5)
def _() -> tuple[Any, Any]:
    score, verdict = judged_responses(Rows.random())
    return tuple(diagnose.outcome_correlation(each, verdict) for each in (score, -score))


@fault("split_delta", "what was solved is overwritten", FALLS, 0.3)
def _() -> tuple[Any, Any]:
    solved = torch.tensor([True, True, True, False, False])
    learnt = torch.tensor([1.0, 1.0, 1.0, 1.0, 0.0])
    overwritten = torch.tensor([1.0, 0.0, 1.0, 1.0, 0.0])
    healthy, faulty = (diagnose.split_delta(solved, each) for each in (learnt, overwritten))
    assert healthy == (0.0, 0.5)
    assert faulty[1] == healthy[1]  # the others gain as much
    return healthy[0], faulty[0]


@fault("privilege_gap", "nothing of the context was learnt", RISES, 0.4)
def _() -> tuple[Any, Any]:
    with_context = torch.tensor([1.0, 1.0, 1.0, 0.0])
    learnt, alone = torch.tensor([1.0, 1.0, 0.0, 1.0]), torch.tensor([0.0, 0.0, 1.0, 0.0])
    return tuple(diagnose.privilege_gap(with_context, each) for each in (learnt, alone))


@fault("recoverability", "the prefixes are flawed beyond repair", FALLS, 0.3)
def _() -> tuple[Any, Any]:
    from_scratch = torch.tensor([1.0, 1.0, 1.0, 0.0])
    sound, flawed = torch.tensor([1.0, 1.0, 0.0]), torch.tensor([0.0, 1.0, 0.0])
    return tuple(diagnose.recoverability(each, from_scratch) for each in (sound, flawed))


@fault("calibration_error", "certainty is rewarded", RISES, 0.15)
def _() -> tuple[Any, Any]:
    rows = Rows.random()
    confidence = torch.rand(2000, generator=rows.generator)
    verdict = (torch.rand(2000, generator=rows.generator) < confidence).float()
    certain = 1 - 0.2 * (1 - confidence)
    return tuple(diagnose.calibration_error(each, verdict) for each in (confidence, certain))


@fault("hedging_share", "doubt is no longer expressed", FALLS, 0.4)
def _() -> tuple[Any, Any]:
    words = ["perhaps", "I think"]
    before = ["Perhaps 7.", "I think it is 8", "Perhapsody 9", "so, 3"]
    return tuple(
        diagnose.hedging_share(each, words)
        for each in (before, ["7.", "It is 8", "Perhapsody 9", "so, 3"])
    )


# --------------------------------------------------------------------------------------------
# Drift


def lengths(*counts: int) -> Tensor:
    return torch.arange(40) < torch.tensor(counts)[:, None]


@fault("length_mean", "responses grow", RISES, 10.0)
def _() -> tuple[Any, Any]:
    return diagnose.length_mean(lengths(8, 12, 10)), diagnose.length_mean(lengths(30, 40, 25))


@fault("truncated_share", "responses no longer end", RISES, 0.4)
def _() -> tuple[Any, Any]:
    return (
        diagnose.truncated_share(["eos", "eos", "length", "eos"]),
        diagnose.truncated_share(["eos", "length", "length", "length"]),
    )


@fault("repeated_ngrams", "the response loops", RISES, 0.7)
def _() -> tuple[Any, Any]:
    prose = torch.randint(1000, (2, 40), generator=torch.Generator().manual_seed(0))
    loop = prose[:, :4].repeat(1, 10)
    return tuple(diagnose.repeated_ngrams(each, lengths(40, 33), 4) for each in (prose, loop))


# --------------------------------------------------------------------------------------------


def test_every_diagnostic_has_a_fault_and_every_fault_a_diagnostic() -> None:
    assert set(FAULTS) == set(catalog.diagnostics())


@pytest.mark.parametrize(
    ("name", "planted"),
    [
        pytest.param(name, each, id=f"{name}: {each.says}")
        for name, found in FAULTS.items()
        for each in found
    ],
)
def test_a_fault_moves_the_number_as_its_reading_says(name: str, planted: Fault) -> None:
    healthy, faulty = map(number, planted.measure())
    assert math.isfinite(healthy) or healthy == math.inf
    assert planted.goes * (faulty - healthy) > planted.by, (healthy, faulty)
