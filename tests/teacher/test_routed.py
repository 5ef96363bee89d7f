"""Several teachers behind one view, in float64, held to a forward per sequence by its own teacher.

The models normalise layers in the dtype of their weights, so that batching moves nothing beyond
the last bits.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from opd.data.prompts import PromptSettings
from opd.errors import ConfigError, DataError, TeacherError
from opd.formula import credit, divergence, reward, support
from opd.head import log_probs_of
from opd.models import LoadedModel
from opd.objective import Dense, Method, Objective, Sampled
from opd.rollout.pack import pack_rollout, split, with_token
from opd.student import Student
from opd.teacher.context import ContextEncoder
from opd.teacher.local import LocalTeacher
from opd.teacher.routed import RoutedTeacher, Router
from opd.training import step as steps
from opd.training.plan import make_plan
from opd.types import (
    Batch,
    Need,
    Prompt,
    Provenance,
    Rollout,
    SamplerSettings,
    TeacherRequest,
    TeacherScores,
    TeacherView,
    Unembedding,
)
from tests.models_zoo import BOS, EOS, PAD, tiny, tiny_tokenizer

VOCAB = 53
REVERSE_KL = Dense(divergence=divergence.reverse_kl)
RETURNS = Sampled(reward=reward.teacher_log_ratio, credit=credit.return_to_go)
TOP_K = replace(REVERSE_KL, support=partial(support.teacher_top_k, k=5), tail="bucket")
ROUTES = ("wide", "narrow", "wide", "other", "narrow", "wide")
LENGTHS = (5, 3, 0, 6, 1, 4)
NAMES = ("narrow", "other", "wide")


def double(family: str, **settings: Any) -> LoadedModel:
    loaded = tiny(family, **settings)
    model: Any = loaded.model
    model.double()
    return loaded


@pytest.fixture(scope="module")
def models() -> dict[str, LoadedModel]:
    """Teachers of different width, unembedding and padding."""
    return {
        "narrow": double("gpt2", seed=1, hidden=16),
        "other": double("gpt_neox", seed=2, padded_to=64),
        "wide": double("phi", seed=3, hidden=48),
    }


@pytest.fixture(scope="module")
def loaded() -> LoadedModel:
    return double("gpt2", seed=7)


@pytest.fixture
def student(loaded: LoadedModel) -> Student:
    return Student(loaded, vocab_size=VOCAB)


def written(routes: Sequence[str] = ROUTES, lengths: Sequence[int] = LENGTHS) -> Rollout:
    """Responses with a gap of a tool's in each of four tokens and more."""
    draw = torch.Generator().manual_seed(0)
    tokens = torch.randint(3, VOCAB, (len(lengths), max(lengths)), generator=draw)
    inside = torch.arange(max(lengths)) < torch.tensor(lengths).unsqueeze(1)
    tokens[1, 2] = EOS
    mask = inside.clone()
    mask[:, 1] &= torch.tensor([length < 4 for length in lengths])
    prompts = tuple(
        Prompt(f"p{i}", (BOS, *range(3, 5 + i)), f"S{i}:", answer="12", columns={"who": route})
        for i, route in enumerate(routes)
    )
    written_by = torch.where(mask, int(Provenance.STUDENT), int(Provenance.TOOL))
    return Rollout(
        prompt_ids=tuple(prompt.prompt_ids for prompt in prompts),
        tokens=tokens,
        mask=mask,
        provenance=torch.where(inside, written_by, int(Provenance.PADDING)),
        sampler_logp=torch.zeros(tokens.shape, dtype=torch.float64),
        policy_version=torch.zeros_like(tokens),
        group=torch.arange(len(lengths)),
        stop_reason=("eos",) * len(lengths),
        verdict=torch.zeros(len(lengths)),
        prompts=prompts,
    )


def packed(rollout: Rollout, merge_ids: tuple[tuple[int, ...], ...] = ()) -> Batch:
    return pack_rollout(rollout, pad_id=PAD, merge_ids=merge_ids)


def routed(models: Mapping[str, LoadedModel], max_tokens: int = 1000) -> RoutedTeacher:
    teachers = {
        name: LocalTeacher(model, vocab_size=VOCAB, max_tokens=max_tokens)
        for name, model in models.items()
    }
    return RoutedTeacher(teachers, Router("who", tuple(models)))


