"""A served teacher: bytes and parsing, the server's own share, many clients, and the gradient.

    python benchmarks/teacher.py [--only wire,server,clients,gradient] [--quick] [--json FILE]
        [--result FILE]

`wire`: what a reply of 4,096 tokens weighs and what reading it into tensors costs, beside the same
numbers in the JSON of vLLM's `prompt_logprobs`, parsed with `json` and plain comprehensions.
`server`: CPU-seconds of a server process that scores a batch, beside the same forward passes and
projections without HTTP. `clients`: 64 clients for a minute; what was lost, and how long answers
took (wall time). `gradient`: the cosine of the reverse KL's gradient with the full vocabulary's,
by what the teacher can be asked; `grad_error` is 1 - cosine there.
"""

from __future__ import annotations

import json
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from statistics import quantiles
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor
from transformers import Qwen3Config, Qwen3ForCausalLM

from common import (
    OURS,
    Measure,
    Options,
    Row,
    compare,
    cpu_seconds,
    interleaved,
    one_thread,
    parser,
    report,
)
from opd.formula import divergence, support
from opd.models import load_model, save_model, wrap_model
from opd.rollout.local import LocalSampler
from opd.rollout.pack import pack_rollout
from opd.student import Student
from opd.teacher.connection import ConnectionSettings
from opd.teacher.opd_endpoint import OpdEndpoint
from opd.teacher.query import Asked, Query, bits, check_answer
from opd.teacher.scoring import Job, Scorer
from opd.teacher.wire import Frame, FrameReader, encode
from opd.types import Prompt, SamplerSettings

PARTS = ("wire", "server", "clients", "gradient")
VOCABULARY, K = 32768, 64


def main() -> None:
    arguments = parser("A served teacher.")
    arguments.add_argument("--only", default=",".join(PARTS), help="some of " + ", ".join(PARTS))
    given = arguments.parse_args()
    options = Options(given.quick, given.json, given.result)
    one_thread()
    torch.manual_seed(0)
    run: dict[str, Callable[[bool], list[Row]]] = {
        "wire": wire,
        "server": server,
        "clients": clients,
        "gradient": gradient,
    }
    rows = [row for part in given.only.split(",") for row in run[part](options.quick)]
    report(rows, options)


# --------------------------------------------------------------------------------------------
# Bytes and parsing


def wire(quick: bool) -> list[Row]:
    """What replies weigh and what reading them costs."""
    tokens = 1024 if quick else 4096
    logits = torch.randn(tokens, VOCABULARY)
    logp, ids = logits.log_softmax(-1).topk(K)
    own = torch.randint(0, VOCABULARY, (tokens,))
    sampled = logits.log_softmax(-1).gather(-1, own.unsqueeze(-1)).squeeze(-1)
    replies: dict[str, tuple[dict[str, Tensor], int | None]] = {
        "sampled": ({"sampled_logp": sampled}, 0),
        "own top 64": ({"top_ids": ids.int(), "top_logp": logp}, K),
        "64 chosen ids": ({"ids_logp": logp}, None),
        "hidden, 1,024 in bfloat16": ({"hidden": torch.randn(tokens, 1024).bfloat16()}, None),
    }
    rows: list[Row] = []
    for name, (arrays, json_k) in replies.items():
        data = encode(Frame("answer", {"sequence": 0}, arrays))
        systems = {OURS: _parsing(data, tokens, _read_frame)}
        if json_k is not None:
            text = _vllm_json(own, sampled, ids[:, :json_k], logp[:, :json_k])
            systems["vLLM's JSON"] = _parsing(text, tokens, _read_json)
        rows += compare(f"parse {name}", interleaved(systems, 3 if quick else 7, warm=True))
    return rows


def _parsing(data: bytes, tokens: int, read: Callable[[bytes], object]) -> Callable[[], Measure]:
    def once() -> Measure:
        begun, times = cpu_seconds(), 0
        while cpu_seconds() - begun < 0.2 or not times:
            read(data)
            times += 1
        spent = (cpu_seconds() - begun) / times
        return Measure(spent, tokens, bytes_per_token=len(data) / tokens)

    return once


def _read_frame(data: bytes) -> object:
    return [frame.arrays for frame in FrameReader().feed(data)]


def _vllm_json(own: Tensor, sampled: Tensor, ids: Tensor, logp: Tensor) -> bytes:
    """One choice as vLLM 0.32 writes it; the prompt is one token."""
    positions: list[dict[str, Any] | None] = [None]
    for n in range(len(own)):
        entries = {str(int(own[n])): _entry(float(sampled[n]), VOCABULARY)}
        for rank, (token, value) in enumerate(
            zip(ids[n].tolist(), logp[n].tolist(), strict=True), 1
        ):
            entries[str(token)] = _entry(value, rank)
        positions.append(entries)
    said = {"choices": [{"prompt_logprobs": positions, "prompt_token_ids": [0, *own.tolist()]}]}
    return json.dumps(said, separators=(",", ":")).encode()


