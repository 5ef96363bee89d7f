from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from opd.errors import TeacherError
from opd.formula import divergence, reward
from opd.head.combine import log_linear, log_mean, log_sum
from opd.objective import Dense, Objective, Sampled
from opd.rollout.pack import with_token
from opd.types import STUDENT_PART, Batch, FieldKey, TeacherScores
from tests.builders import Case, evaluate, evaluate_in_parts, fields_of, full_gradient

REVERSE_KL = Objective(Dense(divergence=divergence.reverse_kl))


def random_log_probs(seed: int, rows: int = 5, vocab: int = 7, scale: float = 3.0) -> Tensor:
    draw = torch.Generator().manual_seed(seed)
    logits = scale * torch.randn((rows, vocab), generator=draw, dtype=torch.float64)
    return logits.log_softmax(-1)


def literal(
    parts: Mapping[str, npt.NDArray[np.float64]], weights: Mapping[str, float]
) -> npt.NDArray[np.float64]:
    """Probabilities: the product of powers, row by row, then divided by its sum. 0 ** 0 is 1."""
    some = next(iter(parts.values()))
    product = np.ones_like(some)
    for name, log_part in parts.items():
        if weights[name] != 0:
            product = product * np.exp(log_part) ** weights[name]
    whole: npt.NDArray[np.float64] = product / product.sum(-1, keepdims=True)
    return whole


weight_lists = st.lists(st.floats(-2, 2, allow_subnormal=False), min_size=1, max_size=4).filter(
    lambda weights: any(abs(weight) > 1e-3 for weight in weights)
)


@given(weights=weight_lists, seed=st.integers(0, 10_000))
def test_a_combination_is_the_normalised_product_of_powers(weights: list[float], seed: int) -> None:
    parts = {f"part {k}": random_log_probs(seed + k) for k in range(len(weights))}
    named = dict(zip(parts, weights, strict=True))
    ours = log_linear("mix", parts, named)
    theirs = literal({name: part.numpy() for name, part in parts.items()}, named)
    np.testing.assert_allclose(ours.exp().numpy(), theirs, rtol=1e-9, atol=1e-12)
    assert ours.logsumexp(-1).abs().max() <= 1e-12


def test_half_and_half_of_two_coins_is_the_root_of_their_product() -> None:
    # sqrt(0.9 * 0.4) : sqrt(0.1 * 0.6) = 0.6 : sqrt(0.06)
    fair, skewed = (torch.tensor([[p, 1 - p]], dtype=torch.float64).log() for p in (0.4, 0.9))
    mixed = log_linear("mix", {"a": fair, "b": skewed}, {"a": 0.5, "b": 0.5}).exp()
    assert float(mixed[0, 0]) == pytest.approx(0.6 / (0.6 + math.sqrt(0.06)), abs=1e-12)


def test_a_single_part_of_weight_one_is_that_part_bit_for_bit() -> None:
    parts = {"teacher": random_log_probs(0).float(), "reference": random_log_probs(1).float()}
    extrapolated = log_linear("exopd", parts, {"teacher": 1.0, "reference": 0.0})
    assert torch.equal(extrapolated, parts["teacher"])


@pytest.mark.parametrize("weight", [1.0, 0.5, 3.0])
def test_a_token_without_mass_in_a_part_of_positive_weight_has_none(weight: float) -> None:
    holed = random_log_probs(0)
    holed[2, 3] = holed[2, 4] = -math.inf
    parts = {"holed": holed, "whole": random_log_probs(1)}
    mixed = log_linear("mix", parts, {"holed": weight, "whole": -0.5})
    assert not mixed.isnan().any()
    assert mixed.isneginf().nonzero().tolist() == [[2, 3], [2, 4]]
    expected = literal({n: p.numpy() for n, p in parts.items()}, {"holed": weight, "whole": -0.5})
    np.testing.assert_allclose(mixed.exp().numpy(), expected, rtol=1e-12)