def alone(model: LoadedModel, prompt: Sequence[int], response: Sequence[int]) -> Tensor:
    """Log-probabilities of each response token's choice, from one forward of one sequence."""
    call: Any = model.model
    logits = call(torch.tensor([[*prompt, *response]])).logits[0, :, :VOCAB]
    return logits[len(prompt) - 1 : len(prompt) - 1 + len(response)].log_softmax(-1)


def merged(log_probs: Tensor, group: tuple[int, ...]) -> Tensor:
    """Probabilities with a group's mass under its first id; the other ids are left out."""
    probs = log_probs.exp()
    first = probs[:, list(group)].sum(-1, keepdim=True)
    keep = [i for i in range(VOCAB) if i not in group]
    return torch.cat([first, probs[:, keep]], -1)


def expected(
    student: Student,
    models: Mapping[str, LoadedModel],
    rollout: Rollout,
    group: tuple[int, ...] = (EOS,),
    suffix: str = "",
) -> tuple[float, dict[str, Tensor]]:
    """The mean reverse KL of every sequence to its own teacher, and its gradient, by hand."""
    rows = []
    for b, prompt in enumerate(rollout.prompts):
        response = rollout.tokens[b, : LENGTHS[b]].tolist()
        own = merged(alone(student.loaded, prompt.prompt_ids, response), group)
        read = prompt.prompt_ids
        if suffix:
            read = (BOS, *tiny_tokenizer()(prompt.text + suffix)["input_ids"])
        with torch.no_grad():
            theirs = merged(alone(models[prompt.columns["who"]], read, response), group)
        kl = (own * (own.log() - theirs.log())).sum(-1)
        rows.append(kl[rollout.mask[b, : LENGTHS[b]]])
    loss = torch.cat(rows).mean()
    student.zero_grad(set_to_none=True)
    loss.backward()
    return float(loss.detach()), gradients(student)


def gradients(student: Student) -> dict[str, Tensor]:
    return {
        name: parameter.grad.clone()
        for name, parameter in student.trainable().items()
        if parameter.grad is not None
    }


def updated(
    student: Student,
    teacher: RoutedTeacher,
    rollout: Rollout,
    objective: Objective,
    *,
    batch: Batch | None = None,
    max_tokens: int = 1000,
    context: str = "",
) -> tuple[float, dict[str, Tensor], Batch]:
    """Score, signal and update as the loop does: loss, gradient and the scored batch."""
    batch = packed(rollout) if batch is None else batch
    method = Method(objective, views=(TeacherView(context=context),))
    plan = make_plan(method, SamplerSettings(max_new_tokens=8), merge_ids=batch.merge_ids)
    encoder = ContextEncoder(tiny_tokenizer(), PromptSettings())
    contexts = steps.privileged(rollout, batch, plan, encoder, pad_id=PAD)
    scored = steps.score(
        {"teacher": teacher}, batch, objective, plan, contexts=contexts, prompts=rollout.prompts
    )
    ready = steps.signal(student, scored, objective, plan, max_tokens, fresh=False)
    student.zero_grad(set_to_none=True)
    stats = steps.update(student, ready, objective, max_tokens, step=1)
    loss = sum(stat.mean for name, stat in stats.items() if name.startswith("loss/"))
    return loss, gradients(student), scored


def assert_close(ours: Mapping[str, Tensor], theirs: Mapping[str, Tensor]) -> None:
    assert ours.keys() == theirs.keys()
    assert max(float(value.abs().max()) for value in theirs.values()) > 1e-3
    for name, value in theirs.items():
        assert (ours[name] - value).abs().max() <= 1e-12, name


# --------------------------------------------------------------------------------------------
# Scores


@pytest.mark.parametrize("max_tokens", [1000, 13])
def test_every_row_is_scored_by_its_own_teacher_as_if_alone(
    models: dict[str, LoadedModel], student: Student, max_tokens: int
) -> None:
    rollout, objective = written(), Objective(REVERSE_KL)
    loss, gradient = expected(student, models, rollout)
    teacher = routed(models, max_tokens)
    ours, own, _ = updated(student, teacher, rollout, objective, max_tokens=max_tokens)
    assert ours == pytest.approx(loss, abs=1e-12)
    assert_close(own, gradient)


def test_a_group_of_end_tokens_counts_as_one_for_every_teacher(
    models: dict[str, LoadedModel], student: Student
) -> None:
    group = (EOS, 9, 30)
    rollout = written()
    loss, gradient = expected(student, models, rollout, group)
    batch = packed(rollout, (group,))
    ours, own, _ = updated(student, routed(models), rollout, Objective(REVERSE_KL), batch=batch)
    assert ours == pytest.approx(loss, abs=1e-12)
    assert_close(own, gradient)


