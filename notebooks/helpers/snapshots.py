"""Snapshots on disk: JSONL rows, the folders they lie in, and the log of every LLM call.

`JUDGE_MODE` chooses what happens to a call that the log does not hold: `replay` (the default) is an error, `record`
asks the live model, `collect` writes the request out, to be answered elsewhere and merged back by `fill`.
"""

import asyncio
import contextvars
import hashlib
import json
import os
import threading
import warnings
from datetime import datetime, timezone
from functools import cached_property
from pathlib import Path
from typing import Any, Iterator

from .settings import ROOT, id_of, name_of, setting

try:
    import fcntl
except (
    ImportError
):  # Windows has no flock: there, nothing stops two processes from recording to one log
    fcntl = None

DATA = ROOT / "data"
MODES = ("replay", "record", "collect")
RECORDED = "recorded"
SCHEMA = 1
FIELDS = (
    "v",
    "key",
    "model",
    "messages",
    "params",
    "sample",
    "response",
    "usage",
    "finish_reason",
    "created",
)

_writers: dict = {}  # path -> the file by which this process writes a log
STAGE = contextvars.ContextVar("stage", default="(none)")  # the stage that is running, for messages


class DamagedFile(ValueError):
    """A file is not what it must be; the message names file, line and what was expected."""


def judge_mode() -> str:
    """The mode of this run, from `JUDGE_MODE`: "replay", "record" or "collect"."""
    return _known_mode(setting("JUDGE_MODE"))


def _known_mode(mode: str) -> str:
    if mode not in MODES:
        raise ValueError(f"mode {mode!r}: expected one of {', '.join(MODES)} (set by JUDGE_MODE)")
    return mode


def snapshot_folder(name: str) -> Path:
    """The folder of a snapshot's part: `data/<name>`, or `<SNAPSHOT>/<name>`, a relative SNAPSHOT being below `data/`.

    A run that records or collects never writes into the bundled snapshot: without SNAPSHOT it has `data/recorded`.
    """
    mode = judge_mode()
    folder = DATA / (setting("SNAPSHOT") or ("" if mode == "replay" else RECORDED)) / name
    if mode != "replay" and folder.resolve() == (DATA / name).resolve():
        raise ValueError(
            f"SNAPSHOT={setting('SNAPSHOT')!r} is the bundled snapshot, which is not recorded over: name a folder of your own"
        )
    if mode == "replay" and not folder.is_dir():
        raise FileNotFoundError(
            f"no snapshot at {folder}: record one with JUDGE_MODE=record, or unset SNAPSHOT"
        )
    return folder


def output_folder(name: str) -> Path:
    """Where a run puts its stage files: beside the log when it records, in the ignored `build/` when it replays."""
    folder = ROOT / "build" / name if judge_mode() == "replay" else snapshot_folder(name)
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def load_rows(path: str | Path) -> list[dict]:
    """Read a JSONL file, one dict a line; blank lines are passed over.

    Raises:
        DamagedFile: a line is not a JSON object in UTF-8.
    """
    with open(path, "rb") as file:
        return [_parse(line, f"{path}, line {n}") for n, line in enumerate(file, 1) if line.strip()]


