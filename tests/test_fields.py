from __future__ import annotations

import importlib

import pytest
import torch
from jaxtyping import Float
from torch import Tensor

from opd.fields import FIELDS, is_coupled, positional_names
from opd.formula import credit, divergence, reward, support, surrogate, weight
from opd.objective import Dense, Sampled

SLOT_MODULES = (credit, divergence, reward, support, surrogate, weight)


def asks_for_a_misspelt_field(student_logprobs: Tensor) -> Tensor:
    return student_logprobs


def reads_the_whole_response(student_log_probs: Tensor, mask: Tensor) -> Tensor:
    return student_log_probs.sum(-1)


def reads_a_reward(reward: Tensor) -> Tensor:
    return reward


def test_every_formula_of_a_slot_asks_for_known_fields() -> None:
    for module in SLOT_MODULES:
        for name in module.__all__:
            read = positional_names(getattr(module, name))
            assert {part for part in read if not part.startswith("extra_")} <= set(FIELDS)


def test_every_provider_is_a_record_or_a_formula_whose_inputs_are_fields() -> None:
    for name, entry in FIELDS.items():
        if "." not in entry.provider:
            records = ("rollout", "student", "view", "critic", "support", "term")
            assert entry.provider in records, name
            continue
        module, _, function = entry.provider.rpartition(".")
        inputs = positional_names(getattr(importlib.import_module(module), function))
        sides = {FIELDS[part].side for part in inputs}
        assert sides == {"both": {"student", "view"}}.get(entry.side, {entry.side}), name
        assert {FIELDS[part].scope for part in inputs} == {entry.scope}, name


def test_a_name_outside_the_table_is_refused_when_the_term_is_made() -> None:
    message = "asks for 'student_logprobs', which is no field"
    with pytest.raises(ValueError, match=message):
        positional_names(asks_for_a_misspelt_field)
    with pytest.raises(ValueError, match=message):
        Dense(divergence=asks_for_a_misspelt_field)
    with pytest.raises(ValueError, match=message):
        Dense(divergence=divergence.reverse_kl, weights=(asks_for_a_misspelt_field,))


def test_extra_columns_are_an_open_family() -> None:
    def trust(extra_trust: Float[Tensor, "*n"]) -> Float[Tensor, "*n"]:
        return extra_trust

    assert positional_names(trust) == ("extra_trust",)
    assert not is_coupled(trust)


def test_knobs_are_no_fields() -> None:
    assert positional_names(credit.discounted) == ("reward", "mask")


def test_coupling_follows_from_reading_the_mask() -> None:
    assert is_coupled(credit.return_to_go)
    assert is_coupled(credit.discounted)
    assert is_coupled(reads_the_whole_response)
    for own_row in (credit.immediate, credit.expected_reward, reward.teacher_log_ratio):
        assert not is_coupled(own_row)


def test_a_slot_that_sees_one_row_refuses_a_formula_that_reads_others() -> None:
    with pytest.raises(ValueError, match="divergence sees one row at a time"):
        Dense(divergence=reads_the_whole_response)


def test_a_slot_refuses_what_the_term_does_not_know_there() -> None:
    with pytest.raises(ValueError, match=r"weights\.0: .*reads_a_reward asks for 'reward'"):
        Dense(divergence=divergence.reverse_kl, weights=(reads_a_reward,))
    with pytest.raises(ValueError, match=r"reward: .*score asks for 'advantage'"):
        Sampled(reward=surrogate.score)
    assert torch.equal(reads_a_reward(torch.ones(1)), torch.ones(1))
