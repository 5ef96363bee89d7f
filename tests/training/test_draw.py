"""Who writes the text of a step, on real models: tokens, provenance, verdicts, buffer."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from opd.errors import ConfigError, TeacherError
from opd.models import backbone, project, unembedding
from opd.rollout.local import LocalSampler
from opd.training.draw import Text, Writers
from opd.training.session import Session, open_session
from opd.types import Prompt, Provenance, Stat, Verdict
from tests.training.runs import tiny_run

STUDENT, DATA, TEACHER = (
    int(kind) for kind in (Provenance.STUDENT, Provenance.DATA, Provenance.TEACHER)
)
UPDATES = 10
"""Optimizer steps that the tests pretend have passed before step 0."""


def begins_low(prompt: Prompt, response: str, *, finished: bool) -> Verdict:
    """About half of an untrained student's responses are right: a verifier for rewriting."""
    return Verdict(float(response[:1] < "M"))


def opened(tmp_path: Path, states: Mapping[str, Any], **changes: Any) -> Session:
    terms = [{"kind": "dense", "divergence": "forward_kl"}]
    method = {"name": "custom", "states": states, "objective": {"terms": terms}}
    sizes = {"train": {"steps": 4, "prompts_per_step": 8}}
    run = tiny_run(tmp_path, sizes, {"method": method, **changes})
    return open_session(run, verifier=begins_low)


def written(session: Session, steps: int = 1, writers: Writers | None = None) -> list[Text]:
    """The text of the first steps of the distillation, weights unchanged in between."""
    phase = session.phases[-1]
    if writers is None:
        writers = Writers(session)
        writers.enter(phase)
    texts = []
    for step in range(steps):
        states = phase.method.at(step, {}, None)[0].states
        texts.append(
            writers.write(phase, states, step=step, version=UPDATES + step, lap=lambda _: None)
        )
    return texts


@torch.no_grad()
def logp_of(loaded: Any, prompt: Sequence[int], tokens: torch.Tensor) -> torch.Tensor:
    """What one model gives the tokens of a response, by one forward of the whole text."""
    ids = torch.tensor([*prompt, *tokens.tolist()])[None]
    hidden = backbone(loaded.model)(input_ids=ids).last_hidden_state[0, len(prompt) - 1 : -1]
    head = unembedding(loaded.model, loaded.vocab_size)
    return project(hidden, head).log_softmax(-1).gather(1, tokens[:, None]).squeeze(1)


def teacher_of(session: Session) -> Any:
    assert isinstance(session.teacher_sampler, LocalSampler)
    return session.teacher_sampler.loaded


def assert_each_token_has_its_writers_logp(session: Session, text: Text) -> None:
    rollout = text.rollout
    for row, prompt in enumerate(rollout.prompt_ids):
        tokens = rollout.tokens[row, : int(rollout.lengths[row])]
        by_teacher = rollout.provenance[row, : len(tokens)] == TEACHER
        expected = torch.where(
            by_teacher,
            logp_of(teacher_of(session), prompt, tokens),
            logp_of(session.student.loaded, prompt, tokens),
        )
        assert (rollout.sampler_logp[row, : len(tokens)] - expected).abs().max() <= 1e-5


# --------------------------------------------------------------------------------------------
# Horizon


def test_a_scheduled_horizon_cuts_every_response_and_says_so(tmp_path: Path) -> None:
    horizon = {"schedule": "linear", "start": 2, "end": 5, "steps": 3}
    shares = {"student": 0.5, "data": 0.25, "teacher": 0.25}
    session = opened(tmp_path, {**shares, "horizon": horizon})
    assert session.phases[-1].plan.sampler.max_new_tokens == 5
    for limit, text in zip((2, 3, 4, 5), written(session, 4), strict=True):
        rollout = text.rollout
        assert int(rollout.lengths.max()) == limit
        for row, length in enumerate(rollout.lengths.tolist()):
            if rollout.stop_reason[row] == "length":
                assert length == limit
        of_data = (rollout.provenance == DATA).any(1).tolist()
        assert any(of_data)
        for row, from_data in enumerate(of_data):  # a worked solution is longer than five tokens
            assert not from_data or rollout.stop_reason[row] == "length"
        assert text.metrics["rollout/horizon"] == Stat(limit, 1.0)


# --------------------------------------------------------------------------------------------
# Teacher prefix


