"""Monitors: the sums of every step, and what a few responses show of both distributions."""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from opd.diagnose.monitors import LOOKED_AT, MEANINGS, MONITOR, of_look, of_update
from opd.formula import divergence, reward, surrogate
from opd.objective import Dense, Objective, Sampled
from opd.rollout.pack import pack_rollout
from opd.types import Provenance, Rollout, Stat
from tests.builders import DATA, STUDENT, TEACHER, rollout_of
from tests.training.runs import finish, tiny_run

NONE = int(Provenance.PADDING)
SAMPLED = Objective(Sampled(reward=reward.teacher_log_ratio))


def text(*, by_data: bool = False, **changes: object) -> Rollout:
    """Three responses: right of 3 tokens with an end, wrong of 6 with 4-grams again, the data's."""
    tokens = torch.tensor([[5, 6, 2, 0, 0, 0], [7, 7, 7, 7, 7, 7], [8, 2, 0, 0, 0, 0]])
    who = torch.tensor(
        [[STUDENT] * 3 + [NONE] * 3, [STUDENT] * 6, [DATA] * 2 + [NONE] * 4], dtype=torch.long
    )
    if by_data:
        who = torch.where(who == NONE, NONE, DATA)
    settings = {
        "verdict": torch.tensor([1.0, 0.0, math.nan]),
        "stop_reason": ("eos", "length", "eos"),
        "sampler_logp": torch.zeros(3, 6),
    }
    return rollout_of(tokens, who != NONE, who, **(settings | changes))


# the log ratio of every row: three, six, and two of the data's
R = torch.tensor([-1.0, -2, -6, 0, 1, -1, 2, -2, 3, 50, 50])


def monitors(
    rollout: Rollout, objective: Objective = SAMPLED, **rows: torch.Tensor
) -> dict[str, Stat]:
    batch = pack_rollout(rollout, pad_id=0)
    known = {"log_ratio": R, "student_logp": torch.zeros(11), "student_entropy": torch.ones(11)}
    found = of_update(rollout, batch, objective, known | rows)
    return {name.removeprefix(MONITOR): stat for name, stat in found.items()}


def test_thirds_and_outcomes_are_those_of_the_students_own_rows() -> None:
    found = monitors(text())
    assert found["log_ratio"] == Stat(-6.0, 9.0)
    # of three tokens each third is one, of six it is two
    assert found["log_ratio/first"] == Stat(-1 + 0 + 1, 3.0)
    assert found["log_ratio/middle"] == Stat(-2 - 1 + 2, 3.0)
    assert found["log_ratio/last"] == Stat(-6 - 2 + 3, 3.0)
    assert found["log_ratio/right"] == Stat(-9.0, 3.0)
    assert found["log_ratio/wrong"] == Stat(3.0, 6.0)
    assert found["entropy/middle"] == Stat(3.0, 3.0)
    assert found["infinite"] == Stat(0.0, 9.0)


def test_first_and_end_tokens_stand_alone() -> None:
    found = monitors(text())
    assert found["first_token"] == Stat(1.0, 2.0)
    assert found["later_tokens"] == Stat(17.0, 7.0)
    # the response that was cut off has no end token
    assert found["end_tokens"] == Stat(6.0, 1.0)
    assert found["other_tokens"] == Stat(12.0, 8.0)


def test_quantiles_are_linear_in_between() -> None:
    found = monitors(text())
    assert found["log_ratio/q50"].mean == -1.0  # the fifth of -6 -2 -2 -1 -1 0 1 2 3
    assert found["log_ratio/q01"].mean == pytest.approx(-6 + 0.08 * 4)
    assert found["log_ratio/q99"].mean == pytest.approx(2 + 0.92 * 1)


def test_the_push_of_a_sampled_term_is_that_of_its_advantage() -> None:
    found = monitors(text(), SAMPLED, **{"advantage/sampled": R, "loss/sampled": R})
    assert found["negative_share"] == Stat(5.0, 9.0)
    assert found["negative_mass"] == Stat(12.0, 18.0)
    assert found["effective_share"].mean == pytest.approx(
        18**2 / (1 + 4 + 36 + 0 + 1 + 1 + 4 + 4 + 9) / 9
    )
    assert found["top_share"].mean == pytest.approx(6 / 18)  # one of nine is the top 1 %


