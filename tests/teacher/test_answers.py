"""What a teacher answers, against plain definitions in float64."""

from __future__ import annotations

import pytest
import torch

from opd.teacher import answers as module
from opd.teacher.answers import answers
from opd.teacher.query import WANTED
from opd.types import Unembedding

N, H, V, K = 7, 5, 11, 4
GROUPS = ((2, 9), (4, 0, 6))


def drawn(seed: int = 0) -> tuple[torch.Tensor, Unembedding, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(N, H, generator=generator, dtype=torch.float64)
    weight = torch.randn(V + 3, H, generator=generator, dtype=torch.float64)
    bias = torch.randn(V + 3, generator=generator, dtype=torch.float64)
    tokens = torch.randint(0, V, (N,), generator=generator)
    ids = torch.randint(0, V, (N, 3), generator=generator)
    return hidden, Unembedding(weight, V, bias, logit_scale=0.7, soft_cap=5.0), tokens, ids


def plain(hidden: torch.Tensor, head: Unembedding, temperature: float) -> torch.Tensor:
    """Probabilities by their definition, entry by entry."""
    assert head.bias is not None
    assert head.soft_cap is not None
    found = torch.zeros(N, V, dtype=torch.float64)
    for n in range(N):
        for v in range(V):
            logit = head.logit_scale * (hidden[n] @ head.weight[v] + head.bias[v])
            found[n, v] = head.soft_cap * torch.tanh(logit / head.soft_cap) / temperature
    found = found.exp()
    return found / found.sum(-1, keepdim=True)


def merged(probabilities: torch.Tensor) -> torch.Tensor:
    probabilities = probabilities.clone()
    for first, *others in GROUPS:
        for other in others:
            probabilities[:, first] += probabilities[:, other]
            probabilities[:, other] = 0.0
    return probabilities


@pytest.mark.parametrize("temperature", [1.0, 0.5])
@pytest.mark.parametrize("groups", [(), GROUPS])
@pytest.mark.parametrize("chunk_bytes", [1, 10**9])
def test_every_field_is_what_its_name_says(
    monkeypatch: pytest.MonkeyPatch,
    temperature: float,
    groups: tuple[tuple[int, ...], ...],
    chunk_bytes: int,
) -> None:
    monkeypatch.setattr(module, "CHUNK_BYTES", chunk_bytes)
    hidden, head, tokens, ids = drawn()
    found = answers(
        hidden,
        head,
        WANTED,
        tokens=tokens,
        top_k=K,
        ids=ids,
        temperature=temperature,
        merge_ids=groups,
    )
    expected = plain(hidden, head, temperature)
    if groups:
        expected = merged(expected)
    firsts = {other: first for first, *others in groups for other in others}
    for n in range(N):
        own = firsts.get(int(tokens[n]), int(tokens[n]))
        torch.testing.assert_close(found["sampled_logp"][n].exp(), expected[n, own])
        chosen = [firsts.get(int(i), int(i)) for i in ids[n]]
        torch.testing.assert_close(found["ids_logp"][n].exp(), expected[n, chosen])
        best = sorted(range(V), key=lambda v, n=n: -float(expected[n, v]))[:K]  # type: ignore[misc]
        assert found["top_ids"][n].tolist() == best
        torch.testing.assert_close(found["top_logp"][n].exp(), expected[n, best])
        mass = expected[n][expected[n] > 0]
        torch.testing.assert_close(found["entropy"][n], -(mass * mass.log()).sum())
    torch.testing.assert_close(found["hidden"], hidden)


def test_the_log_sum_exp_is_that_of_the_logits() -> None:
    hidden, head, tokens, _ = drawn()
    bare = Unembedding(head.weight, V)
    found = answers(hidden, bare, ["logsumexp"], tokens=tokens)["logsumexp"]
    for n in range(N):
        logits = [float(hidden[n] @ head.weight[v]) for v in range(V)]
        expected = torch.tensor(logits, dtype=torch.float64).exp().sum().log()
        assert float(found[n]) == pytest.approx(float(expected), rel=1e-12)


def test_hidden_states_alone_need_no_logits(monkeypatch: pytest.MonkeyPatch) -> None:
    def projected(*_: object) -> None:
        raise AssertionError("projected")

    monkeypatch.setattr(module.products, "logits_into", projected)
    hidden, head, tokens, _ = drawn()
    assert answers(hidden, head, ["hidden"], tokens=tokens)["hidden"] is hidden


def test_no_rows_are_no_rows() -> None:
    hidden, head, tokens, ids = drawn()
    found = answers(hidden[:0], head, WANTED, tokens=tokens[:0], top_k=K, ids=ids[:0])
    assert {name: len(value) for name, value in found.items()} == dict.fromkeys(found, 0)
    assert found["top_ids"].shape == (0, K)
