"""A run file means what it says, and what a run folder writes of it means the same."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from opd.errors import ConfigError
from opd.training.config import Run, from_tree, load, overridden, parse_overrides, to_toml

LEAST: dict[str, Any] = {"student": {"model": "student"}, "data": {"prompts": "p.jsonl"}}


def read_back(folder: Path, **sections: Any) -> tuple[Run, Run]:
    """A config and what is read from the run file that was written of it."""
    run = Run(from_tree({**LEAST, **sections}), folder)
    file = folder / "config.toml"
    file.write_text(to_toml(run.config), encoding="utf-8")
    return run, load(file)


@pytest.mark.parametrize("name", ["größe", "a b", "x.y", "", "数学", "plain-one_2"])
def test_a_set_of_any_name_survives_the_run_folder(name: str, tmp_path: Path) -> None:
    run, back = read_back(tmp_path, evaluate={"sets": {name: "p.jsonl"}})
    assert back.config == run.config


@pytest.mark.parametrize("stop", ["\x7f", "\u2028", '"', "\\", "\n", "😀"])
def test_a_stop_string_of_any_characters_survives_the_run_folder(stop: str, tmp_path: Path) -> None:
    run, back = read_back(tmp_path, sampler={"stop": [stop]})
    assert back.config == run.config


@pytest.mark.parametrize("name", ["7", "true", "2024-01-01", "1e5"])
def test_a_name_that_looks_like_a_number_or_a_date_is_a_name(name: str) -> None:
    settings = parse_overrides(["--name", name, "--student.model", name])
    config = from_tree(overridden(LEAST, settings, source="command line"))
    assert (config.name, config.student.model) == (name, name)


def test_quotes_around_a_text_on_the_command_line_are_toml() -> None:
    assert parse_overrides(["--name", '"my run"']) == [("name", "my run")]


def test_naming_a_method_keeps_the_keys_that_every_method_has() -> None:
    tree = {**LEAST, "method": {"name": "gkd", "merge_stop_ids": True, "options": {"beta": 1}}}
    changed = overridden(tree, parse_overrides(["--method", "vopd"]), source="command line")
    assert changed["method"] == {"name": "vopd", "merge_stop_ids": True}


def test_naming_a_method_leaves_an_objective_of_ones_own_behind() -> None:
    own = {"name": "custom", "objective": {"terms": []}, "states": {"student": 1.0}}
    changed = overridden(
        {**LEAST, "method": own}, parse_overrides(["--method", "vopd"]), source="command line"
    )
    assert changed["method"] == {"name": "vopd"}


@pytest.mark.parametrize(
    ("sections", "key"),
    [
        ({"seed": 10**30}, "seed"),
        ({"train": {"betas": [1.0, 0.9]}}, "train.betas.0"),
        ({"train": {"eps": 0.0}}, "train.eps"),
        ({"train": {"learning_rate": float("inf")}}, "train.learning_rate"),
        ({"sampler": {"stop": [""]}}, "sampler.stop.0"),
        ({"student": {"model": "m", "lora": {"alpha": 0}}}, "student.lora.alpha"),
    ],
)
def test_a_value_no_run_could_use_is_refused_by_its_key(sections: dict[str, Any], key: str) -> None:
    with pytest.raises(ConfigError, match=rf"(?m)^file: {key} = "):
        from_tree({**LEAST, **sections}, source="file")


def test_only_the_key_that_was_given_is_blamed() -> None:
    with pytest.raises(ConfigError) as refused:
        from_tree({**LEAST, "train": {"learning_rate": "fast"}})
    assert "train.learning_rate = 'fast'" in str(refused.value)
    assert "warmup" not in str(refused.value)


def test_a_date_is_refused_with_the_quotes_it_needs(tmp_path: Path) -> None:
    file = tmp_path / "run.toml"
    file.write_text(
        'student.model = "m"\n[data]\nprompts = "p"\n'
        "chat_template_kwargs = { date_string = 2024-07-26 }\n"
    )
    with pytest.raises(ConfigError, match=r'date_string = 2024-07-26 .* quotes: "2024-07-26"'):
        load(file)


@pytest.mark.parametrize("paths", ["paths = 3", "paths = { base_folder = 3 }"])
def test_a_paths_table_that_is_none_is_refused(paths: str, tmp_path: Path) -> None:
    file = tmp_path / "run.toml"
    file.write_text(f'{paths}\nstudent.model = "m"\ndata.prompts = "p"\n')
    with pytest.raises(ConfigError, match="base_folder"):
        load(file)


def test_a_byte_order_mark_does_not_matter(tmp_path: Path) -> None:
    file = tmp_path / "run.toml"
    file.write_bytes(b'\xef\xbb\xbfstudent.model = "m"\ndata.prompts = "p"\n')
    assert load(file).config.student.model == "m"
