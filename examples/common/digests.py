"""Digests of the files of a checkpoint: what is written once must be read again.

A file that was cut short is often noticed by whoever reads it; a flipped bit within numbers is not.
"""

import hashlib
import json
import os
from pathlib import Path

NAME = "digests.json"
# Orbax writes the time into it when all else is complete.
_LATER = "_CHECKPOINT_METADATA"


def write_digests(checkpoint: Path) -> None:
    """Writes sizes and digests of all files of a checkpoint into it."""
    digests = {name: [path.stat().st_size, _digest(path)] for name, path in _files(checkpoint)}
    with (checkpoint / NAME).open("w") as file:
        json.dump(digests, file)
        file.flush()
        os.fsync(file.fileno())


def damage(checkpoint: Path) -> str | None:
    """What is wrong with the files of a checkpoint: None if nothing is.

    One without digests, of before there were any, is taken as it is.
    """
    if not (checkpoint / NAME).exists():
        return None
    try:
        expected = json.loads((checkpoint / NAME).read_text())
        json.loads((checkpoint / _LATER).read_text())
    # ValueError is broken JSON or broken UTF-8.
    except (OSError, ValueError) as error:
        return f"{checkpoint}: {error}"
    files = dict(_files(checkpoint))
    for name, (size, digest) in expected.items():
        path = files.get(name)
        if path is None:
            return f"{checkpoint / name}: the file is missing"
        if path.stat().st_size != size:
            return f"{path}: {path.stat().st_size} bytes in the place of {size}"
        if _digest(path) != digest:
            return f"{path}: the content is not what was written"
    return None


def set_damaged_aside(checkpoints: Path) -> list[str]:
    """Moves the newest checkpoints that are damaged into "damaged" beside their directory.

    Returns:
      What is wrong with each. Checkpoints older than the newest good one are not looked at.
    """
    found = []
    steps = [p for p in checkpoints.glob("*") if p.name.isdigit()]
    for checkpoint in sorted(steps, key=lambda p: int(p.name), reverse=True):
        what = damage(checkpoint)
        if what is None:
            break
        found.append(what)
        aside = checkpoints.parent / "damaged"
        aside.mkdir(exist_ok=True)
        number = sum(p.name.split(".")[0] == checkpoint.name for p in aside.iterdir())
        checkpoint.rename(aside / (f"{checkpoint.name}.{number}" if number else checkpoint.name))
    return found


def _files(checkpoint: Path) -> list[tuple[str, Path]]:
    paths = sorted(p for p in checkpoint.rglob("*") if p.is_file())
    return [
        (p.relative_to(checkpoint).as_posix(), p) for p in paths if p.name not in (NAME, _LATER)
    ]


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "blake2b").hexdigest()
