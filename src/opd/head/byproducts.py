"""What diagnostics ask of a visit beside the fields of formulas, one number per row.

    top1_agreement   1 where the likeliest token of the student, as it is now, is the view's
    top_k_overlap    share of the k likeliest tokens that the two have in common; k by the support
    student_mass     mass the student puts inside the key's support
    teacher_mass     mass the view puts there

`logit_gradient_norm`, the Euclidean norm of the gradient on the student's logits of what the row
adds to the loss of the step, is read off the gradient itself.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType

from jaxtyping import Float
from torch import Tensor

from opd.errors import ConfigError
from opd.formula import weight
from opd.head.rows import BlockFields, likeliest
from opd.objective import field_key
from opd.types import FieldKey


def top1_agreement(look_up: BlockFields, key: FieldKey) -> Float[Tensor, " n"]:
    """1 where both find the same token likeliest."""
    _, own = likeliest(look_up.student_log_probs, 1)
    theirs = look_up.teacher_top_ids(key.view, 1)
    return (own == theirs).squeeze(-1).to(look_up.student_log_probs.dtype)


def top_k_overlap(look_up: BlockFields, key: FieldKey) -> Float[Tensor, " n"]:
    """The share of their k likeliest tokens that both have."""
    k = _top_k(key)
    _, own = likeliest(look_up.student_log_probs, k)
    share: Tensor = weight.top_k_overlap(look_up.teacher_top_ids(key.view, k), own, k=k)
    return share


def student_mass(look_up: BlockFields, key: FieldKey) -> Float[Tensor, " n"]:
    """The student's mass inside the support."""
    inside = look_up(field_key("student_support_logp", key.view, key.support, "truncate"))
    return inside.exp().sum(-1)


def teacher_mass(look_up: BlockFields, key: FieldKey) -> Float[Tensor, " n"]:
    """The view's mass inside the support."""
    inside = look_up(field_key("teacher_support_logp", key.view, key.support, "truncate"))
    return inside.exp().sum(-1)


BY_PRODUCTS: Mapping[str, Callable[[BlockFields, FieldKey], Tensor]] = MappingProxyType(
    {
        "top1_agreement": top1_agreement,
        "top_k_overlap": top_k_overlap,
        "student_mass": student_mass,
        "teacher_mass": teacher_mass,
    }
)


def _top_k(key: FieldKey) -> int:
    k = dict(key.support.knobs).get("k") if key.support is not None else None
    if k is None:
        raise ConfigError(f"{key.name}: give the key a top-k support, whose k it is measured at")
    return int(k)
