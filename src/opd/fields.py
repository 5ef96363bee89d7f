"""The closed table of what a formula may ask for by the name of a positional argument.

A formula's signature is its declaration: `reverse_kl(student_log_probs, teacher_log_probs)` needs
both distributions on its term's support, `return_to_go(reward, mask)` needs whole responses and
is therefore coupled. From these names follow the passes a step makes and what a teacher must
return.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from types import MappingProxyType
from typing import Any, Literal, TypeVar

F = TypeVar("F", bound=Callable[..., Any])

Side = Literal["none", "student", "view", "both"]
Scope = Literal["none", "sampled", "support", "top"]

EXTRA_PREFIX = "extra_"


@dataclass(frozen=True)
class Field:
    """One row of the table.

    Attributes:
        shape: as the formula receives it; `*n` is any leading shape of response tokens.
        meaning: one line.
        side: whose distribution must be known: the student's, the view's, both or none.
        scope: how much of it: the sampled token, the term's support, or its own top ids.
        provider: a record (`rollout`, `student`, `view`, `critic`), the support itself
            (`support`), the slot before (`term`), or the qualified name of the formula that
            computes the field on a support.
        coupled: the value depends on other tokens than the row's own, so a formula that
            takes it runs in the signal phase.
    """

    shape: str
    meaning: str
    side: Side = "none"
    scope: Scope = "none"
    provider: str = "rollout"
    coupled: bool = False


FIELDS: MappingProxyType[str, Field] = MappingProxyType(
    {
        "tokens": Field("*n", "the token that was chosen"),
        "provenance": Field("*n", "who chose it"),
        "special": Field("*n", "a special token other than an end token"),
        "position": Field("*n", "index of the token within its response"),
        "sampler_logp": Field("*n", "log-probability under the engine that generated"),
        "old_logp": Field("*n", "log-probability under the trainer's weights at rollout time"),
        "student_logp": Field("*n", "log-probability now", "student", "sampled", "student"),
        "teacher_logp": Field("*n", "log-probability by the view", "view", "sampled", "view"),
        "student_log_probs": Field(
            "*n K", "the student on the support", "student", "support", "student"
        ),
        "teacher_log_probs": Field("*n K", "the view on the support", "view", "support", "view"),
        "student_support_logp": Field(
            "*n K",
            "the student on the support's entries as it is, whatever the tail rule",
            "student",
            "support",
            "student",
        ),
        "teacher_support_logp": Field(
            "*n K",
            "the view on the support's entries as it is, whatever the tail rule",
            "view",
            "support",
            "view",
        ),
        "student_log_tail": Field(
            "*n", "log of the student's mass outside the support", "student", "support", "student"
        ),
        "teacher_log_tail": Field(
            "*n", "log of the view's mass outside the support", "view", "support", "view"
        ),
        "support_ids": Field(
            "*n K",
            "ids of the support's entries; -1 where an entry is absent or a bucket",
            "none",
            "support",
            "support",
        ),
        "in_support": Field(
            "*n", "the chosen token is one of the support", "none", "support", "support"
        ),
        "student_top_ids": Field(
            "*n K", "the student's likeliest tokens", "student", "top", "student"
        ),
        "teacher_top_ids": Field("*n K", "the view's likeliest tokens", "view", "top", "view"),
        "reverse_kl": Field(
            "*n",
            "KL(student || view) on the support",
            "both",
            "support",
            "opd.formula.divergence.reverse_kl",
        ),
        "forward_kl": Field(
            "*n",
            "KL(view || student) on the support",
            "both",
            "support",
            "opd.formula.divergence.forward_kl",
        ),
        "total_variation": Field(
            "*n",
            "total variation distance on the support",
            "both",
            "support",
            "opd.formula.divergence.total_variation",
        ),
        "jensen_shannon": Field(
            "*n",
            "Jensen-Shannon divergence on the support",
            "both",
            "support",
            "opd.formula.divergence.jensen_shannon",
        ),
        "student_entropy": Field(
            "*n",
            "entropy of the student on the support",
            "student",
            "support",
            "opd.formula.divergence.student_entropy",
        ),
        "teacher_entropy": Field(
            "*n",
            "entropy of the view on the support",
            "view",
            "support",
            "opd.formula.divergence.teacher_entropy",
        ),
        "student_hidden": Field(
            "*n H", "the student's last hidden state, detached", "student", "none", "student"
        ),
        "special_ids": Field("S", "ids of the special tokens other than end tokens"),
        "reward": Field("*n", "the term's reward", provider="term"),
        "credited": Field("*n", "the reward after credit, before a baseline", provider="term"),
        "advantage": Field("*n", "reward after credit and baseline", provider="term"),
        "routing_score": Field("*n K", "how much an entry deserves mass", provider="term"),
        "candidates": Field("*n K", "entries that may receive mass", provider="term"),
        "routing": Field("*n K", "which share of the mass an entry receives", provider="term"),
        "amount": Field("*n", "how much mass is moved", provider="term"),
        "values": Field("*n", "the critic's value of the token's prefix", provider="critic"),
        "bootstrap_value": Field(
            "B",
            "the critic's value of the state after the last token; 0 where the response ended",
            coupled=True,
            provider="critic",
        ),
        "mask": Field("B T", "True where a loss may look", coupled=True),
        "group": Field("B", "index of the prompt within the batch", coupled=True),
        "verdict": Field("B", "the verifier's score of the response", coupled=True),
    }
)


# `provenance` and `student_hidden` serve the metrics and the critic too; with `forward_kl` they are
# here for formulas of a user's own, since none of the library's asks for them.


def counted(hit: Callable[..., Any]) -> Callable[[F], F]:
    """Mark a formula that replaces values: the share of rows where it does is logged.

    Args:
        hit: takes the formula's own arguments and knobs; True on the rows it changes.
    """

    def mark(function: F) -> F:
        function.counted = hit  # type: ignore[attr-defined]
        return function

    return mark


@cache
def positional_names(function: Callable[..., Any]) -> tuple[str, ...]:
    """Names of a formula's positional arguments, in order, each checked against the table.

    Raises:
        ValueError: an argument that is not in `FIELDS` and does not start with `extra_`.
    """
    names = tuple(
        parameter.name
        for parameter in inspect.signature(function).parameters.values()
        if parameter.kind
        in (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    )
    for name in names:
        if name not in FIELDS and not name.startswith(EXTRA_PREFIX):
            raise ValueError(
                f"{function.__module__}.{function.__qualname__} asks for {name!r}, which is no "
                f"field; a formula's positional arguments are fields ({', '.join(FIELDS)} or "
                f"{EXTRA_PREFIX}NAME), its knobs are keyword-only"
            )
    return names


def is_coupled(function: Callable[..., Any]) -> bool:
    """Whether a formula reads more than its own row."""
    return any(name in FIELDS and FIELDS[name].coupled for name in positional_names(function))
