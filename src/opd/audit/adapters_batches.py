"""Adapters for losses that are called with a framework's batch: sequences, masks and scores.

Every batch is one sequence: one token of prompt and the N tokens of the response. A position's
logits predict the token behind it, so there are N + 1 positions and the last is a dummy.

Where a policy gradient is given advantages they are `teacher_logp - old_logp`, held fixed. Scores
are float32 where the framework sends them so.

Axes: N rows, V vocabulary of the student, U of the teacher, S = N + 1.
"""

from __future__ import annotations

import dataclasses
import importlib
import inspect
import typing
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from opd.audit.adapters_logits import (
    known_options,
    log_probs,
    logp_of,
    needed,
    number_of,
)
from opd.audit.loss import Loss, Rows
from opd.errors import ConfigError, nearest

__all__ = ["nemo_rl", "slime", "tinker", "verl", "verl_policy"]


def _with_dummy(values: Float[Tensor, "N ..."]) -> Float[Tensor, "S ..."]:
    """N positions that predict the response, and the last, that nobody looks at."""
    return torch.cat([values, values.new_zeros(1, *values.shape[1:])])


def _with_prompt(values: Tensor) -> Tensor:
    """The prompt's one token, and N of the response."""
    return torch.cat([values.new_zeros(1), values])


def _advantage(rows: Rows) -> Float[Tensor, " N"]:
    return (logp_of(rows.teacher, rows.tokens) - rows.old).detach()


# --------------------------------------------------------------------------------------------
# verl

VERL = "pip install 'verl>=0.9' tensordict"


def verl(
    function: Callable[..., Any],
    name: str,
    *,
    defaults: Literal["dataclass", "yaml"] = "dataclass",
    loss_agg_mode: str = "token-mean",
    **options: Any,
) -> Loss:
    """verl's `distillation_loss(config, distillation_config, model_output, data)`.

    The loss is the registered one that `loss_mode` names. Task rewards are left out. Of a
    vocabulary smaller than `topk` the teacher sends everything.

    Args:
        defaults: of what is not set: those of `DistillationLossConfig`, or of the
            `distillation.yaml` that verl's trainers read.
        loss_agg_mode: how the actor averages.
        options: of `DistillationLossConfig`.
    """
    if defaults not in ("dataclass", "yaml"):
        raise ConfigError(f"defaults is 'dataclass' or 'yaml', got {defaults!r}")
    configs = needed("verl.workers.config", VERL)
    base = _shipped() if defaults == "yaml" else {}
    settings = {**base, **options, "use_task_rewards": False}
    _known_fields(name, settings, configs.DistillationLossConfig)
    takes = {"mask", "old_logp"} | ({"count"} if loss_agg_mode == "token-mean" else set())

    def call(rows: Rows) -> Tensor:
        actor = _actor(configs, loss_agg_mode=loss_agg_mode)
        distilled = configs.DistillationConfig(
            distillation_loss=configs.DistillationLossConfig(**settings)
        )
        data = _verl_data(rows, distilled.distillation_loss)
        student = _with_dummy(rows.student)
        output = {"log_probs": _jagged(_with_dummy(logp_of(rows.student, rows.tokens)))}
        if distilled.distillation_loss.loss_settings.use_topk:
            losses = needed("verl.trainer.distillation.losses", VERL)
            parts = losses.compute_topk_loss(actor, distilled, data, student[None], "thd")
            output |= {key: _jagged(value[0]) for key, value in parts.items()}
        return number_of(function(actor, distilled, output, data), rows)

    return Loss(name, call, frozenset(takes))


