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
from opd.errors import ConfigError
from opd.models import load_model, memory_estimate, save_model
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
    # stored in 16 bits, and widened on a CPU, where half precision is slower
    assert parts["teacher weights"] == 4 * memory_estimate("builtin:sort-teacher")["parameters"]
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


# --------------------------------------------------------------------------------------------
# Composition rules


STALE = ("--method", "sampled_token_opd", "--train.updates_per_rollout", "4")


def test_what_must_be_declared_is_an_error_with_both_ways_out(written: Written) -> None:
    found = only_error(written(GOOD, *STALE))
    assert found.where == "method.objective"
    for part in ("(stale-tokens)", "truncated_importance", 'check.declared = ["stale-tokens"]'):
        assert part in found.message


def test_what_is_declared_is_a_note(written: Written) -> None:
    run = written(GOOD, *STALE, "--check.declared", '["stale-tokens"]')
    assert errors(run) == []
    (found,) = at("method.objective", run)
    assert found.level == "note"
    assert "(stale-tokens, declared)" in found.message


def test_a_declaration_of_what_is_not_done_is_noted(written: Written) -> None:
    (found,) = at("check.declared", written(GOOD, "--check.declared", '["stale-tokens"]'))
    assert (found.level, "'stale-tokens'" in found.message) == ("note", True)


def test_what_is_refused_has_no_declaration_as_its_way_out(written: Written) -> None:
    term = '[{kind = "sampled", reward = "expected_log_ratio"}]'
    run = written(GOOD, "--method.name", "custom", "--method.objective.terms", term)
    found = only_error(run)
    assert "(distribution-as-reward)" in found.message
    assert "check.declared" not in found.message


def test_what_a_term_accepts_needs_no_second_declaration(written: Written) -> None:
    term = (
        '[{kind = "dense", divergence = "reverse_kl", tail = "truncate", accept_collapse = true, '
        'support = {use = "student_top_k", k = 4}}]'
    )
    run = written(GOOD, "--method.name", "custom", "--method.objective.terms", term)
    assert errors(run) == []
    (found,) = at("method.objective", run)
    assert "leave the support" in found.message


def test_the_facts_that_rules_read_are_those_of_the_run(written: Written) -> None:
    wheres = {
        "--sampler.temperature 0.7": "sampler.temperature",
        "--sampler.top_p 0.9": "sampler.top_p",
        "--sampler.top_k 3": "sampler.top_k",
        "--train.updates_per_rollout 2": "method.objective",
    }
    for words, where in wheres.items():
        found = only_error(written(GOOD, "--method", "sampled_token_opd", *words.split()))
        assert found.where == where
    alone = only_error(written(GOOD, "--method", "kdrl"))
    assert alone.where == "sampler.samples_per_prompt"
    assert errors(written(GOOD, "--method", "kdrl", "--sampler.samples_per_prompt", "4")) == []


def test_a_limit_below_the_responses_of_a_task_cuts_returns() -> None:
    words = ["--method", "rao_blackwell_opd", "--sampler.max_new_tokens", "8"]
    found = only_error(load(None, words))
    assert found.where == "sampler.max_new_tokens"
    assert "(truncated-returns)" in found.message
    assert errors(load(None, words[:2])) == []


@pytest.mark.parametrize(
    ("name", "parts"),
    [
        ("stale-reward", ["'stale-reward' is no rule", "'stale-rewards'"]),
        ("k1-back-propagated", ["'refused'", "takes no declaration"]),
        ("top-k-as-baseline", ["'allowed'", "takes no declaration"]),
    ],
)
def test_a_declaration_is_checked_on_load(name: str, parts: list[str]) -> None:
    with pytest.raises(ConfigError) as refused:
        load(None, ["--check.declared", f'["{name}"]'])
    for part in ("check.declared", *parts):
        assert part in str(refused.value)


# --------------------------------------------------------------------------------------------
# The trial of the objective


def custom(term: str) -> tuple[str, ...]:
    return ("--method.name", "custom", "--method.objective.terms", f"[{{{term}}}]")


SAMPLED = 'kind = "sampled", reward = "teacher_log_ratio"'


