"""Routing in logit coordinates: what a transfer moves, from where, to where, and how much."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from opd.formula import routing, support, surrogate

F64 = torch.float64
V = 9
IDS = torch.arange(V)
SEEDS = pytest.mark.parametrize("seed", range(4))
EXACT = 1e-12

TRANSFERS = (routing.linear_transfer, routing.pairwise_logistic, routing.bounded_cross_entropy)
EVERY_TRANSFER = pytest.mark.parametrize("transfer", TRANSFERS)

Transfer = Callable[..., Tensor]


def draw(seed: int, *, spread: float = 1.5) -> tuple[Tensor, Tensor]:
    """Logits of a student and log-probabilities of a teacher that disagrees."""
    generator = torch.Generator().manual_seed(seed)
    logits = spread * torch.randn(V, generator=generator, dtype=F64)
    teacher = logits + torch.randn(V, generator=generator, dtype=F64)
    return logits, teacher.log_softmax(-1)


def gradient(loss: Callable[[Tensor], Tensor], logits: Tensor) -> Tensor:
    """The gradient on the logits of a loss of log-probabilities."""
    leaf = logits.clone().requires_grad_()
    (slope,) = torch.autograd.grad(loss(leaf.log_softmax(-1)), leaf)
    return slope


def logit_gradient(
    transfer: Transfer,
    logits: Tensor,
    token: int,
    share: Tensor,
    amount: float | Tensor,
    ids: Tensor = IDS,
) -> Tensor:
    """What a transfer on the support `ids`, renormalised, does to the logits of the vocabulary."""

    def loss(log_probs: Tensor) -> Tensor:
        inside = support.renormalise(support.restrict(log_probs, ids))
        moved = torch.as_tensor(amount, dtype=F64)
        return transfer(inside, ids, torch.tensor(token), share, moved)

    return gradient(loss, logits)


def shares_like_student(logits: Tensor, token: int) -> Tensor:
    student = logits.log_softmax(-1)
    return routing.by_powers(
        torch.zeros(V, dtype=F64),
        routing.all_others(IDS, torch.tensor(token)),
        student,
        student,
        teacher_power=0.0,
        student_power=1.0,
        score_power=0.0,
    )


def reverse_kl_gradient(logits: Tensor, teacher: Tensor) -> Tensor:
    return gradient(lambda log_probs: (log_probs.exp() * (log_probs - teacher)).sum(), logits)


# --------------------------------------------------------------------------------------------
# Scores


def test_the_score_of_a_hand_example() -> None:
    # log ratios: -ln 2, ln 2, 0; KL = (1/2 - 1/4) ln 2
    student = torch.tensor([0.5, 0.25, 0.25], dtype=F64).log()
    teacher = torch.tensor([0.25, 0.5, 0.25], dtype=F64).log()
    expected = torch.tensor([-0.75, 1.25, 0.25], dtype=F64) * math.log(2)
    assert torch.allclose(routing.centred_log_ratio(student, teacher), expected, atol=1e-15)


@SEEDS
def test_the_score_is_the_advantage_of_the_reverse_kl(seed: int) -> None:
    logits, teacher = draw(seed)
    student = logits.log_softmax(-1)
    score = routing.centred_log_ratio(student, teacher)
    assert abs(float((student.exp() * score).sum())) <= EXACT
    assert torch.allclose(
        -student.exp() * score, reverse_kl_gradient(logits, teacher), rtol=0, atol=EXACT
    )


def test_an_entry_that_one_side_lacks_is_not_compared_and_the_rest_is_centred() -> None:
    nothing = -math.inf
    student = torch.tensor([[math.log(0.5), math.log(0.3), nothing, math.log(0.2)]], dtype=F64)
    teacher = torch.tensor([[math.log(0.2), math.log(0.5), math.log(0.3), nothing]], dtype=F64)
    (score,) = routing.centred_log_ratio(student, teacher)
    assert score[2] == nothing
    assert score[3] == nothing
    first, second = math.log(0.2 / 0.5), math.log(0.5 / 0.3)
    mean = (0.5 * first + 0.3 * second) / 0.8
    expected = torch.tensor([first - mean, second - mean], dtype=F64)
    assert torch.allclose(score[:2], expected, atol=1e-15)


def test_rows_where_the_teacher_lacks_an_entry_are_counted() -> None:
    nothing = -math.inf
    student = torch.tensor([[-0.7, -0.7, nothing], [0.0, nothing, nothing], [-0.7, -0.7, nothing]])
    teacher = torch.tensor([[-0.7, -0.7, nothing], [-0.7, -0.7, nothing], [0.0, nothing, nothing]])
    hits = routing.centred_log_ratio.counted(student, teacher)  # type: ignore[attr-defined]
    assert hits.tolist() == [False, False, True]


def test_an_empty_support_is_scored_without_nan() -> None:
    nothing = torch.full((2, 3), -math.inf)
    assert (routing.centred_log_ratio(nothing, nothing) == -math.inf).all()


@SEEDS
def test_a_constant_on_the_logits_changes_neither_scores_nor_candidates(seed: int) -> None:
    logits, teacher = draw(seed)
    token = torch.tensor(int(logits.argmax()))
    scores = [
        routing.centred_log_ratio(
            (logits + shift).log_softmax(-1), (teacher - shift).log_softmax(-1)
        )
        for shift in (0.0, 7.0)
    ]
    assert torch.allclose(*scores, rtol=0, atol=EXACT)
    chosen = [routing.raised(score, IDS, token) for score in scores]
    assert torch.equal(*chosen)
    for transfer in TRANSFERS:
        share = routing.by_score(scores[0], chosen[0])
        slopes = [logit_gradient(transfer, logits + c, int(token), share, 0.05) for c in (0.0, 7.0)]
        assert torch.allclose(*slopes, rtol=0, atol=EXACT)


# --------------------------------------------------------------------------------------------
# Anchors


@SEEDS
@pytest.mark.parametrize("token", range(V))
def test_shared_like_the_student_a_transfer_is_plain_suppression(seed: int, token: int) -> None:
    logits, _ = draw(seed)
    advantage = torch.tensor(-1.3, dtype=F64)
    amount = routing.matched_suppression(advantage, logits.log_softmax(-1)[token])
    share = shares_like_student(logits, token)
    routed = logit_gradient(routing.linear_transfer, logits, token, share, amount)
    plain = gradient(lambda log_probs: surrogate.score(log_probs[token], advantage), logits)
    assert torch.allclose(routed, plain, rtol=0, atol=EXACT)


def expected_gradient(
    logits: Tensor,
    teacher: Tensor,
    *,
    transfer: Transfer = routing.linear_transfer,
    chosen: Callable[[Tensor, Tensor], Tensor] | None = None,
    student_power: float = 1.0,
    ids: Tensor = IDS,
) -> Tensor:
    """Expectation over tokens drawn from the student of the transfer's gradient."""
    student = logits.log_softmax(-1)
    inside = support.restrict(student, ids)
    score = routing.centred_log_ratio(
        support.renormalise(inside), support.renormalise(support.restrict(teacher, ids))
    )
    total = torch.zeros_like(logits)
    for token in range(V):
        sampled = torch.tensor(token)
        candidates = (chosen or (lambda s, t: routing.raised(s, ids, t, margin=0.0)))(
            score, sampled
        )
        share = routing.by_powers(
            score,
            candidates,
            inside,
            support.restrict(teacher, ids),
            teacher_power=0.0,
            student_power=student_power,
            score_power=1.0,
        )
        amount = routing.excess_score(score, ids, sampled)
        total += student[token].exp() * logit_gradient(transfer, logits, token, share, amount, ids)
    return total


