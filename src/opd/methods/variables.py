"""The survey's nine variables, in words, for any composition.

Source: A Formula-Driven Survey and Research Agenda for On-Policy Distillation, arXiv:2606.22793.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

from opd.fields import positional_names
from opd.formula import reward, selection, support
from opd.objective import Dense, Method, Regulariser, Routed, Sampled, Term
from opd.schedule import Schedule
from opd.types import Bound, StateSource, TeacherView, with_parts

VARIABLES = (
    "state source",
    "feedback source",
    "teacher privilege",
    "support",
    "update route",
    "temporal credit",
    "gate / weight",
    "vocabulary routing",
    "regulariser",
)

REFERENCE = "reference"

SWITCHES = frozenset(
    {"distrust", "negative_advantage", "positive_advantage", "teacher_entropy_above"}
    | {"teacher_entropy_below", "trust", "trusted", "untrusted"}
)
"""Weights that share out the rows between a term that scores and one that says what instead."""


def nine_variables(method: Method) -> dict[str, str]:
    """What a composition chose for each of the nine, in the survey's order."""
    terms = method.objective.terms
    main = [term for term in terms if not regularises(term)]
    return {
        "state source": states_in_words(method.states),
        "feedback source": _feedback(method),
        "teacher privilege": _privilege(method),
        "support": _joined(_support(term) for term in main),
        "update route": _joined(_route(term) for term in main),
        "temporal credit": _joined(_credit(term) for term in main),
        "gate / weight": _joined(_weight(term) for term in main),
        "vocabulary routing": _joined(_routing(term, main) for term in main),
        "regulariser": _joined(_penalty(term) for term in terms if regularises(term)),
    }


def regularises(term: Term) -> bool:
    """Whether a term is there to hold the student, not to teach it."""
    return isinstance(term, Regulariser) or term.against == REFERENCE


def states_in_words(states: StateSource) -> str:
    """Who writes the text, with shares where more than one does."""
    writers = {
        "the student itself": states.student,
        "the data set": states.data,
        "the teacher": states.teacher,
        f"the student up to {states.replay_steps} steps ago": states.replay,
    }
    named = {who: share for who, share in writers.items() if share}
    if len(named) == 1:
        words = next(iter(named))
    else:
        words = ", ".join(f"{share:.0%} {who}" for who, share in named.items())
    return "; ".join((words, *_help_in_words(states)))


def _help_in_words(states: StateSource) -> Iterator[str]:
    """What else is known of how the text is written."""
    if states.horizon:
        yield f"at most {knob_in_words(states.horizon)} tokens"
    if "teacher_prefix" in states.helped:
        yield f"the teacher writes up to token {knob_in_words(states.teacher_prefix)}"
    if "mixture" in states.helped:
        share = knob_in_words(states.mixture)
        yield f"drawn from a mixture with {share} of the teacher"
    if states.interleave:
        yield f"tokens outside the teacher's {states.interleave} likeliest are the teacher's"
    if "rewrite" in states.helped:
        share = knob_in_words(states.rewrite)
        yield f"the teacher rewrites wrong responses, the last {share} of their tokens"


def bound_in_words(bound: Bound) -> str:
    """A function with its knobs: `student_top_k(k=32)`."""
    knobs = ", ".join(f"{name}={knob_in_words(value)}" for name, value in bound.knobs)
    return f"{bound.short_name}({knobs})" if knobs else bound.short_name


def knob_in_words(value: object) -> str:
    """A knob as a person writes it; a schedule says where it begins and ends."""
    if isinstance(value, Schedule):
        set_knobs = {name: part for name, part in vars(value).items() if part is not None}
        inside = ", ".join(f"{name}={knob_in_words(part)}" for name, part in set_knobs.items())
        return f"{type(value).__name__.lower()}({inside})"
    return f"{value:g}" if isinstance(value, float) else str(value)


def _feedback(method: Method) -> str:
    read = method.objective.views()
    views = {view.name: view for view in method.views}
    said = [
        view_in_words(views[name]) + ("" if name == "teacher" else f" (as {name!r})")
        for name in sorted(read, key=lambda name: (name != "teacher", name))
    ]
    if "verdict" in method.objective.field_names():
        said.append("the verifier's verdict")
    if not said and not any(_imitates(term) for term in method.objective.terms):
        return "none: the student's own probabilities"
    return _joined(said) if said else "none: the text itself is the target"


def _imitates(term: Term) -> bool:
    """Whether a term makes its rows' own tokens likelier, whatever they are."""
    return isinstance(term, Sampled) and Bound.of(term.reward).function is reward.one


def view_in_words(view: TeacherView) -> str:
    """Whose distribution a view is."""
    if view.mix == "arithmetic":
        shares = " + ".join(f"{knob_in_words(weight)} x {name}" for name, weight in view.parts)
        return f"the arithmetic mixture {shares}"
    if view.parts:
        parts = " + ".join(
            f"log {name}" if weight == 1 else f"{knob_in_words(weight)} x log {name}"
            for name, weight in view.parts
        )
        if not view.normalised:
            return f"the sum {parts}, a score of single tokens"
        return f"the log-linear combination {parts}, normalised"
    words = {
        "teacher": "the teacher model",
        "initial_student": "the student at step 0",
        "student": "the student itself, now",
        "ema_student": f"the moving average of the student, decay {view.decay:g}",
    }
    return words[view.source]


