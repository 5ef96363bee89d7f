"""Adapters for losses that are called with logits, or with the log-probabilities of tokens.

Where a package hands its loss float32, so does the adapter, whatever the logits are in: what the
audit then sees is the precision of the package.

Axes: N rows, V vocabulary of the student, U of the teacher.
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable, Mapping
from types import ModuleType
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from opd.audit.loss import Loss, Rows, factored, keywords, ordered, told_of
from opd.errors import ConfigError, nearest

__all__ = [
    "known_options",
    "liger",
    "log_probs",
    "logp",
    "logp_of",
    "ms_swift",
    "needed",
    "number_of",
    "pair",
    "torchrl",
    "trl",
    "trl_chunked",
]

IGNORED = -100
"""The label of a row that does not count."""


# --------------------------------------------------------------------------------------------
# What adapters share


def log_probs(logits: Float[Tensor, "*n V"], temperature: float = 1.0) -> Float[Tensor, "*n V"]:
    """Normalised in float32 or wider, as packages score tokens."""
    wide = torch.promote_types(logits.dtype, torch.float32)
    return (logits.to(wide) / temperature).log_softmax(-1)


def logp_of(logits: Float[Tensor, "*n V"], tokens: Int[Tensor, "*n"]) -> Float[Tensor, "*n"]:
    """Log-probability of each token, in nats."""
    return log_probs(logits).gather(-1, tokens[..., None]).squeeze(-1)


def number_of(result: Any, rows: Rows) -> Tensor:
    """The loss in what a function returned.

    The first of several results; over axes behind the rows it is summed, and a batch of one
    response is that response.
    """
    while isinstance(result, tuple | list):
        result = result[0]
    if not isinstance(result, Tensor):
        raise TypeError(f"expected a tensor, or one first in a tuple, got {type(result).__name__}")
    value: Tensor = result
    length = len(rows.tokens)
    if value.dim() > 1 and len(value) == 1 != length:
        value = value[0]
    if value.dim() > 1:
        value = value.flatten(1).sum(-1)
    return value.reshape(()) if value.numel() == 1 != length else value


def needed(module: str, install: str) -> ModuleType:
    """A module that only this adapter needs.

    Raises:
        ConfigError: it is not installed; says how to install it.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ConfigError(
            f"this adapter needs {module}, which cannot be imported ({error}); install it with "
            f"`{install}`"
        ) from error


def known_options(name: str, options: Mapping[str, Any], valid: Mapping[str, Any]) -> None:
    """Refuse an option that is not among the valid ones.

    Raises:
        ConfigError: names the nearest that is.
    """
    for option in options:
        if option not in valid:
            raise ConfigError(f"{name} has no option {option!r}. {nearest(option, valid)}")


# --------------------------------------------------------------------------------------------
# Bare functions


def pair(
    function: Callable[..., Any], name: str, *, teacher_first: bool = False, **options: Any
) -> Loss:
    """`f(student_logits [N, V], teacher_logits [N, U])` to anything per row, or one number.

    Args:
        teacher_first: whether the teacher's logits come first.
    """
    takes = keywords(function, name, options, ("logits", "logits"), teacher_first)

    def call(rows: Rows) -> Tensor:
        both = ordered(rows.student, rows.teacher, teacher_first)
        return number_of(function(*both, **told_of(rows, takes), **options), rows)

    return Loss(name, call, takes)


def logp(
    function: Callable[..., Any], name: str, *, teacher_first: bool = False, **options: Any
) -> Loss:
    """`f(student_logp [N], teacher_logp [N])`, log-probabilities of the tokens, to `[N]` or one.

    Args:
        teacher_first: whether the teacher's come first.
    """
    takes = keywords(function, name, options, ("log-probs",) * 2, teacher_first) - {"temperature"}

    def call(rows: Rows) -> Tensor:
        student, teacher = (logp_of(logits, rows.tokens) for logits in (rows.student, rows.teacher))
        both = ordered(student, teacher, teacher_first)
        return number_of(function(*both, **told_of(rows, takes), **options), rows)

    return Loss(name, call, takes)


# --------------------------------------------------------------------------------------------
# TRL


def trl(function: Callable[..., Any], name: str, **options: Any) -> Loss:
    """`generalized_jsd_loss(student [1, N, V], teacher [1, N, U], labels, ...)` of a TRL trainer.

    Rows that do not count have the label -100. `num_items_in_batch` is the count of all
    micro-batches where there is one, and otherwise left out, as without accumulation.
    """
    told = keywords(function, name, options)
    given = inspect.signature(function).parameters
    takes = {"mask"} | (told & {"temperature"})
    if "num_items_in_batch" in given and "num_items_in_batch" not in options:
        takes |= {"count"}

    def call(rows: Rows) -> Tensor:
        labels = torch.where(rows.mask, rows.tokens, IGNORED)[None]
        extra: dict[str, Any] = {}
        if "temperature" in takes:
            extra["temperature"] = rows.temperature
        if "count" in takes and rows.count is not None:
            extra["num_items_in_batch"] = rows.count
        result: Tensor = function(
            rows.student[None], rows.teacher[None], labels=labels, **extra, **options
        )
        if result.dim() == 2:  # reduction="none": the entries of the rows that count
            whole = result.new_zeros(len(rows.tokens))
            return whole.masked_scatter(rows.mask, result.sum(-1))
        return number_of(result, rows)

    return Loss(name, call, frozenset(takes))


