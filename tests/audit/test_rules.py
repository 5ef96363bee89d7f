"""Composition rules: each fires where it should, stays silent beside it, and gives true reasons."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import Tensor

from opd import methods
from opd.audit import (
    RunFacts,
    World,
    compare,
    examine,
    local_gradient,
    random_tree,
    sequence_reverse_kl_gradient,
)
from opd.audit import rules as module
from opd.catalog import formulas, rules
from opd.formula import credit, divergence, outcome, reward, routing, surrogate, weight
from opd.formula import support as supports
from opd.objective import Dense, Method, Objective, Regulariser, Routed, Sampled, Term
from opd.schedule import Linear
from opd.training.config import load
from opd.training.session import build_method
from opd.types import StateSource, TeacherView
from tests.audit.worlds import EXACT, descends

ROOT = Path(__file__).resolve().parents[2]
LEVELS = ("refused", "must be declared", "note", "allowed")

# --------------------------------------------------------------------------------------------
# Compositions


def composed(
    *terms: Term, states: StateSource | None = None, views: Sequence[TeacherView] = ()
) -> Method:
    """A method of these terms; views that are not given go without saying."""
    objective = Objective(*terms)
    read = objective.views() | {part for view in views for part, _ in view.parts}
    missing = sorted(read - {"student", *(view.name for view in views)})
    made = [
        TeacherView(name, "initial_student" if name == "reference" else "teacher")
        for name in missing
    ]
    return Method(objective, states or StateSource(), (*views, *made))


def fired(method: Method, run: RunFacts | None = None) -> set[str]:
    return {remark.rule for remark in examine(method, run)}


def k1(student_logp: Tensor, teacher_logp: Tensor) -> Tensor:
    return student_logp - teacher_logp


def minus_k3(teacher_logp: Tensor, student_logp: Tensor) -> Tensor:
    ratio = (teacher_logp - student_logp).detach()
    return -(torch.expm1(ratio) - ratio)


def clamped_forward_kl(student_log_probs: Tensor, teacher_log_probs: Tensor) -> Tensor:
    return divergence.forward_kl(student_log_probs, teacher_log_probs).clamp(min=0.0)


def clamped_k3(teacher_logp: Tensor, student_logp: Tensor) -> Tensor:
    return divergence.forward_kl_k3(student_logp, teacher_logp).clamp(max=10.0)


def agreement_at_k(student_log_probs: Tensor, teacher_log_probs: Tensor) -> Tensor:
    return -divergence.jensen_shannon(student_log_probs, teacher_log_probs).detach()


def own_support(tokens: Tensor) -> Tensor:
    return tokens.unsqueeze(-1)


def engine_log_ratio(teacher_logp: Tensor, sampler_logp: Tensor) -> Tensor:
    return (teacher_logp - sampler_logp).detach()


def own_importance(student_logp: Tensor, sampler_logp: Tensor, advantage: Tensor) -> Tensor:
    return -(student_logp - sampler_logp).exp() * advantage


def own_ratio(student_logp: Tensor, old_logp: Tensor) -> Tensor:
    return (student_logp - old_logp).detach().exp()


def squared_drift(student_logp: Tensor, sampler_logp: Tensor) -> Tensor:
    return (student_logp - sampler_logp).square()


def likely(student_logp: Tensor) -> Tensor:
    return (student_logp > -2).to(student_logp.dtype).detach()


def raises(student_logp: Tensor, teacher_logp: Tensor) -> Tensor:
    raise RuntimeError("no")


RATIO = reward.teacher_log_ratio
TOP = partial(supports.student_top_k, k=4)
SEVERAL = RunFacts(updates_per_rollout=4)
BY_RATIO = (partial(weight.update_ratio, cap=2.0),)
COOLER = RunFacts(temperature=0.7)
NUCLEUS = RunFacts(top_p=0.9)
GROUPS = RunFacts(samples_per_prompt=4)
CLIPPED = partial(surrogate.clipped, low=0.2, high=0.2)
TRUNCATED = partial(surrogate.truncated_importance, cap=2.0)
DATA = StateSource(student=0.0, data=1.0)
HALF_DATA = StateSource(student=0.5, data=0.5)
REPLAY = StateSource(student=0.5, replay=0.5, replay_steps=4)
EMA = TeacherView("teacher", "ema_student", "{answer}", decay=0.99)
TWO_TEACHERS = (
    Dense(divergence.reverse_kl, against="teacher.maths"),
    Dense(divergence.reverse_kl, against="teacher.code"),
)
GATED = tuple(
    replace(term, weights=(gate,))
    for term, gate in zip(TWO_TEACHERS, (weight.in_span, weight.in_consensus), strict=True)
)
PULL = Dense(divergence.reverse_kl, against="reference", coef=0.1)


def average(*names: str, sign: float = 1.0) -> TeacherView:
    first, *others = names
    parts = ((first, 0.5), *((name, sign * 0.5) for name in others))
    return TeacherView("teacher.mean", "combination", parts=parts)


AGAINST_MEAN = Dense(divergence.reverse_kl, against="teacher.mean")


def routed(**changes: object) -> Routed:
    settings: dict[str, object] = {
        "source": Sampled(RATIO),
        "candidates": routing.raised,
        "support": partial(supports.routing_support, teacher_k=4, student_k=4),
        "tail": "renormalise",
    }
    return Routed(**{**settings, **changes})  # type: ignore[arg-type]


@dataclass(frozen=True)
class Case:
    """Compositions on both sides of a rule, each with how it is run."""

    fires: Sequence[tuple[Method, RunFacts]]
    silent: Sequence[tuple[Method, RunFacts]]
    where: str = "method.objective"


def plain(*made: Method) -> list[tuple[Method, RunFacts]]:
    return [(method, RunFacts()) for method in made]


def under(run: RunFacts, *made: Method) -> list[tuple[Method, RunFacts]]:
    return [(method, run) for method in made]


CASES: dict[str, Case] = {
    "stale-rewards": Case(
        fires=[
            *under(SEVERAL, composed(Sampled(reward.cached_log_ratio, surrogate=CLIPPED))),
            *under(SEVERAL, composed(Sampled(engine_log_ratio, surrogate=TRUNCATED))),
            *plain(composed(Sampled(reward.cached_log_ratio, surrogate=CLIPPED), states=REPLAY)),
        ],
        silent=[
            *plain(composed(Sampled(reward.cached_log_ratio))),
            *under(SEVERAL, composed(Sampled(RATIO, surrogate=CLIPPED))),
            *under(SEVERAL, composed(Sampled(reward.cached_log_ratio, coef=0.0))),
        ],
    ),
    "stale-tokens": Case(
        fires=[
            *under(SEVERAL, composed(Sampled(RATIO)), composed(Dense(divergence.reverse_kl_k2))),
            *plain(composed(Sampled(RATIO), states=REPLAY)),
            # what is replayed was drawn at another temperature: nobody remembers its old_logp
            *under(COOLER, composed(Sampled(RATIO, surrogate=CLIPPED), states=REPLAY)),
        ],
        silent=[
            *under(SEVERAL, composed(Sampled(RATIO, surrogate=CLIPPED))),
            *under(
                SEVERAL, composed(Sampled(RATIO, weights=(partial(weight.update_ratio, cap=2.0),)))
            ),
            *under(SEVERAL, composed(Dense(divergence.reverse_kl))),
            *under(SEVERAL, composed(Sampled(reward.one), states=DATA)),
            *under(SEVERAL, composed(Sampled(RATIO), states=DATA)),
            *plain(composed(Sampled(RATIO, surrogate=CLIPPED), states=REPLAY)),
            *under(COOLER, composed(Sampled(RATIO, surrogate=TRUNCATED), states=REPLAY)),
        ],
    ),
    "foreign-tokens": Case(
        fires=plain(
            composed(Sampled(RATIO), states=DATA),
            composed(Sampled(RATIO, surrogate=CLIPPED), states=HALF_DATA),
            composed(Sampled(RATIO, surrogate=TRUNCATED), states=HALF_DATA),
            composed(Dense(divergence.reverse_kl_k2), states=StateSource(student=0.0, teacher=1.0)),
            composed(Sampled(RATIO), states=StateSource(interleave=4)),
            composed(
                Sampled(RATIO, surrogate=TRUNCATED, rows="student"),
                states=StateSource(interleave=4),
            ),
            composed(Sampled(RATIO, rows="student"), states=StateSource(rewrite=0.5)),
            composed(Sampled(RATIO), states=StateSource(mixture=Linear(0.5, 0.0, 10))),
        ),
        silent=plain(
            composed(Sampled(RATIO)),
            composed(Sampled(RATIO, rows="student"), states=HALF_DATA),
            composed(Sampled(reward.one), states=DATA),
            composed(Dense(divergence.reverse_kl), states=HALF_DATA),
            composed(Sampled(RATIO, rows="student"), states=StateSource(teacher_prefix=4)),
            composed(Sampled(RATIO, surrogate=TRUNCATED), states=StateSource(interleave=4)),
            composed(Sampled(RATIO, surrogate=TRUNCATED), states=StateSource(mixture=0.2)),
            composed(
                Sampled(
                    reward.group_deviation,
                    surrogate=partial(surrogate.shaped_probability, half_at=0.1),
                    rows="teacher",
                ),
                states=StateSource(student=0.5, teacher=0.5),
            ),
        ),
    ),
    "ratio-to-data": Case(
        fires=plain(
            composed(
                Dense(divergence.forward_kl, weights=(partial(weight.engine_ratio, cap=2.0),)),
                states=HALF_DATA,
            ),
            composed(Sampled(reward.one, surrogate=TRUNCATED, rows="data"), states=HALF_DATA),
        ),
        silent=plain(
            composed(Sampled(RATIO, surrogate=TRUNCATED, rows="student"), states=HALF_DATA),
            composed(Sampled(RATIO, surrogate=TRUNCATED)),
            composed(Sampled(reward.one, rows="data"), states=HALF_DATA),
        ),
    ),
    "sampler-mismatch": Case(
        fires=[
            *under(COOLER, composed(Sampled(RATIO)), composed(Dense(divergence.forward_kl_k3))),
            *under(COOLER, composed(Sampled(RATIO, surrogate=CLIPPED))),
            *under(RunFacts(temperature=0.0), composed(Sampled(RATIO, surrogate=TRUNCATED))),
            *under(NUCLEUS, composed(Sampled(RATIO, surrogate=TRUNCATED))),
            *under(RunFacts(top_k=20), composed(Sampled(RATIO, surrogate=TRUNCATED))),
            *under(COOLER, composed(routed())),
        ],
        silent=[
            *under(COOLER, composed(Sampled(RATIO, surrogate=TRUNCATED))),
            *under(COOLER, composed(Dense(divergence.reverse_kl))),
            *under(COOLER, composed(Sampled(reward.one), states=DATA)),
            *under(
                COOLER, Method(Objective(Sampled(RATIO), temperature=0.7), views=(TeacherView(),))
            ),
            *plain(composed(Sampled(RATIO))),
        ],
        where="sampler",
    ),
    "unbounded-ratio": Case(
        fires=under(
            SEVERAL,
            composed(Sampled(RATIO, surrogate=surrogate.importance)),
            composed(Dense(divergence.corrected_k3)),
            composed(Sampled(RATIO, surrogate=own_importance)),
            composed(Dense(divergence.reverse_kl_k2, weights=(own_ratio,))),
            composed(Sampled(RATIO, surrogate=partial(surrogate.truncated_importance, cap=1e7))),
        ),
        silent=[
            *under(
                SEVERAL,
                composed(Dense(divergence.reverse_kl_k2, weights=BY_RATIO)),
                composed(Sampled(RATIO, surrogate=TRUNCATED)),
                composed(Sampled(RATIO, surrogate=CLIPPED), Regulariser(squared_drift)),
            ),
            *plain(composed(Sampled(RATIO, surrogate=own_importance))),
            *plain(composed(Sampled(RATIO, surrogate=surrogate.importance))),
            *under(SEVERAL, composed(Sampled(RATIO, surrogate=CLIPPED))),
        ],
    ),
    "unnormalised-top-k-reverse-kl": Case(
        fires=plain(
            composed(
                Dense(divergence.reverse_kl, support=TOP, tail="truncate", accept_collapse=True)
            )
        ),
        silent=plain(
            composed(Dense(divergence.truncated_reverse_kl, support=TOP, tail="truncate")),
            composed(Dense(divergence.reverse_kl, support=TOP, tail="bucket")),
        ),
    ),
    "coarse-comparison": Case(
        fires=plain(
            composed(Dense(divergence.reverse_kl, support=supports.sampled, tail="bucket"))
        ),
        silent=plain(
            composed(Dense(divergence.reverse_kl, support=TOP, tail="bucket")),
            composed(Dense(divergence.reverse_kl_k2)),
            composed(Dense(divergence.forward_kl, support=supports.sampled, tail="truncate")),
        ),
    ),
    "one-entry-comparison": Case(
        fires=plain(
            composed(Dense(divergence.reverse_kl, support=supports.sampled, tail="renormalise")),
            composed(
                Dense(
                    divergence.forward_kl,
                    support=partial(supports.teacher_top_k, k=1),
                    tail="renormalise",
                )
            ),
        ),
        silent=plain(
            composed(
                Dense(
                    divergence.forward_kl,
                    support=partial(supports.teacher_top_k, k=1),
                    tail="teacher_renormalise",
                )
            ),
            composed(Dense(divergence.reverse_kl, support=TOP, tail="renormalise")),
            composed(
                Dense(
                    divergence.candidate_advantage_loss,
                    support=partial(supports.student_top_k, k=1),
                    tail="renormalise",
                )
            ),
        ),
    ),
    "top-k-as-baseline": Case(
        fires=plain(
            composed(Sampled(RATIO, baseline=credit.expected_reward, support=TOP, tail="bucket"))
        ),
        silent=plain(composed(Sampled(RATIO, baseline=credit.expected_reward))),
    ),
    "top-k-with-outcome-gate": Case(
        fires=plain(
            composed(
                Dense(
                    divergence.forward_kl,
                    support=partial(supports.teacher_top_k, k=8),
                    tail="bucket",
                    weights=(weight.incorrect,),
                )
            )
        ),
        silent=plain(composed(Dense(divergence.forward_kl, weights=(weight.incorrect,)))),
    ),
    "distribution-as-reward": Case(
        fires=[
            *plain(
                composed(Sampled(reward.expected_log_ratio)),
                composed(
                    Sampled(agreement_at_k, support=TOP, tail="renormalise", surrogate=CLIPPED)
                ),
                composed(Sampled(reward.expected_log_ratio, baseline=credit.expected_reward)),
                composed(
                    Sampled(reward.expected_log_ratio, credit=partial(credit.windowed, window=1))
                ),
                composed(Sampled(reward.expected_log_ratio, reduction="sequence_mean")),
                composed(Sampled(reward.expected_log_ratio, surrogate=CLIPPED), states=REPLAY),
            ),
            # a ratio to whoever drew the tokens makes them the student's own again
            *under(
                SEVERAL,
                composed(Sampled(reward.expected_log_ratio, surrogate=CLIPPED)),
                composed(Sampled(reward.expected_log_ratio, surrogate=TRUNCATED)),
                composed(Sampled(reward.expected_log_ratio, weights=BY_RATIO)),
            ),
            *under(COOLER, composed(Sampled(reward.expected_log_ratio, surrogate=TRUNCATED))),
        ],
        silent=[
            *plain(
                composed(Sampled(RATIO)),
                composed(Sampled(reward.sign_total_variation)),
                composed(Sampled(reward.expected_log_ratio, credit=credit.future)),
                composed(Sampled(reward.expected_log_ratio, credit=credit.return_to_go)),
                composed(Sampled(reward.expected_log_ratio, weights=(weight.trust,))),
                composed(Sampled(reward.expected_log_ratio, outcome=(outcome.agree_in_sign,))),
                # on the chosen token alone the distribution is about that token
                composed(Sampled(agreement_at_k, support=supports.sampled, tail="bucket")),
                # of a support of the user's own it is not known
                composed(Sampled(agreement_at_k, support=own_support, tail="bucket")),
            ),
            *under(COOLER, composed(Sampled(reward.expected_log_ratio))),
            *under(NUCLEUS, composed(Sampled(reward.expected_log_ratio, surrogate=TRUNCATED))),
            *plain(
                composed(Sampled(reward.expected_log_ratio), states=REPLAY),
                composed(Sampled(reward.expected_log_ratio), states=DATA),
            ),
        ],
    ),
    "constant-advantage": Case(
        fires=[
            *plain(
                composed(Sampled(reward.length_cost)),
                composed(Sampled(reward.one)),
                composed(Sampled(partial(reward.overlong_cost, start=2, limit=4))),
                composed(Sampled(reward.length_cost, credit=credit.standardised)),
                composed(Sampled(reward.length_cost, baseline=credit.batch_mean)),
            ),
            *under(SEVERAL, composed(Sampled(reward.one, surrogate=CLIPPED))),
            *under(COOLER, composed(Sampled(reward.one, surrogate=TRUNCATED))),
        ],
        silent=[
            *plain(
                composed(Sampled(reward.length_cost, credit=credit.return_to_go)),
                composed(Sampled(reward.one), states=DATA),
                composed(Sampled(reward.one, weights=(weight.correct,))),
                composed(Sampled(reward.length_cost, reduction="sequence_mean")),
                composed(Sampled(RATIO, credit=credit.standardised)),
            ),
            *under(COOLER, composed(Sampled(reward.one))),
        ],
    ),
    "k1-back-propagated": Case(
        fires=[
            *plain(
                composed(Dense(k1)),
                composed(Dense(k1, reduction="sequence_mean")),
                composed(Dense(k1, weights=(likely,))),
                composed(Dense(k1), states=HALF_DATA),
                composed(Dense(k1), states=StateSource(student=0.0, teacher=1.0)),
            ),
            *under(SEVERAL, composed(Dense(k1)), composed(Dense(k1, weights=BY_RATIO))),
            *under(COOLER, composed(Dense(k1))),
            *under(NUCLEUS, composed(Dense(k1))),
        ],
        silent=plain(
            composed(Dense(divergence.reverse_kl_k2)),
            composed(Dense(k1, weights=(weight.trust,))),
            composed(Dense(raises)),
        ),
    ),
    "k3-as-reward": Case(
        fires=plain(
            composed(Sampled(minus_k3)),
            composed(Sampled(minus_k3, credit=credit.return_to_go)),
        ),
        silent=plain(
            composed(Sampled(RATIO)),
            composed(Sampled(reward.forward_kl_reward)),
            composed(Dense(divergence.reverse_kl), Sampled(minus_k3, credit=credit.future)),
        ),
    ),
    "clamped-loss": Case(
        fires=plain(
            composed(Dense(partial(divergence.capped_forward_kl, cap=0.05))),
            composed(Dense(partial(divergence.capped_forward_kl, cap=Linear(0.05, 1.0, 10)))),
            composed(Dense(clamped_forward_kl, support=TOP, tail="truncate")),
            composed(Dense(clamped_k3)),
        ),
        silent=plain(
            # a KL of whole distributions is never negative, so this clamp never bites
            composed(Dense(clamped_forward_kl)),
            composed(Dense(partial(divergence.capped_forward_kl, cap=100.0))),
            composed(Dense(divergence.forward_kl, support=TOP, tail="truncate")),
            composed(Dense(divergence.forward_kl_k3)),
            composed(Sampled(partial(reward.clipped_log_ratio, low=-5.0, high=5.0))),
        ),
    ),
    "route-without-alternatives": Case(
        fires=plain(composed(routed(support=supports.sampled, tail="bucket"))),
        silent=plain(composed(routed())),
    ),
    "baseline-with-routing": Case(
        fires=plain(composed(routed(source=Sampled(RATIO, baseline=credit.expected_reward)))),
        silent=plain(composed(routed())),
    ),
    "truncated-returns": Case(
        fires=[
            *plain(
                composed(Sampled(RATIO, credit=credit.return_to_go), states=StateSource(horizon=8)),
                composed(
                    Sampled(RATIO, credit=credit.rao_blackwell),
                    states=StateSource(horizon=Linear(4, 16, 10)),
                ),
            ),
            *under(
                RunFacts(max_new_tokens=8, longest_response=20),
                composed(Sampled(RATIO, credit=credit.return_to_go)),
            ),
        ],
        silent=[
            *under(
                RunFacts(max_new_tokens=64, longest_response=20),
                composed(Sampled(RATIO, credit=credit.return_to_go)),
            ),
            *under(
                RunFacts(max_new_tokens=64), composed(Sampled(RATIO, credit=credit.return_to_go))
            ),
            *plain(
                composed(Sampled(RATIO), states=StateSource(horizon=8)),
                composed(
                    Sampled(RATIO, credit=partial(credit.gae, gae_lambda=0.95)),
                    states=StateSource(horizon=8),
                ),
                composed(
                    Sampled(RATIO, credit=partial(credit.damped_future, future_weight=0.0)),
                    states=StateSource(horizon=8),
                ),
                composed(Dense(divergence.reverse_kl), states=StateSource(horizon=8)),
            ),
        ],
        where="",
    ),
    "partial-divergence-in-returns": Case(
        fires=plain(
            composed(Sampled(RATIO, credit=credit.rao_blackwell, support=TOP, tail="bucket")),
            composed(
                Sampled(
                    reward.expected_log_ratio, credit=credit.future, support=TOP, tail="renormalise"
                )
            ),
        ),
        silent=plain(
            composed(Sampled(RATIO, credit=credit.rao_blackwell)),
            composed(
                Sampled(RATIO, baseline=credit.expected_reward, support=TOP, tail="renormalise")
            ),
        ),
    ),
    "unlocalised-verdict": Case(
        fires=plain(
            composed(Sampled(reward.verdict_reward)),
            composed(Sampled(RATIO, outcome=(partial(outcome.terminal_verdict, scale=1.0),))),
            composed(
                Sampled(
                    RATIO,
                    outcome=(partial(outcome.terminal_verdict, scale=1.0),),
                    credit=credit.rao_blackwell,
                )
            ),
        ),
        silent=plain(
            composed(Sampled(reward.verdict_reward, credit=credit.return_to_go)),
            composed(
                Sampled(
                    RATIO,
                    outcome=(partial(outcome.terminal_verdict, scale=1.0),),
                    credit=credit.return_to_go,
                )
            ),
            composed(Sampled(RATIO, outcome=(outcome.agree_in_sign,))),
        ),
    ),
    "summed-returns": Case(
        fires=under(
            GROUPS,
            composed(Sampled(reward.group_advantage, credit=credit.return_to_go)),
            composed(Sampled(reward.group_deviation, credit=partial(credit.windowed, window=3))),
        ),
        silent=under(
            GROUPS,
            composed(Sampled(reward.group_advantage)),
            composed(Sampled(reward.group_advantage, credit=credit.length_normalised)),
            composed(Sampled(reward.verdict_reward, credit=credit.return_to_go)),
        ),
    ),
    "group-of-one": Case(
        fires=plain(
            composed(Sampled(reward.group_advantage)),
            composed(Sampled(RATIO, outcome=(partial(outcome.add_group_advantage, scale=1.0),))),
        ),
        silent=[
            *under(GROUPS, composed(Sampled(reward.group_advantage))),
            *plain(composed(Sampled(RATIO, baseline=credit.group_mean))),
        ],
        where="sampler.samples_per_prompt",
    ),
    "conflicting-teachers": Case(
        fires=plain(
            composed(*TWO_TEACHERS),
            composed(AGAINST_MEAN, views=[average("teacher", "teacher.code")]),
            composed(replace(TWO_TEACHERS[0], rows="student"), TWO_TEACHERS[1], states=HALF_DATA),
        ),
        silent=plain(
            composed(*GATED),
            composed(TWO_TEACHERS[0]),
            composed(
                replace(TWO_TEACHERS[0], rows="student"),
                replace(TWO_TEACHERS[1], rows="data"),
                states=HALF_DATA,
            ),
            composed(Dense(divergence.forward_kl), Dense(divergence.reverse_kl)),
            # what one teacher learnt since the other: a difference, no average
            composed(AGAINST_MEAN, views=[average("teacher", "teacher.before", sign=-1.0)]),
            composed(Dense(divergence.reverse_kl), PULL),
        ),
        where="method",
    ),
    "gated-teachers-with-reference": Case(
        fires=plain(composed(*GATED, PULL)), silent=plain(composed(*GATED), composed(PULL))
    ),
    "doubled-reference": Case(
        fires=plain(
            composed(PULL, Sampled(RATIO, against="reference", coef=0.1)),
            composed(PULL, Dense(divergence.forward_kl, against="reference")),
            composed(AGAINST_MEAN, PULL, views=[average("teacher", "reference")]),
        ),
        silent=plain(
            composed(Dense(divergence.reverse_kl), PULL),
            composed(AGAINST_MEAN, views=[average("teacher", "reference")]),
            composed(
                replace(PULL, weights=(weight.correct,)),
                replace(PULL, weights=(weight.incorrect,)),
            ),
            composed(replace(PULL, rows="student"), replace(PULL, rows="data"), states=HALF_DATA),
            # a self with the answer before it is no anchor
            composed(
                Dense(divergence.reverse_kl),
                PULL,
                views=[TeacherView("teacher", "initial_student", "{answer}")],
            ),
        ),
    ),
    "average-out-of-range": Case(
        fires=[
            *under(
                RunFacts(steps=100),
                composed(Dense(divergence.reverse_kl), views=[replace(EMA, decay=0.9999)]),
            ),
            *under(
                RunFacts(steps=100),
                composed(Dense(divergence.reverse_kl), views=[replace(EMA, decay=0.01)]),
            ),
        ],
        silent=[
            *under(RunFacts(steps=100), composed(Dense(divergence.reverse_kl), views=[EMA])),
            *under(
                RunFacts(steps=100, updates_per_rollout=10),
                composed(Dense(divergence.reverse_kl), views=[replace(EMA, decay=0.9999)]),
            ),
        ],
        where="method.views",
    ),
    "vanishing-divergence": Case(
        fires=plain(
            composed(Dense(partial(divergence.generalized_jsd, teacher_weight=0.01))),
            composed(Sampled(partial(reward.generalized_jsd_reward, teacher_weight=0.99))),
            composed(
                Dense(partial(divergence.generalized_jsd, teacher_weight=Linear(0.5, 0.99, 10)))
            ),
        ),
        silent=plain(composed(Dense(partial(divergence.generalized_jsd, teacher_weight=0.1)))),
    ),
}

UNMADE = {"top-k-without-tail", "discount-without-meaning"}
"""Rules whose fault no method can hold; tests of their own show who refuses it."""


def pairs(side: str) -> list[object]:
    return [
        pytest.param(name, method, run, id=f"{name}-{place}")
        for name, case in CASES.items()
        for place, (method, run) in enumerate(getattr(case, side))
    ]


@pytest.mark.parametrize(("name", "method", "run"), pairs("fires"))
def test_a_rule_fires_and_names_the_key(name: str, method: Method, run: RunFacts) -> None:
    found = [remark for remark in examine(method, run) if remark.rule == name]
    assert found
    for remark in found:
        assert remark.where.startswith(CASES[name].where)
        assert remark.level == rules()[name].level
        assert remark.message
        assert remark.way_out


@pytest.mark.parametrize(("name", "method", "run"), pairs("silent"))
def test_a_rule_is_silent_beside_its_fault(name: str, method: Method, run: RunFacts) -> None:
    assert name not in fired(method, run)


def test_every_rule_is_tried_on_both_sides() -> None:
    assert set(CASES) | UNMADE == set(rules())
    for name, case in CASES.items():
        assert case.fires, name
        assert case.silent, name


def test_every_rule_says_all_that_the_page_shows() -> None:
    assert set(module.__all__) == {rule.function for rule in rules().values()}
    for rule in rules().values():
        assert rule.level in LEVELS, rule.name
        assert rule.says.endswith("."), rule.name
        assert all((rule.reason, rule.way_out, rule.source)), rule.name
        named = re.findall(r'"(\w+)"', rule.way_out)
        known = {name.partition(".")[2] for name in formulas()}
        known |= {*supports.TAILS, *credit.MEANINGS}
        known |= {"student", "data", "initial_student", "reference"}
        assert set(named) <= known, (rule.name, set(named) - known)


WAYS_OUT = (
    # a term, the rule that it breaks, what it is told, the term that does so
    (Dense(divergence.corrected_k3), "unbounded-ratio", "update_ratio", "reverse_kl_k2"),
    (Dense(divergence.forward_kl_k3), "stale-tokens", "update_ratio", "forward_kl_k3"),
)


@pytest.mark.parametrize(("term", "rule", "told", "mended"), WAYS_OUT)
def test_a_dense_term_is_told_a_way_out_of_its_own_that_leads_out(
    term: Dense, rule: str, told: str, mended: str
) -> None:
    (remark,) = [found for found in examine(composed(term), SEVERAL) if found.rule == rule]
    assert "surrogate" not in remark.way_out
    assert told in remark.way_out
    better = replace(term, divergence=getattr(divergence, mended), weights=BY_RATIO)
    assert fired(composed(better), SEVERAL) == set()
    whole = replace(term, divergence=divergence.reverse_kl)
    assert fired(composed(whole), SEVERAL) == set()


def test_a_sampled_term_is_told_surrogates_that_lead_out() -> None:
    (remark,) = examine(composed(Sampled(RATIO)), SEVERAL)
    told = re.findall(r'"(\w+)"', remark.way_out)
    knobs = {"clipped": {"low": 0.2, "high": 0.2}, "truncated_importance": {"cap": 2.0}}
    assert set(told) == set(knobs)
    for name in told:
        term = Sampled(RATIO, surrogate=partial(getattr(surrogate, name), **knobs[name]))
        assert fired(composed(term), SEVERAL) == set()


def test_a_run_without_facts_samples_from_the_student_as_it_is() -> None:
    assert examine(composed(Dense(divergence.reverse_kl))) == ()
    assert fired(composed(Sampled(RATIO, surrogate=CLIPPED))) == set()


# --------------------------------------------------------------------------------------------
# What ships


@pytest.mark.parametrize("folder", ["recipes", "recipes/methods"])
def test_a_recipe_declares_what_it_does_and_nothing_else(folder: str) -> None:
    files = sorted((ROOT / folder).glob("*.toml"))
    assert len(files) > 20
    for file in files:
        run = load(file)
        sampler, train = run.config.sampler, run.config.train
        facts = RunFacts(
            temperature=sampler.temperature,
            top_p=sampler.top_p,
            top_k=sampler.top_k,
            samples_per_prompt=sampler.samples_per_prompt,
            max_new_tokens=sampler.max_new_tokens,
            updates_per_rollout=train.updates_per_rollout,
            steps=train.steps,
        )
        remarks = examine(build_method(run), facts)
        assert not [r for r in remarks if r.level in ("refused", "note")], file
        asked = {r.rule for r in remarks if r.level == "must be declared" and not r.declared}
        assert asked == set(run.config.check.declared), file


def test_what_the_published_methods_break_is_known() -> None:
    broken = {
        name: found
        for name in methods.__all__
        if (
            found := {
                remark.rule
                for remark in examine(getattr(methods, name)(), GROUPS)
                if remark.level != "allowed"
            }
        )
    }
    clamped = {name: {"clamped-loss"} for name in ("opsd", "paint", "pw_opsd", "ssopd")}
    foreign = {name: {"foreign-tokens"} for name in ("lightning_opd", "relay_opd")}
    averaged = {"deepseek_v4": {"conflicting-teachers"}}
    unnormalised = {"opcd": {"unnormalised-top-k-reverse-kl"}}
    assert broken == {**clamped, **foreign, **averaged, **unnormalised}


# --------------------------------------------------------------------------------------------
# Refused where it is made


def test_a_support_without_a_tail_is_refused_by_every_kind_of_term() -> None:
    for make in (
        lambda: Dense(divergence.forward_kl, support=TOP),
        lambda: Sampled(RATIO, support=TOP),
        lambda: Regulariser(divergence.student_entropy, support=TOP),
        lambda: routed(tail=""),
    ):
        with pytest.raises(ValueError, match="must say what becomes of the rest"):
            make()


def test_a_discount_without_a_meaning_is_refused_by_the_formulas_that_discount() -> None:
    mask = torch.ones(1, 3, dtype=torch.bool)
    ones = torch.ones(1, 3)
    for discount in (credit.discounted, credit.bounded_return):
        with pytest.raises(ValueError, match="must say what it means"):
            discount(ones, mask, gamma=0.9, meaning="")
    with pytest.raises(ValueError, match="must say what it means"):
        credit.gae(ones, ones, torch.zeros(1), mask, gae_lambda=0.9, gamma=0.9)
    credit.gae(ones, ones, torch.zeros(1), mask, gae_lambda=0.9)  # no discount, no meaning


def test_a_live_reverse_kl_on_raw_entries_is_refused_unless_it_is_accepted() -> None:
    with pytest.raises(ValueError, match="accept_collapse"):
        Dense(divergence.reverse_kl, support=TOP, tail="truncate")


def test_a_route_by_a_score_of_single_tokens_is_refused_where_the_method_is_made() -> None:
    view = TeacherView(
        "teacher.way",
        "combination",
        parts=(("teacher", 1.0), ("teacher.before", -1.0)),
        normalised=False,
    )
    route = routed(source=Sampled(RATIO, against="teacher.way"))
    with pytest.raises(ValueError, match="no distribution"):
        composed(route, views=[view])


# --------------------------------------------------------------------------------------------
# The reasons, in exact expectation

WORLD = random_tree(1, end_id=0)


def of_another(world: World, temperature: float = 1.0) -> Tensor:
    """Logits of a policy that is not the student: another draw, or the student sharpened."""
    if temperature != 1.0:
        return world.student_logits / temperature
    return random_tree(77, end_id=0).student_logits


def is_near(found: Tensor, target: Tensor) -> bool:
    return compare(found, target).relative_error < EXACT


def local(behaviour: Tensor | None = None) -> Tensor:
    return local_gradient(WORLD, divergence.reverse_kl, behaviour=behaviour)


def test_a_frozen_reward_moves_a_student_that_equals_its_teacher() -> None:
    at_teacher = replace(WORLD, student_logits=WORLD.views["teacher"])
    old = of_another(WORLD)

    def moved(paid: Callable[..., Tensor]) -> float:
        term = Sampled(paid, surrogate=surrogate.importance)
        return float(descends(at_teacher, term, behaviour=old).norm())

    assert moved(reward.cached_log_ratio) > 0.1
    assert moved(RATIO) < EXACT


def test_tokens_of_another_policy_need_the_ratio() -> None:
    other = of_another(WORLD)
    weighed = descends(WORLD, Sampled(RATIO, surrogate=surrogate.importance), behaviour=other)
    assert is_near(weighed, local(other))
    assert not is_near(descends(WORLD, Sampled(RATIO), behaviour=other), local(other))
    two = descends(WORLD, Dense(divergence.reverse_kl_k2), behaviour=other)
    assert not is_near(two, local(other))
    whole = descends(WORLD, Dense(divergence.reverse_kl), behaviour=other)
    assert is_near(whole, local(other))


def test_a_ratio_makes_good_a_temperature_and_not_a_truncation() -> None:
    loose = partial(surrogate.truncated_importance, cap=1e9)
    cooler = of_another(WORLD, 0.7)
    assert not is_near(descends(WORLD, Sampled(RATIO), behaviour=cooler), local(cooler))
    assert is_near(
        descends(WORLD, Sampled(RATIO, surrogate=loose), behaviour=cooler), local(cooler)
    )
    # nothing but the two likeliest of three tokens; finite logits stand for minus infinity
    least = WORLD.student_logits.argmin(-1, keepdim=True)
    cut = WORLD.student_logits.scatter(-1, least, -60.0)
    assert not is_near(descends(WORLD, Sampled(RATIO, surrogate=loose), behaviour=cut), local(cut))


def test_the_variance_of_the_ratio_is_the_chi_squared_divergence() -> None:
    student, old = torch.randn(2, 6, dtype=torch.float64).softmax(-1)
    ratio = student / old
    variance = (old * ratio.square()).sum() - (old * ratio).sum().square()
    assert math.isclose(variance, ((student - old).square() / old).sum(), rel_tol=1e-12)


def test_a_ratio_to_nobody_is_a_probability() -> None:
    old = torch.tensor([-0.1, -9.0])
    assert torch.equal(weight.engine_ratio(old, torch.zeros(2), cap=2.0), old.exp())


@pytest.mark.parametrize("name", ["distribution-as-reward", "constant-advantage"])
def test_an_advantage_that_no_token_changes_teaches_nothing(name: str) -> None:
    tried = 0
    for method, _ in (case for case in CASES[name].fires if case[1] == RunFacts()):
        (term,) = method.objective.terms
        if isinstance(term, Sampled) and term.tail == "":
            samples = 2 if term.baseline is not None or "standard" in str(term.credit) else 1
            small = random_tree(3, horizon=2)
            assert descends(small, term, samples=samples).norm() < EXACT
            tried += 1
    assert tried >= 3


def test_the_same_numbers_teach_as_rewards_of_later_prefixes() -> None:
    later = descends(
        WORLD,
        Dense(divergence.reverse_kl),
        Sampled(reward.expected_log_ratio, credit=credit.future),
    )
    assert is_near(later, sequence_reverse_kl_gradient(WORLD))
    cost = descends(WORLD, Sampled(reward.length_cost, credit=credit.return_to_go))
    assert cost.norm() > 0.01


def test_an_advantage_of_the_prefix_teaches_nothing_behind_a_ratio_either() -> None:
    other = of_another(WORLD)
    term = Sampled(reward.expected_log_ratio, surrogate=surrogate.importance)
    assert descends(WORLD, term, behaviour=other).norm() < EXACT
    assert descends(WORLD, Sampled(reward.expected_log_ratio), behaviour=other).norm() > 0.01


def test_no_text_brings_the_teacher_into_k1() -> None:
    teacher = replace(WORLD, views={"teacher": of_another(WORLD, 0.5)})
    for behaviour in (None, of_another(WORLD)):
        one, two = (descends(world, Dense(k1), behaviour=behaviour) for world in (WORLD, teacher))
        assert torch.equal(one, two)


def test_k1_differentiated_is_zero_and_k2_is_not() -> None:
    assert descends(WORLD, Dense(k1)).norm() < EXACT
    assert is_near(descends(WORLD, Dense(divergence.reverse_kl_k2)), local())


def test_k3_pays_its_own_token_wrongly_and_later_ones_rightly() -> None:
    assert not is_near(descends(WORLD, Sampled(minus_k3)), local())
    # both sides of a disagreement are punished
    both = minus_k3(torch.tensor([-1.0, -3.0]), torch.tensor([-2.0, -2.0]))
    assert (both < 0).all()
    right = descends(WORLD, Dense(divergence.reverse_kl), Sampled(minus_k3, credit=credit.future))
    assert is_near(right, sequence_reverse_kl_gradient(WORLD))


def test_a_coarse_comparison_is_not_the_divergence_of_its_name() -> None:
    term = Dense(divergence.reverse_kl, support=supports.sampled, tail="bucket")
    found = compare(descends(WORLD, term), local())
    assert found.cosine < 0.99
    assert found.relative_error > 0.1


def test_one_entry_renormalised_is_nothing() -> None:
    for method, _ in CASES["one-entry-comparison"].fires:
        assert descends(WORLD, *method.objective.terms).norm() == 0


def test_a_clamp_stops_teaching_what_is_lacking_most() -> None:
    teacher = torch.tensor([[12.0, 0.0, 0.0]], dtype=torch.float64).log_softmax(-1)
    logits = torch.tensor([[-12.0, 0.0, 0.0]], dtype=torch.float64, requires_grad=True)

    def push(loss: Callable[..., Tensor]) -> float:
        (slope,) = torch.autograd.grad(loss(logits.log_softmax(-1), teacher).sum(), logits)
        return float(-slope[0, 0])

    assert push(divergence.forward_kl) > 0.9
    assert push(partial(divergence.capped_forward_kl, cap=0.05)) <= 0


def test_a_route_on_the_chosen_token_has_no_candidates() -> None:
    term = routed(support=supports.sampled, tail="bucket", mode="add", gates=())
    alone = descends(WORLD, term.source)
    assert is_near(descends(WORLD, term), alone)
    whole = routed(support=supports.full, tail="", mode="add", gates=())
    assert not is_near(descends(WORLD, whole), alone)


def test_returns_that_stop_at_a_limit_are_of_the_first_tokens() -> None:
    short = replace(WORLD, horizon=2)
    found = descends(short, Sampled(RATIO, credit=credit.return_to_go))
    assert is_near(found, sequence_reverse_kl_gradient(short))
    assert compare(found, sequence_reverse_kl_gradient(WORLD)).relative_error > 0.1


def test_a_divergence_on_a_support_is_a_baseline_and_no_future_reward() -> None:
    two = partial(supports.student_top_k, k=1)
    plain_return = descends(WORLD, Sampled(RATIO, credit=credit.return_to_go))
    on_two = {"support": two, "tail": "bucket"}
    baseline = Sampled(RATIO, credit=credit.return_to_go, baseline=credit.expected_reward, **on_two)  # type: ignore[arg-type]
    assert is_near(descends(WORLD, baseline), plain_return)
    future = Sampled(RATIO, credit=credit.rao_blackwell, **on_two)  # type: ignore[arg-type]
    assert not is_near(descends(WORLD, future), plain_return)
    assert is_near(descends(WORLD, Sampled(RATIO, credit=credit.rao_blackwell)), plain_return)


def test_a_verdict_reaches_the_last_token_alone_unless_credit_sums() -> None:
    mask = torch.tensor([[True, True, True, False]])
    paid = reward.verdict_reward(torch.tensor([1.0]), mask)
    assert credit.immediate(paid).tolist() == [[0, 0, 1, 0]]
    assert credit.rao_blackwell(paid, torch.zeros(1, 4), mask).tolist() == [[0, 0, 1, 0]]
    assert credit.return_to_go(paid, mask).tolist() == [[1, 1, 1, 0]]


def test_a_return_summed_again_counts_the_tokens_that_follow() -> None:
    mask = torch.ones(2, 3, dtype=torch.bool)
    advantage = reward.group_deviation(torch.tensor([1.0, 0.0]), torch.zeros(2).long(), mask)
    assert credit.return_to_go(advantage, mask)[0].tolist() == [1.5, 1.0, 0.5]


def test_a_group_of_one_says_nothing() -> None:
    mask = torch.ones(1, 3, dtype=torch.bool)
    assert not reward.group_advantage(torch.ones(1), torch.zeros(1).long(), mask).any()


def test_averaged_teachers_meet_in_a_geometric_or_an_arithmetic_mean() -> None:
    first, second = torch.randn(2, 5, dtype=torch.float64).log_softmax(-1)

    def slope(student: Tensor, loss: Callable[..., Tensor]) -> float:
        logits = student.clone().requires_grad_()
        total = sum(loss(logits.log_softmax(-1), teacher) for teacher in (first, second))
        assert isinstance(total, Tensor)
        (found,) = torch.autograd.grad(total, logits)
        return float(found.norm())

    geometric = ((first + second) / 2).log_softmax(-1)
    mixture = torch.logaddexp(first, second) - math.log(2)
    assert slope(geometric, divergence.reverse_kl) < EXACT < slope(mixture, divergence.reverse_kl)
    assert slope(mixture, divergence.forward_kl) < EXACT < slope(geometric, divergence.forward_kl)


def test_a_reference_as_reward_and_as_loss_is_one_pull_of_twice_the_size() -> None:
    world = replace(WORLD, views={**WORLD.views, "reference": of_another(WORLD)})
    paid = Sampled(RATIO, against="reference", coef=0.1)
    once = descends(world, PULL)
    assert is_near(descends(world, paid), once)
    assert is_near(descends(world, paid, PULL), 2 * once)


def test_a_reference_inside_a_combination_pulls_too() -> None:
    mean = (0.7 * WORLD.views["teacher"] + 0.3 * of_another(WORLD)).log_softmax(-1)
    world = replace(
        WORLD, views={**WORLD.views, "reference": of_another(WORLD), "teacher.mean": mean}
    )
    apart = descends(
        world,
        Dense(divergence.reverse_kl, coef=0.7),
        Dense(divergence.reverse_kl, against="reference", coef=0.3),
    )
    assert is_near(descends(world, AGAINST_MEAN), apart)
