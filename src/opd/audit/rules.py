"""Composition rules: what can be wrong with a method whose every part is right.

One function per rule. Its name is the rule's, with hyphens; its docstring is what `opd list rules`
and `docs/rules.md` show; what it returns is where a method, run as it will be, does what the rule
is about. A rule's level says what `opd check` makes of that:

    refused            an error: nobody can mean it
    must be declared   an error, unless `check.declared` of the run file names the rule: there are
                       uses, and the run should say that this is one
    note               worth knowing
    allowed            nothing: what looks alike and is right

A refused rule whose fault no `Method` can hold names who refuses it, and finds nothing here.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import combinations
from typing import Literal, cast

from opd import catalog
from opd.audit import conduct
from opd.audit.conduct import RunFacts
from opd.fields import FIELDS, positional_names
from opd.formula import credit, divergence, outcome, reward, support
from opd.objective import Dense, Method, Regulariser, Routed, Sampled, Term
from opd.types import Bound, TeacherView

__all__ = [
    "average_out_of_range",
    "baseline_with_routing",
    "clamped_loss",
    "coarse_comparison",
    "conflicting_teachers",
    "constant_advantage",
    "discount_without_meaning",
    "distribution_as_reward",
    "doubled_reference",
    "foreign_tokens",
    "gated_teachers_with_reference",
    "group_of_one",
    "k1_back_propagated",
    "k3_as_reward",
    "one_entry_comparison",
    "partial_divergence_in_returns",
    "ratio_to_data",
    "route_without_alternatives",
    "sampler_mismatch",
    "stale_rewards",
    "stale_tokens",
    "summed_returns",
    "top_k_as_baseline",
    "top_k_with_outcome_gate",
    "top_k_without_tail",
    "truncated_returns",
    "unbounded_ratio",
    "unlocalised_verdict",
    "unnormalised_top_k_reverse_kl",
    "vanishing_divergence",
]

Level = Literal["refused", "must be declared", "note", "allowed"]


@dataclass(frozen=True)
class Breach:
    """One place where a method does what a rule is about.

    Attributes:
        where: the key of the run file.
        message: what is done there.
        declared: the composition itself says that it is meant.
        way_out: what to do instead here; the rule's own if empty.
    """

    where: str
    message: str
    declared: bool = False
    way_out: str = ""


@dataclass(frozen=True)
class Remark:
    """A breach with the rule that it is of.

    Attributes:
        rule: the rule's name, as in `opd list rules`.
        level: the rule's.
        way_out: what to do instead, the breach's or else the rule's.
        where, message, declared: the breach's.
    """

    rule: str
    level: Level
    where: str
    message: str
    way_out: str
    declared: bool


def examine(method: Method, run: RunFacts | None = None) -> tuple[Remark, ...]:
    """Everything that the rules have to say about a method, in their order.

    Args:
        run: how it is run; a run that samples from the student as it is if None.
    """
    facts = RunFacts() if run is None else run
    return tuple(
        Remark(
            name,
            cast("Level", rule.level),
            breach.where,
            breach.message,
            breach.way_out or rule.way_out,
            breach.declared,
        )
        for name, rule in catalog.rules().items()
        for breach in globals()[rule.function](method, facts)
    )


UNMADE: tuple[Breach, ...] = ()
"""What a rule finds whose fault no `Method` can hold."""

OBJECTIVE = "method.objective"


# --------------------------------------------------------------------------------------------
# Who drew the tokens, and when


def stale_rewards(method: Method, run: RunFacts) -> Iterator[Breach]:
    """A log-ratio frozen at rollout time, rewarded in later updates too.

    Level: must be declared
    Reason: At a prefix the policy gradient of log teacher - log old is -grad KL(student || teacher)
        + grad KL(student || old). The second part vanishes only at the first update. Over many the
        reward is linear in the student, and largest with all mass on the token of the largest
        teacher / old: a student that equals the teacher does not stay there.
    Way out: reward = "teacher_log_ratio", which recomputes the student's side before every update;
        the teacher's log-probabilities are kept either way
    Source: Table 10 and Eq. 24 of arXiv:2606.22793; arXiv:2606.24143 measures the harm.
    """
    if conduct.is_stale(method, run):
        for label, term in conduct.sampled_terms(method):
            bound = Bound.of(term.reward)
            if conduct.is_frozen(bound):
                yield Breach(
                    OBJECTIVE,
                    f"{label!r} rewards {bound.short_name}, which is frozen at rollout time, and "
                    f"{_why_stale(method, run)}",
                )


def stale_tokens(method: Method, run: RunFacts) -> Iterator[Breach]:
    """A mean over the student's draws, taken over tokens that older weights drew, without a ratio.

    Level: must be declared
    Reason: The mean of reward times score is the wanted gradient over the present student's tokens
        only. Over those of older weights it needs the factor student / old; what remains then is
        that the prefixes are the older student's.
    Way out: surrogate "clipped" or "truncated_importance"; in a dense term the weight
        "update_ratio", or a divergence of whole distributions, which asks nobody who drew the token
    Source: Table 10 and section 4.3 of arXiv:2606.22793; arXiv:2606.24143.
    """
    if not conduct.is_stale(method, run):
        return
    # of replayed text `old_logp` is that of its rollout only where the sampler tells it
    observed = bool(
        conduct.sampler_differs(method, run)
        or method.states.data
        or method.states.teacher
        or method.states.helped
    )
    for label, term in _draws(method, ("student", "all")):
        if not conduct.student_writes(method, term):
            continue
        by_old = conduct.weighs_by_student_over(term, "old_logp")
        by_sampler = conduct.weighs_by_student_over(term, "sampler_logp")
        if by_sampler or (by_old and not (method.states.replay and observed)):
            continue
        yield Breach(
            OBJECTIVE,
            f"{label!r} is a mean over tokens that the student draws, {_why_stale(method, run)}, "
            + (
                "and of replayed text the old log-probabilities are those of the first update"
                if by_old
                else "and no ratio weighs the tokens"
            ),
            way_out=_weigh_by("sampler" if method.states.replay and observed else "old", term),
        )


def foreign_tokens(method: Method, run: RunFacts) -> Iterator[Breach]:
    """A mean over the student's draws, taken over tokens that it did not draw, without a ratio.

    Level: must be declared
    Reason: Over tokens of another writer the mean of reward times score is the gradient of no
        divergence: it lacks the factor student / writer. Who wrote the data is not known at all,
        and tokens that were let stand are a selection. The likelihood of a text, reward "one",
        needs no factor.
    Way out: rows = "student"; for text that a sampler wrote surrogate "truncated_importance", in a
        dense term the weight "importance"; or a divergence of whole distributions
    Source: section 4.3 of arXiv:2606.22793; the factor is importance sampling,
        doi:10.1198/106186008X320456.
    """
    for label, term in _draws(method, ("student", "data", "teacher", "all")):
        weighed = conduct.weighs_by_student_over(term, "sampler_logp")
        found = conduct.foreign_tokens(method, term, weighed=weighed)
        if found:
            yield Breach(
                OBJECTIVE,
                f"{label!r} is a mean over tokens that the student draws, and looks at "
                + " and ".join(found),
            )


def ratio_to_data(method: Method, run: RunFacts) -> Iterator[Breach]:
    """A ratio to the sampler on tokens of the data, which no sampler drew.

    Level: must be declared
    Reason: There `sampler_logp` is 0, so the ratio to it is a probability of the token: rare tokens
        of the data are switched off, however right they are.
    Way out: rows = "student" for the term with the ratio, and a term of its own for rows = "data"
    Source: `Rollout.sampler_logp`, 0 where a token was not sampled.
    """
    for label, term in conduct.terms(method):
        reads = conduct.weighs_by_sampler(term)
        if reads and method.states.data and term.rows in ("data", "all"):
            yield Breach(OBJECTIVE, f"{label!r} weighs tokens of the data by a ratio to a sampler")


def sampler_mismatch(method: Method, run: RunFacts) -> Iterator[Breach]:
    """A mean over the student's draws, while the sampler draws from another distribution.

    Level: must be declared
    Reason: Tokens drawn at another temperature need the factor student / sampler. Tokens outside a
        top_p, a top_k or the greedy choice are never drawn, so no factor brings them back, and the
        mean score of what is left is not zero: a constant added to the reward is no longer free. A
        divergence of whole distributions is only seen at other prefixes, which is a note.
    Way out: sampler.temperature equal to the objective's, top_p = 1 and top_k = 0; for another
        temperature alone, surrogate "truncated_importance", in a dense term the weight "importance"
    Source: the mean score of Eq. 4 of arXiv:2606.22793; a rollout example of ROLL does this.
    """
    keys = conduct.sampler_differs(method, run)
    cut_off = run.top_p < 1 or run.top_k > 0 or run.temperature == 0
    for label, term in _draws(method, ("student", "all")):
        weighed = conduct.weighs_by_sampler(term)
        if keys and method.states.student and (cut_off or not weighed):
            shown = ", ".join(f"{key} = {getattr(run, key):g}" for key in keys)
            yield Breach(
                f"sampler.{keys[0]}",
                f"{label!r} is a mean over tokens that the student draws at temperature "
                f"{method.objective.temperature:g}, and they are drawn with {shown}",
            )


def unbounded_ratio(method: Method, run: RunFacts) -> Iterator[Breach]:
    """An importance ratio without a bound, once it can leave 1.

    Of any function, a user's own too: the weight of a token whose ratio is e^14 is tried.

    Level: must be declared
    Reason: The ratio student / old has mean 1 and no largest value: its variance is the chi-squared
        divergence of the two, and one token can decide a step.
    Way out: surrogate "truncated_importance", "clipped" or "dual_clipped", each of which logs what
        it holds back; in a dense term "reverse_kl_k2" with the weight "update_ratio", whose cap is
        a bound, or a divergence of whole distributions
    Source: Ionides, doi:10.1198/106186008X320456; arXiv:1802.01561.
    """
    if not conduct.is_stale(method, run):
        return
    for label, term in conduct.terms(method):
        for bound in conduct.unbounded_ratios(term):
            yield Breach(
                OBJECTIVE,
                f"{label!r} multiplies by the ratio to whoever wrote as it is "
                f"({bound.short_name}), and {_why_stale(method, run)}",
                way_out=_bound_of(term),
            )


# --------------------------------------------------------------------------------------------
# Support


def top_k_without_tail(method: Method, run: RunFacts) -> Iterable[Breach]:
    """A support of some entries that does not say what becomes of the rest.

    Level: refused
    Reason: Renormalised, in a bucket or as they are, the same entries make three losses with three
        sets of stationary students. Refused where the term is made: `tail` has no default.
    Way out: tail = "bucket", "renormalise", "teacher_renormalise" or "truncate"
    Source: Table 10 and Eqs. 29 to 31 of arXiv:2606.22793.
    """
    return UNMADE


def unnormalised_top_k_reverse_kl(method: Method, run: RunFacts) -> Iterator[Breach]:
    """A reverse KL on entries as they are, differentiated in full.

    Level: must be declared
    Reason: On the whole vocabulary the +1 of its derivative has mean zero. On a support it is the
        gradient of the student's mass there, so descent also pushes the student out of the support
        on which it is compared; an entry rises only if the teacher gives it e times the student's
        mass. Refused where the term is made, unless the term sets accept_collapse.
    Way out: "truncated_reverse_kl", tail = "bucket" or tail = "renormalise"; accept_collapse = true
        on the term is its declaration
    Source: arXiv:2605.11182, which saw the collapse.
    """
    for label, term in conduct.dense_terms(method):
        if term.accept_collapse and term.tail == "truncate":
            yield Breach(
                OBJECTIVE,
                f"{label!r} sets accept_collapse; expect the student to leave the support",
                declared=True,
            )


def coarse_comparison(method: Method, run: RunFacts) -> Iterator[Breach]:
    """A divergence between the token that was chosen and everything else.

    Level: must be declared
    Reason: With the sampled token as support and the rest in a bucket, two numbers are compared on
        either side. Over tokens that the student draws the mean gradient is not that of the
        divergence on the vocabulary whose name the term bears, in size or in direction.
    Way out: a support of the k likeliest with tail = "bucket"; from the chosen token alone,
        "reverse_kl_k2", or a sampled term with reward "teacher_log_ratio"
    Source: Table 11 of arXiv:2606.22793 (the sampled token); TRL's served teacher at beta = 1.
    """
    for label, term in conduct.dense_terms(method):
        names = positional_names(Bound.of(term.divergence).function)
        chosen = Bound.of(term.support).function is support.sampled
        if chosen and term.tail == "bucket" and "student_log_probs" in names:
            yield Breach(
                OBJECTIVE,
                f"{label!r} compares the chosen token with one bucket of all the others and calls "
                f"it {Bound.of(term.divergence).short_name}",
            )


def one_entry_comparison(method: Method, run: RunFacts) -> Iterator[Breach]:
    """A support of one entry, renormalised.

    Level: refused
    Reason: Both sides are then 1 on that entry: the term is 0 with gradient 0, whatever the models.
    Way out: a larger k, or tail = "bucket"
    Source: the restricted-student convention of Eqs. 29 and 30 of arXiv:2606.22793 at k = 1.
    """
    for label, term in conduct.terms(method):
        if not isinstance(term, Dense | Regulariser) or term.tail != "renormalise":
            continue
        compares = Bound.of(term.divergence if isinstance(term, Dense) else term.penalty)
        supported = Bound.of(term.support)
        one = supported.function is support.sampled or (
            supported.function in (support.student_top_k, support.teacher_top_k)
            and conduct.knob_of(supported, "k")[1] == 1
        )
        if one and set(positional_names(compares.function)) <= _BY_TAIL:
            yield Breach(
                OBJECTIVE, f"{label!r} compares one entry, renormalised to 1 on both sides"
            )


_BY_TAIL = frozenset(
    name
    for name, entry in FIELDS.items()
    if entry.scope == "support" and (name.endswith("log_probs") or "." in entry.provider)
)
"""Fields of the distributions that the tail rule makes."""


def top_k_as_baseline(method: Method, run: RunFacts) -> Iterator[Breach]:
    """A divergence on a support as the baseline of a sampled token.

    Level: allowed
    Reason: A baseline depends on the prefix alone and its mean score is zero, so any number will
        do: the expected gradient is unchanged, unlike where the support becomes the loss.
    Way out: none is needed
    Source: vOPD, arXiv:2605.07865; Eqs. 8 and 20 of arXiv:2606.22793.
    """
    for label, term in conduct.sampled_terms(method):
        if term.baseline is not None and not conduct.is_whole(term):
            own = Bound.of(term.baseline).function
            if own is credit.expected_reward:
                yield Breach(OBJECTIVE, f"{label!r} subtracts a divergence on a support")


def top_k_with_outcome_gate(method: Method, run: RunFacts) -> Iterator[Breach]:
    """A loss on the teacher's likeliest tokens, gated by the verdict on the response.

    Level: allowed
    Reason: The gate is detached and chooses responses; what the loss descends on each of them stays
        what its tail rule says.
    Way out: none is needed
    Source: Table 10 of arXiv:2606.22793.
    """
    for label, term in conduct.dense_terms(method):
        asked = (positional_names(Bound.of(weight).function) for weight in term.weights)
        if not conduct.is_whole(term) and any("verdict" in names for names in asked):
            yield Breach(OBJECTIVE, f"{label!r} is gated by the verdict")


# --------------------------------------------------------------------------------------------
# Route: what is differentiated, what is a reward


def distribution_as_reward(method: Method, run: RunFacts) -> Iterator[Breach]:
    """A number of the whole distribution, paid to the one token that was drawn.

    Level: refused
    Reason: It is settled before the token is drawn, so it is the same for every token that could
        have been. Weighing the score with it gives a mean gradient of zero: nothing is taught and
        noise is added. Further updates on the same text, behind a ratio or not, teach no more: the
        ratio makes the mean that of the student's own tokens. As a reward of later prefixes, or as
        a baseline, the same number is right.
    Way out: a dense term with that divergence, reward "teacher_log_ratio", or credit that leaves
        the token's own reward out, such as "future"
    Source: Table 10 of arXiv:2606.22793; verl warns of it, miles issue 2362.
    """
    for label, term in conduct.sampled_terms(method):
        bound = Bound.of(term.reward)
        if _of_the_models(bound) and conduct.ignores_the_choice(method, run, term):
            yield Breach(
                OBJECTIVE,
                f"{label!r} pays {bound.short_name}, which no token changes, with "
                f"{Bound.of(term.credit).short_name} credit",
            )


def constant_advantage(method: Method, run: RunFacts) -> Iterator[Breach]:
    """An advantage that is the same whatever token is drawn.

    Level: refused
    Reason: The mean score of the student's own tokens is zero, so a number that does not depend on
        the token has a mean gradient of zero; standardised over the step, or less the mean of the
        others, equal numbers are 0 outright. A price on tokens acts through credit that sums.
    Way out: credit = "return_to_go" for a cost; rows = "data" or a gate for the likelihood of a
        text
    Source: the mean score of Eq. 4, and Eqs. 8 and 20, of arXiv:2606.22793.
    """
    for label, term in conduct.sampled_terms(method):
        bound = Bound.of(term.reward)
        by_length = term.reduction == "sequence_mean"  # which the choice decides
        ignores = not by_length and conduct.ignores_the_choice(method, run, term)
        if not _of_the_models(bound) and ignores:
            yield Breach(
                OBJECTIVE,
                f"{label!r} pays {bound.short_name} for every token that the student draws, with "
                f"{Bound.of(term.credit).short_name} credit",
            )
        elif (
            bound.function in conduct.SAME_FOR_ALL
            and Bound.of(term.credit).function is credit.standardised
            and not term.outcome
        ):
            yield Breach(
                OBJECTIVE,
                f"{label!r} standardises {bound.short_name}, of which all are equal: it is 0",
            )


def k1_back_propagated(method: Method, run: RunFacts) -> Iterator[Breach]:
    """The log-ratio of the drawn token as a loss, differentiated.

    Level: refused
    Reason: The derivative of log student - log teacher is the score, and the teacher is not in it,
        whoever drew the token and however the loss is averaged. Its mean over the student's own
        tokens is zero; over those of another it makes them unlikelier. The value is unbiased for
        the reverse KL, which is why it looks right in a plot.
    Way out: "reverse_kl_k2", whose gradient is that of the reverse KL, or a sampled term with
        reward "teacher_log_ratio"
    Source: section 4.2 of arXiv:2606.22793 with the score identity; AReaL's joint loss, EasyOPD.
    """
    for label, term in conduct.dense_terms(method):
        bound = Bound.of(term.divergence)
        blind = all(conduct.is_blind_to_the_teacher(term, Bound.of(w)) for w in term.weights)
        if blind and not term.preserve_mass and conduct.drops_the_teacher(bound):
            yield Breach(
                OBJECTIVE,
                f"{label!r} differentiates {bound.name}, whose slope is one number whatever the "
                "teacher says",
            )


def k3_as_reward(method: Method, run: RunFacts) -> Iterator[Breach]:
    """The k3 estimator as the reward of the token that it was made from.

    Level: must be declared
    Reason: A reward r is right for the divergence whose derivative it is, not for the one of which
        it is a value. The policy gradient of -(exp(r) - 1 - r) is that of no divergence between the
        two: it pays for neither side of a disagreement. As a reward of later tokens only its mean
        counts, which is the reverse KL's.
    Way out: reward = "teacher_log_ratio"; or k3 with credit = "future" beside a dense reverse KL
    Source: the rule A = -(g - u g') of OPD+, arXiv:2606.01039; section 4.2 of arXiv:2606.22793.
    """
    for label, term in conduct.sampled_terms(method):
        later_only = Bound.of(term.credit).function in (credit.future, credit.mean_future)
        if not later_only and conduct.is_k3(Bound.of(term.reward)):
            yield Breach(
                OBJECTIVE, f"{label!r} pays {Bound.of(term.reward).name}, which is k3, to its token"
            )


def clamped_loss(method: Method, run: RunFacts) -> Iterator[Breach]:
    """A loss that goes flat where the student is furthest from the teacher.

    Level: must be declared
    Reason: A bound on the value is no bound on the gradient: beyond it the gradient is zero, so
        what the student lacks most is not taught, and what it has learnt to lack stays so.
    Way out: a divergence that is bounded by itself, such as "generalized_jsd" or "skew_forward_kl",
        or train.clip_norm
    Source: OPSD, arXiv:2601.18734, for a cap by entry; verl issues 7855 and 7856 for clamps of the
        sum.
    """
    for label, term in conduct.dense_terms(method):
        bound = Bound.of(term.divergence)
        if conduct.kills_gradients(bound, term.tail):
            yield Breach(
                OBJECTIVE,
                f"{label!r}: {bound.short_name} is flat, and so without gradient, at places where "
                "the student is far from the teacher",
            )


def route_without_alternatives(method: Method, run: RunFacts) -> Iterator[Breach]:
    """A route whose teacher, or whose support, names no token to route to.

    Level: refused
    Reason: A route moves mass to candidates by the teacher's scores of them. A view that is not
        normalised scores single tokens and is refused where the method is made; a teacher that
        cannot answer for the support, where the run opens; on the chosen token alone there is
        nobody else.
    Way out: support = "routing_support", or a view that is a distribution
    Source: Table 10 and Eqs. 31 to 36 of arXiv:2606.22793.
    """
    for label, term in method.objective.parts():
        if isinstance(term, Routed) and Bound.of(term.support).function is support.sampled:
            yield Breach(OBJECTIVE, f"{label!r} routes on the chosen token alone")


def baseline_with_routing(method: Method, run: RunFacts) -> Iterator[Breach]:
    """A baseline, and a route for what becomes negative against it.

    Level: allowed
    Reason: The one says how much, the other where to. Which advantages are negative depends on the
        baseline, so say both.
    Way out: none is needed
    Source: Table 10 and section 4.5 of arXiv:2606.22793.
    """
    for label, term in method.objective.parts():
        if isinstance(term, Routed) and term.source.baseline is not None:
            yield Breach(OBJECTIVE, f"{label!r} routes what is below its baseline")


# --------------------------------------------------------------------------------------------
# Temporal credit and outcome


def discount_without_meaning(method: Method, run: RunFacts) -> Iterable[Breach]:
    """A discount that does not say what it stands for.

    Level: refused
    Reason: A baseline subtracts and changes no expectation; a discount multiplies and changes what
        is optimised. Only a task's own discount and a fading trust in the teacher name an
        objective. Refused by `discounted`, `bounded_return` and, below gamma = 1, `gae`, which take
        a meaning.
    Way out: meaning = "task", "teacher_reliability" or "variance_heuristic"
    Source: Table 10, Eqs. 18 and 19 and section 4.5 of arXiv:2606.22793.
    """
    return UNMADE


def truncated_returns(method: Method, run: RunFacts) -> Iterator[Breach]:
    """Returns without a value for what is cut off, on responses that are cut.

    Level: must be declared
    Reason: A sum that stops at the limit is unbiased for the divergence of the first tokens, not of
        the response: what a token leads to beyond the limit costs nothing, so a response that never
        ends looks better than it is.
    Way out: credit = "gae", which stands for the rest with the critic's value, a limit above the
        longest response, or credit that names its reach, such as "windowed"
    Source: Eq. 15 of arXiv:2606.22793, whose sum runs to the end; the bootstrap of
        arXiv:1506.02438.
    """
    horizon = method.states.reach("horizon")
    short = 0 < run.max_new_tokens < run.longest_response
    for label, term in conduct.sampled_terms(method):
        if not conduct.student_writes(method, term) or not _claims_a_whole_response(term):
            continue
        credited = Bound.of(term.credit).short_name
        if horizon:
            yield Breach(
                "method.states",
                f"{label!r} sums rewards to the end ({credited}), and a horizon of {horizon:g} "
                "tokens ends the response",
            )
        elif short:
            yield Breach(
                "sampler.max_new_tokens",
                f"{label!r} sums rewards to the end ({credited}), and a response of the data has "
                f"{run.longest_response} tokens, the limit {run.max_new_tokens}",
            )


def partial_divergence_in_returns(method: Method, run: RunFacts) -> Iterator[Breach]:
    """Future rewards replaced by a divergence on a support of some entries.

    Level: must be declared
    Reason: The mean of the log-ratio is minus the reverse KL over the whole vocabulary. On a
        support the sum lacks what the support hides, at every later prefix: with a bucket it is the
        student's tail mass times the divergence within the tail.
    Way out: leave the support out, or return_to_go with the log-ratio itself
    Source: Eq. 7 of arXiv:2606.22793 and the chain rule of the KL.
    """
    for label, term in conduct.sampled_terms(method):
        own = (Bound.of(term.reward), Bound.of(term.credit))
        reads = [bound for bound in own if "reverse_kl" in positional_names(bound.function)]
        if reads and not conduct.is_whole(term):
            yield Breach(
                OBJECTIVE,
                f"{label!r}: {reads[0].short_name} takes the divergence on "
                f"{Bound.of(term.support).short_name} for the mean of the log-ratio",
            )


def unlocalised_verdict(method: Method, run: RunFacts) -> Iterator[Breach]:
    """A verdict on the response that reaches its last token alone.

    Level: must be declared
    Reason: The verdict is paid at the last token. Credit that hands a token its own reward, or
        replaces later rewards by expected log-ratios, leaves it there: one token, most often the
        end token, answers for the response.
    Way out: credit = "return_to_go", or the verdict on every token, such as reward
        "group_advantage" or outcome "add_group_advantage"
    Source: Table 10 of arXiv:2606.22793: a global verifier score without localisation.
    """
    for label, term in conduct.sampled_terms(method):
        outcomes = [Bound.of(slot).function for slot in term.outcome]
        paid_last = Bound.of(term.reward).function is reward.verdict_reward
        paid_last = paid_last or outcome.terminal_verdict in outcomes
        if paid_last and _leaves_it_at_the_end(Bound.of(term.credit)):
            yield Breach(
                OBJECTIVE,
                f"{label!r} pays the verdict at the last token, and "
                f"{Bound.of(term.credit).short_name} credit leaves it there",
            )


def summed_returns(method: Method, run: RunFacts) -> Iterator[Breach]:
    """A return of the whole response on every token, summed once more.

    Level: must be declared
    Reason: "group_advantage" and "group_deviation" stand on every token already. Summed to the end,
        a token gets them once for every token that follows: early tokens and long responses weigh
        more, and the sum is unbiased for nothing.
    Way out: credit = "immediate"
    Source: GRPO, section 4.1.2 of arXiv:2402.03300, where the advantage is the token's.
    """
    for label, term in conduct.sampled_terms(method):
        paid, credited = Bound.of(term.reward), Bound.of(term.credit)
        sums = credited.function in _SUMMING and not conduct.is_own_reward(credited)
        if sums and paid.function in _GROUPED:
            yield Breach(
                OBJECTIVE,
                f"{label!r}: {credited.short_name} sums {paid.short_name}, which is a return",
            )


def group_of_one(method: Method, run: RunFacts) -> Iterator[Breach]:
    """A comparison of a prompt's samples, of which there is one.

    Level: must be declared
    Reason: A deviation from the mean of one is 0, and so is a rate of one sample times its
        complement: the term, or its outcome, says nothing anywhere.
    Way out: sampler.samples_per_prompt of 4 or more
    Source: GRPO, section 4.1.2 of arXiv:2402.03300; `group_advantage`, 0 for a group of one.
    """
    if run.samples_per_prompt > 1:
        return
    for label, term in conduct.terms(method):
        for place, bound in term.slots():
            compares = "group" in positional_names(bound.function)
            if compares and place != "baseline" and bound.short_name not in _FINE_ALONE:
                yield Breach(
                    "sampler.samples_per_prompt",
                    f"1: {bound.short_name} of {label!r} compares the samples of a prompt, of "
                    "which there is one",
                )


# --------------------------------------------------------------------------------------------
# Teachers and regularisers


def conflicting_teachers(method: Method, run: RunFacts) -> Iterator[Breach]:
    """Several teachers averaged on the same rows.

    Level: must be declared
    Reason: A sum of reverse KLs has one minimiser, the normalised geometric mean of the teachers; a
        sum of forward KLs, their mixture. Where they disagree the one prefers what none forbids,
        which none may want, and the other wavers between them; a weak teacher is averaged away.
    Way out: a gate on each term that says which teacher counts where, or terms on different rows
    Source: Table 10 and Table 6 (multi-teacher conflict) of arXiv:2606.22793; arXiv:2605.01347.
    """
    for view in method.views:
        if view.name not in method.objective.views():
            continue
        taught = _models(method, view.name)
        if view.parts and len(taught) > 1:
            yield Breach(
                "method.views", f"the view {view.name!r} averages {' and '.join(sorted(taught))}"
            )
    following = [(label, term) for label, term in _pulls(method) if _models(method, term.against)]
    for (one, first), (other, second) in combinations(following, 2):
        same = _models(method, first.against) == _models(method, second.against)
        if not same and conduct.share_rows(first, second):
            yield Breach(
                OBJECTIVE,
                f"{one!r} follows {first.against!r} and {other!r} {second.against!r} on the same "
                "rows, and no gate chooses",
            )


def gated_teachers_with_reference(method: Method, run: RunFacts) -> Iterator[Breach]:
    """Several teachers with a gate each, and a pull towards the reference.

    Level: allowed
    Reason: A row follows the teacher that its gates let through; the reference holds all of them to
        one student.
    Way out: none is needed
    Source: Table 10 of arXiv:2606.22793.
    """
    gated = {
        term.against for _, term in _pulls(method) if term.weights and _models(method, term.against)
    }
    held = [label for label, term in _pulls(method) if _is_reference(method, term.against)]
    if len(gated) > 1 and held:
        yield Breach(OBJECTIVE, f"{held[0]!r} holds a student of {len(gated)} teachers")


def doubled_reference(method: Method, run: RunFacts) -> Iterator[Breach]:
    """The student pulled twice towards itself at step 0.

    Level: must be declared
    Reason: The policy gradient of the log-ratio to the reference and the gradient of a reverse KL
        to it are one and the same in expectation, so as reward and as loss the coefficients add up.
        A reference inside a combination pulls too: KL(student || t^a r^b / Z) is a KL(student || t)
        + b KL(student || r) and a constant, where a + b = 1.
    Way out: one term against "reference", with the sum of the coefficients
    Source: Eqs. 6 and 7 of arXiv:2606.22793; the regulariser of its Table 3.
    """
    pulls = [
        (label, term)
        for label, term in _pulls(method)
        if any(_is_start(view) for view in conduct.pulling_views(method, term.against))
    ]
    for (one, first), (other, second) in combinations(pulls, 2):
        plain = _is_reference(method, first.against) or _is_reference(method, second.against)
        if plain and conduct.share_rows(first, second):
            yield Breach(
                OBJECTIVE, f"{one!r} and {other!r} both pull towards the student at step 0"
            )


def average_out_of_range(method: Method, run: RunFacts) -> Iterator[Breach]:
    """A moving average that never moves, or that is the student itself.

    Level: note
    Reason: After n updates decay^n of the average is still the student at step 0. Above 0.95 at the
        end of the run it is that student; with a decay below 1/2 it is mostly the last update's, as
        where the rate 1 - decay was given in place of the decay. Both limits are ours.
    Way out: a decay of about 1 - 5 / (steps * updates_per_rollout); for a teacher that stands
        still, source = "initial_student"
    Source: TRL issues 4935 and 5862, an inverted rate and one twelve times too large.
    """
    read = method.objective.views()
    for view in method.views:
        if view.source != "ema_student" or view.name not in read:
            continue
        updates = run.steps * run.updates_per_rollout
        left = view.decay**updates
        if view.decay < 0.5:
            yield Breach(
                "method.views",
                f"decay = {view.decay:g} of {view.name!r} keeps less than half of the average at "
                "each update",
            )
        elif updates and left > 0.95:
            yield Breach(
                "method.views",
                f"after {updates} updates {left:.0%} of {view.name!r} is still the student at step "
                f"0 (decay = {view.decay:g})",
            )


def vanishing_divergence(method: Method, run: RunFacts) -> Iterator[Breach]:
    """A Jensen-Shannon divergence near an end of its weight, where it vanishes.

    Level: note
    Reason: The divergence is about w times the forward KL near w = 0, and 1 - w times the reverse
        KL near 1: the learning rate is in effect that much smaller, and a sweep over w compares
        learning rates. Below 0.05 is ours.
    Way out: coef = 1 / w or 1 / (1 - w), or "forward_kl" and "reverse_kl" themselves
    Source: the limits in section 3 of arXiv:2306.13649; TRL's beta jumps at its ends.
    """
    named = (divergence.generalized_jsd, reward.generalized_jsd_reward)
    for label, term in conduct.terms(method):
        for _, bound in term.slots():
            if bound.function in named:
                low, high = conduct.knob_of(bound, "teacher_weight")
                near = min(low, 1 - high)
                if 0 < near < 0.05:
                    yield Breach(
                        OBJECTIVE,
                        f"{label!r}: {bound.short_name} with teacher_weight "
                        f"{low if low == near else high:g} is about {near:g} times a KL",
                    )


# --------------------------------------------------------------------------------------------
# Parts

_GROUPED = (reward.group_advantage, reward.group_deviation)
_SUMMING = (
    credit.return_to_go,
    credit.discounted,
    credit.windowed,
    credit.bounded_return,
    credit.future,
)
_FINE_ALONE = frozenset({"share_of_correct", "share_of_wrong", "group_all_fail", "group_some_pass"})
"""Formulas of a group that mean something for a group of one."""

_TO_THE_END = (
    credit.return_to_go,
    credit.discounted,
    credit.rao_blackwell,
    credit.future,
    credit.length_neutral_future,
    credit.damped_future,
)
"""Credit that claims the objective of a whole response."""


def _draws(method: Method, rows: tuple[str, ...]) -> Iterator[tuple[str, Term]]:
    """The terms that are means over the student's draws and look at some of these rows."""
    for label, term in conduct.terms(method):
        if conduct.is_mean_over_draws(term) and term.rows in rows:
            yield label, term


OF_WHOLE_DISTRIBUTIONS = (
    "or a divergence of whole distributions, which asks nobody who drew the token"
)


def _weigh_by(whom: str, term: Term) -> str:
    """How this kind of term weighs its tokens by their ratio to `old` or to the `sampler`."""
    if isinstance(term, Sampled):
        by_old = 'surrogate "clipped" or "truncated_importance"'
        return f"{by_old if whom == 'old' else TRUNCATED}, {OF_WHOLE_DISTRIBUTIONS}"
    weight = "update_ratio" if whom == "old" else "importance"
    return f'the weight "{weight}", whose cap is a bound, {OF_WHOLE_DISTRIBUTIONS}'


TRUNCATED = 'surrogate "truncated_importance"'


def _bound_of(term: Term) -> str:
    """How this kind of term bounds its ratio; the rule's own words for sampled terms."""
    if isinstance(term, Sampled):
        return ""
    return (
        'a divergence without a ratio of its own, such as "reverse_kl_k2", with the weight '
        f'"update_ratio", whose cap is a bound, {OF_WHOLE_DISTRIBUTIONS}'
    )


def _why_stale(method: Method, run: RunFacts) -> str:
    if run.updates_per_rollout > 1:
        return f"a rollout serves {run.updates_per_rollout} updates"
    return f"text of up to {method.states.replay_steps} steps before is replayed"


def _of_the_models(bound: Bound) -> bool:
    """Whether a reward reads a model's distribution, not the place or nothing at all."""
    names = positional_names(bound.function)
    return any(name in FIELDS and FIELDS[name].side != "none" for name in names)


def _claims_a_whole_response(term: Sampled) -> bool:
    bound = Bound.of(term.credit)
    if bound.function is credit.damped_future:
        return bool(conduct.knob_of(bound, "future_weight")[1] > 0)
    if bound.function is credit.discounted:
        return bool(conduct.knob_of(bound, "gamma")[1] > 0)
    return bound.function in _TO_THE_END


def _leaves_it_at_the_end(bound: Bound) -> bool:
    """Whether credit leaves a reward of the last token to that token."""
    expecting = (
        credit.rao_blackwell,
        credit.damped_future,
        credit.length_neutral_future,
        credit.next_step,
    )
    alone = (credit.standardised, credit.scaled_by_turn)
    return conduct.is_own_reward(bound) or bound.function in (*expecting, *alone)


def _pulls(method: Method) -> list[tuple[str, Dense | Sampled]]:
    """Dense and sampled terms that ask something of their view."""
    return [
        (label, term)
        for label, term in conduct.terms(method)
        if isinstance(term, Dense | Sampled) and method.objective.reads_its_view(term)
    ]


def _models(method: Method, name: str) -> set[str]:
    """The teacher models that a view follows."""
    return {view.name for view in conduct.pulling_views(method, name) if view.source == "teacher"}


def _is_start(view: TeacherView) -> bool:
    """Whether a view is the student at step 0, reading what the student reads."""
    return view.source == "initial_student" and not view.context


def _is_reference(method: Method, name: str) -> bool:
    """Whether a view is the student at step 0, and nothing besides."""
    pulling = list(conduct.pulling_views(method, name))
    return [view.name for view in pulling] == [name] and _is_start(pulling[0])
