"""The score cache: what was said once is said again to the bit, and nothing else is."""

from __future__ import annotations

import errno
import multiprocessing
import os
import random
import shutil
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

from opd import methods
from opd.errors import ConfigError, TeacherError, TrainingError
from opd.models import LoadedModel
from opd.objective import Method
from opd.rollout.pack import pack_rollout, select
from opd.student import Student
from opd.teacher import cache_folder, shard
from opd.teacher.cache import CachedTeacher, ScoreCache, answer_keys
from opd.teacher.local import LocalTeacher
from opd.teacher.routed import RoutedTeacher, Router
from opd.teacher.self_teacher import AverageTeacher
from opd.teacher.shard import DamagedError, Entry, Shard, write_shard
from opd.training import step as steps
from opd.training.plan import make_plan
from opd.types import (
    TEACHER_ROW_FIELDS,
    Batch,
    Prompt,
    SamplerSettings,
    Teacher,
    TeacherRequest,
    TeacherScores,
    Unembedding,
)
from tests.models_zoo import EOS, PAD, tiny
from tests.teacher.cache_writer import (
    Arithmetic,
    Told,
    V,
    asks,
    logp_of,
    numbers,
    packed,
    told,
    write_on,
)

CHILDREN = multiprocessing.get_context("forkserver")
CHILDREN.set_forkserver_preload(["tests.teacher.cache_writer"])


class Counting:
    """A teacher that remembers how many sequences each request had."""

    def __init__(self, teacher: Teacher) -> None:
        self.teacher = teacher
        self.can = teacher.can
        self.sequences: list[int] = []

    def score(self, request: TeacherRequest) -> TeacherScores:
        self.sequences.append(request.batch.input_ids.shape[0])
        return self.teacher.score(request)


def frozen(seed: int = 1, family: str = "qwen3", **how: Any) -> LoadedModel:
    loaded = tiny(family, seed=seed, **how)
    loaded.model.requires_grad_(False)
    return loaded


@pytest.fixture(scope="module")
def local() -> LocalTeacher:
    return LocalTeacher(frozen(), vocab_size=V)


def cached(teacher: Teacher | None, folder: Path, **how: Any) -> CachedTeacher:
    """Around a cache with small shards; nothing is asked twice unless a test says so."""
    known = {name: how.pop(name) for name in ("max_bytes", "shard_bytes") if name in how}
    settings: dict[str, Any] = {"revision": "r1", "drift_share": 0.0, **how}
    return CachedTeacher(teacher, ScoreCache(folder, **known), **settings)


def same(one: TeacherScores, other: TeacherScores) -> None:
    """To the bit, dtypes included."""
    for name in TEACHER_ROW_FIELDS:
        got, expected = getattr(one, name), getattr(other, name)
        assert (got is None) == (expected is None), name
        if expected is not None:
            assert got.dtype == expected.dtype, name
            assert torch.equal(got, expected), name
    assert (one.unembedding is None) == (other.unembedding is None)
    if one.unembedding is not None and other.unembedding is not None:
        same_head(one.unembedding, other.unembedding)


def same_head(one: Unembedding, other: Unembedding) -> None:
    assert (one.vocab_size, one.logit_scale, one.soft_cap) == (
        other.vocab_size,
        other.logit_scale,
        other.soft_cap,
    )
    assert torch.equal(one.weight[: one.vocab_size], other.weight[: other.vocab_size])
    assert (one.bias is None) == (other.bias is None)
    if one.bias is not None and other.bias is not None:
        assert torch.equal(one.bias[: one.vocab_size], other.bias[: other.vocab_size])


def every_request(batch: Batch) -> list[TeacherRequest]:
    rows = len(batch.row_index)
    ids = torch.randint(9, V, (rows, 4), generator=torch.Generator().manual_seed(1))
    base = TeacherRequest(batch=batch, distribution=False)
    return [
        replace(base, sampled=True),
        replace(base, top_k=5),
        replace(base, ids=ids),
        replace(base, entropy=True),
        replace(base, sampled=True, top_k=3, ids=ids, entropy=True, temperature=0.6),
        replace(base, distribution=True),
    ]


def of_sequences(request: TeacherRequest, chosen: Sequence[int]) -> tuple[TeacherRequest, Any]:
    """The same question about some of the sequences, and which rows these are."""
    part = select(request.batch, chosen)
    ids = None if request.ids is None else request.ids[part.rows]
    return replace(request, batch=part.batch, ids=ids), part.rows


SEQUENCES = [told(n) for n in range(12)]


# --------------------------------------------------------------------------------------------
# The same answers


@pytest.mark.parametrize("groups", [(), ((EOS, 7, 8),)], ids=["plain", "merged"])
def test_first_answers_and_kept_ones_are_the_teachers_own(
    local: LocalTeacher, tmp_path: Path, groups: Any
) -> None:
    counting = Counting(local)
    teacher = cached(counting, tmp_path)
    for asked, request in enumerate(every_request(packed(SEQUENCES, groups)), 1):
        plain = local.score(request)
        for _ in range(2):
            same(teacher.score(request), plain)
            assert len(counting.sequences) == asked
        teacher.flush()
        same(cached(None, tmp_path).score(request), plain)
        assert teacher.score(request).provenance == plain.provenance


