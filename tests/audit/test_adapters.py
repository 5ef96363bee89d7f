"""Losses written in the convention of each framework, without the framework.

Reverse KL is found to be it, masks and counts arrive where the convention has them, and a mistake
is found.

The data classes that an adapter imports are stood in for by the few fields that losses read.
"""

# Losses as their users write them, without types.
# mypy: allow-untyped-defs, allow-untyped-calls

from __future__ import annotations

import enum
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType, ModuleType, SimpleNamespace
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from opd.audit import adapters_batches
from opd.audit.adapters import ADAPTERS, FORMS, adapt
from opd.audit.subject import response
from opd.audit.verdict import Verdict, audit_loss
from opd.errors import ConfigError


def kl(first: Tensor, second: Tensor) -> Tensor:
    return (first.exp() * (first - second)).sum(-1)


def both(student, teacher, temperature=1.0):
    return (side.div(temperature).log_softmax(-1) for side in (student, teacher.detach()))


# --------------------------------------------------------------------------------------------
# Bare functions


def pair_entries(student, teacher):
    student, teacher = both(student, teacher)
    return student.exp() * (student - teacher)


def pair_total(student, teacher, *, forward=False):
    student, teacher = both(student, teacher)
    return (kl(teacher, student) if forward else kl(student, teacher)).sum()


def k2(student, teacher):
    return (student - teacher.detach()).square() / 2


def k2_teacher_first(teacher, student):
    return k2(student, teacher)


def k2_of_two(one, other):
    return k2(other, one)


def k3(student, teacher):
    log_ratio = teacher.detach() - student
    return log_ratio.exp() - 1 - log_ratio


# --------------------------------------------------------------------------------------------
# TRL, Liger, torchrl, ms-swift


def jsd(
    student_logits,
    teacher_logits,
    labels=None,
    beta=0.5,
    temperature=1.0,
    reduction="batchmean",
    num_items_in_batch=None,
):
    assert beta == 1.0
    losses = kl(*both(student_logits, teacher_logits, temperature))[labels != -100]
    if reduction == "none":
        entries = losses[:, None]
        return torch.cat([entries, torch.zeros_like(entries)], -1)
    if num_items_in_batch is not None:
        return losses.sum() / num_items_in_batch
    return losses.sum() / max(len(losses), 1)


def jsd_of_all_rows(student_logits, teacher_logits, labels=None, num_items_in_batch=None):
    return kl(*both(student_logits, teacher_logits)).sum() / (num_items_in_batch or 1)


def jsd_own_count(student_logits, teacher_logits, labels=None, num_items_in_batch=None):
    return jsd(student_logits, teacher_logits, labels, 1.0)


def jsd_student_temperature(student_logits, teacher_logits, labels=None, temperature=1.0):
    return jsd(student_logits / temperature, teacher_logits, labels, 1.0)


class Chunked:
    """An autograd function is called with positions alone."""

    @staticmethod
    def forward(
        ctx, hidden, weight, bias, teacher_hidden, teacher_weight, teacher_bias, beta, temperature=1
    ):
        assert bias is None is teacher_bias
        student, teacher = hidden @ weight.T, teacher_hidden @ teacher_weight.T
        student, teacher = both(student.float(), teacher.float(), temperature)
        assert beta in (0.0, 1.0)
        losses = kl(student, teacher) if beta else kl(teacher, student)
        return losses, -(student.exp() * student).sum(-1)

    @classmethod
    def apply(cls, *arguments):
        return cls.forward(None, *arguments)


class Fused:
    def __init__(self, weight_hard_loss=0.0, ignore_index=-100, temperature=1.0, compiled=True):
        assert not compiled
        self.hard, self.ignored, self.temperature = weight_hard_loss, ignore_index, temperature

    def __call__(self, hidden, weight, teacher_hidden, teacher_weight, labels):
        student, teacher = both(
            hidden @ weight.T, teacher_hidden @ teacher_weight.T, self.temperature
        )
        counts = labels != self.ignored
        soft = kl(student, teacher)[counts].sum()
        hard = -student[counts].gather(-1, labels[counts][:, None]).sum()
        return (soft + self.hard * hard) / counts.sum().clamp(min=1)


