"""What the documentation tells a reader to type works, and what it says about the code is so."""

from __future__ import annotations

import ast
import contextlib
import dataclasses
import importlib.util
import json
import re
import shlex
import sys
import textwrap
import tomllib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

import opd
from opd import catalog
from opd.cli.main import COMMANDS, main
from opd.data.tasks import SPLITS, Task
from opd.methods.make_index import method_rows
from opd.objective import Method
from opd.terms import TERMS
from opd.training.config import (
    Run,
    from_tree,
    load,
    overridden,
    parse_overrides,
    read_toml,
    to_toml,
)
from opd.training.loop import train_run
from opd.training.session import build_method
from tests import battery, test_battery
from tests.builders import Case, evaluate
from tests.models_zoo import save_tiny

ROOT = Path(__file__).resolve().parents[1]
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md"), ROOT / "benchmarks/README.md"])
FOLDERS = (ROOT / "recipes", ROOT / "recipes/several_teachers")
RECIPES = sorted(file for folder in FOLDERS for file in folder.glob("*.toml"))
TEMPLATE = "own_models.toml"

TINY: Mapping[str, Any] = {
    "train.steps": 2,
    "train.prompts_per_step": 4,
    "warmup.prompts_per_step": 4,
    "evaluate.every": 1,
    "evaluate.prompts": 4,
    "evaluate.test_prompts": 4,
    "sampler.max_new_tokens": 8,
    "threads": 1,
}


# --------------------------------------------------------------------------------------------
# Reading the pages


@dataclass(frozen=True)
class Block:
    """A fenced block: its language, its text, and the HTML comment in front of it, if any."""

    page: Path
    line: int
    language: str
    text: str
    marker: str

    @property
    def place(self) -> str:
        return f"{self.page.relative_to(ROOT)}:{self.line}"

    @property
    def file(self) -> str:
        """The file that the page says this is; empty for none."""
        return self.marker.removeprefix("file: ") if self.marker.startswith("file: ") else ""


_FENCE = re.compile(
    r"(?:^<!-- (?P<marker>[^\n]+?) -->\n)?^```(?P<language>\w*)\n(?P<text>.*?)^```$", re.M | re.S
)


@cache
def blocks(page: Path) -> tuple[Block, ...]:
    text = page.read_text(encoding="utf-8")
    return tuple(
        Block(
            page,
            text.count("\n", 0, found.start()) + 1,
            found["language"],
            found["text"],
            found["marker"] or "",
        )
        for found in _FENCE.finditer(text)
    )


ALL = [block for page in PAGES for block in blocks(page)]


def in_language(language: str) -> Any:
    chosen = [block for block in ALL if block.language == language]
    return pytest.mark.parametrize("block", chosen, ids=[block.place for block in chosen])


def command_lines(block: Block) -> Iterator[list[str]]:
    """The words of every command of a shell block, comments left out."""
    for line in block.text.splitlines():
        for command in line.split(" && "):
            words = shlex.split(command, comments=True)
            if words:
                yield words


def files_of(page: Path, folder: Path) -> None:
    """Write the files that a page shows."""
    for block in blocks(page):
        if block.file:
            (folder / block.file).write_text(block.text, encoding="utf-8")


