"""A loss of anybody's, in the one form that the audit asks: rows in, a number per row or one out.

Axes: N rows, the consecutive tokens of one response whose logits already predict them; V
vocabulary of the student, U of the teacher, which differ only where padding is looked at.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple, TypeVar

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from opd.errors import ConfigError, nearest

__all__ = [
    "KEYWORDS",
    "Derivative",
    "Loss",
    "Rows",
    "Writer",
    "bare",
    "derivative",
    "derivatives",
    "factored",
    "keywords",
    "linear",
    "ordered",
    "told_of",
]

KEYWORDS = ("mask", "old_logp", "temperature", "count")

Writer = Literal["student", "teacher"]
"""Who wrote the tokens: whose probabilities weigh them."""


@dataclass(frozen=True, eq=False)
class Rows:
    """What a loss may be told.

    Attributes:
        student: logits; the leaf whose gradient is looked at.
        teacher: logits; a row of NaN is a score that is missing.
        tokens: what was written.
        mask: which rows count.
        old_logp: log-probability of each token under the policy that wrote it, in nats; the
            student's own if None.
        temperature: what divides the logits of both; only a loss that takes it sees another than 1.
        count: rows that count over all micro-batches; those of this call if None.
    """

    student: Float[Tensor, "N V"]
    teacher: Float[Tensor, "N U"]
    tokens: Int[Tensor, " N"]
    mask: Bool[Tensor, " N"]
    old_logp: Float[Tensor, " N"] | None = None
    temperature: float = 1.0
    count: int | None = None

    @property
    def old(self) -> Float[Tensor, " N"]:
        """`old_logp`, settled."""
        if self.old_logp is not None:
            return self.old_logp
        with torch.no_grad():
            logp = self.student.float() if self.student.dtype.itemsize < 4 else self.student
            logp = (logp / self.temperature).log_softmax(-1)
            return logp.gather(-1, self.tokens[:, None]).squeeze(-1)

    @property
    def total(self) -> int:
        """`count`, settled."""
        return int(self.mask.sum()) if self.count is None else self.count

    def at(self, places: Tensor) -> Rows:
        """Some of the rows, with their own count."""
        old = None if self.old_logp is None else self.old_logp[places]
        return replace(
            self,
            student=self.student[places],
            teacher=self.teacher[places],
            tokens=self.tokens[places],
            mask=self.mask[places],
            old_logp=old,
        )


@dataclass(frozen=True)
class Loss:
    """A loss under audit.

    Attributes:
        name: as the user wrote it.
        call: from rows to a loss per row, `[N]`, or to one number.
        takes: of `mask`, `old_logp`, `temperature` and `count`, what the loss can be told.
        dtype: of the logits. Float64 unless the loss insists on another.
        is_linear: whether logits are products of states and weights, so that none is infinite.
        apart: the same of several responses at once, each by itself: the sum of their losses, and
            each, `[B]`. None where they have to be called one after the other.
        writer: who writes the tokens where it is used.
        settings: how it had to be changed to be audited, in words such as `at k = 3`.
        unplayed: what it reads and is not given, so that it may have nothing to descend.
        gates: its weights, which may be closed on all the rows that there are.
    """

    name: str
    call: Callable[[Rows], Tensor]
    takes: frozenset[str] = frozenset()
    dtype: torch.dtype = torch.float64
    is_linear: bool = False
    apart: Callable[[Sequence[Rows]], tuple[Tensor, Float[Tensor, " B"]]] | None = None
    writer: Writer = "student"
    settings: tuple[str, ...] = ()
    unplayed: str = ""
    gates: tuple[str, ...] = ()

    @property
    def tolerance(self) -> float:
        """Relative error below which two gradients are the same."""
        return 1e-6 if self.dtype == torch.float64 else 1e-3


class Derivative(NamedTuple):
    """What a call returned and how it would move the models.

    Attributes:
        value: per row, or one number `[]`; detached.
        student: gradient of the (weighted) sum; zeros where the loss does not depend on it.
        teacher: the same with respect to the teacher's logits; None unless asked for.
    """

    value: Tensor
    student: Float[Tensor, "N V"]
    teacher: Float[Tensor, "N U"] | None


def derivative(
    loss: Loss, rows: Rows, weights: Float[Tensor, " N"] | None = None, *, teacher: bool = False
) -> Derivative:
    """Call a loss and differentiate it.

    Args:
        weights: of the rows in the sum that is differentiated; 1 each if None. One number is
            differentiated as it is.
        teacher: also with respect to the teacher's logits.
    """
    with torch.enable_grad():
        leaves = [rows.student.detach().clone().requires_grad_()]
        if teacher:
            leaves.append(rows.teacher.detach().clone().requires_grad_())
        # a loss may write into what it is given, as into the output of a model's forward
        own = replace(
            rows,
            student=leaves[0].clone(),
            teacher=leaves[1].clone() if teacher else rows.teacher.detach().clone(),
            tokens=rows.tokens.clone(),
            mask=rows.mask.clone(),
            old_logp=None if rows.old_logp is None else rows.old_logp.clone(),
        )
        value = _checked(loss.call(own), loss, rows)
        total = value.sum() if weights is None or value.dim() == 0 else (value * weights).sum()
        grads = _gradients(total, leaves)
    return Derivative(value.detach(), grads[0], grads[1] if teacher else None)


def derivatives(loss: Loss, responses: Sequence[Rows]) -> list[Derivative]:
    """Of several calls; of a loss that takes them at once in one."""
    if loss.apart is None:
        return [derivative(loss, rows) for rows in responses]
    with torch.enable_grad():
        leaves = [rows.student.detach().clone().requires_grad_() for rows in responses]
        live = zip(responses, leaves, strict=True)
        total, values = loss.apart([replace(rows, student=leaf) for rows, leaf in live])
        grads = _gradients(total, leaves)
    pairs = zip(values.detach(), grads, strict=True)
    return [Derivative(value, grad, None) for value, grad in pairs]


def _gradients(total: Tensor, leaves: list[Tensor]) -> list[Tensor]:
    """Of one number; zeros where it does not depend on a leaf."""
    found: tuple[Tensor | None, ...] = (None,) * len(leaves)
    if total.requires_grad:
        found = torch.autograd.grad(total, leaves, allow_unused=True)
    return [
        torch.zeros_like(leaf).detach() if grad is None else grad.detach()
        for leaf, grad in zip(leaves, found, strict=True)
    ]


def _checked(value: Any, loss: Loss, rows: Rows) -> Tensor:
    """What a loss returned, if it is a loss per row or one number.

    Raises:
        ConfigError: it is neither.
    """
    if not isinstance(value, Tensor):
        what = type(value).__name__
        article = "an" if what[0].lower() in "aeiou" else "a"
        raise ConfigError(f"{loss.name} returned {article} {what}, not a tensor{_way_out(value)}")
    if value.numel() != 1 and value.shape != rows.tokens.shape:
        raise ConfigError(
            f"{loss.name} returned shape {list(value.shape)} for {len(rows.tokens)} rows; a "
            "loss returns one number per row, or one in all: see `opd audit --help`"
        )
    return value


def _way_out(value: Any) -> str:
    """What to audit in place of a function that returns something else than its loss."""
    if isinstance(value, tuple | list):
        return "; audit a function that returns its loss alone, as in `return f(...)[0]`"
    if isinstance(value, Mapping):
        key = next((repr(key) for key in value if "loss" in str(key)), "'loss'")
        return f"; audit a function that returns its loss alone, as in `return f(...)[{key}]`"
    return "; a loss returns one number per row, or one in all"


# --------------------------------------------------------------------------------------------
# Bare functions


def bare(
    function: Callable[..., Any], name: str, *, teacher_first: bool = False, **options: Any
) -> Loss:
    """`f(student_logits [N, V], teacher_logits [N, U], tokens [N]) -> [N]` or one number.

    Of `mask [N]`, `old_logp [N]`, `temperature` and `count` it is passed what it names.

    Args:
        teacher_first: whether the teacher's logits come first.
        options: further keyword arguments of the function.
    """
    takes = keywords(function, name, options, ("logits",) * 2 + ("tokens",), teacher_first)

    def call(rows: Rows) -> Tensor:
        told = told_of(rows, takes)
        both = ordered(rows.student, rows.teacher, teacher_first)
        result: Tensor = function(*both, rows.tokens, **told, **options)
        return result

    return Loss(name, call, takes)


def linear(
    function: Callable[..., Any], name: str, *, teacher_first: bool = False, **options: Any
) -> Loss:
    """`f(student_hidden, student_weight, teacher_hidden, teacher_weight, tokens) -> number`.

    Hidden states `[N, H]` and weights of the unembeddings, `[V, H]` and `[U, H]`. The states are
    the logits and the weights the identity; where a vocabulary is padded its last weights are 0.

    Args:
        teacher_first: whether the teacher's two come first.
    """
    given = ("hidden", "weight", "hidden", "weight", "tokens")
    takes = keywords(function, name, options, given, teacher_first)

    def call(rows: Rows) -> Tensor:
        both = ordered(factored(rows.student), factored(rows.teacher), teacher_first)
        told = told_of(rows, takes)
        result: Tensor = function(*both[0], *both[1], rows.tokens, **told, **options)
        return result

    return Loss(name, call, takes, is_linear=True)


T = TypeVar("T")


def ordered(student: T, teacher: T, teacher_first: bool) -> tuple[T, T]:
    """Both in the order in which a function takes them."""
    return (teacher, student) if teacher_first else (student, teacher)


def factored(logits: Float[Tensor, "N V"]) -> tuple[Float[Tensor, "N V"], Float[Tensor, "V V"]]:
    """Hidden states and a weight whose product is the logits."""
    return logits, torch.eye(logits.shape[1], dtype=logits.dtype)


def keywords(
    function: Callable[..., Any],
    name: str,
    options: Mapping[str, Any],
    given: Sequence[str] = (),
    teacher_first: bool = False,
) -> frozenset[str]:
    """Of `KEYWORDS`, those that a function names.

    Args:
        given: what it is called with in order, in words, if that is all that it needs.
        teacher_first: whether the first half of that is the teacher's.

    Raises:
        ConfigError: an option that it does not name, or arguments that it cannot be called with.
    """
    if given and isinstance(function, type):
        raise ConfigError(
            f"{name} is a class; name an instance of it, such as `loss = {function.__name__}()` "
            "beside it"
        )
    called = function.forward if isinstance(function, torch.nn.Module) else function
    try:
        parameters = inspect.signature(called).parameters
    except (TypeError, ValueError):  # built-in functions have none
        return frozenset()
    kinds = {parameter.kind for parameter in parameters.values()}
    for option in options:
        if option not in parameters and inspect.Parameter.VAR_KEYWORD not in kinds:
            raise ConfigError(f"{name} has no option {option!r}. {nearest(option, parameters)}")
    takes = frozenset(set(KEYWORDS) & set(parameters) - set(options))
    if given:
        _check_call(name, parameters, given, options, teacher_first)
    return takes


def _check_call(
    name: str,
    parameters: Mapping[str, inspect.Parameter],
    given: Sequence[str],
    options: Mapping[str, Any],
    teacher_first: bool,
) -> None:
    """Whether a function can be called with these in order, and names them so.

    Raises:
        ConfigError: says what else to do.
    """
    unnamed = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    ordered = [key for key, parameter in parameters.items() if parameter.kind in unnamed]
    takes_any = any(one.kind is inspect.Parameter.VAR_POSITIONAL for one in parameters.values())
    if len(ordered) < len(given) and not takes_any:
        pair = (
            "; `--adapter pair` is for two arguments, without tokens" if len(ordered) == 2 else ""
        )
        raise ConfigError(
            f"{name} takes {len(ordered)} arguments in order and is called with {len(given)}, "
            f"{_in_words(given, teacher_first)}{pair}; see `opd audit --help`"
        )
    for key in ordered[: len(given)]:
        if key in KEYWORDS:
            raise ConfigError(
                f"{name} takes {key!r} in the place of one of {_in_words(given, teacher_first)}; "
                "behind them it is passed by its name"
            )
    for option in options:
        if option in ordered[: len(given)]:
            raise ConfigError(f"{name}: {option!r} is what it is called with and cannot be set")
    needed = [
        key
        for place, (key, parameter) in enumerate(parameters.items())
        if parameter.default is parameter.empty
        and parameter.kind in (*unnamed, inspect.Parameter.KEYWORD_ONLY)
        and place >= len(given)
        and key not in (*options, *KEYWORDS)
    ]
    if needed:
        raise ConfigError(
            f"{name} needs {needed[0]!r} beside {_in_words(given, teacher_first)}: add `--set "
            f"{needed[0]}=VALUE`, or audit a function that passes it"
        )
    _check_order(name, ordered[: len(given)], teacher_first)


def _check_order(name: str, ordered: Sequence[str], teacher_first: bool) -> None:
    """Whether the names say the order in which the two sides are passed."""
    sides = [side for key in ordered for side in ("student", "teacher") if side in key.casefold()]
    if len(set(sides)) < 2 or (sides[0] == "teacher") == teacher_first:
        return
    first = "student's" if sides[0] == "teacher" else "teacher's"
    raise ConfigError(
        f"{name} calls its first argument {ordered[0]!r}, and would be given the {first}: "
        f"`--set teacher_first={not teacher_first}` passes the {sides[0]}'s first"
    )


def _in_words(given: Sequence[str], teacher_first: bool) -> str:
    half = len(given) // 2
    sides = ("teacher", "student") if teacher_first else ("student", "teacher")
    words = [f"the {sides[place >= half]}'s {what}" for place, what in enumerate(given[: 2 * half])]
    return ", ".join([*words, *given[2 * half :]])


def told_of(rows: Rows, takes: frozenset[str]) -> dict[str, Any]:
    """What is passed for the keywords in `takes`."""
    known = {
        "mask": rows.mask,
        "old_logp": rows.old,
        "temperature": rows.temperature,
        "count": rows.total,
    }
    return {name: known[name] for name in KEYWORDS if name in takes}
