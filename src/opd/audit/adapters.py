"""Adapters: the loss functions of other packages, brought to the form that the audit asks.

Each is told the function (or class) as its package has it, and calls it with logits of one
response whose rows predict its tokens. No package is imported before a loss of it is called, and
then only for the data that its losses take: the function that was found is what is audited.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from opd.audit.adapters_batches import nemo_rl, slime, tinker, verl, verl_policy
from opd.audit.adapters_logits import liger, logp, ms_swift, pair, torchrl, trl, trl_chunked
from opd.audit.loss import Loss, bare, linear
from opd.errors import ConfigError, nearest

__all__ = ["ADAPTERS", "FORMS", "adapt"]


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
    return ADAPTERS[adapter](function, name, **options)


ADAPTERS: Mapping[str, Callable[..., Loss]] = {
    "rows": bare,
    "reduced": bare,
    "linear": linear,
    "pair": pair,
    "logp": logp,
    "trl": trl,
    "trl_chunked": trl_chunked,
    "liger": liger,
    "torchrl": torchrl,
    "ms_swift": ms_swift,
    "verl": verl,
    "verl_policy": verl_policy,
    "slime": slime,
    "nemo_rl": nemo_rl,
    "tinker": tinker,
}
"""From a function, its name and further options of it to a loss."""

FORMS: Mapping[str, str] = {
    "rows": "f(student_logits [N, V], teacher_logits [N, V], tokens [N]) -> [N]; the default",
    "reduced": "the same arguments -> one number",
    "linear": "f(student_hidden [N, H], student_weight [V, H], teacher_hidden, teacher_weight, "
    "tokens) -> one number",
    "pair": "f(student_logits, teacher_logits) -> [N], [N, V] or one number; no tokens",
    "logp": "f(student_logp [N], teacher_logp [N]) -> [N] or one number",
    "trl": "TRL: generalized_jsd_loss of GKDTrainer, GOLDTrainer, IWOPDTrainer; beta",
    "trl_chunked": "TRL: ChunkedDivergenceFunction; beta",
    "liger": "Liger: a LigerFusedLinear...Loss class of chunked_loss, with its options",
    "torchrl": "torchrl: DistillationLoss; kl_direction",
    "ms_swift": "ms-swift: gkd_loss; beta, temperature, top_k",
    "verl": "verl: distillation_loss; loss_mode, use_policy_gradient, defaults=dataclass or yaml",
    "verl_policy": "verl: a policy loss of core_algos; loss_agg_mode, clip_ratio, ...",
    "slime": "slime: f(args, batch, logits, sum_of_sample_mean) -> (loss, metrics)",
    "nemo_rl": "NeMo-RL: a loss function, class or instance; top_k and the options of its config",
    "tinker": "tinker: f(data, logprobs) -> (loss, metrics); teacher=KEY, mask=KEY, dense=True",
}
"""What a function looks like, for people. Constants alone: `opd audit --help` reads them here."""
