"""Token records: which rows there are, what is in them, and what a kill leaves."""

from __future__ import annotations

import json
import math
import signal
from collections.abc import Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from opd.diagnose.records import Gathered, TokenRecords, chosen, free_fields, texts_of
from opd.formula import credit, divergence, reward, surrogate, weight
from opd.head import linear_head
from opd.objective import Dense, Objective, Sampled
from opd.rollout.pack import pack_rollout, split
from opd.token_columns import COLUMNS, FAMILIES, column_names, part_files
from opd.training import step as steps
from opd.training.folder import RunFolder
from opd.types import FieldKey, Prompt, Provenance, StudentOutput, TeacherScores
from tests.builders import DATA, STUDENT, TOOL, Case, identity, rollout_of, settle
from tests.models_zoo import PAD
from tests.training.runs import (
    EVERYTHING,
    Kill,
    abandon,
    finish,
    run_in_child,
    tiny_run,
    token_rows,
)
from tests.training.test_step import prepared

ALL = {"log": {"token_share": 1.0}}
DISTILL = Sampled(reward=reward.teacher_log_ratio, name="distill", rows="student")
REVERSE_KL = Dense(divergence=divergence.reverse_kl, coef=0.5)


def writer(folder: Path, share: float = 1.0, **changes: Any) -> TokenRecords:
    return TokenRecords(folder, share=share, seed=0, text_of="<{}>".format, **changes)


def head_rows(case: Case, objective: Objective, batch: Any, max_tokens: int) -> dict[str, Tensor]:
    """What the head says of the rows, in micro-batches of so many tokens."""
    gathered = Gathered(free_fields(objective, batch))
    logits = case.rows(case.student_logits)
    for part in split(batch, max_tokens=max_tokens):
        out = linear_head(
            logits[part.rows].requires_grad_(),
            identity(case.vocab_size),
            part.batch,
            objective,
            wanted=gathered.wanted,
        )
        gathered.take(part.rows, StudentOutput(out.loss, out.stats, out.rows, out.fields))
    return gathered.joined(len(batch.row_index))


def recorded(
    folder: Path, case: Case, objective: Objective, *, max_tokens: int = 1000, **token: Any
) -> list[dict[str, Any]]:
    """The rows of one update, as they are read back."""
    batch = settle(case, objective, case.batch(**token))
    size = len(case.tokens)
    rollout = rollout_of(
        case.tokens,
        case.mask,
        case.provenance,
        prompts=tuple(Prompt(f"p{b}", (0,), "") for b in range(size)),
        verdict=torch.tensor([0.5, *(math.nan for _ in range(size - 1))]),
        group=torch.arange(size) // 2,
    )
    records = writer(folder)
    found = head_rows(case, objective, batch, max_tokens)
    records.add(rollout, batch, objective, found, phase="train", step=3, update=1)
    records.flush()
    return token_rows(folder)


# --------------------------------------------------------------------------------------------
# Values


def log_softmax(logits: Iterable[float]) -> list[float]:
    values = list(logits)
    return [value - math.log(sum(math.exp(other) for other in values)) for value in values]