def test_a_token_without_mass_in_a_part_of_negative_weight_alone_is_an_error() -> None:
    holed = random_log_probs(0)
    holed[2, 3] = -math.inf
    parts = {"holed": holed, "whole": random_log_probs(1)}
    with pytest.raises(TeacherError, match=r"'delta'.*token id 3, row 2 .*'holed' has weight -1"):
        log_linear("delta", parts, {"holed": -1.0, "whole": 2.0})


def test_where_a_part_of_positive_weight_has_no_mass_a_negative_one_may_have_none_either() -> None:
    before, after = random_log_probs(0), random_log_probs(1)
    before[1, 2] = after[1, 2] = -math.inf
    mixed = log_linear("delta", {"before": before, "after": after}, {"before": -1.0, "after": 2.0})
    assert mixed.isneginf().nonzero().tolist() == [[1, 2]]
    assert mixed[1].exp().sum() == pytest.approx(1.0)


def test_a_part_of_weight_zero_says_nothing_even_where_it_has_no_mass() -> None:
    holed = torch.full_like(random_log_probs(0), -math.inf)
    holed[:, 0] = 0.0
    whole = random_log_probs(1)
    mixed = log_linear("mix", {"holed": holed, "whole": whole}, {"holed": 0.0, "whole": 2.0})
    assert torch.allclose(mixed, (2 * whole).log_softmax(-1))


def test_parts_that_share_no_token_are_an_error() -> None:
    one, other = (torch.tensor([[0.0, -math.inf]]), torch.tensor([[-math.inf, 0.0]]))
    with pytest.raises(TeacherError, match=r"no mass at all in row 0"):
        log_linear("mix", {"one": one, "other": other}, {"one": 0.5, "other": 0.5})


# --------------------------------------------------------------------------------------------
# Through the head


def combined(case: Case, batch: Batch | None = None, /, **parts: float) -> Batch:
    """The case's batch with a further view, `teacher.mix`; `student` names the student."""
    batch = batch or case.batch()
    views = {**batch.token.views, "teacher.mix": TeacherScores(parts=tuple(parts.items()))}
    return with_token(batch, views=views)


def test_the_head_combines_views_over_the_whole_vocabulary() -> None:
    case = Case.random(0, views=("teacher", "reference"))
    batch = combined(case, teacher=1.25, reference=-0.25)
    (ours,) = fields_of(case, FieldKey("teacher_log_probs", "teacher.mix"), batch=batch)
    logs = {
        name: case.rows(logits).log_softmax(-1).numpy()
        for name, logits in case.teacher_logits.items()
    }
    theirs = literal(logs, {"teacher": 1.25, "reference": -0.25})
    np.testing.assert_allclose(ours.exp().numpy(), theirs, rtol=1e-10)


@pytest.mark.parametrize("objective", [REVERSE_KL, Objective(Sampled(reward.teacher_log_ratio))])
def test_extrapolation_by_one_is_the_plain_teacher_in_loss_and_gradient(
    objective: Objective,
) -> None:
    case = Case.random(1, views=("teacher", "reference"))
    plain = evaluate(case, objective)
    views = dict(case.batch().token.views)
    views["teacher.plain"] = views.pop("teacher")
    views["teacher"] = TeacherScores(parts=(("reference", 0.0), ("teacher.plain", 1.0)))
    ours = evaluate(case, objective, with_token(case.batch(), views=views))
    assert ours.loss == plain.loss
    assert torch.equal(ours.gradient, plain.gradient)


def test_a_combination_of_combinations_multiplies_their_weights() -> None:
    case = Case.random(2, views=("teacher", "reference"))
    batch = combined(case, teacher=0.5, reference=0.5)
    views = {**batch.token.views, "teacher.twice": TeacherScores(parts=(("teacher.mix", 2.0),))}
    (twice,) = fields_of(
        case,
        FieldKey("teacher_log_probs", "teacher.twice"),
        batch=with_token(batch, views=views),
    )
    rows = [case.rows(case.teacher_logits[name]) for name in ("teacher", "reference")]
    assert torch.allclose(twice, (rows[0] + rows[1]).log_softmax(-1), atol=1e-12)


