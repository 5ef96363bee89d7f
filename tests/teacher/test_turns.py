"""Models that take turns: what they say, and how many of them are there at once."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from opd.head import log_probs_of
from opd.models import LoadedModel
from opd.teacher.local import LocalTeacher
from opd.teacher.turns import DiskModel, HostModel, Turns, TurnSampler, TurnTeacher
from opd.training.check import examine
from opd.training.loop import train_run
from opd.training.session import open_session
from opd.types import Need, Provenance, SamplerSettings, TeacherRequest
from tests.models_zoo import tiny
from tests.teacher.test_local import PROMPTS, packed, sampled
from tests.training.runs import finish, outcome, tiny_run

CPU = torch.device("cpu")
TWO: Mapping[str, Any] = {
    "teacher": {"model": "", "route": "task"},
    "teachers": {
        "add": {"model": "builtin:add-teacher"},
        "sort": {"model": "builtin:sort-teacher"},
    },
    "data": {"prompts": "task:add+sort"},
    "evaluate": {"every": 0},
}


class Shelf:
    """Loads tiny models, and knows how many of them have their weights."""

    def __init__(self) -> None:
        self.loads = 0
        self.most = 0
        self._made: list[weakref.ref[Any]] = []

    def load(self, seed: int) -> LoadedModel:
        loaded = tiny("llama", seed=seed)
        self.loads += 1
        self._made.append(weakref.ref(loaded.model))
        self.most = max(self.most, self.here())
        return loaded

    def here(self) -> int:
        """Models of which some weight is neither gone nor on torch's meta device."""
        models = [ref() for ref in self._made]
        return sum(
            any(not weight.is_meta for weight in model.parameters())
            for model in models
            if model is not None
        )


def test_a_model_from_disk_says_what_it_says_and_leaves_nothing_but_its_head() -> None:
    gc.disable()  # what is freed is freed at once
    try:
        shelf, turns = Shelf(), Turns()
        teachers = [
            TurnTeacher(DiskModel(lambda seed=seed: shelf.load(seed)), turns, vocab_size=53)
            for seed in (1, 2)
        ]
        assert (shelf.loads, shelf.here()) == (2, 0)
        request = TeacherRequest(packed(sampled(tiny("llama"))))
        for seed, teacher in zip((1, 2), teachers, strict=True):
            reply = teacher.score(request)
            own = LocalTeacher(tiny("llama", seed=seed), vocab_size=53).score(request)
            assert shelf.here() == 0
            for scores in (reply, own):
                assert scores.hidden is not None
                assert scores.unembedding is not None
            ours, theirs = (
                log_probs_of(scores.hidden, scores.unembedding)  # type: ignore[arg-type]
                for scores in (reply, own)
            )
            assert torch.equal(ours, theirs)
        assert (shelf.loads, shelf.most) == (4, 1)
    finally:
        gc.enable()


def test_inside_a_lasting_turn_a_model_is_loaded_once_and_another_sends_it_away() -> None:
    shelf, turns = Shelf(), Turns()
    one, other = (
        TurnTeacher(DiskModel(lambda seed=seed: shelf.load(seed)), turns, vocab_size=53)
        for seed in (1, 2)
    )
    request = TeacherRequest(packed(sampled(tiny("llama"))), distribution=False, sampled=True)
    with turns:
        for teacher in (one, one, other, other):
            teacher.score(request)
        assert (shelf.loads, shelf.here()) == (4, 1)
    assert shelf.here() == 0
    assert shelf.most == 1
    assert one.can(Need("teacher", "log_probs", "full"))


def test_a_failed_turn_ends_too() -> None:
    shelf, turns = Shelf(), Turns()
    teacher = TurnTeacher(DiskModel(lambda: shelf.load(1)), turns, vocab_size=53)
    request = TeacherRequest(packed(sampled(tiny("llama"))), distribution=False, top_k=99)
    with pytest.raises(Exception, match="does not fit a vocabulary"):
        teacher.score(request)
    assert shelf.here() == 0