@pytest.mark.parametrize("family", ["gemma2", "phi", "cohere"])
def test_an_unembedding_comes_back_with_its_bias_scale_and_cap(tmp_path: Path, family: str) -> None:
    loaded = frozen(family=family, padded_to=64)
    plain = LocalTeacher(loaded, vocab_size=V)
    request = TeacherRequest(batch=packed(SEQUENCES[:3]))
    teacher = cached(plain, tmp_path)
    teacher.score(request)
    teacher.close()
    same(cached(None, tmp_path).score(request), plain.score(request))
    (head,) = tmp_path.glob("head-*")
    assert head.name == "head-r1.safetensors"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_batches_cut_and_mixed_otherwise_get_what_was_said(
    tmp_path: Path, dtype: torch.dtype
) -> None:
    plain = Arithmetic(dtype=dtype)
    teacher = cached(plain, tmp_path, shard_bytes=600)
    everything = every_request(packed(SEQUENCES + [told(n) for n in range(30, 40)]))
    draw = random.Random(0)
    for request in everything:
        known: set[int] = set()
        for _ in range(12):
            chosen = draw.sample(range(22), draw.randrange(1, 9))
            asked, _ = of_sequences(request, chosen)
            expected = Arithmetic(dtype=dtype).score(asked)
            assert teacher.missing(asked) == len(set(chosen) - known)
            plain.sequences.clear()
            same(teacher.score(asked), expected)
            new = len(set(chosen) - known)
            assert plain.sequences == ([new] if new else [])
            known |= set(chosen)
    assert len(list(tmp_path.glob("scores-r1-*"))) > 5


def test_a_model_is_asked_in_one_request_for_what_is_missing_and_no_more(
    local: LocalTeacher, tmp_path: Path
) -> None:
    counting = Counting(local)
    teacher = cached(counting, tmp_path)
    for request in every_request(packed(SEQUENCES)):
        counting.sequences.clear()
        first, rows = of_sequences(request, [7, 2, 9, 4])
        kept = teacher.score(first)
        mixed, places = of_sequences(request, [3, 9, 2, 11, 4, 0])
        reply = teacher.score(mixed)
        assert counting.sequences == [4, 3]
        new, new_rows = of_sequences(request, [3, 11, 0])
        said = local.score(new)
        for name in TEACHER_ROW_FIELDS:
            if (got := getattr(reply, name)) is not None:
                whole = got.new_zeros((len(request.batch.row_index), *got.shape[1:]))
                whole[rows] = getattr(kept, name)
                whole[new_rows] = getattr(said, name)
                assert torch.equal(got, whole[places]), name


def test_a_sequence_that_is_in_a_batch_twice_is_asked_once(tmp_path: Path) -> None:
    plain = Arithmetic()
    teacher = cached(plain, tmp_path)
    request = asks([told(1), told(2), told(1), told(1)])
    assert teacher.missing(request) == 4
    same(teacher.score(request), Arithmetic().score(request))
    assert plain.sequences == [2]


def test_sequences_without_rows_are_nobodys_question(tmp_path: Path) -> None:
    nothing = Told((3, 4), (5,), (0,))
    plain = Arithmetic()
    teacher = cached(plain, tmp_path)
    request = asks([nothing, told(1), nothing])
    same(teacher.score(request), Arithmetic().score(request))
    assert plain.sequences == [1]
    assert teacher.missing(asks([nothing])) == 0
    hidden = TeacherRequest(batch=packed([told(1)]))
    teacher.score(hidden)
    teacher.close()
    offline = cached(None, tmp_path)
    for empty in every_request(packed([nothing, nothing])):
        expected = Arithmetic().score(empty)
        same(teacher.score(empty), expected)
        reply = offline.score(empty)
        for name in TEACHER_ROW_FIELDS:
            got, plain_one = getattr(reply, name), getattr(expected, name)
            assert (got is None) == (plain_one is None), name
            assert got is None or got.shape == plain_one.shape, name
        assert (reply.unembedding is None) == (expected.unembedding is None)


class Strange(Arithmetic):
    """Answers with more, or with other ids than it was asked for."""

    def __init__(self, **said: Any) -> None:
        super().__init__()
        self.said = said

    def score(self, request: TeacherRequest) -> TeacherScores:
        return replace(super().score(request), **self.said)


class Whole(Arithmetic):
    """Answers with log-probabilities of all tokens, and with ids of its own choice."""

    def score(self, request: TeacherRequest) -> TeacherScores:
        scores = super().score(request)
        logp = logp_of(scores).unsqueeze(1)
        entries = torch.arange(V) * -1.0
        ids = scores.top_ids + 2**40 if scores.top_ids is not None else None
        return replace(
            scores,
            log_probs=torch.cat([logp + entries, torch.full_like(logp, -torch.inf)], 1),
            logsumexp=-logp_of(scores),
            ids=ids,
            ids_logp=scores.top_logp,
        )


def test_whole_distributions_and_ids_that_nobody_asked_for_are_kept(tmp_path: Path) -> None:
    request = asks(SEQUENCES)
    expected = Whole().score(request)
    teacher = cached(Whole(), tmp_path, drift_share=1.0)
    same(teacher.score(request), expected)
    teacher.close()
    same(cached(None, tmp_path).score(request), expected)
    again = cached(Whole(), tmp_path, drift_share=1.0)
    same(again.score(request), expected)
    drift = again.stats()["cache/drift"]
    assert drift.total == 0  # no mass on both sides is no difference
    assert drift.count > V * len(request.batch.row_index)


# --------------------------------------------------------------------------------------------
# Keys


def key_of(one: Told, revision: str = "r1", merge_ids: Any = (), **how: Any) -> bytes:
    base = TeacherRequest(batch=packed([one], merge_ids), distribution=False, sampled=True)
    (key,) = answer_keys(replace(base, **how), revision)
    return key


ONE = Told((3, 4, 5), (6, 7, 8, 9))
IDS = torch.tensor([[11, 12]] * 4)