def verl_policy(
    function: Callable[..., Any], name: str, *, loss_agg_mode: str | None = None, **options: Any
) -> Loss:
    """A policy loss of verl: `f(old_log_prob, log_prob, advantages, response_mask, ...)`.

    Args:
        loss_agg_mode: how it averages; if None the function's own default, else the actor's.
        options: of `ActorConfig`, such as `clip_ratio`, or of its `policy_loss`.
    """
    configs = needed("verl.workers.config", VERL)
    own = {field.name for field in dataclasses.fields(configs.PolicyLossConfig)}
    policy = {key: value for key, value in options.items() if key in own}
    settings = {key: value for key, value in options.items() if key not in own}
    _known_fields(name, settings, configs.FSDPActorConfig)
    named = inspect.signature(function).parameters.get("loss_agg_mode")
    own_mode = "token-mean" if named is None or named.default is named.empty else named.default
    mode = loss_agg_mode or own_mode
    takes = {"mask", "old_logp"} | ({"count"} if mode == "token-mean" else set())

    def call(rows: Rows) -> Tensor:
        actor = _actor(configs, policy_loss=configs.PolicyLossConfig(**policy), **settings)
        actor.global_batch_info.update(dp_size=1, batch_num_tokens=rows.count)
        result = function(
            old_log_prob=rows.old[None],
            log_prob=logp_of(rows.student, rows.tokens)[None],
            advantages=_advantage(rows)[None],
            response_mask=rows.mask[None].to(rows.old.dtype),
            loss_agg_mode=mode,
            config=actor,
            rollout_is_weights=None,
        )
        return number_of(result, rows)

    return Loss(name, call, frozenset(takes))


def _known_fields(name: str, settings: dict[str, Any], config: type) -> None:
    known_options(name, settings, {field.name: None for field in dataclasses.fields(config)})


def _actor(configs: Any, **settings: Any) -> Any:
    return configs.FSDPActorConfig(**{"rollout_n": 1, "use_dynamic_bsz": True, **settings})


def _shipped() -> dict[str, Any]:
    """What verl's trainers read where a run says nothing."""
    yaml, root = needed("yaml", "pip install pyyaml"), needed("verl", VERL)
    file = Path(root.__path__[0]) / "trainer/config/distillation/distillation.yaml"
    section = yaml.safe_load(file.read_text(encoding="utf-8"))["distillation_loss"]
    return {key: value for key, value in section.items() if not key.startswith("_")}


def _verl_data(rows: Rows, settings: Any) -> Any:
    tensordict, utils = needed("tensordict", VERL), needed("verl.utils.tensordict_utils", VERL)
    teacher = log_probs(rows.teacher).detach()
    if settings.loss_settings.use_topk:
        scores, ids = teacher.topk(min(settings.topk, teacher.shape[1]), -1)
    else:
        ids = rows.tokens[:, None]
        scores = teacher.gather(-1, ids)
    length = len(rows.tokens)
    data = tensordict.TensorDict(
        {
            "prompts": torch.zeros(1, 1, dtype=torch.long),
            "responses": rows.tokens[None],
            "attention_mask": torch.ones(1, 1 + length, dtype=torch.long),
            "response_mask": rows.mask[None].to(scores.dtype),
            "teacher_logprobs": _jagged(_with_dummy(scores)),
            "teacher_ids": _jagged(_with_dummy(ids)),
            "old_log_probs": rows.old[None],
        },
        batch_size=[1],
    )
    count = None if rows.count is None else int(rows.count)
    utils.assign_non_tensor(data, dp_size=1, batch_num_tokens=count, global_batch_size=None)
    return data


def _jagged(values: Float[Tensor, "S ..."]) -> Tensor:
    """One sequence as a nested tensor."""
    return torch.nested.nested_tensor_from_jagged(values, torch.tensor([0, len(values)]))


# --------------------------------------------------------------------------------------------
# slime

SLIME_ARGUMENTS = {
    "advantage_estimator": "grpo",
    "allgather_cp": False,
    "calculate_per_token_loss": False,
    "entropy_coef": 0.0,
    "eps_clip": 0.2,
    "eps_clip_c": None,
    "eps_clip_high": 0.2,
    "get_mismatch_metrics": False,
    "log_probs_chunk_size": -1,
    "loss_type": "custom_loss",
    "opd_kl_coef": 1.0,
    "opd_type": "sglang",
    "recompute_loss_function": False,
    "rollout_temperature": 1.0,
    "rollout_top_p": 1.0,
    "use_kl_loss": False,
    "use_opsm": False,
    "use_rollout_logprobs": False,
    "use_tis": False,
}