def test_the_values_are_those_worked_out_by_hand(tmp_path: Path) -> None:
    """Two responses over three tokens: the student's `0, tool, 2` and the data's `1`."""
    student = [[[0.0, 0, 0], [9, 9, 9], [1, 2, 3]], [[2, 0, 0], [9, 9, 9], [9, 9, 9]]]
    teacher = [[[2.0, 0, 0], [9, 9, 9], [0, 0, 0]], [[0, 1, 0], [9, 9, 9], [9, 9, 9]]]
    none = int(Provenance.PADDING)
    case = Case(
        tokens=torch.tensor([[0, 1, 2], [1, 0, 0]]),
        mask=torch.tensor([[True, False, True], [True, False, False]]),
        provenance=torch.tensor([[STUDENT, TOOL, STUDENT], [DATA, none, none]]),
        student_logits=torch.tensor(student, dtype=torch.float64),
        teacher_logits={"teacher": torch.tensor(teacher, dtype=torch.float64)},
    )

    rows = recorded(tmp_path, case, Objective(DISTILL, REVERSE_KL))

    assert [row["token"] for row in rows] == [0, 1, 2, 1]
    assert [row["text"] for row in rows] == ["<0>", "<1>", "<2>", "<1>"]
    assert [(row["sequence"], row["position"]) for row in rows] == [(0, 0), (0, 1), (0, 2), (1, 0)]
    assert [row["length"] for row in rows] == [3, 3, 3, 1]
    assert [row["writer"] for row in rows] == ["student", "tool", "student", "data"]
    assert [row["mask"] for row in rows] == [True, False, True, True]
    assert [row["prompt_id"] for row in rows] == ["p0", "p0", "p0", "p1"]
    assert [row["group_id"] for row in rows] == [0, 0, 0, 0]
    assert [row["verdict"] for row in rows] == [0.5, 0.5, 0.5, None]
    assert {(row["phase"], row["step"], row["update"]) for row in rows} == {("train", 3, 1)}
    for row, (b, t) in zip(rows, [(0, 0), (0, 1), (0, 2), (1, 0)], strict=True):
        told = {"student_logp", "teacher_logp", "student_entropy", "reverse_kl", "loss__dense_2"}
        of_term = {"loss__distill", "reward__distill", "advantage__distill"}
        if not row["mask"]:
            assert {row[name] for name in told | of_term} == {None}
            continue
        own, theirs = log_softmax(student[b][t]), log_softmax(teacher[b][t])
        token = row["token"]
        ratio = theirs[token] - own[token]
        kl = sum(math.exp(s) * (s - o) for s, o in zip(own, theirs, strict=True))
        assert row["student_logp"] == pytest.approx(own[token])
        assert row["teacher_logp"] == pytest.approx(theirs[token])
        assert row["student_entropy"] == pytest.approx(-sum(math.exp(s) * s for s in own))
        assert row["reverse_kl"] == pytest.approx(kl, abs=1e-6)
        assert row["loss__dense_2"] == pytest.approx(kl / 2, abs=1e-6)
        if row["writer"] == "data":  # `distill` is about the student's own tokens
            assert {row[name] for name in of_term} == {None}
        else:
            assert row["reward__distill"] == pytest.approx(ratio, abs=1e-6)
            assert row["advantage__distill"] == pytest.approx(ratio, abs=1e-6)
            assert row["loss__distill"] == pytest.approx(-ratio * own[token], abs=1e-6)


def test_reward_and_advantage_are_told_apart_where_credit_walks_along_a_response(
    tmp_path: Path,
) -> None:
    case = Case.random(1, lengths=(4, 6), gaps=False)
    returns = Objective(Sampled(reward=reward.teacher_log_ratio, credit=credit.return_to_go))
    rows = recorded(tmp_path, case, returns)
    for sequence in (0, 1):
        own = [row for row in rows if row["sequence"] == sequence]
        rewards = [row["reward__sampled"] for row in own]
        ratios = [row["teacher_logp"] - row["student_logp"] for row in own]
        assert rewards == pytest.approx(ratios, abs=1e-5)
        sums = [sum(rewards[place:]) for place in range(len(rewards))]
        assert [row["advantage__sampled"] for row in own] == pytest.approx(sums, abs=1e-5)
        assert sums[0] != pytest.approx(rewards[0], abs=1e-3)


def test_weights_and_replaced_values_have_columns_of_their_terms(tmp_path: Path) -> None:
    case = Case.random(2, gaps=False)
    term = Sampled(
        reward=reward.teacher_log_ratio,
        surrogate=partial(surrogate.clipped, low=0.2, high=0.2),
        weights=(partial(weight.prefix, tokens=2),),
        name="my term",
    )
    rows = recorded(tmp_path, case, Objective(term), old_logp=torch.zeros(case.tokens.shape))
    for row in rows:
        assert row["weight__my_term__prefix"] == (row["position"] < 2)
        assert (row["loss__my_term"] == 0) == (row["position"] >= 2)
    assert {"loss__my_term", "changed__my_term__clipped"} <= rows[0].keys()
    assert {row["old_logp"] for row in rows} == {0.0}