def test_a_term_that_does_not_look_at_rows_says_nothing_of_them() -> None:
    on_data = Objective(
        Dense(divergence=divergence.reverse_kl),
        Dense(divergence=divergence.forward_kl, name="gold", rows="data"),
    )
    loss = {"loss/dense": torch.arange(11.0), "loss/gold": torch.full((11,), 100.0)}
    found = monitors(text(), on_data, **loss)
    assert found["loss"] == Stat(36.0, 9.0)


def test_rows_that_are_not_finite_are_counted_and_in_no_average() -> None:
    r = R.clone()
    r[4] = -math.inf
    found = monitors(text(), log_ratio=r)
    assert found["infinite"] == Stat(1.0, 9.0)
    assert found["log_ratio"] == Stat(-7.0, 8.0)
    assert all(math.isfinite(stat.total) for stat in found.values())


def test_stale_text_shows_in_the_ratio_to_who_wrote_it() -> None:
    student = torch.zeros(11)
    student[:4] = torch.tensor([2.0, 0.5, 1.0, 3.0]).log()
    clipped = Objective(
        Sampled(
            reward=reward.teacher_log_ratio,
            surrogate=partial(surrogate.masked_importance, low=0.6, high=2.5),
        )
    )
    found = monitors(text(), clipped, student_logp=student)
    assert found["importance_ratio"].mean == pytest.approx((2 + 0.5 + 1 + 3 + 5) / 9)
    assert found["kl_from_samples"].mean == pytest.approx(-math.log(3) / 9)
    assert found["masked/sampled"] == Stat(2.0, 9.0)  # 0.5 and 3
    assert found["masked_mass/sampled"].mean == pytest.approx(3.5 / 11.5)


def test_a_clip_masks_what_is_beyond_one_and_its_bounds() -> None:
    student = torch.zeros(11)
    student[:3] = torch.tensor([1.25, 0.85, 0.7]).log()
    clip = partial(surrogate.clipped, low=0.2, high=0.2)
    term = Sampled(reward=reward.teacher_log_ratio, surrogate=clip)
    found = monitors(text(), Objective(term), student_logp=student)
    assert found["masked/sampled"] == Stat(2.0, 9.0)


def test_outcomes_are_ranked_and_confidence_is_held_to_them() -> None:
    found = monitors(text())
    assert found["align_auc"] == Stat(0.0, 1.0)  # the right one has -3, the wrong one 0.5
    assert found["calibration_error"].mean == pytest.approx(0.5)  # both sure, one right
    assert monitors(text(), log_ratio=-R)["align_auc"] == Stat(1.0, 1.0)
    unjudged = text(verdict=torch.full((3,), math.nan))
    assert not {"align_auc", "calibration_error"} & monitors(unjudged).keys()


def test_a_score_that_knows_the_prompt_only_ranks_well_over_all_and_by_chance_within() -> None:
    """An easy prompt with three of four right, a hard one with one, one that was never solved."""
    verdict = torch.tensor([1.0, 1, 1, 0, 1, 0, 0, 0, 0, 0, math.nan, 1])
    group = torch.tensor([0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 0, 3])
    score = torch.tensor([4.0, 4, 4, 4, -4, -4, -4, -4, 0, 0, 9, 0])
    several = rollout_of(
        torch.full((12, 1), 5),
        torch.ones(12, 1, dtype=torch.bool),
        torch.full((12, 1), STUDENT),
        verdict=verdict,
        group=group,
    )

    def within(log_ratio: torch.Tensor) -> tuple[Stat, Stat]:
        flat = {"student_logp": torch.zeros(12), "student_entropy": torch.zeros(12)}
        found = monitors(several, log_ratio=log_ratio, **flat)
        return found["align_auc"], found["align_within"]

    # of six wrong ones the three right at 4 beat five and tie with one, that at -4 ties with three,
    # that at 0 beats three and ties with two
    assert within(score) == (Stat(3 * 5.5 + 1.5 + 4, 30.0), Stat(0.5 + 0.5, 2.0))
    # of the easy prompt 2 of 3 pairs, of the hard one none
    told = within(score + torch.tensor([2.0, 2, 0, 1, -1, 0, 0, 0, 0, 0, 0, 0]))[1]
    assert (told.total, told.count) == (pytest.approx(2 / 3), 2.0)
    # a response without a score is in no pair
    unmeasured = score.clone()
    unmeasured[4] = math.nan
    assert within(unmeasured)[1] == Stat(0.5, 1.0)