class TokenKL:
    def __init__(self, actor_network, tokenizer=None, estimator="k2"):
        self.actor, self.estimator = actor_network, {"k2": k2, "k3": k3}[estimator]

    def __call__(self, data):
        student = self.actor(data)["log_probs", "full"]
        counts = data["masks", "all_assistant_mask"] & data["masks", "all_attention_mask"]
        losses = self.estimator(student, data["next", "teacher_log_probs", "full"])[counts]
        return SimpleNamespace(loss_distill=losses.sum() / max(len(losses), 1))


def gkd(student_logits, teacher_output, labels, beta, temperature):
    counts = labels != -100
    assert torch.equal(teacher_output.labels, labels)
    student = student_logits[counts]
    if teacher_output.topk is not None:
        values, ids = teacher_output.topk
        student, teacher = student.gather(-1, ids[counts]), values[counts]
    else:
        teacher = teacher_output.full_logits[counts]
    return kl(*both(student, teacher, temperature)).sum(), counts.sum()


@dataclass
class TeacherOutput:
    full_logits: Tensor
    labels: Tensor
    topk: Any = None

    def to_topk(self, k):
        return TeacherOutput(self.full_logits, self.labels, self.full_logits.topk(k, -1))


# --------------------------------------------------------------------------------------------
# verl


@dataclass
class DistillationLossConfig:
    loss_mode: str = "k3"
    topk: int | None = 128
    use_task_rewards: bool = True
    loss_max_clamp: float | None = 10.0
    use_policy_gradient: bool = True

    @property
    def loss_settings(self):
        return SimpleNamespace(use_topk="topk" in self.loss_mode)


@dataclass
class DistillationConfig:
    distillation_loss: DistillationLossConfig


@dataclass
class PolicyLossConfig:
    dro_beta: float | None = None


@dataclass
class FSDPActorConfig:
    rollout_n: int
    use_dynamic_bsz: bool
    loss_agg_mode: str = "token-mean"
    clip_ratio: float = 0.2
    policy_loss: PolicyLossConfig = field(default_factory=PolicyLossConfig)
    global_batch_info: dict = field(default_factory=dict)


def of_response(values, data):
    """From positions of a packed sequence, each of which predicts the token behind it."""
    length, prompt = data["responses"].shape[1], data["prompts"].shape[1]
    return values.values()[prompt - 1 : prompt - 1 + length][None]


def mean_of(losses, mask, count):
    return (losses * mask).sum() / (mask.sum() if count is None else count)


def distillation_loss(config, distillation_config, model_output, data):
    settings = distillation_config.distillation_loss
    assert not settings.use_task_rewards
    assert data["attention_mask"].shape == (1, 1 + data["responses"].shape[1])
    mask, count = data["response_mask"], data["batch_num_tokens"]
    if settings.loss_settings.use_topk:
        losses = of_response(model_output["distillation_losses"], data)
        return mean_of(losses, mask, count), {}
    student = of_response(model_output["log_probs"], data)
    teacher = of_response(data["teacher_logprobs"], data).squeeze(-1)
    losses = {"k2": k2, "k3": k3}.get(settings.loss_mode, k2)(student, teacher)
    if settings.use_policy_gradient:
        ratio = (student - data["old_log_probs"]).exp()
        losses = ratio * (student - teacher).detach()
    if settings.loss_max_clamp is not None:
        losses = losses.clamp(max=settings.loss_max_clamp)
    return mean_of(losses, mask, count), {"loss_max": losses.max()}