PARTS: Mapping[str, Callable[[], bytes]] = {
    "revision": partial(key_of, ONE, "r2"),
    "temperature": partial(key_of, ONE, temperature=1.0 + 1e-9),
    "merge_ids": partial(key_of, ONE, merge_ids=((3, 4),)),
    "other merge_ids": partial(key_of, ONE, merge_ids=((4, 3),)),
    "two groups": partial(key_of, ONE, merge_ids=((3, 4), (5, 6))),
    "one group": partial(key_of, ONE, merge_ids=((3, 4, 5, 6),)),
    "top_k": partial(key_of, ONE, top_k=1),
    "sampled": partial(key_of, ONE, sampled=False),
    "entropy": partial(key_of, ONE, entropy=True),
    "distribution": partial(key_of, ONE, distribution=True),
    "ids": partial(key_of, ONE, ids=IDS),
    "an id": partial(key_of, ONE, ids=IDS + torch.tensor([[0, 0], [0, 0], [0, 0], [0, 1]])),
    "fewer ids": partial(key_of, ONE, ids=IDS[:, :1]),
    "no ids": partial(key_of, ONE, ids=IDS[:, :0]),
    "prompt": partial(key_of, Told((3, 40, 5), (6, 7, 8, 9))),
    "response": partial(key_of, Told((3, 4, 5), (6, 7, 8, 10))),
    "last token": partial(key_of, Told((3, 4, 5), (6, 7, 8))),
    "where the response begins": partial(key_of, Told((3, 4), (5, 6, 7, 8, 9))),
    "where it begins, as many rows": partial(key_of, Told((3, 4), (5, 6, 7, 8, 9), (0,))),
    "mask": partial(key_of, Told((3, 4, 5), (6, 7, 8, 9), (2,))),
    "other mask": partial(key_of, Told((3, 4, 5), (6, 7, 8, 9), (1,))),
}


def with_image(value: Any) -> bytes:
    batch = replace(packed([ONE]), model_inputs={"image": value})
    request = TeacherRequest(batch=batch, distribution=False, sampled=True)
    return answer_keys(request, "r1")[0]


