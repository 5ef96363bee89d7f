"""Teachers of a run file that are asked over a network."""

from __future__ import annotations

import os
from collections.abc import Collection, Sequence

from opd.errors import ConfigError, DataError, OpdError
from opd.models import LoadedModel
from opd.objective import Objective
from opd.teacher.connection import ConnectionSettings
from opd.teacher.context import SIBLING, ContextEncoder, after_rollout, stand_in
from opd.teacher.hosted_endpoint import HostedEndpoint
from opd.teacher.identity import identity_without_weights
from opd.teacher.opd_endpoint import OpdEndpoint
from opd.teacher.preflight import Preflight, Trial, differences, preflight
from opd.teacher.query import Described, Endpoint
from opd.teacher.remote import RemoteSettings, RemoteTeacher
from opd.teacher.sglang_endpoint import SglangEndpoint
from opd.teacher.vllm_endpoint import VllmEndpoint
from opd.training.config import TeacherConfig
from opd.training.plan import AskedEntries, asked_entries
from opd.types import Need, Prompt, TeacherView

ECHO = {"hosted": "", "hosted-echo": "text", "hosted-echo-ids": "ids"}
"""Protocols of hosted completions, and how such an endpoint names the tokens of an echo."""

ITEM_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2, "float64": 8}


def open_endpoint(name: str, config: TeacherConfig) -> Endpoint:
    """The client of a teacher's protocol; nothing is sent yet.

    Args:
        name: of the teacher's table: `teacher`, or NAME of `[teachers.NAME]`.

    Raises:
        ConfigError: the environment variable of its key is not set.
    """
    settings = ConnectionSettings(
        timeout_s=config.client.timeout_s,
        retry_s=config.client.retry_s,
        concurrency=config.client.concurrency,
        key=_key(name, config),
    )
    if config.protocol == "opd":
        return OpdEndpoint(name, config.url, settings)
    if config.protocol == "sglang":
        return SglangEndpoint(name, config.url, settings)
    if config.protocol in ECHO:
        echo = ECHO[config.protocol]
        return HostedEndpoint(name, config.url, config.served_name, settings, echo=echo)
    route = "generate" if config.protocol == "vllm-generate" else "completions"
    return VllmEndpoint(name, config.url, config.served_name, settings, route=route)


def _key(name: str, config: TeacherConfig) -> str:
    if not config.key_env:
        return ""
    key = os.environ.get(config.key_env, "")
    if not key:
        raise ConfigError(
            f"{name}.key_env = {config.key_env!r}, and that environment variable is not set; set "
            "it to the server's key, or leave key_env empty where the server asks for none"
        )
    return key


def remote_teacher(endpoint: Endpoint, config: TeacherConfig, *, vocab_size: int) -> RemoteTeacher:
    """The teacher of a run that asks an endpoint."""
    settings = RemoteSettings(
        tokens_per_request=config.client.tokens_per_request,
        concurrency=config.client.concurrency,
        compress=config.client.compress,
    )
    return RemoteTeacher(endpoint, vocab_size=vocab_size, settings=settings)


def check_described(
    student: LoadedModel, described: Described, where: str, *, merge_stop_ids: bool = False
) -> int:
    """The number of tokens a served teacher shares with the student.

    Where its protocol tells no vocabulary the student's is taken for it.

    Raises:
        ConfigError: another vocabulary, or other end tokens.
    """
    own = identity_without_weights(student)
    for difference in differences(described, own, merge_stop_ids=merge_stop_ids):
        raise ConfigError(f"{where} {difference}")
    return min(student.vocab_size, described.vocab_size or student.vocab_size)