def shifted_distillation_loss(config, distillation_config, model_output, data):
    """Takes the position of the token for the one that predicts it, of the teacher alone."""
    scores = data["teacher_logprobs"].values()
    moved = {**data, "teacher_logprobs": adapters_batches._jagged(scores.roll(-1, 0))}
    return distillation_loss(config, distillation_config, model_output, moved)


def compute_topk_loss(config, distillation_config, data, student_logits, data_format):
    assert data_format == "thd"
    student = student_logits.log_softmax(-1)
    ids, teacher = data["teacher_ids"].values()[None], data["teacher_logprobs"].values()[None]
    return {"distillation_losses": kl(teacher, student.gather(-1, ids))}


def policy_loss(
    old_log_prob,
    log_prob,
    advantages,
    response_mask,
    loss_agg_mode="token-mean",
    config=None,
    rollout_is_weights=None,
):
    assert loss_agg_mode == "token-mean"
    ratio = (log_prob - old_log_prob).exp()
    clipped = ratio.clamp(1 - config.clip_ratio, 1 + config.clip_ratio)
    losses = torch.maximum(-ratio * advantages, -clipped * advantages)
    return mean_of(losses, response_mask, config.global_batch_info["batch_num_tokens"]), {}


def policy_loss_of_mean(old_log_prob, log_prob, advantages, response_mask, **rest):
    same = advantages.detach().mean().expand_as(advantages)
    return policy_loss(old_log_prob, log_prob, same, response_mask, **rest)


# --------------------------------------------------------------------------------------------
# slime, NeMo-RL, tinker


def slime_k2(args, batch, logits, sum_of_sample_mean, estimator=k2):
    assert logits.dtype == torch.float32
    (tokens,), (length,) = batch["unconcat_tokens"], batch["response_lengths"]
    assert logits.shape[:2] == (1, len(tokens))
    assert batch["total_lengths"] == [len(tokens)]
    prompt = len(tokens) - length
    logp = logits[0].log_softmax(-1)[prompt - 1 : -1].gather(-1, tokens[prompt:, None]).squeeze(-1)
    loss = sum_of_sample_mean(estimator(logp, torch.cat(batch["teacher_log_probs"])))
    return loss, {"loss": loss.detach()}


def slime_without_mask(args, batch, logits, sum_of_sample_mean):
    return slime_k2(args, batch, logits, lambda values: values.mean())


class InputType(enum.Enum):
    LOGPROB = "logprob"
    DISTILLATION = "distillation"
    DRAFT = "draft"


class KLConfig(NamedTuple):
    kl_type: str = "reverse"


class TopKLoss:
    input_type = InputType.DISTILLATION

    def __init__(self, cfg: KLConfig):
        self.reverse = cfg.kl_type == "reverse"

    def __call__(
        self, student_topk_logprobs, teacher_topk_logprobs, H_all, data, global_valid_seqs,  # noqa: N803
        global_valid_toks,
    ):  # fmt: skip
        pair = (student_topk_logprobs, teacher_topk_logprobs)
        losses = kl(*pair) if self.reverse else kl(*reversed(pair))
        mask = data["token_mask"][:, 1:] * data["sample_mask"][:, None]
        return (losses * mask).sum() / global_valid_toks.clamp(min=1), {}


class GradientLoss:
    input_type = InputType.LOGPROB

    def __init__(self, first=0):
        self.first = first

    def __call__(self, next_token_logprobs, data, global_valid_seqs, global_valid_toks):
        old, advantages, mask = (
            data[key][:, 1:] for key in ("prev_logprobs", "advantages", "token_mask")
        )
        losses = -(next_token_logprobs - old).exp() * advantages * mask
        return losses[:, self.first :].sum() / global_valid_toks.clamp(min=1), {}


class DraftLoss(GradientLoss):
    input_type = InputType.DRAFT


