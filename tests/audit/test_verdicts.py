"""Wrong losses that look right, right losses that look wrong, and what is said of each."""

# Losses as people write them, without types.
# mypy: allow-untyped-defs, allow-untyped-calls

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F  # noqa: N812

from opd.audit.card import card
from opd.audit.findings import Check
from opd.audit.loss import Writer
from opd.audit.verdict import Verdict, audit_loss


def kl(student, teacher):
    student, teacher = student.log_softmax(-1), teacher.log_softmax(-1)
    return (student.exp() * (student - teacher)).sum(-1)


def logp(logits, tokens):
    return -F.cross_entropy(logits, tokens, reduction="none")


def gradient_of_log_ratio(student, teacher, tokens):
    one, other = logp(student, tokens), logp(teacher, tokens)
    return -(other - one).detach() * one


def audited(
    function: Callable[..., Any], claim: str | None = "reverse_kl", writer: Writer = "student"
) -> Verdict:
    return audit_loss(function, claim=claim, writer=writer, name=function.__name__)


def names(verdict: Verdict) -> set[str]:
    return {finding.name for finding in verdict.findings}


def faults(verdict: Verdict) -> set[str]:
    return {finding.name for finding in verdict.faults}


def check_of(verdict: Verdict, name: str) -> Check:
    (found,) = [check for check in verdict.checks if check.name == name]
    return found


# --------------------------------------------------------------------------------------------
# A row among others


def turned_after_the_first(student, teacher, tokens):
    losses = kl(student, teacher)
    return torch.cat([losses[:1], -losses[1:]])


def another_after_the_first(student, teacher, tokens):
    return torch.cat([kl(student, teacher)[:1], kl(teacher, student)[1:]])


def fading(student, teacher, tokens):
    return kl(student, teacher) * 0.5 ** torch.arange(len(tokens))


def fading_total(student, teacher, tokens):
    return (kl(student, teacher) * torch.linspace(1, 0.1, len(tokens))).sum()


@pytest.mark.parametrize(
    "loss", [turned_after_the_first, another_after_the_first, fading, fading_total]
)
def test_what_depends_on_a_rows_place_does_not_hold(loss: Callable[..., Any]) -> None:
    verdict = audited(loss)
    assert verdict.holds is False
    assert faults(verdict) == {"place-in-call"}
    assert "own-count" not in names(verdict)
    assert check_of(verdict, "micro-batches").status == "not applicable"


def test_what_a_long_call_descends_is_said() -> None:
    (fault,) = audited(turned_after_the_first).faults
    assert "47 of 48 rows have the opposite of the gradient" in fault.message


def test_a_statistic_that_five_rows_hide_is_told_from_a_place() -> None:
    def of_many(student, teacher, tokens):
        losses = kl(student, teacher)
        kept = losses.detach() >= losses.detach().median() if len(losses) > 12 else 1.0
        return losses * kept

    verdict = audited(of_many)
    assert names(verdict) & {"place-in-call", "reads-other-rows"} == {"reads-other-rows"}


def test_a_draw_in_a_long_call_is_no_matter_of_place() -> None:
    def one_left_out(student, teacher, tokens):
        losses = kl(student, teacher)
        if len(losses) > 12:
            losses = losses * (torch.arange(len(losses)) != torch.randint(len(losses), ()))
        return losses

    verdict = audited(one_left_out)
    assert verdict.holds
    assert "reads-other-rows" in names(verdict)


def test_a_ratio_of_whole_responses_is_exact_on_responses_of_one_token() -> None:
    def geometric(student, teacher, tokens, old_logp):
        one = logp(student, tokens)
        paid = (logp(teacher, tokens) - one).detach()
        ratio = (one - old_logp).mean().detach().exp()
        return -ratio * (one - one.detach()).exp() * paid

    assert "stale-text" not in names(audited(geometric))


def test_a_mean_is_no_matter_of_place() -> None:
    def mean(student, teacher, tokens):
        return kl(student, teacher).mean()

    verdict = audited(mean)
    assert verdict.holds
    assert "own-count" in names(verdict)


