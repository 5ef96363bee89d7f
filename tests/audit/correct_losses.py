"""Losses without a mistake, in the many ways in which people write them: no alarm may sound.

`CORRECT` says of each what it descends on the student's own samples. `facts` are true remarks about
a loss that is right for its purpose, which an audit may make and no other:

    teacher-gradient   it does not detach the teacher, which is computed without gradients anyway
    low-precision      log-probabilities stay in the logits' precision, so give it float32
    not-finite         an entry without mass, or a batch without a valid row, is NaN or infinite
                       where the divergence is a finite number
    mean-of-means      it averages over what it is given and cannot be told a total
    unbounded-ratio    PPO's own clip, unbounded where the advantage is negative

Every function works for one row and more, three entries and more and any floating type.
"""

# Written as people write losses, without types.
# mypy: allow-untyped-defs, allow-untyped-calls

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor
from torch.distributions import Categorical, kl_divergence
from torch.utils.checkpoint import checkpoint

__all__ = ["CORRECT", "Correct"]


@dataclass(frozen=True)
class Correct:
    """A loss without a mistake.

    Attributes:
        claim: `forward_kl`, `reverse_kl`, `jsd:BETA` (of the teacher's weight BETA),
            `skew_forward_kl:A`, `skew_reverse_kl:A`, `alpha:A` (Amari's), `total_variation`,
            `sequence_reverse_kl`, or `none` for a right loss that is none of these.
        facts: see above.
    """

    name: str
    function: Callable[..., Tensor]
    adapter: str
    claim: str
    facts: tuple[str, ...] = ()


_LOSSES: list[Correct] = []


