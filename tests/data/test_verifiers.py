from __future__ import annotations

import sys
import textwrap
from collections.abc import Callable
from pathlib import Path

import pytest
from transformers import PreTrainedTokenizerFast

from opd.data.prompts import task_prompts
from opd.data.verifiers import resolve_verifier, verifier_file
from opd.errors import ConfigError, DataError
from opd.types import Prompt, Verdict

PROMPT = Prompt(id="p.jsonl:7", prompt_ids=(1,), text="What is 40 + 2?", answer="4 2")

Write = Callable[..., Path]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    """`write(body, name="mine.py")`: a file of the user's in the run file's folder."""

    def write_file(body: str, name: str = "mine.py") -> Path:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(textwrap.dedent(body))
        return path

    return write_file


def judge(spec: str, folder: Path, response: str = "text", *, finished: bool = True) -> Verdict:
    return resolve_verifier(spec, base_folder=folder)(PROMPT, response, finished=finished)


# ------------------------------------------------------------------------------------ built in


def test_the_tasks_own_verifier_follows_the_prompts_task(
    characters: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    verify = resolve_verifier("task", base_folder=tmp_path)
    for name in ("sort", "add", "chain"):
        (prompt,) = task_prompts(name, "test", tokenizer=characters, count=1).prompts
        assert prompt.response_ids is not None
        solution = characters.decode(prompt.response_ids, skip_special_tokens=True)
        assert verify(prompt, solution, finished=True) == Verdict(1.0)
        assert verify(prompt, solution, finished=False) == Verdict(0.0, "no end token")
        assert verify(prompt, solution + "9", finished=True) == Verdict(0.0, "wrong answer")


def test_the_tasks_verifier_refuses_other_prompts(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"p.jsonl:7 is none; use 'exact'"):
        judge("task", tmp_path)


@pytest.mark.parametrize(
    ("response", "finished", "verdict"),
    [
        ("4 2", True, Verdict(1.0)),
        ("\n 4\t2 \n", True, Verdict(1.0)),
        ("42", True, Verdict(0.0, "wrong answer")),
        ("4 2.", True, Verdict(0.0, "wrong answer")),
        ("", True, Verdict(0.0, "wrong answer")),
        ("4 2", False, Verdict(0.0, "no end token")),
    ],
)
def test_exact_compares_up_to_white_space(
    tmp_path: Path, response: str, finished: bool, verdict: Verdict
) -> None:
    assert judge("exact", tmp_path, response, finished=finished) == verdict


@pytest.mark.parametrize(
    ("answer", "response", "finished", "verdict"),
    [
        ("1/2", r"So it is $\boxed{0.5}$.", True, Verdict(1.0)),
        (r"\frac{1}{2}", r"The answer is $\frac{2}{4}$.", True, Verdict(1.0)),
        ("42", "The answer is 41.", True, Verdict(0.0, "wrong answer")),
        ("42", "I do not know", True, Verdict(0.0, "no answer")),
        ("42", "The answer is 42.", False, Verdict(0.0, "no end token")),
    ],
)
def test_math_verify_compares_values(
    tmp_path: Path, answer: str, response: str, finished: bool, verdict: Verdict
) -> None:
    pytest.importorskip("math_verify")
    prompt = Prompt(id="p", prompt_ids=(1,), text="", answer=answer)
    verify = resolve_verifier("math-verify", base_folder=tmp_path)
    assert verify(prompt, response, finished=finished) == verdict


def test_math_verify_refuses_an_answer_it_cannot_read(tmp_path: Path) -> None:
    pytest.importorskip("math_verify")
    prompt = Prompt(id="p.jsonl:7", prompt_ids=(1,), text="", answer=" ")
    with pytest.raises(DataError, match=r"p.jsonl:7: math-verify cannot read the answer ' '"):
        resolve_verifier("math-verify", base_folder=tmp_path)(prompt, "42", finished=True)


def test_math_verify_that_is_not_installed_is_named_with_its_extra(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "math_verify", None)  # as if it were not installed
    with pytest.raises(ConfigError, match=r'pip install "opd\[math\]"'):
        resolve_verifier("math-verify", base_folder=tmp_path)


@pytest.mark.parametrize("spec", ["exact", "math-verify"])
def test_a_prompt_without_an_answer_is_named(tmp_path: Path, spec: str) -> None:
    prompt = Prompt(id="p.jsonl:9", prompt_ids=(1,), text="")
    with pytest.raises(DataError, match=r"p.jsonl:9 has no answer.*set answer_column"):
        resolve_verifier(spec, base_folder=tmp_path)(prompt, "x", finished=True)


def test_a_misspelt_verifier_names_the_nearest(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"no verifier 'exat'. Did you mean 'exact'.*'module:fun"):
        resolve_verifier("exat", base_folder=tmp_path)


# ------------------------------------------------------------------------------------ the user's


@pytest.mark.parametrize(
    ("returned", "score"),
    [("True", 1.0), ("False", 0.0), ("0", 0.0), ("1", 1.0), ("0.25", 0.25)],
)
def test_a_users_function_may_return_a_boolean_or_a_number(
    write: Write, tmp_path: Path, returned: str, score: float
) -> None:
    write(f"def judge(prompt, response, *, finished):\n    return {returned}\n")
    assert judge("mine:judge", tmp_path) == Verdict(score)


def test_a_users_function_sees_the_prompt_the_response_and_whether_it_finished(
    write: Write, tmp_path: Path
) -> None:
    write(
        """
        from opd.types import Verdict

        def judge(prompt, response, finished):
            return Verdict(0.5, f"{prompt.id} {prompt.answer} {response} {finished}")
        """
    )
    verdict = judge("mine:judge", tmp_path, "a text", finished=False)
    assert verdict == Verdict(0.5, "p.jsonl:7 4 2 a text False")


@pytest.mark.parametrize(
    "returned", ["None", "'yes'", "1.5", "-0.1", "2", "float('nan')", "Verdict(1.5)", "[1]"]
)
def test_any_other_value_is_refused_with_function_and_value(
    write: Write, tmp_path: Path, returned: str
) -> None:
    write(
        f"""
        from opd.types import Verdict

        def judge(prompt, response, *, finished):
            return {returned}
        """
    )
    with pytest.raises(DataError, match=r"verifier mine:judge returned .* for prompt p.jsonl:7"):
        judge("mine:judge", tmp_path)


def test_an_exception_of_the_users_names_the_prompt_and_keeps_its_cause(
    write: Write, tmp_path: Path
) -> None:
    write("def judge(prompt, response, *, finished):\n    return {}[response]\n")
    with pytest.raises(DataError, match=r"mine:judge failed on prompt p.jsonl:7: KeyError") as info:
        judge("mine:judge", tmp_path)
    assert isinstance(info.value.__cause__, KeyError)


@pytest.mark.parametrize("signature", ["prompt", "prompt, response", "p, r, f, *, finished"])
def test_a_function_that_cannot_be_called_is_refused_before_the_run(
    write: Write, tmp_path: Path, signature: str
) -> None:
    write(f"def judge({signature}):\n    return True\n")
    with pytest.raises(ConfigError, match=r"must take \(prompt, response, \*, finished\)"):
        resolve_verifier("mine:judge", base_folder=tmp_path)


def test_the_run_files_folder_comes_before_pythons_path(write: Write, tmp_path: Path) -> None:
    write("def judge(prompt, response, *, finished):\n    return 0.75\n", "json.py")
    assert judge("json:judge", tmp_path) == Verdict(0.75)
    import json

    assert json.loads("1") == 1  # Python's own is left alone


def test_two_folders_may_hold_files_of_one_name(write: Write, tmp_path: Path) -> None:
    for name, score in (("a", 0.25), ("b", 0.5)):
        body = f"def judge(prompt, response, *, finished):\n    return {score}\n"
        write(body, f"{name}/mine.py")
    assert judge("mine:judge", tmp_path / "a") == Verdict(0.25)
    assert judge("mine:judge", tmp_path / "b") == Verdict(0.5)


def test_packages_neighbours_and_attributes_are_found(write: Write, tmp_path: Path) -> None:
    write("SCORE = 0.125\n", "opd_test_neighbour.py")
    write(
        """
        import dataclasses
        import opd_test_neighbour

        @dataclasses.dataclass
        class Judge:
            score: float

            def __call__(self, prompt, response, *, finished):
                return self.score

        class judges:
            lenient = Judge(opd_test_neighbour.SCORE)
        """,
        "checks/math.py",
    )
    path_before = list(sys.path)
    assert judge("checks.math:judges.lenient", tmp_path) == Verdict(0.125)
    assert sys.path == path_before


def test_a_module_on_pythons_path_is_found(
    write: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    body = "def judge(prompt, response, *, finished):\n    return finished\n"
    path = write(body, "site/opd_test_installed.py")
    monkeypatch.syspath_prepend(path.parent)
    assert judge("opd_test_installed:judge", tmp_path) == Verdict(1.0)
    assert verifier_file("opd_test_installed:judge", tmp_path) == path


@pytest.mark.parametrize(
    ("spec", "reason"),
    [
        ("mime:judge", r"no module 'mime' in .* Did you mean 'mine'"),
        ("no.such:judge", "no module 'no.such'"),
        ("mine:jugde", r"mine.py has no function 'jugde'. Did you mean 'judge'"),
        ("broken:judge", "cannot be imported: ZeroDivisionError: division by zero"),
    ],
)
def test_what_cannot_be_resolved_says_why(
    write: Write, tmp_path: Path, spec: str, reason: str
) -> None:
    write("def judge(prompt, response, *, finished):\n    return True\n")
    write("1 / 0\n", "broken.py")
    with pytest.raises(ConfigError, match=reason):
        resolve_verifier(spec, base_folder=tmp_path)


def test_the_file_of_a_users_verifier_is_named_without_running_it(
    write: Write, tmp_path: Path
) -> None:
    path = write("1 / 0\n")
    assert verifier_file("mine:judge", tmp_path) == path


@pytest.mark.parametrize("spec", ["task", "exact", "math-verify"])
def test_a_built_in_verifier_has_no_source_to_copy(spec: str, tmp_path: Path) -> None:
    assert verifier_file(spec, tmp_path) is None


def test_a_module_without_a_file_cannot_be_copied(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="module 'sys' is not a file that could be copied"):
        verifier_file("sys:exit", tmp_path)