def module_from(name: str, file: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


def words_of(settings: Mapping[str, Any]) -> list[str]:
    return [word for key, value in settings.items() for word in (f"--{key}", str(value))]


# --------------------------------------------------------------------------------------------
# Commands, links, versions


@in_language("sh")
def test_every_command_line_exists(block: Block) -> None:
    for words in command_lines(block):
        match words:
            case ["opd", name, *rest]:
                arguments = COMMANDS[name].parser(name).read(rest)
                overridden({}, parse_overrides(arguments.overrides), source=block.place)
            case ["make", target]:
                assert re.search(rf"^{target}:", (ROOT / "Makefile").read_text(), re.M), target
            case ["python", script]:
                assert (ROOT / script).is_file(), script
            case ["pip", "install", "-e", what]:
                named = re.findall(r"\w+", what)
                assert set(named) <= set(project()["optional-dependencies"]), named
            case _:
                pytest.fail(f"{block.place}: what is {shlex.join(words)!r}?")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_relative_link_leads_somewhere(page: Path) -> None:
    text = _FENCE.sub("", page.read_text(encoding="utf-8"))
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if target.startswith(("http://", "https://")):
            continue
        path, _, anchor = target.partition("#")
        linked = (page.parent / path).resolve() if path else page
        assert linked.exists(), f"{page.name} links to {target}"
        assert not anchor or anchor in anchors(linked), f"{page.name} links to {target}"


def anchors(page: Path) -> set[str]:
    """The names GitHub gives to headings."""
    titles = re.findall(r"^#+ (.+)$", _FENCE.sub("", page.read_text(encoding="utf-8")), re.M)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


def project() -> dict[str, Any]:
    found: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    return found


def test_the_first_screen_names_the_two_commands_and_shows_the_picture() -> None:
    screen = "\n".join((ROOT / "README.md").read_text().splitlines()[:16])
    assert re.search(r"^make run\b", screen, re.M)
    assert re.search(r"^make test\b", screen, re.M)
    assert "docs/images/default_run.png" in screen


def test_the_versions_agree() -> None:
    newest = re.search(r"^## \[(.+?)\]", (ROOT / "CHANGELOG.md").read_text(), re.M)
    assert newest is not None
    assert newest[1] == project()["version"] == opd.__version__


def test_the_readme_lists_every_extra_of_the_package_and_no_other() -> None:
    rows = re.findall(r"^\| (`.+`) \| .+ \|$", (ROOT / "README.md").read_text(), re.M)
    named = {name for row in rows for name in re.findall(r"`(\w+)`", row)}
    assert named == set(project()["optional-dependencies"]) - {"bench", "peers", "dev"}


def test_the_changelog_names_every_method_and_command() -> None:
    text = (ROOT / "CHANGELOG.md").read_text()
    for name in catalog.methods():
        assert f"`{name}`" in text, name
    for command in COMMANDS:
        assert f"`opd {command}`" in text, command


@in_language("python")
def test_python_compiles(block: Block) -> None:
    compile(block.text, block.place, "exec")


@in_language("toml")
def test_toml_is_a_run_file_or_a_part_of_one(block: Block) -> None:
    tree = tomllib.loads(block.text)
    if not block.file:
        tree = {"student": {"model": "s"}, "data": {"prompts": "p"}} | tree
        if isinstance(table := tree.get("method"), dict) and "name" not in table:
            terms = [{"kind": "dense", "divergence": "reverse_kl"}]
            tree["method"] = {"name": "custom", "objective": {"terms": terms}, **table}
    config = from_tree(tree, source=block.place)
    if config.method.objective.get("terms") and not block.file:
        assert build_method(Run(config, ROOT)).objective.terms


def test_every_key_of_a_run_file_in_running_text_exists() -> None:
    sections = "student|teacher|data|sampler|warmup|train|critic|evaluate|log"
    for page in PAGES:
        text = _FENCE.sub("", page.read_text(encoding="utf-8"))
        named = re.findall(rf"`((?:{sections})\.(?!py`)\w[\w.]*)", text)
        assert len(named) > 10 or page.name not in ("guide.md", "from_trl.md"), page
        for key in named:
            overridden({}, [(key, None)], source=page.name)


# --------------------------------------------------------------------------------------------
# Generated pages


def test_the_page_of_the_run_file_is_up_to_date() -> None:
    make = module_from("make_run_file", ROOT / "docs/make_run_file.py")
    assert (ROOT / "docs/run_file.md").read_text() == make.page(), "python docs/make_run_file.py"


def test_the_tables_of_the_audit_are_up_to_date() -> None:
    make = module_from("make_audit_tables", ROOT / "docs/make_audit_tables.py")
    page = (ROOT / "docs/audit.md").read_text(encoding="utf-8")
    assert page == make.page(page), "python docs/make_audit_tables.py"


def test_the_page_of_the_rules_is_up_to_date() -> None:
    make = module_from("make_rules_page", ROOT / "docs/make_rules_page.py")
    page = (ROOT / "docs/rules.md").read_text(encoding="utf-8")
    assert page == make.page(), "python docs/make_rules_page.py"
    named = re.findall(r"^### `([\w-]+)`$", page, re.M)
    assert sorted(named) == sorted(catalog.rules())


def test_the_pages_of_the_methods_are_up_to_date() -> None:
    make = module_from("make_method_pages", ROOT / "docs/make_method_pages.py")
    rows = method_rows()
    said = "python docs/make_method_pages.py"
    assert (ROOT / "docs/methods.md").read_text(encoding="utf-8") == make.methods_page(rows), said
    assert (ROOT / "docs/atlas.md").read_text(encoding="utf-8") == make.atlas_page(rows), said


def test_the_pages_of_the_methods_name_methods_that_exist_and_all_of_them() -> None:
    make = module_from("make_method_pages", ROOT / "docs/make_method_pages.py")
    here = [words for _, words in make.ROWS if not words.startswith("not here")]
    named = {name for words in here for name in words.split()}
    assert named <= set(catalog.methods())
    assert len({name for name, _ in make.ROWS}) == len(make.ROWS) == 73
    families = {entry.module.rpartition(".")[2] for entry in catalog.methods().values()}
    assert families == set(make.FAMILIES)


def test_the_number_of_methods_is_said_as_it_is() -> None:
    said = re.findall(r"\[(\d+) published methods\]", (ROOT / "README.md").read_text())
    said += re.findall(
        r"rows of a response, (\d+) compositions", (ROOT / "CHANGELOG.md").read_text()
    )
    assert said == [str(len(catalog.methods()))] * 2


def test_the_page_of_the_run_file_has_every_key_with_its_default() -> None:
    page = (ROOT / "docs/run_file.md").read_text()
    sections = dict(re.findall(r"^## `\[([\w.]+)\]`\n(.*?)(?=^## |\Z)", page, re.M | re.S))
    config = dataclasses.asdict(from_tree({"student": {"model": ""}, "data": {"prompts": ""}}))
    assert config.pop("teachers") == {}  # a section per name, with the keys of [teacher]
    tables = {name: values for name, values in config.items() if isinstance(values, dict)}
    inner = {("student", "lora"), ("teacher", "client"), ("teacher", "cache")}
    tables |= {f"{outer}.{name}": tables[outer].pop(name) for outer, name in inner}
    assert set(sections) == set(tables)
    for section, values in tables.items():
        for key, value in values.items():
            (row,) = re.findall(rf"^\| `{key}` \| .*$", sections[section], re.M)
            assert f"| `{json.dumps(value)}` |" in row or "| required |" in row, (section, row)


@pytest.fixture
def tables(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """`benchmarks/readme_tables.py`, imported as its command runs it."""
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    return module_from("readme_tables", ROOT / "benchmarks/readme_tables.py")


def test_the_tables_of_the_pages_are_those_of_the_committed_results(tables: ModuleType) -> None:
    for page in tables.PAGES:
        text = page.read_text()
        assert tables.filled(text) == text, "python benchmarks/readme_tables.py"


def test_results_fill_their_own_table_and_nothing_else(tables: ModuleType, tmp_path: Path) -> None:
    score = {"value": 0.5, "low": 0.4, "high": 0.6, "n": 1000}
    arms = ("reverse_kl_opd", "offpolicy_kd", "sft_on_teacher")
    accuracy = [
        {"case": "seed 0", "system": arm, "start": score, "end": {**score, "value": 0.75}}
        | {"teacher": score, "gain": 0.25}
        for arm in arms
    ]
    speed = [{"case": "step", "system": "trl", "tokens_per_s": 1234.5, "ratio": 2.5}]
    for name, rows in (("default_run", accuracy), ("step", speed)):
        result = {"command": "python x.py", "versions": {"torch": "2"}, "rows": rows}
        machine = {"machine": {"cores": 2, "accelerator": "none"}}
        (tmp_path / f"{name}.json").write_text(json.dumps(result | machine))
    readme = (ROOT / "README.md").read_text()

    filled = tables.filled(readme, tmp_path)

    assert "| seed 0 | 0.500 | 0.750 (+0.250) |" in filled
    assert "| step | trl | 1,234 | 2.50 |" in filled
    assert filled.count("<!-- ") == readme.count("<!-- ")
    assert without_tables(filled) == without_tables(readme)
    assert tables.filled(filled, tmp_path) == filled
    empty = tmp_path / "none"
    assert tables.filled(readme, empty) == readme


def without_tables(text: str) -> str:
    for name in ("default_run", "step"):
        text = re.sub(rf"(<!-- results:{name} -->).*?(<!-- /results)", r"\1\2", text, flags=re.S)
    return text


# --------------------------------------------------------------------------------------------
# The guide, followed from top to bottom


@pytest.fixture(scope="module")
def walk(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The guide's folder after all it says to type: its files, tiny models, short runs."""
    folder = tmp_path_factory.mktemp("guide")
    guide = ROOT / "docs/guide.md"
    files_of(guide, folder)
    save_tiny("llama", folder / "teacher", hidden=48, layers=3, seed=1)
    save_tiny("qwen3", folder / "student", hidden=32, layers=2, seed=2)
    shorten(folder / "my_run.toml")
    with contextlib.chdir(folder):
        names: dict[str, Any] = {"__name__": "guide"}
        for block in blocks(guide):
            if block.marker != "run":
                continue
            if block.language == "python":
                exec(compile(block.text, block.place, "exec"), names)
            for words in command_lines(block) if block.language == "sh" else ():
                assert main(words[1:]) == 0, f"{block.place}: {shlex.join(words)}"
    return folder


def shorten(file: Path) -> None:
    """Write the same run, so short that a test can wait for it."""
    tree = overridden(read_toml(file), {**TINY, "data.held_out": 1}.items(), source="test")
    file.write_text(to_toml(from_tree(tree)), encoding="utf-8")


def test_the_guide_can_be_followed(walk: Path) -> None:
    for name in ("first", "second"):
        summary = json.loads((walk / "runs" / name / "summary.json").read_text())
        assert summary["exit_reason"] == "finished"
        assert summary["final_accuracy"]["n"] == 1


def test_the_verifier_of_the_guide_tells_right_from_wrong(walk: Path) -> None:
    is_even = module_from("judge", walk / "judge.py").is_even
    prompt = opd.types.Prompt(id="1", prompt_ids=(1,), text="IS 4 EVEN?")
    assert is_even(prompt, "YES", finished=True)
    assert not is_even(prompt, "NO", finished=True)
    assert not is_even(prompt, "YES", finished=False)


def test_the_custom_objective_of_the_guide_trains(walk: Path, tmp_path: Path) -> None:
    settings = {**TINY, "data.held_out": 1, "output": tmp_path}
    run = load(walk / "custom.toml", words_of(settings))
    *_, last = train_run(run)
    assert last.summary is not None
    assert last.summary["exit_reason"] == "finished"
    assert (last.folder / "sources").is_dir()
    assert (last.folder / "reference").is_dir()


def test_the_example_of_the_readme_runs(walk: Path, tmp_path: Path) -> None:
    (example,) = [block for block in blocks(ROOT / "README.md") if block.marker == "run"]
    with contextlib.chdir(walk):
        exec(compile(example.text, example.place, "exec"), {})
    assert (walk / "runs" / "chats-1" / "model").is_dir()


def test_the_examples_of_the_audit_say_what_is_descended(
    capsys: pytest.CaptureFixture[str],
) -> None:
    loss, example = (block for block in blocks(ROOT / "docs/audit.md") if block.marker == "run")
    exec(compile(loss.text, loss.place, "exec"), {})
    assert capsys.readouterr().out.splitlines()[0] == (
        "descends reverse KL (cosine 1.000); named reverse KL: holds"
    )
    exec(compile(example.text, example.place, "exec"), {})
    errors = [float(found) for found in re.findall(r"off by (\S+),", capsys.readouterr().out)]
    assert [error < 1e-9 for error in errors] == [False, True, True]


def test_the_guide_lists_every_key_of_a_term() -> None:
    text = (ROOT / "docs/guide.md").read_text()
    table = text[text.index("| key of a term |") :].split("\n\n", 1)[0]
    named = set(re.findall(r"`(\w+)`", " ".join(line.split("|")[1] for line in table.splitlines())))
    keys = {key for term in TERMS.values() for key in term.__dataclass_fields__}
    assert named == keys | {"kind"}


def test_the_page_of_objectives_names_every_formula_that_a_slot_takes() -> None:
    named = set(re.findall(r"`(\w+)`", (ROOT / "docs/objectives.md").read_text()))
    slots = {
        name for name, found in catalog.formulas().items() if found.module != "opd.formula.reduce"
    }
    assert {name.partition(".")[2] for name in slots} <= named


def test_the_guide_lists_every_exit_code() -> None:
    from opd.cli import main as cli

    text = (ROOT / "docs/guide.md").read_text()
    table = text[text.index("| exit code |") :].split("\n\n", 1)[0]
    codes = {int(code) for code in re.findall(r"^\| (\d+) \|", table, re.M)}
    assert codes == {0, cli.USAGE_ERROR, cli.TRAINING_ERROR, cli.INTERRUPTED}


# --------------------------------------------------------------------------------------------
# The run folder


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A short run of the embedded default with a warm-up: `runs/sort-1` in a folder of its own."""
    folder = tmp_path_factory.mktemp("default")
    with contextlib.chdir(folder):
        settings = {**TINY, "warmup.steps": 1, "train.save_every": 1}
        *_, last = train_run(load(None, words_of(settings)))
    return folder / last.folder


def folder_page() -> str:
    return (ROOT / "docs/run_folder.md").read_text()


def test_the_page_of_the_run_folder_names_every_file(finished: Path, walk: Path) -> None:
    page = folder_page()
    for folder in (finished, walk / "runs/first", finished / "checkpoints/step-2"):
        for path in folder.iterdir():
            assert f"`{path.name}{'/' if path.is_dir() else ''}`" in page, path
    for path in (finished / "checkpoints").iterdir():
        assert f"`checkpoints/{re.sub(r'[0-9]+$', 'N', path.name)}/`" in page, path


def test_the_page_of_the_run_folder_names_every_key_and_metric(finished: Path) -> None:
    page = folder_page()
    events = [json.loads(line) for line in (finished / "events.jsonl").read_text().splitlines()]
    samples = [json.loads(line) for line in (finished / "samples.jsonl").read_text().splitlines()]
    named = {key for record in (*events, *samples) for key in record}
    named |= {part for event in events for part in event.get("seconds", {})}
    named |= set(json.loads((finished / "summary.json").read_text()))
    metrics = {name for event in events for name in event.get("metrics", {})}
    monitors = {name for name in metrics if name.startswith("monitor/")}
    named |= {re.sub("^(loss|advantage)/.*", r"\1/TERM", name) for name in metrics - monitors}
    for name in named:
        assert f"`{name}`" in page or f'"{name}"' in page, name
    alarms = (ROOT / "docs/alarms.md").read_text()
    for name in monitors:
        plain = re.sub("/(first|middle|last|right|wrong)$", "", name)
        assert f"`{plain}`" in alarms, name


def test_the_page_of_the_run_folder_reads_its_own_events(finished: Path) -> None:
    (example,) = [b for b in blocks(ROOT / "docs/run_folder.md") if b.language == "python"]
    names: dict[str, Any] = {}
    with contextlib.chdir(finished.parents[1]):
        exec(compile(example.text, example.place, "exec"), names)
    assert len(names["losses"]) == TINY["train.steps"]


# --------------------------------------------------------------------------------------------
# Coming from TRL


@cache
def declared(package_file: str, name: str) -> dict[str, Any]:
    """Fields of a class and their literal defaults, read without importing it."""
    package, _, path = package_file.partition("/")
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        pytest.skip(f"{package} is not installed")
    tree = ast.parse((Path(spec.submodule_search_locations[0]) / path).read_text())
    (found,) = [n for n in tree.body if isinstance(n, ast.ClassDef) and n.name == name]
    return {
        node.target.id: default
        for node in found.body
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name)
        for default in _literal_default(node.value)
    }


def _literal_default(value: ast.expr | None) -> Iterator[Any]:
    if isinstance(value, ast.Call):
        value = next((word.value for word in value.keywords if word.arg == "default"), None)
    with contextlib.suppress(ValueError):
        yield ast.literal_eval(value) if value is not None else None


def trl_tables() -> list[tuple[list[tuple[str, str]], list[tuple[str, str, str]]]]:
    """Of each marked table the classes it is about, and its rows."""
    text = (ROOT / "docs/from_trl.md").read_text()
    found = re.findall(r"^<!-- keys: (.+) -->\n((?:\|.*\n)+)", text, re.M)
    return [
        (
            [(part.split()[0], part.split()[1]) for part in classes.split(", ")],
            re.findall(r"^\| `(\w+)` \| `(.+?)` \| (.+) \|$", rows, re.M),
        )
        for classes, rows in found
    ]


def test_every_key_of_trl_is_one_of_trls_with_its_default() -> None:
    tables = trl_tables()
    assert len(tables) == 3
    for classes, rows in tables:
        assert len(rows) > 5
        for key, default, _ in rows:
            values = [declared(*place)[key] for place in classes if key in declared(*place)]
            assert values, f"{key} is no field of {classes}"
            assert values[0] == ast.literal_eval(default), key


def test_the_run_files_for_trl_are_the_methods_they_are_said_to_be(tmp_path: Path) -> None:
    files_of(ROOT / "docs/from_trl.md", tmp_path)
    methods = {name: build_method(load(tmp_path / name)) for name in ("mine.toml", "gkd.toml")}
    assert methods["mine.toml"] == opd.methods.reverse_kl_opd()
    assert methods["gkd.toml"] == opd.methods.gkd(teacher_weight=0.5, student_share=0.5)


def test_the_divergence_is_small_near_its_ends_and_proportional_to_the_two_kls() -> None:
    from opd.formula.divergence import forward_kl, generalized_jsd, reverse_kl

    draw = torch.Generator().manual_seed(0)
    student, teacher = torch.randn(2, 8, 5, generator=draw, dtype=torch.float64).log_softmax(-1)
    for weight, limit in ((1e-6, forward_kl), (1 - 1e-6, reverse_kl)):
        scale = min(weight, 1 - weight)
        near = generalized_jsd(student, teacher, teacher_weight=weight) / scale
        assert torch.allclose(near, limit(student, teacher), rtol=1e-4)


# --------------------------------------------------------------------------------------------
# Contributing


@pytest.fixture(scope="module")
def examples(tmp_path_factory: pytest.TempPathFactory) -> ModuleType:
    """The examples of CONTRIBUTING.md as one module, which begins as ours do."""
    page = ROOT / "CONTRIBUTING.md"
    parts = [block.text for block in blocks(page) if block.marker == "run"]
    file = tmp_path_factory.mktemp("contributing") / "contributed.py"
    file.write_text("\n\n".join(["from __future__ import annotations", *parts]))
    return module_from("contributed", file)


def test_the_example_formula_passes_the_battery(
    examples: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(battery.KNOBS, "weight.first_tokens", {"count": 3})
    formula = battery.Formula("weight.first_tokens", examples.first_tokens, exported=True)
    test_battery.test_rows_are_independent(formula)
    test_battery.test_any_leading_shape_gives_the_same_rows(formula)
    test_battery.test_no_argument_is_written_to(formula)
    test_battery.test_a_formula_keeps_the_device(formula)
    test_battery.test_the_docstring_says_what_is_computed_and_who_says_so(formula)
    assert examples.first_tokens(torch.arange(4), count=2).tolist() == [1.0, 1.0, 0.0, 0.0]


def test_the_example_method_looks_at_the_first_tokens_only(examples: ModuleType) -> None:
    method: Method = examples.prefix_opd(count=2)
    case = Case.random(0, lengths=(4, 6), gaps=False)
    ours = evaluate(case, method.objective)
    positions = torch.arange(6).expand(2, 6)[case.mask]
    size = ours.gradient.abs().amax(-1)
    assert (size[positions < 2] > 0).all()
    assert (size[positions >= 2] == 0).all()
    for section in ("Source", "Evidence", "Formula", "Stationary"):
        assert f"{section}: " in (examples.prefix_opd.__doc__ or "")


def test_the_example_task_has_splits_and_a_verifier(examples: ModuleType) -> None:
    task: Task = examples.REVERSE
    prompts = {split: task.prompts(split, count=20, seed=0) for split in SPLITS}
    assert len({example.prompt for found in prompts.values() for example in found}) == 60
    example = task.item("test", seed=1, index=0)
    assert task.verify(example.prompt, example.solution, finished=True).score == 1
    assert task.verify(example.prompt, example.solution + "0", finished=True).score == 0
    assert task.answer("R312:") == "213"


def test_an_example_stays_short() -> None:
    for block in blocks(ROOT / "CONTRIBUTING.md"):
        if block.marker == "run":
            (*_, function) = [
                n for n in ast.parse(block.text).body if isinstance(n, ast.FunctionDef)
            ]
            code = textwrap.dedent(ast.unparse(function)).splitlines()
            assert len(code) <= 20, block.place


# --------------------------------------------------------------------------------------------
# Recipes


@pytest.mark.parametrize(
    "file", [file for file in RECIPES if file.name != TEMPLATE], ids=lambda file: file.stem
)
def test_a_recipe_works_as_it_is(file: Path, tmp_path: Path) -> None:
    assert [finding for finding in opd.check(load(file)) if finding.level == "error"] == []
    settings = {**TINY, "warmup.steps": 1, "output": tmp_path}
    *_, last = train_run(load(file, words_of(settings)))
    assert last.summary is not None
    assert last.summary["exit_reason"] == "finished"


def test_the_template_for_own_models_lacks_nothing_but_the_files(walk: Path) -> None:
    template = ROOT / "recipes" / TEMPLATE
    missing = {finding.where for finding in opd.check(load(template)) if finding.level == "error"}
    assert missing == {"student.model", "teacher.model", "data.prompts"}
    copy = walk / TEMPLATE
    copy.write_text(template.read_text())
    own = {"student.model": "student", "teacher.model": "teacher", "data.held_out": 1}
    run = load(copy, words_of({**own, "sampler.max_new_tokens": 8}))
    assert [finding for finding in opd.check(run) if finding.level == "error"] == []


@pytest.mark.parametrize("file", RECIPES, ids=lambda file: file.stem)
def test_a_commented_line_of_a_recipe_is_a_key_or_a_sentence(file: Path) -> None:
    """Whoever removes the comment sign gets a run file."""
    lines = file.read_text().splitlines()
    opened = [re.sub(r"^# (?=(\w+ = |\[))", "", line) for line in lines]
    assert from_tree(tomllib.loads("\n".join(opened)), source=file.name)