def test_rows_that_divide_themselves_by_their_call_are_found() -> None:
    def of_the_call(student, teacher, tokens):
        return kl(student, teacher) / len(tokens)

    def of_the_mask(student, teacher, tokens, mask):
        return kl(student, teacher) * mask / mask.sum()

    def told_and_not_used(student, teacher, tokens, mask, count):
        return kl(student, teacher) * mask / mask.sum()

    def told_and_used(student, teacher, tokens, mask, count):
        return kl(student, teacher) * mask / count

    assert "own-count" in names(audited(of_the_call))
    assert "own-count" in names(audited(of_the_mask))
    assert audited(of_the_mask).holds
    assert faults(audited(told_and_not_used)) == {"mean-of-means"}
    assert not names(audited(told_and_used)) & {"own-count", "mean-of-means"}


# --------------------------------------------------------------------------------------------
# Text of the teacher


def test_the_likelihood_of_the_teachers_text_is_forward_kl() -> None:
    def likelihood(student, teacher, tokens, mask):
        return F.cross_entropy(student, torch.where(mask, tokens, -100), ignore_index=-100)

    verdict = audited(likelihood, "forward_kl", "teacher")
    assert verdict.holds, verdict.findings
    assert check_of(verdict, "missing scores").status == "not applicable"


def test_a_row_that_is_left_out_for_want_of_scores_is_a_caution() -> None:
    def leaves_out(student, teacher, tokens):
        known = teacher.isfinite().all(-1)
        losses = kl(student, torch.where(known[:, None], teacher, 0.0))
        return torch.where(known, losses, 0.0)

    def makes_up(student, teacher, tokens):
        return kl(student, teacher.nan_to_num(0.0))

    verdict = audited(leaves_out)
    assert verdict.holds
    assert "skipped-scores" in names(verdict)
    assert faults(audited(makes_up)) == {"missing-scores"}


# --------------------------------------------------------------------------------------------
# Precision


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("place", ["logits", "log-probs", "tokens"])
def test_what_computes_in_less_precision_is_judged_in_it(dtype: torch.dtype, place: str) -> None:
    def rounded(student, teacher, tokens):
        if place == "logits":
            return kl(student.to(dtype), teacher.to(dtype)).float()
        if place == "tokens":
            return gradient_of_log_ratio(student.to(dtype), teacher.to(dtype), tokens)
        one, other = (side.log_softmax(-1).to(dtype) for side in (student, teacher))
        return (one.exp() * (one - other)).sum(-1)

    verdict = audited(rounded)
    assert verdict.holds, verdict.findings
    assert verdict.descends == "reverse KL"
    assert ("low-precision" in names(verdict)) >= (dtype != torch.float32)


def test_less_precision_is_no_excuse() -> None:
    def forward(student, teacher, tokens):
        return kl(teacher.bfloat16(), student.bfloat16())

    verdict = audited(forward)
    assert verdict.holds is False
    assert verdict.descends == "forward KL"


# --------------------------------------------------------------------------------------------
# What a loss may do, and what nobody can judge


def test_a_floor_under_probabilities_is_audited() -> None:
    def floored(student, teacher, tokens):
        one, other = ((side.softmax(-1) + 1e-4).log() for side in (student, teacher))
        return (teacher.softmax(-1) * (other - one)).sum(-1)

    verdict = audited(floored, "forward_kl")
    assert verdict.holds is False
    assert "nearest forward KL" in verdict.descends


def test_a_loss_may_write_into_what_it_is_given() -> None:
    def in_place(student, teacher, tokens, temperature):
        student.div_(temperature)
        return kl(student, teacher.div_(temperature))

    def in_the_mask(student, teacher, tokens, mask):
        losses = kl(student, teacher) * mask.clone()
        mask.zero_()
        tokens.fill_(0)
        return losses

    assert audited(in_place).holds
    assert audited(in_the_mask).holds


