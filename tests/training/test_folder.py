"""The run folder: names, whole writes, and what a kill leaves behind."""

from __future__ import annotations

import errno
import json
import math
import os
import signal
import stat
from pathlib import Path

import pytest

from opd.errors import ConfigError, TrainingError
from opd.training.folder import (
    RunFolder,
    append_line,
    check_name,
    create_folder,
    disk_advice,
    plain,
    remove_folder,
    whole_folder,
    write_text,
)
from tests.training.runs import CHILDREN, Kill


def fill(folder: RunFolder) -> None:
    write_text(folder.config, "seed = 0\n")


def test_folders_without_a_name_take_the_next_free_number(tmp_path: Path) -> None:
    found = [create_folder(tmp_path, "", "task:sort", fill).path.name for _ in range(3)]
    assert found == ["sort-1", "sort-2", "sort-3"]
    remove_folder(tmp_path / "sort-2")
    assert create_folder(tmp_path, "", "task:sort", fill).path.name == "sort-2"
    assert create_folder(tmp_path, "", "data/my prompts.jsonl", fill).path.name == "my prompts-1"


def test_a_file_of_that_name_is_stepped_over(tmp_path: Path) -> None:
    (tmp_path / "sort-1").touch()
    assert create_folder(tmp_path, "", "task:sort", fill).path.name == "sort-2"


def test_an_explicit_name_that_is_taken_is_refused_and_untouched(tmp_path: Path) -> None:
    create_folder(tmp_path, "mine", "task:sort", fill)
    with pytest.raises(ConfigError, match=r"mine exists; resume it with `opd run --resume"):
        create_folder(tmp_path, "mine", "task:sort", lambda folder: folder.config.touch())
    with pytest.raises(ConfigError, match=r"mine exists"):
        check_name(tmp_path, "mine")
    check_name(tmp_path, "")
    assert (tmp_path / "mine" / "config.toml").read_text() == "seed = 0\n"
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]


def test_runs_that_begin_at_once_each_get_a_folder_of_their_own(tmp_path: Path) -> None:
    children = [CHILDREN.Process(target=_create_ten, args=(tmp_path,)) for _ in range(4)]
    for child in children:
        child.start()
    for child in children:
        child.join()
    wrote = sorted(path.read_text() for path in tmp_path.glob("*/config.toml"))
    assert [child.exitcode for child in children] == [0] * 4
    assert len(set(wrote)) == len(wrote) == 40


def _create_ten(output: Path) -> None:
    for number in range(10):
        text = f"{os.getpid()} {number}"
        create_folder(output, "", "task:sort", lambda f, text=text: write_text(f.config, text))


def test_a_folder_is_born_with_its_config(tmp_path: Path) -> None:
    """A kill before its birth leaves no folder of that name."""
    kill = Kill("os.rename", "/born")
    child = CHILDREN.Process(target=_create_and_die, args=(tmp_path, kill))
    child.start()
    child.join()
    assert child.exitcode == -signal.SIGKILL
    assert not (tmp_path / "born").exists()
    create_folder(tmp_path, "born", "task:sort", fill)


def _create_and_die(output: Path, kill: Kill) -> None:
    kill.arm()
    create_folder(output, "born", "task:sort", fill)


def test_a_folder_that_cannot_be_filled_leaves_nothing(tmp_path: Path) -> None:
    def fail(folder: RunFolder) -> None:
        folder.config.touch()
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(TrainingError, match="No space left"):
        create_folder(tmp_path, "mine", "task:sort", fail)
    assert not list(tmp_path.iterdir())