def test_a_parked_sampler_writes_what_the_model_writes() -> None:
    settings = SamplerSettings(max_new_tokens=7)
    turns = Turns()
    for model in (HostModel(tiny("llama"), CPU), DiskModel(lambda: tiny("llama"))):
        sampler = TurnSampler(model, turns, vocab_size=53)
        generator = torch.Generator().manual_seed(0)
        written = sampler.sample(PROMPTS, settings, generator=generator)
        assert torch.equal(written.tokens, sampled(tiny("llama")).tokens)
        assert (written.provenance[written.mask] == Provenance.TEACHER).all()


class Elsewhere(HostModel):
    """A stand-in for another device: float64, so that a copy is a copy."""

    def enter(self) -> LoadedModel:
        super().enter()
        model: Any = self.facts.model
        for weight in model.parameters():
            weight.data = weight.data.clone()
        return self.facts


def test_a_model_from_the_host_works_on_a_copy_and_its_head_outlives_the_turn() -> None:
    loaded = tiny("llama", seed=1)
    model: Any = loaded.model
    home = {name: weight.data_ptr() for name, weight in model.named_parameters()}
    turns = Turns()
    teacher = TurnTeacher(Elsewhere(loaded, CPU), turns, vocab_size=53)
    request = TeacherRequest(packed(sampled(tiny("llama"))))
    with turns:
        reply = teacher.score(request)
        assert all(w.data_ptr() != home[name] for name, w in model.named_parameters())
    assert {name: weight.data_ptr() for name, weight in model.named_parameters()} == home
    own = LocalTeacher(tiny("llama", seed=1), vocab_size=53).score(request)
    assert reply.unembedding is not None
    assert own.unembedding is not None
    assert reply.unembedding.weight.data_ptr() not in home.values()
    assert torch.equal(reply.unembedding.weight, own.unembedding.weight)
    assert torch.equal(reply.hidden, own.hidden)  # type: ignore[arg-type]


@pytest.mark.parametrize("keep", [pytest.param("host", marks=pytest.mark.slow), "disk"])
def test_where_teachers_are_kept_changes_no_weight(tmp_path: Path, keep: str) -> None:
    run = tiny_run(tmp_path / "device", TWO)
    finish(run)
    parked = {"teachers": {name: {"keep": keep} for name in ("add", "sort")}}
    finish(tiny_run(tmp_path / keep, TWO, parked))
    weights = [outcome(tmp_path / name / "run")["weights"] for name in ("device", keep)]
    assert weights[0] == weights[1]


@pytest.mark.parametrize("keep", ["host", "disk"])
def test_a_single_teacher_may_be_parked_too_and_still_writes(tmp_path: Path, keep: str) -> None:
    warm = {"warmup": {"steps": 1, "source": "teacher", "prompts_per_step": 2}}
    for place in ("device", keep):
        finish(tiny_run(tmp_path / place, warm, {"teacher": {"keep": place}}))
    weights = [outcome(tmp_path / name / "run")["weights"] for name in ("device", keep)]
    assert weights[0] == weights[1]


def test_between_steps_nobody_is_there(tmp_path: Path) -> None:
    parked = {"teachers": {name: {"keep": "disk"} for name in ("add", "sort")}}
    session = open_session(run := tiny_run(tmp_path, TWO, parked))
    for _ in train_run(run, session=session):
        for teacher in session.teachers["teacher"].teachers.values():  # type: ignore[attr-defined]
            assert teacher.model._here is None


def test_the_memory_estimate_counts_the_largest_of_those_that_take_turns(tmp_path: Path) -> None:
    def parts(keep: str) -> dict[str, float]:
        own = {"keep": keep, "dtype": "float32"}
        change = {"teachers": dict.fromkeys(("add", "sort"), own)}
        return {part.what: part.bytes for part in examine(tiny_run(tmp_path, TWO, change)).memory}

    kept, parked = parts("device"), parts("disk")
    both = kept["further teachers' weights"]
    assert "further teachers' weights" not in parked
    assert parked["weights of the teacher whose turn it is"] == both / 2
    heads = parked["unembeddings of teachers that have left"]
    assert heads == 2 * 53 * 96 * 4
    assert parts("host") == kept  # on a CPU the host's memory is the device's
    assert kept["teacher's hidden states"] == parked["teacher's hidden states"] == 4 * 6 * 96 * 4
