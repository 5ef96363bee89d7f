"""Teachers of a run file at a url: which client, which reply, which errors."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest

import opd
from opd import methods
from opd.data.settings import PromptSettings
from opd.errors import ConfigError, TeacherError
from opd.formula import divergence, support
from opd.models import load_model
from opd.objective import Dense, Method
from opd.teacher.context import ContextEncoder
from opd.teacher.query import Described, Limits
from opd.teacher.remote import RemoteTeacher
from opd.teacher.sglang_endpoint import SglangEndpoint
from opd.teacher.vllm_endpoint import VllmEndpoint
from opd.training.check import examine
from opd.training.config import TeacherConfig, from_tree, load
from opd.training.plan import AskedEntries, make_plan
from opd.training.remotes import (
    check_described,
    entries_of,
    longest_read,
    open_endpoint,
    trial_texts,
)
from opd.types import Prompt, SamplerSettings, TeacherView
from tests.models_zoo import tiny
from tests.teacher.served import SETTINGS, serving
from tests.teacher.test_remote import Narrow, custom


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    with serving(load_model("builtin:sort-teacher")) as found:
        yield found


@pytest.mark.parametrize(
    ("protocol", "said"),
    [("opd", "opd serve at"), ("vllm", "vllm at"), ("sglang", "sglang at"), ("hosted", "hosted")],
)
def test_every_protocol_has_its_client(protocol: Any, said: str) -> None:
    endpoint = open_endpoint("math", TeacherConfig(url="http://127.0.0.1:9", protocol=protocol))
    assert said in endpoint.name
    assert "'math'" in endpoint.name
    endpoint.close()


def test_vllm_has_two_routes() -> None:
    config = TeacherConfig(url="http://127.0.0.1:9", protocol="vllm-generate")
    generate = open_endpoint("t", config)
    completions = open_endpoint("t", replace(config, protocol="vllm"))
    assert isinstance(generate, VllmEndpoint)
    assert "ids" in generate.limits.wanted
    assert "ids" not in completions.limits.wanted
    assert isinstance(open_endpoint("t", replace(config, protocol="sglang")), SglangEndpoint)


def test_a_key_that_is_not_set_is_an_early_error(monkeypatch: pytest.MonkeyPatch) -> None:
    config = TeacherConfig(url="http://127.0.0.1:9", key_env="OPD_TEST_KEY")
    monkeypatch.delenv("OPD_TEST_KEY", raising=False)
    with pytest.raises(ConfigError, match=r"t.key_env = 'OPD_TEST_KEY'.*is not set"):
        open_endpoint("t", config)
    monkeypatch.setenv("OPD_TEST_KEY", "secret")
    endpoint: Any = open_endpoint("t", config)
    assert endpoint.connection.settings.key == "secret"
    assert "secret" not in repr(endpoint.connection.settings)


@pytest.mark.parametrize(
    ("table", "said"),
    [
        ({"model": "a", "url": "http://b"}, r"teacher.model = 'a' and teacher.url = 'http://b'"),
        ({"url": "b:8000"}, "must begin with http:// or https://"),
        (
            {"model": "a", "local_copy": "c"},
            "teacher.local_copy = 'c' is about a teacher at a url, and this one has none",
        ),
    ],
)
def test_tables_that_contradict_themselves(table: dict[str, str], said: str) -> None:
    tree = {"student": {"model": "s"}, "data": {"prompts": "p"}, "teacher": table}
    with pytest.raises(ConfigError, match=said):
        from_tree(tree)


def test_on_the_command_line_a_url_stands_for_the_model() -> None:
    config = load(None, ["--teacher.url", "http://127.0.0.1:9"]).config
    assert (config.teacher.model, config.teacher.url) == ("", "http://127.0.0.1:9")
    with pytest.raises(ConfigError, match="loaded here or asked there"):
        load(None, ["--teacher.url", "http://a", "--teacher.model", "b"])


def test_a_described_teacher_has_the_student_s_tokens() -> None:
    student = tiny("llama")
    assert check_described(student, Described(), "it") == 53
    assert check_described(student, Described(vocab_size=40), "it") == 40
    with pytest.raises(ConfigError, match="it has another vocabulary than the student tiny-llama"):
        check_described(student, Described(vocabulary="0123"), "it")
    ends = Described(special={"eos": (2, 5)})
    with pytest.raises(ConfigError, match=r"it ends with the tokens \[2, 5\].*merge_stop_ids"):
        check_described(student, ends, "it")
    assert check_described(student, ends, "it", merge_stop_ids=True) == 53


# --------------------------------------------------------------------------------------------
# Which reply


class Wide(Narrow):
    """An endpoint that has everything, with hidden states of 64 numbers in bfloat16."""

    limits = Limits(frozenset({"sampled", "top", "ids", "logsumexp", "entropy", "hidden"}))

    def describe(self) -> Described:
        return Described(dtype="bfloat16", extra={"hidden_size": 64})


def reply(method: Any, endpoint: Any, how: str = "auto") -> AskedEntries | None:
    plan = make_plan(method, SamplerSettings())
    config = TeacherConfig(url="http://x", reply=how)  # type: ignore[arg-type]
    teacher = RemoteTeacher(endpoint, vocab_size=53)
    return entries_of(teacher, config, method.objective, plan.needs, "teacher")


def own_top(k: int) -> Method:
    return custom(
        Dense(
            support=partial(support.student_top_k, k=k),
            tail="bucket",
            divergence=divergence.reverse_kl,
        )
    )


def test_the_reply_with_fewer_bytes_is_taken() -> None:
    assert reply(own_top(30), Wide()) == AskedEntries(student_k=30)
    assert reply(own_top(40), Wide()) is None  # 164 bytes, and 128 of hidden states
    assert reply(own_top(40), Wide(), "entries") == AskedEntries(student_k=40)
    assert reply(own_top(4), Wide(), "hidden") is None
    assert reply(methods.top_k_opd(k=3), Narrow()) == AskedEntries(top_k=3)
    assert reply(methods.reverse_kl_opd(), Wide()) is None
    assert reply(methods.sampled_token_opd(), Narrow()) == AskedEntries()


def test_bytes_of_a_reply_are_those_of_its_numbers() -> None:
    assert AskedEntries().bytes_per_token == 4
    assert AskedEntries(top_k=64).bytes_per_token == 4 + 512
    assert AskedEntries(student_k=64, own_token=True, entropy=True).bytes_per_token == 4 + 264


@pytest.mark.parametrize(
    ("method", "said"),
    [
        (methods.reverse_kl_opd(), "the objective reads the whole vocabulary"),
        (own_top(4), "has no 'ids': it scores its own tokens alone"),
    ],
)
def test_what_a_protocol_cannot_answer_is_known_before_the_run(method: Any, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        reply(method, Narrow())


def test_two_prompts_make_two_texts() -> None:
    prompts = [Prompt("a", (3, 4), ""), Prompt("b", (5, 6, 7), ""), Prompt("c", (8,), "")]
    assert trial_texts(prompts) == [((3, 4), (5, 6, 7)), ((5, 6, 7), (3, 4))]


def test_the_longest_that_is_read_is_a_prompt_or_what_a_view_reads_in_its_place() -> None:
    loaded = load_model("builtin:sort-student")
    ids = [tuple(loaded.tokenizer.encode(text)) for text in ("S: 31", "S: 4123")]
    prompts = [Prompt("a", ids[0], "S: 31"), Prompt("b", ids[1], "S: 4123")]
    encoder = ContextEncoder(loaded.tokenizer, PromptSettings())
    plain, longest = TeacherView(), len(ids[1])
    told = TeacherView(context="{prompt}{prompt}")
    other = TeacherView("teacher.other", context="{prompt}{prompt}{prompt}{prompt}")
    own = TeacherView("reference", source="initial_student", context="{prompt}{prompt}{prompt}")

    def read(*views: TeacherView) -> int:
        return longest_read("teacher", views, prompts, encoder, max_new_tokens=10)

    twice = len(encoder.encode(prompts, told)[1])
    assert twice > longest
    assert read() == read(plain) == read(own) == read(other) == longest
    assert read(told) == read(other, own, told) == twice


# --------------------------------------------------------------------------------------------
# A run

QUICKLY = [
    *("--warmup.steps", "3", "--train.steps", "3", "--train.prompts_per_step", "8"),
    *("--evaluate.every", "0", "--evaluate.test_prompts", "4", "--evaluate.prompts", "4"),
    *("--threads", "1", "--train.learning_rate", "1e-3"),
]


def losses(folder: Path, *more: str) -> list[dict[str, float]]:
    """Of every step of the distillation."""
    run = opd.load(None, [*QUICKLY, "--output", str(folder), *more])
    found = [loss_of(report) for report in opd.train(run) if report.phase == "train"]
    found = [one for one in found if one]
    assert len(found) == 3
    return found


def loss_of(report: Any) -> dict[str, float]:
    """By term; empty for a report of an evaluation."""
    if report.summary is not None:
        return {}
    return {n: stat.mean for n, stat in report.metrics.items() if n.startswith("loss/")}


@pytest.mark.parametrize(
    "words",
    [
        ["reverse_kl_opd"],
        pytest.param(
            ["reverse_kl_opd", "--teacher.client.tokens_per_request", "100"], marks=pytest.mark.slow
        ),
        pytest.param(["top_k_opd", "--method.options.k", "8"], marks=pytest.mark.slow),
        ["top_k_opd", "--method.options.k", "8", "--teacher.reply", "hidden"],
        pytest.param(
            ["forward_top_k_opd", "--method.options.k", "8", "--teacher.reply", "entries"],
            marks=pytest.mark.slow,
        ),
        ["sampled_token_opd"],
        pytest.param(["vopd", "--teacher.client.compress", "true"], marks=pytest.mark.slow),
    ],
    ids=lambda words: " ".join(words),
)
def test_a_run_with_a_served_teacher_has_the_losses_of_a_local_one(
    url: str, tmp_path: Path, words: list[str]
) -> None:
    own = [word for word in words if not word.startswith("--teacher")]
    if len(own) < len(words):
        own = words[: next(i for i, word in enumerate(words) if word.startswith("--teacher"))]
    local = losses(tmp_path / "local", "--method", *own)
    served = losses(tmp_path / "served", "--method", *words, "--teacher.url", url)
    for plain, told in zip(local, served, strict=True):
        assert told.keys() == plain.keys()
        for name, value in plain.items():
            assert told[name] == pytest.approx(value, rel=1e-6, abs=1e-6), name


def test_a_server_with_fewer_positions_than_the_run_needs_is_an_error_before_it_begins(
    tmp_path: Path,
) -> None:
    teacher = load_model("builtin:sort-teacher")
    teacher.model.config.max_position_embeddings = 20
    with serving(teacher) as url:
        words = [*QUICKLY, "--output", str(tmp_path), "--teacher.url", url]
        run = opd.load(None, [*words, "--sampler.max_new_tokens", "19"])
        said = "takes 20 tokens per sequence, .*lower sampler.max_new_tokens to"
        with pytest.raises(TeacherError, match=said):
            next(opd.train(run))
        errors = [one for one in examine(run, live=True).findings if one.level == "error"]
        assert [one.where for one in errors] == ["teacher.url"]
        assert re.search(said, errors[0].message)


def test_a_run_waits_for_its_server_and_ends_as_if_nothing_had_happened(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import threading

    from opd.teacher import connection
    from opd.teacher.server import Listening, ScoringServer

    monkeypatch.setattr(connection, "FIRST_WAIT_S", 0.05)
    teacher = load_model("builtin:sort-teacher")
    plain = losses(tmp_path / "plain")
    first = Listening(ScoringServer(teacher, SETTINGS))
    port = int(first.url.rpartition(":")[2])
    second: list[Listening] = []

    def restart() -> None:
        first.stop()
        second.append(Listening(ScoringServer(teacher, replace(SETTINGS, port=port))))

    run = opd.load(
        None, [*QUICKLY, "--output", str(tmp_path / "served"), "--teacher.url", first.url]
    )
    found: list[float] = []
    restarting: threading.Thread | None = None
    for report in opd.train(run):
        if report.phase == "train" and report.step == 1:
            restarting = threading.Thread(target=restart)
            restarting.start()
        if report.phase == "train":
            found += loss_of(report).values()
    assert restarting is not None
    restarting.join()
    second[0].stop()
    expected = [value for step in plain for value in step.values()]
    assert found[-3:] == pytest.approx(expected, rel=1e-6)


def test_a_server_that_went_away_stops_the_run_and_it_resumes_at_another_address(
    tmp_path: Path,
) -> None:
    teacher = load_model("builtin:sort-teacher")
    words = [*QUICKLY, "--output", str(tmp_path), "--name", "it", "--train.save_every", "1"]
    with serving(teacher) as url:
        run = opd.load(None, [*words, "--teacher.url", url, "--teacher.client.retry_s", "0.1"])
        reports = opd.train(run)
        for report in reports:
            if report.phase == "train" and report.step == 1:
                break
    with pytest.raises(TeacherError, match=r"teacher 'teacher' \(opd serve at .*--resume"):
        next(reports)
    with serving(teacher) as other:
        again = opd.load(tmp_path / "it", ["--teacher.url", other])
        resumed = [*opd.train(again, resume=tmp_path / "it")]
    assert resumed[-1].summary is not None
    assert resumed[-1].summary["exit_reason"] == "finished"
    plain = losses(tmp_path / "plain")
    final = [loss_of(report) for report in resumed if loss_of(report)][-1]
    assert list(final.values()) == pytest.approx(list(plain[-1].values()), rel=1e-6)
