"""A user's own run: their models, their chat data, their verifier, from run file to result."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import opd
from opd.cli.main import main
from tests.models_zoo import save_tiny

RUN_FILE = """
[student]
model = "student"

[teacher]
model = "teacher"

[data]
prompts = "chats.jsonl"
held_out = 6
verifier = "judge:says_yes"

[sampler]
max_new_tokens = 12
"""

JUDGE = '''
"""A verifier of the user's own."""


def says_yes(prompt, response, *, finished):
    return 1.0 if "Y" in response else 0.0
'''


def write_user_folder(folder: Path) -> Path:
    """A tiny Llama teacher, a smaller Qwen3 student with the same tokenizer, chats, a judge."""
    save_tiny("llama", folder / "teacher", hidden=48, layers=3, seed=1)
    save_tiny("qwen3", folder / "student", hidden=32, layers=2, seed=2)
    system = {"role": "system", "content": "BE BRIEF"}
    chats = [
        {"messages": [system, {"role": "user", "content": f"IS {n} EVEN?"}], "level": n % 3}
        for n in range(40)
    ]
    text = "\n".join(json.dumps(chat) for chat in chats)
    (folder / "chats.jsonl").write_text(text + "\n", encoding="utf-8")
    (folder / "judge.py").write_text(JUDGE, encoding="utf-8")
    run_file = folder / "my_run.toml"
    run_file.write_text(RUN_FILE, encoding="utf-8")
    return run_file


def test_a_users_own_models_chats_and_verifier_work_from_run_file_to_model_folder(
    tmp_path: Path,
) -> None:
    run_file = write_user_folder(tmp_path)
    settings = [
        *("--output", str(tmp_path / "runs"), "--name", "mine", "--threads", "1"),
        *(
            "--train.prompts_per_step",
            "8",
            "--train.steps",
            "6",
            "--train.learning_rate",
            "1e-2",
            "--evaluate.every",
            "3",
        ),
    ]

    assert main(["check", str(run_file)]) == 0
    assert main(["run", str(run_file), *settings]) == 0

    folder = tmp_path / "runs" / "mine"
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["exit_reason"] == "finished"
    assert summary["start_accuracy"]["n"] == 6
    assert summary["tokens"] > 0
    events = [json.loads(line) for line in (folder / "events.jsonl").read_text().splitlines()]
    losses = [
        event["metrics"]["loss/dense"]
        for event in events
        if "loss/dense" in event.get("metrics", {})
    ]
    first, last = (total / count for total, count in (losses[0], losses[-1]))
    assert last < first, "six steps at this rate lower the reverse KL"

    tokenizer = AutoTokenizer.from_pretrained(folder / "model")
    model = AutoModelForCausalLM.from_pretrained(folder / "model")
    assert tokenizer.chat_template
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": "IS 2 EVEN?"}], add_generation_prompt=True, return_tensors="pt"
    )
    ids = prompt["input_ids"] if not isinstance(prompt, torch.Tensor) else prompt
    written = model.generate(ids, max_new_tokens=4, do_sample=False)
    assert written.shape[1] > ids.shape[1]

    assert main(["eval", str(folder), "--samples", "2", "--limit", "4"]) == 0
    assert main(["sample", str(folder), "--prompts", "2"]) == 0


def test_objects_in_hand_train_without_a_run_file(tmp_path: Path) -> None:
    write_user_folder(tmp_path)
    student = AutoModelForCausalLM.from_pretrained(tmp_path / "student")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "student")
    before = {name: weight.clone() for name, weight in student.named_parameters()}

    reports = list(
        opd.train(
            student,
            str(tmp_path / "teacher"),
            [f"IS {n} EVEN?" for n in range(12)],
            method="vopd",
            tokenizer=tokenizer,
            output=str(tmp_path / "runs"),
            sampler={"max_new_tokens": 8},
            data={"held_out": 2},
            train={"steps": 2, "prompts_per_step": 4, "learning_rate": 1e-3},
        )
    )

    assert reports[-1].summary is not None
    assert reports[-1].summary["method"] == "vopd"
    assert any(not torch.equal(before[n], w) for n, w in student.named_parameters())
