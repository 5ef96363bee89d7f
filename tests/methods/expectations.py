"""Exact mean gradients over all responses of a small tree."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import torch

from opd.objective import Objective, Term
from tests.builders import Case, evaluate, full_gradient
from tests.reference.enumeration import Tree, padded_responses

TREES = {
    "horizon": Tree.random(seed=0, vocab_size=3, horizon=3),
    "end token": Tree.random(seed=1, vocab_size=3, horizon=4, end_id=0),
}


def expected_gradient(tree: Tree, *terms: Term) -> np.ndarray[Any, Any]:
    """The exact mean gradient over all responses, through the head and the signal phase."""
    padded = padded_responses(tree)
    case = Case(
        *(torch.tensor(part) for part in (padded.tokens, padded.mask, padded.provenance)),
        torch.tensor(padded.student_logits),
        {"teacher": torch.tensor(padded.teacher_logits)},
    )
    objective = Objective(*(replace(term, reduction="sequence_sum") for term in terms))
    per_response = full_gradient(case, evaluate(case, objective).gradient) * len(padded.tokens)
    return padded.expectation(per_response, tree)
