"""What `tokens/part-*.parquet` and its columns are called, and what they mean. Imports no torch.

A row is a token of a response in one update. A name with parts, `advantage/distill` or a view's
`teacher_logp`, becomes one word that SQL takes without quotes: the parts are joined by two
underscores, and whatever is no letter, digit or underscore becomes an underscore
(`advantage__distill`, `teacher_logp__before`). Of names that would then be equal, upper and lower
case alike, the later ones get a number (`loss__a_b__2`).
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import MappingProxyType

VERSION = 1
"""Of what follows; a reader refuses a higher one."""

METADATA = "opd.tokens."
"""Prefix of the keys in a part's metadata: `version`, `share` (of the sequences that are recorded)
and `seed` (of the choice)."""

PART = "part-{:06}.parquet"
"""What the parts are called, by their numbers."""

COLUMNS: Mapping[str, str] = MappingProxyType(
    {
        "phase": "`warmup` or `train`",
        "step": "of the phase, 1 the first",
        "update": "of the step, 1 the first; more than one with `train.updates_per_rollout`",
        "sequence": "place of the response in the step's batch, 0 the first",
        "position": "place of the token in the response, 0 the first",
        "length": "tokens of the response",
        "prompt_id": "the record that is answered",
        "group_id": "number of the prompt in the batch; samples of one prompt share it",
        "token": "id in the student's vocabulary",
        "text": "the token as a text",
        "writer": "who chose it: student, data, teacher or tool",
        "mask": "whether a loss may look at it; if not, only the rollout's columns are filled",
        "policy_version": "updates that the sampling weights had seen; null where not sampled",
        "stop_reason": "why the response ended: eos, stop_string or length",
        "verdict": "the verifier's score of the response; null where there is none",
        "sampler_logp": "log-probability by the engine that generated; null where not sampled",
        "old_logp": "by the trainer's weights at rollout time, where a formula reads it",
        "student_logp": "by the weights that are updated",
        "student_entropy": "of the student's distribution, in nats",
        "teacher_logp": "by the view `teacher`, where its answer tells; of a further teacher with "
        "its name behind, `teacher_logp__NAME`",
        "value": "the critic's value of what the token follows, where there is a critic",
    }
)
"""There in every part, null where nothing is known. All that follows is there if it is made."""

FAMILIES: Mapping[str, str] = MappingProxyType(
    {
        "loss__TERM": "the term's loss, weights and coefficient included, before the reduction",
        "reward__TERM": "of a sampled term, after outcomes that join before credit",
        "advantage__TERM": "of a sampled term, after credit and baseline",
        "weight__TERM__NAME": "a weight's factor; with `preserve_mass` their product, weight__TERM",
        "gate__TERM__NAME": "a gate of a route, 0 or 1",
        "routed__TERM": "of a route: whether all its gates are open",
        "leak__TERM": "of a route, where the advantage is negative: released mass that would pass "
        "the candidates",
        "changed__TERM__NAME": "where a formula replaced a value",
        "empty__TERM__support": "where a support has no entry",
        "reverse_kl, forward_kl": "against the view `teacher`, if the objective reads them over "
        "the whole vocabulary; of another view with its name behind",
        "total_variation, jensen_shannon, teacher_entropy": "as the KLs",
        "logit_gradient_norm": "of the row's share of the loss, where something asks for it",
    }
)


def column_names(paths: Iterable[str]) -> dict[str, str]:
    """The column of every path-like name (`advantage/distill`), each its own.

    The order decides which of two equal names gets a number.
    """
    taken = {name.casefold() for name in COLUMNS}
    found: dict[str, str] = {}
    for path in paths:
        name = plain = column_name(path)
        number = 1
        while name.casefold() in taken and name not in COLUMNS:
            number += 1
            name = f"{plain}__{number}"
        taken.add(name.casefold())
        found[path] = name
    return found


def column_name(path: str) -> str:
    """A path-like name as one word."""
    return "__".join(re.sub(r"\W", "_", part, flags=re.ASCII) for part in path.split("/"))


def part_files(folder: Path) -> list[Path]:
    """The parts in a folder, in the order in which they were written."""
    return sorted(folder.glob("part-*.parquet"), key=part_number)


def part_number(part: Path) -> int:
    """The number in a part's name."""
    found = re.search(r"\d+", part.stem)
    return int(found[0]) if found else 0
