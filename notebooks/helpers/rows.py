"""Rows on disk: JSONL files, and the folders in which a snapshot's parts lie."""

import json
import os
import secrets
from pathlib import Path

from .settings import ROOT, setting

DATA = ROOT / "data"
MODES = ("replay", "record", "collect")
ESCAPE = "backslashreplace"  # half a character, which UTF-8 cannot hold, becomes JSON's \\uXXXX


class DamagedFile(ValueError):
    """A file is not what it must be. The message names file, line and what was expected."""


def judge_mode(mode: str | None = None) -> str:
    """The mode of a run, by default from JUDGE_MODE; ValueError if there is no such mode."""
    if (mode := mode or setting("JUDGE_MODE")) not in MODES:
        raise ValueError(f"mode {mode!r}: expected one of {', '.join(MODES)} (set by JUDGE_MODE)")
    return mode


def snapshot_folder(name: str) -> Path:
    """The folder of a snapshot's part: `data/<name>`, or `data/<SNAPSHOT>/<name>`.

    SNAPSHOT may be a path of its own. Without it, a run that records or collects writes to
    `data/recorded`.

    Raises:
        FileNotFoundError: a replay of a snapshot that is not there.
        ValueError: a recording into the bundled snapshot.
    """
    mode = judge_mode()
    folder = DATA / (setting("SNAPSHOT") or ("" if mode == "replay" else "recorded")) / name
    if mode != "replay" and folder.resolve() == (DATA / name).resolve():
        raise ValueError(
            f"SNAPSHOT={setting('SNAPSHOT')!r} is the bundled snapshot, which is not recorded "
            "over: name a folder of your own"
        )
    if mode == "replay" and not folder.is_dir():
        raise FileNotFoundError(
            f"no snapshot at {folder}: record one with JUDGE_MODE=record, or unset SNAPSHOT"
        )
    return folder


def output_folder(name: str) -> Path:
    """Where a run puts its stage files: beside the log if it records, in `build/` if it replays."""
    folder = ROOT / "build" / name if judge_mode() == "replay" else snapshot_folder(name)
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def load_rows(path: str | Path) -> list[dict]:
    """Read a JSONL file, one dict a line. Blank lines are skipped.

    Raises:
        DamagedFile: a line is not a JSON object in UTF-8.
    """
    with open(path, "rb") as file:
        return [
            parse_row(line, f"{path}, line {n}") for n, line in enumerate(file, 1) if line.strip()
        ]


def save_rows(path: str | Path, rows: list[dict]) -> None:
    """Write dicts as a JSONL file. An older file is replaced as a whole, or not at all."""
    write_text(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def write_text(path: str | Path, text: str) -> None:
    """Write a text file in UTF-8 in one step, by way of a draft beside it. It is on disk then."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    # Each writer has a draft of its own, so two processes do not mix their texts.
    draft = path.with_name(f"{path.name}.{secrets.token_hex(8)}.tmp")
    try:
        with open(draft, "w", encoding="utf-8", errors=ESCAPE, newline="\n") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        draft.replace(path)
    finally:
        draft.unlink(missing_ok=True)


def parse_row(line: bytes, where: str) -> dict:
    """A line of a JSONL file as a dict; DamagedFile, with `where`, if it is none."""
    try:
        row = json.loads(line.decode("utf-8"))
    except ValueError as error:  # bad JSON and bad UTF-8 are both ValueErrors
        raise DamagedFile(f"{where}: expected a JSON object in UTF-8 ({error})") from error
    if not isinstance(row, dict):
        raise DamagedFile(f"{where}: expected a JSON object, found {type(row).__name__}")
    return row
