"""Verdicts from numbers whose verdict is known, and intervals from draws whose spread is known."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from opd import diagnose
from opd.diagnose.evidence import (
    Estimate,
    Evidence,
    Privilege,
    Recovery,
    cosine_of_sums,
    mean_over_groups,
)
from opd.diagnose.numbers import mass
from opd.diagnose.profiles import BINS, profiles
from opd.diagnose.verdicts import (
    ALIGNMENT,
    CRITERIA,
    INFORMATION,
    PRIVILEGE,
    ROUTABILITY,
    ROUTABLE_MASS,
    STABILITY,
    STATE,
    THRESHOLDS,
    Threshold,
    Verdict,
    verdicts,
)
from opd.errors import DataError

PROMPTS, SAMPLES, TOKENS = 40, 2, 5
ROWS = PROMPTS * SAMPLES * TOKENS
GOOD = {
    "student_overlap_mass": 0.95,
    "teacher_overlap_mass": 0.97,
    "excess_surprise": 1.0,
    "reverse_kl": 1.0,
    "forward_kl": 0.5,
    "top_k_overlap": 0.7,
    "teacher_surprise": 1.1,
    "teacher_confidence": 0.9,
    "entropy_gap": 0.1,
    "student_gap": 0.05,
    "teacher_gap": 0.01,
    "candidate_mass": 0.9,
    "leak": 0.3,
    "gradient_proxy": 0.5,
    "student_entropy": 0.4,
    "teacher_margin": 2.0,
    "student_logp": -0.5,
    "sampler_logp": -0.5,
    "log_ratio": -0.6,
}


def evidence(**changes: float | Tensor) -> Evidence:
    """A healthy student: half of its answers are right, and the teacher prefers these."""
    responses = PROMPTS * SAMPLES
    verdict = (torch.arange(responses) % 2 == 0).float()
    rows = {name: torch.full((ROWS,), value) for name, value in GOOD.items()}
    rows["log_ratio"] = torch.where(verdict.repeat_interleave(TOKENS) > 0.5, -0.2, -1.0)
    for name, value in changes.items():
        rows[name] = value if isinstance(value, Tensor) else torch.full((ROWS,), value)
    return Evidence(
        tokens=torch.arange(ROWS).reshape(responses, TOKENS) % 7,
        mask=torch.ones(responses, TOKENS, dtype=torch.bool),
        group=torch.arange(responses) // SAMPLES,
        verdict=verdict,
        stop_reason=("eos",) * responses,
        rows=rows,
        k=6,
        vocab_size=53,
        teacher_verdict=torch.ones(PROMPTS),
        teacher_on_data=torch.full((100,), 0.02),
    )


def found(seen: Evidence, criterion: str) -> Verdict:
    return next(each for each in verdicts(seen) if each.criterion == criterion)


def test_a_healthy_probe_is_fit_in_all_that_applies() -> None:
    judged = verdicts(evidence())
    assert tuple(each.criterion for each in judged) == CRITERIA
    assert [each.status for each in judged] == ["fit", "fit", "not applicable", *["fit"] * 3]
    assert not any(each.setting or each.why for each in judged)


@pytest.mark.parametrize(
    ("criterion", "changes", "name"),
    [
        (STATE, {"student_overlap_mass": 0.4}, "student_overlap_mass"),
        (STATE, {"excess_surprise": 8.0}, "excess_surprise"),
        (INFORMATION, {"reverse_kl": 5.0}, "marginal_info"),
        (INFORMATION, {"reverse_kl": 0.0}, "something_to_learn"),
        (INFORMATION, {"teacher_overlap_mass": 0.5}, "teacher_overlap_mass"),
        (ROUTABILITY, {"candidate_mass": 0.2}, "routable_share"),
    ],
)
def test_a_number_that_is_bad_on_every_row_makes_its_criterion_unfit_and_no_other(
    criterion: str, changes: dict[str, float], name: str
) -> None:
    judged = verdicts(evidence(**changes))
    bad = [each for each in judged if each.status in ("unfit", "doubtful")]
    assert [each.criterion for each in bad] == [criterion]
    assert (bad[0].status, bad[0].name) == ("unfit", name)
    assert bad[0].setting
    assert bad[0].why


# --------------------------------------------------------------------------------------------
# Bounds and intervals


@pytest.mark.parametrize(
    ("low", "high", "status"),
    [(0.5, 0.6, "unfit"), (0.5, 0.7, "doubtful"), (0.75, 0.79, "doubtful"), (0.81, 0.9, "fit")],
)
def test_the_whole_interval_has_to_be_past_a_bound(low: float, high: float, status: str) -> None:
    more = Threshold(doubtful=0.8, unfit=0.7, higher=True, origin="here")
    less = Threshold(doubtful=-0.8, unfit=-0.7, higher=False, origin="here")
    assert more.status(Estimate((low + high) / 2, low, high)) == status
    assert less.status(Estimate(-(low + high) / 2, -high, -low)) == status
    assert more.status(Estimate()) == "unknown"


def test_every_bound_says_where_it_is_from() -> None:
    for bounds in THRESHOLDS.values():
        assert bounds.origin.startswith(("survey", "M, benchmarks/results/"))
        assert (bounds.doubtful >= bounds.unfit) == bounds.higher or bounds.doubtful == bounds.unfit


def test_an_interval_is_that_of_prompts_drawn_again_not_of_rows() -> None:
    """100 rows of each of 100 prompts, all equal: 100 draws, whatever the number of rows."""
    generator = torch.Generator().manual_seed(3)
    of_prompt = torch.randn(100, generator=generator, dtype=torch.float64)
    group = torch.arange(100).repeat_interleave(100)
    together = mean_over_groups(of_prompt[group], group, 100)
    expected = 1.96 * float(of_prompt.std()) / 10
    assert together.value == pytest.approx(float(of_prompt.mean()))
    assert (together.high - together.low) / 2 == pytest.approx(expected, rel=0.15)
    apart = mean_over_groups(torch.randn(10_000, generator=generator), group, 100)
    assert (apart.high - apart.low) / 2 == pytest.approx(1.96 / 100, rel=0.25)


def test_a_prompt_counts_by_its_rows() -> None:
    values, group = torch.tensor([1.0, 1.0, 1.0, 5.0]), torch.tensor([0, 0, 0, 1])
    assert mean_over_groups(values, group, 2).value == 2.0
    assert not mean_over_groups(values[:0], group[:0], 2).known


def test_prompts_that_disagree_are_doubtful_and_few_of_them_are_said_to_be_few() -> None:
    half = torch.where(torch.arange(ROWS) // (SAMPLES * TOKENS) % 2 == 0, 0.5, 0.99)
    verdict = found(evidence(student_overlap_mass=half), STATE)
    assert verdict.status == "doubtful"
    assert verdict.low < THRESHOLDS["student_overlap_mass"].unfit < verdict.high
    assert "--responses" not in verdict.why
    half[300:] = math.nan  # those of 30 prompts are left
    verdict = found(evidence(student_overlap_mass=half), STATE)
    assert verdict.status == "doubtful"
    assert "30 prompts are too few to tell: raise --responses" in verdict.why


def test_one_prompt_alone_is_no_verdict() -> None:
    """However bad it is: drawn again it is itself, which says nothing of other prompts."""
    one = mean_over_groups(torch.full((9,), 0.1), torch.full((9,), 2), 5)
    assert (one.n, one.low, one.high) == (1, -math.inf, math.inf)
    assert one.value == pytest.approx(0.1)
    known = torch.where(torch.arange(ROWS) < SAMPLES * TOKENS, 0.1, math.nan)
    verdict = found(evidence(student_overlap_mass=known), STATE)
    assert (verdict.status, verdict.name) == ("doubtful", "student_overlap_mass")
    two = torch.where(torch.arange(ROWS) < 2 * SAMPLES * TOKENS, 0.1, math.nan)
    assert found(evidence(student_overlap_mass=two), STATE).status == "unfit"
    assert cosine_of_sums(torch.ones(1, 3), torch.ones(1, 3)).low == -math.inf


def test_an_infinite_row_is_infinite_in_every_mean() -> None:
    """One token that the teacher rules out, in a wrong answer."""
    distance = torch.full((ROWS,), 1.0)
    distance[TOKENS] = math.inf
    seen = evidence(reverse_kl=distance)
    ratio = seen.rows["log_ratio"].clone()
    ratio[TOKENS] = -math.inf
    seen = replace(seen, rows={**seen.rows, "log_ratio": ratio})
    assert seen.per_response("reverse_kl").tolist()[:3] == [1.0, math.inf, 1.0]
    assert seen.per_response("log_ratio")[1] == -math.inf
    lines = found(seen, ALIGNMENT).evidence
    assert "reverse_kl 1 nats on right answers, inf on wrong ones" in lines
    information = found(seen, INFORMATION)
    assert information.number == information.high == math.inf
    assert "inf nats per token" in information.meaning


# --------------------------------------------------------------------------------------------
# Who is at fault


@pytest.mark.parametrize(
    ("on_data", "teacher", "setting", "word"),
    [
        (0.02, 1.0, "warmup.steps", "outside what the teacher knows"),
        (6.0, 0.0, "teacher.model", "another task"),
        (6.0, 1.0, "teacher.model", "do not belong to the tokens"),
        (0.02, 0.0, "teacher.model", "no better"),
    ],
)
def test_the_setting_is_that_of_whoever_is_at_fault(
    on_data: float, teacher: float, setting: str, word: str
) -> None:
    seen = replace(
        evidence(student_overlap_mass=0.2),
        teacher_on_data=torch.full((50,), on_data),
        teacher_verdict=torch.full((PROMPTS,), teacher),
    )
    verdict = found(seen, STATE)
    assert (verdict.status, verdict.setting) == ("unfit", setting)
    assert word in verdict.why


def test_where_nobody_solves_anything_a_teacher_that_knows_the_text_is_not_blamed() -> None:
    seen = replace(
        evidence(student_overlap_mass=0.2),
        verdict=torch.zeros(PROMPTS * SAMPLES),
        teacher_verdict=torch.zeros(PROMPTS),
    )
    assert found(seen, STATE).setting == "warmup.steps"
    unknown = replace(seen, teacher_on_data=torch.empty(0))
    assert found(unknown, STATE).setting == "teacher.model"


def test_a_teacher_that_is_no_better_is_unfit_however_near_it_is() -> None:
    seen = replace(evidence(), teacher_verdict=torch.zeros(PROMPTS))
    verdict = found(seen, INFORMATION)
    assert (verdict.status, verdict.name, verdict.number) == ("unfit", "teacher_gain", -0.5)
    assert verdict.setting == "teacher.model"


def test_a_teacher_that_cannot_save_what_was_begun_asks_for_a_horizon() -> None:
    prompt = torch.arange(PROMPTS)
    zero, one = torch.zeros(PROMPTS), torch.ones(PROMPTS)
    scratch = Recovery(0.0, prompt, one, zero)
    lost = replace(evidence(), recoveries=(scratch, Recovery(0.25, prompt, zero, one)))
    verdict = found(lost, STATE)
    assert (verdict.status, verdict.name, verdict.number) == ("unfit", "continuation_gain", -1.0)
    assert verdict.setting == "method.states.horizon"
    saved = replace(evidence(), recoveries=(scratch, Recovery(0.25, prompt, one, zero)))
    assert found(saved, STATE).status == "fit"


# --------------------------------------------------------------------------------------------
# Alignment, privilege, routability, stability


def test_a_teacher_that_prefers_what_is_wrong_is_unfit() -> None:
    seen = evidence()
    verdict = found(replace(seen, verdict=1 - seen.verdict), ALIGNMENT)
    assert (verdict.status, verdict.number) == ("unfit", 0.0)
    assert "correct" in verdict.why


def test_alignment_is_unknown_where_nothing_is_told_apart() -> None:
    seen = evidence()
    alone = found(replace(seen, verdict=torch.full_like(seen.verdict, math.nan)), ALIGNMENT)
    assert (alone.status, "no verifier" in alone.meaning) == ("unknown", True)
    same = found(replace(seen, verdict=torch.zeros_like(seen.verdict)), ALIGNMENT)
    assert (same.status, "all wrong" in same.meaning) == ("unknown", True)


def test_a_gradient_against_the_verifiers_is_unfit() -> None:
    against = Estimate(-0.2, -0.3, -0.1, PROMPTS)
    verdict = found(replace(evidence(), gradient_cosine=against), ALIGNMENT)
    assert (verdict.status, verdict.name, verdict.number) == ("unfit", "gradient_cosine", -0.2)


def test_the_interval_of_a_cosine_covers_the_truth_and_either_sign_says_nothing() -> None:
    """Gradients of 200 prompts around two means at 60 degrees: a cosine of one half."""
    covered, wide = 0, 0.0
    for seed in range(20):
        draw = torch.Generator().manual_seed(seed)
        noise = torch.randn(2, 200, 40, generator=draw, dtype=torch.float64)
        means = torch.zeros(2, 1, 40, dtype=torch.float64)
        means[0, 0, 0], means[1, 0, 0], means[1, 0, 1] = 2.0, 1.0, 3**0.5
        estimate = cosine_of_sums(*(means + noise))
        sums = (means + noise).sum(1)
        exact = float(torch.nn.functional.cosine_similarity(sums[0], sums[1], dim=0))
        assert estimate.value == pytest.approx(exact)
        covered += estimate.low <= 0.5 <= estimate.high
        wide += (estimate.high - estimate.low) / 20
    assert covered >= 16
    assert 0.05 < wide < 0.25
    unsure = Estimate(-0.05, -0.3, 0.2, PROMPTS)
    verdict = found(replace(evidence(), gradient_cosine=unsure), ALIGNMENT)
    assert (verdict.status, verdict.name) == ("fit", "align_auc")
    assert any("not told apart from 0" in line for line in verdict.evidence)
    assert not cosine_of_sums(torch.zeros(3, 4), torch.ones(3, 4)).known


def test_privilege_counts_only_where_it_helps_who_reads_it() -> None:
    one, zero = torch.ones(PROMPTS), torch.zeros(PROMPTS)
    seen = replace(evidence(), contexts=("teacher",))
    helps = found(replace(seen, privileges=(Privilege("teacher", one, zero),)), PRIVILEGE)
    assert (helps.status, helps.number) == ("fit", 1.0)
    hurts = found(replace(seen, privileges=(Privilege("teacher", zero, one),)), PRIVILEGE)
    assert (hurts.status, hurts.setting) == ("unfit", "method.views")
    nothing = found(replace(seen, privileges=(Privilege("teacher", one, one),)), PRIVILEGE)
    assert nothing.status == "doubtful"
    assert found(seen, PRIVILEGE).status == "unknown"


def test_the_routable_share_is_that_of_the_formula_on_whole_distributions() -> None:
    draw = torch.Generator().manual_seed(1)
    student = (3 * torch.randn(ROWS, 12, generator=draw)).log_softmax(-1)
    teacher = torch.randn(ROWS, 12, generator=draw).log_softmax(-1)
    tokens = torch.randint(12, (ROWS,), generator=draw)
    ratio = (teacher - student).gather(-1, tokens[:, None])[:, 0]
    candidates = diagnose.reachable(student, teacher, tokens, k=3)
    verdict = found(
        evidence(log_ratio=ratio, candidate_mass=mass(teacher, candidates)), ROUTABILITY
    )
    expected = diagnose.routable_share(ratio, candidates, teacher, mass=ROUTABLE_MASS)
    assert 0.2 < expected < 0.95
    assert verdict.number == pytest.approx(expected)


def test_answers_that_never_end_count_by_their_tokens() -> None:
    """Two of five answers are cut off; of the others one token is left: 10 of 13 tokens."""
    mask = torch.ones(PROMPTS * SAMPLES, TOKENS, dtype=torch.bool)
    cut = torch.arange(PROMPTS * SAMPLES) % 5 < 2
    mask[~cut, 1:] = False
    rows = {name: torch.full((int(mask.sum()),), value) for name, value in GOOD.items()}
    seen = replace(
        evidence(),
        mask=mask,
        rows=rows,
        stop_reason=tuple("length" if each else "eos" for each in cut.tolist()),
    )
    verdict = found(seen, STABILITY)
    assert verdict.number == pytest.approx(10 / 13)
    assert (verdict.status, verdict.setting) == ("unfit", "sampler.max_new_tokens")


def test_of_a_teacher_that_tells_single_tokens_the_rest_is_unknown_and_says_why() -> None:
    names = ("student_overlap_mass", "reverse_kl", "candidate_mass")
    whole = evidence()
    few = ("log_ratio", "teacher_surprise", "student_logp", "sampler_logp", "student_entropy")
    seen = replace(
        whole,
        rows={name: whole.rows[name] for name in few},
        absent=dict.fromkeys(names, "it tells single tokens"),
        teacher_verdict=torch.empty(0),
    )
    for criterion in (STATE, INFORMATION, ROUTABILITY):
        verdict = found(seen, criterion)
        assert verdict.status == "unknown"
        assert "it tells single tokens" in verdict.meaning
    assert found(seen, ALIGNMENT).status == "fit"
    with pytest.raises(DataError, match="reverse_kl was not measured: it tells single tokens"):
        seen.row("reverse_kl")


# --------------------------------------------------------------------------------------------
# Along the answers


def test_rows_without_an_answer_are_in_no_mean() -> None:
    values = torch.full((ROWS,), 2.0)
    values[::5] = math.nan
    seen = evidence(reverse_kl=values)
    assert seen.mean_of_rows(values).value == 2.0
    table, known = seen.per_token("reverse_kl")
    assert not bool(known[:, 0].any())
    assert bool(known[:, 1:].all())
    assert bool((table[:, 1:] == 2.0).all())
    assert seen.per_response("reverse_kl").tolist() == [2.0] * (PROMPTS * SAMPLES)


def test_profiles_put_every_token_into_its_place_and_its_share() -> None:
    length = 2 * BINS
    place = torch.arange(float(length)).repeat(6, 1)
    rows = {name: torch.full((6 * length,), value) for name, value in GOOD.items()}
    rows["reverse_kl"] = place.flatten()
    rows["log_ratio"] = torch.where(place == 0, -8.0, -1.0).flatten()
    rows["teacher_margin"] = torch.where(place < 30, 5.0, 1.0).flatten()
    seen = replace(
        evidence(),
        tokens=torch.zeros(6, length, dtype=torch.long),
        mask=torch.ones(6, length, dtype=torch.bool),
        group=torch.arange(6) // 2,
        verdict=torch.zeros(6),
        stop_reason=("eos",) * 6,
        rows=rows,
    )
    along = profiles(seen)
    assert along.relative["reverse_kl"] == tuple(2 * bin + 0.5 for bin in range(BINS))
    for first, last, mean in zip(
        along.edges, along.edges[1:], along.absolute["reverse_kl"], strict=False
    ):
        assert mean == pytest.approx((first + last - 1) / 2)
    assert along.edges[-1] == length
    assert along.spike == 8.0
    assert along.change_point == 15 / BINS
    third = torch.arange(float(length))
    early, late = third[3 * third < length].mean(), third[3 * third >= 2 * length].mean()
    assert along.fade["reverse_kl"] == pytest.approx(float(late / early))
