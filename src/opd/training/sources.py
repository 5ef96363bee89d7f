"""A user's own functions: copied into the run folder, and pinned by their hashes for a resume."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from pathlib import Path

from opd.data.verifiers import verifier_file
from opd.errors import ConfigError
from opd.spec import user_files
from opd.training.folder import RunFolder
from opd.training.session import Session
from opd.user_code import is_user_code, source_file

INDEX = "SHA256SUMS"


def find_sources(session: Session) -> list[Path]:
    """Files of the functions of the user's that the run calls: formulas, verifier and route.

    Of each only the file itself; what it imports is the user's to keep.
    """
    files = {file for phase in session.phases for file in user_files(phase.method)}
    verifier = verifier_file(session.config.data.verifier, session.run.base)
    if verifier:
        files.add(verifier)
    if is_user_code(route := session.config.teacher.route):
        files.add(source_file(route, session.run.base))
    return sorted({file.resolve() for file in files})


def copy_sources(folder: RunFolder, files: Iterable[Path]) -> None:
    """Copies in `sources/`, and their hashes in a list that `sha256sum -c` reads."""
    lines = []
    for file in files:
        content = file.read_bytes()
        digest = hashlib.sha256(content).hexdigest()
        folder.sources.mkdir(exist_ok=True)
        name = f"{digest[:8]}-{file.name}"
        (folder.sources / name).write_bytes(content)
        lines.append(f"{digest}  {name}\n")
    if lines:
        (folder.sources / INDEX).write_text("".join(lines), encoding="utf-8")


def check_sources(folder: RunFolder, files: Iterable[Path]) -> None:
    """Refuse to go on with functions that are not those the run began with.

    Raises:
        ConfigError: names the file and the run's own copy.
    """
    index = folder.sources / INDEX
    lines = index.read_text(encoding="utf-8").splitlines() if index.exists() else []
    began_with = dict(line.split("  ", 1) for line in lines)
    for file in files:
        digest = hashlib.sha256(file.read_bytes()).hexdigest()
        if digest not in began_with:
            copies = [name for name in began_with.values() if name.partition("-")[2] == file.name]
            raise ConfigError(
                f"{file} has changed since {folder.path} began (its SHA-256 is now "
                f"{digest[:8]}...); put the run's own copy back, "
                f"{folder.sources / (copies[0] if copies else '')}, or start a new run"
            )