@SEEDS
def test_one_member_of_the_family_is_unbiased_for_the_reverse_kl(seed: int) -> None:
    logits, teacher = draw(seed)
    exact = reverse_kl_gradient(logits, teacher)
    assert (expected_gradient(logits, teacher) - exact).abs().max() <= EXACT
    # All others may be candidates too: the score's positive part already leaves the rest out.
    over_all = expected_gradient(logits, teacher, chosen=lambda _, t: routing.all_others(IDS, t))
    assert (over_all - exact).abs().max() <= EXACT


@SEEDS
def test_each_of_the_four_causes_of_bias_can_be_had_alone(seed: int) -> None:
    logits, teacher = draw(seed)
    student = logits.log_softmax(-1)
    teacher_top, student_top = teacher.topk(4).indices, student.topk(4).indices

    def narrow(score: Tensor, token: Tensor) -> Tensor:
        return routing.endorsed_and_reachable(
            score, IDS, token, teacher_top, student_top, teacher_k=4, student_k=4
        )

    some = student.topk(6).indices
    biased = {
        "restriction": expected_gradient(logits, teacher, chosen=narrow),
        "normalisation": expected_gradient(logits, teacher, ids=some),
        "share": expected_gradient(logits, teacher, student_power=0.0),
        "saturation": expected_gradient(logits, teacher, transfer=routing.pairwise_logistic),
    }
    exact = reverse_kl_gradient(logits, teacher)
    for cause, found in biased.items():
        assert (found - exact).abs().max() > 1e-3, cause


