"""Published methods: one function each, one return each, a `Method`.

Every docstring states the equation, the source, the paper's settings and where this differs.
`evidence` and `formula_source` are read from the lines `Evidence:` and `Formula:` of the docstring.
"""

from __future__ import annotations

from opd.methods.controls import offpolicy_kd, sft, sft_on_teacher
from opd.methods.dense import gkd, reverse_kl_opd, top_k_opd
from opd.methods.sampled import sampled_token_opd, vopd

__all__ = [
    "gkd",
    "offpolicy_kd",
    "reverse_kl_opd",
    "sampled_token_opd",
    "sft",
    "sft_on_teacher",
    "top_k_opd",
    "vopd",
]
