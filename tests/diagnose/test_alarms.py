"""Alarms: each is given in a history that shows its failure, and silent just beside it."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest

from opd import catalog
from opd.cli.main import COMMANDS
from opd.diagnose import alarms
from opd.diagnose.alarms import READS, THRESHOLDS, History, raised
from opd.terms import TERMS
from opd.training.config import dotted_keys
from opd.types import Stat
from tests.test_docs import module_from

ROOT = Path(__file__).parents[2]
LOOK = "monitor/look/"


def history(steps: Sequence[Mapping[str, float]]) -> History:
    """What the means of some steps leave, each of a hundred rows."""
    found = History()
    for step in steps:
        found.add({name: Stat(100 * value, 100.0) for name, value in step.items()})
    return found


def steady(count: int, **values: float) -> list[dict[str, float]]:
    return [{name.replace("__", "/"): value for name, value in values.items()}] * count


def given(steps: Sequence[Mapping[str, float]]) -> list[str]:
    return [alarm.name for alarm in raised(history(steps))]


def misaligned(surprise: float, spread: float) -> list[dict[str, float]]:
    return [{LOOK + "excess_surprise": surprise, LOOK + "teacher_spread": spread}] * 2


def judged(auc: float, accuracy: float = 0.3) -> list[dict[str, float]]:
    return [{"monitor/align_auc": auc, "rollout/accuracy": accuracy}] * 5


def fading(end: float) -> list[dict[str, float]]:
    confidence = LOOK + "teacher_confidence/"
    return [{confidence + "first": 0.9, confidence + "last": end}] * 2


def golden(before: float, after: float) -> list[dict[str, float]]:
    return [{"golden/sort/accuracy": before}, {"golden/sort/accuracy": after}]


# by alarm a history that shows the failure, and one that nearly does
CASES: dict[str, tuple[list[dict[str, float]], list[dict[str, float]]]] = {
    "misaligned_events": (misaligned(4.5, 0.1), misaligned(4.3, 0.1)),
    "foreign_template": (
        steady(5, monitor__first_token=6.0, monitor__later_tokens=1.7),
        steady(5, monitor__first_token=5.8, monitor__later_tokens=1.7),
    ),
    "end_token_mismatch": (
        steady(5, monitor__end_tokens=5.0, monitor__other_tokens=2.4),
        steady(5, monitor__end_tokens=5.0, monitor__other_tokens=2.6),
    ),
    "teacher_out_of_domain": (
        [{LOOK + "top_k_overlap": 0.44}] * 2,
        [{LOOK + "top_k_overlap": 0.46}] * 2,
    ),
    "noise_teacher": ([{LOOK + "teacher_spread": 0.61}] * 2, [{LOOK + "teacher_spread": 0.59}] * 2),
    "privilege_leak": (
        steady(5, teacher__hint__copied=0.5) + steady(5, teacher__hint__copied=0.71),
        steady(5, teacher__hint__copied=0.5) + steady(5, teacher__hint__copied=0.69),
    ),
    "stale_sampler": (
        steady(5, monitor__kl_from_samples=0.31),
        steady(5, monitor__kl_from_samples=0.29),
    ),
    "length_collapse": (
        steady(5, rollout__length=100.0) + steady(5, rollout__length=49.0),
        steady(5, rollout__length=100.0) + steady(5, rollout__length=51.0),
    ),
    "length_inflation": (
        steady(5, rollout__truncated=0.1) + steady(5, rollout__truncated=0.31),
        steady(5, rollout__truncated=0.1) + steady(5, rollout__truncated=0.29),
    ),
    "repetition": (
        steady(5, monitor__repeated=0.05) + steady(5, monitor__repeated=0.21),
        steady(5, monitor__repeated=0.05) + steady(5, monitor__repeated=0.19),
    ),
    "unroutable_suppression": (
        [{LOOK + "candidate_mass": 0.39}] * 2,
        [{LOOK + "candidate_mass": 0.41}] * 2,
    ),
    "conflicting_teachers": (
        [{"teacher/a|b/cosine": -0.01}] * 2,
        [{"teacher/a|b/cosine": 0.01}] * 2,
    ),
    # of 150 right and 350 wrong ones a ranking by chance is off by 0.028
    "misranked_outcome": (judged(0.41), judged(0.42)),
    "entropy_collapse": (
        [{LOOK + "student_entropy": 0.39, LOOK + "teacher_entropy": 1.0}] * 2,
        [{LOOK + "student_entropy": 0.41, LOOK + "teacher_entropy": 1.0}] * 2,
    ),
    "gradient_concentration": (
        steady(5, monitor__top_share=0.56),
        steady(5, monitor__top_share=0.54),
    ),
    "late_fade": (fading(0.64), fading(0.66)),
    # 38 % is 0.22 less than 60 %, and three standard errors are 3 * sqrt(0.49 * 0.51 / 50)
    "golden_regression": (golden(0.6, 0.38), golden(0.6, 0.4)),
    "calibration_drift": (
        steady(5, monitor__calibration_error=0.1) + steady(5, monitor__calibration_error=0.31),
        steady(5, monitor__calibration_error=0.1) + steady(5, monitor__calibration_error=0.29),
    ),
}


@pytest.mark.parametrize("name", THRESHOLDS)
def test_an_alarm_is_given_beyond_its_threshold_and_not_before(name: str) -> None:
    beyond, before = CASES[name]
    assert given(beyond) == [name]
    assert given(before) == []


@pytest.mark.parametrize("name", THRESHOLDS)
def test_one_entry_less_is_too_little_to_tell(name: str) -> None:
    beyond, _ = CASES[name]
    assert given(beyond[1:]) == []
    assert given([]) == []


def test_the_value_and_the_threshold_are_told_and_alarms_can_be_off() -> None:
    (alarm,) = raised(history(CASES["length_collapse"][0]))
    assert alarm.value == pytest.approx(0.49)
    assert alarm.threshold == 0.5
    assert raised(history(CASES["length_collapse"][0]), ["length_collapse"]) == []


def test_a_sure_teacher_is_not_misaligned_and_an_unsure_one_cannot_be() -> None:
    assert given(misaligned(0.0, 0.1)) == []
    assert "misaligned_events" not in given(misaligned(9.0, 0.51))


def test_few_verdicts_are_no_ranking() -> None:
    """Of a hundred, four are right, and chance alone may put these last."""
    few = [
        {"monitor/align_auc": Stat(0.3 * 96, 96.0), "rollout/accuracy": Stat(0.8, 20.0)}
        for _ in range(5)
    ]
    found = History()
    for step in few:
        found.add(step)
    assert raised(found) == []
    assert given(judged(0.3, accuracy=0.0)) == given(judged(0.3, accuracy=1.0)) == []


def test_the_pair_of_teachers_that_conflicts_most_decides() -> None:
    pairs = {"teacher/a|b/cosine": 0.5, "teacher/b|c/cosine": -0.5, "teacher/a|b/kl": -3.0}
    (alarm,) = raised(history([pairs] * 2))
    assert (alarm.name, alarm.value) == ("conflicting_teachers", -0.5)


def test_the_golden_set_that_falls_most_decides_and_a_recovery_ends_the_alarm() -> None:
    before, fallen = {"sort": 0.6, "add": 0.9}, {"sort": 0.3, "add": 0.0}
    steps = [
        {f"golden/{name}/accuracy": share for name, share in shares.items()}
        for shares in (before, fallen, before)
    ]
    (alarm,) = raised(history(steps[:2]))
    pooled = 0.45
    error = math.sqrt(pooled * (1 - pooled) * 2 / 100)
    assert alarm.value == pytest.approx(-0.9 + 3 * error)
    assert raised(history(steps)) == []
    # nothing was solved before, so nothing can be lost
    assert given(golden(0.0, 0.0)) == []


def test_what_is_not_finite_or_not_read_is_not_kept() -> None:
    kept = History()
    kept.add({"rollout/length": Stat(math.inf, 1.0), "monitor/repeated": Stat(0.0, 0.0)})
    kept.add({"loss/dense": Stat(1.0, 1.0)})
    assert kept == History()


def test_a_history_is_as_long_as_its_rules_need_and_goes_through_json() -> None:
    steps = [{"rollout/length": float(length)} for length in range(100)]
    kept = history(steps)
    assert [total for total, _ in kept.first["rollout/length"]] == [0, 100, 200, 300, 400]
    assert [total for total, _ in kept.last["rollout/length"]] == [9500, 9600, 9700, 9800, 9900]
    again = History(**json.loads(json.dumps(vars(kept))))
    assert again == kept
    for each in (kept, again):
        each.add({"rollout/length": Stat(1.0, 1.0)})
    assert again == kept


def test_steps_count_by_their_rows() -> None:
    found = History()
    for total, count in ((0.0, 90.0), *[(2.5, 2.5)] * 4):
        found.add({"monitor/kl_from_samples": Stat(total, count)})
    assert found.now("monitor/kl_from_samples") == 0.1


# --------------------------------------------------------------------------------------------
# What is listed


def test_every_rule_has_a_threshold_a_case_and_its_sections() -> None:
    listed = catalog.alarms()
    assert sorted(listed) == sorted(alarms.__all__) == sorted(CASES)
    for alarm in listed.values():
        assert alarm.says.endswith(".")
        assert alarm.side in ("above", "below")
        for part in (alarm.mechanism, alarm.rule, alarm.origin, alarm.action, alarm.source):
            assert part, alarm.name
        assert "2606.22793" in alarm.source


def test_every_metric_that_a_rule_reads_is_kept() -> None:
    read = {metric for alarm in catalog.alarms().values() for metric in alarm.reads}
    assert read == set(READS)


def test_what_to_do_names_keys_formulas_and_commands_that_exist() -> None:
    formulas = {name.partition(".")[2] for name in catalog.formulas()}
    terms = {key for term in TERMS.values() for key in term.__dataclass_fields__}
    known = {*dotted_keys(), *formulas, *terms}
    for alarm in catalog.alarms().values():
        for words in re.findall("`([^`]+)`", alarm.action):
            first, *more = words.split()
            exists = more[0] in COMMANDS if first == "opd" else first in known
            assert exists, f"{alarm.name}: {words}"


def test_no_threshold_is_said_to_be_measured_without_a_file_that_holds_it() -> None:
    for _, _, origin in THRESHOLDS.values():
        assert (
            origin.startswith(("preliminary", "by its meaning")) or "benchmarks/results/" in origin
        )


def test_the_page_is_up_to_date() -> None:
    make = module_from("make_alarms_page", ROOT / "docs/make_alarms_page.py")
    page = (ROOT / "docs/alarms.md").read_text(encoding="utf-8")
    assert page == make.page(), "python docs/make_alarms_page.py"