def trl_chunked(function: Any, name: str, **options: Any) -> Loss:
    """TRL's `ChunkedDivergenceFunction`, an autograd function of hidden states and unembeddings.

    The states are the logits and the weights the identity, without bias.
    """
    parameters = list(inspect.signature(function.forward).parameters.values())[7:]  # after ctx
    valid = {parameter.name: parameter.default for parameter in parameters}
    known_options(name, options, valid)
    takes = frozenset({"temperature"} & set(valid) - set(options))
    missing = [
        parameter.name
        for parameter in parameters
        if parameter.default is parameter.empty and parameter.name not in options
    ]
    if missing:
        raise ConfigError(f"{name} needs {missing[0]}: add `--set {missing[0]}=VALUE`")

    def call(rows: Rows) -> Tensor:
        settings = {**valid, **options}
        if takes:
            settings["temperature"] = rows.temperature
        student, student_weight = factored(rows.student)
        teacher, teacher_weight = factored(rows.teacher)
        result = function.apply(
            student, student_weight, None, teacher, teacher_weight, None, *settings.values()
        )
        return number_of(result, rows)

    return Loss(name, call, takes, is_linear=True)


# --------------------------------------------------------------------------------------------
# Liger, torchrl, ms-swift


def liger(function: Any, name: str, **options: Any) -> Loss:
    """A `LigerFusedLinear...Loss` class of Liger's `chunked_loss`, not compiled unless told so.

    Called with the logits as states, the identity as weights and the tokens as labels; rows that
    do not count have the label that it ignores.

    Args:
        options: of the class, such as `beta` and `weight_hard_loss`.
    """
    takes = keywords(function, name, options) & {"temperature"} | {"mask"}
    valid = inspect.signature(function).parameters
    settings = {**({"compiled": False} if "compiled" in valid else {}), **options}
    ignored = options.get("ignore_index", IGNORED)

    def call(rows: Rows) -> Tensor:
        extra = {"temperature": rows.temperature} if "temperature" in takes else {}
        student, student_weight = factored(rows.student)
        teacher, teacher_weight = factored(rows.teacher)
        labels = torch.where(rows.mask, rows.tokens, ignored)
        result = function(**settings, **extra)(
            student, student_weight, teacher, teacher_weight, labels
        )
        return number_of(result, rows)

    return Loss(name, call, takes, is_linear=True)


def torchrl(function: Any, name: str, **options: Any) -> Loss:
    """torchrl's `DistillationLoss`, with the student's log-probabilities as its actor's output.

    Rows that do not count are outside `all_assistant_mask`.

    Args:
        options: of the class, such as `kl_direction`.
    """
    keywords(function, name, options)

    def call(rows: Rows) -> Tensor:
        install = "pip install 'torchrl>=0.14'"
        tensordict, modules = (needed(of, install) for of in ("tensordict", "tensordict.nn"))
        student, teacher = (logp_of(of, rows.tokens)[None] for of in (rows.student, rows.teacher))
        actor = modules.TensorDictModule(
            lambda history: student, in_keys=[("history", "full")], out_keys=[("log_probs", "full")]
        )
        data = tensordict.TensorDict(
            {
                ("history", "full"): torch.zeros(1),
                ("masks", "all_assistant_mask"): rows.mask[None],
                ("masks", "all_attention_mask"): torch.ones_like(rows.mask)[None],
                ("next", "teacher_log_probs", "full"): teacher,
            },
            batch_size=[1],
        )
        return number_of(function(actor, **options)(data).loss_distill, rows)

    return Loss(name, call, frozenset({"mask"}))


def ms_swift(
    function: Callable[..., Any], name: str, *, top_k: int | None = None, **options: Any
) -> Loss:
    """ms-swift's `gkd_loss(student [1, N, V], TeacherOutput, labels, beta, temperature)`.

    The total over the number of rows that it counted, as its trainer divides it.

    Args:
        top_k: entries of the teacher that are kept; all if None.
    """
    takes = keywords(function, name, options) & {"temperature"} | {"mask"}

    def call(rows: Rows) -> Tensor:
        module = needed("swift.rlhf_trainers.gkd_loss", "pip install 'ms-swift>=4.6'")
        labels = torch.where(rows.mask, rows.tokens, IGNORED)[None]
        teacher = module.TeacherOutput(full_logits=rows.teacher[None], labels=labels)
        if top_k is not None:
            teacher = teacher.to_topk(min(top_k, rows.teacher.shape[1]))
        extra = {"temperature": rows.temperature} if "temperature" in takes else {}
        total, counted = function(rows.student[None], teacher, labels, **extra, **options)
        return number_of(total / counted, rows)

    return Loss(name, call, takes)
