from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields, replace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tests.builders import DATA, STUDENT, TEACHER, TOOL, Case, rollout_of
from tests.models_zoo import EOS, PAD, tiny
from torch import Tensor

from opd.errors import DataError
from opd.rollout.pack import (
    count_rows,
    join_model_inputs,
    join_parts,
    merge_rollouts,
    pack_rollout,
    select,
    split,
    to_device,
    with_token,
)
from opd.student import Student
from opd.types import (
    Batch,
    Count,
    FieldKey,
    Provenance,
    Rollout,
    TeacherScores,
    pack_rows,
)

LOGP = FieldKey("student_logp")


def ragged(
    seed: int, lengths: Sequence[int], *, prompts: Sequence[int] | None = None, vocab_size: int = 53
) -> Rollout:
    """Responses of these lengths after prompts of these lengths, with tool gaps."""
    draw = torch.Generator().manual_seed(seed)
    case = Case.random(seed, lengths=lengths, writers=(STUDENT, DATA, TEACHER), vocab_size=5)
    prompts = prompts or [1 + (3 * b) % 5 for b in range(len(lengths))]
    ids = tuple(
        tuple(torch.randint(3, vocab_size, (length,), generator=draw).tolist())
        for length in prompts
    )
    tokens = torch.randint(3, vocab_size, case.tokens.shape, generator=draw)
    reasons = [("length", "eos", "stop_string")[b % 3] for b in range(len(lengths))]
    return rollout_of(tokens, case.mask, case.provenance, prompt_ids=ids, stop_reason=reasons)