def test_each_teacher_reads_its_sequences_in_their_context(
    models: dict[str, LoadedModel], student: Student
) -> None:
    rollout = written()
    loss, gradient = expected(student, models, rollout, suffix="#12")
    ours, own, _ = updated(
        student, routed(models), rollout, Objective(REVERSE_KL), context="{prompt}#{answer}"
    )
    assert ours == pytest.approx(loss, abs=1e-12)
    assert_close(own, gradient)


def test_a_second_update_on_the_same_rollout_keeps_every_rows_teacher(
    models: dict[str, LoadedModel], student: Student
) -> None:
    rollout, objective, teacher = written(), Objective(REVERSE_KL), routed(models)
    _, _, scored = updated(student, teacher, rollout, objective)
    before = {name: value.detach().clone() for name, value in student.trainable().items()}
    try:
        with torch.no_grad():
            for parameter in student.trainable().values():
                parameter.add_(0.02)
        plan = make_plan(Method(objective), SamplerSettings(max_new_tokens=8))
        again = steps.score(
            {"teacher": teacher}, scored, objective, plan, prompts=rollout.prompts, again=True
        )
        assert again.token.views.get("teacher") is scored.token.views["teacher"]
        student.zero_grad(set_to_none=True)
        stats = steps.update(student, again, objective, 13, step=1)
        own = gradients(student)
        loss, gradient = expected(student, models, rollout)
    finally:
        with torch.no_grad():
            for name, parameter in student.trainable().items():
                parameter.copy_(before[name])
    assert stats["loss/dense"].mean == pytest.approx(loss, abs=1e-12)
    assert_close(own, gradient)


@pytest.mark.parametrize("term", [RETURNS, TOP_K], ids=["numbers of tokens", "own top tokens"])
def test_a_route_is_the_sum_of_its_parts_whatever_the_objective_reads(
    models: dict[str, LoadedModel], student: Student, term: Any
) -> None:
    """Against the same batch scored as a whole by each teacher, rows chosen afterwards."""
    rollout, objective = written(), Objective(term)
    _, own, scored = updated(student, routed(models), rollout, objective)
    plan = make_plan(Method(objective), SamplerSettings(max_new_tokens=8))
    whole = {
        name: steps.score(
            {"teacher": LocalTeacher(model, vocab_size=VOCAB)}, packed(rollout), objective, plan
        ).token.views["teacher"]
        for name, model in models.items()
    }
    asks = [name for b, name in enumerate(ROUTES) for _ in range(int(rollout.mask[b].sum()))]
    if term is RETURNS:
        told = torch.stack([whole[n].sampled_logp[r] for r, n in enumerate(asks)])  # type: ignore[index]
        by_hand = TeacherScores(sampled_logp=told)
    else:
        rows = []
        for row, name in enumerate(asks):
            states, head = whole[name].hidden, whole[name].unembedding
            assert states is not None
            assert head is not None
            rows.append(log_probs_of(states[row : row + 1], head))
        by_hand = TeacherScores(log_probs=torch.cat(rows))
    batch = with_token(packed(rollout), views={"teacher": by_hand})
    ready = steps.signal(student, batch, objective, plan, 1000, fresh=False)
    student.zero_grad(set_to_none=True)
    steps.update(student, ready, objective, 13, step=1)
    assert_close(own, gradients(student))
    names = scored.token.views["teacher"].names
    assert [names[place] for place in scored.token.views["teacher"].answered_by] == asks  # type: ignore[union-attr]


def test_asked_for_entries_each_teacher_answers_with_its_own(
    models: dict[str, LoadedModel],
) -> None:
    rollout = written()
    batch = packed(rollout)
    rows = len(batch.row_index)
    ids = torch.arange(rows * 3).reshape(rows, 3) % VOCAB
    request = TeacherRequest(
        batch, False, True, top_k=4, ids=ids, entropy=True, prompts=rollout.prompts
    )
    reply = routed(models).score(request)
    assert reply.hidden is None
    assert reply.heads == ()
    row = 0
    for b, prompt in enumerate(rollout.prompts):
        response = rollout.tokens[b, : LENGTHS[b]].tolist()
        with torch.no_grad():
            theirs = alone(models[ROUTES[b]], prompt.prompt_ids, response)
        for place in rollout.mask[b].nonzero().flatten().tolist():
            log_probs = theirs[place]
            assert (reply.ids_logp[row] - log_probs[ids[row]]).abs().max() <= 1e-12  # type: ignore[index]
            assert (reply.top_logp[row] - log_probs.topk(4).values).abs().max() <= 1e-12  # type: ignore[index]
            assert reply.sampled_logp[row] == pytest.approx(  # type: ignore[index]
                float(log_probs[response[place]]), abs=1e-12
            )
            entropy = float(-(log_probs.exp() * log_probs).sum())
            assert float(reply.entropy[row]) == pytest.approx(entropy, abs=1e-12)  # type: ignore[index]
            row += 1
    assert row == rows