def test_rows_without_an_answer_are_null_and_other_views_have_their_name_behind(
    tmp_path: Path,
) -> None:
    case = Case.random(3, lengths=(4, 4), gaps=False, views=("teacher", "teacher.before"))
    batch = case.batch()
    answers = batch.token.views["teacher"]
    assert answers.hidden is not None
    half = TeacherScores(
        hidden=answers.hidden[:4],
        unembedding=answers.unembedding,
        row_index=torch.tensor([0, 1, 2, 3, -1, -1, -1, -1]),
    )
    views = {"teacher": half, "teacher.before": batch.token.views["teacher.before"]}
    both = Objective(DISTILL, Dense(divergence=divergence.forward_kl, against="teacher.before"))
    rows = recorded(tmp_path, case, both, views=views)
    for name in ("teacher_logp", "advantage__distill", "loss__distill"):
        assert [row[name] is None for row in rows] == [False] * 4 + [True] * 4
    assert all(row["teacher_logp__before"] is not None for row in rows)
    assert all(row["forward_kl__before"] == row["loss__dense_2"] for row in rows)


def test_what_no_step_knows_is_null_and_its_column_there(tmp_path: Path) -> None:
    case = Case.random(4, views=())
    rows = recorded(tmp_path, case, Objective(Sampled(reward=reward.one)))
    assert list(rows[0])[: len(COLUMNS)] == list(COLUMNS)
    for name in ("teacher_logp", "value", "old_logp", "verdict"):
        assert {row[name] for row in rows if row["sequence"]} == {None}


def test_a_token_that_was_not_sampled_has_no_version_and_no_sampler_logp(tmp_path: Path) -> None:
    tokens, mask = torch.tensor([[4, 5]]), torch.tensor([[True, True]])
    rollout = rollout_of(
        tokens,
        mask,
        torch.tensor([[DATA, STUDENT]]),
        policy_version=torch.tensor([[-1, 7]]),
        sampler_logp=torch.tensor([[0.0, -1.5]]),
    )
    records = writer(tmp_path)
    objective = Objective(REVERSE_KL)
    batch = pack_rollout(rollout, pad_id=0)
    records.add(rollout, batch, objective, {}, phase="warmup", step=1, update=1)
    records.flush()
    first, second = token_rows(tmp_path)
    assert (first["policy_version"], first["sampler_logp"]) == (None, None)
    assert (second["policy_version"], second["sampler_logp"]) == (7, -1.5)


# --------------------------------------------------------------------------------------------
# Free