def test_the_student_as_a_part_is_detached() -> None:
    """Reverse KL to q * student^b: the gradient is that of a constant target, by hand.

    With target log m = log q + b log s - log Z held fixed, d KL(s || m) / d logits is
    s * (r - sum s r) with r = log s - log m. Were the student not detached, a factor (1 - b) would
    stand before its share.
    """
    case = Case.random(3, gaps=False)
    batch = combined(case, teacher=1.0, student=0.5)
    term = Dense(divergence=divergence.reverse_kl, against="teacher.mix")
    ours = evaluate(case, Objective(term), batch)
    student = case.student_logits.log_softmax(-1).numpy()
    target = case.teacher_logits["teacher"].log_softmax(-1).numpy() + 0.5 * student
    target = target - np.log(np.exp(target).sum(-1, keepdims=True))
    ratio = student - target
    kl = (np.exp(student) * ratio).sum(-1, keepdims=True)
    mask = case.mask.numpy()[..., None]
    expected = np.where(mask, np.exp(student) * (ratio - kl), 0.0) / case.mask.sum().item()
    np.testing.assert_allclose(full_gradient(case, ours.gradient), expected, atol=1e-12)


def test_a_live_student_compared_with_itself_teaches_nothing() -> None:
    case = Case.random(4)
    batch = with_token(case.batch(), views={"teacher": TeacherScores(parts=((STUDENT_PART, 1.0),))})
    for objective in (REVERSE_KL, Objective(Sampled(reward.teacher_log_ratio))):
        ours = evaluate(case, objective, batch)
        assert ours.loss == 0.0
        assert ours.gradient.abs().max() <= 1e-15


def test_a_combination_is_the_same_in_any_micro_batches_and_chunks() -> None:
    case = Case.random(5, views=("teacher", "reference"))
    term = Dense(divergence=divergence.forward_kl, against="teacher.mix")
    batch = combined(case, teacher=1.5, reference=-0.75, student=0.25)
    whole = evaluate(case, Objective(term), batch)
    in_rows = evaluate(case, Objective(term), batch, chunk_bytes=4 * case.vocab_size)
    loss, gradient = evaluate_in_parts(case, Objective(term), 8, batch)
    assert in_rows.loss == pytest.approx(whole.loss, abs=1e-14)
    assert loss == pytest.approx(whole.loss, abs=1e-14)
    assert (in_rows.gradient - whole.gradient).abs().max() <= 1e-15
    assert (gradient - whole.gradient).abs().max() <= 1e-15


def test_merged_end_tokens_have_no_mass_in_any_part_and_spoil_nothing() -> None:
    case = Case.random(6, views=("teacher", "reference"))
    batch = combined(case, case.batch(merge_ids=((2, 5),)), teacher=2.0, reference=-1.0)
    (mixed,) = fields_of(case, FieldKey("teacher_log_probs", "teacher.mix"), batch=batch)
    assert mixed[:, 5].isneginf().all()
    assert torch.allclose(mixed.exp().sum(-1), torch.ones(mixed.shape[0], dtype=torch.float64))
    merged = []
    for name in ("teacher", "reference"):
        probs = case.rows(case.teacher_logits[name]).softmax(-1).clone()
        probs[:, 2] += probs[:, 5]
        merged.append(probs[:, [0, 1, 2, 3, 4, 6]])
    expected = merged[0] ** 2 / merged[1]
    expected = expected / expected.sum(-1, keepdim=True)
    assert torch.allclose(mixed[:, [0, 1, 2, 3, 4, 6]].exp(), expected, atol=1e-12)


def test_a_part_that_nobody_scored_is_named() -> None:
    case = Case.random(7)
    with pytest.raises(TeacherError, match="no scores for the view 'reference'"):
        fields_of(
            case,
            FieldKey("teacher_log_probs", "teacher.mix"),
            batch=combined(case, teacher=1.0, reference=0.5),
        )


