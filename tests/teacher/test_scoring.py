"""A model that answers queries: against one forward per sequence, whatever is batched or shared."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from opd.formula.numerics import project
from opd.models import LoadedModel
from opd.teacher import scoring
from opd.teacher.query import WANTED, Answer, Query, check_answer
from opd.teacher.scoring import Job, Scorer
from tests.models_zoo import FAMILIES, tiny
from tests.teacher.queries import query


@pytest.fixture(scope="module", params=FAMILIES)
def loaded(request: pytest.FixtureRequest) -> LoadedModel:
    return tiny(request.param)


def jobs(asked: Query) -> list[Job]:
    return [Job(one, asked) for one in asked.sequences]


def answered(scorer: Scorer, asked: Query) -> list[Answer]:
    found = dict(scorer.answer(jobs(asked)))
    assert sorted(found) == list(range(len(asked.sequences)))
    for place, one in enumerate(asked.sequences):
        check_answer(one, asked, found[place].values, vocab_size=scorer.vocab_size)
    return [found[place] for place in range(len(found))]


@torch.no_grad()
def expected(loaded: LoadedModel, asked: Query, place: int) -> torch.Tensor:
    """Log-probabilities at every response token, by the model's own forward of one sequence."""
    one = asked.sequences[place]
    ids = torch.cat([one.prompt, one.response]).long().unsqueeze(0)
    logits = loaded.model(input_ids=ids).logits[0, :, : loaded.vocab_size].float()
    first = len(one.prompt) - 1
    rows = logits[first : first + len(one.response)] / asked.temperature
    return rows.log_softmax(-1)


def scorer(loaded: LoadedModel, max_tokens: int = 16384) -> Scorer:
    return Scorer(loaded, vocab_size=loaded.vocab_size, max_tokens=max_tokens, revision="r")


def values_are(answer: Answer, asked: Query, place: int, log_probs: torch.Tensor) -> None:
    """Every field of an answer against whole distributions, row by row."""
    one, values = asked.sequences[place], answer.values
    near = {"rtol": 1e-4, "atol": 2e-5}
    own = log_probs.gather(-1, one.response.long().unsqueeze(-1)).squeeze(-1)
    torch.testing.assert_close(values["sampled_logp"], own[one.rows("sampled")], **near)
    rows = log_probs[one.rows("top")]
    best = rows.sort(-1, descending=True).values[:, : asked.top_k]
    torch.testing.assert_close(values["top_logp"], best, **near)
    torch.testing.assert_close(rows.gather(-1, values["top_ids"].long()), best, **near)
    if one.ids is not None:
        chosen = log_probs[one.rows("ids")].gather(-1, one.ids.long())
        torch.testing.assert_close(values["ids_logp"], chosen, **near)
    entropy = -(log_probs.exp() * log_probs).sum(-1)
    torch.testing.assert_close(values["entropy"], entropy[one.rows("entropy")], **near)


def test_every_field_is_what_the_model_says_of_the_sequence_alone(loaded: LoadedModel) -> None:
    asked = query(vocab_size=loaded.vocab_size, sequences=4, some=True)
    asked = replace(asked, temperature=0.7)
    own = scorer(loaded, max_tokens=25)
    for place, answer in enumerate(answered(own, asked)):
        values_are(answer, asked, place, expected(loaded, asked, place))
        rows = asked.sequences[place].rows("hidden")
        head = project(answer.values["hidden"], own.head) / asked.temperature
        torch.testing.assert_close(
            head.log_softmax(-1), expected(loaded, asked, place)[rows], rtol=1e-4, atol=2e-5
        )
        assert answer.revision == "r"


def test_a_shared_prompt_is_read_once_and_changes_nothing(
    loaded: LoadedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompt = torch.arange(3, 33).tolist()
    asked = query(vocab_size=loaded.vocab_size, sequences=5, prompt=prompt)
    alone = scorer(loaded)
    apart = answered(alone, asked)
    assert alone.shared_tokens == 0
    monkeypatch.setattr(scoring, "SHARED_FROM", 100)
    together = scorer(loaded, max_tokens=90)  # two turns of the responses
    for place, answer in enumerate(answered(together, asked)):
        for name, value in answer.values.items():
            torch.testing.assert_close(value, apart[place].values[name], rtol=1e-4, atol=2e-5)
    assert together.shared_tokens == 4 * len(prompt)


def test_queries_with_other_settings_are_answered_together() -> None:
    loaded = tiny("llama")
    one = query(1, vocab_size=loaded.vocab_size, top_k=2, wanted=("sampled", "top"))
    other = replace(query(2, vocab_size=loaded.vocab_size), temperature=2.0, top_k=5)
    own = scorer(loaded)
    mixed = [job for pair in zip(jobs(one), jobs(other), strict=True) for job in pair]
    found = dict(own.answer(mixed))
    for place in range(3):
        for asked, at in ((one, 2 * place), (other, 2 * place + 1)):
            check_answer(asked.sequences[place], asked, found[at].values)
            logp = expected(loaded, asked, place)
            tokens = asked.sequences[place].response.long().unsqueeze(-1)
            told = found[at].values["sampled_logp"]
            torch.testing.assert_close(told, logp.gather(-1, tokens).squeeze(-1))
    assert set(found[0].values) == {"sampled_logp", "top_ids", "top_logp"}


def test_merged_ids_are_one_token() -> None:
    loaded = tiny("qwen3")
    asked = query(vocab_size=loaded.vocab_size, wanted=("sampled", "ids", "top"))
    asked = replace(asked, merge_ids=((3, 4, 5),), top_k=2)
    for place, answer in enumerate(answered(scorer(loaded), asked)):
        whole = expected(loaded, asked, place).exp()
        whole[:, 3] += whole[:, 4] + whole[:, 5]
        whole[:, 4:6] = 0.0
        one = asked.sequences[place]
        assert one.ids is not None
        ids = torch.where((one.ids == 4) | (one.ids == 5), 3, one.ids).long()
        torch.testing.assert_close(answer.values["ids_logp"].exp(), whole.gather(-1, ids))


def test_a_sequence_that_asks_nothing_gets_nothing() -> None:
    loaded = tiny("llama")
    asked = query(vocab_size=loaded.vocab_size)
    silent = replace(asked.sequences[1], want=asked.sequences[1].want * 0, ids=None)
    asked = replace(asked, sequences=(asked.sequences[0], silent, asked.sequences[2]))
    found = answered(scorer(loaded), asked)
    assert found[1].values == {}
    values_are(found[2], asked, 2, expected(loaded, asked, 2))


def test_wanted_names_all_there_is() -> None:
    assert set(WANTED) == {"sampled", "top", "ids", "logsumexp", "entropy", "hidden"}