class LargeOutputs(TorchDispatchMode):
    """Counts operations that make something as large as a distribution per row."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.size, self.count = size, 0

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        out = function(*args, **(kwargs or {}))
        views = ("view", "detach", "slice", "alias", "expand", "select")
        if isinstance(out, Tensor) and out.numel() >= self.size:
            self.count += not any(word in str(function) for word in views)
        return out


WEIGHTED = Dense(
    divergence=divergence.forward_kl, weights=(partial(weight.teacher_entropy_above, nats=1.0),)
)
BASELINE = Sampled(reward=reward.teacher_log_ratio, baseline=credit.expected_reward)


@pytest.mark.parametrize(
    ("terms", "names"),
    [
        ((REVERSE_KL,), {"reverse_kl"}),
        ((WEIGHTED,), {"forward_kl", "teacher_entropy"}),
        ((BASELINE,), {"reverse_kl"}),
        ((DISTILL,), set()),
        # settled in the signal phase, so the update phase does not look it up
        ((Sampled(reward=reward.expected_log_ratio, credit=credit.return_to_go),), set()),
        ((Dense(divergence=divergence.total_variation),), set()),
        ((Dense(divergence=divergence.reverse_kl, smoothing=0.1),), set()),
    ],
)
def test_what_is_asked_for_costs_no_operation_on_a_distribution(
    terms: tuple[Any, ...], names: set[str]
) -> None:
    case, objective = Case.random(5, vocab_size=50), Objective(*terms)
    batch = settle(case, objective, case.batch())
    wanted = free_fields(objective, batch)
    assert {key.name for key in wanted} == names
    counts = []
    for asked in (frozenset(), wanted, frozenset({FieldKey("total_variation", "teacher")})):
        logits = case.rows(case.student_logits).requires_grad_()
        with LargeOutputs(logits.numel()) as mode:
            linear_head(logits, identity(50), batch, objective, wanted=asked)
        counts.append(mode.count)
    assert counts[0] == counts[1]
    if "total_variation" not in str(terms):
        assert counts[2] > counts[0]  # the count would have seen one


# --------------------------------------------------------------------------------------------
# Order


def test_micro_batches_change_no_row_and_no_order(tmp_path: Path) -> None:
    case = Case.random(6, writers=(STUDENT, DATA), views=("teacher",))
    objective = Objective(DISTILL, REVERSE_KL)
    whole = recorded(tmp_path / "whole", case, objective)
    parts = recorded(tmp_path / "parts", case, objective, max_tokens=7)
    assert whole == parts
    places = [(row["sequence"], row["position"]) for row in whole]
    assert places == sorted(places)
    assert len(places) == len(set(places)) == int((case.provenance != Provenance.PADDING).sum())


def test_micro_batches_of_a_model_give_the_same_rows(tmp_path: Path) -> None:
    from opd.objective import Method

    method = Method(Objective(DISTILL, REVERSE_KL))
    found = []
    for max_tokens in (1000, 9):
        student, batch, _, rollout = prepared(method)
        gathered = Gathered(free_fields(method.objective, batch))
        steps.update(student, batch, method.objective, max_tokens, step=1, gathered=gathered)
        records = writer(tmp_path / str(max_tokens))
        rows = gathered.joined(len(batch.row_index))
        records.add(rollout, batch, method.objective, rows, phase="train", step=1, update=1)
        records.flush()
        found.append(token_rows(tmp_path / str(max_tokens)))
    one, other = found
    assert len(one) == len(other) == int(rollout.lengths.sum())
    assert PAD not in {row["token"] for row in one if row["writer"] != "student"}
    for first, second in zip(one, other, strict=True):
        assert first == pytest.approx(second, abs=1e-5)


# --------------------------------------------------------------------------------------------
# Which responses


def test_the_choice_is_unbiased_and_needs_no_state() -> None:
    count, share = 400_000, 0.1
    places = chosen(share=share, seed=3, phase="train", step=17, sequences=count)
    deviation = math.sqrt(count * share * (1 - share))
    assert abs(len(places) - count * share) < 5 * deviation
    again = chosen(share=share, seed=3, phase="train", step=17, sequences=count)
    assert (again == places).all()
    # a shorter batch chooses the same of what it has
    some = chosen(share=share, seed=3, phase="train", step=17, sequences=100)
    assert some.tolist() == [place for place in places.tolist() if place < 100]


@pytest.mark.parametrize("share", [0.05, 0.5, 0.95])
def test_every_place_of_every_step_has_the_same_chance(share: float) -> None:
    steps_seen, sequences = 4000, 8
    counts = np.zeros(sequences)
    pairs = 0
    for step in range(steps_seen):
        places = chosen(share=share, seed=-1, phase="train", step=step, sequences=sequences)
        counts[places] += 1
        pairs += {0, 1} <= set(places.tolist())
    deviation = math.sqrt(share * (1 - share) / steps_seen)
    assert np.abs(counts / steps_seen - share).max() < 4.5 * deviation
    both = math.sqrt(share**2 * (1 - share**2) / steps_seen)
    assert abs(pairs / steps_seen - share**2) < 4.5 * both


@pytest.mark.parametrize("changed", [{"seed": 1}, {"step": 2}, {"phase": "warmup"}])
def test_the_choice_depends_on_seed_step_and_phase(changed: dict[str, Any]) -> None:
    told: dict[str, Any] = {"seed": 0, "phase": "train", "step": 1}
    one, other = (
        set(chosen(share=0.5, sequences=1000, **case).tolist()) for case in (told, told | changed)
    )
    assert 150 < len(one & other) < 350  # half of a half


def test_all_and_none_are_exact() -> None:
    every = chosen(share=1.0, seed=0, phase="train", step=1, sequences=100_000)
    assert every.tolist() == list(range(100_000))
    assert not len(chosen(share=0.0, seed=0, phase="train", step=1, sequences=100_000))


# --------------------------------------------------------------------------------------------
# Runs


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run that records everything and shows every response."""
    output = tmp_path_factory.mktemp("whole")
    log = {"log": {"token_share": 1.0, "samples_per_step": 4}}
    finish(tiny_run(output, log, {"train": {"save_every": 2}}))
    return output / "run"