# --------------------------------------------------------------------------------------------
# Sums that are not normalised


def test_a_sum_is_the_weighted_log_probabilities_of_the_same_tokens() -> None:
    parts = {"a": torch.tensor([-1.0, -2.0]), "b": torch.tensor([-4.0, -0.5])}
    assert log_sum("v", parts, {"a": 2.0, "b": -1.0}).tolist() == [2.0, -3.5]
    assert log_sum("v", {"a": parts["a"]}, {"a": 1.0, "b": 0.0}).tolist() == [-1.0, -2.0]


def test_a_sum_that_would_be_infinite_names_the_part() -> None:
    parts = {"a": torch.tensor([-1.0]), "b": torch.tensor([-math.inf])}
    with pytest.raises(TeacherError, match=r"'v' is infinite: the part 'b' has weight -1"):
        log_sum("v", parts, {"a": 1.0, "b": -1.0})
    assert log_sum("v", parts, {"a": 1.0, "b": 0.5}).tolist() == [-math.inf]


SUM = (("teacher", 1.5), ("teacher.other", -0.5), ("student", 0.25))


def sums(case: Case) -> Batch:
    batch = case.batch()
    views = {**batch.token.views, "teacher.sum": TeacherScores(parts=SUM, normalised=False)}
    return with_token(batch, views=views)


def test_a_term_against_a_sum_reads_what_its_parts_say_of_the_token() -> None:
    case = Case.random(3, views=("teacher", "teacher.other"))
    objective = Objective(Sampled(reward=reward.teacher_log_ratio, against="teacher.sum"))
    found = evaluate(case, objective, sums(case))
    tokens = case.rows(case.tokens).unsqueeze(-1)

    def logp(logits: Tensor) -> Tensor:
        return case.rows(logits).log_softmax(-1).gather(-1, tokens).squeeze(-1)

    own = logp(case.student_logits)
    teacher, other = (logp(case.teacher_logits[name]) for name in ("teacher", "teacher.other"))
    advantage = 1.5 * teacher - 0.5 * other + 0.25 * own - own
    assert found.loss == pytest.approx(float(-(advantage * own).mean()), abs=1e-12)
    score = torch.zeros_like(found.gradient).scatter(1, tokens, 1.0)
    score = score - case.rows(case.student_logits).softmax(-1)
    expected = -advantage.unsqueeze(-1) * score / len(own)
    assert (found.gradient - expected).abs().max() <= 1e-15


def test_a_sum_of_one_part_is_that_view_to_the_bit() -> None:
    case = Case.random(4)
    batch = case.batch()
    views = {
        **batch.token.views,
        "teacher.sum": TeacherScores(parts=(("teacher", 1.0),), normalised=False),
    }
    plain = Objective(Sampled(reward=reward.teacher_log_ratio))
    summed = Objective(Sampled(reward=reward.teacher_log_ratio, against="teacher.sum"))
    found = evaluate(case, summed, with_token(batch, views=views))
    assert torch.equal(found.gradient, evaluate(case, plain).gradient)


# --------------------------------------------------------------------------------------------
# Arithmetic mixtures


def mean_of(
    parts: Mapping[str, npt.NDArray[np.float64]], weights: Mapping[str, float]
) -> npt.NDArray[np.float64]:
    """Probabilities, token by token: the sum of weight times probability."""
    some = next(iter(parts.values()))
    whole = np.zeros_like(some)
    for row in range(some.shape[0]):
        for token in range(some.shape[1]):
            for name, log_part in parts.items():
                whole[row, token] += weights[name] * math.exp(log_part[row, token])
    return whole


share_lists = st.lists(st.floats(0.0, 1.0), min_size=1, max_size=4).filter(lambda w: sum(w) > 0.1)


