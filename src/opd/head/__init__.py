"""The linear head: from hidden states to any objective's loss, a chunk of rows at a time."""

from opd.head.distribution import log_probs_of
from opd.head.linear import HeadOutput, linear_head

__all__ = ["HeadOutput", "linear_head", "log_probs_of"]