@SEEDS
def test_on_a_restricted_support_the_bias_is_that_of_the_conditional_divergence(seed: int) -> None:
    logits, teacher = draw(seed)
    ids = logits.topk(6).indices
    target = support.renormalise(support.restrict(teacher, ids))

    def conditional(log_probs: Tensor) -> Tensor:
        inside = support.renormalise(support.restrict(log_probs, ids))
        return (inside.exp() * (inside - target)).sum()

    mass = logits.softmax(-1)[ids].sum()
    found = expected_gradient(logits, teacher, ids=ids)
    assert (found - mass * gradient(conditional, logits)).abs().max() <= EXACT


# --------------------------------------------------------------------------------------------
# Transfers


@SEEDS
def test_the_pairwise_gradient_entry_by_entry(seed: int) -> None:
    logits, teacher = draw(seed)
    token = int(logits.argmax())
    score = routing.centred_log_ratio(logits.log_softmax(-1), teacher)
    share = routing.by_score(score, routing.raised(score, IDS, torch.tensor(token)))
    slope = logit_gradient(routing.pairwise_logistic, logits, token, share, 0.7)
    own, expected = 0.0, [0.0] * V
    for v in range(V):
        sigmoid = 1 / (1 + math.exp(float(logits[v] - logits[token])))
        own += 0.7 * float(share[v]) * sigmoid
        expected[v] = -0.7 * float(share[v]) * sigmoid
    expected[token] = own
    assert slope.tolist() == pytest.approx(expected, abs=EXACT)


def test_the_pairwise_loss_stops_by_itself_and_starts_as_the_linear_one() -> None:
    share = torch.zeros(V, dtype=F64)
    share[1] = 1.0
    logits = torch.zeros(V, dtype=F64)
    logits[1] = 40.0  # the candidate is far above token 0
    reached = logit_gradient(routing.pairwise_logistic, logits, 0, share, 2.0)
    assert reached.abs().max() <= 1e-16
    logits[1] = -40.0  # and now far below
    started = logit_gradient(routing.pairwise_logistic, logits, 0, share, 2.0)
    linear = logit_gradient(routing.linear_transfer, logits, 0, share, 2.0)
    assert torch.allclose(started, linear, rtol=0, atol=EXACT)


@SEEDS
def test_the_linear_gradient_is_the_amount_times_token_minus_share(seed: int) -> None:
    logits, _ = draw(seed)
    share = torch.tensor([0.0, 0.25, 0.75, 0, 0, 0, 0, 0, 0], dtype=F64)
    slope = logit_gradient(routing.linear_transfer, logits, 0, share, 3.0)
    expected = [3.0, -0.75, -2.25, 0, 0, 0, 0, 0, 0]
    assert slope.tolist() == pytest.approx(expected, abs=EXACT)


@SEEDS
def test_the_bounded_form_starts_as_the_linear_one_and_its_minimiser_spares_the_others(
    seed: int,
) -> None:
    logits, _ = draw(seed)
    student = logits.softmax(-1)
    token = int(logits.argmax())
    receivers = [v for v in range(V) if v != token][:3]
    share = torch.zeros(V, dtype=F64)
    share[receivers] = torch.tensor([0.5, 0.3, 0.2], dtype=F64)
    amount = 0.4 * float(student[token])
    slope = logit_gradient(routing.bounded_cross_entropy, logits, token, share, amount)
    linear = logit_gradient(routing.linear_transfer, logits, token, share, amount)
    assert (slope - linear).abs().max() <= EXACT
    # A cross-entropy to a target has the gradient student - target; its minimiser is the target.
    target = student - slope
    assert float(target.sum()) == pytest.approx(1.0, abs=EXACT)
    assert float(target[token]) == pytest.approx(0.6 * float(student[token]), abs=EXACT)
    others = [v for v in range(V) if v not in (token, *receivers)]
    assert (target[others] - student[others]).abs().max() <= 1e-15


@SEEDS
def test_the_value_of_the_bounded_form_is_the_divergence_from_its_target(seed: int) -> None:
    logits, _ = draw(seed, spread=0.5)
    share = torch.zeros(V, dtype=F64)
    share[1] = 1.0
    student = logits.softmax(-1)
    value = routing.bounded_cross_entropy(
        student.log(), IDS, torch.tensor(0), share, torch.tensor(0.5, dtype=F64) * student[0]
    )
    # sum of target * log(target / student): only two entries differ
    moved = 0.5 * float(student[0])
    first, second = float(student[0]), float(student[1])
    by_hand = (first - moved) * math.log(0.5) + (second + moved) * math.log(1 + moved / second)
    assert float(value) == pytest.approx(by_hand, abs=EXACT)