def slime(function: Callable[..., Any], name: str, **options: Any) -> Loss:
    """slime's `f(args, batch, logits [1, S, V], sum_of_sample_mean) -> (loss, metrics)`.

    Logits are float32. The batch has `teacher_log_probs`, `log_probs` and `rollout_log_probs` (both
    of whoever wrote the tokens), `advantages`, `loss_masks`, `unconcat_tokens` and the lengths.

    Args:
        options: of `args`, beside slime's defaults; with `calculate_per_token_loss` the reduction
            is a sum, and otherwise a mean over the response's rows of all micro-batches.
    """
    arguments = Namespace(**{**SLIME_ARGUMENTS, **options})
    per_token = arguments.calculate_per_token_loss

    def call(rows: Rows) -> Tensor:
        mask, length = rows.mask.float(), len(rows.tokens)
        total = torch.tensor(rows.total)

        def sum_of_sample_mean(values: Float[Tensor, " N"]) -> Float[Tensor, ""]:
            summed = (values * mask).sum()
            return summed if per_token else summed / total.clamp(min=1)

        old = rows.old.float()
        batch = {
            "unconcat_tokens": [_with_prompt(rows.tokens)],
            "total_lengths": [1 + length],
            "response_lengths": [length],
            "loss_masks": [mask],
            "rollout_mask_sums": [total],
            "log_probs": [old],
            "rollout_log_probs": [old],
            "teacher_log_probs": [logp_of(rows.teacher.detach().float(), rows.tokens)],
            "advantages": [_advantage(rows).float()],
        }
        logits = _with_dummy(rows.student.float())[None]
        return number_of(function(arguments, batch, logits, sum_of_sample_mean), rows)

    takes = {"mask", "old_logp"} | (set() if per_token else {"count"})
    return Loss(name, call, frozenset(takes))


# --------------------------------------------------------------------------------------------
# NeMo-RL

NEMO = "pip install git+https://github.com/NVIDIA-NeMo/RL"


def nemo_rl(function: Any, name: str, *, top_k: int = 64, **options: Any) -> Loss:
    """A loss of NeMo-RL, as an instance or as a class that is made with its config.

    `global_valid_toks` is the count of all micro-batches. By its `input_type` it is told the
    logits, the tokens' log-probabilities, or both sides' on the teacher's top k, as NeMo-RL's own
    `prepare_loss_input` makes them.

    Args:
        top_k: entries that the teacher sends; all of a smaller vocabulary.
        options: of the class's config; those that are not set have its defaults.
    """
    loss = _nemo_loss(function, name, options)
    kind = getattr(getattr(loss, "input_type", None), "value", "logprob")
    if kind not in ("logit", "logprob", "distillation"):
        raise ConfigError(f"{name} has input_type {kind!r}, which needs more than one teacher row")

    def call(rows: Rows) -> Tensor:
        batches = needed("nemo_rl.distributed.batched_data_dict", NEMO)
        old = _with_prompt(rows.old)[None]
        values, ids = rows.teacher.detach().topk(min(top_k, rows.teacher.shape[1]), -1)
        data = batches.BatchedDataDict(
            {
                "input_ids": _with_prompt(rows.tokens)[None],
                "input_lengths": torch.tensor([1 + len(rows.tokens)]),
                "token_mask": _with_prompt(rows.mask.to(rows.old.dtype))[None],
                "sample_mask": torch.ones(1),
                "teacher_topk_logits": _with_dummy(values)[None],
                "teacher_topk_indices": _with_dummy(ids)[None],
                "advantages": _with_prompt(_advantage(rows))[None],
                "prev_logprobs": old,
                "generation_logprobs": old,
                "reference_policy_logprobs": old,
            }
        )
        logits = _with_dummy(rows.student)[None]
        if kind == "distillation":
            utils = needed("nemo_rl.algorithms.loss.utils", NEMO)
            inputs, data = utils.prepare_loss_input(logits, data, loss)
        elif kind == "logprob":  # without its own preparation, which wants an accelerator
            inputs = {"next_token_logprobs": logp_of(rows.student, rows.tokens)[None]}
        else:
            inputs = {"logits": logits}
        result = loss(
            data=data,
            global_valid_seqs=torch.tensor(1.0),
            global_valid_toks=torch.tensor(rows.total),
            **inputs,
        )
        return number_of(result, rows)

    return Loss(name, call, frozenset({"mask", "old_logp", "count"}))


