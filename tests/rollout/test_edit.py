"""Rollouts cut, continued and put together again, against hand-written rows and re-forwards."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
from tests.builders import rollout_of
from tests.models_zoo import tiny

from opd.models import backbone, project, unembedding
from opd.rollout.edit import continued, cut, put, take, to_rewrite
from opd.rollout.local import LocalSampler
from opd.types import Prompt, Provenance, Rollout, SamplerSettings

PAD, STUDENT, TEACHER = (
    int(kind) for kind in (Provenance.PADDING, Provenance.STUDENT, Provenance.TEACHER)
)
SETTINGS = SamplerSettings(max_new_tokens=8)


def three() -> Rollout:
    """Responses (11, 12, 13), (21) and (31, 32), with log-probability -token."""
    tokens = torch.tensor([[11, 12, 13], [21, 0, 0], [31, 32, 0]])
    mask = tokens > 0
    return rollout_of(
        tokens,
        mask,
        torch.where(mask, STUDENT, PAD),
        prompt_ids=[(1,), (1,), (3,)],
        stop_reason=["length", "eos", "eos"],
        sampler_logp=-tokens.float(),
        policy_version=torch.where(mask, 7, -1),
        group=torch.tensor([0, 0, 1]),
        verdict=torch.tensor([0.0, 1.0, 0.25]),
        prompts=(Prompt("a", (1,), ""), Prompt("b", (1,), ""), Prompt("c", (3,), "")),
    )


def test_take_picks_sequences_in_the_order_asked_for() -> None:
    part = take(three(), [2, 1])
    assert part.tokens.tolist() == [[31, 32], [21, 0]]
    assert part.sampler_logp.tolist() == [[-31, -32], [-21, 0]]
    assert part.prompt_ids == ((3,), (1,))
    assert part.group.tolist() == [1, 0]
    assert part.stop_reason == ("eos", "eos")
    assert part.verdict.tolist() == [0.25, 1.0]
    assert [prompt.id for prompt in part.prompts] == ["c", "b"]


def test_put_replaces_sequences_and_leaves_the_others() -> None:
    longer = replace(take(three(), [0]), stop_reason=("stop_string",), verdict=torch.tensor([0.5]))
    again = put(take(three(), [1, 2]), [0], longer)
    assert again.tokens.tolist() == [[11, 12, 13], [31, 32, 0]]
    assert again.mask.tolist() == [[True] * 3, [True, True, False]]
    assert again.policy_version.tolist() == [[7, 7, 7], [7, 7, -1]]
    assert again.stop_reason == ("stop_string", "eos")
    assert again.verdict.tolist() == [0.5, 0.25]
    assert again.group.tolist() == [0, 1]


def test_reasons_go_where_their_sequences_go() -> None:
    judged = replace(three(), reasons=("a", "b", "c"))
    assert take(judged, [2, 0]).reasons == ("c", "a")
    assert take(three(), [2, 0]).reasons == ()
    assert put(judged, [1], take(judged, [2])).reasons == ("a", "c", "c")
    assert put(judged, [1], take(three(), [2])).reasons == ("a", "", "c")
    assert put(three(), [1], take(judged, [2])).reasons == ("", "c", "")
    assert put(three(), [1], take(three(), [2])).reasons == ()
    assert cut(judged, 1).reasons == ("a", "b", "c")


def test_cut_ends_by_length_only_what_loses_tokens() -> None:
    short = cut(three(), 2)
    assert short.tokens.tolist() == [[11, 12], [21, 0], [31, 32]]
    assert short.lengths.tolist() == [2, 1, 2]
    assert short.stop_reason == ("length", "eos", "eos")
    assert cut(three(), torch.tensor([3, 1, 1])).stop_reason == ("length", "eos", "length")
    assert cut(three(), torch.tensor([3, 1, 1])).tokens.tolist()[2] == [31, 0, 0]


@pytest.mark.parametrize(
    ("share", "kept"),
    [
        (1.0, [0, 0]),
        (0.5, [1, 1]),  # of three tokens ceil(1.5) = 2 go, of two tokens 1
        (0.01, [2, 1]),  # at least one token is written anew
    ],
)
def test_wrong_responses_keep_what_the_share_leaves(share: float, kept: list[int]) -> None:
    assert to_rewrite(three(), share, among=range(3)) == ([0, 2], kept)


def test_what_was_not_judged_or_not_asked_about_is_not_wrong() -> None:
    unjudged = replace(three(), verdict=torch.tensor([math.nan, 0.0, 0.0]))
    assert to_rewrite(unjudged, 1.0, among=range(3))[0] == [1, 2]
    assert to_rewrite(unjudged, 1.0, among=range(2))[0] == [1]


# --------------------------------------------------------------------------------------------
# Continuing


TEACHER_MODEL = tiny("llama", seed=1)
BEGUN = LocalSampler(tiny("qwen3")).sample(
    [Prompt("a", (5, 9, 11), ""), Prompt("b", (7,), ""), Prompt("c", (4, 30), "")],
    replace(SETTINGS, samples_per_prompt=2),
    generator=torch.Generator().manual_seed(2),
    policy_version=4,
)


class Writer:
    """The teacher, two prompts at a time; remembers how many calls that took."""

    def __init__(self) -> None:
        self.calls = 0
        self._sampler = LocalSampler(TEACHER_MODEL, provenance=Provenance.TEACHER)
        self._generator = torch.Generator().manual_seed(5)

    def __call__(self, prompts: Sequence[Prompt], settings: SamplerSettings) -> list[Rollout]:
        self.calls += 1
        return [
            self._sampler.sample(prompts[i : i + 2], settings, generator=self._generator)
            for i in range(0, len(prompts), 2)
        ]


def keep_some() -> list[int]:
    return [min(b, n - 1) for b, n in enumerate(BEGUN.lengths.tolist())]


@pytest.mark.parametrize(("positions", "calls"), [(None, 1), (1000, 1), (9, None)])
def test_a_continued_response_keeps_its_beginning_and_who_wrote_it(
    positions: int | None, calls: int | None
) -> None:
    keep, writer = keep_some(), Writer()
    assert max(keep) >= 3
    assert min(keep) == 0
    rollout = continued(BEGUN, keep, writer, SETTINGS, tokenizer=None, positions=positions)
    assert writer.calls == (calls or len(set(keep)))
    for row, kept in enumerate(keep):
        for name in ("tokens", "mask", "provenance", "sampler_logp", "policy_version"):
            assert torch.equal(
                getattr(rollout, name)[row, :kept], getattr(BEGUN, name)[row, :kept]
            ), name
        length = int(rollout.lengths[row])
        assert kept < length <= SETTINGS.max_new_tokens
        assert rollout.provenance[row, kept:length].eq(TEACHER).all()
        assert rollout.policy_version[row, kept:length].eq(0).all()
        ended = int(rollout.tokens[row, length - 1]) in TEACHER_MODEL.eos_ids
        assert rollout.stop_reason[row] == ("eos" if ended else "length")
        assert ended or length == SETTINGS.max_new_tokens
    assert torch.equal(rollout.mask, rollout.provenance != PAD)
    assert rollout.prompt_ids == BEGUN.prompt_ids
    assert rollout.prompts == BEGUN.prompts
    assert torch.equal(rollout.group, BEGUN.group)
    assert bool(rollout.verdict.isnan().all())


@torch.no_grad()
def test_the_continuation_has_the_writers_log_probability_given_what_was_kept() -> None:
    keep = keep_some()
    rollout = continued(BEGUN, keep, Writer(), SETTINGS, tokenizer=None)
    head = unembedding(TEACHER_MODEL.model, TEACHER_MODEL.vocab_size)
    for row, prompt in enumerate(rollout.prompt_ids):
        n = int(rollout.lengths[row])
        tokens = rollout.tokens[row, :n]
        ids = torch.tensor([*prompt, *tokens.tolist()])[None]
        hidden = backbone(TEACHER_MODEL.model)(input_ids=ids).last_hidden_state[0]
        log_probs = project(hidden[len(prompt) - 1 : -1], head).log_softmax(-1)
        expected = log_probs.gather(1, tokens[:, None]).squeeze(1)
        error = (rollout.sampler_logp[row, :n] - expected)[keep[row] :].abs().max()
        assert float(error) <= 1e-5


def test_a_stop_string_may_begin_in_what_was_kept() -> None:
    """The tokenizer writes one character per token: the first kept one and the next end it."""
    tokenizer = TEACHER_MODEL.tokenizer
    keep = [1] * len(BEGUN.prompt_ids)
    free = continued(BEGUN, keep, Writer(), SETTINGS, tokenizer=tokenizer)
    row = next(row for row, n in enumerate(free.lengths.tolist()) if n > 2)
    stop = str(tokenizer.decode(free.tokens[row, :2]))
    assert len(stop) == 2
    stopping = replace(SETTINGS, stop=(stop,))
    ended = continued(BEGUN, keep, Writer(), stopping, tokenizer=tokenizer)
    assert int(ended.lengths[row]) == 2
    assert ended.stop_reason[row] == "stop_string"
    assert torch.equal(ended.tokens[row, :2], free.tokens[row, :2])