def test_all_of_a_run_is_exactly_what_it_wrote(whole: Path) -> None:
    rows = token_rows(whole / "tokens")
    lines = [json.loads(line) for line in (whole / "samples.jsonl").read_text().splitlines()]
    shown = {"train": [line for line in lines if line.get("phase") == "train"]}["train"]
    assert len(shown) == 4 * 4
    for place, line in enumerate(shown):
        own = [row for row in rows if (row["step"], row["sequence"]) == (line["step"], place % 4)]
        assert [row["position"] for row in own] == list(range(own[0]["length"]))
        assert {row["stop_reason"] for row in own} == {line["stop_reason"]}
        assert {row["verdict"] for row in own} == {line["verdict"]}
        text = "".join(row["text"] for row in own if not row["text"].startswith("<"))
        assert text == line["response"]
    assert len(rows) == json.loads((whole / "summary.json").read_text())["tokens"]
    losses = RunFolder(whole).read_events()[-1]["metrics"]["loss/dense"]
    last = [row["loss__dense"] for row in rows if row["step"] == 4]
    assert losses[1] == len(last)
    assert sum(last) == pytest.approx(losses[0], rel=1e-5)
    assert {row["reverse_kl"] == row["loss__dense"] for row in rows} == {True}


def test_a_share_of_a_run_is_whole_responses_of_it(whole: Path, tmp_path: Path) -> None:
    finish(tiny_run(tmp_path, {"log": {"token_share": 0.5}}))
    some, every = token_rows(tmp_path / "run" / "tokens"), token_rows(whole / "tokens")
    kept = {
        step: set(chosen(share=0.5, seed=0, phase="train", step=step, sequences=4).tolist())
        for step in (1, 2, 3, 4)
    }
    assert some == [row for row in every if row["sequence"] in kept[row["step"]]]
    assert 0 < len(some) < len(every)
    (metadata,) = {
        tuple(sorted(pq.read_schema(part).metadata.items()))
        for part in part_files(tmp_path / "run" / "tokens")
    }
    told = {key.decode(): value.decode() for key, value in metadata}
    assert (
        told.items()
        >= {
            "opd.tokens.version": "1",
            "opd.tokens.share": "0.5",
            "opd.tokens.seed": "0",
        }.items()
    )


def test_no_share_writes_nothing_and_recording_changes_no_weight(
    whole: Path, tmp_path: Path
) -> None:
    finish(tiny_run(tmp_path, {"log": {"token_share": 0.0}}))
    assert not (tmp_path / "run" / "tokens").exists()
    one, other = (
        (folder / "model" / "model.safetensors").read_bytes()
        for folder in (whole, tmp_path / "run")
    )
    assert one == other


KILLS: Mapping[str, Kill] = {
    "as the first part is named": Kill("os.rename", ".part-000001.parquet"),
    "between a part and its checkpoint": Kill("os.rename", ".step-2.tmp"),
    "in a step after a checkpoint": Kill("open", "events.jsonl", count=2),
    "as a later part is opened": Kill("open", ".part-000003.parquet"),
    "as the last checkpoint is named": Kill("os.rename", ".step-5.tmp"),
}


@pytest.mark.slow
def test_a_killed_run_ends_with_the_records_of_one_that_was_not(tmp_path: Path) -> None:
    """With steps after the last checkpoint, so that parts are there which must go."""
    changes = [EVERYTHING, ALL, {"train": {"save_every": 2}}, {"evaluate": {"every": 0}}]
    finish(tiny_run(tmp_path / "whole", *changes))
    run, folder = tiny_run(tmp_path / "broken", *changes), tmp_path / "broken" / "run"
    for moment, kill in KILLS.items():
        resume = folder if folder.exists() else None
        assert run_in_child(run, resume=resume, kill=kill) == -signal.SIGKILL, moment
    # let go of in a step that no checkpoint knows: what it has is written all the same
    before = len(part_files(folder / "tokens"))
    abandon(run, 1, resume=folder)
    assert len(part_files(folder / "tokens")) >= before
    assert run_in_child(run, resume=folder) == 0
    ours, theirs = (token_rows(path / "tokens") for path in (folder, tmp_path / "whole" / "run"))
    assert ours == theirs
    assert len({(r["phase"], r["step"], r["update"]) for r in ours}) == 2 + 2 * 4
    assert not list(folder.rglob(".*"))


def test_a_run_that_must_stop_leaves_the_records_up_to_then(tmp_path: Path) -> None:
    run = tiny_run(tmp_path, ALL, {"train": {"save_every": 0}, "evaluate": {"every": 0}})
    abandon(run, 4)
    assert not list((tmp_path / "run" / "checkpoints").glob("*"))
    assert {row["step"] for row in token_rows(tmp_path / "run" / "tokens")} == {1, 2, 3}