def _entry(value: float, rank: int) -> dict[str, Any]:
    return {"logprob": value, "rank": rank, "decoded_token": "abc"}


def _read_json(data: bytes) -> object:
    choice = json.loads(data)["choices"][0]
    positions, tokens = choice["prompt_logprobs"][1:], choice["prompt_token_ids"][1:]
    sampled = torch.tensor(
        [entry[str(token)]["logprob"] for entry, token in zip(positions, tokens, strict=True)]
    )
    top = [
        sorted((e["rank"], int(token), e["logprob"]) for token, e in entry.items())[:K]
        for entry in positions
    ]
    ids = torch.tensor([[token for _, token, _ in row] for row in top])
    logp = torch.tensor([[value for _, _, value in row] for row in top])
    return sampled, ids, logp


# --------------------------------------------------------------------------------------------
# The server's own share


def server(quick: bool) -> list[Row]:
    """A server process beside the same computation in this one."""
    with TemporaryDirectory() as folder:
        loaded = _mid_sized(folder, layers=2 if quick else 8)
        cases = {
            "sampled": (("sampled",), 0),
            "own top 64": (("sampled", "top"), K),
            "64 chosen ids": (("sampled", "ids"), 0),
            "hidden": (("hidden",), 0),
        }
        sequences = 16 if quick else 32
        queries = {
            name: _query(sequences, 24, 104, wanted, top_k, VOCABULARY)
            for name, (wanted, top_k) in cases.items()
        }
        rows: list[Row] = []
        scorer = Scorer(loaded, vocab_size=loaded.vocab_size, max_tokens=2048)
        with _serving(folder, "--max-tokens", "2048") as (url, pid):
            endpoint = OpdEndpoint("it", url, ConnectionSettings(timeout_s=600))
            for name, query in queries.items():
                asked = sum(len(one.response) for one in query.sequences)

                def served(query: Query = query, asked: int = asked) -> Measure:
                    before = _cpu_of(pid)
                    received = endpoint.connection.traffic.received_bytes
                    endpoint.score(query)
                    got = endpoint.connection.traffic.received_bytes - received
                    return Measure(_cpu_of(pid) - before, asked, bytes_per_token=got / asked)

                def bare(query: Query = query, asked: int = asked) -> Measure:
                    begun = cpu_seconds()
                    for _ in scorer.answer([Job(one, query) for one in query.sequences]):
                        pass
                    return Measure(cpu_seconds() - begun, asked)

                systems = {OURS: served, "the forward alone": bare}
                medians = interleaved(systems, 3, warm=True)
                rows += compare(f"score {name}", medians)
            endpoint.close()
    return rows


def _mid_sized(folder: str, layers: int) -> Any:
    """A model whose forward is most of the work, random, with the default's tokenizer."""
    tokenizer = load_model("builtin:sort-student").tokenizer
    config = Qwen3Config(
        vocab_size=VOCABULARY,
        hidden_size=512,
        intermediate_size=1536,
        num_hidden_layers=layers,
        num_attention_heads=8,
        num_key_value_heads=4,
        head_dim=64,
        max_position_embeddings=1024,
    )
    extra = [f"<extra_{i}>" for i in range(VOCABULARY - len(tokenizer))]
    tokenizer.add_tokens(extra)
    loaded = wrap_model(Qwen3ForCausalLM(config), tokenizer, reference="mid-sized")
    save_model(loaded, folder)
    return loaded


def _query(
    sequences: int,
    prompt: int,
    response: int,
    wanted: tuple[str, ...],
    top_k: int,
    vocabulary: int,
) -> Query:
    made = []
    for _ in range(sequences):
        ids = torch.randint(0, vocabulary, (response, K), dtype=torch.int32)
        made.append(
            Asked(
                torch.randint(0, vocabulary, (prompt,), dtype=torch.int32),
                torch.randint(0, vocabulary, (response,), dtype=torch.int32),
                torch.full((response,), bits(wanted), dtype=torch.uint8),
                ids if "ids" in wanted else None,
            )
        )
    return Query(tuple(made), top_k=top_k)


@contextmanager
def _serving(model: str, *flags: str) -> Iterator[tuple[str, int]]:
    """The URL and the process id of `opd serve`."""
    command = [sys.executable, "-m", "opd", "serve", model, "--port", "0", "--json"]
    process = subprocess.Popen(
        [*command, "--threads", "1", *flags], stdout=subprocess.PIPE, text=True
    )
    try:
        assert process.stdout is not None
        yield json.loads(process.stdout.readline())["url"], process.pid
    finally:
        process.terminate()
        process.wait()