@given(shares=share_lists, seed=st.integers(0, 10_000))
def test_a_mixture_is_the_weighted_mean_of_probabilities(shares: list[float], seed: int) -> None:
    parts = {f"part {k}": random_log_probs(seed + k) for k in range(len(shares))}
    named = {name: share / sum(shares) for name, share in zip(parts, shares, strict=True)}
    ours = log_mean("mix", parts, named)
    theirs = mean_of({name: part.numpy() for name, part in parts.items()}, named)
    np.testing.assert_allclose(ours.exp().numpy(), theirs, rtol=1e-12, atol=1e-15)
    assert ours.logsumexp(-1).abs().max() <= 1e-12


def test_a_quarter_and_three_quarters_of_two_coins() -> None:
    fair, skewed = (torch.tensor([[p, 1 - p]], dtype=torch.float64).log() for p in (0.5, 0.9))
    mixed = log_mean("mix", {"a": fair, "b": skewed}, {"a": 0.25, "b": 0.75}).exp()
    assert mixed[0].tolist() == pytest.approx([0.8, 0.2], abs=1e-15)


def test_a_mixture_has_mass_where_any_part_has_and_none_where_no_part_has() -> None:
    one, other = (torch.tensor([[0.3, 0.7, 0.0, 0.0]]), torch.tensor([[0.0, 0.5, 0.5, 0.0]]))
    mixed = log_mean("mix", {"one": one.log(), "other": other.log()}, {"one": 0.5, "other": 0.5})
    assert mixed.exp()[0].tolist() == pytest.approx([0.15, 0.6, 0.25, 0.0])
    assert mixed[0].isneginf().tolist() == [False, False, False, True]
    assert not mixed.isnan().any()


def test_a_mixture_of_one_part_is_that_part_bit_for_bit() -> None:
    parts = {"teacher": random_log_probs(0).float(), "other": random_log_probs(1).float()}
    assert torch.equal(log_mean("m", parts, {"teacher": 1.0, "other": 0.0}), parts["teacher"])


@pytest.mark.parametrize("weights", [{"a": 0.5, "b": 0.4}, {"a": 1.5, "b": -0.5}])
def test_weights_that_are_no_shares_are_refused(weights: dict[str, float]) -> None:
    parts = {"a": random_log_probs(0), "b": random_log_probs(1)}
    with pytest.raises(TeacherError, match="'m' is an arithmetic mixture, whose weights are >= 0"):
        log_mean("m", parts, weights)


def mixed_view(case: Case, batch: Batch | None = None, /, **parts: float) -> Batch:
    """The case's batch with a further view, `teacher.mix`, an arithmetic one."""
    batch = batch or case.batch()
    mix = TeacherScores(parts=tuple(parts.items()), mix="arithmetic")
    return with_token(batch, views={**batch.token.views, "teacher.mix": mix})


def probabilities(case: Case, name: str) -> Tensor:
    logits = case.student_logits if name == STUDENT_PART else case.teacher_logits[name]
    return case.rows(logits).softmax(-1)


@pytest.mark.parametrize("merge_ids", [(), ((2, 5),)])
def test_the_reverse_kl_to_a_mixture_is_that_to_its_probabilities(
    merge_ids: tuple[tuple[int, ...], ...],
) -> None:
    """Loss and gradient by autograd over the whole vocabulary, the student's own part detached."""
    case = Case.random(3, views=("teacher", "reference"))
    weights = {"teacher": 0.5, "reference": 0.3, STUDENT_PART: 0.2}
    batch = mixed_view(case, case.batch(merge_ids=merge_ids), **weights)
    term = Dense(divergence=divergence.reverse_kl, against="teacher.mix")
    ours = evaluate(case, Objective(term), batch)

    def as_one(probs: Tensor) -> Tensor:
        for first, *others in merge_ids:
            probs = torch.cat(
                [
                    probs[:, [first, *others]].sum(-1, keepdim=True),
                    probs[:, [i for i in range(case.vocab_size) if i not in (first, *others)]],
                ],
                -1,
            )
        return probs

    logits = case.rows(case.student_logits).clone().requires_grad_()
    own = as_one(logits.softmax(-1))
    target = sum(w * as_one(probabilities(case, name)) for name, w in weights.items())
    loss = (own * (own.log() - target.log())).sum(-1).mean()  # type: ignore[union-attr]
    loss.backward()
    assert ours.loss == pytest.approx(float(loss.detach()), abs=1e-13)
    assert logits.grad is not None
    assert (ours.gradient - logits.grad).abs().max() <= 1e-14


