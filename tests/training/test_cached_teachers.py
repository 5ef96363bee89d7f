"""Runs whose teachers' answers are kept on disk."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from opd.errors import ConfigError, TeacherError
from opd.models import load_model
from opd.teacher.identity import fingerprint
from opd.teacher.local import LocalTeacher
from opd.training.caches import Caches
from opd.training.check import check
from opd.training.config import CacheConfig, Run, from_tree
from opd.training.loop import train_run
from opd.training.session import open_session
from tests.teacher.served import serving
from tests.training.runs import tiny_run

SHORT: Mapping[str, Any] = {"train": {"steps": 2, "save_every": 2}, "evaluate": {"every": 0}}
SAMPLED: Mapping[str, Any] = {"method": {"name": "sampled_token_opd"}}


def cached(output: Path, *changes: Mapping[str, Any], **cache: Any) -> Run:
    table = {"folder": str(output / "scores"), "drift_share": 0.0, **cache}
    return tiny_run(output, SHORT, {"teacher": {"cache": table}}, *changes)


def trained(run: Run) -> tuple[Path, dict[str, torch.Tensor], list[Mapping[str, Any]]]:
    """The run's folder, its weights, and the metrics of its steps."""
    last = list(train_run(run))[-1]
    events = [json.loads(line) for line in (last.folder / "events.jsonl").read_text().splitlines()]
    steps = [
        event["metrics"] for event in events if "optimizer/grad_norm" in event.get("metrics", {})
    ]
    return last.folder, load_file(last.folder / "model" / "model.safetensors"), steps


def same(one: Mapping[str, torch.Tensor], other: Mapping[str, torch.Tensor]) -> bool:
    return all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("method", [{}, SAMPLED], ids=["hidden", "sampled"])
def test_a_repeated_run_asks_nobody_and_learns_the_same(
    tmp_path: Path, method: Mapping[str, Any]
) -> None:
    plain = trained(tiny_run(tmp_path / "plain", SHORT, method))[1]
    first = trained(cached(tmp_path, method, {"name": "first"}))
    again = trained(cached(tmp_path, method, {"name": "again"}))
    absent = {"teacher": {"model": "no/such/model"}, "name": "absent"}
    alone = trained(cached(tmp_path, method, absent, offline=True))
    for weights in (first[1], again[1], alone[1]):
        assert same(plain, weights)
    shares = [[step["cache/hits"] for step in steps] for _, _, steps in (first, again, alone)]
    assert [[hits for hits, _ in steps] for steps in shares] == [[0] * 2, [4] * 2, [4] * 2]
    assert {asked for steps in shares for _, asked in steps} == {4}


def test_what_is_not_there_stops_a_run_that_is_offline(tmp_path: Path) -> None:
    trained(cached(tmp_path, {"name": "first"}))
    other_seed = cached(tmp_path, {"name": "other", "seed": 5}, offline=True)
    with pytest.raises(
        TeacherError, match=r"no answer of revision '\w+\.53' for \d of 4 sequences"
    ):
        list(train_run(other_seed))


def test_offline_without_a_single_answer_is_found_before_the_run(tmp_path: Path) -> None:
    run = cached(tmp_path, offline=True)
    assert any("teacher.cache" in str(one) and "no folder" in str(one) for one in check(run))
    assert not (tmp_path / "scores").exists()
    (tmp_path / "scores").mkdir()
    with pytest.raises(ConfigError, match=r"answers of 0 revisions \(none\)"):
        open_session(run)


def test_of_several_revisions_one_is_named(tmp_path: Path) -> None:
    trained(cached(tmp_path, {"name": "one"}))
    trained(cached(tmp_path, {"name": "two", "teacher": {"model": "builtin:sort-teacher"}}))
    with pytest.raises(ConfigError, match=r"answers of 2 revisions .*; name one") as caught:
        open_session(cached(tmp_path, offline=True))
    with pytest.raises(ConfigError, match="none of 'three'"):
        open_session(cached(tmp_path, offline=True, revision="three"))
    known = fingerprint(load_model("builtin:sort-teacher-init", device="cpu").model)
    assert f"{known}.53" in str(caught.value)
    found = cached(tmp_path, {"name": "found"}, offline=True, revision=f"{known}.53")
    assert [step["cache/hits"][0] for step in trained(found)[2]] == [4] * 2
    with pytest.raises(ConfigError, match="its weights are known as"):
        open_session(cached(tmp_path, revision="mine"))


def test_a_resumed_run_is_served_by_the_same_weights(tmp_path: Path) -> None:
    def run(url: str) -> Run:
        return tiny_run(tmp_path, {"teacher": {"model": "", "url": url}})

    one, other = (
        load_model(f"builtin:sort-{name}", dtype="float32", device="cpu")
        for name in ("teacher-init", "teacher")
    )
    with serving(one) as url:
        steps = train_run(run(url))
        folder = [next(steps) for _ in range(3)][-1].folder
        steps.close()
    with serving(other) as url, pytest.raises(ConfigError, match="its server now has"):
        list(train_run(run(url), resume=folder))
    with serving(one) as url:
        assert list(train_run(run(url), resume=folder))[-1].summary is not None