def test_what_draws_or_remembers_cannot_be_judged() -> None:
    calls = [0]

    def draws(student, teacher, tokens):
        return kl(student, teacher) * torch.rand(len(tokens))

    def remembers(student, teacher, tokens):
        calls[0] += 1
        return kl(student, teacher) * calls[0]

    for loss in (draws, remembers):
        verdict = audited(loss)
        assert verdict.holds is False
        assert names(verdict) == {"not-repeatable"}
        assert "does not hold (not-repeatable)" in verdict.sentence
        assert audited(loss, None).holds is None

    def counts(student, teacher, tokens):
        calls[0] += 1
        return kl(student, teacher)

    assert audited(counts).holds


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_what_is_not_finite_on_ordinary_rows_is_said_so(value: float) -> None:
    def broken(student, teacher, tokens):
        return kl(student, teacher).sum() * value

    verdict = audited(broken)
    assert verdict.holds is False
    (fault,) = verdict.faults
    assert fault.name == "not-a-number"
    assert "on ordinary rows" in fault.message
    assert "not-a-number" in card(verdict)


def test_a_value_that_is_not_finite_is_a_caution() -> None:
    def logged_wrongly(student, teacher, tokens):
        losses = kl(student, teacher)
        return losses + (losses.detach() * math.nan).nan_to_num(math.inf)

    verdict = audited(logged_wrongly)
    assert verdict.holds
    assert "not-finite" in names(verdict)


# --------------------------------------------------------------------------------------------
# Text of an older student


def weighed(weight: Callable[..., Any]) -> Callable[..., Any]:
    """A policy gradient of the log-ratio whose surrogate is `weight(ratio, advantage)`."""

    def loss(student, teacher, tokens, old_logp):
        one = logp(student, tokens)
        return -weight((one - old_logp).exp(), (logp(teacher, tokens) - one).detach())

    return loss


@pytest.mark.parametrize(
    ("weight", "said"),
    [
        (lambda ratio, paid: ratio * paid, "corrected exactly, "),
        (lambda ratio, paid: torch.minimum(ratio * paid, ratio.clamp(0.8, 1.2) * paid), "near 1"),
        (lambda ratio, paid: ratio.detach().clamp(max=3.0) * ratio.log() * paid, "corrected exact"),
    ],
)
def test_a_right_ratio_is_exact_near_one(weight: Callable[..., Any], said: str) -> None:
    verdict = audited(weighed(weight))
    assert verdict.holds
    assert "stale-text" not in names(verdict)
    assert said in check_of(verdict, "stale text").message


@pytest.mark.parametrize(
    "weight",
    [
        lambda ratio, paid: ratio.detach().reciprocal() * ratio.log() * paid,
        lambda ratio, paid: ratio.detach().square() * ratio.log() * paid,
    ],
)
def test_a_wrong_ratio_is_a_caution(weight: Callable[..., Any]) -> None:
    assert "stale-text" in names(audited(weighed(weight)))


def test_a_bound_that_drops_tokens_on_both_sides_is_noted() -> None:
    verdict = audited(weighed(lambda ratio, paid: ratio.clamp(0.8, 1.2) * paid))
    check = check_of(verdict, "stale text")
    assert check.status == "noted"
    assert "nothing brings them back" in check.message


def test_an_advantage_of_the_rollout_is_told_from_a_ratio_left_out() -> None:
    def with_ratio(student, teacher, tokens, old_logp):
        one, other = logp(student, tokens), logp(teacher, tokens)
        return -(one - old_logp).exp() * (other - old_logp)

    def without(student, teacher, tokens, old_logp):
        return -(logp(teacher, tokens) - old_logp).detach() * logp(student, tokens)

    def unused(student, teacher, tokens, old_logp):
        return gradient_of_log_ratio(student, teacher, tokens)

    verdict = audited(with_ratio)
    assert "stale-text" not in names(verdict)
    assert "the advantage is that of the rollout" in check_of(verdict, "stale text").message
    assert "stale-text" in names(audited(without))
    assert "does not look at old_logp" in check_of(audited(unused), "stale text").message


# --------------------------------------------------------------------------------------------
# The value


def test_a_value_is_told_from_what_is_descended() -> None:
    def turned(student, teacher, tokens):
        return -kl(student, teacher)

    verdict = audited(turned)
    assert check_of(verdict, "value").status == "noted"
    assert check_of(verdict, "value").message == "in expectation it is -1 x the reverse KL"
    surrogate = audited(gradient_of_log_ratio)
    assert check_of(surrogate, "value").status == "noted"
    assert "do not read it as one" in check_of(surrogate, "value").message