@pytest.mark.parametrize(
    ("words", "where", "said"),
    [
        (
            ("--method", "eopd", "--method.options.low", "-1"),
            "method.options.low",
            "got -1 and 0.2",
        ),
        (
            ("--method", "gkd", "--method.options.teacher_weight", "1"),
            "method.options.teacher_weight",
            "strictly between 0 and 1, got 1",
        ),
        (
            custom(SAMPLED + ', surrogate = {use = "clipped", low = 2, high = 0.2}'),
            "method.objective.terms[0].surrogate",
            "got 2 and 0.2",
        ),
        (
            custom(SAMPLED + ', weights = ["trust", {use = "keep_high_entropy", share = 1.5}]'),
            "method.objective.terms[0].weights[1]",
            "got 1.5",
        ),
        (
            custom(SAMPLED + ', credit = {use = "discounted", gamma = 0.9, meaning = "none"}'),
            "method.objective.terms[0].credit",
            "must say what it means",
        ),
        (  # the second of two that differ in their knobs alone
            custom(
                SAMPLED
                + ', surrogate = {use = "clipped", low = 0.2, high = 0.2}}, {'
                + SAMPLED
                + ', name = "b", surrogate = {use = "clipped", low = 3, high = 0.2}'
            ),
            "method.objective.terms[1].surrogate",
            "got 3 and 0.2",
        ),
        (
            custom(
                'kind = "dense", divergence = {use = "skew_reverse_kl", skew = '
                '{schedule = "linear", start = 0.1, end = 1.0, steps = 9}}'
            ),
            "method.objective.terms[0].divergence",
            "got 1.0",
        ),
        (
            custom(
                'kind = "routed", candidates = "raised", source = {reward = '
                '{use = "floored_log_ratio", floor_nats = 1}}'
            ),
            "method.objective.terms[0].source.reward",
            "floor_nats must be negative, got 1",
        ),
    ],
)
def test_an_option_out_of_range_is_found_at_its_key(
    written: Written, words: tuple[str, ...], where: str, said: str
) -> None:
    found = only_error(written(GOOD, *words))
    assert found.where == where
    assert said in found.message


def test_a_formula_of_the_users_is_tried(written: Written, tmp_path: Path) -> None:
    (tmp_path / "tried.py").write_text(
        "def detached(student_log_probs, teacher_log_probs):\n"
        "    return (student_log_probs - teacher_log_probs).sum(-1).detach()\n\n"
        "def by_name(student_log_probs, teacher_log_probs):\n"
        "    return -student_log_probs[..., 52]\n\n"
        "def scores(student_logp, extra_grade):\n"
        "    assert set(extra_grade.tolist()) == {3.0}\n"
        "    return -student_logp * extra_grade\n"
    )

    def with_formula(name: str) -> Run:
        records = [{**record, "grade": 3} for record in GOOD]
        term = f'kind = "dense", divergence = "tried:{name}"'
        return written(records, *custom(term))

    assert "no term of the objective depends on" in only_error(with_formula("detached")).message
    # it names a token of the student's 53, and reads a column of the data
    assert errors(with_formula("by_name")) == []
    assert errors(with_formula("scores")) == []


def test_a_column_that_the_records_lack_is_told_once(written: Written) -> None:
    run = written(GOOD, "--method", "verify_first", "--sampler.samples_per_prompt", "4")
    found = only_error(run)
    assert found.where == "data.prompts"
    assert "teacher_pass" in found.message


# --------------------------------------------------------------------------------------------
# Several files


@pytest.fixture
def three(tmp_path: Path) -> list[str]:
    """A run file that works, one with a note and an error, and one that is none."""
    text = (Path(__file__).parents[2] / "recipes/add.toml").read_text()
    (tmp_path / "good.toml").write_text(text)
    (tmp_path / "bad.toml").write_text(f"{text}[sampler]\ntemperature = 0.7\ntop_kk = 1\n")
    (tmp_path / "noted.toml").write_text(
        text.replace('"builtin:add-teacher"', '"./none"') + "[sampler]\ntemperature = 0.7\n"
    )
    return [str(tmp_path / f"{name}.toml") for name in ("good", "bad", "noted")]


def test_several_files_are_checked_each_under_its_name(
    three: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["check", *three]) == 2
    lines = capsys.readouterr().out.splitlines()
    heads = {line.rpartition(": ")[0]: place for place, line in enumerate(lines) if line[:1] == "/"}
    assert list(heads) == three
    good, bad, noted = (heads[name] for name in three)
    assert lines[good].endswith("nothing stands in the way")
    assert "'top_kk'" in "".join(lines[bad:noted])
    rest = "".join(lines[noted:])
    assert "error: teacher.model" in rest
    assert "note: sampler" in rest
    assert lines[-1] == "2 of 3 runs cannot work"
    assert main(["check", three[0], three[0]]) == 0


def test_json_of_several_files_says_which_and_in_the_form_of_one(
    three: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["check", *three, "--json"]) == 2
    rows = json.loads(capsys.readouterr().out)
    assert {row["file"] for row in rows} == set(three)
    failed = {row["file"] for row in rows if row["kind"] == "error"}
    assert failed == set(three[1:])
    assert main(["check", three[0], "--json"]) == 0
    alone = json.loads(capsys.readouterr().out)
    assert alone == [row for row in rows if row["file"] == three[0]]


def test_an_override_holds_for_every_file(
    three: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["check", three[0], three[0], "--method", "rao_blackwel_opd"]) == 2
    assert capsys.readouterr().out.count("'rao_blackwell_opd'") == 2


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


def test_a_teacher_that_scores_in_float32_is_estimated_as_such(tmp_path: Path) -> None:
    """Stored in half precision, it is widened on a CPU, where half is slower."""
    loaded = load_model("builtin:sort-teacher-init", dtype="bfloat16", device="cpu")
    save_model(loaded, tmp_path / "half", dtype="bfloat16")
    run = load(None, ["--teacher.model", str(tmp_path / "half")])
    parts = {part.what: part.bytes for part in examine(run).memory}
    count = sum(weight.numel() for weight in loaded.model.parameters())
    assert parts["teacher weights"] == 4 * count