def _nemo_loss(function: Any, name: str, options: dict[str, Any]) -> Any:
    """An instance of a class, made with its config; what is no class as it is."""
    if not isinstance(function, type):
        if options:
            raise ConfigError(f"{name} is made already: its options cannot be set here")
        return function
    parameters = list(inspect.signature(function).parameters)
    if not parameters:
        return function()
    made_by: Any = function.__init__  # type: ignore[misc]
    config = typing.get_type_hints(made_by).get(parameters[0])
    if config is None:
        raise ConfigError(f"{name} does not say of what type its {parameters[0]} is")
    valid = getattr(config, "model_fields", None) or typing.get_type_hints(config)
    known_options(name, options, valid)
    return function(config(**options))


# --------------------------------------------------------------------------------------------
# tinker


def tinker(
    function: Callable[..., Any],
    name: str,
    *,
    teacher: str = "teacher_logprobs",
    mask: str = "",
    dense: bool = False,
    **options: Any,
) -> Loss:
    """A loss for tinker's `forward_backward_custom`: `f(data, logprobs) -> (loss, metrics)`.

    One datum, whose `loss_fn_inputs` hold `target_tokens`, `weights`, `logprobs` (of whoever wrote
    the tokens), `advantages` and the teacher's log-probabilities. It is a `tinker.types.Datum`
    where tinker is installed, and otherwise an object with the same two fields, `model_input` and
    `loss_fn_inputs`, whose inputs have `to_torch()`, `data`, `shape` and `dtype`. Scores are
    float32, as the service's are.

    Args:
        teacher: the key under which the loss looks for the teacher's.
        mask: the key under which it looks for which rows count, 1 or 0; if empty all do.
        dense: log-probabilities of the whole vocabulary, `[N, V]`, in place of the tokens'.
        options: further keyword arguments of the function.
    """
    parameters = inspect.signature(function).parameters
    for option in options:
        if option not in parameters:
            raise ConfigError(f"{name} has no option {option!r}. {nearest(option, parameters)}")

    def call(rows: Rows) -> Tensor:
        student, target = rows.student.float(), rows.teacher.detach().float()
        weights = rows.mask.float()
        inputs = {
            "target_tokens": rows.tokens,
            "weights": weights,
            "logprobs": rows.old.float(),
            "advantages": _advantage(rows).float(),
            teacher: logp_of(target, rows.tokens),
        }
        if mask:
            inputs[mask] = weights
        if dense:
            inputs[teacher] = log_probs(target)
            ids = torch.arange(student.shape[1]).expand(student.shape)
            inputs["target_tokens"] = ids.contiguous()
        scored = log_probs(student) if dense else logp_of(student, rows.tokens)
        datum = _datum(_with_prompt(rows.tokens)[:-1], inputs)
        return number_of(function([datum], [scored], **options), rows)

    return Loss(name, call, frozenset({"old_logp"} | ({"mask"} if mask else set())))


@dataclasses.dataclass(frozen=True)
class _Scores:
    """What is read of tinker's `TensorData`."""

    tensor: Tensor

    def to_torch(self) -> Tensor:
        return self.tensor

    def tolist(self) -> list[Any]:
        values: list[Any] = self.tensor.tolist()
        return values

    @property
    def data(self) -> list[Any]:
        values: list[Any] = self.tensor.flatten().tolist()
        return values

    @property
    def shape(self) -> list[int]:
        return list(self.tensor.shape)

    @property
    def dtype(self) -> str:
        return "float32" if self.tensor.is_floating_point() else "int64"


def _datum(ids: Int[Tensor, " N"], inputs: dict[str, Tensor]) -> Any:
    try:
        types = importlib.import_module("tinker.types")
    except ImportError:
        scores = {key: _Scores(value.detach()) for key, value in inputs.items()}
        return SimpleNamespace(model_input=ids.tolist(), loss_fn_inputs=scores)
    model_input = types.ModelInput.from_ints(ids.tolist())
    return types.Datum(model_input=model_input, loss_fn_inputs=inputs)