def test_nothing_is_ranked_within_a_prompt_that_has_one_response() -> None:
    assert "align_within" not in monitors(text())


def test_a_verdict_at_the_pass_mark_is_right() -> None:
    found = monitors(text(verdict=torch.tensor([0.5, 0.49, math.nan])))
    assert found["log_ratio/right"] == Stat(-9.0, 3.0)
    assert found["log_ratio/wrong"] == Stat(3.0, 6.0)
    assert found["align_auc"] == Stat(0.0, 1.0)
    assert found["calibration_error"].mean == pytest.approx(0.5)


def test_without_a_view_called_teacher_the_first_that_a_term_compares_with_is_followed() -> None:
    named = Objective(
        Sampled(reward=reward.group_advantage, against="teacher.b", name="outcome"),
        Dense(divergence=divergence.reverse_kl, against="reference", name="anchor"),
        Dense(divergence=divergence.reverse_kl, against="teacher.a", name="one"),
        Dense(divergence=divergence.reverse_kl, against="teacher.b", name="other"),
    )
    rollout = text()
    known = {"student_logp": torch.zeros(11), "student_entropy": torch.ones(11)}
    known |= {"log_ratio/b": -R, "log_ratio/a": R, "reverse_kl/b": -R, "reverse_kl/a": R.abs()}

    def found(**rows: torch.Tensor) -> dict[str, Stat]:
        return of_update(rollout, pack_rollout(rollout, pad_id=0), named, known | rows)

    of_a = found()
    assert of_a["monitor/log_ratio"] == Stat(-6.0, 9.0)
    assert of_a["monitor/reverse_kl"] == Stat(18.0, 9.0)
    assert of_a["monitor/first_token"] == Stat(1.0, 2.0)
    assert of_a["monitor/end_tokens"] == Stat(6.0, 1.0)
    assert of_a["monitor/align_auc"] == Stat(0.0, 1.0)
    # one that is called so comes first, and what others know is not taken for its own
    own = found(log_ratio=2 * R)
    assert own["monitor/log_ratio"] == Stat(-12.0, 9.0)
    assert "monitor/reverse_kl" not in own


def test_repetition_is_counted_in_the_students_responses() -> None:
    # three 4-grams of one kind; the other response is too short for any
    repeated = monitors(text())["repeated"]
    assert (repeated.total, repeated.count) == (pytest.approx(2 / 3), 1.0)


def test_where_the_student_wrote_nothing_all_rows_count() -> None:
    found = monitors(text(by_data=True))
    assert found["log_ratio"] == Stat(94.0, 11.0)
    assert "kl_from_samples" not in found


def test_every_monitor_has_a_meaning() -> None:
    rows = {"reverse_kl": R.abs(), "loss/sampled": R, "advantage/sampled": R}
    names = {name.split("/")[0] for name in monitors(text(), SAMPLED, **rows)}
    assert names <= {name.split("/")[0] for name in MEANINGS}


# --------------------------------------------------------------------------------------------
# Looks


def test_a_look_averages_rows_and_suppression_where_the_ratio_is_negative() -> None:
    mask = torch.tensor([[True, True, True], [True, True, True]])
    rows = {name: torch.zeros(6) for name in LOOKED_AT if name not in ("routable", "infinite")}
    rows["log_ratio"] = torch.tensor([-2.0, 1, -1, 0, -1, 1])
    rows["candidate_mass"] = torch.tensor([0.5, 9, 0.0, 9, 0.1, 9])
    rows["leak"] = torch.tensor([0.2, 9, 1.0, 9, 0.3, 9])
    rows["top_k_overlap"] = torch.tensor([1.0, 0.5, 0.0, 1, 0.5, 0])
    rows["teacher_entropy"] = torch.full((6,), math.log(10.0))
    rows["teacher_margin"] = torch.tensor([math.inf, 1, 1, 1, 1, 1])

    found = of_look(rows, mask, torch.full((2, 3), STUDENT), vocab_size=100)

    look = {name.removeprefix("monitor/look/"): stat for name, stat in found.items()}
    assert look["candidate_mass"].total == pytest.approx(1.1)  # 2 x 0.5 + 1 x 0 + 1 x 0.1
    assert look["candidate_mass"].count == 4.0
    assert look["leak"].mean == pytest.approx(0.5)
    assert look["routable"] == Stat(2.0, 3.0)
    assert look["top_k_overlap"] == Stat(3.0, 6.0)
    assert [look[f"top_k_overlap/{third}"].mean for third in ("first", "middle", "last")] == [
        1,
        0.5,
        0,
    ]
    assert look["teacher_spread"].mean == pytest.approx(0.5)
    assert look["teacher_margin"] == Stat(5.0, 5.0)
    assert look["infinite"] == Stat(1.0, 6.0)