def prefixes(batch: Batch) -> list[list[int]]:
    """For each row, the tokens up to and including the position it points at."""
    width = batch.input_ids.shape[1]
    found = []
    for index in batch.row_index.tolist():
        found.append(batch.input_ids[index // width, : index % width + 1].tolist())
    return found


# --------------------------------------------------------------------------------------------
# The shift


def test_a_row_points_at_the_last_token_before_its_own() -> None:
    rollout = rollout_of(
        torch.tensor([[10, 11, 12], [20, 0, 0]]),
        torch.tensor([[True, False, True], [True, False, False]]),
        torch.tensor([[STUDENT, TOOL, STUDENT], [STUDENT, 0, 0]]),
        prompt_ids=((1, 2), (3, 4, 5)),
    )
    batch = pack_rollout(rollout, pad_id=9)
    assert batch.input_ids.tolist() == [[1, 2, 10, 11, 12], [3, 4, 5, 20, 9]]
    assert batch.lengths.tolist() == [5, 4]
    assert batch.row_index.tolist() == [1, 3, 5 + 2]
    assert prefixes(batch) == [[1, 2], [1, 2, 10, 11], [3, 4, 5]]
    assert batch.counts["all"] == Count(3, 2)


@pytest.mark.parametrize("pad_id", [PAD, EOS])
def test_every_row_is_the_models_own_prediction_of_its_token(pad_id: int) -> None:
    loaded, rollout = tiny("llama"), ragged(0, (4, 0, 6, 1))
    batch = pack_rollout(rollout, pad_id=pad_id)
    found = Student(loaded)(batch, wanted=frozenset({LOGP})).fields[LOGP]
    expected = []
    model: Any = loaded.model
    for b, prompt in enumerate(rollout.prompt_ids):
        response = rollout.tokens[b, : int(rollout.lengths[b])].tolist()
        with torch.no_grad():
            logits = model(torch.tensor([[*prompt, *response]])).logits[0]
        for t, token in enumerate(response):
            if rollout.mask[b, t]:
                position = len(prompt) + t - 1
                expected.append(logits[position].log_softmax(-1)[token])
    assert (found - torch.stack(expected)).abs().max() <= 1e-5


def test_an_end_token_that_is_also_the_padding_is_a_row_like_any_other() -> None:
    rollout = rollout_of(
        torch.tensor([[7, EOS, EOS], [7, 8, EOS]]),
        torch.tensor([[True, True, False], [True, True, True]]),
        torch.tensor([[STUDENT, STUDENT, 0], [STUDENT] * 3]),
        prompt_ids=((4,), (5,)),
        stop_reason=("eos", "eos"),
    )
    batch = pack_rollout(rollout, pad_id=EOS, special_ids=(PAD,))
    assert pack_rows(batch.token.tokens, batch.token.mask).tolist() == [7, EOS, 7, 8, EOS]
    assert prefixes(batch) == [[4], [4, 7], [5], [5, 7], [5, 7, 8]]
    assert batch.lengths.tolist() == [3, 4]
    assert batch.token.special is not None
    assert not batch.token.special.any()


def test_only_a_response_that_was_cut_off_has_a_position_to_bootstrap_from() -> None:
    rollout = ragged(1, (3, 2, 4, 0, 1, 2))
    batch = pack_rollout(rollout, pad_id=PAD)
    width = batch.input_ids.shape[1]
    for b, reason in enumerate(rollout.stop_reason):
        row = int(batch.bootstrap_row[b])
        assert (row == -1) == (reason != "length")
        if row >= 0:
            assert row == b * width + int(batch.lengths[b]) - 1
    assert not set(batch.bootstrap_row.tolist()) & set(batch.row_index.tolist())


def test_special_tokens_are_marked() -> None:
    rollout = ragged(2, (3, 3))
    ids = rollout.tokens[0, :2].tolist()
    special = pack_rollout(rollout, pad_id=PAD, special_ids=ids).token.special
    assert special is not None
    assert torch.equal(special, (rollout.tokens == ids[0]) | (rollout.tokens == ids[1]))


def test_an_empty_prompt_is_refused() -> None:
    rollout = replace(ragged(0, (2, 2)), prompt_ids=((1,), ()))
    with pytest.raises(DataError, match="sequence 1 has an empty prompt"):
        pack_rollout(rollout, pad_id=PAD)


def test_counts_are_rows_and_sequences_of_each_writer() -> None:
    batch = pack_rollout(ragged(3, (4, 2, 5, 1, 0, 3)), pad_id=PAD)
    token = batch.token
    for kind, provenance in (("student", STUDENT), ("data", DATA), ("teacher", TEACHER)):
        rows = (token.provenance == provenance) & token.mask
        assert batch.counts[kind] == Count(float(rows.sum()), float(rows.any(1).sum()))
    total = sum(batch.counts[kind].rows for kind in ("student", "data", "teacher"))
    assert batch.counts["all"].rows == total == batch.row_index.shape[0]
    assert count_rows(token) == batch.counts


# --------------------------------------------------------------------------------------------
# Splitting


def labelled(seed: int, lengths: Sequence[int]) -> Batch:
    """A batch in which every number says where it belongs."""
    rollout = ragged(seed, lengths)
    place = torch.arange(rollout.tokens.numel()).reshape(rollout.tokens.shape)
    rows = int(rollout.mask.sum())
    row = torch.arange(rows)
    inputs = tuple({"image": torch.full((1, 2), b)} for b in range(len(lengths)))
    batch = pack_rollout(
        replace(rollout, sampler_logp=place.double(), model_inputs=inputs),
        pad_id=PAD,
        merge_ids=((2, 3),),
        extra={"per_token": place + 1000, "per_sequence": torch.arange(len(lengths)) * 10},
    )
    return with_token(
        batch,
        old_logp=place.double() + 0.5,
        student_top_ids=row.unsqueeze(1) * 7,
        coupled={"advantage.x": place.double() + 0.25},
        views={"teacher": TeacherScores(sampled_logp=row.double(), top_ids=row.unsqueeze(1) * 3)},
    )


sizes = st.lists(st.integers(0, 6), min_size=1, max_size=7).filter(any)


@given(seed=st.integers(0, 99), lengths=sizes, max_tokens=st.integers(1, 60))
def test_a_split_keeps_every_sequence_once_and_within_the_budget(
    seed: int, lengths: list[int], max_tokens: int
) -> None:
    batch = labelled(seed, lengths)
    parts = split(batch, max_tokens=max_tokens)
    assert sum(part.batch.input_ids.shape[0] for part in parts) == len(lengths)
    for part in parts:
        assert part.batch.input_ids.numel() <= max_tokens or part.batch.input_ids.shape[0] == 1
        assert part.batch.input_ids.shape[1] == int(part.batch.lengths.max())
        assert part.batch.counts == batch.counts
        assert part.batch.merge_ids == batch.merge_ids
    rows = torch.cat([part.rows for part in parts])
    assert torch.equal(rows.sort().values, torch.arange(batch.row_index.shape[0]))


@given(seed=st.integers(0, 99), lengths=sizes, max_tokens=st.integers(1, 60))
def test_everything_about_a_row_stays_with_it(
    seed: int, lengths: list[int], max_tokens: int
) -> None:
    whole = labelled(seed, lengths)
    all_prefixes, whole_special_ids = prefixes(whole), whole.token.special_ids
    assert whole_special_ids is not None

    def per_row(batch: Batch) -> dict[str, Tensor]:
        token = batch.token
        found = {
            item.name: value
            for item in fields(token)
            if isinstance(value := getattr(token, item.name), Tensor)
        }
        found |= {**token.coupled, "per_token": token.extra["per_token"]}
        found["per_sequence"] = token.extra["per_sequence"].unsqueeze(1).expand(token.mask.shape)
        found["image"] = batch.model_inputs["image"][:, :1].expand(token.mask.shape)
        for name in ("group", "verdict"):
            found[name] = found[name].unsqueeze(1).expand(token.mask.shape)
        assert torch.equal(found.pop("special_ids"), whole_special_ids)
        packed = {"student_top_ids": found.pop("student_top_ids")}
        view = token.views["teacher"]
        assert view.sampled_logp is not None
        assert view.top_ids is not None
        packed |= {"view.logp": view.sampled_logp, "view.top": view.top_ids}
        return {name: pack_rows(value, token.mask) for name, value in found.items()} | packed

    expected = per_row(whole)
    for part in split(whole, max_tokens=max_tokens):
        assert prefixes(part.batch) == [all_prefixes[row] for row in part.rows.tolist()]
        for name, value in per_row(part.batch).items():
            assert torch.equal(value.nan_to_num(), expected[name][part.rows].nan_to_num()), name


@given(seed=st.integers(0, 99), lengths=sizes, max_tokens=st.integers(1, 60))
def test_joined_parts_are_in_the_order_of_the_whole(
    seed: int, lengths: list[int], max_tokens: int
) -> None:
    batch = labelled(seed, lengths)
    values = torch.randn(batch.row_index.shape[0], 2)
    parts = [(part.rows, values[part.rows]) for part in split(batch, max_tokens=max_tokens)]
    assert torch.equal(join_parts(parts, len(values)), values)


@pytest.mark.parametrize("chosen", [[0], [3], [5, 4, 3, 2, 1, 0], [2, 0]])
def test_a_selection_moves_the_bootstrap_rows_along(chosen: list[int]) -> None:
    batch = labelled(5, (3, 2, 4, 0, 1, 2))
    part, _ = select(batch, chosen)
    for place, b in enumerate(chosen):
        row, old = int(part.bootstrap_row[place]), int(batch.bootstrap_row[b])
        if old < 0:
            assert row == -1
        else:
            assert row == place * part.input_ids.shape[1] + int(batch.lengths[b]) - 1
            assert part.input_ids.flatten()[row] == batch.input_ids.flatten()[old]


def test_a_batch_of_empty_responses_has_no_rows_and_splits_all_the_same() -> None:
    rollout = rollout_of(
        torch.zeros(2, 0, dtype=torch.long),
        torch.zeros(2, 0, dtype=torch.bool),
        torch.zeros(2, 0, dtype=torch.long),
    )
    batch = pack_rollout(rollout, pad_id=PAD)
    assert batch.row_index.shape == (0,)
    assert sum(part.batch.input_ids.shape[0] for part in split(batch, max_tokens=1)) == 2


def test_moving_to_a_device_moves_every_tensor() -> None:
    moved = to_device(labelled(0, (2, 3)), "meta")
    tensors = [getattr(moved, item.name) for item in fields(moved)]
    tensors += [getattr(moved.token, item.name) for item in fields(moved.token)]
    tensors += [*moved.token.extra.values(), *moved.token.coupled.values()]
    tensors += [*moved.model_inputs.values()]
    assert all(value.device.type == "meta" for value in tensors if isinstance(value, Tensor))


# --------------------------------------------------------------------------------------------
# Merging rollouts


def test_merged_rollouts_pack_to_the_rows_of_their_parts() -> None:
    parts = [ragged(0, (4, 0, 2)), ragged(1, (6,)), ragged(2, (1, 3))]
    merged = merge_rollouts(parts, pad_id=PAD)
    whole = pack_rollout(merged, pad_id=PAD)
    apart = [pack_rollout(part, pad_id=PAD) for part in parts]
    assert prefixes(whole) == [prefix for batch in apart for prefix in prefixes(batch)]
    for name in ("tokens", "provenance", "sampler_logp"):
        values = [pack_rows(getattr(b.token, name), b.token.mask) for b in apart]
        assert torch.equal(
            pack_rows(getattr(whole.token, name), whole.token.mask), torch.cat(values)
        )
    assert merged.stop_reason == sum((part.stop_reason for part in parts), ())
    assert torch.equal(merged.lengths, torch.cat([part.lengths for part in parts]))
    padding = merged.provenance == Provenance.PADDING
    assert (merged.policy_version[padding] == -1).sum() >= 1


def test_merged_groups_stay_apart_and_samples_of_one_prompt_together() -> None:
    part = replace(ragged(0, (1, 1, 1)), group=torch.tensor([0, 0, 1]))
    merged = merge_rollouts([part, part], pad_id=PAD)
    assert merged.group.tolist() == [0, 0, 1, 2, 2, 3]


def test_merging_keeps_what_the_verifier_said() -> None:
    judged, unjudged = replace(ragged(0, (4, 2)), reasons=("a", "b")), ragged(1, (6,))
    assert merge_rollouts([judged, unjudged], pad_id=PAD).reasons == ("a", "b", "")
    assert merge_rollouts([unjudged, unjudged], pad_id=PAD).reasons == ()


def test_merging_keeps_the_samplers_top_ids() -> None:
    def with_ids(part: Rollout, k: int) -> Rollout:
        ids = torch.arange(part.tokens.numel() * k).reshape(*part.tokens.shape, k)
        return replace(part, sampler_top_ids=ids)

    parts = [with_ids(ragged(0, (4, 2)), 3), with_ids(ragged(1, (6,)), 3)]
    merged = merge_rollouts(parts, pad_id=PAD)
    assert merged.sampler_top_ids is not None
    expected = [pack_rows(part.sampler_top_ids, part.mask) for part in parts]  # type: ignore[arg-type]
    assert torch.equal(pack_rows(merged.sampler_top_ids, merged.mask), torch.cat(expected))
    without = merge_rollouts([parts[0], ragged(1, (6,))], pad_id=PAD)
    assert without.sampler_top_ids is None


def test_merging_nothing_but_one_part_returns_it() -> None:
    part = ragged(0, (2,))
    nothing = rollout_of(
        torch.zeros(0, 0, dtype=torch.long),
        torch.zeros(0, 0, dtype=torch.bool),
        torch.zeros(0, 0, dtype=torch.long),
    )
    assert merge_rollouts([nothing, part], pad_id=PAD) is part


# --------------------------------------------------------------------------------------------
# Extra model inputs


def test_model_inputs_reach_the_model_sequence_by_sequence() -> None:
    loaded, rollout = tiny("gpt2"), ragged(0, (4, 2, 3))
    inputs = tuple({"position_ids": torch.tensor([[7 * b]])} for b in range(3))
    batch = pack_rollout(replace(rollout, model_inputs=inputs), pad_id=PAD)
    student = Student(loaded)
    whole = student(batch, wanted=frozenset({LOGP})).fields[LOGP]
    model: Any = loaded.model
    expected = []
    for b, prompt in enumerate(rollout.prompt_ids):
        response = rollout.tokens[b, : int(rollout.lengths[b])].tolist()
        with torch.no_grad():
            logits = model(torch.tensor([[*prompt, *response]]), **inputs[b]).logits[0]
        logp = logits.log_softmax(-1)
        expected += [
            logp[len(prompt) + t - 1, token]
            for t, token in enumerate(response)
            if rollout.mask[b, t]
        ]
    assert (whole - torch.stack(expected)).abs().max() <= 1e-5
    parts = split(batch, max_tokens=1)
    found = [
        (part.rows, student(part.batch, wanted=frozenset({LOGP})).fields[LOGP]) for part in parts
    ]
    assert (join_parts(found, len(whole)) - whole).abs().max() <= 1e-5


def test_model_inputs_are_joined_along_their_first_axis() -> None:
    joined = join_model_inputs([{"image": torch.full((1, 2), b)} for b in range(3)])
    assert joined["image"].tolist() == [[0, 0], [1, 1], [2, 2]]
    assert join_model_inputs([]) == {}
    assert join_model_inputs([{}, {}]) == {}


@pytest.mark.parametrize("first", [0, 1])
def test_model_inputs_that_only_some_records_have_are_refused(first: int) -> None:
    records: list[dict[str, Any]] = [{}, {}]
    records[first] = {"image": torch.zeros(1, 2)}
    with pytest.raises(DataError, match="'image' is missing from some records"):
        join_model_inputs(records)


@pytest.mark.parametrize("shapes", [((1, 2), (1, 3)), ((2, 2), (2, 2)), ((), ())])
def test_model_inputs_that_cannot_be_joined_are_refused(
    shapes: tuple[tuple[int, ...], ...],
) -> None:
    with pytest.raises(DataError, match="'image' must have one shape that starts with 1"):
        join_model_inputs([{"image": torch.zeros(shape)} for shape in shapes])