def _cpu_of(pid: int) -> float:
    """CPU-seconds of another process so far, from the kernel's table, where it exists."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / 100.0


# --------------------------------------------------------------------------------------------
# Many clients


def clients(quick: bool) -> list[Row]:
    """64 clients, each with its own connection, that ask again as soon as they are answered."""
    seconds, count = (8, 16) if quick else (60, 64)
    loaded = load_model("builtin:sort-teacher")
    local = Scorer(loaded, vocab_size=loaded.vocab_size)
    query = replace(_query(4, 8, 40, ("sampled", "top"), 8, loaded.vocab_size), name="q")
    plain = dict(local.answer([Job(one, query) for one in query.sequences]))
    took: list[float] = []
    lost: list[str] = []
    with _serving("builtin:sort-teacher", "--dtype", "float32") as (url, pid):
        end = time.monotonic() + seconds

        def ask() -> None:
            endpoint = OpdEndpoint("it", url, ConnectionSettings(concurrency=1))
            while time.monotonic() < end:
                begun = time.monotonic()
                try:
                    answers = endpoint.score(query)
                except Exception as error:
                    lost.append(str(error))
                    continue
                took.append(time.monotonic() - begun)
                for place, answer in enumerate(answers):
                    check_answer(query.sequences[place], query, answer.values)
                    own = plain[place].values["sampled_logp"]
                    if not torch.allclose(answer.values["sampled_logp"], own, atol=1e-4):
                        lost.append("another answer")
            endpoint.close()

        threads = [threading.Thread(target=ask) for _ in range(count)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        cpu = _cpu_of(pid)
    cuts = quantiles(took, n=100)
    tokens = len(took) * sum(len(one.response) for one in query.sequences)
    print(
        f"{count} clients for {seconds} s: {len(took):,} requests, {len(lost)} lost; wall seconds "
        f"per request: median {cuts[49]:.3f}, p90 {cuts[89]:.3f}, p99 {cuts[98]:.3f}, "
        f"longest {max(took):.3f}"
    )
    if lost:
        raise SystemExit(f"{len(lost)} requests were lost, the first: {lost[0]}")
    rows = [Row(f"{count} clients", OURS, seconds=cpu, tokens_per_s=tokens / cpu)]
    for name, value in (("p50", cuts[49]), ("p99", cuts[98])):
        rows.append(Row(f"{count} clients, wall seconds, {name}", OURS, seconds=value))
    return rows


# --------------------------------------------------------------------------------------------
# The gradient

Loss = Callable[[Tensor, Tensor, Tensor], Tensor]
"""From log-probabilities of student and teacher and the sampled tokens, one number per row."""


def _bucketed(ids: Tensor, student: Tensor, teacher: Tensor) -> Tensor:
    pair = (
        support.restrict_by_tail(student, ids, tail="bucket", side="student"),
        support.restrict_by_tail(teacher, ids, tail="bucket", side="teacher"),
    )
    return divergence.reverse_kl(*pair)


def _renormalised(ids: Tensor, student: Tensor, teacher: Tensor) -> Tensor:
    pair = (
        support.restrict_by_tail(student, ids, tail="renormalise", side="student"),
        support.restrict_by_tail(teacher, ids, tail="renormalise", side="teacher"),
    )
    return divergence.reverse_kl(*pair)


def losses(k: int) -> dict[str, Loss]:
    """What a served teacher lets a run compute, by what it can be asked."""

    def likeliest(log_probs: Tensor) -> Tensor:
        return log_probs.detach().topk(k).indices

    return {
        "opd: hidden states": lambda s, t, y: divergence.reverse_kl(s, t),
        f"opd: the student's top {k}, the rest in a bucket": lambda s, t, y: _bucketed(
            likeliest(s), s, t
        ),
        f"prompt_logprobs: the teacher's top {k}, the rest in a bucket": lambda s, t, y: _bucketed(
            likeliest(t), s, t
        ),
        f"prompt_logprobs: the teacher's top {k}, renormalised": lambda s, t, y: _renormalised(
            likeliest(t), s, t
        ),
        "prompt_logprobs: the teacher's first and the sampled token, a bucket": (
            lambda s, t, y: _first_and_sampled(s, t, y)
        ),
    }


def _first_and_sampled(student: Tensor, teacher: Tensor, tokens: Tensor) -> Tensor:
    first = teacher.argmax(-1)
    same = first == tokens
    ids = torch.stack([first, tokens.masked_fill(same, support.ABSENT)], -1)
    return _bucketed(ids, student, teacher)


def gradient(quick: bool) -> list[Row]:
    """Cosines with the gradient of the reverse KL over the whole vocabulary."""
    return [*_on_the_default(quick), *_on_many_tokens(quick)]


def _on_the_default(quick: bool) -> list[Row]:
    """V = 53, k = 8: gradients of the student's weights on its own rollouts.

    The student is the default's after a short warm-up, at several lengths of it.
    """
    rows: list[Row] = []
    teacher = load_model("builtin:sort-teacher")
    for steps in (20,) if quick else (40, 80, 120):
        student = _warm_student(steps)
        batch, tokens = _rollout_of(student)
        for name, loss in losses(8).items():
            vector = _weight_gradient(student, teacher, batch, tokens, loss)
            if name.startswith("opd: hidden"):
                whole = vector
            rows.append(_cosine_row(f"V 53, k 8, after {steps} warm-up steps", name, vector, whole))
    return rows


def _warm_student(steps: int) -> Any:
    """The default's student after so many supervised steps, as `opd run` warms it up."""
    import opd

    run = opd.load(
        None,
        [
            *("--warmup.steps", str(steps), "--train.steps", "0", "--evaluate.test_prompts", "8"),
            *("--evaluate.prompts", "8", "--evaluate.teacher", "false", "--threads", "1"),
        ],
    )
    with TemporaryDirectory() as folder:
        run = replace(run, config=replace(run.config, output=folder, name="warm"))
        for _ in opd.train(run):
            pass
        return load_model(str(Path(folder) / "warm" / "model"))