def test_the_teacher_writes_the_prefix_and_the_student_goes_on(tmp_path: Path) -> None:
    session = opened(tmp_path, {"teacher_prefix": 2})
    (text,) = written(session)
    rollout = text.rollout
    for row, length in enumerate(rollout.lengths.tolist()):
        by_whom = rollout.provenance[row, :length].tolist()
        assert by_whom == ([TEACHER] * 2 + [STUDENT] * (length - 2))[:length]
    assert int(rollout.lengths.max()) == 6
    assert rollout.group.tolist() == list(range(8))
    version = torch.where(rollout.provenance == STUDENT, UPDATES, 0)
    assert torch.equal(rollout.policy_version[rollout.mask], version[rollout.mask])
    assert not bool(rollout.verdict.isnan().any())
    assert_each_token_has_its_writers_logp(session, text)
    of_teacher = float((rollout.provenance == TEACHER).sum())
    assert text.metrics["rollout/by_teacher"] == Stat(of_teacher, float(rollout.lengths.sum()))


def test_a_prefix_annealed_to_nothing_leaves_the_students_own_text(tmp_path: Path) -> None:
    annealed = {"schedule": "linear", "start": 2, "end": 0, "steps": 2}
    texts = written(opened(tmp_path, {"teacher_prefix": annealed}), 3)
    shares = [text.rollout.provenance.eq(TEACHER).sum(1).max().item() for text in texts]
    assert shares == [2, 1, 0]


def test_every_sample_of_a_prompt_has_a_prefix_of_its_own(tmp_path: Path) -> None:
    session = opened(tmp_path, {"teacher_prefix": 3}, sampler={"samples_per_prompt": 4})
    rollout = written(session)[0].rollout
    assert rollout.group.tolist() == [prompt for prompt in range(8) for _ in range(4)]
    prefixes = {tuple(row) for row in rollout.tokens[:4, :3].tolist()}
    assert len(prefixes) > 1
    assert len(set(rollout.prompt_ids[:4])) == 1


# --------------------------------------------------------------------------------------------
# Mixture and interleaving


def test_interleaved_text_keeps_the_writer_of_every_token(tmp_path: Path) -> None:
    session = opened(tmp_path, {"student": 0.5, "teacher": 0.5, "interleave": 8})
    (text,) = written(session)
    own = text.rollout.provenance[:4]
    assert {STUDENT, TEACHER} <= set(own.flatten().tolist())
    assert text.rollout.provenance[4:].ne(STUDENT).all()
    assert text.rollout.policy_version[:4][own != 0].eq(UPDATES).all()


def test_a_mixture_annealed_to_nothing_samples_as_the_student_alone(tmp_path: Path) -> None:
    annealed = {"schedule": "linear", "start": 0.5, "end": 0.0, "steps": 1}
    mixed = written(opened(tmp_path / "a", {"mixture": annealed}), 2)
    alone = written(opened(tmp_path / "b", {}), 2)
    assert not torch.equal(mixed[0].rollout.sampler_logp, alone[0].rollout.sampler_logp)
    for text in mixed:
        assert text.rollout.provenance.ne(TEACHER).all()
    assert_each_token_has_its_writers_logp(opened(tmp_path / "c", {}), mixed[1])


# --------------------------------------------------------------------------------------------
# Rewriting


def test_wrong_responses_are_rewritten_and_judged_again_and_right_ones_left(
    tmp_path: Path,
) -> None:
    changes = {"sampler": {"samples_per_prompt": 2}}
    session = opened(tmp_path / "a", {"rewrite": 0.5}, **changes)
    before = written(opened(tmp_path / "b", {}, **changes))[0].rollout
    (text,) = written(session)
    after = text.rollout
    wrong = [row for row in range(16) if float(before.verdict[row]) == 0.0]
    assert 2 < len(wrong) < 14
    for row in range(16):
        length = int(before.lengths[row])
        kept = length - math.ceil(length / 2) if row in wrong else length
        for name in ("tokens", "sampler_logp", "policy_version", "provenance"):
            assert torch.equal(getattr(after, name)[row, :kept], getattr(before, name)[row, :kept])
        rest = after.provenance[row, kept : int(after.lengths[row])].tolist()
        assert rest == [TEACHER] * len(rest)
        assert bool(rest) == (row in wrong)
    assert torch.equal(after.group, before.group)
    assert text.metrics["rollout/accuracy"] == Stat(16.0 - len(wrong), 16.0)
    assert text.metrics["rollout/rewritten"] == Stat(float(len(wrong)), 16.0)
    assert_each_token_has_its_writers_logp(session, text)


