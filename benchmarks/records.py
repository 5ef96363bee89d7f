"""Token records: what writing 10 million rows costs, what they take, and what asking them costs.

The rows are those of a step with a sampled term and a dense one, over a vocabulary of 50,257 with
the frequencies of a text: 512 responses of up to 960 tokens a step, by the writer that a run uses.
Every ready-made query is then asked in a connection of its own, on one thread. At last the embedded
default runs, and the time that its records take is compared with the whole of it, with all
responses recorded and with the default share.

    python benchmarks/records.py [--quick] [--json FILE] [--result FILE]
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from statistics import median
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from common import (
    Row,
    cpu_seconds,
    one_thread,
    parser,
    print_table,
    write_asked,
)
from opd.diagnose.records import Gathered, TokenRecords
from opd.formula import credit, divergence, reward
from opd.objective import Dense, Objective, Sampled
from opd.report.queries import READY_MADE, Records
from opd.rollout.pack import pack_rollout
from opd.token_columns import part_files
from opd.training import loop
from opd.training.config import LogConfig, load
from opd.types import Batch, Prompt, Provenance, Rollout

ROWS, QUICK_ROWS = 10_000_000, 500_000
VOCABULARY = 50_257
SEQUENCES, PER_PROMPT, LONGEST = 512, 4, 960
OBJECTIVE = Objective(
    Sampled(reward=reward.teacher_log_ratio, credit=credit.return_to_go, name="distill"),
    Dense(divergence=divergence.reverse_kl),
)


def one_step(seed: int) -> tuple[Rollout, Batch, dict[str, Tensor]]:
    """Responses and by-products of an update, drawn at random."""
    draw = torch.Generator().manual_seed(seed)
    lengths = torch.randint(16, LONGEST + 1, (SEQUENCES,), generator=draw)
    inside = torch.arange(LONGEST) < lengths.unsqueeze(1)
    frequency = 1.0 / torch.arange(1, VOCABULARY + 1)
    tokens = torch.multinomial(frequency, inside.numel(), True, generator=draw).view_as(inside)
    logp = -torch.empty(inside.shape).exponential_(generator=draw)
    group = torch.arange(SEQUENCES) // PER_PROMPT
    prompts = tuple(Prompt(f"prompts.jsonl:{seed * 1000 + int(g)}", (1,), "") for g in group)
    rollout = Rollout(
        prompt_ids=((1,),) * SEQUENCES,
        tokens=tokens,
        mask=inside,
        provenance=torch.where(inside, int(Provenance.STUDENT), int(Provenance.PADDING)),
        sampler_logp=logp,
        policy_version=torch.full_like(tokens, seed),
        group=group,
        stop_reason=("eos",) * SEQUENCES,
        verdict=torch.randint(0, 2, (SEQUENCES,), generator=draw).float(),
        prompts=prompts,
    )
    batch = pack_rollout(rollout, pad_id=0)
    rows = int(inside.sum())

    def drawn() -> Tensor:
        return torch.randn(rows, generator=draw)

    found = {
        "loss/distill": drawn(),
        "loss/dense_2": drawn().abs(),
        "advantage/distill": drawn(),
        "reward/distill": drawn(),
        "student_logp": logp[inside] + 1e-6 * drawn(),
        "student_entropy": drawn().abs(),
        "log_ratio": drawn(),
        "reverse_kl": drawn().abs(),
    }
    return rollout, batch, found


def write(folder: Path, rows: int) -> tuple[int, float]:
    """Write so many rows or a few more; how many, and the CPU-seconds without drawing them."""
    steps = [one_step(seed) for seed in range(4)]
    writer = TokenRecords(folder / "tokens", share=1.0, seed=0, text_of="t{}".format)
    written, step = 0, 0
    start = cpu_seconds()
    while written < rows:
        rollout, batch, found = steps[step % len(steps)]
        step += 1
        writer.add(rollout, batch, OBJECTIVE, found, phase="train", step=step, update=1)
        written += len(batch.row_index)
    writer.flush()
    return written, cpu_seconds() - start


def asked(folder: Path, name: str, repeats: int) -> float:
    """CPU-seconds of a ready-made query, opening included; the median."""
    seconds = []
    for _ in range(repeats):
        start = cpu_seconds()
        with Records(folder, threads=1) as open_records:
            open_records.ask(name)
        seconds.append(cpu_seconds() - start)
    return median(seconds)


# --------------------------------------------------------------------------------------------
# A run of the default's size


@contextmanager
def stopwatch() -> Iterator[Callable[[], float]]:
    """Adds up the CPU-seconds of whatever a run does for its records."""
    total, depth = 0.0, 0

    def timed(function: Any) -> Any:
        def call(*arguments: Any, **options: Any) -> Any:
            nonlocal total, depth
            start, depth = cpu_seconds(), depth + 1
            try:
                return function(*arguments, **options)
            finally:
                depth -= 1
                if not depth:
                    total += cpu_seconds() - start

        return call

    trainer = loop._Trainer
    watched: list[tuple[Any, str]] = [(Gathered, "take"), (Gathered, "joined")]
    watched += [(trainer, name) for name in ("_gathers", "_record", "_write_records")]
    with ExitStack() as patches:
        for owner, name in watched:
            patches.enter_context(mock.patch.object(owner, name, timed(getattr(owner, name))))
        yield lambda: total


def default_run(share: float, steps: int, folder: Path) -> dict[str, Any]:
    """One run of the embedded default; its records' CPU-seconds beside the whole's."""
    words = ["--log.token_share", str(share), "--output", str(folder), "--name", f"share-{share}"]
    words += ["--train.steps", str(steps)]
    if steps < 100:
        words += ["--warmup.steps", "0", "--evaluate.test_prompts", "64"]
    with stopwatch() as of_records:
        start = cpu_seconds()
        *_, last = loop.train_run(load(None, words))
        whole = cpu_seconds() - start
    parts = part_files(last.folder / "tokens")
    with Records(last.folder) as written:
        ((rows,),) = written.ask("select count(*) from tokens").rows
    return {
        "case": f"default run of {steps} steps, share {share:g}",
        "system": "opd",
        "seconds": of_records(),
        "run_seconds": whole,
        "share_of_run": of_records() / whole,
        "rows": rows,
        "bytes_per_token": sum(part.stat().st_size for part in parts) / max(rows, 1),
    }


def main() -> None:
    options = parser("Token records: writing, size, queries.").parse_args()
    one_thread()
    wanted = QUICK_ROWS if options.quick else ROWS
    table: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        (folder / "config.toml").touch()
        written, seconds = write(folder, wanted)
        size = sum(part.stat().st_size for part in part_files(folder / "tokens"))
        table.append(
            {
                "case": f"write {written:,} rows",
                "system": "opd",
                "seconds": seconds,
                "tokens_per_s": written / seconds,
                "bytes_per_token": size / written,
            }
        )
        for name in READY_MADE:
            cost = asked(folder, name, repeats=3 if options.quick else 5)
            table.append({"case": f"{name}, {written:,} rows", "system": "opd", "seconds": cost})
        for share in (LogConfig().token_share, 1.0):
            table.append(default_run(share, 8 if options.quick else 320, folder / "runs"))
    known = Row.__dataclass_fields__
    print_table(Row(**{k: v for k, v in row.items() if k in known}) for row in table)
    for row in table:
        if "share_of_run" in row:
            print(f"{row['case']}: {row['share_of_run']:.2%} of {row['run_seconds']:.1f} CPU-s")
    write_asked(table, options)


if __name__ == "__main__":
    main()
