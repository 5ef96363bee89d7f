"""Whether student, teacher, sampler and data mean the same tokens: audits of a probe.

Most faults of an interface cost no error and a run. Each audit is found or not by a rule that
needs no threshold, or one whose bound stands here with its origin.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from opd.data.chat import encode_prompts, encode_rendered, render_chat
from opd.diagnose import excess_id_ratio, retokenised_share
from opd.diagnose.evidence import Evidence
from opd.diagnose.numbers import mean, places
from opd.diagnose.profiles import Profiles
from opd.diagnose.staleness import log_mismatch
from opd.errors import OpdError
from opd.models import LoadedModel
from opd.teacher.identity import identity_without_weights
from opd.training import conflict
from opd.training import step as steps
from opd.training.pilot import Pilot, scored
from opd.training.pilot_gradients import Gradients, some_entries
from opd.training.teachers import Served
from opd.types import Prompt, with_parts

APART = 2.5
"""Nats between two teachers of the same rows beyond which an average of them is neither: what is
too much for a student to learn from one of them (`marginal_info`); of two tasks they are 9 and
more, benchmarks/results/two_teachers.json."""
ENGINE_NOISE = 1e-3
"""Nats between sampler and learner: the built-in sampler in float32 has 2e-7 to 1e-6, and what is
above this is no rounding of that precision; M, benchmarks/results/probe.json."""
ENGINE_NOISE_16_BIT = 0.02
"""The same where the student has 16 bits: in bfloat16 the embedded default's student has 0.0025 to
0.0027 untrained and 0.0044 to 0.0049 after 60 steps of warm-up, two seeds each; four times that."""
ENGINE_FAULT = 0.1
"""Nats between sampler and learner from which no verdict can be trusted: `something_to_learn`, the
smallest number in nats that a verdict is about, is `unfit` below 0.08 and `fit` above 0.13."""
PLUMBING = 1e-2
"""Share of the run's gradient that may be left where the student is its own teacher: the embedded
default has 0; M, benchmarks/results/probe.json."""
FIRST_TOKEN = 5.0
"""Nats by which the |log ratio| of first tokens exceeds that of later ones: of three tasks 2.2 and
less where nothing is wrong, 2.3 of a student that has learnt nothing, and 7.8 and more where the
teacher's prompt ends in one more token. Their ratio does not tell them apart: where later tokens
agree well, a first one that is still to be learnt stands out. M, benchmarks/results/probe.json."""
SPECIAL_IDS = 6.0
"""Nats by which the |log ratio| of a special or end token exceeds that of all others: of three
tasks 1.9 and less where the two end alike, 10 and more where the teacher's end token has another
id; M, benchmarks/results/probe.json."""
LISTED = 5
"""Ids with the largest mean |log ratio|."""
SEEN = 5
"""Rows of an id below which its mean is chance."""


@dataclass(frozen=True)
class Audit:
    """One question to the interface.

    Attributes:
        name: of the question.
        found: whether something is wrong.
        message: what was seen; what to do where something is wrong.
        setting: key of the run file to change.
        numbers: behind the message.
        urgent: whether no verdict can be trusted before it is mended.
    """

    name: str
    found: bool
    message: str
    setting: str = ""
    numbers: Mapping[str, Any] = field(default_factory=dict)
    urgent: bool = True


def audits(
    pilot: Pilot, evidence: Evidence, along: Profiles, gradients: Gradients
) -> tuple[Audit, ...]:
    """All audits, those that found something first."""
    found = [
        *_identities(pilot),
        *_prompts(pilot),
        _retokenised(pilot),
        _temperature(pilot),
        _ids(pilot, evidence),
        *_ends(pilot, evidence),
        _first_token(pilot, evidence, along),
        _engine(pilot, evidence),
        *_own_teacher(gradients),
        *_conflict(pilot),
    ]
    return tuple(sorted(found, key=lambda audit: not audit.found))


# --------------------------------------------------------------------------------------------
# Who is who


def _teachers(pilot: Pilot) -> Iterator[tuple[str, Any]]:
    """Models here and servers, by the section of the run file."""
    opened = pilot.session.opened
    named = {"teacher": opened.own, **opened.further}
    for name, one in named.items():
        if isinstance(one, LoadedModel | Served):
            yield name.replace("teacher.", "teachers."), one


def _identities(pilot: Pilot) -> Iterator[Audit]:
    """Vocabulary, chat template and end tokens of the student and of every teacher."""
    student = pilot.session.student.loaded
    own = identity_without_weights(student)
    for name, teacher in _teachers(pilot):
        other = (
            teacher.described if isinstance(teacher, Served) else identity_without_weights(teacher)
        )
        for what, mine, theirs, setting in (
            ("vocabulary", own.vocabulary, other.vocabulary, f"{name}.model"),
            ("chat template", own.template, other.template, "data.chat_template_kwargs"),
            (
                "end tokens",
                tuple(sorted(own.special["eos"])),
                tuple(sorted(other.special.get("eos", ()))),
                "method.merge_stop_ids",
            ),
        ):
            # templates matter where prompts are rendered, end tokens where they are not merged
            read = what != "chat template" or any(p.messages for p in pilot.rollout.prompts)
            read = read and not (what == "end tokens" and pilot.session.merge_ids)
            differs = mine != theirs and read
            yield Audit(
                f"{what} of {name}",
                differs,
                f"the student's is {mine!r}, {name}'s is {theirs!r}"
                if mine != theirs
                else f"equal: {mine!r}",
                setting if differs else "",
                {"student": mine, "teacher": theirs},
            )


def _prompts(pilot: Pilot) -> Iterator[Audit]:
    """The rendered prompts token for token: as the run reads them, and as a teacher would."""
    for name, teacher in _teachers(pilot):
        if not isinstance(teacher, LoadedModel):
            continue
        different = []
        prompts = {prompt.id: prompt for prompt in pilot.rollout.prompts}
        for prompt in list(prompts.values())[:16]:
            theirs = _rendered(pilot, prompt, teacher.tokenizer)
            if theirs is not None and theirs != prompt.prompt_ids:
                different.append(_first_difference(prompt, theirs, teacher.tokenizer))
        yield Audit(
            f"prompts as {name} renders them",
            bool(different),
            f"{len(different)} of {min(16, len(prompts))} differ; {different[0]}"
            if different
            else "equal, token for token",
            "data.chat_template_kwargs" if different else "",
            {"different": len(different)},
        )


def _rendered(pilot: Pilot, prompt: Prompt, tokenizer: Any) -> tuple[int, ...] | None:
    """A prompt by another tokenizer and its own template; None where it has no way to."""
    kwargs = pilot.session.config.data.chat_template_kwargs
    try:
        if prompt.messages:
            text = render_chat(
                prompt.messages, tokenizer, chat_template_kwargs=kwargs, add_generation_prompt=True
            )
            return tuple(encode_rendered(text, tokenizer))
        return encode_prompts([prompt.text], tokenizer)[0]
    except OpdError:
        return None


def _first_difference(prompt: Prompt, theirs: Sequence[int], tokenizer: Any) -> str:
    pairs = zip(prompt.prompt_ids, theirs, strict=False)
    place = next(
        (i for i, (one, other) in enumerate(pairs) if one != other),
        min(len(prompt.prompt_ids), len(theirs)),
    )

    def at(ids: Sequence[int]) -> str:
        return repr(tokenizer.decode([ids[place]])) if place < len(ids) else "the end"

    return f"{prompt.id} at token {place}: {at(prompt.prompt_ids)} and {at(theirs)}"


# --------------------------------------------------------------------------------------------
# Text, temperature, ids, ends


def _retokenised(pilot: Pilot) -> Audit:
    """Whether answers come back as the same tokens once decoded and encoded again."""
    tokenizer, rollout = pilot.session.tokenizer, pilot.rollout
    ends = set(pilot.session.student.loaded.eos_ids) | set(tokenizer.all_special_ids)
    lengths = rollout.lengths.tolist()
    ids = [
        [token for token in row[:length] if token not in ends]
        for row, length in zip(rollout.tokens.tolist(), lengths, strict=True)
    ]
    again = [
        list(tokenizer(text, add_special_tokens=False)["input_ids"])
        for text in tokenizer.batch_decode(ids)
    ]
    share = retokenised_share(ids, again)
    by_text = bool(pilot.session.opened.served)
    return Audit(
        "answers encoded again",
        share < 1 and by_text,
        f"{share:.0%} of the answers come back as the same tokens"
        + (
            "; whoever reads their text scores other tokens: the wire sends ids, see that the "
            "server does not decode them"
            if share < 1 and by_text
            else ""
        ),
        "teacher.url" if share < 1 and by_text else "",
        {"retokenised_share": share},
    )


def _temperature(pilot: Pilot) -> Audit:
    """Whether answers are drawn from what is compared."""
    sampler = pilot.plan.sampler
    wrong = []
    if sampler.temperature != pilot.temperature:
        wrong.append(
            f"sampled at temperature {sampler.temperature:g}, compared at {pilot.temperature:g}"
        )
    if sampler.top_p < 1 or sampler.top_k:
        wrong.append(f"sampled with top_p = {sampler.top_p:g} and top_k = {sampler.top_k}")
    setting = "sampler.temperature" if sampler.temperature != pilot.temperature else "sampler.top_p"
    return Audit(
        "sampler and comparison",
        bool(wrong),
        "; ".join(wrong) or f"both at temperature {pilot.temperature:g}, nothing cut off",
        setting if wrong else "",
        {"sampler": sampler.temperature, "objective": pilot.temperature},
    )


def _ids(pilot: Pilot, evidence: Evidence) -> Audit:
    """The ids on which student and teacher differ most, special ones above all."""
    ratio = evidence.row("log_ratio")
    known = ~ratio.isnan()
    tokens = evidence.tokens[evidence.mask]
    tokenizer = pilot.session.tokenizer
    everything = excess_id_ratio(ratio[known], tokens[known], len(set(tokens.tolist())))
    top = [each for each in everything if each[1] >= SEEN][:LISTED]
    special = special_ids(pilot)
    excess = special_excess(evidence, special)
    # of ids that differ alike, by nothing for one, some id is the first all the same
    worst = bool(top) and top[0][0] in special and excess > SPECIAL_IDS
    listed = ", ".join(
        f"{tokenizer.decode([token])!r} {size:.2g} nats in {count} rows"
        for token, count, size in top
    )
    return Audit(
        "ids that differ most",
        worst,
        listed
        + (
            f": the first is a special or end token, {excess:.2g} nats above all others, so the "
            "two end or mark text differently"
            if worst
            else ""
        ),
        "method.merge_stop_ids" if worst else "",
        {"ids": [list(each) for each in top], "excess": excess},
    )


def special_ids(pilot: Pilot) -> frozenset[int]:
    """Ids that mark or end text, by the tokenizer or by the student."""
    tokenizer, student = pilot.session.tokenizer, pilot.session.student.loaded
    return frozenset(tokenizer.all_special_ids) | frozenset(student.eos_ids)


def special_excess(evidence: Evidence, special: Collection[int]) -> float:
    """The largest mean |log ratio| of a special id less that of all other ids, in nats.

    NaN where none is seen often enough.
    """
    size, tokens = evidence.row("log_ratio").abs(), evidence.tokens[evidence.mask]
    known = ~size.isnan()
    of_ids = [known & (tokens == token) for token in special]
    seen = [mean(size[rows]) for rows in of_ids if int(rows.sum()) >= SEEN]
    marks = torch.isin(tokens, torch.tensor(sorted(special)))
    return max(seen) - mean(size[known & ~marks]) if seen else math.nan


def _ends(pilot: Pilot, evidence: Evidence) -> Iterator[Audit]:
    """Whether student and teacher agree on where an answer ends."""
    if "eos_divergence" not in evidence.rows:
        return
    values = evidence.row("eos_divergence")
    infinite = int(values.isinf().sum())
    at_end = torch.zeros_like(evidence.mask)
    finished = [row for row, reason in enumerate(evidence.stop_reason) if reason == "eos"]
    last = evidence.mask.long().cumsum(1).argmax(1)
    at_end[finished, last[finished]] = True
    of_ends = values[at_end[evidence.mask]]
    mean = float(of_ends.nanmean()) if len(of_ends) else math.nan
    yield Audit(
        "end of answers",
        infinite > 0,
        f"{mean:.2g} nats between the two where an answer ends"
        + (f"; on {infinite} rows only one of them can end at all" if infinite else ""),
        "method.merge_stop_ids" if infinite else "",
        {"eos_divergence_at_ends": mean, "infinite": infinite},
    )


def _first_token(pilot: Pilot, evidence: Evidence, along: Profiles) -> Audit:
    """Whether answers begin otherwise than the teacher expects: a header, or thinking first."""
    first, later = first_and_later(evidence)
    bad = first - later > FIRST_TOKEN
    views = with_parts([pilot.view], pilot.method.views)
    if any(view.context or view.chat_template_kwargs for view in views):
        setting, why = "method.views", ": it reads a prompt of its own"
    elif any(prompt.messages for prompt in pilot.rollout.prompts):
        setting, why = "data.chat_template_kwargs", ": compare the rendered prompts"
    else:  # nothing is rendered
        setting, why = "teacher.model", ", although it reads what the student reads"
    return Audit(
        "first token",
        bad,
        f"|log ratio| is {first:.2g} nats at the first token and {later:.2g} at later ones"
        + (f"; the teacher expects another beginning{why}" if bad else ""),
        setting if bad else "",
        {"first": first, "later": later, "first_token_spike": along.spike},
    )


def first_and_later(evidence: Evidence) -> tuple[float, float]:
    """The mean |log ratio| of first tokens, and that of all others, in nats."""
    size, (place, _) = evidence.row("log_ratio").abs(), places(evidence.mask)
    known = ~size.isnan()
    return mean(size[known & (place == 0)]), mean(size[known & (place > 0)])


def _engine(pilot: Pilot, evidence: Evidence) -> Audit:
    """Whether the sampler's numbers are the learner's, but for the rounding of the weights."""
    off = log_mismatch(evidence.row("sampler_logp"), evidence.row("student_logp"))
    weights = pilot.session.student.loaded.model.parameters()
    short = any(each.dtype in (torch.bfloat16, torch.float16) for each in weights)
    bad = off > (ENGINE_NOISE_16_BIT if short else ENGINE_NOISE)
    return Audit(
        "sampler and learner",
        bad,
        f"{off:.2g} nats apart in the mean"
        + (
            "; use weight.importance or engine_ratio, or one precision on both sides" if bad else ""
        ),
        "sampler" if bad else "",
        {"log_mismatch": off},
        urgent=off > ENGINE_FAULT,
    )


def _own_teacher(gradients: Gradients) -> Iterator[Audit]:
    """Whether nothing is left to learn from oneself."""
    if math.isnan(gradients.self_gradient):
        return
    bad = gradients.self_gradient > PLUMBING
    yield Audit(
        "student as its own teacher",
        bad,
        f"loss {gradients.self_loss:.2g}, gradient {gradients.self_gradient:.2g} of the run's"
        + ("; positions, temperature or a mask are wrong: believe no other number" if bad else ""),
        "method" if bad else "",
        {"loss": gradients.self_loss, "gradient": gradients.self_gradient},
    )


def _conflict(pilot: Pilot) -> Iterator[Audit]:
    """Whether several teachers of the same rows pull apart: their gradients, by the interval of the
    cosine, or what they say, by far."""
    session = pilot.session
    if session.rivals is None:
        return
    batch = scored(session, pilot.method, pilot.rollout)
    contexts = steps.privileged(
        pilot.rollout,
        batch,
        pilot.plan,
        session.context_encoder,
        pad_id=session.student.loaded.pad_id,
    )
    with session.turns:
        distances, cosines = conflict.measure_over_prompts(
            session.rivals,
            session.student,
            batch,
            pilot.method.objective,
            pilot.plan,
            session.max_tokens,
            flat=lambda gradient: some_entries(gradient, session.student),
            contexts=contexts,
        )
    numbers = {name: stat.mean for name, stat in distances.items()}
    numbers |= {name: found.value for name, found in cosines.items()}
    shown = [
        *(f"{name.removeprefix('teacher/')} {stat.mean:.2g}" for name, stat in distances.items()),
        *(
            f"{name.removeprefix('teacher/')} {each.value:.2g} [{each.low:.2g}, {each.high:.2g}]"
            for name, each in cosines.items()
        ),
    ]
    routed = session.router is not None
    opposed = any(found.high < 0 for found in cosines.values())
    apart = any(stat.mean > APART for stat in distances.values())
    against = not routed and (opposed or apart)
    said = ""
    if against:
        why = "what one teaches another takes back" if opposed else "an average is neither"
        said = f"; {why}: route them"
    elif routed:
        said = "; a route is set, so no row has two teachers: this is what an average would do"
    yield Audit(
        "conflict of the teachers",
        against,
        ", ".join(shown) + said,
        "teacher.route" if against else "",
        numbers,
    )