def test_metrics_tell_each_teachers_share_and_log_ratio(
    models: dict[str, LoadedModel], student: Student
) -> None:
    rollout = written()
    plan = make_plan(Method(Objective(REVERSE_KL)), SamplerSettings(max_new_tokens=8))
    objective = Objective(REVERSE_KL)
    scored = steps.score(
        {"teacher": routed(models)}, packed(rollout), objective, plan, prompts=rollout.prompts
    )
    stats = steps.update(student, scored, objective, 13, step=1)
    total = int(rollout.mask.sum())
    for name in NAMES:
        own, ratios = 0, []
        for b, prompt in enumerate(rollout.prompts):
            if ROUTES[b] != name:
                continue
            response = rollout.tokens[b, : LENGTHS[b]].tolist()
            with torch.no_grad():
                pair = [
                    alone(model, prompt.prompt_ids, response)
                    for model in (models[name], student.loaded)
                ]
            for place in rollout.mask[b].nonzero().flatten().tolist():
                own += 1
                ratios.append(float((pair[0] - pair[1])[place, response[place]]))
        share, ratio = stats[f"teacher/{name}/share"], stats[f"teacher/{name}/log_ratio"]
        assert (share.total, share.count) == (own, total)
        assert ratio.count == own
        assert ratio.mean == pytest.approx(sum(ratios) / own, abs=1e-12)
    took = steps.teacher_seconds(scored.token.views)
    assert set(took) == {f"teacher/{name}/seconds" for name in NAMES}
    assert all(stat.total > 0 for stat in took.values())


def test_a_teacher_to_whom_nobody_goes_is_not_asked_and_has_no_share(
    models: dict[str, LoadedModel], student: Student
) -> None:
    rollout = written(("wide", "narrow") * 3)
    teacher = routed(models)
    teacher.teachers["other"] = Silent()
    ours, _, scored = updated(student, teacher, rollout, Objective(REVERSE_KL))
    reply = scored.token.views["teacher"]
    assert reply.heads[1] is None
    assert set(reply.seconds) == {"narrow", "wide"}
    out = student(scored, Objective(REVERSE_KL))
    assert out.stats["teacher/other/share"].total == 0
    assert "teacher/other/log_ratio" not in out.stats
    assert ours > 0


def test_a_batch_without_a_row_has_an_answer_too(models: dict[str, LoadedModel]) -> None:
    rollout = written()
    empty = replace(rollout, mask=torch.zeros_like(rollout.mask))
    reply = routed(models).score(TeacherRequest(packed(empty), prompts=rollout.prompts))
    assert reply.hidden is not None
    assert reply.hidden.shape[0] == 0


class Silent:
    """A teacher that may not be asked."""

    def score(self, request: TeacherRequest) -> TeacherScores:
        raise AssertionError("asked")

    def can(self, need: Need) -> bool:
        return need.field == "logp"


class Partial:
    """Answers every second row, by a `row_index` of its own, with a distribution in the open."""

    def score(self, request: TeacherRequest) -> TeacherScores:
        rows = len(request.batch.row_index)
        index = torch.full((rows,), -1)
        index[::2] = torch.arange(len(index[::2]))
        return TeacherScores(sampled_logp=-torch.arange(1.0, len(index[::2]) + 1), row_index=index)

    def can(self, need: Need) -> bool:
        return True