def topk_inputs(logits, data, loss_fn):
    ids = data["teacher_topk_indices"][:, :-1]
    teacher = data["teacher_topk_logits"][:, :-1].log_softmax(-1)
    student = logits.float()[:, :-1].gather(-1, ids).log_softmax(-1)
    sides = {"student_topk_logprobs": student, "teacher_topk_logprobs": teacher.float()}
    return {**sides, "H_all": None}, data


def datum_k2(data, logprobs, estimator=k2):
    total = 0.0
    for datum, student in zip(data, logprobs, strict=True):
        inputs = {key: value.to_torch() for key, value in datum.loss_fn_inputs.items()}
        assert student.dtype == inputs["teacher_logprobs"].dtype == torch.float32
        assert len(inputs["target_tokens"]) == len(student)
        losses = estimator(student, inputs["teacher_logprobs"])
        total = total + (losses * inputs["weights"]).sum()
    return total, {"loss": float(total.detach())}


def datum_k3(data, logprobs):
    return datum_k2(data, logprobs, k3)


def datum_dense(data, logprobs, *, forward=False):
    (datum,), (student,) = data, logprobs
    teacher = datum.loss_fn_inputs["scores"].to_torch()
    pair = (teacher, student) if forward else (student, teacher)
    losses = kl(*pair) * datum.loss_fn_inputs["mask"].to_torch()
    return losses.sum(), {}


def datum_lists(data, logprobs):
    """Reads `data`, `shape` and `dtype` in place of tensors."""
    (datum,), (student,) = data, logprobs
    scores = datum.loss_fn_inputs["teacher_logprobs"]
    assert scores.dtype == "float32"
    assert scores.shape == [len(student)]
    assert datum.loss_fn_inputs["target_tokens"].dtype == "int64"
    assert scores.data == scores.tolist()
    return k2(student, torch.tensor(scores.data)).sum(), {}


# --------------------------------------------------------------------------------------------
# What the adapters import


@pytest.fixture(autouse=True)
def _packages(monkeypatch: pytest.MonkeyPatch) -> None:
    """Modules with the data classes that losses of each framework are given."""

    def module(name: str, **content: Any) -> None:
        made = ModuleType(name)
        vars(made).update(content)
        monkeypatch.setitem(sys.modules, name, made)

    def assign(data: dict, **values: Any) -> None:
        data.update(values)

    module("tensordict", TensorDict=lambda values, batch_size: dict(values))
    module("tensordict.nn", TensorDictModule=Actor)
    module("swift.rlhf_trainers.gkd_loss", TeacherOutput=TeacherOutput)
    classes = (DistillationLossConfig, DistillationConfig, PolicyLossConfig, FSDPActorConfig)
    module("verl.workers.config", **{one.__name__: one for one in classes})
    module("verl.utils.tensordict_utils", assign_non_tensor=assign)
    module("verl.trainer.distillation.losses", compute_topk_loss=compute_topk_loss)
    module("nemo_rl.distributed.batched_data_dict", BatchedDataDict=dict)
    module("nemo_rl.algorithms.loss.utils", prepare_loss_input=topk_inputs)
    monkeypatch.setitem(sys.modules, "tinker.types", None)  # not to be found


class Actor:
    def __init__(self, function, in_keys, out_keys):
        self.function, self.inputs, self.outputs = function, in_keys, out_keys

    def __call__(self, data):
        return dict.fromkeys(self.outputs, self.function(*(data[key] for key in self.inputs)))


# --------------------------------------------------------------------------------------------
# Reverse KL, and a mistake


class Case(NamedTuple):
    """A loss in a framework's convention; `finds` is the mistake in it, if any."""

    adapter: str
    function: Callable[..., Any]
    options: Mapping[str, Any] = MappingProxyType({})
    finds: str = ""


TOPK = {"loss_mode": "forward_kl_topk", "use_policy_gradient": False, "loss_max_clamp": None}
PLAIN = {"loss_mode": "k2", "use_policy_gradient": False, "loss_max_clamp": None}

