"""`opd init`: a run file of five keys that works as it is."""

from __future__ import annotations

from argparse import Namespace
from pathlib import Path

from opd.errors import ConfigError

RUN_FILE = """\
# Distils a student on its own text. Works as it is:  opd run {name}
# Every other setting has a default; `opd check {name}` looks before anything loads, and
# `opd explain {name}` says what a step computes.

[student]
model = "builtin:sort-student"  # yours: a model folder or a Hugging Face id

[teacher]
model = "builtin:sort-teacher"  # yours: a larger model with the same tokenizer

[data]
prompts = "task:sort"  # yours: a .jsonl or .parquet file with a column `prompt` or `messages`

[warmup]
steps = 120  # imitation before distillation; 0 for a student that writes sensible text already

[train]
learning_rate = 1.5e-3  # for pretrained models start near 1e-6, with LoRA near 1e-5
"""


def main(arguments: Namespace) -> int:
    """Write the file; never over another."""
    file = Path(arguments.file)
    if file.is_dir():
        raise ConfigError(f"{file} is a folder; name a file in it: opd init {file / 'my_run.toml'}")
    if not file.parent.is_dir():
        raise ConfigError(f"there is no folder {file.parent}; make it first, or name another file")
    try:
        with file.open("x", encoding="utf-8") as handle:
            handle.write(RUN_FILE.format(name=file))
    except FileExistsError:
        raise ConfigError(
            f"{file} exists and is left as it is; name another file: opd init other.toml"
        ) from None
    print(f"wrote {file}\nNext: opd run {file}")
    return 0