# --------------------------------------------------------------------------------------------
# What is named, and what is not


def test_an_ascent_is_a_fault_without_a_claim_too() -> None:
    def away(student, teacher, tokens):
        return -kl(student, teacher)

    assert faults(audited(away, None)) == {"ascent"}
    assert audited(away, "none").holds is False


def test_a_dropped_row_is_no_discount() -> None:
    def without_the_last(student, teacher, tokens):
        return kl(student[:-1], teacher[:-1]).mean()

    assert faults(audited(without_the_last, None)) == {"masked-rows"}


def test_what_stands_in_a_row_does_not_mask_it() -> None:
    def gated(student, teacher, tokens):
        sure = teacher.softmax(-1).amax(-1) > 0.4
        return kl(student, teacher) * sure

    def floored(student, teacher, tokens):
        return (logp(student, tokens) - logp(teacher, tokens)).clamp(min=0.0)

    for loss in (gated, floored):
        assert "dead-rows" in faults(audited(loss))
        assert "masked-rows" not in faults(audited(loss))


def test_an_inverted_mask_is_called_so() -> None:
    def inverted(student, teacher, tokens, mask):
        return kl(student, teacher) * ~mask

    (fault,) = [fault for fault in audited(inverted).faults if "inverted" in fault.message]
    assert fault.name == "masked-rows"


def test_returns_that_carry_a_gradient_are_undetached() -> None:
    def returns(student, teacher, tokens, *, is_live):
        one, other = logp(student, tokens), logp(teacher, tokens)
        ratio = other - one
        summed = ratio.flip(0).cumsum(0).flip(0)
        return -((summed if is_live else summed.detach()) * one).sum()

    def live(student, teacher, tokens):
        return returns(student, teacher, tokens, is_live=True)

    def held(student, teacher, tokens):
        return returns(student, teacher, tokens, is_live=False)

    assert "undetached" in faults(audited(live, "sequence_reverse_kl"))
    verdict = audited(held, "sequence_reverse_kl")
    assert verdict.holds
    assert check_of(verdict, "credit").message == "log-ratios credited 1, 1, 1 by distance"


def test_a_bound_on_the_reward_is_told_with_its_number() -> None:
    def bounded(student, teacher, tokens):
        one, other = logp(student, tokens), logp(teacher, tokens)
        return -2 * (other - one).clamp(-2.5, 1.5).detach() * one

    verdict = audited(bounded, None)
    (found,) = [finding for finding in verdict.findings if finding.name == "bounded-reward"]
    assert "held above -2.5 and below 1.5" in found.message
    assert "bounded-reward" not in names(audited(gradient_of_log_ratio))


@pytest.mark.parametrize(
    ("power", "said", "status"),
    [
        (0, "no factor T^2", "ok"),
        (1, "2 x theirs at T = 2", "noted"),
        (2, "the factor T^2", "ok"),
        (4, "the factor is T^4", "noted"),
    ],
)
def test_the_factor_of_a_temperature_is_told(power: int, said: str, status: str) -> None:
    def warm(student, teacher, tokens, temperature):
        return kl(student / temperature, teacher / temperature) * temperature**power

    verdict = audited(warm)
    assert verdict.holds
    assert said in check_of(verdict, "temperature").message
    assert check_of(verdict, "temperature").status == status


def test_figures_are_words_where_they_are_no_figures() -> None:
    def nearly(student, teacher, tokens):
        return kl(student, teacher) + 0.02 * (student - teacher).square().mean(-1)

    def nothing(student, teacher, tokens):
        return kl(student, teacher).detach()

    def one_each(student, teacher, tokens):
        one, other = logp(student, tokens), logp(teacher, tokens)
        paid = (other - one).detach()
        return -(paid.flip(0).cumsum(0).flip(0)[:1] * one[:1]).sum()

    assert "(cosine 1 - " in audited(nearly).sentence
    assert "nan" not in " ".join(finding.message for finding in audited(nothing).findings)
    assert "e-1" not in audited(one_each, None).sentence