CASES = (
    Case("pair", pair_entries),
    Case("pair", pair_total),
    Case("pair", pair_total, {"forward": True}, "another-divergence"),
    Case("logp", k2),
    Case("logp", k2_teacher_first, {"teacher_first": True}),
    Case("logp", k3, {}, "another-divergence"),
    Case("logp", k2_of_two, {}, "no-teacher-gradient"),
    Case("trl", jsd, {"beta": 1.0}),
    Case("trl", jsd, {"beta": 1.0, "temperature": 1.0}),
    Case("trl", jsd, {"beta": 1.0, "reduction": "none"}),
    Case("trl", jsd_of_all_rows, {}, "masked-rows"),
    Case("trl", jsd_own_count, {}, "mean-of-means"),
    Case("trl", jsd_student_temperature, {}, "temperature"),
    Case("trl_chunked", Chunked, {"beta": 1.0}),
    Case("trl_chunked", Chunked, {"beta": 0.0}, "another-divergence"),
    Case("liger", Fused),
    Case("liger", Fused, {"ignore_index": -1, "temperature": 1.0}),
    Case("liger", Fused, {"weight_hard_loss": 0.5}, "hard-labels"),
    Case("torchrl", TokenKL),
    Case("torchrl", TokenKL, {"estimator": "k3"}, "another-divergence"),
    Case("ms_swift", gkd, {"beta": 1.0}),
    Case("ms_swift", gkd, {"beta": 1.0, "temperature": 1.0, "top_k": 99}),
    Case("ms_swift", gkd, {"beta": 1.0, "top_k": 4}, "another-divergence"),
    Case("verl", distillation_loss, PLAIN),
    Case("verl", distillation_loss, {"loss_max_clamp": None}),
    Case("verl", distillation_loss, {**PLAIN, "loss_mode": "k3"}, "another-divergence"),
    Case("verl", distillation_loss, {**PLAIN, "loss_max_clamp": 10.0}, "dead-rows"),
    Case("verl", distillation_loss, TOPK, "another-divergence"),
    Case("verl", shifted_distillation_loss, PLAIN, "off-by-one"),
    Case("verl_policy", policy_loss),
    Case("verl_policy", policy_loss, {"loss_agg_mode": "token-mean", "dro_beta": 1.0}),
    Case("verl_policy", policy_loss_of_mean, {}, "another-divergence"),
    Case("slime", slime_k2),
    Case("slime", slime_k2, {"calculate_per_token_loss": True}),
    Case("slime", slime_without_mask, {}, "masked-rows"),
    Case("nemo_rl", TopKLoss),
    Case("nemo_rl", TopKLoss(KLConfig())),
    Case("nemo_rl", GradientLoss()),
    Case("nemo_rl", TopKLoss, {"kl_type": "forward"}, "another-divergence"),
    Case("nemo_rl", TopKLoss, {"top_k": 4}, "another-divergence"),
    Case("nemo_rl", GradientLoss(first=1), {}, "masked-rows"),
    Case("tinker", datum_k2, {"mask": "weights"}),
    Case("tinker", datum_lists),
    Case("tinker", datum_dense, {"mask": "mask", "teacher": "scores", "dense": True}),
    Case("tinker", datum_k3, {"mask": "weights"}, "another-divergence"),
)  # fmt: skip


def audited(case: Case) -> Verdict:
    name = getattr(case.function, "__name__", type(case.function).__name__)
    loss = adapt(case.function, name, case.adapter, **case.options)
    return audit_loss(loss, claim="reverse_kl")


def name_of(case: Case) -> str:
    name = getattr(case.function, "__name__", type(case.function).__name__)
    return "-".join([case.adapter, name, case.finds or "right"])


@pytest.mark.parametrize("case", CASES, ids=name_of)
def test_reverse_kl_is_found_to_be_it_and_a_mistake_is_found(case: Case) -> None:
    verdict = audited(case)
    if case.finds:
        assert case.finds in {finding.name for finding in verdict.faults}, verdict.findings
        assert verdict.holds is False
    else:
        assert verdict.holds, verdict.findings
        assert verdict.descends == "reverse KL"
        assert verdict.match is not None
        assert verdict.match.residual < 1e-5


