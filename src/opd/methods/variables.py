"""The survey's nine variables, in words, for any composition.

Source: A Formula-Driven Survey and Research Agenda for On-Policy Distillation, arXiv:2606.22793.
"""

from __future__ import annotations

from collections.abc import Iterable

from opd.formula import reward, support
from opd.objective import Dense, Method, Sampled, Term
from opd.schedule import Schedule
from opd.types import Bound, StateSource

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


def nine_variables(method: Method) -> dict[str, str]:
    """What a composition chose for each of the nine, in the survey's order."""
    terms = method.objective.terms
    main = [term for term in terms if term.against != REFERENCE]
    return {
        "state source": states_in_words(method.states),
        "feedback source": _feedback(method),
        "teacher privilege": "none: a teacher reads what the student reads"
        if method.objective.views()
        else "none: no teacher is asked",
        "support": _joined(_support(term) for term in main),
        "update route": _joined(_route(term) for term in main),
        "temporal credit": _joined(_credit(term) for term in main),
        "gate / weight": _joined(_weight(term) for term in main),
        "vocabulary routing": "implicit: the softmax decides where mass goes",
        "regulariser": _joined(_penalty(term) for term in terms if term.against == REFERENCE),
    }


def states_in_words(states: StateSource) -> str:
    """Who writes the text, with shares where more than one does."""
    writers = {
        "the student itself": states.student,
        "the data set": states.data,
        "the teacher": states.teacher,
    }
    named = {who: share for who, share in writers.items() if share}
    if len(named) == 1:
        return next(iter(named))
    return ", ".join(f"{share:.0%} {who}" for who, share in named.items())


def bound_in_words(bound: Bound) -> str:
    """A function with its knobs: `student_top_k(k=32)`."""
    knobs = ", ".join(f"{name}={knob_in_words(value)}" for name, value in bound.knobs)
    return f"{bound.short_name}({knobs})" if knobs else bound.short_name


def knob_in_words(value: object) -> str:
    """A knob as a person writes it; a schedule says where it begins and ends."""
    if isinstance(value, Schedule):
        inside = ", ".join(f"{name}={part:g}" for name, part in vars(value).items())
        return f"{type(value).__name__.lower()}({inside})"
    return f"{value:g}" if isinstance(value, float) else str(value)


def _feedback(method: Method) -> str:
    read = method.objective.views()
    if not read:
        return "none: the text itself is the target"
    sources = {view.name: view.source for view in method.views}
    words = {"teacher": "the teacher model", "initial_student": "the student at step 0"}
    return _joined(
        f"{words[sources[name]]}" + ("" if name == "teacher" else f" (as {name!r})")
        for name in sorted(read, key=lambda name: (name != "teacher", name))
    )


def _support(term: Term) -> str:
    where = Bound.of(term.support)
    whole = where.function is support.full
    words = "the whole vocabulary" if whole else f"{bound_in_words(where)}, tail: {term.tail}"
    if isinstance(term, Dense):
        return words
    return f"the sampled token; baseline on {words}" if term.baseline else "the sampled token"


def _route(term: Term) -> str:
    if isinstance(term, Dense):
        return (
            f"{_coefficient(term)}dense: differentiate {bound_in_words(Bound.of(term.divergence))}"
        )
    what = Bound.of(term.reward)
    if what.function is reward.one and Bound.of(term.surrogate).short_name == "score":
        return f"{_coefficient(term)}sampled: maximum likelihood of the token"
    return (
        f"{_coefficient(term)}sampled: {bound_in_words(Bound.of(term.surrogate))} of the token "
        f"times its advantage, from {bound_in_words(what)}"
    )


def _credit(term: Term) -> str:
    if isinstance(term, Dense):
        return "none: every position answers for itself"
    words = bound_in_words(Bound.of(term.credit))
    if term.baseline is not None:
        words += f", less the baseline {bound_in_words(Bound.of(term.baseline))}"
    return words


def _weight(term: Term) -> str:
    gates = [bound_in_words(Bound.of(weight)) for weight in term.weights]
    rows = "" if term.rows == "all" else f", on text by the {term.rows}"
    return f"{' x '.join(gates) or 'every token counts'}, {term.reduction}{rows}"


def _penalty(term: Term) -> str:
    if isinstance(term, Sampled):
        what = bound_in_words(Bound.of(term.reward))
    else:
        what = bound_in_words(Bound.of(term.divergence))
    return f"{_coefficient(term)}{what} against the student at step 0"


def _coefficient(term: Term) -> str:
    return "" if term.coef == 1.0 else f"{knob_in_words(term.coef)} x "


def _joined(parts: Iterable[str]) -> str:
    """The different parts in order, each once."""
    return " + ".join(dict.fromkeys(parts)) or "none"