def test_a_rewritten_response_has_the_verdict_of_its_new_text(tmp_path: Path) -> None:
    session = opened(tmp_path, {"rewrite": 1.0}, log={"samples_per_step": 8})
    (text,) = written(session)
    expected = [
        begins_low(prompt, response, finished=True).score
        for prompt, response in zip(text.rollout.prompts, text.shown, strict=True)
    ]
    assert text.rollout.verdict.tolist() == expected
    mended = text.metrics["rollout/rewritten_accuracy"]
    assert mended.total == sum(expected) - text.metrics["rollout/accuracy"].total
    assert mended.total > 0


def test_rewriting_needs_a_verifier(tmp_path: Path) -> None:
    run = tiny_run(
        tmp_path,
        {"data": {"verifier": "none"}},
        {
            "method": {
                "name": "custom",
                "states": {"rewrite": 0.5},
                "objective": {"terms": [{"kind": "dense", "divergence": "forward_kl"}]},
            }
        },
    )
    with pytest.raises(ConfigError, match="there is no verifier"):
        open_session(run)


# --------------------------------------------------------------------------------------------
# Replay


def test_replayed_text_is_that_of_earlier_steps_with_its_versions(tmp_path: Path) -> None:
    states = {"student": 0.5, "replay": 0.5, "replay_steps": 2}
    session = opened(tmp_path, states, sampler={"samples_per_prompt": 2})
    texts = written(session, 4)
    counts = [text.metrics["rollout/replayed"] for text in texts]
    assert counts == [Stat(0.0, 16.0), *[Stat(8.0, 16.0)] * 3]
    for step, text in enumerate(texts):
        rollout = text.rollout
        versions = rollout.policy_version.amax(1)
        fresh = 16 if step == 0 else 8
        assert versions[:fresh].eq(UPDATES + step).all()
        for row in range(fresh, 16):
            age = UPDATES + step - int(versions[row])
            assert 1 <= age <= 2
            source = texts[step - age].rollout
            same = [
                other
                for other in range(len(source.prompt_ids))
                if source.prompts[other].id == rollout.prompts[row].id
                and source.policy_version[other].max() == versions[row]
                and torch.equal(
                    source.tokens[other][source.mask[other]], rollout.tokens[row][rollout.mask[row]]
                )
            ]
            assert same
            old = source.sampler_logp[same[0]][source.mask[same[0]]]
            assert torch.equal(rollout.sampler_logp[row][rollout.mask[row]], old)
        groups = rollout.group[fresh:].tolist()
        assert all(groups.count(group) == 2 for group in groups)


def test_replay_takes_no_prompts_from_the_stream(tmp_path: Path) -> None:
    session = opened(tmp_path, {"student": 0.5, "replay": 0.5})
    writers = Writers(session)
    writers.enter(session.phases[-1])
    positions = []
    for _ in range(2):
        written(session, 1, writers)
        positions.append(writers.stream.position)
    assert positions == [8, 12]


def test_replay_is_the_same_in_every_run(tmp_path: Path) -> None:
    states = {"student": 0.5, "replay": 0.5, "replay_steps": 3}
    one, two = (written(opened(tmp_path / name, states), 4) for name in "ab")
    for first, second in zip(one, two, strict=True):
        assert torch.equal(first.rollout.tokens, second.rollout.tokens)
        assert first.rollout.prompts == second.rollout.prompts


# --------------------------------------------------------------------------------------------
# What cannot work


class Scorer:
    """A teacher that is no model in this process."""

    def score(self, request: Any) -> Any:
        raise AssertionError("is never asked")

    def can(self, need: Any) -> bool:
        return True


@pytest.mark.parametrize(
    "states", [{"teacher_prefix": 2}, {"mixture": 0.2}, {"interleave": 4}, {"rewrite": 0.5}]
)
def test_a_teacher_that_only_scores_cannot_take_part_in_writing(
    tmp_path: Path, states: dict[str, Any]
) -> None:
    terms = [{"kind": "dense", "divergence": "forward_kl"}]
    method = {"name": "custom", "states": states, "objective": {"terms": terms}}
    run = tiny_run(tmp_path, {"method": method})
    with pytest.raises(TeacherError, match="the teacher only scores"):
        open_session(run, teacher=Scorer(), verifier=begins_low)