def test_everything_that_an_answer_depends_on_is_in_its_key(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    keys = {name: make() for name, make in PARTS.items()} | {
        "as it is": key_of(ONE),
        "image": with_image(torch.zeros(1, 2)),
        "other image": with_image(torch.ones(1, 2)),
        "other shape": with_image(torch.zeros(1, 2, 1)),
        "other dtype": with_image(torch.zeros(1, 4, dtype=torch.float16)),
    }
    monkeypatch.setattr("opd.teacher.cache.VERSION", 2)
    keys["version"] = key_of(ONE)
    by_key: dict[bytes, str] = {}
    for name, key in keys.items():
        assert by_key.setdefault(key, name) == name
    with pytest.raises(TeacherError, match=r"'image' of type int, and a score cache"):
        with_image(3)


def test_nothing_else_is_in_a_key(monkeypatch: pytest.MonkeyPatch) -> None:
    others = [told(3), ONE, Told((9,) * 20, (8,) * 30)]
    batch = packed(others)
    token = replace(
        batch.token,
        group=batch.token.group + 5,
        verdict=torch.ones(3),
        sampler_logp=batch.token.sampler_logp - 1,
        extra={"score": torch.ones(3)},
    )
    batch = replace(batch, token=token, input_ids=torch.nn.functional.pad(batch.input_ids, (0, 0)))
    request = TeacherRequest(
        batch=batch,
        distribution=False,
        sampled=True,
        prompts=tuple(Prompt(str(i), (1,), "") for i in range(3)),
    )
    assert answer_keys(request, "r1")[1] == key_of(ONE)
    rows = len(batch.row_index)
    ids = torch.arange(2 * rows).reshape(rows, 2)
    start = int(batch.token.mask[0].sum())
    alone = key_of(ONE, ids=ids[start : start + 4].int())
    assert answer_keys(replace(request, ids=ids), "r1")[1] == alone


def test_another_question_about_the_same_tokens_is_another_entry(tmp_path: Path) -> None:
    plain = Arithmetic()
    teacher = cached(plain, tmp_path)
    for number, request in enumerate(every_request(packed([ONE])), 1):
        teacher.score(request)
        assert len(plain.sequences) == number
    other = cached(plain, tmp_path, revision="r2")
    other.score(request)
    assert len(plain.sequences) == number + 1


# --------------------------------------------------------------------------------------------
# Restarts, writers, kills


def test_what_was_flushed_outlives_the_process_and_the_rest_does_not(tmp_path: Path) -> None:
    first = cached(Arithmetic(), tmp_path)
    first.score(asks(SEQUENCES[:5]))
    first.flush()
    first.score(asks(SEQUENCES[5:]))
    plain = Arithmetic()
    again = cached(plain, tmp_path)
    assert again.missing(asks(SEQUENCES)) == 7
    same(again.score(asks(SEQUENCES)), Arithmetic().score(asks(SEQUENCES)))
    assert plain.sequences == [7]
    stats = again.stats()
    assert (stats["cache/hits"].total, stats["cache/misses"].total) == (5, 7)
    assert stats["cache/hits"].mean == pytest.approx(5 / 12)
    assert stats["cache/bytes"].total == sum(f.stat().st_size for f in tmp_path.glob("*.safet*"))
    assert again.stats()["cache/hits"].count == 0


def test_a_shard_is_written_as_soon_as_it_is_full(tmp_path: Path) -> None:
    teacher = cached(Arithmetic(), tmp_path, shard_bytes=2000)
    for n in range(60):
        teacher.score(asks([told(n)]))
    sizes = [file.stat().st_size for file in tmp_path.glob("scores-*")]
    assert 3 <= len(sizes) <= 12
    assert cached(None, tmp_path).missing(asks([told(n) for n in range(60)])) < 25
    big = cached(Arithmetic(), tmp_path / "big", shard_bytes=2000)
    big.score(asks([told(n) for n in range(60)]))  # many shards at once
    assert 3 <= len(list((tmp_path / "big").glob("scores-*"))) <= 12
    assert cached(None, tmp_path / "big").missing(asks([told(n) for n in range(60)])) == 0


def test_a_reader_finds_what_another_process_wrote_meanwhile(tmp_path: Path) -> None:
    plain = Arithmetic()
    reader = cached(plain, tmp_path)
    reader.score(asks(SEQUENCES[:2]))
    reader.flush()
    writer = cached(Arithmetic(), tmp_path)
    writer.score(asks(SEQUENCES[2:]))
    writer.flush()
    reader.score(asks(SEQUENCES))
    assert plain.sequences == [2]


def child(*arguments: Any) -> Any:
    started = CHILDREN.Process(target=write_on, args=arguments, daemon=True)
    started.start()
    return started


def test_two_processes_write_one_folder_at_once(tmp_path: Path) -> None:
    folder = tmp_path / "cache"
    both = [child(folder, w, 0, 30, tmp_path / "said") for w in range(2)]
    for one in both:
        one.join(120)
        assert one.exitcode == 0
    offline = cached(None, folder)
    for writer in range(2):
        for step in range(30):
            request = asks([told(n) for n in numbers(writer, step)])
            same(offline.score(request), Arithmetic().score(request))
    assert len(list(folder.glob("scores-r1-*"))) == 30
    assert not any("damaged" in name for name in offline.stats())


def kill_writers(tmp_path: Path, kills: int) -> None:
    """Kill two writers at once, again and again; then look whether what they acknowledged is so."""
    folder, draw = tmp_path / "cache", random.Random(0)
    for kill in range(kills):
        said = tmp_path / f"said-{kill}"
        both = [child(folder, w, 1000 * kill, 10**6, said) for w in range(2)]
        deadline = time.monotonic() + 60
        while not (said.exists() and said.stat().st_size > 20):
            assert time.monotonic() < deadline
            assert all(one.is_alive() for one in both)
            time.sleep(0.002)
        time.sleep(draw.uniform(0.0, 0.05))
        for one in both:
            one.kill()
        for one in both:
            one.join(60)
            assert one.exitcode == -9
    offline = cached(None, folder)
    checked = 0
    for kill in range(kills):
        lines = (tmp_path / f"said-{kill}").read_text().splitlines()
        for line in lines:
            writer, last = map(int, line.split())
            for step in (last - 1, last):
                request = asks([told(n) for n in numbers(writer, step)])
                same(offline.score(request), Arithmetic().score(request))
                checked += 1
    assert checked > 4 * kills
    told_of = offline.stats()
    assert not set(told_of) & {"cache/damaged", "cache/lost", "cache/unreadable"}
    survivor = cached(Arithmetic(), folder)  # and goes on
    survivor.score(asks([told(10**8)]))
    survivor.flush()
    assert cached(None, folder).missing(asks([told(10**8)])) == 0


def test_a_kill_at_any_time_loses_only_what_was_not_written(tmp_path: Path) -> None:
    kill_writers(tmp_path, kills=20)


@pytest.mark.slow
def test_many_kills_lose_only_what_was_not_written(tmp_path: Path) -> None:
    kill_writers(tmp_path, kills=200)


def test_temporary_files_of_the_killed_go_in_time(tmp_path: Path) -> None:
    old, new = tmp_path / ".scores-r1-1.safetensors.ab.tmp", tmp_path / ".head.safetensors.cd.tmp"
    for file in (old, new):
        file.write_bytes(b"cut")
    os.utime(old, (time.time() - 7200,) * 2)
    ScoreCache(tmp_path)
    assert not old.exists()
    assert new.exists()


def test_a_full_disk_stops_the_run_and_loses_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    teacher = cached(Arithmetic(), tmp_path, shard_bytes=1000)
    whole, calls = shard.save_file, []

    def full(tensors: Any, file: Path, metadata: Any) -> None:
        calls.append(file)
        whole(tensors, file, metadata)
        if len(calls) == 2:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(shard, "save_file", full)
    request = asks([told(n) for n in range(40)])
    with pytest.raises(TrainingError, match=r"cannot write .*No space left.*max_bytes"):
        teacher.score(request)
    assert len(calls) == 2
    assert not list(tmp_path.glob(".*tmp"))
    assert 0 < cached(None, tmp_path).missing(request) < 40
    assert teacher.missing(request) == 0
    teacher.flush()
    same(cached(None, tmp_path).score(request), Arithmetic().score(request))


def test_a_folder_that_is_deleted_under_a_run_is_filled_again(tmp_path: Path) -> None:
    plain = Arithmetic()
    teacher = cached(plain, tmp_path / "cache")
    request = TeacherRequest(batch=packed(SEQUENCES))
    for _ in range(2):
        teacher.score(request)
        teacher.flush()
        for file in (tmp_path / "cache").iterdir():
            file.unlink()
        (tmp_path / "cache").rmdir()
    assert plain.sequences == [12, 12]
    teacher.score(request)
    teacher.flush()
    assert cached(None, tmp_path / "cache").missing(request) == 0


def test_threads_share_one(tmp_path: Path) -> None:
    plain = Arithmetic()
    teacher = cached(plain, tmp_path, shard_bytes=700)
    draw = random.Random(1)
    chosen = [draw.sample(range(40), 6) for _ in range(120)]
    requests = [asks([told(n) for n in some]) for some in chosen]
    start = threading.Barrier(8)

    def score(number: int) -> TeacherScores:
        if number < 8:
            start.wait(30)
        if number % 10 == 9:
            teacher.flush()
        return teacher.score(requests[number])

    with ThreadPoolExecutor(8) as pool:
        replies = list(pool.map(score, range(120)))
    for request, reply in zip(requests, replies, strict=True):
        same(reply, Arithmetic().score(request))
    stats = teacher.stats()
    assert stats["cache/hits"].total + stats["cache/misses"].total == 120 * 6
    assert stats["cache/misses"].total == sum(plain.sequences)
    teacher.close()
    kept = [len(Shard(file).places) for file in tmp_path.glob("scores-*")]
    assert sum(kept) == 40


# --------------------------------------------------------------------------------------------
# Damage, versions


def one_shard(folder: Path) -> Path:
    teacher = cached(Arithmetic(), folder)
    for request in every_request(packed(SEQUENCES)):
        teacher.score(request)
    teacher.close()
    (file,) = folder.glob("scores-*")
    return file


def cut(data: bytearray) -> bytearray:
    return data[: len(data) * 2 // 3]


def first_half_zero(data: bytearray) -> bytearray:
    return bytearray(len(data) // 2) + data[len(data) // 2 :]


def last_flipped(data: bytearray) -> bytearray:
    data[-3] ^= 4
    return data


HARM: Mapping[str, Callable[[bytearray], bytearray]] = {
    "cut off": cut,
    "cut off in the header": lambda data: data[:40],
    "empty": lambda data: bytearray(),
    "longer": lambda data: data + bytearray(8),
    "half of it zero": first_half_zero,
    "all of it zero": lambda data: bytearray(len(data)),
    "one bit of an answer": last_flipped,
    "something else": lambda data: bytearray(safetensors.torch.save({"a": torch.zeros(3)})),
    "no safetensors": lambda data: bytearray(b"\xff" * 400),
}


@pytest.mark.parametrize("harm", HARM.values(), ids=HARM.keys())
def test_a_damaged_shard_is_moved_aside_and_asked_again(
    tmp_path: Path, harm: Callable[[bytearray], bytearray]
) -> None:
    file = one_shard(tmp_path)
    file.write_bytes(harm(bytearray(file.read_bytes())))
    plain = Arithmetic()
    teacher = cached(plain, tmp_path)
    for request in every_request(packed(SEQUENCES)):
        same(teacher.score(request), Arithmetic().score(request))
    assert plain.sequences
    assert teacher.stats()["cache/damaged"].total == 1
    assert not file.exists()
    assert file.with_suffix(".damaged").exists()
    teacher.close()
    again = cached(None, tmp_path)
    for request in every_request(packed(SEQUENCES)):
        same(again.score(request), Arithmetic().score(request))
    assert "cache/damaged" not in again.stats()


def flip_bits(tmp_path: Path, file: Path, places: Sequence[int]) -> None:
    """Whatever bit is wrong, an answer is right or missing."""
    data = file.read_bytes()
    requests = every_request(packed(SEQUENCES))
    expected = [Arithmetic().score(request) for request in requests]
    found_damage = 0
    for place in places:
        flipped = bytearray(data)
        flipped[place // 8] ^= 1 << place % 8
        file.write_bytes(flipped)
        teacher = cached(None, tmp_path)
        for request, plain in zip(requests, expected, strict=True):
            with suppress(TeacherError):  # there is no answer any more
                same(teacher.score(request), plain)
        stats = teacher.stats()
        found_damage += bool(set(stats) & {"cache/damaged", "cache/other_version"})
        file.with_suffix(".damaged").unlink(missing_ok=True)
    assert found_damage > 0.9 * len(places)


def test_a_flipped_bit_is_never_an_answer(tmp_path: Path) -> None:
    file, draw = one_shard(tmp_path), random.Random(2)
    flip_bits(tmp_path, file, [draw.randrange(8 * file.stat().st_size) for _ in range(150)])


@pytest.mark.slow
def test_no_bit_in_seven_is_ever_an_answer_when_it_is_flipped(tmp_path: Path) -> None:
    file = one_shard(tmp_path)
    flip_bits(tmp_path, file, range(0, 8 * file.stat().st_size, 7))


def test_an_answer_is_not_taken_for_that_of_another_key(tmp_path: Path) -> None:
    file = tmp_path / "scores-r1-1.safetensors"
    keys = [bytes([n]) * 32 for n in range(2)]
    write_shard(file, {key: Entry({"sampled_logp": torch.zeros(3)}) for key in keys}, "r")
    found = Shard(file)
    found.places[keys[0]], found.places[keys[1]] = found.places[keys[1]], found.places[keys[0]]
    with found.open() as handle, pytest.raises(DamagedError):
        found.read(handle, keys[0])


def test_a_head_that_is_damaged_or_gone_takes_its_hidden_states_with_it(tmp_path: Path) -> None:
    request = TeacherRequest(batch=packed(SEQUENCES))
    first = cached(Arithmetic(), tmp_path)
    first.score(request)
    first.score(asks(SEQUENCES))
    first.close()
    head = tmp_path / "head-r1.safetensors"
    head.write_bytes(last_flipped(bytearray(head.read_bytes())))
    offline = cached(None, tmp_path)
    assert offline.missing(request) == 12
    assert offline.missing(asks(SEQUENCES)) == 0
    assert not head.exists()
    with pytest.raises(TeacherError, match="no answer of revision 'r1' for 12 of 12"):
        offline.score(request)
    assert offline.stats()["cache/damaged"].total == 1
    plain = Arithmetic()
    same(cached(plain, tmp_path).score(request), Arithmetic().score(request))
    assert plain.sequences == [12]
    same(cached(None, tmp_path).score(request), Arithmetic().score(request))


def test_another_version_is_counted_and_left_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as other:
        other.setattr(shard, "VERSION", 7)
        file = one_shard(tmp_path)
    data, plain = file.read_bytes(), Arithmetic()
    teacher = cached(plain, tmp_path)
    request = asks(SEQUENCES)
    same(teacher.score(request), Arithmetic().score(request))
    assert plain.sequences == [12]
    teacher.score(request)
    assert teacher.stats()["cache/other_version"].total == 1
    assert file.read_bytes() == data


# --------------------------------------------------------------------------------------------
# How much


def test_the_folder_stays_below_its_bound_and_the_least_used_go(tmp_path: Path) -> None:
    bound = 24_000
    teacher = cached(Arithmetic(), tmp_path, max_bytes=bound)
    first = [told(n) for n in range(6)]
    teacher.score(asks(first))
    teacher.flush()
    (oldest,) = tmp_path.glob("scores-*")
    for n in range(1000, 1050):
        teacher = cached(Arithmetic(), tmp_path, max_bytes=bound)  # what was used is on disk
        teacher.score(asks(first))
        teacher.score(asks([told(20 * n + i) for i in range(8)]))
        teacher.flush()
        assert teacher.cache.disk_bytes <= bound
        time.sleep(0.001)
    assert oldest.exists()
    offline = cached(None, tmp_path)
    assert offline.missing(asks(first)) == 0
    gone = [offline.missing(asks([told(20 * n + i) for i in range(8)])) for n in range(1000, 1050)]
    assert gone[-1] == 0
    assert gone[0] == 8
    assert gone == sorted(gone, reverse=True)
    assert 4 < gone.count(0) < 40


def test_a_reader_whose_shard_was_deleted_asks_the_teacher(tmp_path: Path) -> None:
    plain = Arithmetic()
    teacher = cached(plain, tmp_path)
    request = asks(SEQUENCES)
    teacher.score(request)
    teacher.flush()
    (file,) = tmp_path.glob("scores-*")
    scanned = teacher.cache._scanned

    def deleted_after_the_look(revision: str) -> Any:
        known = scanned(revision)
        file.unlink(missing_ok=True)
        return known

    teacher.cache._scanned = deleted_after_the_look  # type: ignore[method-assign]
    same(teacher.score(request), Arithmetic().score(request))
    assert plain.sequences == [12, 12]
    assert teacher.stats()["cache/lost"].total == 1
    teacher.flush()
    assert cached(None, tmp_path).missing(request) == 0


def test_one_process_deletes_at_a_time(tmp_path: Path) -> None:
    fcntl = pytest.importorskip("fcntl")
    first = cached(Arithmetic(), tmp_path, shard_bytes=1000)
    first.score(asks([told(n) for n in range(200)]))
    first.close()
    before = sorted(tmp_path.glob("scores-*"))
    bounded = cached(Arithmetic(), tmp_path, max_bytes=4000)
    bounded.score(asks([told(1000)]))
    with (tmp_path / ".lock").open("a") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        waiting = threading.Thread(target=bounded.flush, daemon=True)
        waiting.start()
        waiting.join(0.3)
        assert waiting.is_alive()
        assert set(before) <= set(tmp_path.glob("scores-*"))
    waiting.join(30)
    assert not waiting.is_alive()
    assert bounded.cache.disk_bytes <= 4000


def test_what_nobody_can_use_goes_first_and_a_head_with_its_last_answers(tmp_path: Path) -> None:
    old = cached(Arithmetic(width=64), tmp_path, revision="old")
    for n in range(2):
        old.score(TeacherRequest(batch=packed([told(n)])))
        old.flush()
    (tmp_path / "scores-old-1.damaged").write_bytes(b"0" * 3000)
    head, alone = tmp_path / "head-old.safetensors", tmp_path / "head-alone.safetensors"
    alone.write_bytes(head.read_bytes())

    def write_one(number: int, less: int = 0) -> list[str]:
        """Within what the folder takes now: what is there of old then."""
        bound = ScoreCache(tmp_path).disk_bytes - less
        teacher = cached(Arithmetic(), tmp_path, max_bytes=bound)
        teacher.score(asks([told(number)]))
        teacher.flush()
        assert teacher.cache.disk_bytes <= bound
        return sorted(file.name.split("-")[0] for file in tmp_path.glob("*-old-*"))

    assert write_one(100) == ["scores", "scores"]  # the damaged file went
    assert alone.exists()
    assert write_one(200) == ["scores", "scores"]
    assert not alone.exists()
    assert write_one(300) == ["scores"]
    assert head.exists()
    assert write_one(400, less=head.stat().st_size) == []
    assert not head.exists()
    offline = cached(None, tmp_path)
    assert offline.missing(asks([told(n) for n in (300, 400)])) == 0


def test_a_head_that_was_deleted_comes_back_with_the_next_shard(tmp_path: Path) -> None:
    teacher = cached(Arithmetic(), tmp_path)
    teacher.score(TeacherRequest(batch=packed(SEQUENCES[:3])))
    (tmp_path / "head-r1.safetensors").unlink()
    teacher.flush()
    assert cached(None, tmp_path).missing(TeacherRequest(batch=packed(SEQUENCES[:3]))) == 0


def test_a_bound_that_holds_nothing_is_refused(tmp_path: Path) -> None:
    for how in ({"max_bytes": 0}, {"shard_bytes": 0}):
        with pytest.raises(ConfigError, match="holds nothing"):
            ScoreCache(tmp_path, **how)
    tight = cached(Arithmetic(width=64), tmp_path, max_bytes=10_000)
    with pytest.raises(ConfigError, match=r"10000 bytes.*unembedding alone takes 6784"):
        tight.score(TeacherRequest(batch=packed(SEQUENCES)))
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="no score cache can be made in"):
        ScoreCache(tmp_path / "file")


# --------------------------------------------------------------------------------------------
# Drift


@pytest.mark.parametrize("place", range(5))
def test_changed_weights_under_the_same_revision_are_found(tmp_path: Path, place: int) -> None:
    batch = packed([Told((3, 4), (5,), (0,)), *SEQUENCES])  # nobody asks about the first
    request = [every_request(batch)[i] for i in (0, 1, 2, 3, 5)][place]
    before = cached(LocalTeacher(frozen(), vocab_size=V), tmp_path, drift_share=1.0)
    kept = before.score(request)
    same(before.score(request), kept)
    drift = before.stats()["cache/drift"]
    assert drift.count >= len(request.batch.row_index)
    assert drift.mean < 1e-5
    before.close()
    moved = frozen()
    with torch.no_grad():
        moved.model.model.layers[0].mlp.down_proj.weight.mul_(3.0)
    strict = {"drift_share": 1.0, "drift_limit": 0.05}
    after = cached(LocalTeacher(moved, vocab_size=V), tmp_path, name="ada", **strict)
    said = rf"ada no longer says .* 12 sequences.*by up to \d.* nats.*'r1'.*pin.*{tmp_path}"
    with pytest.raises(TeacherError, match=said):
        after.score(request)
    assert after.stats()["cache/drift"].mean > 0.01
    patient = cached(LocalTeacher(moved, vocab_size=V), tmp_path, drift_share=1.0, drift_limit=99)
    same(patient.score(request), kept)
    assert patient.stats()["cache/drift"].mean > 0.01


def test_the_difference_is_the_mean_and_the_largest(tmp_path: Path) -> None:
    plain = Arithmetic()
    teacher = cached(plain, tmp_path, drift_share=1.0, drift_limit=0.3)
    request = asks(SEQUENCES)
    teacher.score(request)
    plain.shift = 0.25
    teacher.score(request)
    drift = teacher.stats()["cache/drift"]
    assert drift.mean == pytest.approx(0.25, rel=1e-5)
    assert drift.count == 3 * len(request.batch.row_index)
    plain.shift = 0.5
    with pytest.raises(TeacherError, match=r"by up to 0\.5 nats, and drift_limit is 0\.3"):
        teacher.score(request)


def test_no_mass_on_one_side_is_as_far_apart_as_can_be(tmp_path: Path) -> None:
    request = asks(SEQUENCES)
    cached(Arithmetic(), tmp_path).close()
    teacher = cached(Arithmetic(), tmp_path, drift_share=1.0)
    plain = teacher.score(request)
    logp = logp_of(plain).clone()
    for wrong in (-torch.inf, torch.nan):
        logp[3] = wrong
        teacher.teacher = Strange(sampled_logp=logp)
        with pytest.raises(TeacherError, match="by up to inf nats"):
            teacher.score(request)


def test_other_ids_among_the_likeliest_are_a_difference(tmp_path: Path) -> None:
    """The lists are compared by id, not by rank."""
    rows = len(asks(SEQUENCES).batch.row_index)
    request = replace(asks(SEQUENCES), sampled=False, top_k=2)

    def listing(*entries: tuple[int, float]) -> Strange:
        ids = torch.tensor([[token for token, _ in entries]]).expand(rows, -1)
        return Strange(top_ids=ids, top_logp=torch.tensor([[v for _, v in entries]] * rows))

    teacher = cached(listing((5, -0.5), (3, -1.0)), tmp_path, drift_share=1.0, drift_limit=0.3)
    teacher.score(request)
    teacher.teacher = listing((3, -1.0), (5, -0.5))  # the same, in another order
    teacher.score(request)
    assert teacher.stats()["cache/drift"].total == 0.0
    teacher.teacher = listing((9, -0.5), (3, -1.0))
    with pytest.raises(TeacherError, match=r"by up to 0\.5 nats"):  # at most the last one's -1.0
        teacher.score(replace(request))


def test_whose_answers_there_are_is_told_as_it_was_put(tmp_path: Path) -> None:
    for revision in ("plain", "org/Model-8B@main", "x" * 90):
        teacher = cached(Arithmetic(), tmp_path, revision=revision)
        teacher.score(asks(SEQUENCES))
        teacher.close()
    (tmp_path / "scores-odd-1.safetensors").write_bytes(b"nothing")
    there = ScoreCache(tmp_path).revisions()
    assert there == sorted(["plain", "org/Model-8B@main", "x" * 90])


def test_a_folder_that_goes_during_a_write_is_made_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "scores"
    teacher = cached(Arithmetic(), folder)
    teacher.score(asks(SEQUENCES))
    really, times = shard.save_file, []

    def deleting(*args: Any, **kwargs: Any) -> None:
        if not times:
            shutil.rmtree(folder)
        times.append(1)
        really(*args, **kwargs)

    monkeypatch.setattr(shard, "save_file", deleting)
    teacher.close()
    assert len(times) == 2
    assert ScoreCache(folder).revisions() == ["r1"]


def test_a_share_of_the_hits_is_asked_again_and_always_the_same(tmp_path: Path) -> None:
    some = [told(n) for n in range(400)]
    cached(Arithmetic(), tmp_path, shard_bytes=10**5).score(asks(some))
    filled = cached(Arithmetic(), tmp_path)
    filled.score(asks(some))
    filled.close()
    asked = []
    for _ in range(2):
        plain = Arithmetic()
        teacher = cached(plain, tmp_path, drift_share=0.1)
        for n in range(0, 400, 40):
            teacher.score(asks(some[n : n + 40]))
        asked.append(plain.sequences)
    assert asked[0] == asked[1]
    assert 20 < sum(asked[0]) < 65
    mixed = Arithmetic()
    teacher = cached(mixed, tmp_path, drift_share=0.1)
    teacher.score(asks([*some, told(5000)]))
    assert mixed.sequences == [sum(asked[0]) + 1]  # with what is missing, in one request


def test_another_unembedding_under_the_same_revision_is_refused(tmp_path: Path) -> None:
    request = TeacherRequest(batch=packed(SEQUENCES))
    first = cached(LocalTeacher(frozen(), vocab_size=V), tmp_path)
    first.score(request)
    first.close()
    moved = frozen()
    with torch.no_grad():
        moved.model.get_output_embeddings().weight[5, 5] += 1e-3
    other = cached(LocalTeacher(moved, vocab_size=V), tmp_path)
    new = TeacherRequest(batch=packed([told(100)]))
    with pytest.raises(TeacherError, match=rf"'r1' has another unembedding.*{tmp_path}"):
        other.score(new)


@pytest.mark.parametrize("share", [0.0, 1.0])
def test_answers_of_another_form_do_not_go_together(tmp_path: Path, share: float) -> None:
    first = cached(Arithmetic(dtype=torch.float32), tmp_path)
    first.score(TeacherRequest(batch=packed(SEQUENCES[:4])))
    first.close()
    (tmp_path / "head-r1.safetensors").unlink()
    other = cached(Arithmetic(), tmp_path, drift_share=share)
    other.cache.put_head("r1", Unembedding(torch.ones(V, 4), V))
    request = TeacherRequest(batch=packed(SEQUENCES))
    said = r"hidden \((bfloat16|float32) x \[4\]\).*hidden.*revision of its own"
    with pytest.raises(TeacherError, match=said):
        other.score(request)


# --------------------------------------------------------------------------------------------
# Without a teacher


def test_what_is_missing_is_named(tmp_path: Path) -> None:
    filled = cached(Arithmetic(), tmp_path)
    filled.score(asks(SEQUENCES[:4]))
    filled.close()
    offline = cached(None, tmp_path, name="ada")
    request = asks(SEQUENCES[2:7])
    assert offline.missing(request) == 3
    said = rf"in {tmp_path} has no answer of revision 'r1' for 3 of 5 sequences.*sequence 2 .*ada"
    with pytest.raises(TeacherError, match=said):
        offline.score(request)
    prompts = tuple(Prompt(f"data:{n}", (1,), "") for n in range(5))
    with pytest.raises(TeacherError, match="a response to the prompt data:2"):
        offline.score(replace(request, prompts=prompts))
    assert offline.stats()["cache/misses"].total == 6


def offline_update(method: Method, scorer: Teacher, responses: Sequence[Told]) -> torch.Tensor:
    """The gradient of one update on fixed text."""
    prompts = [
        Prompt(str(i), one.prompt, "", response_ids=one.response) for i, one in enumerate(responses)
    ]
    loaded = tiny("llama", seed=2)
    student, objective = Student(loaded, vocab_size=V), method.objective
    plan = make_plan(method, SamplerSettings(max_new_tokens=9), merge_ids=())
    batch = pack_rollout(steps.rollout_from_data(prompts), pad_id=PAD)
    batch = steps.score({"teacher": scorer}, batch, objective, plan, prompts=prompts)
    batch = steps.signal(student, batch, objective, plan, 64, fresh=True)
    steps.update(student, batch, objective, 64, step=1)
    return torch.cat([p.grad.flatten() for p in student.trainable().values() if p.grad is not None])


@pytest.mark.parametrize(
    "make",
    [methods.lightning_opd, lambda: replace(methods.reverse_kl_opd(), states=OF_DATA)],
    ids=["lightning_opd", "reverse_kl_opd"],
)
def test_a_method_on_fixed_text_runs_from_the_cache_alone(
    local: LocalTeacher, tmp_path: Path, make: Callable[[], Method]
) -> None:
    plain = offline_update(make(), local, SEQUENCES)
    assert float(plain.norm()) > 0
    filled = cached(local, tmp_path)
    assert torch.equal(offline_update(make(), filled, SEQUENCES), plain)
    filled.close()
    assert torch.equal(offline_update(make(), cached(None, tmp_path), SEQUENCES), plain)
    with pytest.raises(TeacherError, match=r"for 1 of 2 sequences, the first .* the prompt 1 "):
        offline_update(make(), cached(None, tmp_path), [SEQUENCES[0], told(77)])


OF_DATA = methods.lightning_opd().states


# --------------------------------------------------------------------------------------------
# Who is not cached


def refused(tmp_path: Path) -> Iterator[tuple[Any, str]]:
    student = tiny("llama")
    yield LocalTeacher(student, vocab_size=V), "its weights are trained"
    yield AverageTeacher(student, decay=0.9, vocab_size=V), "an average of the student"
    router = Router("route", ["a"], tmp_path)
    yield RoutedTeacher({"a": Arithmetic()}, router), "it routes; cache the teachers"


def test_teachers_that_move_or_route_are_refused(tmp_path: Path) -> None:
    for teacher, reason in refused(tmp_path):
        with pytest.raises(ConfigError, match=f"ada cannot be cached: .*{reason}"):
            cached(teacher, tmp_path, name="ada")
    for revision in ("", "  "):
        with pytest.raises(ConfigError, match="ada has no revision"):
            cached(Arithmetic(), tmp_path, revision=revision, name="ada")
    for how in ({"drift_share": 1.5}, {"drift_limit": 0.0}, {"drift_share": float("nan")}):
        with pytest.raises(ConfigError, match="must lie in"):
            cached(Arithmetic(), tmp_path, **how)
    student_at_step_0 = LocalTeacher(tiny("llama"), vocab_size=V, without_adapter=True)
    assert cached(student_at_step_0, tmp_path).teacher is student_at_step_0


def test_a_reply_that_cannot_be_kept_is_refused(tmp_path: Path) -> None:
    request = asks(SEQUENCES)
    rows = len(request.batch.row_index)
    for name, value in (
        ("row_index", torch.arange(rows)),
        ("id_map", torch.arange(V)),
        ("parts", (("teacher", 1.0),)),
    ):
        teacher = cached(Strange(**{name: value}), tmp_path, name="ada")
        with pytest.raises(TeacherError, match=f"ada answered with '{name}'"):
            teacher.score(request)
    said = {"sampled_logp": torch.zeros(rows - 1), "top_ids": None, "top_logp": None}
    short = cached(Strange(**said), tmp_path, name="ada")
    with pytest.raises(TeacherError, match=f"'ada' answered for {rows - 1} rows"):
        short.score(request)
    assert ScoreCache(tmp_path).has("r1", answer_keys(request, "r1")) == set()


def test_revisions_may_be_any_text(tmp_path: Path) -> None:
    names = [
        "org/model@main",
        "org-model-main",
        "a" * 200,
        "a" * 199 + "b",
        "é ü",
        "..",
        "scores-r",
    ]
    for number, revision in enumerate(names):
        teacher = cached(plain := Arithmetic(), tmp_path, revision=revision)
        plain.shift = float(number)
        teacher.score(TeacherRequest(batch=packed(SEQUENCES[:3])))
        teacher.close()
    for number, revision in enumerate(names):
        found = cached(None, tmp_path, revision=revision)
        (plain := Arithmetic()).shift = float(number)
        request = TeacherRequest(batch=packed(SEQUENCES[:3]))
        same(found.score(request), plain.score(request))
    assert all(file.parent == tmp_path for file in tmp_path.rglob("*"))
    assert cache_folder._slug("r1") == "r1"