@SEEDS
def test_the_bounded_form_moves_at_most_what_the_token_has_and_says_so(seed: int) -> None:
    logits, _ = draw(seed)
    share = torch.zeros(V, dtype=F64)
    share[1] = 1.0
    own = float(logits.softmax(-1)[0])
    cut = logit_gradient(routing.bounded_cross_entropy, logits, 0, share, 5.0)
    whole = logit_gradient(routing.linear_transfer, logits, 0, share, own)
    assert (cut - whole).abs().max() <= EXACT
    rows = logits.log_softmax(-1).expand(3, V)
    amounts = torch.tensor([0.5 * own, 1.5 * own, 5.0], dtype=F64)
    hits = routing.bounded_cross_entropy.counted(  # type: ignore[attr-defined]
        rows, IDS.expand(3, V), torch.zeros(3, dtype=torch.long), share.expand(3, V), amounts
    )
    assert hits.tolist() == [False, True, True]


@EVERY_TRANSFER
@SEEDS
def test_what_the_token_loses_the_candidates_gain(transfer: Transfer, seed: int) -> None:
    logits, teacher = draw(seed)
    student = logits.log_softmax(-1)
    token = int(logits.argmax())
    score = routing.centred_log_ratio(student, teacher)
    candidates = routing.raised(score, IDS, torch.tensor(token))
    share = routing.by_powers(
        score, candidates, student, teacher, teacher_power=1.0, student_power=0.5, score_power=1.0
    )
    slope = logit_gradient(transfer, logits, token, share, 0.1)
    assert abs(float(slope.sum())) <= EXACT
    assert slope[token] > 1e-3
    assert (slope[candidates] < 0).all()
    outside = ~candidates & (token != IDS)
    assert slope[outside].abs().max() <= 1e-16
    after = (logits - 1e-2 * slope).softmax(-1)
    assert after[token] < student[token].exp()
    assert after[candidates].sum() > student[candidates].exp().sum()


@EVERY_TRANSFER
def test_without_candidates_there_is_no_share_no_loss_and_no_gradient(transfer: Transfer) -> None:
    logits, teacher = draw(0)
    student = logits.log_softmax(-1)
    nobody = torch.zeros(V, dtype=torch.bool)
    score = routing.centred_log_ratio(student, teacher)
    shares = [routing.by_score(score, nobody)] + [
        routing.by_powers(
            score, nobody, student, teacher, teacher_power=a, student_power=a, score_power=a
        )
        for a in (0.0, 1.0)
    ]
    for share in shares:
        assert (share == 0).all()
        assert (logit_gradient(transfer, logits, 0, share, 1.0) == 0).all()
        loss = transfer(student, IDS, torch.tensor(0), share, torch.tensor(1.0, dtype=F64))
        assert float(loss) == 0


@EVERY_TRANSFER
@SEEDS
def test_the_tail_rule_does_not_change_what_a_transfer_moves(transfer: Transfer, seed: int) -> None:
    logits, _ = draw(seed)
    ids = logits.topk(5).indices
    share = torch.tensor([0.0, 0.5, 0.25, 0.25, 0.0], dtype=F64)
    amount = 0.5 * logits.softmax(-1).max()

    def slope(tail: str) -> Tensor:
        def loss(log_probs: Tensor) -> Tensor:
            inside = support.restrict_by_tail(log_probs, ids, tail=tail, side="student")
            longer = (0, inside.shape[-1] - 5)
            named = torch.nn.functional.pad(ids, longer, value=-1)
            shared = torch.nn.functional.pad(share, longer)
            return transfer(inside, named, ids[0], shared, amount)

        return gradient(loss, logits)

    renormalised = slope("renormalise")
    assert renormalised.abs().max() > 1e-2
    assert (slope("bucket") - renormalised).abs().max() <= EXACT


@EVERY_TRANSFER
def test_an_amount_of_zero_moves_nothing(transfer: Transfer) -> None:
    logits, _ = draw(1)
    assert (logit_gradient(transfer, logits, 0, shares_like_student(logits, 0), 0.0) == 0).all()