MASKS = ("trl", "liger", "torchrl", "ms_swift", "verl", "verl_policy", "slime", "nemo_rl", "tinker")
COUNTS = ("trl", "verl", "verl_policy", "slime", "nemo_rl")
TEMPERATURES = ("trl", "trl_chunked", "liger", "ms_swift")


FOUND: dict[str, Verdict] = {}
"""Of the first right loss of every adapter."""


@pytest.mark.parametrize(
    ("adapter", "check"),
    [
        *((adapter, "mask") for adapter in MASKS),
        *((adapter, "micro-batches") for adapter in COUNTS),
        *((adapter, "temperature") for adapter in TEMPERATURES),
    ],
)
def test_what_a_convention_can_say_is_said(adapter: str, check: str) -> None:
    if adapter not in FOUND:
        FOUND[adapter] = audited(
            next(case for case in CASES if case.adapter == adapter and not case.finds)
        )
    (found,) = (found for found in FOUND[adapter].checks if found.name == check)
    assert found.status == "ok", found.message


@pytest.mark.parametrize("adapter", sorted(set(ADAPTERS) - {"rows", "reduced", "linear"}))
def test_every_adapter_is_tried_right_and_wrong(adapter: str) -> None:
    finds = {case.finds for case in CASES if case.adapter == adapter}
    assert "" in finds
    assert len(finds) > 1


def test_the_help_knows_every_adapter() -> None:
    assert list(FORMS) == list(ADAPTERS)


@pytest.mark.parametrize("case", [case for case in CASES if not case.finds], ids=name_of)
def test_nothing_is_written_into_the_rows(case: Case) -> None:
    rows = response(1, 4, torch.float64)
    before = [value.clone() for value in (rows.student, rows.teacher, rows.tokens, rows.mask)]
    adapt(case.function, "it", case.adapter, **case.options).call(rows)
    after = [rows.student, rows.teacher, rows.tokens, rows.mask]
    assert all(torch.equal(one, other) for one, other in zip(before, after, strict=True))


# --------------------------------------------------------------------------------------------
# Options and packages