# --------------------------------------------------------------------------------------------
# Files and names


def test_parts_are_written_when_they_are_full_and_the_numbers_go_on(tmp_path: Path) -> None:
    case, objective = Case.random(7, lengths=(5, 5), gaps=False), Objective(REVERSE_KL)
    batch = case.batch()
    rollout = rollout_of(case.tokens, case.mask, case.provenance)
    rows = head_rows(case, objective, batch, 100)
    for begin in (0, 5):
        records = writer(tmp_path, rows_per_part=20)
        for step in range(begin + 1, begin + 6):
            records.add(rollout, batch, objective, rows, phase="train", step=step, update=1)
        records.flush()
        records.flush()
    sizes = [pq.read_metadata(part).num_rows for part in part_files(tmp_path)]
    assert sizes == [20, 20, 10, 20, 20, 10]
    assert [part.name for part in part_files(tmp_path)][-1] == "part-000006.parquet"
    assert [row["step"] for row in token_rows(tmp_path)][::10] == list(range(1, 11))


def test_columns_that_come_later_are_null_before(tmp_path: Path) -> None:
    case, objective = Case.random(8, lengths=(3,), gaps=False), Objective(REVERSE_KL)
    batch, rollout = case.batch(), rollout_of(case.tokens, case.mask, case.provenance)
    rows = head_rows(case, objective, batch, 100)
    records = writer(tmp_path)
    for step, more in ((1, {}), (2, {"advantage/late": torch.ones(3)})):
        records.add(rollout, batch, objective, rows | more, phase="train", step=step, update=1)
    records.flush()
    assert [row["advantage__late"] for row in token_rows(tmp_path)] == [None] * 3 + [1.0] * 3


def test_a_part_that_cannot_be_written_leaves_nothing_and_keeps_its_rows(tmp_path: Path) -> None:
    case, objective = Case.random(9, lengths=(3,), gaps=False), Objective(REVERSE_KL)
    rollout = rollout_of(case.tokens, case.mask, case.provenance)
    records = writer(tmp_path / "tokens")
    records.add(rollout, case.batch(), objective, {}, phase="train", step=1, update=1)
    (tmp_path / "tokens" / "part-000001.parquet").mkdir(parents=True)  # no file takes its name
    (tmp_path / "tokens" / "part-000001.parquet").rename(
        tmp_path / "tokens" / "part-000000.parquet"
    )
    (tmp_path / "tokens" / ".part-000001.parquet.tmp").mkdir()
    with pytest.raises(IsADirectoryError):
        records.flush()
    (tmp_path / "tokens" / ".part-000001.parquet.tmp").rmdir()
    (tmp_path / "tokens" / "part-000000.parquet").rmdir()
    records.flush()
    assert len(token_rows(tmp_path / "tokens")) == 3


def test_names_are_single_words_and_each_its_own() -> None:
    named = column_names(
        [
            "loss/a b",
            "loss/a-b",
            "loss/A_B",
            "weight/x/entropy_gate",
            "teacher_logp/before",
            "value",
        ]
    )
    assert list(named.values()) == [
        "loss__a_b",
        "loss__a_b__2",
        "loss__A_B__3",
        "weight__x__entropy_gate",
        "teacher_logp__before",
        "value",
    ]


def test_the_page_of_the_run_folder_has_every_column() -> None:
    page = (Path(__file__).parents[2] / "docs" / "run_folder.md").read_text(encoding="utf-8")
    for name, meaning in {**COLUMNS, **FAMILIES}.items():
        words = ", ".join(f"`{word}`" for word in name.split(", "))
        assert f"| {words} | {meaning} |" in page, name


class Pieces:
    """A tokenizer of four pieces, as those of SentencePiece and of bytes are."""

    def convert_ids_to_tokens(self, token: int) -> str | None:
        return {0: "▁the", 1: "Ã", 2: "ing"}.get(token)

    def decode(self, tokens: list[int], **options: Any) -> str:
        return {0: "the", 1: "\ufffd", 2: "ing"}[tokens[0]]


def test_a_text_keeps_its_space_and_what_is_no_character_is_shown_as_a_piece() -> None:
    text_of = texts_of(Pieces())
    assert [text_of(token) for token in range(4)] == [" the", "Ã", "ing", "<3>"]
