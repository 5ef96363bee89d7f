"""The buffer of recent text: what it holds, gives, forgets and writes down."""

from __future__ import annotations

import io
from collections.abc import Sequence

import torch
from tests.builders import rollout_of

from opd.rollout.pack import merge_rollouts
from opd.rollout.replay import ReplayBuffer
from opd.types import Prompt, Provenance, Rollout


def prompts_at(start: int, count: int) -> Sequence[Prompt]:
    return [Prompt(f"prompt {i}", (i, i + 1), "") for i in range(start, start + count)]


def written(step: int, start: int, prompts: int = 3, samples: int = 2) -> Rollout:
    """Two samples for each of three prompts; tokens say which step and row they are of."""
    rows = prompts * samples
    tokens = 100 * step + torch.arange(rows)[:, None] + torch.zeros(1, 4, dtype=torch.long)
    mask = torch.arange(4) < (1 + torch.arange(rows) % 4)[:, None]
    records = [prompt for prompt in prompts_at(start, prompts) for _ in range(samples)]
    return rollout_of(
        tokens,
        mask,
        torch.where(mask, int(Provenance.STUDENT), int(Provenance.PADDING)),
        prompt_ids=[prompt.prompt_ids for prompt in records],
        stop_reason=["eos", "length"] * prompts,
        sampler_logp=torch.randn(rows, 4).masked_fill(~mask, 0.0),
        policy_version=torch.where(mask, step, -1),
        group=torch.arange(prompts).repeat_interleave(samples),
        verdict=torch.rand(rows),
        reasons=tuple(f"step {step}, row {row}" for row in range(rows)),
        prompts=tuple(records),
        model_inputs=({},) * rows,
    )


def filled(seed: int = 0) -> ReplayBuffer:
    buffer = ReplayBuffer(2, seed=seed)
    for step in (1, 2):
        buffer.add(written(step, 3 * step), step=step, start=3 * step)
    return buffer


def ids(parts: Sequence[Rollout]) -> list[str]:
    return [prompt.id for part in parts for prompt in part.prompts]


def test_all_samples_of_a_prompt_come_together_and_no_prompt_twice() -> None:
    buffer = filled()
    for _ in range(20):
        drawn = buffer.draw(4)
        names = ids(drawn)
        assert len(set(names)) == 4
        assert all(names.count(name) == 2 for name in names)
        whole = merge_rollouts(drawn, pad_id=0)
        assert [whole.group.tolist().count(g) for g in set(whole.group.tolist())] == [2] * 4


def test_every_prompt_is_drawn_about_equally_often() -> None:
    """600 draws of 2 out of 6: each prompt 200 times in expectation, deviation about 12."""
    buffer = filled()
    names = [name for _ in range(600) for name in ids(buffer.draw(2))]
    assert len(set(names)) == 6
    assert all(140 < names.count(name) / 2 < 260 for name in set(names))


def test_tokens_come_back_as_they_were_written() -> None:
    buffer, original = ReplayBuffer(1, seed=0), written(5, 0)
    buffer.add(original, step=5, start=0)
    (drawn,) = buffer.draw(10)
    for name in ("tokens", "provenance", "sampler_logp", "policy_version"):
        own, inside = getattr(drawn, name), original.mask
        assert torch.equal(own[inside], getattr(original, name)[inside]), name
    assert torch.equal(drawn.mask, original.mask)
    assert torch.equal(drawn.verdict, original.verdict)
    assert drawn.stop_reason == original.stop_reason
    assert drawn.reasons == original.reasons


def test_text_older_than_the_window_is_forgotten() -> None:
    buffer = filled()
    buffer.forget(3)
    assert len(buffer) == 6
    buffer.forget(4)
    assert len(buffer) == 3
    assert set(ids(buffer.draw(9))) == {"prompt 6", "prompt 7", "prompt 8"}
    buffer.forget(5)
    assert buffer.draw(2) == []


def test_a_restored_buffer_goes_on_with_the_same_draws() -> None:
    buffer = filled()
    buffer.draw(3)
    file = io.BytesIO()
    torch.save(buffer.state(), file)
    file.seek(0)
    again = ReplayBuffer(2, seed=99)
    again.load_state(torch.load(file, weights_only=True), prompts_at)
    for _ in range(5):
        one, two = (merge_rollouts(each.draw(3), pad_id=0) for each in (buffer, again))
        assert one.prompts == two.prompts
        assert one.prompt_ids == two.prompt_ids
        assert one.stop_reason == two.stop_reason
        assert one.reasons == two.reasons
        for name in ("tokens", "sampler_logp", "policy_version", "group", "verdict", "mask"):
            assert torch.equal(getattr(one, name), getattr(two, name)), name