def test_others_may_read_a_run_as_they_may_read_any_new_folder(tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    mode = stat.S_IMODE((tmp_path / "other").stat().st_mode)
    path = create_folder(tmp_path, "mine", "task:sort", fill).path
    assert stat.S_IMODE(path.stat().st_mode) == mode


# --------------------------------------------------------------------------------------------
# Writes


def test_text_is_replaced_as_a_whole(tmp_path: Path) -> None:
    file = tmp_path / "summary.json"
    write_text(file, "old" * 1000)
    write_text(file, "new ∑")
    assert file.read_text(encoding="utf-8") == "new ∑"
    assert [path.name for path in tmp_path.iterdir()] == ["summary.json"]


def test_a_folder_is_replaced_as_a_whole(tmp_path: Path) -> None:
    final = tmp_path / "model"
    for name in ("old", "new"):
        with whole_folder(final) as temporary:
            (temporary / name).touch()
            assert not (final / name).exists()
    assert [path.name for path in final.iterdir()] == ["new"]
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_a_folder_that_fails_leaves_the_old_one(tmp_path: Path) -> None:
    final = tmp_path / "model"
    with whole_folder(final) as temporary:
        (temporary / "old").touch()

    def stop_halfway() -> None:
        with whole_folder(final) as temporary:
            (temporary / "new").touch()
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        stop_halfway()
    assert [path.name for path in final.iterdir()] == ["old"]
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_leftovers_are_cleared_and_nothing_else(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    kept = [folder.config, folder.checkpoints / "step-1" / "state.json", tmp_path / ".mine"]
    gone = [
        tmp_path / ".summary.json.tmp",
        tmp_path / ".model.old" / "model.safetensors",
        folder.checkpoints / ".step-2.tmp" / "state.json",
        folder.checkpoints / ".step-1.old" / "state.json",
    ]
    for file in kept + gone:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.touch()
    folder.clear_leftovers()
    assert sorted(path for path in tmp_path.rglob("*") if path.is_file()) == sorted(kept)


# --------------------------------------------------------------------------------------------
# Logs


def test_logs_are_cut_back_to_their_offsets(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    append_line(folder.events, {"step": 1, "text": "∑"})
    offsets = folder.offsets()
    bytes_now = folder.events.stat().st_size
    assert offsets == {"events.jsonl": bytes_now, "samples.jsonl": 0, "tokens": 0}
    append_line(folder.events, {"step": 2})
    append_line(folder.samples, {"step": 2})
    folder.truncate(offsets)
    assert folder.read_events() == [{"step": 1, "text": "∑"}]
    assert folder.offsets() == offsets


def test_parts_of_the_token_records_go_with_the_steps_after_a_checkpoint(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    folder.tokens.mkdir()
    parts = [folder.tokens / f"part-{number:06}.parquet" for number in range(1, 12)]
    for part in parts[:9]:
        part.touch()
    offsets = folder.offsets()
    assert offsets["tokens"] == 9
    for part in parts:
        part.touch()
    (folder.tokens / ".part-000012.parquet.tmp").touch()
    folder.clear_leftovers()
    folder.truncate(offsets)
    assert sorted(folder.tokens.iterdir()) == parts[:9]
    folder.truncate({})  # a checkpoint from before there were records, or none
    assert not list(folder.tokens.iterdir())


def test_a_log_is_never_made_longer(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    append_line(folder.events, {"step": 1})
    folder.truncate({"events.jsonl": 10_000})
    assert folder.read_events() == [{"step": 1}]


def test_a_half_written_last_line_is_left_out(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    assert folder.read_events() == []
    append_line(folder.events, {"step": 1})
    with folder.events.open("a") as handle:
        handle.write('{"step": 2, "metr')
    assert folder.read_events() == [{"step": 1}]


def test_every_line_is_json_even_where_numbers_are_not(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    append_line(folder.events, {"a": math.nan, "b": [math.inf, (-math.inf, 1.5)], "c": {"d": 0}})

    def refuse(name: str) -> None:
        raise ValueError(name)

    line = folder.events.read_text()
    assert json.loads(line, parse_constant=refuse) == {
        "a": None,
        "b": [None, [None, 1.5]],
        "c": {"d": 0},
    }


def test_plain_keeps_what_json_knows() -> None:
    value = {"text": "nan", "list": [1, 2.5, True, None]}
    assert plain(value) == value


# --------------------------------------------------------------------------------------------
# Disks


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS])
def test_a_disk_that_refuses_is_named_with_the_way_out(number: int) -> None:
    with (
        pytest.raises(TrainingError, match=r"cannot write a/b \(.+\).*--resume"),
        disk_advice(Path("a/b")),
    ):
        raise OSError(number, os.strerror(number))


def test_other_errors_pass_as_they_are() -> None:
    for error in (FileNotFoundError(2, "gone"), RuntimeError("a bug"), KeyboardInterrupt()):
        with pytest.raises(type(error)) as caught, disk_advice(Path("a")):
            raise error
        assert caught.value is error
    with pytest.raises(ConfigError, match="choose another folder"), disk_advice(Path("a")):
        raise PermissionError(errno.EACCES, "Permission denied")