@EVERY_TRANSFER
def test_a_token_outside_the_support_moves_nothing(transfer: Transfer) -> None:
    logits, teacher = draw(2)
    ids = torch.tensor([0, 1, 2, 3, -1])
    token = torch.tensor(7)
    score = routing.centred_log_ratio(
        support.renormalise(support.restrict(logits.log_softmax(-1), ids)),
        support.renormalise(support.restrict(teacher, ids)),
    )
    assert float(routing.overrated(score, ids, token)) == 0
    assert float(routing.excess_score(score, ids, token)) == 0
    share = routing.by_score(score, routing.raised(score, ids, token))
    assert float(share.sum()) == pytest.approx(1)
    assert (logit_gradient(transfer, logits, 7, share, 1.0, ids) == 0).all()


@EVERY_TRANSFER
def test_gradients_flow_through_the_students_distribution_alone(transfer: Transfer) -> None:
    logits, teacher = draw(3)
    token = torch.tensor(int(logits.argmax()))
    live, judge = logits.clone().requires_grad_(), teacher.clone().requires_grad_()
    student = live.log_softmax(-1)
    score = routing.centred_log_ratio(student, judge)
    candidates = routing.raised(score, IDS, token)
    share = routing.by_powers(
        score, candidates, student, judge, teacher_power=1.0, student_power=1.0, score_power=1.0
    )
    amount = routing.excess_score(score, IDS, token) / 100
    transfer(student, IDS, token, share, amount).backward()
    assert judge.grad is None
    held = logit_gradient(transfer, logits, int(token), share, amount)
    assert torch.allclose(live.grad, held, rtol=0, atol=1e-15)


@EVERY_TRANSFER
@pytest.mark.parametrize("empty", ["student", "teacher", "both"])
def test_entries_without_mass_make_no_nan(transfer: Transfer, empty: str) -> None:
    logits, teacher = draw(0)
    gone = int(teacher.argmax())
    token = torch.tensor(next(v for v in range(V) if v != gone))
    if empty != "teacher":
        logits[gone] = -math.inf
    if empty != "student":
        teacher[gone] = -math.inf
        teacher = teacher.log_softmax(-1)
    leaf = logits.clone().requires_grad_()
    student = leaf.log_softmax(-1)
    score = routing.centred_log_ratio(student, teacher)
    everyone = routing.all_others(IDS, token)
    amount = torch.tensor(0.1, dtype=F64)
    shares = [routing.by_score(score, everyone)] + [
        routing.by_powers(
            score, everyone, student, teacher, teacher_power=a, student_power=b, score_power=c
        )
        for a in (0.0, 1.0)
        for b in (0.0, 1.0)
        for c in (0.0, 1.0)
    ]
    assert not routing.raised(score, IDS, token)[gone]
    for share in shares:
        assert float(share.sum()) == pytest.approx(1)
        if empty != "teacher":
            assert share[gone] == 0
        loss = transfer(student, IDS, token, share, amount)
        assert loss.isfinite()
        (slope,) = torch.autograd.grad(loss, leaf, retain_graph=True)
        assert slope.isfinite().all()


# --------------------------------------------------------------------------------------------
# Candidates


def test_special_absent_and_repeated_tokens_are_no_candidates() -> None:
    # vocabulary of 9; teacher and student name 4 and 6 twice over, 6 and 8 are special
    teacher_top, student_top = torch.tensor([[4, 6, 2, 1]]), torch.tensor([[6, 4, 8, 2]])
    tokens = torch.tensor([1])
    ids = support.routing_support(
        teacher_top, student_top, tokens, torch.tensor([6, 8]), teacher_k=3, student_k=4
    )
    likes_all = torch.where(ids == -1, -math.inf, torch.ones(ids.shape, dtype=F64))
    for candidates in (
        routing.all_others(ids, tokens),
        routing.raised(likes_all, ids, tokens),
        routing.endorsed_and_reachable(
            likes_all, ids, tokens, teacher_top, student_top, teacher_k=4, student_k=4
        ),
        routing.teacher_top(ids, tokens, teacher_top, teacher_k=4),
    ):
        assert sorted(ids[candidates].tolist()) == [2, 4]


def test_an_absent_entry_is_no_candidate_whatever_its_score_and_whoever_lists_it() -> None:
    ids, tokens = torch.tensor([[3, -1, 5]]), torch.tensor([3])
    score = torch.ones(1, 3)
    listed = torch.tensor([[-1, 5]])
    known = {"teacher_k": 2, "student_k": 2}
    for candidates in (
        routing.all_others(ids, tokens),
        routing.raised(score, ids, tokens),
        routing.teacher_top(ids, tokens, listed, teacher_k=2),
        routing.endorsed_and_reachable(score, ids, tokens, listed, listed, **known),
        routing.best(score, ids, tokens),
    ):
        assert candidates.tolist() == [[False, False, True]]


