"""Which divergence a reward or a route descends in exact expectation, and where it is stationary.

Source: arXiv:2606.22793, sections 4.2 to 4.5; arXiv:2606.01039 for the f-divergence rewards.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pytest
import torch
from jaxtyping import Float, Int
from torch import Tensor

from opd.audit import (
    World,
    compare,
    lag_gradient,
    local_gradient,
    random_tree,
    sequence_reverse_kl_gradient,
    visits,
)
from opd.formula import (
    credit,
    divergence,
    outcome,
    regulariser,
    reward,
    routing,
    support,
    surrogate,
    weight,
)
from opd.objective import Dense, Regulariser, Routed, Sampled, Term
from tests.audit.worlds import (
    WORLDS,
    close,
    count_letter,
    descends,
    moments,
    share_of_letter,
    token_gradient,
)

NAMES = ("tree", "tree with an end", "slow chain with an end", "absorbing chain")
RATIO = reward.teacher_log_ratio
FOUR = random_tree(21, vocab_size=4, horizon=3)
FOUR_WITH_AN_END = random_tree(22, vocab_size=4, horizon=4, end_id=3)


def same_teacher(world: World) -> World:
    return world.with_view(world.student_logits)


# --------------------------------------------------------------------------------------------
# One token's estimators


def k1(student_logp: Float[Tensor, "*n"], teacher_logp: Float[Tensor, "*n"]) -> Float[Tensor, "*n"]:
    """The value estimator log student - log teacher, back-propagated: not offered."""
    return student_logp - teacher_logp


def minus_k3(
    teacher_logp: Float[Tensor, "*n"], student_logp: Float[Tensor, "*n"]
) -> Float[Tensor, "*n"]:
    """Minus the value estimator k3 as a reward: not offered."""
    ratio = (teacher_logp - student_logp).detach()
    return -(ratio.exp() - 1 - ratio)


@pytest.mark.parametrize("name", NAMES)
def test_back_propagated_estimators_descend_what_they_are_named_after(name: str) -> None:
    world = WORLDS[name]
    backward = local_gradient(world, divergence.reverse_kl)
    forward = local_gradient(world, divergence.forward_kl)
    assert close(descends(world, Dense(divergence.reverse_kl_k2)), backward)
    assert close(descends(world, Dense(divergence.forward_kl_k3)), forward)
    assert float(descends(world, Dense(k1)).abs().max()) < 1e-14, "the teacher is not in it"
    as_reward = compare(descends(world, Sampled(minus_k3)), backward)
    assert as_reward.relative_error > 0.1


DIVERGENCES: dict[str, Callable[..., Tensor]] = {
    "forward_kl": divergence.forward_kl,
    "reverse_kl": divergence.reverse_kl,
    "generalized_jsd": partial(divergence.generalized_jsd, teacher_weight=0.3),
    "skew_forward_kl": partial(divergence.skew_forward_kl, skew=0.2),
    "skew_reverse_kl": partial(divergence.skew_reverse_kl, skew=0.2),
    "alpha_divergence": partial(divergence.alpha_divergence, alpha=0.4),
    "alpha_divergence below 0": partial(divergence.alpha_divergence, alpha=-0.5),
    "squared_hellinger": divergence.squared_hellinger,
    "power_divergence": partial(divergence.power_divergence, power=0.7),
    "total_variation": divergence.total_variation,
}
REWARDS: dict[str, tuple[Callable[..., Tensor], float]] = {
    "forward_kl": (reward.forward_kl_reward, 1.0),
    "reverse_kl": (reward.teacher_log_ratio, 1.0),
    "generalized_jsd": (partial(reward.generalized_jsd_reward, teacher_weight=0.3), 1.0),
    "skew_forward_kl": (partial(reward.skew_forward_kl_reward, skew=0.2), 1.0),
    "skew_reverse_kl": (partial(reward.skew_reverse_kl_reward, skew=0.2), 1.0),
    "alpha_divergence": (partial(reward.alpha_divergence_reward, alpha=0.4), 1.0),
    "alpha_divergence below 0": (partial(reward.alpha_divergence_reward, alpha=-0.5), 1.0),
    "squared_hellinger": (reward.squared_hellinger_reward, 1.0),
    # as published it carries a hidden factor of the power
    "power_divergence": (partial(reward.power_reward, power=0.7), 0.7),
    "total_variation": (reward.total_variation_reward, 1.0),
}


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("function", DIVERGENCES)
def test_each_reward_descends_its_own_divergence(function: str, name: str) -> None:
    world = WORLDS[name]
    target = local_gradient(world, DIVERGENCES[function])
    used, factor = REWARDS[function]
    assert close(descends(world, Sampled(used)), factor * target)
    assert close(descends(world, Dense(DIVERGENCES[function])), target)


@pytest.mark.parametrize("name", NAMES)
def test_rewards_of_several_policies_descend_the_divergence_they_name(name: str) -> None:
    world = WORLDS[name]

    def squared_distance(student: Tensor, teacher: Tensor) -> Tensor:
        return divergence.total_variation(student, teacher).square()

    signed = descends(world, Sampled(reward.sign_total_variation))
    assert close(signed, local_gradient(world, squared_distance))
    student = world.student_logits.log_softmax(-1).exp()
    mixed = (0.4 * world.views["teacher"].softmax(-1) + 0.6 * student).log()
    within_reach = local_gradient(world.with_view(mixed), divergence.reverse_kl)
    proximal = Sampled(partial(reward.proximal_log_ratio, teacher_share=0.4))
    assert close(descends(world, proximal), within_reach)


TRANSFORMS = {
    "clipped": (
        partial(reward.clipped_log_ratio, low=-0.5, high=0.4),
        lambda ratio: ratio.clamp(-0.5, 0.4),
    ),
    "floored": (
        partial(reward.floored_log_ratio, floor_nats=-0.7),
        lambda ratio: ratio.clamp(min=-0.7),
    ),
    "tanh": (
        partial(reward.tanh_log_ratio, scale=0.8),
        lambda ratio: 0.8 * (ratio / 0.8).tanh(),
    ),
    "soft": (reward.soft_log_ratio, lambda ratio: ratio.sign() * (1 + ratio.abs()).log()),
}


@pytest.mark.parametrize("function", TRANSFORMS)
def test_transforms_of_the_log_ratio_are_biased_for_the_reverse_kl(function: str) -> None:
    world = WORLDS["tree with an end"]
    used, literal = TRANSFORMS[function]
    found = descends(world, Sampled(used))
    assert close(found, token_gradient(world, lambda student, teacher: literal(teacher - student)))
    assert not close(found, local_gradient(world, divergence.reverse_kl), bound=0.02)


STATIONARY = {
    **{f"reward of {name}": Sampled(used) for name, (used, _) in REWARDS.items()},
    **{f"{name} transform": Sampled(used) for name, (used, _) in TRANSFORMS.items()},
    **{f"dense {name}": Dense(used) for name, used in DIVERGENCES.items()},
    "sign_total_variation": Sampled(reward.sign_total_variation),
    "proximal": Sampled(partial(reward.proximal_log_ratio, teacher_share=0.4)),
    "cached": Sampled(reward.cached_log_ratio),
    "k2": Dense(divergence.reverse_kl_k2),
    "k3": Dense(divergence.forward_kl_k3),
    "stop-gradient": Dense(
        divergence.truncated_reverse_kl,
        support=partial(support.teacher_top_k, k=2),
        tail="truncate",
    ),
}
MOVES_ANYWAY: dict[str, Term] = {
    "likelihood of its own text": Sampled(reward.one),
    "length": Sampled(reward.length_cost, credit=credit.return_to_go),
    "entropy": Regulariser(regulariser.entropy_bonus),
    "raw forward KL on a support": Dense(
        divergence.forward_kl, support=partial(support.teacher_top_k, k=2), tail="truncate"
    ),
    "raw reverse KL on a support": Dense(
        divergence.reverse_kl,
        support=partial(support.teacher_top_k, k=2),
        tail="truncate",
        accept_collapse=True,
    ),
    "restricted teacher": Dense(
        divergence.forward_kl,
        support=partial(support.teacher_top_k, k=2),
        tail="teacher_renormalise",
    ),
}


@pytest.mark.parametrize("function", STATIONARY)
def test_a_student_that_is_the_teacher_stays(function: str) -> None:
    world = same_teacher(WORLDS["tree with an end"])
    found = moments(world, STATIONARY[function])
    assert float(found.gradient.abs().max()) < 1e-14
    assert found.variance < 1e-28


@pytest.mark.parametrize("function", MOVES_ANYWAY)
def test_what_does_not_aim_at_the_teacher_moves_a_student_that_is_the_teacher(
    function: str,
) -> None:
    found = moments(same_teacher(WORLDS["tree with an end"]), MOVES_ANYWAY[function])
    if function == "likelihood of its own text":  # each response moves it, their mean does not
        assert float(found.gradient.abs().max()) < 1e-14
        assert found.variance > 0.1
    else:
        assert float(found.gradient.norm()) > 1e-2


# --------------------------------------------------------------------------------------------
# A bucket and what it hides


@pytest.mark.parametrize("world", [FOUR, FOUR_WITH_AN_END], ids=["no end", "an end"])
@pytest.mark.parametrize("k", [1, 2])
def test_a_bucket_and_the_sampled_residual_make_the_full_reverse_kl(world: World, k: int) -> None:
    where = {"support": partial(support.teacher_top_k, k=k), "tail": "bucket"}
    bucket = Dense(divergence.reverse_kl, **where)  # type: ignore[arg-type]
    residual = Sampled(RATIO, surrogate=surrogate.tail_residual, **where)  # type: ignore[arg-type]
    full = local_gradient(world, divergence.reverse_kl)
    assert close(descends(world, bucket, residual), full)
    assert compare(descends(world, bucket), full).relative_error > 1e-2
    whole = Dense(divergence.reverse_kl, support=partial(support.teacher_top_k, k=4), tail="bucket")
    assert close(descends(world, whole), full)


# --------------------------------------------------------------------------------------------
# Routes


def closed(tokens: Int[Tensor, "*n"]) -> Float[Tensor, "*n"]:
    """A gate that never opens."""
    return torch.zeros(tokens.shape, dtype=torch.float64)


@pytest.mark.parametrize("mode", ["add", "replace", "interpolate"])
def test_a_route_whose_gates_are_closed_is_its_source_bit_for_bit(mode: str) -> None:
    for source in (Sampled(RATIO), Sampled(RATIO, credit=credit.return_to_go, coef=0.3)):
        plain = moments(FOUR_WITH_AN_END, source)
        route = Routed(source, candidates=routing.all_others, gates=(closed,), mode=mode)
        found = moments(FOUR_WITH_AN_END, route)
        assert torch.equal(found.gradient, plain.gradient)
        assert found.variance == plain.variance
        assert found.value == plain.value


@pytest.mark.parametrize("world", [FOUR, FOUR_WITH_AN_END], ids=["no end", "an end"])
@pytest.mark.parametrize("used", [credit.immediate, credit.return_to_go], ids=["now", "to go"])
def test_sending_mass_to_all_others_as_the_student_would_is_plain_suppression(
    world: World, used: Callable[..., Tensor]
) -> None:
    source = Sampled(RATIO, credit=used)
    share = partial(routing.by_powers, teacher_power=0.0, student_power=1.0, score_power=0.0)
    route = Routed(
        source,
        candidates=routing.all_others,
        share=share,
        amount=routing.matched_suppression,
        transfer=routing.linear_transfer,
        gates=(weight.negative_advantage,),
    )
    plain, routed = moments(world, source), moments(world, route)
    assert close(routed.gradient, plain.gradient)
    assert routed.variance == pytest.approx(plain.variance, rel=1e-10), "response by response"


def consistent(**changes: object) -> Routed:
    """The member of the transfer family that is consistent with the reverse KL."""
    parts: dict[str, object] = {
        "source": Sampled(RATIO, coef=0.0),
        "candidates": partial(routing.raised, margin=0.0),
        "share": partial(routing.by_powers, teacher_power=0.0, student_power=1.0, score_power=1.0),
        "amount": routing.excess_score,
        "transfer": routing.linear_transfer,
        "mode": "add",
    }
    return Routed(**{**parts, **changes})  # type: ignore[arg-type]


@pytest.mark.parametrize("name", WORLDS)
def test_the_consistent_route_is_the_reverse_kl_in_expectation(name: str) -> None:
    world = WORLDS[name]
    target = local_gradient(world, divergence.reverse_kl)
    assert close(descends(world, consistent()), target)
    gated = consistent(mode="replace", gates=(partial(routing.overrated, margin=0.0),))
    assert close(descends(world, gated), target)


CAUSES = {
    "candidates": {"candidates": partial(routing.best, margin=0.0)},
    "restricted score": {"support": partial(support.teacher_top_k, k=3), "tail": "renormalise"},
    "no student factor": {"share": routing.by_score},
    "saturation": {"transfer": routing.pairwise_logistic},
}


@pytest.mark.parametrize("cause", CAUSES)
@pytest.mark.parametrize("world", [FOUR, FOUR_WITH_AN_END], ids=["no end", "an end"])
def test_each_departure_from_the_consistent_route_is_biased_by_itself(
    cause: str, world: World
) -> None:
    target = local_gradient(world, divergence.reverse_kl)
    found = descends(world, consistent(**CAUSES[cause]))
    assert compare(found, target).relative_error > 1e-2
    assert float(found.sum(-1).abs().max()) < 1e-14, "what the token loses, the others gain"


def transfers(
    world: World, shares: Callable[[int, Tensor, Tensor], Tensor], *, suppress: bool = False
) -> Tensor:
    """sum over states and tokens u of d * student(u) * m(u) * (e_u - r), as two loops.

    `shares` gives r from the token, the scores and the teacher, all of one state.
    """
    student = world.student_logits.softmax(-1)
    teacher = world.views["teacher"].softmax(-1)
    reached = visits(world).sum(0)
    gradient = torch.zeros_like(student)
    for state in range(len(student)):
        ratio = (teacher[state] / student[state]).log()
        score = ratio - (student[state] * ratio).sum()
        for token in range(world.vocab_size):
            amount = (-score[token]).clamp(min=0.0)
            if suppress:
                amount = (-ratio[token]).clamp(min=0.0) * (1 - student[state, token])
            moved = reached[state] * student[state, token] * amount
            r = shares(token, score, teacher[state])
            if r.any():
                gradient[state, token] += moved
                gradient[state] -= moved * r
    return gradient


def to_the_best(token: int, score: Tensor, teacher: Tensor) -> Tensor:
    target = torch.zeros_like(score)
    if score.argmax() != token and score.max() > 0:
        target[score.argmax()] = 1.0
    return target


def as_the_teacher(token: int, score: Tensor, teacher: Tensor) -> Tensor:
    listed = torch.zeros_like(teacher)
    listed[teacher.topk(2).indices] = teacher.topk(2).values
    listed[token] = 0.0
    return listed / listed.sum()


@pytest.mark.parametrize("world", [FOUR, FOUR_WITH_AN_END], ids=["no end", "an end"])
def test_a_single_candidate_is_a_greedy_correction(world: World) -> None:
    route = consistent(candidates=partial(routing.best, margin=0.0), share=routing.by_score)
    assert close(descends(world, route), transfers(world, to_the_best))


@pytest.mark.parametrize("world", [FOUR, FOUR_WITH_AN_END], ids=["no end", "an end"])
def test_mass_can_go_where_the_teacher_points(world: World) -> None:
    route = consistent(
        candidates=partial(routing.teacher_top, teacher_k=2),
        share=partial(routing.by_powers, teacher_power=1.0, student_power=0.0, score_power=0.0),
        amount=routing.matched_suppression,
    )
    assert close(descends(world, route), transfers(world, as_the_teacher, suppress=True))


def published(**changes: object) -> Routed:
    """Counterfactual routing as written: restricted scores, an intersection, a logistic loss."""
    parts: dict[str, object] = {
        "source": Sampled(RATIO),
        "support": partial(support.routing_support, teacher_k=2, student_k=3),
        "tail": "renormalise",
        "candidates": partial(routing.endorsed_and_reachable, teacher_k=2, student_k=3),
        "gates": (routing.overrated, routing.has_candidates, weight.negative_advantage),
    }
    return Routed(**{**parts, **changes})  # type: ignore[arg-type]


@pytest.mark.parametrize("mode", ["add", "replace", "interpolate"])
def test_the_published_route_is_biased_and_still_points_downhill(mode: str) -> None:
    target = local_gradient(FOUR_WITH_AN_END, divergence.reverse_kl)
    found = compare(descends(FOUR_WITH_AN_END, published(mode=mode)), target)
    assert found.relative_error > 1e-2
    assert found.cosine > 0.5
    same = same_teacher(FOUR_WITH_AN_END)
    assert torch.equal(descends(same, published(mode=mode)), descends(same, Sampled(RATIO)))


def test_interpolation_lies_between_adding_and_replacing() -> None:
    world = FOUR_WITH_AN_END
    add, replaced, between = (
        descends(world, published(mode=mode, interpolation=share))
        for mode, share in (("add", 0.5), ("replace", 0.5), ("interpolate", 0.3))
    )
    assert close(between, 0.7 * add + 0.3 * replaced)
    assert not close(add, replaced, bound=1e-2)


# --------------------------------------------------------------------------------------------
# Outcomes


def verdict_gradient(world: World, token: int) -> Tensor:
    """Gradient of minus the expected share of `token`, without an enumeration."""
    rewarded = share_of_letter(world, token)
    parts = [lag_gradient(world, lag, reward=rewarded) for lag in range(world.horizon)]
    return torch.stack(parts).sum(0)


@pytest.mark.parametrize("name", NAMES)
def test_a_terminal_verdict_makes_the_teacher_a_prior(name: str) -> None:
    world = WORLDS[name]
    target = verdict_gradient(world, 0)
    verify = count_letter(world, 0)
    alone = Sampled(reward.verdict_reward, credit=credit.return_to_go)
    assert close(descends(world, alone, verify=verify), target)
    joined = Sampled(
        RATIO, credit=credit.return_to_go, outcome=(partial(outcome.terminal_verdict, scale=2.0),)
    )
    both = sequence_reverse_kl_gradient(world) + 2.0 * target
    assert close(descends(world, joined, verify=verify), both)
    unjudged = descends(world, joined)
    assert close(unjudged, sequence_reverse_kl_gradient(world))


PAIRS = random_tree(31, vocab_size=2, horizon=3)


def of_pairs(term: Term, verify: Callable[..., float] | None = None) -> Tensor:
    return descends(PAIRS, term, samples=2, verify=verify)


def test_a_group_advantage_is_the_verdicts_gradient_less_the_share_of_its_own() -> None:
    # The mean over a group of two holds the response's own verdict with weight 1/2, so half of
    # the gradient is left.
    centred = Sampled(reward.group_deviation)
    verify = count_letter(PAIRS, 0)
    assert close(of_pairs(centred, verify), 0.5 * verdict_gradient(PAIRS, 0))
    assert not of_pairs(centred, lambda response: 0.7).any()
    assert not of_pairs(centred).any()


@pytest.mark.parametrize("used", [credit.immediate, credit.return_to_go], ids=["now", "to go"])
def test_added_and_mixed_advantages_are_sums_of_the_two_gradients(
    used: Callable[..., Tensor],
) -> None:
    verify = count_letter(PAIRS, 0)
    plain = of_pairs(Sampled(RATIO, credit=used))
    judged = of_pairs(Sampled(reward.group_advantage), verify)

    def joined(function: Callable[..., Tensor], judge: Callable[..., float] | None) -> Tensor:
        return of_pairs(Sampled(RATIO, credit=used, outcome=(function,)), judge)

    add = partial(outcome.add_group_advantage, scale=0.6)
    mix = partial(outcome.mix_group_advantage, share=0.3)
    assert close(joined(add, verify), plain + 0.6 * judged)
    assert close(joined(mix, verify), 0.7 * plain + 0.3 * judged)
    assert close(joined(add, None), plain)
    assert close(joined(mix, None), 0.7 * plain)


@pytest.mark.parametrize("name", NAMES)
def test_agreement_in_sign_keeps_the_half_that_the_verdict_allows(name: str) -> None:
    world = WORLDS[name]
    term = Sampled(RATIO, outcome=(outcome.agree_in_sign,))

    def half(student: Tensor, teacher: Tensor, *, sign: float) -> Tensor:
        return sign * (sign * (teacher - student)).clamp(min=0.0)

    for verdict, sign in ((1.0, 1.0), (0.0, -1.0)):
        found = descends(world, term, verify=lambda response, verdict=verdict: verdict)
        assert close(found, token_gradient(world, partial(half, sign=sign)))
    assert not descends(world, term).any()


def test_a_sigmoid_gate_is_no_gate_in_the_limit_of_bluntness() -> None:
    verify = count_letter(PAIRS, 0)
    plain = of_pairs(Sampled(RATIO))

    def gated(sharpness: float) -> Tensor:
        used = partial(outcome.sigmoid_gate, sharpness=sharpness)
        return of_pairs(Sampled(RATIO, outcome=(used,)), verify)

    assert close(gated(1e-9), plain, bound=1e-7)
    assert compare(gated(1.0), plain).relative_error > 1e-2
    assert compare(gated(20.0), plain).relative_error > compare(gated(1.0), plain).relative_error


def test_with_magnitudes_only_the_teacher_alone_teaches_nothing() -> None:
    verify = count_letter(PAIRS, 0)
    term = Sampled(RATIO, outcome=(partial(outcome.magnitude_only, low=0.5, high=1.0),))
    assert not of_pairs(term, lambda response: 1.0).any()
    assert not of_pairs(term).any()
    same = same_teacher(PAIRS)
    judged = descends(same, Sampled(reward.group_advantage), samples=2, verify=verify)
    assert close(descends(same, term, samples=2, verify=verify), judged)
    assert not close(of_pairs(term, verify), judged, bound=1e-2)
