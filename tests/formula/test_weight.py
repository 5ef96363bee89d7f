from __future__ import annotations

import torch

from opd.formula import weight


def test_skip_special_closes_on_special_tokens_and_nowhere_else() -> None:
    special = torch.tensor([[True, False], [False, True]])
    assert weight.skip_special(special).tolist() == [[0.0, 1.0], [1.0, 0.0]]