def save_rows(path: str | Path, rows: list[dict]) -> None:
    """Write dicts as a JSONL file, in one step: what stood there before is replaced whole or not at all."""
    write_text(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def write_text(path: str | Path, text: str) -> None:
    """Write a text file in one step, by way of a draft beside it."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(path.name + ".tmp")
    draft.write_text(text, encoding="utf-8")
    os.replace(draft, path)


def _parse(line: bytes, where: str) -> dict:
    try:
        row = json.loads(line.decode("utf-8"))
    except ValueError as error:  # bad JSON and bad UTF-8 both are one
        raise DamagedFile(f"{where}: expected a JSON object in UTF-8 ({error})") from error
    if not isinstance(row, dict):
        raise DamagedFile(f"{where}: expected a JSON object, found {type(row).__name__}")
    return row


def call_key(model: str, messages: list[dict], params: dict, sample: int) -> str:
    """SHA-256 over all that determines a call: 64 hex digits."""
    call = json.dumps(
        [model, messages, params, sample], sort_keys=True, ensure_ascii=False, separators=(",", ":")
    )
    return hashlib.sha256(call.encode()).hexdigest()


def make_row(
    call: dict,
    response: str,
    usage: dict | None = None,
    finish_reason: str | None = None,
    logprobs: list[dict] | None = None,
) -> dict:
    """A row of `calls.jsonl`: a call (`model`, `messages`, `params`, `sample`) with its key and its answer.

    `logprobs`, of each token of the reply's first line {alternative: log-probability}, is in the row only if it was asked for.
    """
    created = datetime.now(timezone.utc).isoformat(timespec="seconds")
    answer = {
        "response": response,
        "usage": usage,
        "finish_reason": finish_reason,
        "created": created,
    }
    return {
        "v": SCHEMA,
        "key": call_key(**call),
        **call,
        **answer,
        **({"logprobs": logprobs} if logprobs else {}),
    }


class CallLog:
    """The calls of one notebook in one JSONL file, which is cache, resume point and snapshot at once.

    Opening reads the file once and keeps an index only. A torn last line, which a killed run leaves, is dropped with
    a warning; any other damage is a `DamagedFile`. An answer is on disk before it is used.

    Args:
        path: the `calls.jsonl`; made at the first append.
        mode: "replay", "record" or "collect"; by default what `JUDGE_MODE` says.
    """

    def __init__(self, path: str | Path, mode: str | None = None) -> None:
        self.path = Path(path)
        self.mode = _known_mode(mode) if mode else judge_mode()
        self.requests_path = self.path.with_name("requests.jsonl")
        self._index: dict[bytes, int] = {}  # key -> where its row begins
        self._end = self._size = (
            0  # where the good rows end, and the file (a torn line lies between)
        )
        self._unflushed: dict[
            bytes, int
        ] = {}  # as _index, of rows that are written and not yet safely on disk
        self._flushing: asyncio.Future | None = None
        self._joint = b""  # what the next row needs before it
        self._reader = self._writer = None
        self._collected: set[str] = set()
        self._lock, self._flush_lock = threading.RLock(), threading.Lock()
        self._names_path = self.path.with_name("names.json")
        # {logged name: model id}, where they differ, as they do by persona: its price, and what a batch must ask for
        self.models = (
            json.loads(self._names_path.read_text(encoding="utf-8"))
            if self._names_path.exists()
            else {}
        )
        if self.path.exists():
            self._scan()
        self._written = self._end

    def __len__(self) -> int:
        return len(self._index)

    @cached_property
    def ledger(self):
        """What the calls cost: see `costs.Ledger`."""
        from .costs import Ledger

        return Ledger(self)

    def llm(self, model_name: str, live: Any = None, **settings: Any):
        """A LlamaIndex LLM whose calls go through this log, under the model's name: see `LoggedLLM` for the settings."""
        from .calls import LoggedLLM

        logged, asked = (
            name_of(model_name),
            id_of(getattr(live, "model", "") if callable(live) else ""),
        )
        if asked and self.models.get(logged, logged) != asked:
            self.models[logged] = asked
            if self.mode != "replay":
                write_text(self._names_path, json.dumps(self.models, indent=1) + "\n")
        return LoggedLLM(log=self, live=live, model_name=logged, **settings)

    def get(self, key: str) -> dict | None:
        """The row of a key, or None."""
        if (offset := self._index.get(bytes.fromhex(key))) is None:
            if bytes.fromhex(key) not in self._unflushed:
                return None
            self._flush()  # whoever wrote it was interrupted before it was flushed
            self.ledger.dollars = None  # and before it was counted
            offset = self._index[bytes.fromhex(key)]
        with self._lock:
            self._reader = self._reader or open(self.path, "rb")
            self._reader.seek(offset)
            return json.loads(self._reader.readline())

    def rows(self) -> Iterator[dict]:
        """All rows, in the order of the file."""
        place = 0
        if self.path.exists():
            with open(self.path, "rb") as file:
                for line in file:
                    place += len(line)
                    if place > self._end:
                        return
                    yield json.loads(line)

    def append(self, row: dict) -> dict:
        """Put a row on disk. Returns what the log holds for its key: the older row, if there is one."""
        if self._write(row):
            self._flush()
        return self.get(row["key"])

    async def append_soon(self, row: dict) -> dict:
        """As `append`, from an event loop: rows that come while the disk is busy share the next flush."""
        if self._write(row):
            while bytes.fromhex(row["key"]) not in self._index:
                if self._flushing is None or self._flushing.done():
                    self._flushing = asyncio.get_running_loop().run_in_executor(None, self._flush)
                await asyncio.shield(self._flushing)  # the flush is for others too
                if (
                    bytes.fromhex(row["key"]) not in self._index
                    and bytes.fromhex(row["key"]) not in self._unflushed
                ):
                    raise OSError(f"{self.path}: a flush failed, and the row was lost with it")
        return self.get(row["key"])

    def _write(self, row: dict) -> bool:
        """Hand a row to the operating system, at the end of what is written; False if the log has its key."""
        key, line = bytes.fromhex(row["key"]), json.dumps(row, ensure_ascii=False).encode() + b"\n"
        with self._lock:
            if key in self._index:
                return False
            if key not in self._unflushed:
                file = self.open_to_write()
                file.seek(self._written)
                file.truncate()  # cuts off a torn line, or what a full disk left of the last attempt
                joint = (
                    self._joint if self._written == self._end else b""
                )  # needed again where the flush fails
                file.write(joint + line)
                file.flush()
                self._unflushed[key] = self._written + len(joint)
                self._written = self._unflushed[key] + len(line)
        return True

    def _flush(self) -> None:
        """Wait until all that was written is on disk; only then it is held. It runs to its end in a thread, whoever is interrupted."""
        with self._flush_lock:
            with self._lock:
                batch, end, file = dict(self._unflushed), self._written, self._writer
            try:
                os.fsync(file.fileno())
            except OSError:
                with self._lock:
                    self._unflushed.clear()
                    self._written = self._end
                raise
            with self._lock:
                self._index.update(batch)
                self._joint = b""
                self._end = self._size = max(end, self._end)
                for key in batch:
                    self._unflushed.pop(key, None)

    def open_to_write(self):
        """The file, open for this process alone. A run that records calls it before it asks for what it could not keep.

        Raises:
            RuntimeError: another process writes to it, or has since it was read here.
            OSError: it cannot be written to.
        """
        if self._writer is None or self._writer.closed:
            if (
                self.mode == "record"
                and (notes := self.path.with_name("batches.json")).exists()
                and json.loads(notes.read_text(encoding="utf-8"))
            ):
                raise RuntimeError(
                    f"{notes}: batches are under way, which ask the same calls; `make batch` picks them up (or delete this file, and "
                    "pay for their calls again)"
                )
            self.path.parent.mkdir(parents=True, exist_ok=True)
            # A cell that is run again opens the log again: of one process, the newest writes.
            if older := _writers.pop(self.path.resolve(), None):
                older.close()
            file = open(self.path, "r+b" if self.path.exists() else "x+b")
            try:
                if fcntl:
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                if os.fstat(file.fileno()).st_size != self._size:
                    raise BlockingIOError
            except BlockingIOError as error:
                file.close()
                raise RuntimeError(
                    f"{self.path}: another process is recording to this log, or has since it was opened "
                    "here. Let it end, then run this one again."
                ) from error
            self._writer = _writers[self.path.resolve()] = file
        return self._writer

    def close(self) -> None:
        """Let another process write to the log."""
        with self._lock:
            for file in filter(None, (self._reader, self._writer)):
                file.close()
            self._reader = None

    def collect(self, call: dict) -> None:
        """Write a call to `requests.jsonl`, in the request format of the OpenAI Batch API."""
        key = call_key(**call)
        with self._lock:
            if key not in self._collected:
                body = {"model": call["model"], "messages": call["messages"], **call["params"]}
                request = {
                    "custom_id": request_id(call),
                    "method": "POST",
                    "url": "/v1/chat/completions",
                    "body": body,
                }
                self.path.parent.mkdir(parents=True, exist_ok=True)
                with open(
                    self.requests_path, "a" if self._collected else "w", encoding="utf-8"
                ) as file:
                    file.write(json.dumps(request, ensure_ascii=False) + "\n")
                self._collected.add(key)

    def explain_missing(self, call: dict) -> str:
        """Say which call is missing, which recorded prompt is nearest, and where the two first differ."""
        text = prompt_text(call)
        words, best, nearest = set(text.split()), -1.0, None
        for row in self.rows():
            theirs = set(prompt_text(row).split())
            likeness = len(words & theirs) / max(1, len(words | theirs)) + (
                row["model"] == call["model"]
            )
            if likeness > best:
                best, nearest = likeness, row
        said = [
            f"{self.path}: no recorded answer for this call of stage {STAGE.get()!r} to model {call['model']!r}."
        ]
        if nearest is None:
            said.append("The log holds no calls.")
        elif prompt_text(nearest) == text:
            said += [
                f"The same prompt is recorded with {field} {nearest[field]!r}; this call has {call[field]!r}."
                for field in ("model", "params", "sample")
                if nearest[field] != call[field]
            ]
        else:
            theirs = prompt_text(nearest)
            at = len(os.path.commonprefix([text, theirs]))
            said += [
                f"The nearest recorded prompt (key {nearest['key'][:12]}, model {nearest['model']!r}) differs first at character {at}:",
                f"  recorded: {theirs[max(0, at - 40) : at + 60]!r}",
                f"  this run: {text[max(0, at - 40) : at + 60]!r}",
            ]
        said.append(
            "To have it answered: `make record` (a live model) or `make collect` (requests to answer elsewhere); "
            "see 'Going live' in README.md."
        )
        return "\n".join(said)

    def _scan(self) -> None:
        answers = {}
        with open(self.path, "rb") as file:
            for number, line in enumerate(file, 1):
                where = f"{self.path}, line {number}"
                self._size += len(line)
                try:
                    row = _parse(line, where)
                except DamagedFile:
                    if line.endswith(b"\n"):
                        raise
                    warnings.warn(
                        f"{where}: dropped a torn last line of {len(line)} bytes, left by an interrupted run",
                        stacklevel=3,
                    )
                    return
                key = bytes.fromhex(check_row(row, where)["key"])
                if answers.setdefault(key, hash(row["response"])) != hash(row["response"]):
                    raise DamagedFile(
                        f"{where}: key {row['key'][:12]} has another answer further up; expected one answer a key"
                    )
                self._index.setdefault(key, self._end)
                self._end = self._size
                self._joint = b"" if line.endswith(b"\n") else b"\n"


def check_row(row: dict, where: str) -> dict:
    """Return a row of `calls.jsonl` as it is, or raise DamagedFile."""
    if row.get("v") != SCHEMA:
        raise DamagedFile(f"{where}: row of schema version {row.get('v')!r}, expected {SCHEMA}")
    if set(row) - {"logprobs"} != set(FIELDS):
        raise DamagedFile(
            f"{where}: expected the fields {', '.join(FIELDS)}; found {', '.join(row)}"
        )
    if not isinstance(row["response"], str):
        raise DamagedFile(
            f"{where}: expected text in 'response', found {type(row['response']).__name__}"
        )
    key = call_key(row["model"], row["messages"], row["params"], row["sample"])
    if row["key"] != key:
        raise DamagedFile(
            f"{where}: key {str(row['key'])[:12]} does not match its content, expected {key[:12]}"
        )
    return row


def prompt_text(call: dict) -> str:
    """A call's messages as one text."""
    return "\n".join(f"{message['role']}: {message['content']}" for message in call["messages"])


def request_id(call: dict) -> str:
    """A call's `custom_id` in a batch: its sample, which the request's body cannot hold, and the head of its key."""
    return f"{call['sample']}-{call_key(**call)[:40]}"