@pytest.mark.parametrize(
    ("adapter", "function", "options", "message"),
    [
        ("pair", pair_total, {"forwards": True}, "no option 'forwards'. Did you mean 'forward'"),
        ("logp", k2, {"beta": 1}, "k2 has no option 'beta'"),
        ("logp", k2_teacher_first, {}, "first argument 'teacher'.*teacher_first=True"),
        ("logp", k2, {"teacher_first": True}, "first argument 'student'.*teacher_first=False"),
        ("logp", k2, {"student": 1}, "'student' is what it is called with"),
        ("pair", Fused, {}, "is a class; name an instance of it"),
        ("rows", pair_entries, {}, "takes 2 arguments.*--adapter pair"),
        ("trl", jsd, {"betta": 1}, "Did you mean 'beta'"),
        ("trl_chunked", Chunked, {}, "needs beta: add `--set beta=VALUE`"),
        ("trl_chunked", Chunked, {"beta": 1, "temprature": 2}, "Did you mean 'temperature'"),
        ("liger", Fused, {"chunk": 2}, "no option 'chunk'"),
        ("torchrl", TokenKL, {"estimater": "k3"}, "Did you mean 'estimator'"),
        ("ms_swift", gkd, {"gamma": 1}, "no option 'gamma'"),
        ("verl", distillation_loss, {"loss_max_clmp": 1}, "Did you mean 'loss_max_clamp'"),
        ("verl", distillation_loss, {"defaults": "shipped"}, "'dataclass' or 'yaml'"),
        ("verl_policy", policy_loss, {"clip_ration": 1}, "Did you mean 'clip_ratio'"),
        ("nemo_rl", TopKLoss, {"kl_typ": "forward"}, "Did you mean 'kl_type'"),
        ("nemo_rl", GradientLoss(), {"first": 1}, "is made already"),
        ("nemo_rl", GradientLoss, {}, "does not say of what type its first is"),
        ("nemo_rl", DraftLoss(), {}, "input_type 'draft'"),
        ("tinker", datum_dense, {"forwards": True}, "Did you mean 'forward'"),
    ],
)
def test_an_option_that_does_not_exist_is_refused(
    adapter: str, function: Any, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        adapt(function, getattr(function, "__name__", "it"), adapter, **options)


@pytest.mark.parametrize(
    ("adapter", "function", "options", "module", "install"),
    [
        ("torchrl", TokenKL, {}, "tensordict", "torchrl"),
        ("ms_swift", gkd, {"beta": 1.0}, "swift.rlhf_trainers.gkd_loss", "ms-swift"),
        ("verl", distillation_loss, PLAIN, "verl.workers.config", "verl"),
        ("verl", distillation_loss, PLAIN, "tensordict", "tensordict"),
        ("verl_policy", policy_loss, {}, "verl.workers.config", "verl"),
        ("nemo_rl", TopKLoss, {}, "nemo_rl.distributed.batched_data_dict", "NVIDIA-NeMo/RL"),
    ],
)
def test_a_package_that_is_missing_is_named_with_the_way_to_install_it(
    adapter: str,
    function: Any,
    options: dict[str, Any],
    module: str,
    install: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ConfigError, match=rf"needs {module}.*`pip install .*{install}"):
        adapt(function, "it", adapter, **options).call(response(1, 3, torch.float64))


def test_verls_shipped_defaults_are_those_of_its_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "trainer/config/distillation"
    folder.mkdir(parents=True)
    text = "{_target_: x, loss_mode: k2, loss_max_clamp: null, use_policy_gradient: false}"
    (folder / "distillation.yaml").write_text(f"distillation_loss: {text}\n")
    root = ModuleType("verl")
    root.__path__ = [str(tmp_path)]
    monkeypatch.setitem(sys.modules, "verl", root)
    assert audited(Case("verl", distillation_loss, {"defaults": "yaml"})).holds
    told = audited(Case("verl", distillation_loss, {"defaults": "yaml", "loss_mode": "k3"}))
    assert told.descends == "forward KL"


def test_verl_may_average_over_sequences() -> None:
    loss = adapt(distillation_loss, "it", "verl", loss_agg_mode="seq-mean-token-mean", **PLAIN)
    assert loss.takes == {"mask", "old_logp"}
    assert adapt(distillation_loss, "it", "verl", **PLAIN).takes == {"mask", "old_logp", "count"}


def test_a_top_k_beyond_the_vocabulary_is_all_of_it() -> None:
    loss = adapt(distillation_loss, "it", "verl", **TOPK, topk=100)
    assert audit_loss(loss, claim="forward_kl").holds
    loss = adapt(distillation_loss, "it", "verl", **TOPK, topk=4)
    told = audit_loss(loss).descends
    assert told == "forward KL on the teacher's top 4, the rest left out"


def test_tinkers_own_datum_is_used_where_it_is_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    made = []

    def datum(model_input, loss_fn_inputs):
        made.append(model_input)
        scores = {key: adapters_batches._Scores(value) for key, value in loss_fn_inputs.items()}
        return SimpleNamespace(model_input=model_input, loss_fn_inputs=scores)

    types = ModuleType("tinker.types")
    vars(types).update(Datum=datum, ModelInput=SimpleNamespace(from_ints=list))
    monkeypatch.setitem(sys.modules, "tinker.types", types)
    rows = response(1, 4, torch.float64)
    adapt(datum_k2, "it", "tinker").call(rows)
    assert made == [[0, *rows.tokens[:-1].tolist()]]