def _privilege(method: Method) -> str:
    if not method.objective.views():
        return "none: no teacher is asked"
    views = with_parts(method.objective.views(), method.views)
    told = [f"{view.name!r} reads {_reading(view)}" for view in views if view.context]
    return "; ".join(told) or "none: a teacher reads what the student reads"


def _reading(view: TeacherView) -> str:
    """What a view with a context reads, and how."""
    words = repr(view.context)
    if view.context_role != "user":
        words += f" as its {view.context_role} message"
    if view.chat_template_kwargs:
        given = ", ".join(f"{key} = {value!r}" for key, value in view.chat_template_kwargs)
        words += f", chat template with {given}"
    return words


def _support(term: Term) -> str:
    where = Bound.of(term.support)
    whole = where.function is support.full
    words = "the whole vocabulary" if whole else f"{bound_in_words(where)}, tail: {term.tail}"
    if term.smoothing:
        words += f", the view smoothed by {term.smoothing:g}"
    if isinstance(term, Routed):
        return f"{_support(term.source)}; routes on {words}"
    if not isinstance(term, Sampled):
        return words
    return f"the sampled token; baseline on {words}" if term.baseline else "the sampled token"


def _route(term: Term) -> str:
    if isinstance(term, Routed):
        moved = bound_in_words(Bound.of(term.transfer))
        return f"{_route(term.source)}, re-routed ({term.mode}): {_coefficient(term)}{moved}"
    if isinstance(term, Regulariser):
        return f"{_coefficient(term)}{bound_in_words(Bound.of(term.penalty))}"
    if isinstance(term, Dense):
        return (
            f"{_coefficient(term)}dense: differentiate {bound_in_words(Bound.of(term.divergence))}"
        )
    what = Bound.of(term.reward)
    if what.function is reward.one and Bound.of(term.surrogate).short_name == "score":
        return f"{_coefficient(term)}sampled: maximum likelihood of the token"
    outcomes = "".join(f", with {bound_in_words(Bound.of(slot))}" for slot in term.outcome)
    return (
        f"{_coefficient(term)}sampled: {bound_in_words(Bound.of(term.surrogate))} of the token "
        f"times its advantage, from {bound_in_words(what)}{outcomes}"
    )


def _credit(term: Term) -> str:
    if isinstance(term, Routed):
        return _credit(term.source)
    if not isinstance(term, Sampled):
        return "none: every position answers for itself"
    words = bound_in_words(Bound.of(term.credit))
    if term.baseline is not None:
        words += f", less the baseline {bound_in_words(Bound.of(term.baseline))}"
    return words


def _weight(term: Term) -> str:
    if isinstance(term, Routed):
        gates = [bound_in_words(Bound.of(slot)) for slot in (*term.gates, *term.weights)]
        return f"{_weight(term.source)}; routes where {' x '.join(gates) or 'always'}"
    gates = [bound_in_words(Bound.of(weight)) for weight in term.weights]
    rows = "" if term.rows == "all" else f", on text by the {term.rows}"
    kept = ", mass kept" if term.preserve_mass else ""
    return f"{' x '.join(gates) or 'every token counts'}{kept}, {term.reduction}{rows}"


def _routing(term: Term, others: Iterable[Term]) -> str:
    switches = [Bound.of(slot) for slot in getattr(term, "weights", ()) if _switches(slot)]
    if isinstance(term, Dense) and switches and _scores_beside(term, others):
        gates = " x ".join(bound_in_words(bound) for bound in switches)
        what = bound_in_words(Bound.of(term.divergence))
        return f"explicit where {gates}: {what} says what instead"
    if not isinstance(term, Routed):
        return "implicit: the softmax decides where mass goes"
    candidates, share = Bound.of(term.candidates), Bound.of(term.share)
    return (
        f"{bound_in_words(Bound.of(term.amount))} to {bound_in_words(candidates)}, "
        f"shared {bound_in_words(share)}; elsewhere implicit"
    )


def _switches(slot: Callable[..., object]) -> bool:
    """Whether a weight chooses rows by what the models say there, not by who drew the token."""
    bound = Bound.of(slot)
    module = bound.name.rpartition(".")[0]
    return module == selection.__name__ or bound.short_name in SWITCHES


def _scores_beside(dense: Dense, others: Iterable[Term]) -> bool:
    """Whether the same view's advantage of the sampled token is scored beside a divergence."""
    return any(
        isinstance(term, Sampled)
        and term.against == dense.against
        and "teacher_logp" in positional_names(Bound.of(term.reward).function)
        for term in others
    )


def _penalty(term: Term) -> str:
    if isinstance(term, Regulariser):
        return f"{_coefficient(term)}{bound_in_words(Bound.of(term.penalty))}"
    if isinstance(term, Dense):
        what = bound_in_words(Bound.of(term.divergence))
    else:
        inner = term.source if isinstance(term, Routed) else term
        what = bound_in_words(Bound.of(inner.reward))
    return f"{_coefficient(term)}{what} against the student at step 0"


def _coefficient(term: Term) -> str:
    return "" if term.coef == 1.0 else f"{knob_in_words(term.coef)} x "


def _joined(parts: Iterable[str]) -> str:
    """The different parts in order, each once."""
    return " + ".join(dict.fromkeys(parts)) or "none"
