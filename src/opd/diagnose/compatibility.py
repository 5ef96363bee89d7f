"""Whether the teacher knows its way around on the student's text, row by row.

Signs of risk, not verdicts: a teacher that fits may have nothing to add, and one that does not may
still help where the support, a gate or the outcome makes up for it.
"""

from __future__ import annotations

import math

import torch
from jaxtyping import Float
from torch import Tensor

from opd.diagnose.numbers import difference, likeliest, mass
from opd.errors import ConfigError
from opd.formula.divergence import student_entropy, teacher_entropy
from opd.formula.numerics import expectation
from opd.formula.support import renormalise

__all__ = [
    "entropy_gap",
    "excess_surprise",
    "overlap_advantage",
    "student_overlap_mass",
    "support_gap",
    "teacher_confidence",
    "teacher_margin",
    "teacher_overlap_mass",
    "teacher_surprise",
    "teacher_top_mass",
    "top_k_overlap",
]

Rows = Float[Tensor, "N V"]
PerRow = Float[Tensor, " N"]


@torch.no_grad()
def top_k_overlap(student_log_probs: Rows, teacher_log_probs: Rows, *, k: int) -> PerRow:
    """How many of their k likeliest tokens teacher and student have in common.

    Formula: |top_k(teacher) and top_k(student)| / k, of equal entries the lower id first
    Unit: a share in [0, 1], per row
    Reading: 1 where both would say the same things. Low, or falling along the response: the
        teacher is asked about text that it would not write, and what it says of it is doubtful.
    Action: teach on the teacher's own text first, align the templates, supervise prefixes only,
        compare on the union of both lists
    Cost: both whole distributions, or a list of k from either side
    Source: state compatibility, sections 5.1 and 6.1 of arXiv:2606.22793; the measure is that of
        arXiv:2604.13016
    Id: overlap
    """
    both = likeliest(teacher_log_probs, k) & likeliest(student_log_probs, k)
    return both.sum(-1).to(student_log_probs.dtype) / k


@torch.no_grad()
def student_overlap_mass(student_log_probs: Rows, teacher_log_probs: Rows, *, k: int) -> PerRow:
    """How much of the student lies on the teacher's k likeliest tokens.

    Formula: student(top_k(teacher))
    Unit: probability, per row
    Reading: near 1 where the teacher's list holds what the student would say. Low: a comparison on
        that list sees little of the student, and most of what the student does is not judged.
    Action: a larger k, the union of both lists, the rest in a bucket
    Cost: the student's distribution and the teacher's list
    Source: overlap mass, state compatibility in sections 5.1 and 6.1 of arXiv:2606.22793; logged by
        verl
    Id: overlap_mass
    """
    return mass(student_log_probs, likeliest(teacher_log_probs, k))


@torch.no_grad()
def teacher_overlap_mass(student_log_probs: Rows, teacher_log_probs: Rows, *, k: int) -> PerRow:
    """How much of the teacher lies on the student's k likeliest tokens.

    Formula: teacher(top_k(student))
    Unit: probability, per row
    Reading: near 1 where the student already considers what the teacher would say. Low: what the
        teacher wants is out of the student's reach, or the teacher's distribution is noise here.
    Action: a warm-up on the teacher's text, the teacher's list as support, a nearer teacher
    Cost: the teacher's distribution and the student's list
    Source: state compatibility in sections 5.1 and 6.1 of arXiv:2606.22793; our own derivation,
        the mirror of what verl logs
    Id: overlap_mass
    """
    return mass(teacher_log_probs, likeliest(student_log_probs, k))


@torch.no_grad()
def teacher_top_mass(student_log_probs: Rows, teacher_log_probs: Rows, *, k: int) -> PerRow:
    """How much of the teacher its own k likeliest tokens hold.

    Formula: teacher(top_k(teacher))
    Unit: probability, per row
    Reading: near 1 where a list of k says nearly all that the teacher says. Low: the teacher is
        undecided here, and its list leaves much of it out. The student has no part in it.
    Action: a larger k, the rest in a bucket, less weight on rows where the teacher is unsure
    Cost: the teacher's list with its log-probabilities
    Source: overlap mass, state compatibility in sections 5.1 and 6.1 of arXiv:2606.22793; logged by
        verl
    Id: overlap_mass
    """
    return mass(teacher_log_probs, likeliest(teacher_log_probs, k))


@torch.no_grad()
def overlap_advantage(student_log_probs: Rows, teacher_log_probs: Rows, *, k: int) -> PerRow:
    """How the teacher rates the student's choice among the tokens that both find likely.

    Formula: sum over v in top_k(teacher) and top_k(student) of student(v | overlap) *
        (log teacher(v) - log student(v)); 0 where they share none, or none that the student uses
    Unit: nats, per row
    Reading: 0 where the student weighs the shared tokens as the teacher does, and they hold all
        mass. Negative: the student is surer of them than the teacher. Going to 0 is what learning
        looks like; -inf where the teacher gives one of them no mass.
    Action: none while it rises; where it stays low, look at the temperature and at the support
    Cost: both whole distributions, or a list of k with log-probabilities from either side
    Source: state compatibility in sections 5.1 and 6.1 of arXiv:2606.22793; the overlap-token
        advantage of arXiv:2604.13016
    """
    both = likeliest(teacher_log_probs, k) & likeliest(student_log_probs, k)
    shared = renormalise(torch.where(both, student_log_probs, -math.inf))
    return expectation(shared, difference(teacher_log_probs, student_log_probs))


