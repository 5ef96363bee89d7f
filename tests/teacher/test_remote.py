"""A served teacher in a run: the same numbers as a local one, whatever is asked of it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch

from opd import methods
from opd.errors import TeacherError
from opd.formula import divergence, reward, support, weight
from opd.models import LoadedModel
from opd.objective import Dense, Method, Objective, Sampled
from opd.rollout.local import LocalSampler
from opd.rollout.pack import pack_rollout
from opd.student import Student
from opd.teacher.local import LocalTeacher
from opd.teacher.opd_endpoint import described
from opd.teacher.query import WANTED, Answer, Described, Limits, Query, check_answer
from opd.teacher.remote import RemoteSettings, RemoteTeacher
from opd.teacher.server import ScoringServer, listening
from opd.training import step as steps
from opd.training.plan import asked_entries, make_plan
from opd.types import (
    Batch,
    Need,
    Prompt,
    SamplerSettings,
    Teacher,
    TeacherRequest,
    Unembedding,
)
from tests.models_zoo import EOS, PAD, tiny
from tests.teacher.served import SETTINGS, endpoint, serving

PROMPTS = [Prompt(str(i), tuple(range(3, 6 + i // 2)), "") for i in range(6)]
V = 53


@pytest.fixture(scope="module")
def teacher() -> LoadedModel:
    return tiny("qwen3", seed=1)


@pytest.fixture(scope="module")
def url(teacher: LoadedModel) -> Iterator[str]:
    with serving(teacher) as found:
        yield found


@pytest.fixture
def remote(url: str) -> Iterator[RemoteTeacher]:
    with endpoint(url) as client:
        settings = RemoteSettings(tokens_per_request=30, concurrency=3)
        yield RemoteTeacher(client, vocab_size=V, settings=settings)


def batch(student: LoadedModel, merge_ids: Any = (), top_k: int = 8) -> Batch:
    settings = SamplerSettings(max_new_tokens=9, samples_per_prompt=2, student_top_k=top_k)
    sampler = LocalSampler(student)
    rollout = sampler.sample(PROMPTS, settings, generator=torch.Generator().manual_seed(0))
    mask = rollout.mask.clone()
    mask[::3, 1] = False  # a tool's token
    rollout = replace(rollout, mask=mask)
    return pack_rollout(rollout, pad_id=PAD, merge_ids=merge_ids)


def asked_in_every_way(packed: Batch, ids: torch.Tensor) -> list[TeacherRequest]:
    base = TeacherRequest(batch=packed, distribution=False)
    return [
        replace(base, sampled=True),
        replace(base, top_k=5),
        replace(base, ids=ids),
        replace(base, sampled=True, top_k=3, ids=ids, entropy=True, temperature=0.6),
        replace(base, distribution=True),
    ]


@pytest.mark.parametrize("groups", [(), ((EOS, 7, 8),)])
def test_a_served_reply_is_the_local_one_row_by_row(
    teacher: LoadedModel, remote: RemoteTeacher, groups: Any
) -> None:
    packed = batch(tiny("llama"), merge_ids=groups)
    rows = len(packed.row_index)
    ids = torch.randint(9, V, (rows, 4), generator=torch.Generator().manual_seed(1))
    local = LocalTeacher(teacher, vocab_size=V)
    for request in asked_in_every_way(packed, ids):
        told, plain = remote.score(request), local.score(request)
        for name in ("sampled_logp", "top_ids", "top_logp", "ids", "ids_logp", "entropy", "hidden"):
            got, expected = getattr(told, name), getattr(plain, name)
            assert (got is None) == (expected is None), name
            if expected is not None:
                torch.testing.assert_close(got, expected, rtol=1e-5, atol=2e-5)
        assert (told.unembedding is None) == (not request.distribution)


def loss_and_gradient(
    method: Method, scorer: Teacher, entries: bool, groups: Any = ()
) -> tuple[float, torch.Tensor]:
    """Of one update on a fixed batch."""
    loaded = tiny("llama", seed=2)
    student = Student(loaded, vocab_size=V)
    plan = make_plan(method, SamplerSettings(max_new_tokens=9), merge_ids=groups)
    objective = method.objective
    packed = batch(loaded, groups, top_k=objective.support_size("student_top_ids") or 1)
    rollout = LocalSampler(loaded).sample(
        PROMPTS,
        SamplerSettings(
            max_new_tokens=9,
            samples_per_prompt=2,
            student_top_k=objective.support_size("student_top_ids"),
        ),
        generator=torch.Generator().manual_seed(0),
    )
    packed = pack_rollout(rollout, pad_id=PAD, merge_ids=groups)
    packed = steps.observe(student, packed, rollout, objective, plan, 64)
    asked = asked_entries(objective, plan.needs, "teacher") if entries else None
    assert (asked is not None) == entries
    packed = steps.score(
        {"teacher": scorer}, packed, objective, plan, entries={"teacher": asked} if asked else {}
    )
    packed = steps.signal(student, packed, objective, plan, 64, fresh=True)
    stats = steps.update(student, packed, objective, 64, step=1)
    loss = sum(stat.total for name, stat in stats.items() if name.startswith("loss"))
    gradient = [p.grad.flatten() for p in student.trainable().values() if p.grad is not None]
    return loss, torch.cat(gradient)


def custom(term: Dense | Sampled) -> Method:
    return replace(methods.reverse_kl_opd(), objective=Objective(term))


BY_ENTRIES = {
    "sampled": methods.sampled_token_opd,
    "student top-k": lambda: methods.top_k_opd(k=6),
    "teacher top-k": lambda: methods.forward_top_k_opd(k=6),
    "both": lambda: custom(
        Dense(
            support=partial(support.union, teacher_k=4, student_k=5),
            tail="bucket",
            divergence=divergence.reverse_kl,
        )
    ),
    "own token": lambda: custom(
        Dense(support=support.sampled, tail="bucket", divergence=divergence.forward_kl)
    ),
    "entropy": lambda: custom(
        Sampled(
            reward=reward.teacher_log_ratio,
            weights=(partial(weight.teacher_entropy_above, nats=0.5),),
        )
    ),
}


@pytest.mark.parametrize("groups", [(), ((EOS, 7, 8),)], ids=["plain", "merged"])
@pytest.mark.parametrize("name", BY_ENTRIES)
def test_entries_alone_give_the_loss_and_the_gradient_of_the_whole_distribution(
    teacher: LoadedModel, remote: RemoteTeacher, name: str, groups: Any
) -> None:
    method = BY_ENTRIES[name]()
    local = LocalTeacher(teacher, vocab_size=V)
    loss, gradient = loss_and_gradient(method, local, entries=False, groups=groups)
    served, same = loss_and_gradient(method, remote, entries=True, groups=groups)
    assert served == pytest.approx(loss, rel=1e-5, abs=1e-6)
    torch.testing.assert_close(same, gradient, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("make", [methods.reverse_kl_opd, methods.jsd_opd, methods.vopd])
def test_hidden_states_give_the_loss_and_the_gradient_of_a_local_teacher(
    teacher: LoadedModel, remote: RemoteTeacher, make: Any
) -> None:
    local = LocalTeacher(teacher, vocab_size=V)
    loss, gradient = loss_and_gradient(make(), local, entries=False)
    served, same = loss_and_gradient(make(), remote, entries=False)
    assert served == pytest.approx(loss, rel=1e-6, abs=1e-7)
    torch.testing.assert_close(same, gradient, rtol=1e-4, atol=1e-7)


# --------------------------------------------------------------------------------------------
# Protocols with less in them


class Narrow:
    """An endpoint of a protocol that lacks nearly everything."""

    name = "teacher 'math' (narrow at http://there)"
    limits = Limits(
        frozenset({"sampled", "top"}),
        top_k=3,
        temperature=False,
        merge_ids=False,
        why_not={"ids": "it scores its own tokens alone"},
    )

    def describe(self) -> Described:
        return Described()

    def score(self, query: Query) -> list[Answer]:
        raise AssertionError("asked")

    def head(self) -> Unembedding | None:
        return None

    def close(self) -> None: ...


def test_what_a_protocol_lacks_is_said_before_anything_is_asked() -> None:
    packed = batch(tiny("llama"))
    narrow = RemoteTeacher(Narrow(), vocab_size=V)
    base = TeacherRequest(batch=packed, distribution=False, sampled=True)
    ids = torch.zeros((len(packed.row_index), 1), dtype=torch.long)
    for request, said in (
        (replace(base, distribution=True), "cannot give 'hidden'"),
        (replace(base, ids=ids), "cannot give 'ids': it scores its own tokens alone"),
        (replace(base, entropy=True), "cannot give 'entropy'"),
        (replace(base, temperature=0.5), "scores at temperature 1 alone, and 0.5"),
        (replace(base, top_k=4), "at most 3 of its likeliest tokens, and 4"),
        (replace(base, batch=replace(packed, merge_ids=((2, 3),))), r"\(2, 3\) as one"),
        (replace(base, batch=replace(packed, model_inputs={"image": 1})), "has image"),
    ):
        with pytest.raises(TeacherError, match=said):
            narrow.score(request)
    assert narrow.can(Need("teacher", "logp", "sampled"))
    assert narrow.can(Need("teacher", "log_probs", "teacher_top_k", 3))
    assert not narrow.can(Need("teacher", "log_probs", "full"))
    assert not narrow.can(Need("teacher", "teacher_entropy", "full"))


def test_sequences_keep_their_order_over_many_requests(
    teacher: LoadedModel, url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    packed = batch(tiny("llama"))
    request = TeacherRequest(batch=packed, distribution=False, sampled=True)
    with endpoint(url) as client:
        whole = RemoteTeacher(client, vocab_size=V).score(request).sampled_logp
        seen: list[int] = []
        score = client.score

        def counted(query: Query) -> list[Answer]:
            seen.append(len(query.sequences))
            found = score(query)
            for asked, answer in zip(query.sequences, found, strict=True):
                check_answer(asked, query, answer.values, vocab_size=V)
            return found

        monkeypatch.setattr(client, "score", counted)
        for tokens in (1, 20, 45):
            settings = RemoteSettings(tokens_per_request=tokens, concurrency=5)
            cut = RemoteTeacher(client, vocab_size=V, settings=settings).score(request)
            assert whole is not None
            assert cut.sampled_logp is not None
            torch.testing.assert_close(cut.sampled_logp, whole, rtol=1e-5, atol=1e-5)
    assert sum(seen) == 3 * 12
    assert seen[:12] == [1] * 12


# --------------------------------------------------------------------------------------------
# What a server takes


class Counting:
    """Stands before an endpoint and keeps the queries that are sent."""

    def __init__(self, inner: Any) -> None:
        self.inner = inner
        self.queries: list[Query] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)

    def score(self, query: Query) -> list[Answer]:
        self.queries.append(query)
        found: list[Answer] = self.inner.score(query)
        return found


@contextmanager
def limited(teacher: LoadedModel, **limits: int) -> Iterator[Counting]:
    """An endpoint of a server that takes little, and a RemoteTeacher has not asked yet."""
    server = ScoringServer(teacher, replace(SETTINGS, max_body_bytes=limits.pop("body", 2**28)))
    server.limits = replace(server.limits, **limits)
    with listening(server) as found, endpoint(found.url) as client:
        yield Counting(client)


@pytest.mark.parametrize(
    ("limits", "requests"),
    [
        ({"max_sequences": 5}, 3),  # 12 sequences
        ({"max_query_tokens": 20}, 12),  # each has 12 to 14 tokens
        # 4 x (prompt + 3) + 5 x 9 bytes each, 69 to 77: three are at most 231, four at least 276
        ({"body": 2**16 + 2**10 + 250}, 4),
        ({}, 1),
    ],
)
def test_requests_are_cut_by_what_the_server_takes(
    teacher: LoadedModel, limits: dict[str, int], requests: int
) -> None:
    packed = batch(tiny("llama"))
    request = TeacherRequest(batch=packed, distribution=False, sampled=True)
    plain = LocalTeacher(teacher, vocab_size=V).score(request).sampled_logp
    with limited(teacher, **limits) as counting:
        told = RemoteTeacher(counting, vocab_size=V).score(request).sampled_logp
    assert plain is not None
    torch.testing.assert_close(told, plain, rtol=1e-5, atol=2e-5)
    assert len(counting.queries) == requests


@pytest.mark.parametrize(
    ("limits", "ask", "said"),
    [
        (
            {"max_tokens": 12},
            {"sampled": True},
            r"takes 12 tokens per sequence, and a prompt of 5 with a response of 9 has 14; "
            r"lower sampler.max_new_tokens to 7",
        ),
        (
            {"max_tokens": 4},
            {"sampled": True},
            r".*; shorten the prompts, and lower sampler.max_new",
        ),
        ({"max_top_k": 3}, {"top_k": 4}, "returns at most 3 of its likeliest tokens, and 4"),
        ({"max_ids": 2}, {"ids": 3}, "scores at most 2 ids per token, and 3 were asked for"),
    ],
)
def test_what_a_server_does_not_take_is_said_before_it_is_sent(
    teacher: LoadedModel, limits: dict[str, int], ask: dict[str, Any], said: str
) -> None:
    packed = batch(tiny("llama"))
    if "ids" in ask:
        ask = {"ids": torch.zeros((len(packed.row_index), ask["ids"]), dtype=torch.long)}
    request = replace(TeacherRequest(batch=packed, distribution=False), **ask)
    with limited(teacher, **limits) as counting:
        with pytest.raises(TeacherError, match=rf"teacher 'math' \(opd serve at .*\) {said}"):
            RemoteTeacher(counting, vocab_size=V).score(request)
        assert not counting.queries


def test_a_field_that_a_server_does_not_offer_is_not_asked_of_it(teacher: LoadedModel) -> None:
    with limited(teacher) as counting:
        told = dict(counting.describe().extra)
        assert counting.limits.wanted == set(WANTED)
        counting.inner._described = described({**told, "wanted": ["sampled", "top", "later"]})
        remote = RemoteTeacher(counting, vocab_size=V)
        assert not remote.can(Need("teacher", "log_probs", "full"))
        assert remote.can(Need("teacher", "logp", "sampled"))
        with pytest.raises(TeacherError, match="cannot give 'hidden': its /info leaves it out"):
            remote.score(TeacherRequest(batch=batch(tiny("llama"))))


# --------------------------------------------------------------------------------------------
# Responses that a loss does not look at


@pytest.mark.parametrize("which", ["one", "all"])
def test_a_response_without_open_rows_is_not_asked_about(
    teacher: LoadedModel, remote: RemoteTeacher, which: str
) -> None:
    student = tiny("llama")
    rollout = LocalSampler(student).sample(
        PROMPTS,
        SamplerSettings(max_new_tokens=9, samples_per_prompt=2, student_top_k=8),
        generator=torch.Generator().manual_seed(0),
    )
    mask = rollout.mask.clone()
    mask[1 if which == "one" else slice(None)] = False
    packed = pack_rollout(replace(rollout, mask=mask), pad_id=PAD)
    rows = len(packed.row_index)
    assert (rows > 0) == (which == "one")
    ids = torch.randint(9, V, (rows, 4), generator=torch.Generator().manual_seed(1))
    local = LocalTeacher(teacher, vocab_size=V)
    for request in asked_in_every_way(packed, ids):
        told = remote.score(request)
        # a local one needs rows; a served one's empty answers have the shapes of its full ones
        plain = local.score(request) if rows else None
        for name, width in (
            *(("sampled_logp", ()), ("entropy", ()), ("top_ids", (request.top_k,))),
            *(("top_logp", (request.top_k,)), ("ids_logp", (4,)), ("ids", (4,)), ("hidden", (32,))),
        ):
            got = getattr(told, name)
            if plain is not None:
                expected = getattr(plain, name)
                assert (got is None) == (expected is None), name
                if expected is not None:
                    torch.testing.assert_close(got, expected, rtol=1e-5, atol=2e-5)
            elif got is not None:
                assert tuple(got.shape) == (0, *width), name
                assert got.is_floating_point() == (name not in ("top_ids", "ids"))
        asks = {"sampled_logp": request.sampled, "hidden": request.distribution}
        assert all((getattr(told, name) is not None) == is_asked for name, is_asked in asks.items())
