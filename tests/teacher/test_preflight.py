"""Trying a served teacher before a run."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch

from opd.models import LoadedModel
from opd.teacher.identity import identity_without_weights
from opd.teacher.preflight import Preflight, Trial, preflight
from opd.teacher.query import WANTED
from tests.models_zoo import tiny, tiny_tokenizer
from tests.teacher.served import QUICK, Reply, endpoint, harmed, serving

TEXTS = (((3, 4, 5), (6, 7, 8, 9)), ((6, 7), (3, 4, 5)))
TRIAL = Trial(TEXTS, frozenset(WANTED), top_k=4, columns=2)


@pytest.fixture(scope="module")
def teacher() -> LoadedModel:
    return tiny("qwen3", seed=3)


@pytest.fixture(scope="module")
def url(teacher: LoadedModel) -> Iterator[str]:
    with serving(teacher) as found:
        yield found


def tried(
    url: str, trial: Trial = TRIAL, student: LoadedModel | None = None, **how: object
) -> Preflight:
    own = identity_without_weights(student or tiny("llama"))
    with endpoint(url, replace(QUICK, retry_s=0.2)) as client:
        return preflight(client, trial, student=own, **how)  # type: ignore[arg-type]


def test_a_good_teacher_is_described_and_timed(url: str, teacher: LoadedModel) -> None:
    found = tried(url, local_copy=teacher)
    assert found.errors == ()
    assert found.notes == ("it agrees with the local copy to 0 nats",)
    assert found.described is not None
    assert found.described.model == teacher.reference
    assert found.tokens_per_s > 0


def test_another_model_than_the_copy_is_an_error(url: str) -> None:
    found = tried(url, local_copy=tiny("qwen3", seed=4))
    assert len(found.errors) == 1
    assert "differs from the local copy by up to" in found.errors[0]
    assert "the weights differ" in found.errors[0]


def test_another_vocabulary_and_other_end_tokens_are_errors(url: str) -> None:
    student = tiny("llama", vocab_size=54)
    student.eos_ids = (2, 3)
    found = tried(url, student=student)
    assert ["another vocabulary" in one for one in found.errors] == [True, False]
    assert "ends with the tokens [2] and the student with [2, 3]" in found.errors[1]
    assert len(tried(url, student=student, merge_stop_ids=True).errors) == 1


def test_another_template_is_a_note(url: str) -> None:
    student = tiny("llama")
    student.tokenizer = tiny_tokenizer(chat=False)
    found = tried(url, student=student)
    assert found.errors == ()
    assert "its chat template is another than the student's" in found.notes[0]


def test_a_server_that_is_not_there_is_an_error() -> None:
    found = tried("http://127.0.0.1:9")
    assert found.described is None
    assert "ConnectError" in found.errors[0]


def test_what_a_server_does_not_take_is_an_error(url: str) -> None:
    found = tried(url, replace(TRIAL, top_k=60))
    assert "top_k = 60" in found.errors[0]


def test_answers_that_change_are_noted(url: str) -> None:
    def later(reply: Reply) -> None:
        if not reply.seen:
            reply.send(reply.body())
            return
        changed = reply.changed("sampled_logp", lambda v: v - 0.01)
        reply.send(reply.body(changed))

    with harmed(url, later, count=2) as proxy:
        found = tried(proxy.url)
    assert "scored twice differ by up to 0.01 nats" in found.notes[0]


def test_a_trial_asks_for_ids_of_the_text(url: str) -> None:
    query = TRIAL.query()
    ids = query.sequences[0].ids
    assert ids is not None
    assert ids.tolist() == [[6, 7], [7, 8], [8, 9], [9, 6]]
    assert torch.equal(query.sequences[1].response, torch.tensor([3, 4, 5], dtype=torch.int32))


def test_a_run_that_writes_more_than_the_server_takes_is_an_error(url: str) -> None:
    told = tried(url).described
    assert told is not None
    limit = told.max_tokens
    fits = replace(TRIAL, longest_prompt=limit - 10, max_new_tokens=10)
    assert tried(url, fits).errors == ()
    found = tried(url, replace(fits, max_new_tokens=11))
    assert found.errors == (
        f"it takes {limit} tokens per sequence, and a prompt of {limit - 10} with a response of 11 "
        f"has {limit + 1}; lower sampler.max_new_tokens to 10, or shorten the prompts",
    )