def _rollout_of(student: Any) -> tuple[Any, Tensor]:
    from opd.data.prompts import load_prompts

    source = load_prompts("task:sort", tokenizer=student.tokenizer)
    assert source.generate is not None
    prompts: list[Prompt] = list(source.generate(7, 0, 64, True))
    rollout = LocalSampler(student).sample(
        prompts, SamplerSettings(max_new_tokens=64), generator=torch.Generator().manual_seed(0)
    )
    batch = pack_rollout(rollout, pad_id=student.pad_id)
    return batch, rollout.tokens[rollout.mask]


def _weight_gradient(student: Any, teacher: Any, batch: Any, tokens: Tensor, loss: Loss) -> Tensor:
    model = Student(student, vocab_size=student.vocab_size)
    model.zero_grad(set_to_none=True)

    def log_probs(loaded: Any) -> Tensor:
        logits = loaded.model(input_ids=batch.input_ids).logits[..., : student.vocab_size]
        rows: Tensor = logits.flatten(0, 1)[batch.row_index]
        return rows.log_softmax(-1)

    with torch.no_grad():
        told = log_probs(teacher)
    loss(log_probs(student), told, tokens).sum().backward()  # type: ignore[no-untyped-call]
    return torch.cat(
        [p.grad.flatten() for p in model.trainable().values() if p.grad is not None]
    ).clone()


def _on_many_tokens(quick: bool) -> list[Row]:
    """V = 32,768, k = 64: gradients of the student's logits, logits as trained models have them.

    A teacher's logits fall with the logarithm of the rank; the student's differ by noise that is
    larger the likelier nobody finds a token. The slope sets the teacher's mass on its top 64.
    """
    rows: list[Row] = []
    count = 64 if quick else 256
    for slope in (1.72, 1.9, 2.4):
        ranks = torch.arange(1, VOCABULARY + 1).float()
        order = torch.stack([torch.randperm(VOCABULARY) for _ in range(count)])
        falling = (-slope * (ranks + 2).log()).expand(count, -1)
        logits = torch.zeros(count, VOCABULARY).scatter(-1, order, falling)
        logits += 0.5 * torch.randn_like(logits)
        teacher = logits.log_softmax(-1)
        mass = float(teacher.topk(K).values.logsumexp(-1).exp().mean())
        student = (logits + torch.randn_like(logits)).requires_grad_()
        tokens = torch.multinomial(student.detach().softmax(-1), 1).squeeze(-1)
        for name, loss in losses(K).items():
            student.grad = None
            loss(student.log_softmax(-1), teacher, tokens).sum().backward()  # type: ignore[no-untyped-call]
            assert student.grad is not None
            vector = student.grad.flatten().clone()
            if name.startswith("opd: hidden"):
                whole = vector
            case = f"V 32,768, k 64, {mass:.3f} of the teacher's mass on its top 64"
            rows.append(_cosine_row(case, name, vector, whole))
    return rows


def _cosine_row(case: str, system: str, vector: Tensor, whole: Tensor) -> Row:
    cosine = torch.nn.functional.cosine_similarity(vector.double(), whole.double(), dim=0)
    print(f"{case}: {system}: cosine {float(cosine):.4f}")
    return Row(case, system, grad_error=1 - float(cosine))


if __name__ == "__main__":
    main()