def correct(claim: str, *facts: str, adapter: str = "rows") -> Callable[..., Callable[..., Tensor]]:
    def keep(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
        _LOSSES.append(Correct(function.__name__, function, adapter, claim, facts))
        return function

    return keep


def _of(log_probs: Tensor, tokens: Tensor) -> Tensor:
    return log_probs.gather(-1, tokens[:, None])[:, 0]


def _float(logits: Tensor) -> Tensor:
    return logits if logits.dtype == torch.float64 else logits.float()


def _total(losses: Tensor, mask: Tensor | None, count: int | Tensor | None) -> Tensor:
    if mask is None:
        mask = torch.ones_like(losses, dtype=torch.bool)
    if count is None:
        count = mask.sum().clamp(min=1)
    return torch.where(mask, losses, 0.0).sum() / count


def _safe(weights: Tensor, values: Tensor) -> Tensor:
    """sum of weights * values where 0 * anything is 0, and NaN stays NaN."""
    return (weights * values.masked_fill(weights == 0, 0.0)).sum(-1)


# --------------------------------------------------------------------------------------------
# Forward KL


@correct("forward_kl", "teacher-gradient", "low-precision", "not-finite")
def forward_by_kl_div_of_logs(student_logits, teacher_logits, tokens):
    s = F.log_softmax(student_logits, dim=-1)
    t = F.log_softmax(teacher_logits, dim=-1)
    return F.kl_div(s, t, reduction="none", log_target=True).sum(-1)


@correct("forward_kl", "teacher-gradient", "low-precision", "not-finite")
def forward_by_kl_div_of_probabilities(student_logits, teacher_logits, tokens):
    s = F.log_softmax(student_logits, dim=-1)
    return F.kl_div(s, F.softmax(teacher_logits, dim=-1), reduction="none").sum(-1)


@correct("forward_kl", "not-finite")
def forward_by_kl_div_in_float32(student_logits, teacher_logits, tokens):
    s = F.log_softmax(student_logits, dim=-1, dtype=torch.float32)
    t = F.softmax(teacher_logits.detach(), dim=-1, dtype=torch.float32)
    return F.kl_div(s, t, reduction="none").sum(-1)


@correct("forward_kl", "teacher-gradient", "low-precision", "not-finite")
def forward_by_soft_labels(student_logits, teacher_logits, tokens):
    return F.cross_entropy(student_logits, teacher_logits.softmax(-1), reduction="none")


@correct("forward_kl", "not-finite")
def forward_by_soft_labels_less_entropy(student_logits, teacher_logits, tokens):
    t = _float(teacher_logits.detach()).softmax(-1)
    entropy = -torch.xlogy(t, t).sum(-1)
    return F.cross_entropy(_float(student_logits), t, reduction="none") - entropy


@correct("forward_kl", "teacher-gradient", "low-precision", "not-finite")
def forward_in_plain_formula(student_logits, teacher_logits, tokens):
    s, t = student_logits.log_softmax(-1), teacher_logits.log_softmax(-1)
    return (t.exp() * (t - s)).sum(-1)


@correct("forward_kl", "not-finite")
def forward_in_plain_float32(student_logits, teacher_logits, tokens):
    with torch.no_grad():
        t = teacher_logits.float().log_softmax(-1)
    s = student_logits.float().log_softmax(-1)
    return (t.exp() * (t - s)).sum(dim=-1)


@correct("forward_kl")
def forward_in_float64(student_logits, teacher_logits, tokens):
    t = teacher_logits.detach().double().log_softmax(-1)
    return _safe(t.exp(), t - student_logits.double().log_softmax(-1))


@correct("forward_kl")
def forward_by_logsumexp(student_logits, teacher_logits, tokens):
    """log sum exp(z) - <teacher, z>: the cross entropy without a log-softmax."""
    z = _float(student_logits)
    t = _float(teacher_logits.detach()).softmax(-1)
    return z.logsumexp(-1) - _safe(t, z)


@correct("forward_kl", "not-finite")
def forward_by_einsum(student_logits, teacher_logits, tokens):
    s = _float(student_logits).log_softmax(-1)
    t = _float(teacher_logits.detach()).softmax(-1)
    return -torch.einsum("nv,nv->n", t, s)


@correct("forward_kl", "teacher-gradient", "not-finite")
def forward_by_batched_product(student_logits, teacher_logits, tokens):
    s = _float(student_logits).log_softmax(-1)
    t = _float(teacher_logits).softmax(-1)
    return -torch.bmm(t.unsqueeze(1), s.unsqueeze(2)).reshape(-1)


@correct("forward_kl")
def forward_in_chunks_of_the_vocabulary(student_logits, teacher_logits, tokens):
    z, t = _float(student_logits), _float(teacher_logits.detach())
    lse = torch.stack([c.logsumexp(-1) for c in z.split(2, dim=-1)]).logsumexp(0)
    lse_t = torch.stack([c.logsumexp(-1) for c in t.split(2, dim=-1)]).logsumexp(0)
    loss = lse - lse_t
    for zc, tc in zip(z.split(2, dim=-1), t.split(2, dim=-1), strict=True):
        loss = loss + _safe((tc - lse_t[:, None]).exp(), tc - zc)
    return loss


@correct("forward_kl", "teacher-gradient", "not-finite")
def forward_in_chunks_of_rows(student_logits, teacher_logits, tokens):
    pieces = []
    for i in range(0, len(tokens), 2):
        z, t = student_logits[i : i + 2].float(), teacher_logits[i : i + 2].float()
        pieces.append(F.kl_div(z.log_softmax(-1), t.softmax(-1), reduction="none").sum(-1))
    return torch.cat(pieces)


@correct("forward_kl", "teacher-gradient", "not-finite")
def forward_by_rows_in_a_loop(student_logits, teacher_logits, tokens):
    out = []
    for z, t in zip(student_logits, teacher_logits, strict=True):
        t = _float(t).softmax(0)
        out.append(F.cross_entropy(_float(z), t) + torch.special.entr(t).sum().neg())
    return torch.stack(out)


@correct("forward_kl", "not-finite")
def forward_checkpointed(student_logits, teacher_logits, tokens):
    def part(z, t):
        return F.cross_entropy(z.float(), t.float().softmax(-1), reduction="none")

    return checkpoint(part, student_logits, teacher_logits.detach(), use_reentrant=False)


@correct("forward_kl", "not-finite")
def forward_masked(student_logits, teacher_logits, tokens, mask=None):
    """Accepts the mask and leaves zeros where it is false."""
    t = _float(teacher_logits.detach()).softmax(-1)
    loss = F.kl_div(_float(student_logits).log_softmax(-1), t, reduction="none").sum(-1)
    return loss if mask is None else torch.where(mask, loss, torch.zeros_like(loss))


@correct("forward_kl", "teacher-gradient", "not-finite")
def forward_masked_by_product(student_logits, teacher_logits, tokens, *, mask):
    loss = F.cross_entropy(
        _float(student_logits), _float(teacher_logits).softmax(-1), reduction="none"
    )
    return loss * mask


@correct("forward_kl")
def forward_of_selected_rows(student_logits, teacher_logits, tokens, mask=None):
    """Computes the valid rows only and writes them into zeros."""
    if mask is None:
        mask = torch.ones(len(tokens), dtype=torch.bool)
    s = _float(student_logits[mask]).log_softmax(-1)
    t = _float(teacher_logits[mask].detach()).log_softmax(-1)
    out = torch.zeros(len(tokens), dtype=s.dtype)
    return out.masked_scatter(mask, _safe(t.exp(), t - s))


@correct("forward_kl", "teacher-gradient", "low-precision", "not-finite")
def forward_at_a_temperature(student_logits, teacher_logits, tokens, temperature=1.0):
    s = (student_logits / temperature).log_softmax(-1)
    t = (teacher_logits / temperature).log_softmax(-1)
    return F.kl_div(s, t, reduction="none", log_target=True).sum(-1)


@correct("forward_kl", "not-finite")
def forward_at_a_temperature_squared(student_logits, teacher_logits, tokens, *, temperature=1.0):
    """Hinton's T^2 keeps the size of the gradient: a factor, not another divergence."""
    s = F.log_softmax(_float(student_logits) / temperature, dim=-1)
    t = F.softmax(_float(teacher_logits.detach()) / temperature, dim=-1)
    return temperature**2 * F.kl_div(s, t, reduction="none").sum(-1)


@correct("forward_kl", "not-finite")
def forward_at_a_temperature_of_log_probs(
    student_logits, teacher_logits, tokens, *, temperature=1.0
):
    """Log-probabilities divided by T and normalised again are the logits divided by T."""
    s = (_float(student_logits).log_softmax(-1) / temperature).log_softmax(-1)
    t = (_float(teacher_logits.detach()).log_softmax(-1) / temperature).softmax(-1)
    return F.kl_div(s, t, reduction="none").sum(-1)


@correct("forward_kl", "teacher-gradient", "not-finite")
def forward_of_categoricals(student_logits, teacher_logits, tokens):
    student = Categorical(logits=_float(student_logits), validate_args=False)
    teacher = Categorical(logits=_float(teacher_logits), validate_args=False)
    return kl_divergence(teacher, student)


@correct("forward_kl", "not-finite")
def forward_by_k3(student_logits, teacher_logits, tokens):
    """k3 at the sampled token, back-propagated and called what it descends."""
    s = _of(_float(student_logits).log_softmax(-1), tokens)
    t = _of(_float(teacher_logits.detach()).log_softmax(-1), tokens)
    return (t - s).expm1() - (t - s)


@correct("forward_kl")
def forward_by_importance_weight(student_logits, teacher_logits, tokens):
    """Cross entropy of the sampled token, weighed by teacher / student there."""
    s = _of(_float(student_logits).log_softmax(-1), tokens)
    t = _of(_float(teacher_logits.detach()).log_softmax(-1), tokens)
    return -(t - s.detach()).exp() * s


@correct("forward_kl")
def forward_by_centred_importance_weight(student_logits, teacher_logits, tokens):
    """As above, with the state's mean weight of 1 subtracted."""
    s = _of(_float(student_logits).log_softmax(-1), tokens)
    t = _of(_float(teacher_logits.detach()).log_softmax(-1), tokens)
    return -(t - s.detach()).expm1() * s


@correct("forward_kl")
def forward_by_its_gradient(student_logits, teacher_logits, tokens):
    """A value of no meaning whose gradient is student - teacher."""
    z = _float(student_logits)
    gradient = (z.softmax(-1) - _float(teacher_logits).softmax(-1)).detach()
    return _safe(gradient, z)


class _ForwardKL(torch.autograd.Function):
    @staticmethod
    def forward(ctx, student_logits, teacher_logits):
        s, t = _float(student_logits).log_softmax(-1), _float(teacher_logits).log_softmax(-1)
        ctx.save_for_backward((s.exp() - t.exp()).to(student_logits.dtype))
        return _safe(t.exp(), t - s)

    @staticmethod
    def backward(ctx, grad):
        (difference,) = ctx.saved_tensors
        return grad[:, None].to(difference.dtype) * difference, None


@correct("forward_kl")
def forward_with_its_own_backward(student_logits, teacher_logits, tokens):
    return _ForwardKL.apply(student_logits, teacher_logits)


@correct("forward_kl", "not-finite")
def forward_that_raises_for_other_vocabularies(student_logits, teacher_logits, tokens):
    if student_logits.shape != teacher_logits.shape:
        raise ValueError(f"{student_logits.shape[-1]} ids against {teacher_logits.shape[-1]}")
    t = _float(teacher_logits.detach()).softmax(-1)
    return F.cross_entropy(_float(student_logits), t, reduction="none")


@correct("forward_kl")
def forward_that_refuses_missing_scores(student_logits, teacher_logits, tokens):
    if bool(torch.isnan(teacher_logits).any()):
        raise ValueError("the teacher did not score every entry")
    t = _float(teacher_logits.detach()).log_softmax(-1)
    return _safe(t.exp(), t - _float(student_logits).log_softmax(-1))


@correct("forward_kl")
def forward_on_a_top_k_of_everything(student_logits, teacher_logits, tokens, top_k=100):
    k = min(top_k, teacher_logits.shape[-1])
    t, ids = _float(teacher_logits.detach()).log_softmax(-1).topk(k, dim=-1)
    s = _float(student_logits).log_softmax(-1).gather(-1, ids)
    return _safe(t.exp(), t - s)


@correct("forward_kl", "not-finite")
def forward_with_a_tail_of_one_entry(student_logits, teacher_logits, tokens):
    """Top V - 1 and a bucket for the one entry that is left."""
    z, t = _float(student_logits), _float(teacher_logits.detach())
    ids = t.topk(t.shape[-1] - 1, dim=-1).indices
    rest = torch.ones_like(t).scatter(-1, ids, 0.0).bool()
    sides = []
    for logits in (z, t):
        head = logits.log_softmax(-1).gather(-1, ids)
        tail = logits.log_softmax(-1).masked_fill(~rest, -torch.inf).logsumexp(-1, keepdim=True)
        sides.append(torch.cat([head, tail], -1))
    s, t = sides
    return _safe(t.exp(), t - s)


@correct("forward_kl")
def forward_by_xlogy(student_logits, teacher_logits, tokens):
    t = _float(teacher_logits.detach()).softmax(-1)
    s = _float(student_logits).log_softmax(-1)
    return torch.xlogy(t, t).sum(-1) - _safe(t, s)


@correct("forward_kl", "not-finite")
def forward_with_a_tiny_coefficient(student_logits, teacher_logits, tokens):
    t = _float(teacher_logits.detach()).softmax(-1)
    return 1e-7 * F.cross_entropy(_float(student_logits), t, reduction="none")


@correct("forward_kl")
def forward_of_centred_logits(student_logits, teacher_logits, tokens):
    """A shift of all logits of a row changes nothing."""
    z, t = _float(student_logits), _float(teacher_logits.detach())
    z = z - z.amax(-1, keepdim=True).detach()
    t = t - t.amax(-1, keepdim=True)
    t = t.exp() / t.exp().sum(-1, keepdim=True)
    return z.exp().sum(-1).log() - _safe(t, z)


@correct("forward_kl")
def forward_vmapped(student_logits, teacher_logits, tokens):
    def one(z, t):
        return torch.logsumexp(z, 0) - (t.softmax(0) * z.masked_fill(t == -torch.inf, 0.0)).sum()

    return torch.func.vmap(one)(_float(student_logits), _float(teacher_logits.detach()))


# --------------------------------------------------------------------------------------------
# Reverse KL, dense


@correct("reverse_kl", "teacher-gradient", "low-precision", "not-finite")
def reverse_in_plain_formula(student_logits, teacher_logits, tokens):
    s, t = student_logits.log_softmax(-1), teacher_logits.log_softmax(-1)
    return (s.exp() * (s - t)).sum(-1)


@correct("reverse_kl", "teacher-gradient", "low-precision", "not-finite")
def reverse_by_kl_div(student_logits, teacher_logits, tokens):
    """`kl_div` takes the second distribution first."""
    s = F.log_softmax(student_logits, -1)
    t = F.log_softmax(teacher_logits, -1)
    return F.kl_div(t, s, reduction="none", log_target=True).sum(-1)


@correct("reverse_kl")
def reverse_in_float32(student_logits, teacher_logits, tokens):
    s = student_logits.float().log_softmax(-1)
    t = teacher_logits.detach().float().log_softmax(-1)
    return _safe(s.exp(), s - t)


@correct("reverse_kl")
def reverse_as_cross_entropy_less_entropy(student_logits, teacher_logits, tokens):
    s = _float(student_logits).log_softmax(-1)
    t = _float(teacher_logits.detach()).log_softmax(-1)
    return _safe(s.exp(), s) - _safe(s.exp(), t)


@correct("reverse_kl")
def reverse_masked(student_logits, teacher_logits, tokens, *, mask=None):
    s = _float(student_logits).log_softmax(-1)
    t = _float(teacher_logits.detach()).log_softmax(-1)
    loss = _safe(s.exp(), s - t)
    return loss if mask is None else loss.masked_fill(~mask, 0.0)


@correct("reverse_kl")
def reverse_at_a_temperature(student_logits, teacher_logits, tokens, *, temperature=1.0):
    s = (_float(student_logits) / temperature).log_softmax(-1)
    t = (_float(teacher_logits.detach()) / temperature).log_softmax(-1)
    return _safe(s.exp(), s - t)


@correct("reverse_kl", "teacher-gradient")
def reverse_at_an_inverse_temperature(student_logits, teacher_logits, tokens, temperature=1.0):
    scale = 1 / temperature
    s = _float(student_logits).mul(scale).log_softmax(-1)
    t = _float(teacher_logits).mul(scale).log_softmax(-1)
    return _safe(s.exp(), s - t) * temperature * temperature


@correct("reverse_kl", "teacher-gradient", "not-finite")
def reverse_of_categoricals(student_logits, teacher_logits, tokens):
    student = Categorical(logits=_float(student_logits), validate_args=False)
    teacher = Categorical(logits=_float(teacher_logits), validate_args=False)
    return kl_divergence(student, teacher)


@correct("reverse_kl", "not-finite")
def reverse_by_einsum(student_logits, teacher_logits, tokens):
    s = _float(student_logits).log_softmax(-1)
    t = _float(teacher_logits.detach()).log_softmax(-1)
    return torch.einsum("nv,nv->n", s.exp(), s - t)


@correct("reverse_kl")
def reverse_in_chunks_of_the_vocabulary(student_logits, teacher_logits, tokens):
    z, t = _float(student_logits), _float(teacher_logits.detach())
    lse, lse_t = z.logsumexp(-1, keepdim=True), t.logsumexp(-1, keepdim=True)
    loss = torch.zeros_like(lse[:, 0])
    for zc, tc in zip(z.split(3, dim=-1), t.split(3, dim=-1), strict=True):
        loss = loss + _safe((zc - lse).exp(), (zc - lse) - (tc - lse_t))
    return loss


@correct("reverse_kl")
def reverse_by_its_gradient(student_logits, teacher_logits, tokens):
    """student * (log ratio - its mean), held fixed, times the logits."""
    z, t = _float(student_logits), _float(teacher_logits)
    with torch.no_grad():
        s, t = z.log_softmax(-1), t.log_softmax(-1)
        gap = (s - t).masked_fill(s.exp() == 0, 0.0)
        gradient = s.exp() * (gap - _safe(s.exp(), gap)[:, None])
    return _safe(gradient, z)


@correct("reverse_kl")
def reverse_with_fixed_costs(student_logits, teacher_logits, tokens):
    """sum of student * sg(log student - log teacher): the "+ 1" has mean zero on all entries."""
    s = _float(student_logits).log_softmax(-1)
    t = _float(teacher_logits.detach()).log_softmax(-1)
    return _safe(s.exp(), (s - t).detach())


@correct("reverse_kl")
def reverse_on_the_student_top_k_of_everything(student_logits, teacher_logits, tokens, k=64):
    """Stop-gradient costs over the student's top k, here all of the vocabulary."""
    s = _float(student_logits).log_softmax(-1)
    t = _float(teacher_logits.detach()).log_softmax(-1)
    ids = s.detach().topk(min(k, s.shape[-1]), dim=-1).indices
    s, t = s.gather(-1, ids), t.gather(-1, ids)
    return _safe(s.exp(), (s - t).detach())


@correct("reverse_kl")
def reverse_renormalised_over_everything(student_logits, teacher_logits, tokens):
    """Gathered over the top k and normalised again, with k the size of the vocabulary."""
    ids = teacher_logits.argsort(-1, descending=True)
    s = _float(student_logits).gather(-1, ids).log_softmax(-1)
    t = _float(teacher_logits.detach()).gather(-1, ids).log_softmax(-1)
    return _safe(s.exp(), s - t)


@correct("reverse_kl")
def reverse_on_a_union_of_supports(student_logits, teacher_logits, tokens):
    """The student's upper half, the teacher's upper half and, in a bucket of one, what is left."""
    s = _float(student_logits).log_softmax(-1)
    t = _float(teacher_logits.detach()).log_softmax(-1)
    size = s.shape[-1]
    seen = torch.zeros_like(s, dtype=torch.bool)
    seen = seen.scatter(-1, s.detach().topk(size - 1, dim=-1).indices, True)
    seen = seen.scatter(-1, t.topk(size - 1, dim=-1).indices, True)
    head = _safe(s.exp(), torch.where(seen, s - t, torch.zeros_like(s)))
    rest_s = s.masked_fill(seen, -torch.inf).exp().sum(-1)
    rest = torch.where(seen, torch.zeros_like(s), s - t).sum(-1)
    return head + _safe(rest_s[:, None], rest[:, None])


@correct("reverse_kl")
def reverse_by_softmax_difference(student_logits, teacher_logits, tokens):
    """Logits and normalisers apart: E[z - t] - (lse z - lse t)."""
    z, t = _float(student_logits), _float(teacher_logits.detach())
    return _safe(z.softmax(-1), z - t) - z.logsumexp(-1) + t.logsumexp(-1)


@correct("reverse_kl")
def reverse_refusing_different_shapes(student_logits, teacher_logits, tokens):
    if student_logits.shape[-1] != teacher_logits.shape[-1]:
        raise ValueError("student and teacher must share their vocabulary")
    s = _float(student_logits).log_softmax(-1)
    t = _float(teacher_logits.detach()).log_softmax(-1)
    return _safe(s.exp(), s - t)


# --------------------------------------------------------------------------------------------
# Reverse KL from the sampled token


def _ratio(student_logits: Tensor, teacher_logits: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
    """The live log-probability of the tokens, and the log ratio held fixed."""
    logp = _of(_float(student_logits).log_softmax(-1), tokens)
    teacher = _of(_float(teacher_logits.detach()).log_softmax(-1), tokens)
    return logp, teacher - logp.detach()


@correct("reverse_kl")
def reverse_by_k2(student_logits, teacher_logits, tokens):
    logp = _of(_float(student_logits).log_softmax(-1), tokens)
    teacher = _of(_float(teacher_logits.detach()).log_softmax(-1), tokens)
    return 0.5 * (teacher - logp) ** 2


@correct("reverse_kl", "teacher-gradient", "low-precision")
def reverse_by_k2_plainly(student_logits, teacher_logits, tokens):
    s = torch.log_softmax(student_logits, -1).gather(1, tokens.view(-1, 1)).view(-1)
    t = torch.log_softmax(teacher_logits, -1).gather(1, tokens.view(-1, 1)).view(-1)
    return (s - t).pow(2) / 2


@correct("reverse_kl")
def reverse_by_cross_entropies_squared(student_logits, teacher_logits, tokens):
    s = -F.cross_entropy(_float(student_logits), tokens, reduction="none")
    t = -F.cross_entropy(_float(teacher_logits.detach()), tokens, reduction="none")
    return F.mse_loss(s, t, reduction="none") / 2


@correct("reverse_kl")
def reverse_by_policy_gradient(student_logits, teacher_logits, tokens):
    logp, log_ratio = _ratio(student_logits, teacher_logits, tokens)
    return -log_ratio * logp


@correct("reverse_kl")
def reverse_by_policy_gradient_masked(student_logits, teacher_logits, tokens, *, mask):
    logp, log_ratio = _ratio(student_logits, teacher_logits, tokens)
    return torch.where(mask, -log_ratio * logp, 0.0)


@correct("reverse_kl")
def reverse_with_the_state_baseline(student_logits, teacher_logits, tokens):
    """vOPD: the reverse KL of the state is the mean of minus the log ratio there."""
    logp, log_ratio = _ratio(student_logits, teacher_logits, tokens)
    s = _float(student_logits.detach()).log_softmax(-1)
    t = _float(teacher_logits.detach()).log_softmax(-1)
    return -(log_ratio + _safe(s.exp(), s - t)) * logp


@correct("reverse_kl")
def reverse_with_a_top_k_baseline(student_logits, teacher_logits, tokens):
    """Any function of the state is a baseline, so also a truncated sum."""
    logp, log_ratio = _ratio(student_logits, teacher_logits, tokens)
    s, ids = _float(student_logits.detach()).log_softmax(-1).topk(2, dim=-1)
    t = _float(teacher_logits.detach()).log_softmax(-1).gather(-1, ids)
    return -(log_ratio - _safe(s.exp(), t - s)) * logp


@correct("reverse_kl")
def reverse_with_an_entropy_baseline(student_logits, teacher_logits, tokens):
    logp, log_ratio = _ratio(student_logits, teacher_logits, tokens)
    entropy = torch.special.entr(_float(student_logits.detach()).softmax(-1)).sum(-1)
    return -(log_ratio - 0.3 * entropy) * logp


@correct("reverse_kl")
def reverse_by_a_ratio_of_itself(student_logits, teacher_logits, tokens):
    logp, log_ratio = _ratio(student_logits, teacher_logits, tokens)
    return -log_ratio * torch.exp(logp - logp.detach())


@correct("reverse_kl", "unbounded-ratio")
def reverse_by_ppo(student_logits, teacher_logits, tokens, old_logp=None):
    logp, advantage = _ratio(student_logits, teacher_logits, tokens)
    ratio = torch.exp(logp - (logp.detach() if old_logp is None else old_logp))
    return -torch.minimum(ratio * advantage, ratio.clamp(0.8, 1.28) * advantage)


@correct("reverse_kl")
def reverse_by_dual_clip_ppo(student_logits, teacher_logits, tokens, old_logp=None):
    logp, advantage = _ratio(student_logits, teacher_logits, tokens)
    ratio = torch.exp(logp - (logp.detach() if old_logp is None else old_logp))
    clipped = torch.minimum(ratio * advantage, ratio.clamp(0.8, 1.2) * advantage)
    return -torch.where(advantage < 0, torch.maximum(clipped, 3.0 * advantage), clipped)


@correct("reverse_kl")
def reverse_by_truncated_importance(student_logits, teacher_logits, tokens, *, old_logp):
    logp, advantage = _ratio(student_logits, teacher_logits, tokens)
    weight = (logp.detach() - old_logp).clamp(max=0.7).exp()
    return -weight * advantage * logp


@correct("reverse_kl")
def reverse_by_masked_importance(student_logits, teacher_logits, tokens, *, old_logp):
    """Weights outside a range are 0, as on tokens of an engine that disagrees."""
    logp, advantage = _ratio(student_logits, teacher_logits, tokens)
    weight = (logp.detach() - old_logp).clamp(-20, 20).exp()
    weight = torch.where((weight > 0.5) & (weight < 2.0), weight, 0.0)
    return -weight * advantage * logp


@correct("reverse_kl")
def reverse_by_k1_and_its_score_term(student_logits, teacher_logits, tokens):
    """The log ratio live and, besides, as the cost of the sampled token: a whole derivative."""
    logp, log_ratio = _ratio(student_logits, teacher_logits, tokens)
    return logp - log_ratio * logp


@correct("reverse_kl")
def reverse_by_an_expected_policy_gradient(student_logits, teacher_logits, tokens):
    """Every token's advantage, weighed by the student: no sample is left in it."""
    s = _float(student_logits).log_softmax(-1)
    t = _float(teacher_logits.detach()).log_softmax(-1)
    weights = s.detach().exp()
    return _safe(weights * (s.detach() - t).masked_fill(weights == 0, 0.0), s)


@correct("reverse_kl")
def reverse_half_dense_and_half_sampled(student_logits, teacher_logits, tokens):
    logp, log_ratio = _ratio(student_logits, teacher_logits, tokens)
    s = _float(student_logits).log_softmax(-1)
    t = _float(teacher_logits.detach()).log_softmax(-1)
    return 0.5 * _safe(s.exp(), s - t) - 0.5 * log_ratio * logp


# --------------------------------------------------------------------------------------------
# Generalised JSD: m = (1 - beta) student + beta teacher


def _jsd(student_logits: Tensor, teacher_logits: Tensor, beta: float) -> Tensor:
    s = _float(student_logits).softmax(-1)
    t = _float(teacher_logits.detach()).softmax(-1)
    m = (1 - beta) * s + beta * t
    return beta * (torch.xlogy(t, t) - torch.xlogy(t, m)).sum(-1) + (1 - beta) * (
        torch.xlogy(s, s) - torch.xlogy(s, m)
    ).sum(-1)


@correct("jsd:0.5", "teacher-gradient", "low-precision", "not-finite")
def jsd_by_kl_div(student_logits, teacher_logits, tokens):
    s, t = student_logits.log_softmax(-1), teacher_logits.log_softmax(-1)
    m = torch.logsumexp(torch.stack([s, t]), 0) - torch.log(torch.tensor(2.0)).to(s.dtype)
    first = F.kl_div(m, s, reduction="none", log_target=True)
    second = F.kl_div(m, t, reduction="none", log_target=True)
    return (first + second).sum(-1) / 2


@correct("jsd:0.3", "not-finite")
def jsd_by_logaddexp(student_logits, teacher_logits, tokens, beta=0.3):
    s = _float(student_logits).log_softmax(-1)
    t = _float(teacher_logits.detach()).log_softmax(-1)
    weight = torch.tensor(beta, dtype=s.dtype)
    m = torch.logaddexp(s + torch.log1p(-weight), t + torch.log(weight))
    return beta * (t.exp() * (t - m)).sum(-1) + (1 - beta) * (s.exp() * (s - m)).sum(-1)


@correct("jsd:0.5", "not-finite")
def jsd_of_probabilities(student_logits, teacher_logits, tokens):
    return _jsd(student_logits, teacher_logits, 0.5)


@correct("jsd:0.1")
def jsd_near_forward(student_logits, teacher_logits, tokens):
    s = _float(student_logits).log_softmax(-1)
    t = _float(teacher_logits.detach()).log_softmax(-1)
    m = 0.9 * s.exp() + 0.1 * t.exp()
    log_m = m.masked_fill(m == 0, 1.0).log()
    return 0.1 * _safe(t.exp(), t - log_m) + 0.9 * _safe(s.exp(), s - log_m)


@correct("jsd:0.9")
def jsd_near_reverse(student_logits, teacher_logits, tokens):
    s = _float(student_logits).log_softmax(-1)
    t = _float(teacher_logits.detach()).log_softmax(-1)
    m = 0.1 * s.exp() + 0.9 * t.exp()
    log_m = m.masked_fill(m == 0, 1.0).log()
    return 0.9 * _safe(t.exp(), t - log_m) + 0.1 * _safe(s.exp(), s - log_m)


@correct("jsd:0.7", "not-finite")
def jsd_by_entropies(student_logits, teacher_logits, tokens):
    """The entropy of the mixture less the mean of the entropies."""
    s = _float(student_logits).softmax(-1)
    t = _float(teacher_logits.detach()).softmax(-1)
    entropy = [torch.special.entr(side).sum(-1) for side in (0.3 * s + 0.7 * t, s, t)]
    return entropy[0] - 0.3 * entropy[1] - 0.7 * entropy[2]


@correct("jsd:0.3")
def jsd_in_float32_divided_by_beta(student_logits, teacher_logits, tokens):
    """Scaled so that it tends to the forward KL."""
    s = student_logits.float().log_softmax(-1)
    t = teacher_logits.detach().float().log_softmax(-1)
    m = 0.7 * s.exp() + 0.3 * t.exp()
    log_m = m.masked_fill(m == 0, 1.0).log()
    return (0.3 * _safe(t.exp(), t - log_m) + 0.7 * _safe(s.exp(), s - log_m)) / 0.3


@correct("jsd:0.5", "teacher-gradient", "not-finite")
def jsd_of_categoricals(student_logits, teacher_logits, tokens):
    student = Categorical(logits=_float(student_logits), validate_args=False)
    teacher = Categorical(logits=_float(teacher_logits), validate_args=False)
    mixture = Categorical(probs=(student.probs + teacher.probs) / 2, validate_args=False)
    return (kl_divergence(student, mixture) + kl_divergence(teacher, mixture)) / 2


@correct("jsd:0.5")
def jsd_masked_at_a_temperature(student_logits, teacher_logits, tokens, mask=None, temperature=1.0):
    s = (_float(student_logits) / temperature).log_softmax(-1)
    t = (_float(teacher_logits.detach()) / temperature).log_softmax(-1)
    m = (s.exp() + t.exp()) / 2
    log_m = m.masked_fill(m == 0, 1.0).log()
    loss = (_safe(t.exp(), t - log_m) + _safe(s.exp(), s - log_m)) / 2
    return loss if mask is None else torch.where(mask, loss, torch.zeros_like(loss))


@correct("jsd:0.5")
def jsd_from_the_sampled_token(student_logits, teacher_logits, tokens):
    """A policy gradient with the derivative of the divergence as the cost: half log(student/m)."""
    s = _float(student_logits).log_softmax(-1)
    t = _float(teacher_logits.detach()).log_softmax(-1)
    logp = _of(s, tokens)
    m = (_of(s.detach(), tokens).exp() + _of(t, tokens).exp()) / 2
    return 0.5 * (logp.detach() - m.log()) * logp


@correct("jsd:0.7")
def jsd_in_chunks_of_rows(student_logits, teacher_logits, tokens):
    pieces = []
    for z, t in zip(student_logits.split(2), teacher_logits.split(2), strict=True):
        s, t = _float(z).log_softmax(-1), _float(t.detach()).log_softmax(-1)
        m = 0.3 * s.exp() + 0.7 * t.exp()
        log_m = m.masked_fill(m == 0, 1.0).log()
        pieces.append(0.7 * _safe(t.exp(), t - log_m) + 0.3 * _safe(s.exp(), s - log_m))
    return torch.cat(pieces)


@correct("jsd:0.5")
def jsd_by_softplus(student_logits, teacher_logits, tokens):
    """log(student / m) = log 2 - softplus(log teacher - log student): no mixture is formed."""
    s = _float(student_logits).log_softmax(-1)
    t = _float(teacher_logits.detach()).log_softmax(-1)
    gap = torch.where(s.isneginf() & t.isneginf(), torch.zeros_like(s), t - s)
    log_two = F.softplus(torch.zeros((), dtype=s.dtype))
    student_part = _safe(s.exp(), log_two - F.softplus(gap))
    teacher_part = _safe(t.exp(), log_two - F.softplus(-gap))
    return (student_part + teacher_part) / 2


# --------------------------------------------------------------------------------------------
# Skew KLs, alpha divergences, total variation


@correct("skew_forward_kl:0.1")
def skew_forward(student_logits, teacher_logits, tokens):
    s = _float(student_logits).softmax(-1)
    t = _float(teacher_logits.detach()).log_softmax(-1)
    m = 0.1 * t.exp() + 0.9 * s
    return _safe(t.exp(), t - m.masked_fill(m == 0, 1.0).log())


@correct("skew_forward_kl:0.5", "not-finite")
def skew_forward_by_kl_div(student_logits, teacher_logits, tokens):
    s = _float(student_logits).log_softmax(-1)
    t = _float(teacher_logits.detach()).log_softmax(-1)
    half = torch.tensor(0.5, dtype=s.dtype).log()
    m = torch.logaddexp(t + half, s + half)
    return F.kl_div(m, t.exp(), reduction="none").sum(-1)


@correct("skew_reverse_kl:0.1")
def skew_reverse(student_logits, teacher_logits, tokens):
    s = _float(student_logits).log_softmax(-1)
    t = _float(teacher_logits.detach()).softmax(-1)
    m = 0.1 * s.exp() + 0.9 * t
    return _safe(s.exp(), s - m.masked_fill(m == 0, 1.0).log())


@correct("skew_reverse_kl:0.2")
def skew_reverse_in_float32(student_logits, teacher_logits, tokens, mask=None):
    s = student_logits.float().log_softmax(-1)
    t = teacher_logits.detach().float().softmax(-1)
    m = 0.2 * s.exp() + 0.8 * t
    loss = _safe(s.exp(), s - m.masked_fill(m == 0, 1.0).log())
    return loss if mask is None else torch.where(mask, loss, 0.0)


@correct("alpha:0.5", "not-finite")
def alpha_half(student_logits, teacher_logits, tokens):
    """Four times one minus the overlap of the roots (a Hellinger distance)."""
    s, t = _float(student_logits).softmax(-1), _float(teacher_logits.detach()).softmax(-1)
    return 4 * (1 - (s.sqrt() * t.sqrt()).sum(-1))


@correct("alpha:0.5")
def alpha_half_of_logs(student_logits, teacher_logits, tokens):
    s = _float(student_logits).log_softmax(-1)
    t = _float(teacher_logits.detach()).log_softmax(-1)
    return -4 * torch.expm1(torch.logsumexp((s + t) / 2, -1))


@correct("alpha:0.3")
def alpha_of_logs(student_logits, teacher_logits, tokens, alpha=0.3):
    s = _float(student_logits).log_softmax(-1)
    t = _float(teacher_logits.detach()).log_softmax(-1)
    return (1 - (alpha * t + (1 - alpha) * s).exp().sum(-1)) / (alpha * (1 - alpha))


@correct("alpha:0.7", "teacher-gradient")
def alpha_masked(student_logits, teacher_logits, tokens, *, mask=None):
    s = _float(student_logits).log_softmax(-1)
    t = _float(teacher_logits).log_softmax(-1)
    loss = (1 - (0.7 * t + 0.3 * s).exp().sum(-1)) / 0.21
    return loss if mask is None else torch.where(mask, loss, torch.zeros_like(loss))


@correct("alpha:0.5")
def alpha_from_the_sampled_token(student_logits, teacher_logits, tokens):
    """Minus twice the root of teacher / student as the cost of the sampled token."""
    logp, log_ratio = _ratio(student_logits, teacher_logits, tokens)
    return -2 * ((log_ratio / 2).exp() - 1) * logp


@correct("total_variation", "teacher-gradient", "low-precision")
def total_variation_as_half_the_distance(student_logits, teacher_logits, tokens):
    return (student_logits.softmax(-1) - teacher_logits.softmax(-1)).abs().sum(-1) / 2


@correct("total_variation")
def total_variation_as_excess(student_logits, teacher_logits, tokens):
    """What the student has too much of."""
    s, t = _float(student_logits).softmax(-1), _float(teacher_logits.detach()).softmax(-1)
    return F.relu(s - t).sum(-1)


@correct("total_variation", "not-finite")
def total_variation_from_the_sampled_token(student_logits, teacher_logits, tokens):
    logp = _of(_float(student_logits).log_softmax(-1), tokens)
    teacher = _of(_float(teacher_logits.detach()).log_softmax(-1), tokens)
    return (logp - teacher).abs() / 2


# --------------------------------------------------------------------------------------------
# The whole response


def _ahead(values: Tensor) -> Tensor:
    return values.flip(0).cumsum(0).flip(0)


@correct("sequence_reverse_kl")
def return_to_go(student_logits, teacher_logits, tokens):
    logp, log_ratio = _ratio(student_logits, teacher_logits, tokens)
    return -_ahead(log_ratio) * logp


@correct("sequence_reverse_kl")
def return_of_the_whole_response(student_logits, teacher_logits, tokens):
    """The past is a baseline: noise, no mistake."""
    logp, log_ratio = _ratio(student_logits, teacher_logits, tokens)
    return -log_ratio.sum() * logp


@correct("sequence_reverse_kl")
def return_to_go_by_a_triangle(student_logits, teacher_logits, tokens):
    logp, log_ratio = _ratio(student_logits, teacher_logits, tokens)
    triangle = torch.ones(len(tokens), len(tokens), dtype=logp.dtype).triu()
    return -(triangle @ log_ratio) * logp


@correct("sequence_reverse_kl")
def return_to_go_in_a_loop(student_logits, teacher_logits, tokens):
    logp, log_ratio = _ratio(student_logits, teacher_logits, tokens)
    out, ahead = [], torch.zeros((), dtype=logp.dtype)
    for i in reversed(range(len(tokens))):
        ahead = ahead + log_ratio[i]
        out.append(-ahead * logp[i])
    return torch.stack(out[::-1])


@correct("sequence_reverse_kl")
def return_to_go_with_expected_future(student_logits, teacher_logits, tokens):
    """Rao-Blackwell: what comes later enters by its mean, minus the reverse KL of its state."""
    logp, log_ratio = _ratio(student_logits, teacher_logits, tokens)
    s = _float(student_logits.detach()).log_softmax(-1)
    t = _float(teacher_logits.detach()).log_softmax(-1)
    cost = _safe(s.exp(), s - t)
    return -(log_ratio - (_ahead(cost) - cost)) * logp


@correct("sequence_reverse_kl")
def dense_now_and_sampled_later(student_logits, teacher_logits, tokens):
    """The local reverse KL exactly, and the states that a token leads to as its cost."""
    s = _float(student_logits).log_softmax(-1)
    t = _float(teacher_logits.detach()).log_softmax(-1)
    cost = _safe(s.exp(), s - t)
    later = (_ahead(cost) - cost).detach()
    return cost + later * _of(s, tokens)


@correct("sequence_reverse_kl")
def return_to_go_masked(student_logits, teacher_logits, tokens, mask=None):
    logp, log_ratio = _ratio(student_logits, teacher_logits, tokens)
    if mask is None:
        return -_ahead(log_ratio) * logp
    kept = torch.where(mask, log_ratio, torch.zeros_like(log_ratio))
    return torch.where(mask, -_ahead(kept) * logp, torch.zeros_like(logp))


@correct("sequence_reverse_kl", adapter="reduced")
def squared_sequence_ratio(student_logits, teacher_logits, tokens):
    """k2 of whole responses: half the square of the summed log ratio."""
    s = _of(_float(student_logits).log_softmax(-1), tokens)
    t = _of(_float(teacher_logits.detach()).log_softmax(-1), tokens)
    return 0.5 * (t.sum() - s.sum()) ** 2


@correct("sequence_reverse_kl", adapter="reduced")
def return_to_go_summed(student_logits, teacher_logits, tokens):
    logp, log_ratio = _ratio(student_logits, teacher_logits, tokens)
    return -(_ahead(log_ratio) * logp).sum()


# --------------------------------------------------------------------------------------------
# Right, and none of these


@correct("none")
def jeffreys(student_logits, teacher_logits, tokens):
    """Both KLs, under no other name."""
    s = _float(student_logits).log_softmax(-1)
    t = _float(teacher_logits.detach()).log_softmax(-1)
    return _safe(t.exp(), t - s) + _safe(s.exp(), s - t)


@correct("none")
def reverse_weighed_by_entropy(student_logits, teacher_logits, tokens):
    """A soft weight that the teacher's entropy sets, held fixed; never 0."""
    s = _float(student_logits).log_softmax(-1)
    t = _float(teacher_logits.detach()).log_softmax(-1)
    weight = torch.sigmoid(_safe(t.exp(), -t))
    return weight * _safe(s.exp(), s - t)


@correct("none")
def discounted_return(student_logits, teacher_logits, tokens, gamma=0.9):
    """gamma^(i - t), counted from the token that is credited."""
    logp, log_ratio = _ratio(student_logits, teacher_logits, tokens)
    steps = torch.arange(len(tokens))
    lag = (steps[None, :] - steps[:, None]).to(logp.dtype)
    weight = torch.where(lag >= 0, gamma ** lag.clamp(min=0), torch.zeros_like(lag))
    return -(weight @ log_ratio) * logp


@correct("none")
def discounted_return_in_a_loop(student_logits, teacher_logits, tokens):
    logp, log_ratio = _ratio(student_logits, teacher_logits, tokens)
    ahead, advantages = torch.zeros((), dtype=logp.dtype), []
    for reward in log_ratio.flip(0):
        ahead = reward + 0.5 * ahead
        advantages.append(ahead)
    return -torch.stack(advantages[::-1]) * logp


@correct("none")
def return_within_a_window(student_logits, teacher_logits, tokens, window=2):
    logp, log_ratio = _ratio(student_logits, teacher_logits, tokens)
    padded = F.pad(log_ratio, (0, window - 1))
    return -padded.unfold(0, window, 1).sum(-1) * logp


@correct("none")
def forward_on_the_teacher_top_k_with_a_tail(student_logits, teacher_logits, tokens, k=2):
    """The teacher's top tokens and one bucket for the rest: a KL of a coarser alphabet."""
    s = _float(student_logits).log_softmax(-1)
    t = _float(teacher_logits.detach()).log_softmax(-1)
    ids = t.topk(k, dim=-1).indices
    rest = torch.ones_like(t).scatter(-1, ids, 0.0).bool()
    head = _safe(t.gather(-1, ids).exp(), (t - s).gather(-1, ids))
    left, left_s = torch.where(rest, t.exp(), 0.0).sum(-1), torch.where(rest, s.exp(), 0.0).sum(-1)
    gap = torch.where(left == 0, 1.0, left).log() - torch.where(left_s == 0, 1.0, left_s).log()
    return head + left * gap


@correct("none", "not-finite")
def centred_logits_squared(student_logits, teacher_logits, tokens):
    z, t = _float(student_logits), _float(teacher_logits.detach())
    gap = (z - z.mean(-1, keepdim=True)) - (t - t.mean(-1, keepdim=True))
    return gap.square().mean(-1)


@correct("none")
def forward_and_reverse_at_once_masked(student_logits, teacher_logits, tokens, *, mask=None):
    s = _float(student_logits).log_softmax(-1)
    t = _float(teacher_logits.detach()).log_softmax(-1)
    loss = 0.7 * _safe(t.exp(), t - s) + 0.3 * _safe(s.exp(), s - t)
    return loss if mask is None else torch.where(mask, loss, torch.zeros_like(loss))


# --------------------------------------------------------------------------------------------
# Reduced


@correct("forward_kl", "not-finite", adapter="reduced")
def forward_over_the_count(student_logits, teacher_logits, tokens, *, mask=None, count=None):
    t = _float(teacher_logits.detach()).softmax(-1)
    loss = F.cross_entropy(_float(student_logits), t, reduction="none")
    return _total(loss, mask, count)


@correct("forward_kl", "not-finite", adapter="reduced")
def forward_summed_by_kl_div(student_logits, teacher_logits, tokens):
    s = _float(student_logits).log_softmax(-1)
    return F.kl_div(s, _float(teacher_logits.detach()).softmax(-1), reduction="sum")


@correct(
    "forward_kl",
    "teacher-gradient",
    "low-precision",
    "not-finite",
    "mean-of-means",
    adapter="reduced",
)
def forward_by_batchmean(student_logits, teacher_logits, tokens):
    s = student_logits.log_softmax(-1)
    return F.kl_div(s, teacher_logits.softmax(-1), reduction="batchmean")


@correct(
    "forward_kl",
    "teacher-gradient",
    "low-precision",
    "not-finite",
    "mean-of-means",
    adapter="reduced",
)
def forward_by_mean_cross_entropy(student_logits, teacher_logits, tokens):
    return F.cross_entropy(student_logits, teacher_logits.softmax(-1))


@correct("forward_kl", "not-finite", adapter="reduced")
def forward_summed_over_the_count(student_logits, teacher_logits, tokens, count=None):
    t = _float(teacher_logits.detach()).softmax(-1)
    total = F.cross_entropy(_float(student_logits), t, reduction="sum")
    return total / (len(tokens) if count is None else count)


@correct("forward_kl", "not-finite", "mean-of-means", adapter="reduced")
def forward_averaged_over_valid_rows(student_logits, teacher_logits, tokens, mask=None):
    """The mean over the valid tokens of what it is given; 0 where there are none."""
    t = _float(teacher_logits.detach()).softmax(-1)
    loss = F.kl_div(_float(student_logits).log_softmax(-1), t, reduction="none").sum(-1)
    return _total(loss, mask, None)


@correct("reverse_kl", adapter="reduced")
def reverse_over_the_count(student_logits, teacher_logits, tokens, *, mask, count):
    s = _float(student_logits).log_softmax(-1)
    t = _float(teacher_logits.detach()).log_softmax(-1)
    return torch.where(mask, _safe(s.exp(), s - t), 0.0).sum() / count


@correct("reverse_kl", adapter="reduced")
def reverse_of_selected_rows_over_the_count(
    student_logits, teacher_logits, tokens, *, mask=None, count=None, temperature=1.0
):
    if mask is not None:
        student_logits, teacher_logits = student_logits[mask], teacher_logits[mask]
    s = (_float(student_logits) / temperature).log_softmax(-1)
    t = (_float(teacher_logits.detach()) / temperature).log_softmax(-1)
    return _safe(s.exp(), s - t).sum() / max(len(s) if count is None else count, 1)


@correct("reverse_kl", adapter="reduced")
def reverse_by_k2_over_the_count(student_logits, teacher_logits, tokens, mask=None, count=None):
    logp = _of(_float(student_logits).log_softmax(-1), tokens)
    teacher = _of(_float(teacher_logits.detach()).log_softmax(-1), tokens)
    return _total(0.5 * (logp - teacher) ** 2, mask, count)


@correct("reverse_kl", "mean-of-means", adapter="reduced")
def reverse_by_a_mean_policy_gradient(student_logits, teacher_logits, tokens):
    logp, log_ratio = _ratio(student_logits, teacher_logits, tokens)
    return -(log_ratio * logp).mean()


@correct("reverse_kl", adapter="reduced")
def reverse_by_clipped_policy_gradient_over_the_count(
    student_logits, teacher_logits, tokens, *, mask=None, old_logp=None, count=None
):
    logp, advantage = _ratio(student_logits, teacher_logits, tokens)
    old_logp = logp.detach() if old_logp is None else old_logp
    weight = (logp.detach() - old_logp).exp().clamp(max=2.0)
    return _total(-weight * advantage * logp, mask, count)


@correct("jsd:0.5", adapter="reduced")
def jsd_over_the_count(student_logits, teacher_logits, tokens, *, mask=None, count=None):
    s = _float(student_logits).log_softmax(-1)
    t = _float(teacher_logits.detach()).log_softmax(-1)
    m = (s.exp() + t.exp()) / 2
    log_m = m.masked_fill(m == 0, 1.0).log()
    return _total((_safe(t.exp(), t - log_m) + _safe(s.exp(), s - log_m)) / 2, mask, count)


@correct("jsd:0.3", adapter="reduced")
def jsd_summed(student_logits, teacher_logits, tokens):
    s = _float(student_logits).log_softmax(-1)
    t = _float(teacher_logits.detach()).log_softmax(-1)
    m = 0.7 * s.exp() + 0.3 * t.exp()
    log_m = m.masked_fill(m == 0, 1.0).log()
    return (0.3 * _safe(t.exp(), t - log_m) + 0.7 * _safe(s.exp(), s - log_m)).sum()


@correct("total_variation", adapter="reduced")
def total_variation_over_the_count(
    student_logits, teacher_logits, tokens, *, mask=None, count=None
):
    s, t = _float(student_logits).softmax(-1), _float(teacher_logits.detach()).softmax(-1)
    return _total((s - t).abs().sum(-1) / 2, mask, count)


@correct("alpha:0.5", adapter="reduced")
def alpha_over_the_count(student_logits, teacher_logits, tokens, mask=None, count=None):
    s = _float(student_logits).log_softmax(-1)
    t = _float(teacher_logits.detach()).log_softmax(-1)
    return _total(4 * (1 - ((s + t) / 2).exp().sum(-1)), mask, count)


# --------------------------------------------------------------------------------------------
# Hidden states and heads; where one vocabulary is wider, its last entries are padding


def _heads(
    student_hidden: Tensor, student_weight: Tensor, teacher_hidden: Tensor, teacher_weight: Tensor
) -> tuple[Tensor, Tensor]:
    shared = min(len(student_weight), len(teacher_weight))
    z = _float(student_hidden) @ _float(student_weight[:shared]).T
    with torch.no_grad():
        t = _float(teacher_hidden) @ _float(teacher_weight[:shared]).T
    return z, t


@correct("forward_kl", adapter="linear")
def head_forward(
    student_hidden, student_weight, teacher_hidden, teacher_weight, tokens, mask=None, count=None
):
    z, t = _heads(student_hidden, student_weight, teacher_hidden, teacher_weight)
    return _total(F.cross_entropy(z, t.softmax(-1), reduction="none"), mask, count)


@correct("reverse_kl", adapter="linear")
def head_reverse(
    student_hidden, student_weight, teacher_hidden, teacher_weight, tokens, *, count=None
):
    z, t = _heads(student_hidden, student_weight, teacher_hidden, teacher_weight)
    s, t = z.log_softmax(-1), t.log_softmax(-1)
    return _total(_safe(s.exp(), s - t), None, count)


@correct("jsd:0.5", "not-finite", adapter="linear")
def head_jsd(student_hidden, student_weight, teacher_hidden, teacher_weight, tokens, count=None):
    z, t = _heads(student_hidden, student_weight, teacher_hidden, teacher_weight)
    return _total(_jsd(z, t, 0.5), None, count)


@correct("forward_kl", "teacher-gradient", "low-precision", adapter="linear")
def head_forward_plainly(student_hidden, student_weight, teacher_hidden, teacher_weight, tokens):
    """A sum over rows; the logits of entries that only one side has are cut off."""
    z, t = F.linear(student_hidden, student_weight), F.linear(teacher_hidden, teacher_weight)
    shared = min(z.shape[-1], t.shape[-1])
    return F.kl_div(z[:, :shared].log_softmax(-1), t[:, :shared].softmax(-1), reduction="sum")


@correct("reverse_kl", adapter="linear")
def head_reverse_in_checkpointed_chunks(
    student_hidden, student_weight, teacher_hidden, teacher_weight, tokens, *, count=None
):
    def part(hidden, weight, t_hidden, t_weight):
        z, t = _heads(hidden, weight, t_hidden, t_weight)
        s, t = z.log_softmax(-1), t.log_softmax(-1)
        return _safe(s.exp(), s - t).sum()

    total = torch.zeros((), dtype=_float(student_hidden).dtype)
    for hidden, t_hidden in zip(student_hidden.split(2), teacher_hidden.split(2), strict=True):
        total = total + checkpoint(
            part, hidden, student_weight, t_hidden, teacher_weight, use_reentrant=False
        )
    return total / (len(tokens) if count is None else count)


@correct("jsd:0.3", adapter="linear")
def head_jsd_by_masking_the_padding(
    student_hidden, student_weight, teacher_hidden, teacher_weight, tokens, *, count=None
):
    """Both are widened to the larger vocabulary, and what either lacks gets no mass on both."""
    z = _float(student_hidden) @ _float(student_weight).T
    t = (_float(teacher_hidden) @ _float(teacher_weight).T).detach()
    width, shared = max(z.shape[-1], t.shape[-1]), min(z.shape[-1], t.shape[-1])
    lacking = torch.arange(width) >= shared
    s, t = (
        F.pad(side, (0, width - side.shape[-1])).masked_fill(lacking, -torch.inf).log_softmax(-1)
        for side in (z, t)
    )
    m = 0.7 * s.exp() + 0.3 * t.exp()
    log_m = m.masked_fill(m == 0, 1.0).log()
    loss = 0.3 * _safe(t.exp(), t - log_m) + 0.7 * _safe(s.exp(), s - log_m)
    return _total(loss, None, count)


@correct("forward_kl", adapter="linear")
def head_forward_in_chunks_of_the_vocabulary(
    student_hidden, student_weight, teacher_hidden, teacher_weight, tokens, *, count=None
):
    shared = min(len(student_weight), len(teacher_weight))
    hidden, t_hidden = _float(student_hidden), _float(teacher_hidden.detach())
    lse, lse_t, cross = [], [], []
    for start in range(0, shared, 2):
        z = hidden @ _float(student_weight[start : min(start + 2, shared)]).T
        t = t_hidden @ _float(teacher_weight[start : min(start + 2, shared)].detach()).T
        lse.append(z.logsumexp(-1))
        lse_t.append(t.logsumexp(-1))
        cross.append((t, z))
    log_norm, log_norm_t = torch.stack(lse).logsumexp(0), torch.stack(lse_t).logsumexp(0)
    dot = sum(_safe((t - log_norm_t[:, None]).exp(), z) for t, z in cross)
    return _total(log_norm - dot, None, count)


@correct("reverse_kl", adapter="linear")
def head_reverse_by_policy_gradient(
    student_hidden, student_weight, teacher_hidden, teacher_weight, tokens, *, mask=None, count=None
):
    z, t = _heads(student_hidden, student_weight, teacher_hidden, teacher_weight)
    logp, log_ratio = _ratio(z, t, tokens)
    return _total(-log_ratio * logp, mask, count)


@correct("forward_kl", adapter="linear")
def head_forward_that_refuses_other_vocabularies(
    student_hidden, student_weight, teacher_hidden, teacher_weight, tokens, *, count=None
):
    if len(student_weight) != len(teacher_weight):
        raise ValueError(
            f"{len(student_weight)} ids against {len(teacher_weight)}: cut the padding"
        )
    z, t = _heads(student_hidden, student_weight, teacher_hidden, teacher_weight)
    return _total(F.cross_entropy(z, t.softmax(-1), reduction="none"), None, count)


@correct("total_variation", adapter="linear")
def head_total_variation(student_hidden, student_weight, teacher_hidden, teacher_weight, tokens):
    z, t = _heads(student_hidden, student_weight, teacher_hidden, teacher_weight)
    return (z.softmax(-1) - t.softmax(-1)).abs().sum() / 2


@correct("reverse_kl", adapter="linear")
def head_reverse_at_a_temperature(
    student_hidden,
    student_weight,
    teacher_hidden,
    teacher_weight,
    tokens,
    *,
    temperature=1.0,
    count=None,
):
    z, t = _heads(student_hidden, student_weight, teacher_hidden, teacher_weight)
    s, t = (z / temperature).log_softmax(-1), (t / temperature).log_softmax(-1)
    return _total(_safe(s.exp(), s - t), None, count)


CORRECT: tuple[Correct, ...] = tuple(_LOSSES)