def test_rows_that_a_routed_teacher_leaves_out_stay_out() -> None:
    rollout = written(("a", "b") * 3)
    teacher = RoutedTeacher({"a": Partial(), "b": Partial()}, Router("who", ("a", "b")))
    reply = teacher.score(TeacherRequest(packed(rollout), prompts=rollout.prompts))
    counts = rollout.mask.sum(1).tolist()
    told: list[float | None] = [None] * sum(counts)
    for name in ("a", "b"):
        rows = [
            row
            for b, first in enumerate([sum(counts[:b]) for b in range(len(counts))])
            if ("a", "b")[b % 2] == name
            for row in range(first, first + counts[b])
        ]
        for place, row in enumerate(rows):
            told[row] = None if place % 2 else -(place // 2 + 1.0)
    assert reply.row_index is not None
    assert reply.sampled_logp is not None
    for row, value in enumerate(told):
        at = int(reply.row_index[row])
        assert at == -1 if value is None else float(reply.sampled_logp[at]) == value


# --------------------------------------------------------------------------------------------
# What does not go together


def test_teachers_that_answer_in_different_forms_are_refused(
    models: dict[str, LoadedModel],
) -> None:
    class Numbers(LocalTeacher):
        def score(self, request: TeacherRequest) -> TeacherScores:
            return super().score(replace(request, distribution=False, sampled=True))

    teacher, rollout = routed(models), written()
    teacher.teachers["other"] = Numbers(models["other"], vocab_size=VOCAB)
    with pytest.raises(TeacherError, match="answered with 'hidden' and some did not"):
        teacher.score(TeacherRequest(packed(rollout), prompts=rollout.prompts))


def test_a_teacher_of_another_vocabulary_is_refused(models: dict[str, LoadedModel]) -> None:
    class Foreign(LocalTeacher):
        def score(self, request: TeacherRequest) -> TeacherScores:
            return replace(super().score(request), id_map=torch.arange(VOCAB))

    teacher, rollout = routed(models), written()
    teacher.teachers["other"] = Foreign(models["other"], vocab_size=VOCAB)
    with pytest.raises(TeacherError, match="'other' has another vocabulary"):
        teacher.score(TeacherRequest(packed(rollout), prompts=rollout.prompts))


def test_a_route_without_prompts_is_refused(models: dict[str, LoadedModel]) -> None:
    with pytest.raises(TeacherError, match="6 sequences, and the request has 0 prompts"):
        routed(models).score(TeacherRequest(packed(written())))


def test_a_route_can_what_all_of_its_teachers_can(models: dict[str, LoadedModel]) -> None:
    teacher = routed(models)
    assert teacher.can(Need("teacher", "log_probs", "full"))
    teacher.teachers["other"] = Silent()
    assert teacher.can(Need("teacher", "logp", "sampled"))
    assert not teacher.can(Need("teacher", "log_probs", "full"))


# --------------------------------------------------------------------------------------------
# Whom a prompt goes to


def test_a_column_names_the_teacher() -> None:
    prompt = Prompt("x.jsonl:3", (3,), "A", columns={"who": "b", "n": 3})
    assert Router("who", ("a", "b"))(prompt) == "b"
    with pytest.raises(DataError, match=r"x\.jsonl:3: teacher\.route = 'task' reads that column.*"):
        Router("task", ("a", "b"))(prompt)
    with pytest.raises(DataError, match=r"'who' says 'b', and there is no \[teachers\.b\]"):
        Router("who", ("a", "c"))(prompt)
    with pytest.raises(DataError, match=r"'n' says 3, which is of type int; .* as a text: a, 3"):
        Router("n", ("a", "3"))(prompt)


def test_a_function_names_the_teacher(tmp_path: Path) -> None:
    (tmp_path / "routes.py").write_text(
        "def by_letter(prompt):\n    return {'A': 'add', 'S': 'sort'}[prompt.text[0]]\n"
    )
    route = Router("routes:by_letter", ("add", "sort"), tmp_path)
    assert route(Prompt("p", (3,), "S12:")) == "sort"
    with pytest.raises(DataError, match=r"failed on prompt p: KeyError: 'C'"):
        route(Prompt("p", (3,), "C12:"))
    with pytest.raises(ConfigError, match="no function 'by_word'"):
        Router("routes:by_word", ("add",), tmp_path)


def test_entries_and_heads_are_what_a_micro_batch_of_it_needs(
    models: dict[str, LoadedModel],
) -> None:
    rollout = written()
    batch = packed(rollout)
    reply = routed(models).score(TeacherRequest(batch, prompts=rollout.prompts))
    assert reply.hidden is not None
    assert reply.hidden.shape[1] == 48
    assert reply.answered_by is not None
    for part in split(with_token(batch, views={"teacher": reply}), max_tokens=12):
        own = part.batch.token.views["teacher"]
        assert torch.equal(own.answered_by, reply.answered_by[part.rows])  # type: ignore[arg-type]
        assert own.heads is reply.heads
    assert {head.weight.shape[1] for head in reply.heads if isinstance(head, Unembedding)} == {
        16,
        32,
        48,
    }
