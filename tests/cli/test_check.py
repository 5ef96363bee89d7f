"""`opd check`: what stands in the way of a run, found before its weights load."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from opd.cli.main import main
from opd.models import memory_estimate
from opd.training.check import Finding, check, examine
from opd.training.config import DataConfig, Run, load
from opd.training.session import prompt_settings
from tests.models_zoo import save_tiny

Written = Callable[..., Run]


@pytest.fixture
def written(tmp_path: Path) -> Written:
    """A run of the built-in models on a JSON Lines file of the given records."""

    def write(records: list[object], *overrides: str) -> Run:
        lines = [record if isinstance(record, str) else json.dumps(record) for record in records]
        (tmp_path / "prompts.jsonl").write_text("\n".join(lines) + "\n")
        file = tmp_path / "run.toml"
        file.write_text(
            '[student]\nmodel = "builtin:sort-student"\n'
            '[teacher]\nmodel = "builtin:sort-teacher"\n'
            '[data]\nprompts = "prompts.jsonl"\nheld_out = 1\n'
            "[sampler]\nmax_new_tokens = 64\n"
        )
        return load(file, overrides)

    return write


GOOD = [{"prompt": f"S{n}:", "answer": str(n)} for n in (1234, 4321, 2222)]


def errors(run: Run) -> list[Finding]:
    return [finding for finding in check(run) if finding.level == "error"]


def at(where: str, run: Run) -> list[Finding]:
    return [finding for finding in check(run) if finding.where == where]


def only_error(run: Run) -> Finding:
    (found,) = errors(run)
    return found


def test_the_embedded_default_has_nothing_against_it() -> None:
    assert check(load()) == []


def test_a_good_file_has_no_errors(written: Written) -> None:
    assert errors(written(GOOD)) == []


@pytest.mark.parametrize(
    ("overrides", "where", "part"),
    [
        ("--student.model ./none", "student.model", "does not exist"),
        ("--teacher.model ''", "teacher.model", "needs a teacher"),
        ("--data.prompts none.jsonl", "data.prompts", "none.jsonl"),
        ("--data.test none.jsonl", "data.test", "none.jsonl"),
        ("--evaluate.sets.more task:sotr", "evaluate.sets.more", "'sort'"),
        ("--data.prompt_column question", "data.prompts", "there are: prompt, answer"),
        ("--data.verifier nowhere:judge", "data.verifier", "no module 'nowhere'"),
        ("--data.held_out 3", "data.held_out", "only 3 distinct"),
        ("--warmup.steps 5", "data.response_column", "has no response"),
        ("--method top_k_opd --method.options.k 54", "method", "vocabulary has 53"),
        ("--method.name custom --method.objective.terms []", "method", "at least one term"),
        ("--sampler.max_new_tokens 300", "sampler.max_new_tokens", "256 positions"),
        ("--device cuda:99x", "device", "cuda:99x"),
        ("--student.lora.r 4 --student.lora.target_modules ['none']", "student.lora", "none"),
    ],
)
def test_an_error_is_found_at_its_key(
    written: Written, overrides: str, where: str, part: str
) -> None:
    found = only_error(written(GOOD, *overrides.split(" ")))
    assert found.where.startswith(where)
    assert part in found.message


def test_an_unreadable_line_far_down_is_found(written: Written) -> None:
    found = only_error(written([*GOOD * 400, "{broken"]))
    assert found.where == "data.prompts"
    assert "line 1201" in found.message


def test_a_verifier_that_fails_is_found_by_trying_it(written: Written, tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text("def judge(prompt, response, *, finished):\n    return 'x'\n")
    found = only_error(written(GOOD, "--data.verifier", "mine:judge"))
    assert found.where == "data.verifier"
    assert "'x'" in found.message


def test_a_formula_of_the_users_that_cannot_be_read_is_found(
    written: Written, tmp_path: Path
) -> None:
    (tmp_path / "broken.py").write_text("def f(:\n")
    term = '[{kind = "dense", divergence = "broken:f"}]'
    run = written(GOOD, "--method.name", "custom", "--method.objective.terms", term)
    found = only_error(run)
    assert found.where == "method"
    assert "broken" in found.message


def test_several_errors_are_all_told_errors_first(written: Written) -> None:
    run = written(
        GOOD,
        *("--data.verifier", "nowhere:judge", "--student.model", "./none"),
        *("--sampler.temperature", "0.7"),
    )
    levels = [finding.level for finding in check(run)]
    assert levels == ["error", "error", "note"]


CUSTOM = (
    "--method.name",
    "custom",
    "--method.objective.terms",
    '[{kind = "dense", divergence = "forward_kl"}]',
    "--method.states",
)


@pytest.mark.parametrize(
    ("states", "others", "where", "said"),
    [
        ("{interleave = 99}", (), "method.states", "interleave = 99, but the vocabulary has"),
        ("{teacher_prefix = 64}", (), "method.states", "leaves the student nothing of"),
        ("{mixture = 0.1}", ("--teacher.model", ""), "teacher.model", "needs a teacher"),
        ("{rewrite = 0.5}", ("--data.verifier", "none"), "method", "there is no verifier"),
        ("{mixture = 0.1, interleave = 4}", (), "method", "are two rules for the same token"),
        ("{horizon = 5, horizons = 4}", (), "method", "unknown key 'horizons'"),
    ],
)
def test_states_that_cannot_work_are_found_at_their_key(
    written: Written, states: str, others: tuple[str, ...], where: str, said: str
) -> None:
    found = [
        error for error in errors(written(GOOD, *CUSTOM, states, *others)) if said in str(error)
    ]
    assert [error.where for error in found] == [where]


def test_a_horizon_beyond_the_samplers_limit_is_a_note(written: Written) -> None:
    run = written(GOOD, *CUSTOM, "{horizon = 100}")
    assert errors(run) == []
    (found,) = at("method.states", run)
    assert "sampler.max_new_tokens = 64 ends every response before" in found.message


def test_a_sampler_that_is_not_the_student_is_a_note(written: Written) -> None:
    (found,) = at("sampler", written(GOOD, "--sampler.temperature", "0.7"))
    assert found.level == "note"
    assert "0.7" in found.message


def test_empty_prompts_are_counted(written: Written) -> None:
    (found,) = at("data.prompts", written([*GOOD, {"prompt": "", "answer": "1"}]))
    assert found == Finding("note", "data.prompts", "1 prompts are empty and will be left out")


def test_vocabularies_that_disagree_are_found_without_weights(
    written: Written, tmp_path: Path
) -> None:
    save_tiny("llama", tmp_path / "other")
    for file in (tmp_path / "other").glob("*.safetensors"):
        header = file.read_bytes()  # names and shapes; the weights behind them are cut away
        length = int.from_bytes(header[:8], "little")
        with file.open("r+b") as handle:
            handle.seek(8 + length)
            handle.write(b"\xff" * (len(header) - 8 - length))
    found = only_error(written(GOOD, "--teacher.model", "other"))
    assert found.where == "teacher.model"
    assert "do not share a vocabulary" in found.message


def test_memory_counts_weights_gradients_and_optimizer_of_the_student(written: Written) -> None:
    parts = {part.what: part.bytes for part in examine(written(GOOD)).memory}
    weights = 4 * memory_estimate("builtin:sort-student")["parameters"]
    assert parts["student weights"] == parts["gradients"] == weights
    assert parts["optimizer"] == 2 * weights
    assert parts["teacher weights"] == memory_estimate("builtin:sort-teacher")["bytes"]
    adapter = {p.what: p.bytes for p in examine(written(GOOD, "--student.lora.r", "2")).memory}
    assert adapter["student weights"] == weights
    assert adapter["gradients"] < weights / 2


def test_a_smaller_micro_batch_lowers_only_what_it_should(written: Written) -> None:
    whole = {part.what: part.bytes for part in examine(written(GOOD)).memory}
    small = examine(written(GOOD, "--train.max_tokens", "128")).memory
    lower = {part.what for part in small if part.bytes < whole[part.what]}
    assert lower == {"activations", "logits"}


def test_the_command_exits_2_on_an_error_and_0_on_notes(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main(["check", "--sampler.temperature", "0.7"]) == 0
    shown = capsys.readouterr().out
    assert "note: sampler" in shown
    assert "together" in shown
    assert main(["check", "--student.model", "./none"]) == 2
    assert "error: student.model" in capsys.readouterr().out


def test_json_rows_have_one_form(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["check", "--sampler.temperature", "0.7", "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert {row["kind"] for row in rows} == {"note", "memory"}
    assert all({"kind", "where", "message"} <= row.keys() for row in rows)


def test_checking_leaves_the_random_state_alone() -> None:
    torch.manual_seed(7)
    before = torch.random.get_rng_state()
    check(load())
    assert torch.equal(before, torch.random.get_rng_state())


def test_what_the_run_file_says_of_records_is_how_they_are_read() -> None:
    changed: dict[str, Any] = {
        "prompt_column": "q",
        "messages_column": "m",
        "answer_column": "a",
        "response_column": "r",
        "max_prompt_tokens": 7,
        "bad_prompts": "error",
        "as_chat": True,
        "dataset_split": "s",
        "dataset_subset": "u",
        "chat_template_kwargs": {"style": "brief"},
    }
    read = prompt_settings(DataConfig(prompts="x.jsonl", **changed), with_responses=False)
    assert dataclasses.asdict(read) == {**changed, "with_responses": False}
