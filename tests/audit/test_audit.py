"""The audit of losses, judged by specimens and by correct losses that were written without it."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from opd import Dense, Objective, Sampled, methods
from opd.audit.adapters import ADAPTERS, adapt
from opd.audit.card import card
from opd.audit.findings import CAUTIONS, FAULTS
from opd.audit.loss import derivative
from opd.audit.own import objective_loss
from opd.audit.specimens import NOT_IN_A_LOSS, SPECIMENS, Specimen
from opd.audit.subject import response
from opd.audit.verdict import Verdict, audit_loss
from opd.errors import ConfigError
from opd.formula import credit, divergence, reward, support, surrogate
from tests.audit.correct_losses import CORRECT, Correct

SECONDS = 2.0
"""CPU-seconds that one audit may take."""


def audited(specimen: Specimen | Correct) -> Verdict:
    loss = adapt(specimen.function, specimen.name, specimen.adapter)
    derivative(loss, response(0, 2, loss.dtype))  # what torch imports at its first use
    return audit_loss(loss, claim=None if specimen.claim == "none" else specimen.claim)


# --------------------------------------------------------------------------------------------
# Recall and false alarms


@pytest.mark.parametrize("specimen", SPECIMENS, ids=lambda specimen: specimen.name)
def test_every_known_mistake_is_found_and_named(specimen: Specimen) -> None:
    verdict = audited(specimen)
    named = {finding.name for finding in verdict.findings}
    assert set(specimen.finds) <= named, verdict.findings
    if specimen.descends:
        assert verdict.match is not None
        assert verdict.match.text == specimen.descends
        assert verdict.match.cosine > 1 - 1e-9
    if specimen.claim != "none" and set(specimen.finds) & set(FAULTS):
        assert verdict.holds is False
    assert verdict.seconds < SECONDS


def test_the_specimens_and_what_no_loss_can_show_are_told_apart() -> None:
    assert len(SPECIMENS) >= 45
    assert len({specimen.name for specimen in SPECIMENS}) == len(SPECIMENS)
    for specimen in SPECIMENS:
        assert set(specimen.finds) <= set(FAULTS) | set(CAUTIONS) | {"mean-of-means"}
        assert specimen.seen
    assert all(why for _, why in NOT_IN_A_LOSS)


@pytest.mark.parametrize("correct", CORRECT, ids=lambda correct: correct.name)
def test_no_alarm_sounds_for_a_correct_loss(correct: Correct) -> None:
    verdict = audited(correct)
    assert not verdict.faults
    assert verdict.holds is not False
    true_remarks = {*correct.facts, "not-finite"}
    if "mean-of-means" in correct.facts:
        true_remarks.add("own-count")
    if correct.claim == "sequence_reverse_kl":
        true_remarks.add("reads-other-rows")
    assert {finding.name for finding in verdict.findings} <= true_remarks
    assert verdict.seconds < SECONDS


def test_there_are_enough_correct_losses() -> None:
    assert len(CORRECT) >= 60


# --------------------------------------------------------------------------------------------
# Our own formulas


def dense(what: Any, **knobs: Any) -> Objective:
    from opd.types import Bound

    return Objective(Dense(divergence=Bound.of(what).with_knobs(**knobs)))


def sampled(**slots: Any) -> Objective:
    return Objective(Sampled(reward=reward.teacher_log_ratio, **slots))


OURS: dict[str, tuple[Objective, str]] = {
    "forward_kl": (dense(divergence.forward_kl), "forward_kl"),
    "reverse_kl": (dense(divergence.reverse_kl), "reverse_kl"),
    "jensen_shannon": (dense(divergence.jensen_shannon), "jsd:0.5"),
    "total_variation": (dense(divergence.total_variation), "total_variation"),
    "squared_hellinger": (dense(divergence.squared_hellinger), "squared_hellinger"),
    "reverse_kl_k2": (dense(divergence.reverse_kl_k2), "reverse_kl"),
    "forward_kl_k3": (dense(divergence.forward_kl_k3), "forward_kl"),
    "immediate": (sampled(), "reverse_kl"),
    "return_to_go": (sampled(credit=credit.return_to_go), "sequence_reverse_kl"),
    "rao_blackwell": (sampled(credit=credit.rao_blackwell), "sequence_reverse_kl"),
    **{
        f"generalized_jsd_{weight}": (
            dense(divergence.generalized_jsd, teacher_weight=weight),
            f"jsd:{weight}",
        )
        for weight in (0.1, 0.3, 0.9)
    },
    **{
        f"skew_{side}_{skew}": (
            dense(getattr(divergence, f"skew_{side}"), skew=skew),
            f"skew_{side}:{skew}",
        )
        for side in ("forward_kl", "reverse_kl")
        for skew in (0.1, 0.5)
    },
    **{
        f"alpha_{alpha}": (dense(divergence.alpha_divergence, alpha=alpha), f"alpha:{alpha}")
        for alpha in (-0.5, 0.5, 2.0)
    },
    **{
        f"power_{power}": (dense(divergence.power_divergence, power=power), f"power:{power}")
        for power in (0.5, 2.0)
    },
    "vopd": (methods.vopd().objective, "reverse_kl"),
    "gkd": (methods.gkd().objective, "jsd:0.5"),
}


@pytest.mark.parametrize("name", OURS)
def test_our_formulas_hold(name: str) -> None:
    objective, claim = OURS[name]
    verdict = audit_loss(objective_loss(objective, name), claim=claim)
    assert verdict.holds, verdict.findings
    assert not verdict.faults


def test_a_support_that_is_too_small_is_named() -> None:
    from opd.types import Bound

    term = Dense(
        divergence=divergence.reverse_kl,
        support=Bound.of(support.teacher_top_k).with_knobs(k=3),
        tail="renormalise",
    )
    verdict = audit_loss(objective_loss(Objective(term), "teacher's top 3"), claim="reverse_kl")
    assert verdict.holds is False
    assert verdict.descends == "reverse KL on the teacher's top 3, both renormalised"


# --------------------------------------------------------------------------------------------
# What is told


def reverse_kl(student: Tensor, teacher: Tensor, tokens: Tensor) -> Tensor:
    one, other = student.log_softmax(-1), teacher.log_softmax(-1)
    return (one.exp() * (one - other)).sum(-1)


def test_the_verdict_in_a_sentence() -> None:
    k3 = next(specimen for specimen in SPECIMENS if specimen.name == "k3_called_reverse_kl")
    assert audited(k3).sentence == (
        "descends forward KL (cosine 1.000); named reverse KL: does not hold"
    )
    assert audit_loss(reverse_kl).sentence == "descends reverse KL (cosine 1.000)"


def test_an_ascent_is_told_from_a_descent() -> None:
    verdict = audit_loss(lambda s, t, y: -reverse_kl(s, t, y), claim="reverse_kl", name="minus")
    assert verdict.holds is False
    assert verdict.descends == "the opposite of reverse KL"


def test_a_factor_is_told_and_does_not_matter() -> None:
    verdict = audit_loss(lambda s, t, y: 7 * reverse_kl(s, t, y), claim="reverse_kl", name="7")
    assert verdict.holds
    assert verdict.match is not None
    assert verdict.match.scale == pytest.approx(7.0)


def test_a_family_member_is_fitted() -> None:
    objective = dense(divergence.generalized_jsd, teacher_weight=0.37)
    verdict = audit_loss(objective_loss(objective, "jsd"))
    assert verdict.match is not None
    assert verdict.match.text == "jsd:0.37"


def test_credit_is_told_by_distance() -> None:
    objective = sampled(
        credit=_bound(credit.discounted, gamma=0.5, meaning="task"),
    )
    verdict = audit_loss(objective_loss(objective, "discounted"))
    assert verdict.descends == "log-ratios credited 1, 0.5, 0.25 by distance"


def _bound(function: Any, **knobs: Any) -> Any:
    from opd.types import Bound

    return Bound.of(function).with_knobs(**knobs)


def test_text_by_another_policy_is_corrected_or_not() -> None:
    corrected = audit_loss(
        objective_loss(sampled(surrogate=surrogate.importance), "ratio"), claim="reverse_kl"
    )
    plain = audit_loss(objective_loss(sampled(), "score"), claim="reverse_kl")
    (check,) = [check for check in corrected.checks if check.name == "stale text"]
    assert check.message.startswith("corrected exactly")
    (check,) = [check for check in plain.checks if check.name == "stale text"]
    assert check.message == "it takes no old_logp"


def test_supervised_losses_are_judged_on_the_teachers_text() -> None:
    def likelihood(student: Tensor, teacher: Tensor, tokens: Tensor) -> Tensor:
        return torch.nn.functional.cross_entropy(student, tokens, reduction="none")

    on_teacher = audit_loss(likelihood, claim="forward_kl", writer="teacher")
    assert on_teacher.match is not None
    assert on_teacher.match.text == "forward_kl"
    on_student = audit_loss(likelihood, claim="forward_kl")
    assert "no-teacher-gradient" in {finding.name for finding in on_student.faults}


# --------------------------------------------------------------------------------------------
# What cannot be audited


@pytest.mark.parametrize(
    ("claim", "said"),
    [
        ("revers_kl", "Did you mean 'reverse_kl'"),
        ("reverse_kl:2", "takes no parameter"),
        ("skew_forward_kl", "as in skew_forward_kl:0.3"),
        ("jsd:2", "as in jsd:0.3"),
        ("alpha:x", "as in alpha:0.3"),
    ],
)
def test_a_claim_that_is_none_is_refused(claim: str, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        audit_loss(reverse_kl, claim=claim)


def test_a_result_of_another_shape_is_refused() -> None:
    with pytest.raises(ConfigError, match="returned shape"):
        audit_loss(lambda s, t, y: s, name="matrix")
    with pytest.raises(ConfigError, match="not a tensor"):
        audit_loss(lambda s, t, y: 3.0, name="number")


def test_options_and_adapters_are_checked() -> None:
    with pytest.raises(ConfigError, match=r"no adapter 'row'\. Did you mean 'rows'"):
        adapt(reverse_kl, "reverse_kl", "row")
    with pytest.raises(ConfigError, match="has no option 'beta'"):
        adapt(reverse_kl, "reverse_kl", "rows", beta=0.5)
    assert "rows" in ADAPTERS


def test_the_card_stands_alone_and_says_what_the_verdict_says() -> None:
    verdict = audit_loss(lambda s, t, y: reverse_kl(s, t, y), claim="forward_kl", name="<b>mine")
    page = card(verdict)
    assert "&lt;b&gt;mine" in page
    assert "<b>mine" not in page
    assert "does not hold" in page
    assert "another-divergence" in page
    assert len(verdict.points) == 4
    assert page.count("<circle") == sum(map(len, verdict.points.values())) == 4 * 48
    assert "http" not in page
    assert not any(math.isnan(x) for points in verdict.points.values() for x, _ in points)