@pytest.mark.parametrize("reply", ["hidden", "entries"])
def test_a_served_teacher_is_asked_once(tmp_path: Path, reply: str) -> None:
    method = {
        "method": {
            "name": "custom",
            "objective": {
                "terms": [
                    {
                        "kind": "dense",
                        "divergence": "reverse_kl",
                        "support": {"use": "student_top_k", "k": 4},
                        "tail": "bucket",
                    }
                ]
            },
        }
    }
    with serving(load_model("builtin:sort-teacher-init", dtype="float32", device="cpu")) as url:
        there = {"teacher": {"model": "", "url": url, "reply": reply}}
        first = trained(cached(tmp_path, method, there, {"name": "first"}))
    gone = {"teacher": {"model": "", "url": "http://127.0.0.1:9", "reply": reply}}
    alone = trained(cached(tmp_path, method, gone, {"name": "alone"}, offline=True))
    assert same(first[1], alone[1])
    assert [step["cache/hits"][0] for step in alone[2]] == [4] * 2


def test_routed_teachers_have_a_cache_each(tmp_path: Path) -> None:
    def run(name: str, **cache: Any) -> Run:
        tables = {
            task: {
                "model": f"builtin:{task}-teacher",
                "cache": {"folder": str(tmp_path / "scores"), "drift_share": 0.0, **cache},
            }
            for task in ("add", "sort")
        }
        routes = {"teacher": {"model": "", "route": "task", "conflict_every": 2}}
        return tiny_run(
            tmp_path,
            SHORT,
            routes,
            {"teachers": tables, "data": {"prompts": "task:add+sort"}, "name": name},
        )

    first, again = trained(run("first")), trained(run("again"))
    assert same(first[1], again[1])
    for task in ("add", "sort"):
        shares = [step[f"teacher/{task}/cache/hits"] for step in again[2]]
        assert all(hits == asked > 0 for hits, asked in shares)


def in_hand(name: str) -> LocalTeacher:
    loaded = load_model(f"builtin:sort-{name}", dtype="float32", device="cpu")
    loaded.model.requires_grad_(False)
    return Unknown(loaded, vocab_size=53)


class Unknown(LocalTeacher):
    """A teacher of which nothing tells the weights."""


def test_a_teacher_that_changed_under_its_name_stops_the_run(tmp_path: Path) -> None:
    def run(name: str, teacher: LocalTeacher) -> None:
        own = cached(tmp_path, {"name": name}, revision="mine", drift_share=1.0)
        list(train_run(own, session=open_session(own, teacher=teacher)))

    run("first", in_hand("teacher-init"))
    with pytest.raises(TeacherError, match="no longer says what it said"):
        run("other", in_hand("teacher"))


def test_two_teachers_of_one_name_are_told_apart(tmp_path: Path) -> None:
    caches, table = Caches(tmp_path), CacheConfig(folder="scores", revision="x")
    caches.wrap("teachers.a", in_hand("teacher"), table, "", 53)
    with pytest.raises(ConfigError, match=r"teachers\.a and teachers\.b keep their answers"):
        caches.wrap("teachers.b", in_hand("teacher-init"), table, "", 53)
    with pytest.raises(ConfigError, match="does not say which weights it has"):
        caches.wrap("teachers.c", in_hand("teacher"), CacheConfig(folder="scores"), "", 53)


@pytest.mark.parametrize("keep", ["host", "disk"])
def test_a_teacher_that_takes_turns_is_cached_under_its_weights(tmp_path: Path, keep: str) -> None:
    trained(cached(tmp_path, {"name": "first"}))
    _, _, steps = trained(cached(tmp_path, {"name": "turns", "teacher": {"keep": keep}}))
    assert [step["cache/hits"][0] for step in steps] == [4] * 2


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"teacher": {"url": "http://x:1", "keep": "disk"}}, "teacher.keep = 'disk' is about a"),
        ({"teacher": {"model": "x", "reply": "entries"}}, "teacher.reply = 'entries' is about a"),
        ({"teacher": {"cache": {"offline": True}}}, r"\[teacher.cache\] names no folder"),
        (
            {
                "teacher": {"cache": {"folder": "s", "max_bytes": 10}},
                "teachers": {"x": {"model": "y", "cache": {"folder": "s"}}},
            },
            "a folder has one bound",
        ),
        (
            {
                "teacher": {"route": "task", "cache": {"folder": "s"}},
                "teachers": {"x": {"model": "y"}},
            },
            r"give each of them a \[teachers.NAME.cache\]",
        ),
    ],
)
def test_tables_that_say_nothing_are_refused(change: Mapping[str, Any], words: str) -> None:
    tree = {"student": {"model": "x"}, "data": {"prompts": "y"}, **change}
    with pytest.raises(ConfigError, match=words):
        from_tree(tree)


def test_end_tokens_of_an_absent_teacher_are_not_known(tmp_path: Path) -> None:
    trained(cached(tmp_path, {"name": "first"}))
    merged = {"method": {"merge_stop_ids": True}}
    with pytest.raises(ConfigError, match="end tokens of teacher are not known"):
        open_session(cached(tmp_path, merged, offline=True))