@SEEDS
def test_the_candidates_by_a_literal_loop(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    rows, width = 40, 12
    student = torch.randn(rows, width, generator=generator, dtype=F64).log_softmax(-1)
    teacher = torch.randn(rows, width, generator=generator, dtype=F64).log_softmax(-1)
    tokens = torch.randint(width, (rows,), generator=generator)
    ids = torch.stack([torch.randperm(width, generator=generator) for _ in range(rows)])
    ids[:, 3] = -1
    student_top, teacher_top = student.topk(6).indices, teacher.topk(5).indices
    inside = [support.renormalise(support.restrict(side, ids)) for side in (student, teacher)]
    score = routing.centred_log_ratio(*inside)
    own = support.restrict(student, ids)
    strict = routing.endorsed_and_reachable(
        score, ids, tokens, teacher_top, student_top, teacher_k=3, student_k=4
    )
    relaxed = routing.endorsed_or_likely(
        score,
        ids,
        tokens,
        teacher_top,
        student_top,
        own,
        teacher_k=3,
        student_k=4,
        min_probability=0.02,
    )
    fell_back = 0
    for row in range(rows):
        listed = [int(v) for v in ids[row]]
        good = [
            j
            for j, v in enumerate(listed)
            if v not in (-1, int(tokens[row])) and float(score[row, j]) > 1e-6
        ]
        endorsed = [j for j in good if listed[j] in teacher_top[row, :3].tolist()]
        both = [j for j in endorsed if listed[j] in student_top[row, :4].tolist()]
        likely = [j for j in endorsed if math.exp(student[row, listed[j]]) > 0.02]
        fell_back += not both and bool(likely)
        assert strict[row].nonzero().flatten().tolist() == both
        assert relaxed[row].nonzero().flatten().tolist() == (both or likely)
    assert fell_back


@SEEDS
def test_best_is_the_greedy_choice_among_the_raised(seed: int) -> None:
    logits, teacher = draw(seed)
    score = routing.centred_log_ratio(logits.log_softmax(-1), teacher)
    favourite = int(score.argmax())
    for token in range(V):
        chosen = routing.best(score, IDS, torch.tensor(token)).nonzero().flatten().tolist()
        others = [v for v in range(V) if v != token]
        greedy = max(others, key=lambda v: float(score[v]))
        assert chosen == ([greedy] if float(score[greedy]) > 1e-6 else [])
        assert token == favourite or chosen == [favourite]


def test_best_takes_the_first_of_equals_and_nobody_below_the_margin() -> None:
    ids = torch.arange(4).expand(3, 4)
    tokens = torch.zeros(3, dtype=torch.long)
    score = torch.tensor([[9.0, 1, 2, 2], [9, -1, -2, 0], [9, 1e-7, 1e-8, 0]])
    assert routing.best(score, ids, tokens).tolist() == [
        [False, False, True, False],
        [False] * 4,
        [False] * 4,
    ]


def test_a_teacher_that_is_the_student_opens_no_route_in_single_precision() -> None:
    generator = torch.Generator().manual_seed(0)
    logits = 10 * torch.randn(64, 5000, generator=generator)
    log_probs = logits.log_softmax(-1)
    tokens = torch.randint(5000, (64,), generator=generator)
    top = log_probs.topk(32).indices
    ids = support.routing_support(
        top, top, tokens, torch.tensor([17, 4999]), teacher_k=32, student_k=32
    )
    for tail in ("renormalise", "bucket"):
        sides = [
            support.restrict_by_tail(log_probs, ids, tail=tail, side=side)  # type: ignore[arg-type]
            for side in ("student", "teacher")
        ]
        padded = torch.nn.functional.pad(ids, (0, sides[0].shape[-1] - ids.shape[-1]), value=-1)
        score = routing.centred_log_ratio(*sides)
        assert not routing.raised(score, padded, tokens).any()
        assert not routing.best(score, padded, tokens).any()
        assert not routing.endorsed_and_reachable(
            score, padded, tokens, top, top, teacher_k=32, student_k=32
        ).any()
        assert not routing.overrated(score, padded, tokens).any()


def test_rounding_of_double_precision_opens_no_route() -> None:
    # Equal up to rounding: the student's logits shifted before they are normalised.
    logits = torch.randn(200, 50, generator=torch.Generator().manual_seed(1), dtype=F64)
    tokens = torch.zeros(200, dtype=torch.long)
    ids = torch.arange(50).expand(200, 50)
    score = routing.centred_log_ratio(logits.log_softmax(-1), (logits + 3).log_softmax(-1))
    assert (score != 0).any()
    assert routing.raised(score, ids, tokens, margin=0.0).any()
    assert not routing.raised(score, ids, tokens).any()
    assert not routing.overrated(score, ids, tokens).any()


# --------------------------------------------------------------------------------------------
# Shares


def test_shares_by_powers_of_a_hand_example() -> None:
    student = torch.tensor([0.4, 0.1, 0.2, 0.3], dtype=F64).log()
    teacher = torch.tensor([0.1, 0.4, 0.4, 0.1], dtype=F64).log()
    score = torch.tensor([-1.0, 3.0, 1.0, -1.0], dtype=F64)
    candidates = torch.tensor([False, True, True, True])

    def shares(a: float, b: float, c: float) -> list[float]:
        found = routing.by_powers(
            score, candidates, student, teacher, teacher_power=a, student_power=b, score_power=c
        )
        return [float(value) for value in found]

    assert shares(0, 0, 0) == pytest.approx([0, 1 / 3, 1 / 3, 1 / 3])
    assert shares(1, 0, 0) == pytest.approx([0, 4 / 9, 4 / 9, 1 / 9])
    assert shares(0, 1, 0) == pytest.approx([0, 1 / 6, 2 / 6, 3 / 6])
    assert shares(0, 0, 1) == pytest.approx([0, 3 / 4, 1 / 4, 0])
    assert shares(0, 1, 1) == pytest.approx([0, 3 / 5, 2 / 5, 0])  # 0.1 * 3 : 0.2 * 1
    assert shares(0, 0, 2) == pytest.approx([0, 9 / 10, 1 / 10, 0])
    assert shares(0.5, 0, 0) == pytest.approx([0, 2 / 5, 2 / 5, 1 / 5])


@SEEDS
def test_the_temperature_of_the_score_makes_the_split_even_or_greedy(seed: int) -> None:
    logits, teacher = draw(seed)
    student = logits.log_softmax(-1)
    score = routing.centred_log_ratio(student, teacher)
    token = torch.tensor(int(score.argmin()))
    candidates = routing.raised(score, IDS, token)
    plain = routing.by_score(score, candidates)
    by_hand = torch.where(candidates, score, 0.0) / score[candidates].sum()
    assert torch.allclose(plain, by_hand, rtol=0, atol=EXACT)
    same = routing.by_powers(
        score, candidates, student, teacher, teacher_power=0.0, student_power=0.0, score_power=1.0
    )
    assert torch.equal(plain, same)
    even = routing.by_score(score, candidates, temperature=1e9)
    assert torch.allclose(even, candidates.to(F64) / candidates.sum(), atol=1e-6)
    greedy = routing.by_score(score, candidates, temperature=1e-3)
    assert torch.allclose(greedy, routing.best(score, IDS, token).to(F64), atol=1e-6)
    squared = torch.where(candidates, score, 0.0) ** 2
    halved = routing.by_score(score, candidates, temperature=0.5)
    assert torch.allclose(halved, squared / squared.sum(), rtol=0, atol=EXACT)


def test_candidates_that_the_score_lowers_get_nothing_even_if_they_are_alone() -> None:
    score = torch.tensor([-1.0, -2.0, 0.0])
    candidates = torch.tensor([False, True, True])
    assert (routing.by_score(score, candidates) == 0).all()


# --------------------------------------------------------------------------------------------
# Amounts, gates, measures


def test_amounts_of_a_hand_example() -> None:
    score = torch.tensor([[-1.5, 1.0, 0.5], [-1.5, 1.0, 0.5]], dtype=F64)
    ids, tokens = torch.tensor([[7, 8, 9], [7, 8, 9]]), torch.tensor([7, 9])
    assert routing.excess_score(score, ids, tokens).tolist() == [1.5, 0.0]
    assert routing.overrated(score, ids, tokens).tolist() == [1.0, 0.0]
    advantage = torch.tensor([-2.0, 2.0, -2.0, 0.0], dtype=F64)
    logp = torch.tensor([0.25, 0.25, 1.0, 0.25], dtype=F64).log()
    assert routing.matched_suppression(advantage, logp).tolist() == pytest.approx([1.5, 0, 0, 0])


def test_a_token_to_which_the_teacher_gives_nothing_is_overrated_without_bound() -> None:
    student = torch.tensor([0.5, 0.5], dtype=F64).log()
    teacher = torch.tensor([-math.inf, 0.0], dtype=F64)
    score = routing.centred_log_ratio(student, teacher)
    token = torch.tensor(0)
    assert float(routing.overrated(score, torch.arange(2), token)) == 1
    assert float(routing.excess_score(score, torch.arange(2), token)) == math.inf


def test_gates_and_damping_of_a_hand_example() -> None:
    candidates = torch.tensor([[True, True, False], [False, False, True], [False] * 3])
    assert routing.has_candidates(candidates).tolist() == [1, 1, 0]
    teacher = torch.tensor([0.25, 0.25, 0.5], dtype=F64).log().expand(3, 3)
    assert routing.candidate_mass(candidates, teacher, at_least=0.5).tolist() == [1, 1, 0]
    assert routing.candidate_mass(candidates, teacher, at_least=0.51).tolist() == [0, 0, 0]
    student = torch.tensor([0.5, 0.25, 0.25], dtype=F64).log().expand(3, 3)
    score = torch.tensor([0.4, -3.0, 2.0], dtype=F64).expand(3, 3)
    # S = 0.5 * 0.4 and 0.25 * 2; the candidate below zero counts for nothing.
    full = {"full_at": 0.4}
    damping = routing.evidence(score, candidates, student, **full)
    assert damping.tolist() == pytest.approx([0.5, 1.0, 0.0])
    hits = routing.evidence.counted(score, candidates, student, **full)  # type: ignore[attr-defined]
    assert hits.tolist() == [False, True, False]


def test_leak_is_the_share_that_misses_the_candidates() -> None:
    # 0.14 of the 0.79 that are not the token's reach a candidate, as in survey section 6.4
    student = torch.tensor([0.21, 0.10, 0.04, 0.65], dtype=F64).log()
    candidates = torch.tensor([[False, True, True, False], [False] * 4, [False, True, True, True]])
    found = routing.leak(candidates, student.expand(3, 4), student[0].expand(3))
    assert found.tolist() == pytest.approx([1 - 0.14 / 0.79, 1.0, 0.0], abs=1e-15)
    certain = routing.leak(candidates, student.expand(3, 4), torch.zeros(3, dtype=F64))
    assert certain.tolist() == [0, 0, 0]


@SEEDS
def test_leak_is_measured_on_the_gradient_of_plain_suppression(seed: int) -> None:
    logits, teacher = draw(seed)
    student = logits.log_softmax(-1)
    token = int(logits.argmax())
    score = routing.centred_log_ratio(student, teacher)
    candidates = routing.raised(score, IDS, torch.tensor(token))
    plain = gradient(
        lambda log_probs: surrogate.score(log_probs[token], torch.tensor(-1.0, dtype=F64)), logits
    )
    missed = 1 + float(plain[candidates].sum() / plain[token])
    assert float(routing.leak(candidates, student, student[token])) == pytest.approx(missed)


# --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("margin", [-1e-9, math.inf, math.nan])
def test_impossible_margins_are_refused(margin: float) -> None:
    score, token = torch.zeros(V), torch.tensor(0)
    for function in (routing.raised, routing.best, routing.overrated):
        with pytest.raises(ValueError, match=r"margin must be .* got"):
            function(score, IDS, token, margin=margin)


@pytest.mark.parametrize("k", [0, 4])
def test_more_likeliest_tokens_than_are_known_are_refused_by_name(k: int) -> None:
    top, token = torch.tensor([1, 2, 3]), torch.tensor(0)
    with pytest.raises(ValueError, match=rf"teacher_k must lie in 1 ... 3, .* got {k}"):
        routing.teacher_top(IDS, token, top, teacher_k=k)
    with pytest.raises(ValueError, match=rf"student_k must lie in 1 ... 3, .* got {k}"):
        routing.endorsed_and_reachable(
            torch.zeros(V), IDS, token, top, top, teacher_k=2, student_k=k
        )


def test_other_impossible_knobs_are_refused() -> None:
    values, chosen = torch.zeros(V), torch.ones(V, dtype=torch.bool)
    with pytest.raises(ValueError, match="temperature must be a finite number > 0, got 0"):
        routing.by_score(values, chosen, temperature=0.0)
    with pytest.raises(ValueError, match="student_power must be a finite number >= 0, got -1"):
        routing.by_powers(
            values, chosen, values, values, teacher_power=0, student_power=-1, score_power=0
        )
    with pytest.raises(ValueError, match="at_least is a mass"):
        routing.candidate_mass(chosen, values, at_least=0.0)
    with pytest.raises(ValueError, match="full_at must be"):
        routing.evidence(values, chosen, values, full_at=0.0)
    with pytest.raises(ValueError, match="min_probability must lie in"):
        routing.endorsed_or_likely(
            values,
            IDS,
            torch.tensor(0),
            IDS,
            IDS,
            values,
            teacher_k=1,
            student_k=1,
            min_probability=1.0,
        )