def test_a_look_at_nothing_says_nothing() -> None:
    closed, everywhere = torch.zeros(2, 3, dtype=torch.bool), torch.ones(2, 3, dtype=torch.bool)
    assert of_look({}, closed, torch.full((2, 3), STUDENT), vocab_size=10) == {}
    assert of_look({}, everywhere, torch.full((2, 3), TEACHER), vocab_size=10) == {}


def test_a_look_counts_the_students_tokens_at_their_places_in_the_response() -> None:
    """The teacher wrote the first two of six; what is the student's is not its first third."""
    mask = torch.ones(1, 6, dtype=torch.bool)
    who = torch.tensor([[TEACHER] * 2 + [STUDENT] * 4])
    rows = {name: torch.zeros(6) for name in LOOKED_AT if name not in ("routable", "infinite")}
    rows["top_k_overlap"] = torch.tensor([9.0, 9, 1, 2, 3, 4])
    rows["log_ratio"] = torch.tensor([-9.0, -9, -1, 1, -1, 1])
    rows["candidate_mass"] = torch.tensor([9.0, 9, 0.5, 9, 0.0, 9])
    rows["entropy_gap"] = torch.tensor([math.inf, 0, 0, 0, 0, math.inf])

    found = of_look(rows, mask, who, vocab_size=10)

    look = {name.removeprefix("monitor/look/"): stat for name, stat in found.items()}
    assert look["top_k_overlap"] == Stat(10.0, 4.0)
    assert "top_k_overlap/first" not in look
    assert look["top_k_overlap/middle"] == Stat(3.0, 2.0)
    assert look["top_k_overlap/last"] == Stat(7.0, 2.0)
    assert look["routable"] == Stat(1.0, 2.0)
    assert look["candidate_mass"] == Stat(0.5, 2.0)
    assert look["infinite"] == Stat(1.0, 4.0)


# --------------------------------------------------------------------------------------------
# In runs


def of_one_step(tmp_path: Path, *changes: Mapping[str, Any]) -> tuple[dict[str, Stat], int]:
    """The monitors of a step, all of whose responses are looked at, and its tokens."""
    short = {
        "train": {"steps": 1, "save_every": 0},
        "evaluate": {"every": 0, "prompts": 1, "test_prompts": 1, "teacher": False},
        "monitor": {"responses": 100},
    }
    (report,) = [each for each in finish(tiny_run(tmp_path, short, *changes)) if each.tokens]
    return dict(report.metrics), report.tokens


@pytest.mark.parametrize("states", [{"teacher_prefix": 3}, {"interleave": 8}], ids=str)
def test_a_look_counts_what_the_student_wrote_of_text_by_both(
    states: dict[str, Any], tmp_path: Path
) -> None:
    terms = [{"kind": "dense", "divergence": "reverse_kl"}]
    method = {"name": "custom", "states": states, "objective": {"terms": terms}}
    found, tokens = of_one_step(tmp_path, {"method": method})
    look, step = found["monitor/look/reverse_kl"], found["monitor/reverse_kl"]
    assert 0 < look.count == step.count < tokens
    assert look.mean == pytest.approx(step.mean, rel=1e-5)


def test_of_teachers_with_names_only_the_first_is_followed(tmp_path: Path) -> None:
    by_name = {
        "teachers": {
            "a": {"model": "builtin:sort-teacher-init"},
            "b": {"model": "builtin:sort-teacher"},
        },
        "method": {"name": "deepseek_v4", "options": {"teachers": ["a", "b"]}},
    }
    found, _ = of_one_step(tmp_path, by_name)
    assert {"monitor/first_token", "monitor/log_ratio/q50"} <= found.keys()
    # the look is at the first too
    look, step = found["monitor/look/reverse_kl"], found["monitor/reverse_kl"]
    assert step.mean == pytest.approx(look.mean, rel=1e-5)