@torch.no_grad()
def entropy_gap(student_log_probs: Rows, teacher_log_probs: Rows) -> PerRow:
    """By how much teacher and student differ in how open the next token is.

    Formula: |H(teacher) - H(student)|
    Unit: nats, per row
    Reading: 0 where both are equally sure. Large: one decides where the other branches, as a model
        that thinks aloud and one that does not; it says nothing of what they decide for.
    Action: a teacher of the same style, prompts and templates that it was trained on, a warm-up
    Cost: the entropy of either side
    Source: state compatibility in sections 5.1 and 6.1 of arXiv:2606.22793; the measure is that of
        arXiv:2604.13016
    """
    return (teacher_entropy(teacher_log_probs) - student_entropy(student_log_probs)).abs()


@torch.no_grad()
def teacher_surprise(teacher_logp: PerRow) -> PerRow:
    """How unlikely the student's token is to the teacher.

    Formula: -log teacher(y)
    Unit: nats, per row; its mean is the log of the teacher's perplexity on the student's text
    Reading: low on text that the teacher would write. High: the teacher is asked off its own
        distribution, or the text is shifted, of another template or of another vocabulary. On text
        of many equal choices it is high for a good teacher too: see `excess_surprise`.
    Action: align template and tokenizer, supervise prefixes only, repair or skip the rest
    Cost: the teacher's log-probability of the sampled token
    Source: the teacher's perplexity among the signs of state compatibility, sections 5.1 and 6.1
        of arXiv:2606.22793
    Id: teacher_nll
    """
    return -teacher_logp


@torch.no_grad()
def excess_surprise(teacher_logp: PerRow, teacher_log_probs: Rows) -> PerRow:
    """How much more unlikely the student's token is to the teacher than one of its own would be.

    Formula: -log teacher(y) - H(teacher)
    Unit: nats, per row
    Reading: 0 in the mean on tokens drawn from the teacher, whatever its entropy. Positive in the
        mean: the student writes what the teacher would not. Negative in the mean: it keeps to the
        teacher's likeliest tokens.
    Action: as for `teacher_surprise`
    Cost: the teacher's log-probability of the sampled token and its entropy
    Source: state compatibility in sections 5.1 and 6.1 of arXiv:2606.22793; our own derivation
    """
    return -teacher_logp - teacher_entropy(teacher_log_probs)


@torch.no_grad()
def teacher_confidence(teacher_log_probs: Rows) -> PerRow:
    """The probability of the teacher's likeliest token.

    Formula: max over v of teacher(v)
    Unit: probability, per row
    Reading: near 1 where the teacher is sure. Falling along the response: it loses the thread of
        text that is not its own. Sure is not right: in a loop it is high too.
    Action: less weight where it is low, supervise prefixes only
    Cost: the teacher's likeliest token
    Source: confidence of the teacher among the signs of state compatibility, sections 5.1 and 6.1
        of arXiv:2606.22793
    """
    return teacher_log_probs.amax(-1).exp()


@torch.no_grad()
def teacher_margin(student_log_probs: Rows, teacher_log_probs: Rows, *, k: int) -> PerRow:
    """How clearly the teacher prefers one of the student's k likeliest tokens to the others.

    Formula: log teacher(first) - log teacher(second) of the teacher on top_k(student); k >= 2
    Unit: nats, per row
    Reading: large where the teacher takes sides among what the student would say. Near 0: it does
        not tell them apart, so there is little to learn here. Falling along the response: its
        contrast fades, the state that `change_point` looks for. inf where it knows only one of
        them.
    Action: supervise before the change point, less weight on rows without contrast
    Cost: the teacher's log-probabilities of the student's list
    Source: state compatibility in sections 5.1 and 6.1 of arXiv:2606.22793; the margin is that of
        arXiv:2605.13643
    Id: teacher_confidence
    """
    if k < 2:
        raise ConfigError(f"teacher_margin needs k >= 2, or there is no second token, got {k}")
    inside = torch.where(likeliest(student_log_probs, k), teacher_log_probs, -math.inf)
    first, second = inside.topk(2, dim=-1).values.unbind(-1)
    return difference(first, second)


@torch.no_grad()
def support_gap(
    student_log_probs: Rows, teacher_log_probs: Rows, *, k: int
) -> tuple[PerRow, PerRow]:
    """What a comparison on the teacher's k likeliest tokens leaves out of either side.

    Formula: (1 - student(top_k(teacher)), 1 - teacher(top_k(teacher))), summed over what is outside
    Unit: probability, per row, the student's first
    Reading: (0, 0) where the list holds both. The student's large: mass of the student that no term
        sees, free to leak. The teacher's large: the target itself is cut. Both bound the bias of
        the truncated comparison.
    Action: a larger k, the rest in a bucket, the union of both lists
    Cost: both whole distributions, or the teacher's list with log-probabilities of both
    Source: truncated support, section 6 and Table 6 of arXiv:2606.22793; our own derivation
    """
    outside = ~likeliest(teacher_log_probs, k)
    return mass(student_log_probs, outside), mass(teacher_log_probs, outside)