def entries_of(
    teacher: RemoteTeacher,
    config: TeacherConfig,
    objective: Objective,
    needs: Collection[Need],
    view: str,
) -> AskedEntries | None:
    """What single tokens are asked of a served teacher; None: its hidden states.

    Raises:
        ConfigError: neither can be had, with what the objective reads and the protocol lacks.
    """
    entries = asked_entries(objective, needs, view)
    limits, name = teacher.endpoint.limits, teacher.endpoint.name
    lacks = sorted(_fields(entries) - limits.wanted) if entries else []
    reason = (
        f"{name} has no {lacks[0]!r}: {limits.why_not.get(lacks[0], 'its protocol lacks it')}"
        if lacks
        else "the objective reads the whole vocabulary"
    )
    hidden = "hidden" in limits.wanted
    if entries is None or lacks:
        if config.reply == "entries" or not hidden:
            raise ConfigError(
                f"the view {view!r} cannot be scored with entries: {reason}; choose a support "
                "that single tokens answer (student_top_k, teacher_top_k), or serve the teacher "
                "with `opd serve`, which hands out hidden states"
            )
        return None
    if config.reply == "entries" or not hidden:
        return entries
    if config.reply == "hidden":
        return None
    told = teacher.endpoint.describe()
    size = ITEM_BYTES.get(told.dtype, 4) * int(str(told.extra.get("hidden_size", 0)))
    return entries if entries.bytes_per_token <= size else None


def try_teacher(
    endpoint: Endpoint,
    config: TeacherConfig,
    objective: Objective,
    needs: Collection[Need],
    view: str,
    *,
    student: LoadedModel,
    texts: Sequence[tuple[Sequence[int], Sequence[int]]],
    longest_prompt: int = 0,
    max_new_tokens: int = 0,
    merge_stop_ids: bool = False,
    local_copy: LoadedModel | None = None,
) -> Preflight:
    """Ask a served teacher about two texts as the run will, twice.

    Args:
        student: its tokenizer and end tokens; the weights need not be there.
        texts: token ids of prompts and of what follows them.
        longest_prompt, max_new_tokens: of the run, as in `Trial`.
    """
    own = identity_without_weights(student)
    try:
        told = endpoint.describe()
        teacher = remote_teacher(endpoint, config, vocab_size=student.vocab_size)
        entries = entries_of(teacher, config, objective, needs, view)
    except OpdError as error:
        return Preflight(None, (str(error),), ())
    ends = tuple(dict.fromkeys((*student.eos_ids, *told.special.get("eos", ()))))
    trial = Trial(
        texts=texts,
        fields=frozenset(_fields(entries) if entries else {"hidden", "sampled"}),
        top_k=entries.top_k if entries else 0,
        columns=entries.student_k + entries.own_token if entries else 0,
        temperature=objective.temperature,
        merge_ids=(ends,) if merge_stop_ids and len(ends) > 1 else (),
        longest_prompt=longest_prompt,
        max_new_tokens=max_new_tokens,
    )
    return preflight(
        endpoint, trial, student=own, merge_stop_ids=merge_stop_ids, local_copy=local_copy
    )


def longest_read(
    name: str,
    views: Sequence[TeacherView],
    prompts: Sequence[Prompt],
    encoder: ContextEncoder,
    *,
    max_new_tokens: int,
) -> int:
    """Tokens of the longest of what a served teacher reads before a response.

    Args:
        name: of the teacher, as views name it.
        views: of the run; those with a context read that in place of the prompt.
        prompts: the records, or some of an endless source.
        max_new_tokens: of a response, which a context may quote.
    """
    found = [max((len(prompt.prompt_ids) for prompt in prompts), default=0)]
    for view in views:
        if view.source != "teacher" or not view.context or view.name not in (name, "teacher"):
            continue
        told = [stand_in(prompt, view.context) for prompt in prompts]
        quoted = max_new_tokens if SIBLING in after_rollout(view.context) else 0
        try:
            read = encoder.encode(prompts, view, told)
        except DataError:  # what is wrong with a context is said where contexts are checked
            continue
        found.append(max(map(len, read), default=0) + quoted)
    return max(found)


def trial_texts(prompts: Sequence[Prompt]) -> list[tuple[tuple[int, ...], tuple[int, ...]]]:
    """Two prompts, each followed by the beginning of the other: tokens that there are."""
    ids = [prompt.prompt_ids for prompt in prompts[:2] if prompt.prompt_ids]
    return [(own, other[:64]) for own, other in zip(ids, reversed(ids), strict=True)]


def _fields(entries: AskedEntries) -> set[str]:
    asks = {
        "sampled": True,
        "top": bool(entries.top_k),
        "ids": bool(entries.student_k) or entries.own_token,
        "entropy": entries.entropy,
    }
    return {name for name, is_asked in asks.items() if is_asked}