def test_what_a_mixture_says_of_a_token_needs_only_what_its_parts_say_of_it() -> None:
    case = Case.random(4, views=("teacher", "teacher.other"))
    weights = {"teacher": 0.6, "teacher.other": 0.3, STUDENT_PART: 0.1}
    tokens = case.rows(case.tokens).unsqueeze(-1)
    told = {
        name: TeacherScores(
            sampled_logp=probabilities(case, name).gather(-1, tokens).squeeze(-1).log()
        )
        for name in ("teacher", "teacher.other")
    }
    objective = Objective(Sampled(reward=reward.teacher_log_ratio, against="teacher.mix"))
    found = [
        evaluate(case, objective, mixed_view(case, batch, **weights))
        for batch in (case.batch(), with_token(case.batch(), views=told))
    ]
    target = sum(w * probabilities(case, name) for name, w in weights.items())
    own = probabilities(case, STUDENT_PART).gather(-1, tokens).squeeze(-1).log()
    advantage = target.gather(-1, tokens).squeeze(-1).log() - own  # type: ignore[union-attr]
    score = torch.zeros_like(found[0].gradient).scatter(1, tokens, 1.0)
    score = score - probabilities(case, STUDENT_PART)
    expected = -advantage.unsqueeze(-1) * score / len(own)
    for ours in found:
        assert ours.loss == pytest.approx(float(-(advantage * own).mean()), abs=1e-12)
        assert (ours.gradient - expected).abs().max() <= 1e-15


def test_a_mixture_is_the_same_in_any_micro_batches_and_chunks() -> None:
    case = Case.random(5, views=("teacher", "reference"))
    term = Dense(divergence=divergence.forward_kl, against="teacher.mix")
    batch = mixed_view(case, teacher=0.7, reference=0.2, student=0.1)
    whole = evaluate(case, Objective(term), batch)
    in_rows = evaluate(case, Objective(term), batch, chunk_bytes=4 * case.vocab_size)
    loss, gradient = evaluate_in_parts(case, Objective(term), 8, batch)
    assert in_rows.loss == pytest.approx(whole.loss, abs=1e-14)
    assert loss == pytest.approx(whole.loss, abs=1e-14)
    assert (in_rows.gradient - whole.gradient).abs().max() <= 1e-15
    assert (gradient - whole.gradient).abs().max() <= 1e-15


def test_a_sum_of_forward_kls_is_least_at_the_mixture_and_of_reverse_kls_at_the_log_linear() -> (
    None
):
    """On a grid of all distributions over three tokens."""
    draw = np.random.default_rng(0)
    teachers = {name: draw.dirichlet(np.ones(3)) for name in ("a", "b")}
    weights = {"a": 0.3, "b": 0.7}
    grid = [(i / 400, j / 400, 1 - (i + j) / 400) for i in range(1, 400) for j in range(1, 400 - i)]

    def forward(student: npt.NDArray[np.float64]) -> float:
        return sum(
            w * (teachers[n] * np.log(teachers[n] / student)).sum() for n, w in weights.items()
        )

    def reverse(student: npt.NDArray[np.float64]) -> float:
        return sum(w * (student * np.log(student / teachers[n])).sum() for n, w in weights.items())

    logs = {name: torch.tensor(np.log(part))[None] for name, part in teachers.items()}
    for loss, combine in ((forward, log_mean), (reverse, log_linear)):
        best = min((np.array(point) for point in grid), key=loss)
        np.testing.assert_allclose(combine("m", logs, weights)[0].exp().numpy(), best, atol=4e-3)
