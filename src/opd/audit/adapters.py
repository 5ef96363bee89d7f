"""Adapters: the loss functions of other packages, brought to the form that the audit asks.

Each is told the function (or class) as its package has it, and calls it with logits of one
response whose rows predict its tokens. No package is imported before a loss of it is called, and
then only for the data that its losses take: the function that was found is what is audited.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from opd.audit.adapters_batches import nemo_rl, slime, tinker, verl, verl_policy
from opd.audit.adapters_logits import liger, logp, ms_swift, pair, torchrl, trl, trl_chunked
from opd.audit.loss import Loss, bare, linear
from opd.errors import ConfigError, nearest

__all__ = ["ADAPTERS", "Adapter", "adapt"]


@dataclass(frozen=True)
class Adapter:
    """How a kind of loss is called.

    Attributes:
        build: from the function, its name and further options of it to a loss.
        form: what the function looks like, for people.
    """

    build: Callable[..., Loss]
    form: str


def adapt(function: Callable[..., Any], name: str, adapter: str, **options: Any) -> Loss:
    """Bring a function to the audit's form.

    Args:
        name: what the loss is called in what is printed.
        adapter: of `ADAPTERS`.
        options: what the function is told besides, such as `beta`.

    Raises:
        ConfigError: there is no such adapter, or the function has no such option.
    """
    if adapter not in ADAPTERS:
        raise ConfigError(f"there is no adapter {adapter!r}. {nearest(adapter, ADAPTERS)}")
    return ADAPTERS[adapter].build(function, name, **options)


ADAPTERS: Mapping[str, Adapter] = {
    "rows": Adapter(
        bare, "f(student_logits [N, V], teacher_logits [N, V], tokens [N]) -> [N]; the default"
    ),
    "reduced": Adapter(bare, "the same arguments, returns one number"),
    "linear": Adapter(
        linear,
        "f(student_hidden [N, H], student_weight [V, H], teacher_hidden, teacher_weight, tokens) "
        "-> one number",
    ),
    "pair": Adapter(
        pair, "f(student_logits, teacher_logits) -> [N], [N, V] or one number; no tokens"
    ),
    "logp": Adapter(
        logp,
        "f(student_logp [N], teacher_logp [N]) -> [N] or one number, of the tokens; teacher_first",
    ),
    "trl": Adapter(trl, "TRL: generalized_jsd_loss of GKDTrainer, GOLDTrainer, IWOPDTrainer"),
    "trl_chunked": Adapter(trl_chunked, "TRL: ChunkedDivergenceFunction; beta"),
    "liger": Adapter(liger, "Liger: a LigerFusedLinear...Loss class of chunked_loss"),
    "torchrl": Adapter(torchrl, "torchrl: DistillationLoss; kl_direction"),
    "ms_swift": Adapter(ms_swift, "ms-swift: gkd_loss; beta, top_k"),
    "verl": Adapter(verl, "verl: distillation_loss; loss_mode, defaults=dataclass or yaml"),
    "verl_policy": Adapter(verl_policy, "verl: a policy loss of core_algos; loss_agg_mode"),
    "slime": Adapter(slime, "slime: f(args, batch, logits, sum_of_sample_mean) -> (loss, metrics)"),
    "nemo_rl": Adapter(nemo_rl, "NeMo-RL: a loss function, class or instance; top_k"),
    "tinker": Adapter(
        tinker, "tinker: f(data, logprobs) -> (loss, metrics); teacher=KEY, mask=KEY, dense"
    ),
}
