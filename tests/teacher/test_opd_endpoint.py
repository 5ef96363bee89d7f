"""The client of the scoring protocol: what a server says of itself, and the head it hands out."""

from __future__ import annotations

import json
from typing import Any

import pytest
import safetensors.torch
import torch

from opd.errors import TeacherError
from opd.teacher.opd_endpoint import described, head_bytes, limits_of, read_head
from opd.types import Unembedding

INFO: dict[str, Any] = {
    "protocol": "opd",
    "versions": [1],
    "model": "m",
    "revision": "r",
    "vocab_size": 5,
    "vocabulary": "",
    "template": "",
    "special": {"eos": [2]},
    "dtype": "float32",
    "hidden_size": 3,
    "max_tokens": 100,
    "wanted": ["sampled", "top", "of tomorrow"],
    "limits": {"query_tokens": 700, "sequences": 9, "top_k": 4, "ids": 6, "body_bytes": 2**20},
}


def test_limits_are_those_that_the_server_names() -> None:
    limits = limits_of(described(INFO))
    assert limits.wanted == {"sampled", "top"}
    assert "opd serve" in limits.why_not["hidden"]
    found = (limits.sequence_tokens, limits.sequences, limits.query_tokens, limits.top_k)
    assert (*found, limits.ids) == (100, 9, 700, 4, 6)
    assert limits.query_bytes is not None
    assert 2**20 - 2**17 < limits.query_bytes < 2**20 - 2**16  # meta alone may have 2^16


def test_limits_that_are_left_out_are_none() -> None:
    some = {key: value for key, value in INFO.items() if key not in ("limits", "wanted")}
    limits = limits_of(described(some))
    assert (limits.sequences, limits.query_tokens, limits.query_bytes, limits.ids) == (None,) * 4
    assert len(limits.wanted) == 6


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"vocab_size": float("inf")}, "vocab_size = inf"),
        ({"vocab_size": float("nan")}, "vocab_size = nan"),
        ({"vocab_size": 5.5}, "vocab_size = 5.5"),
        ({"vocab_size": 0}, "vocab_size = 0"),
        ({"vocab_size": 2**40}, "vocab_size = 1099511627776"),
        ({"max_tokens": -1}, "max_tokens = -1"),
        ({"max_tokens": True}, "max_tokens = True"),
        ({"hidden_size": "wide"}, "hidden_size = 'wide'"),
        ({"special": {"eos": [float("inf")]}}, "special.eos has inf"),
        ({"special": [2]}, "AttributeError"),
        ({"wanted": 5}, "TypeError"),
        ({"limits": [1]}, r"limits = \[1\]"),
        ({"limits": {"sequences": 0}}, "sequences = 0"),
        ({"versions": [2]}, r"versions \[2\]"),
    ],
)
def test_what_no_scoring_server_says_is_refused(change: dict[str, Any], said: str) -> None:
    with pytest.raises(TeacherError, match=rf"no scoring server of version 1.*{said}"):
        described({**INFO, **change})


# --------------------------------------------------------------------------------------------
# The head

WEIGHT = torch.arange(15.0).reshape(5, 3)


def written(weight: torch.Tensor, bias: torch.Tensor | None = None, **numbers: Any) -> bytes:
    """A head as a server that does not check itself would send it."""
    told = {"revision": "r", "vocab_size": 5, "logit_scale": 1.0, "soft_cap": None, **numbers}
    tensors = {"weight": weight} | ({} if bias is None else {"bias": bias})
    return safetensors.torch.save(tensors, metadata={"opd": json.dumps(told)})


def test_a_head_is_read_as_it_was_written() -> None:
    head = Unembedding(WEIGHT, 5, torch.arange(5.0), logit_scale=0.5, soft_cap=30.0)
    found = read_head(head_bytes(head, "r"), described(INFO))
    assert torch.equal(found.weight, WEIGHT)
    assert found.bias is not None
    assert torch.equal(found.bias, torch.arange(5.0))
    assert (found.vocab_size, found.logit_scale, found.soft_cap) == (5, 0.5, 30.0)
    assert read_head(written(WEIGHT.bfloat16()), described(INFO)).weight.dtype == torch.bfloat16


def test_a_width_that_was_not_said_is_taken_from_the_head() -> None:
    silent = described({key: value for key, value in INFO.items() if key != "hidden_size"})
    assert read_head(written(torch.ones(5, 7)), silent).weight.shape == (5, 7)


BAD = {
    "another revision": (written(WEIGHT, revision="s"), "it is of revision 's', not 'r'"),
    "one dimension": (written(torch.ones(5)), r"weight has the shape \[5\], not \[5, 3\]"),
    "too few rows": (written(WEIGHT[:4].clone()), r"weight has the shape \[4, 3\], not \[5, 3\]"),
    "another width": (written(torch.ones(5, 4)), r"weight has the shape \[5, 4\], not \[5, 3\]"),
    "integers": (written(torch.ones(5, 3, dtype=torch.int64)), "weight is torch.int64"),
    "NaN": (written(WEIGHT.clone().fill_(torch.nan)), "weight has numbers that are not finite"),
    "infinite": (written(WEIGHT.clone().index_fill(0, torch.tensor(4), torch.inf)), "not finite"),
    "a long bias": (written(WEIGHT, torch.ones(6)), r"bias has the shape \[6\], not \[5\]"),
    "a bias of integers": (
        written(WEIGHT, torch.ones(5, dtype=torch.int32)),
        "bias is torch.int32",
    ),
    "a NaN in the bias": (written(WEIGHT, torch.full((5,), torch.nan)), "bias has numbers that"),
    "no cap": (written(WEIGHT, soft_cap=0), "soft_cap = 0, and a cap lies above 0"),
    "a negative cap": (written(WEIGHT, soft_cap=-3.0), "soft_cap = -3.0"),
    "an infinite cap": (written(WEIGHT, soft_cap=float("inf")), "soft_cap = inf"),
    "a NaN scale": (written(WEIGHT, logit_scale=float("nan")), "logit_scale = nan"),
    "fewer tokens": (written(WEIGHT, vocab_size=4), "it has 4 tokens, and /info says 5"),
    "less than none": (written(WEIGHT, vocab_size=-3), "vocab_size = -3"),
    "a list": (safetensors.torch.save({"weight": WEIGHT}, {"opd": "[1]"}), ""),
    "no safetensors": (b"garbage and nothing else", ""),
    "nothing": (b"", ""),
    "endless nesting": ((200_000).to_bytes(8, "little") + b"[" * 200_000, ""),
}


@pytest.mark.parametrize("name", BAD)
def test_what_is_no_head_of_this_model_is_refused(name: str) -> None:
    data, said = BAD[name]
    with pytest.raises(TeacherError, match=rf"^it handed out no unembedding: .*{said}.*start the"):
        read_head(data, described(INFO))


def test_a_head_that_says_nothing_of_its_size_is_refused() -> None:
    told = described(INFO)
    with pytest.raises(TeacherError, match="'vocab_size'"):
        read_head(
            safetensors.torch.save(
                {"weight": WEIGHT},
                {"opd": json.dumps({"revision": "r", "logit_scale": 1.0, "soft_cap": None})},
            ),
            told,
        )
