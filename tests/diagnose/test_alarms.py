"""Alarms: each is given in a history that shows its failure, and silent just beside it."""

from __future__ import annotations

import json
import math
import random
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
MEASURED = "benchmarks/results/alarms.json"
HELPED = "benchmarks/results/failures.json"


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


def judged(auc: float) -> list[dict[str, float]]:
    return [{"monitor/align_auc": auc, "rollout/accuracy": 0.3}] * 5


def fading(end: float) -> list[dict[str, float]]:
    confidence = LOOK + "teacher_confidence/"
    return [{confidence + "first": 0.9, confidence + "last": end}] * 2


def golden(before: float, after: float) -> list[dict[str, float]]:
    return [{"golden/sort/accuracy": before}, {"golden/sort/accuracy": after}]


# by alarm a history that shows the failure, and one that nearly does
CASES: dict[str, tuple[list[dict[str, float]], list[dict[str, float]]]] = {
    "misaligned_events": (misaligned(5.0, 0.1), misaligned(4.8, 0.1)),
    "foreign_template": (
        steady(5, monitor__first_token=6.7, monitor__later_tokens=1.7),
        steady(5, monitor__first_token=6.5, monitor__later_tokens=1.7),
    ),
    "end_token_mismatch": (
        steady(5, monitor__end_tokens=8.2, monitor__other_tokens=2.4),
        steady(5, monitor__end_tokens=8.2, monitor__other_tokens=2.6),
    ),
    "teacher_out_of_domain": (
        [{LOOK + "top_k_overlap": 0.42}] * 2,
        [{LOOK + "top_k_overlap": 0.44}] * 2,
    ),
    "noise_teacher": ([{LOOK + "teacher_spread": 0.52}] * 2, [{LOOK + "teacher_spread": 0.50}] * 2),
    "privilege_leak": (
        steady(5, teacher__hint__copied=0.5) + steady(5, teacher__hint__copied=0.68),
        steady(5, teacher__hint__copied=0.5) + steady(5, teacher__hint__copied=0.66),
    ),
    "stale_sampler": (
        steady(5, monitor__kl_from_samples=0.32),
        steady(5, monitor__kl_from_samples=0.30),
    ),
    "length_collapse": (
        steady(5, rollout__length=100.0) + steady(5, rollout__length=25.0),
        steady(5, rollout__length=100.0) + steady(5, rollout__length=27.0),
    ),
    "length_inflation": (
        # 0.33 - 0.1 - 3 * sqrt(0.215 * 0.785 / 250) is 0.152
        steady(5, rollout__truncated=0.1) + steady(5, rollout__truncated=0.33),
        steady(5, rollout__truncated=0.1) + steady(5, rollout__truncated=0.31),
    ),
    "repetition": (
        steady(5, monitor__repeated=0.05) + steady(5, monitor__repeated=0.27),
        steady(5, monitor__repeated=0.05) + steady(5, monitor__repeated=0.25),
    ),
    "unroutable_suppression": (
        [{LOOK + "candidate_mass": 0.52}] * 2,
        [{LOOK + "candidate_mass": 0.54}] * 2,
    ),
    "conflicting_teachers": (
        [{"teacher/a|b/cosine": -0.01}] * 2,
        [{"teacher/a|b/cosine": 0.01}] * 2,
    ),
    # of 100 pairs among 100 responses a step a ranking by chance is off by 0.13
    "misranked_outcome": (judged(0.10), judged(0.12)),
    "entropy_collapse": (
        [{LOOK + "student_entropy": 0.66, LOOK + "teacher_entropy": 1.0}] * 2,
        [{LOOK + "student_entropy": 0.68, LOOK + "teacher_entropy": 1.0}] * 2,
    ),
    "gradient_concentration": (
        steady(5, monitor__top_share=0.55),
        steady(5, monitor__top_share=0.53),
    ),
    "late_fade": (fading(0.63), fading(0.65)),
    # 38 % is 0.22 less than 60 %, and three standard errors are 3 * sqrt(0.49 * 0.51 / 50)
    "golden_regression": (golden(0.6, 0.38), golden(0.6, 0.4)),
    "calibration_drift": (
        steady(5, monitor__calibration_error=0.1) + steady(5, monitor__calibration_error=0.38),
        steady(5, monitor__calibration_error=0.1) + steady(5, monitor__calibration_error=0.36),
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
    assert alarm.value == pytest.approx(0.25)
    assert alarm.threshold == 0.26
    assert raised(history(CASES["length_collapse"][0]), ["length_collapse"]) == []


def test_a_sure_teacher_is_not_misaligned_and_an_unsure_one_cannot_be() -> None:
    assert given(misaligned(0.0, 0.1)) == []
    assert "misaligned_events" not in given(misaligned(9.0, 0.51))


def ranked(**stats: Stat) -> list[str]:
    """The alarms of five steps with 20 verdicts each."""
    found = History()
    for _ in range(5):
        found.add({"rollout/accuracy": Stat(1.0, 20.0)})
        found.add({f"monitor/{name}": stat for name, stat in stats.items()})
    return [alarm.name for alarm in raised(found)]


def test_few_verdicts_are_no_ranking() -> None:
    """One of twenty is right: of 95 pairs 0.3 may be chance, as 0.3 + 3 * 0.136 is above a half."""
    assert ranked(align_auc=Stat(0.3 * 19, 19.0)) == []
    assert ranked(align_auc=Stat(0.05 * 19, 19.0)) == ["misranked_outcome"]
    assert ranked() == []


def test_of_prompts_with_several_responses_the_prompts_are_counted() -> None:
    """However many pairs there are: of 50 prompts a ranking by chance is off by 0.07 at most."""
    many = Stat(0.2 * 10_000, 10_000.0)
    assert ranked(align_auc=many, align_within=Stat(2.0, 10.0)) == ["misranked_outcome"]
    assert ranked(align_auc=many, align_within=Stat(3.0, 10.0)) == []
    assert ranked(align_auc=many, align_within=Stat(0.4, 2.0)) == []


def test_a_constant_share_of_long_responses_is_no_inflation() -> None:
    """Three of ten, two responses a step, two hundred steps: chance alone."""
    draw = random.Random(0)
    fired = 0
    for _ in range(50):
        found, given_once = History(), False
        for _ in range(200):
            cut = sum(draw.random() < 0.3 for _ in range(2))
            found.add({"rollout/truncated": Stat(float(cut), 2.0)})
            given_once |= bool(raised(found))
        fired += given_once
    assert fired <= 2


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


def test_measured_thresholds_are_halfway_between_healthy_runs_and_faults() -> None:
    result = json.loads((ROOT / MEASURED).read_text(encoding="utf-8"))
    rows = {row["case"].removeprefix("threshold of "): row for row in result["rows"]}
    for name, (side, threshold, origin) in THRESHOLDS.items():
        if origin.startswith("by its meaning"):
            continue
        assert MEASURED in origin, name
        row = rows[name]
        if name == "privilege_leak":  # no short healthy run has a hint
            helped = json.loads((ROOT / HELPED).read_text(encoding="utf-8"))["rows"]
            healthy = max(r["copied"] for r in helped if r["copied"] and r["system"] == "fixed")
            row |= {"healthy": healthy, "halfway": (healthy + row["faults"]) / 2}
        assert threshold == float(f"{row['halfway']:.2g}"), name
        ends = (row["healthy"], threshold, row["faults"])
        assert sorted(ends, reverse=side == "below") == list(ends), name


def test_other_seeds_and_strengths_are_told_apart() -> None:
    """The bars: 95 % of the planted faults named, 60 healthy runs of four kinds and no alarm."""
    result = json.loads((ROOT / MEASURED).read_text(encoding="utf-8"))
    others = [row for row in result["rows"] if row["case"].endswith(", others")]
    healthy = [row for row in others if row["recall"] is None]
    faults = [row for row in others if row["recall"] is not None]
    assert sum(row["runs"] for row in healthy) >= 60
    assert len(healthy) >= 4
    assert all(row["silent"] == row["runs"] for row in healthy)
    assert sum(row["named"] for row in faults) >= 0.95 * sum(row["runs"] for row in faults)


def test_the_page_is_up_to_date() -> None:
    make = module_from("make_alarms_page", ROOT / "docs/make_alarms_page.py")
    page = (ROOT / "docs/alarms.md").read_text(encoding="utf-8")
    assert page == make.page(), "python docs/make_alarms_page.py"
