"""The log of every LLM call, the LLM in front of it, and stages of calls.

`JUDGE_MODE` chooses what happens to a call that the log does not hold: `replay` (the default) is an
error, `record` asks the live model, `collect` writes the request out, to be answered elsewhere.
"""

import asyncio
import contextvars
import hashlib
import json
import os
import threading
import time
import warnings
from collections.abc import Coroutine, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import cached_property
from itertools import accumulate
from pathlib import Path
from typing import Any
from weakref import WeakValueDictionary

import tqdm.auto
from filelock import FileLock, Timeout
from llama_index.core.base.llms import generic_utils
from llama_index.core.base.llms.types import ChatMessage, ChatResponse, ChatResponseGen, LogProb
from llama_index.core.bridge.pydantic import PrivateAttr
from llama_index.core.llms import LLM, CompletionResponse, CustomLLM, LLMMetadata
from llama_index.core.llms.callbacks import llm_chat_callback
from pydantic_core import to_jsonable_python

from .replies import lines_to_score
from .rows import ESCAPE, DamagedFile, judge_mode, parse_row, snapshot_folder
from .settings import CallFailed, RunStopped, cap, name_of, number, redact, terminal

SCHEMA = 1
FIELDS = "v key model messages params sample response usage finish_reason created".split()
OPTIONAL = {"logprobs", "replied_by", "batch"}
BATCH = "batch"  # a mark in a row's usage: from OpenAI's Batch API, at half the price
SYNC_SECONDS = 1.0  # a power cut costs the answers of about this long

_writers: WeakValueDictionary = WeakValueDictionary()  # path -> the log that writes to it


class MissingCall(LookupError):
    """Replay met a call that the log does not hold."""


class Collected(Exception):
    """The run stops here: its requests wait in a file to be answered."""


@dataclass
class Stage:
    """The stage that is running: its name, and what its progress bar says."""

    name: str
    failed: int = 0
    spent: object = ""  # what its text says of the money


STAGE: contextvars.ContextVar[Stage | None] = contextvars.ContextVar("stage", default=None)
ROW: contextvars.ContextVar[int] = contextvars.ContextVar("row", default=0)  # of the stage
# The texts that a judge of this task is shown. In its prompt, a text may hold section marks too.
SHOWN: contextvars.ContextVar[tuple[str, ...] | None] = contextvars.ContextVar(
    "shown", default=None
)
# Why the last reply of this task ended. LlamaIndex's evaluators do not pass it on.
FINISH: contextvars.ContextVar[str | None] = contextvars.ContextVar("finish", default=None)


@contextmanager
def showing(*texts: str) -> Iterator[None]:
    """Tell the local judges which texts the prompts of this block show."""
    token = SHOWN.set(texts)
    try:
        yield
    finally:
        SHOWN.reset(token)


def call_key(model: str, messages: list[dict], params: dict, sample: int) -> str:
    """SHA-256 over all that determines a call: 64 hex digits."""
    call = json.dumps(
        [model, messages, params, sample], sort_keys=True, ensure_ascii=False, separators=(",", ":")
    )
    return hashlib.sha256(call.encode(errors=ESCAPE)).hexdigest()


def make_row(
    call: dict,
    response: str,
    usage: dict | None = None,
    finish_reason: str | None = None,
    logprobs: list[dict] | None = None,
    *,
    replied_by: str | None = None,
    batch: str | None = None,
) -> dict:
    """A row of `calls.jsonl`: a call (`model`, `messages`, `params`, `sample`) and its answer.

    `logprobs` has {alternative: log-probability} of each token. Those up to the line of the score
    are kept: the rest would make rows a hundred times larger. The row has this field only if it was
    asked for. `replied_by`, the id of the model that replied, is kept where the call names another.
    `batch` is the name of the results file, if the answer is from one.
    """
    created = datetime.now(UTC).isoformat(timespec="seconds")
    answer = {"response": response, "usage": usage, "finish_reason": finish_reason}
    row = {"v": SCHEMA, "key": call_key(**call), **call, **answer, "created": created}
    if logprobs:
        likeliest = [max(token, key=lambda t: token[t], default="") for token in logprobs]
        ends, lines = accumulate(text.count("\n") for text in likeliest), lines_to_score(response)
        row["logprobs"] = logprobs[: sum(end < lines for end in ends) + 1]
    more = {"replied_by": None if replied_by == call["model"] else replied_by, "batch": batch}
    return row | {name: said for name, said in more.items() if said}


class CallLog:
    """The calls of one notebook in one JSONL file: cache, resume point and snapshot at once.

    Opening reads the file once and keeps an index only. A torn last line, which a killed run
    leaves, is dropped with a warning; any other damage is a `DamagedFile`. An answer is written to
    the file before it is used, so a kill loses nothing. The disk is synced at the end of a stage
    and about once a second. The mode is by default what `JUDGE_MODE` says.
    """

    def __init__(self, path: str | Path, mode: str | None = None) -> None:
        self.path, self.mode = Path(path), judge_mode(mode)
        self.requests_path = self.path.with_name("requests.jsonl")
        self.used: dict[tuple[str, str], dict[str, None]] = {}  # (stage, name) -> keys
        self.asking: WeakValueDictionary = WeakValueDictionary()  # (loop, key) -> a call's lock
        self.end = 0  # where in the file the good rows end
        self._size = 0  # of the file: a torn line may follow the good rows
        self._joint = b""  # a line end that the last row lacks
        self._index: dict[str, int] = {}  # key -> where its row begins
        self._writer: Any = None
        self._lock = threading.RLock()
        self._file_lock = FileLock(f"{path}.lock", thread_local=False)
        self._synced = 0.0
        self._collected: set[str] = set()
        if self.path.exists():
            self._scan()

    def __len__(self) -> int:
        return len(self._index)

    def __enter__(self) -> "CallLog":
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()

    def llm(self, model_name: str, live: Any = None, **settings: Any) -> "LoggedLLM":
        """A LlamaIndex LLM whose calls go through this log, under the model's name.

        Args:
            model_name: the setting of a model, whose id is logged, or another name. Such a name
                has a price only if PRICES gives it one.
            live: what `record` asks: `live(setting)`, which tries again and keeps to the budget, or
                a LlamaIndex LLM as it is, which is asked once a call.
            settings: `sample`, which of several samples of a prompt it draws; `params`, sampling
                parameters that are sent with each call, such as {"temperature": 0} (both are part
                of the key); `system_prompt`, put before every prompt.
        """
        return LoggedLLM(log=self, live=live, model_name=name_of(model_name), **settings)

    def get(self, key: str) -> dict | None:
        """The row of a key, or None. RunStopped if the file was changed under this run."""
        self._check_file()
        if key not in self._index:
            return None
        with open(self.path, "rb") as file:
            file.seek(self._index[key])
            return json.loads(file.readline())

    @cached_property
    def _siblings(self) -> list["CallLog"]:
        """The other logs of the snapshot that this run records to."""
        here, snapshot = self.path.resolve(), snapshot_folder("").resolve()
        if self.mode == "replay" or here.parent.parent != snapshot:
            return []
        paths = sorted(snapshot.glob("*/calls.jsonl"))
        return [CallLog(path, "replay") for path in paths if path != here]

    def find(self, key: str) -> dict | None:
        """The row of a key, or None; a run that records or collects also asks the sibling logs.

        A row of another log in the snapshot is copied to this one. So notebooks that ask the same
        pay once, and a replay needs no other log than its own.
        """
        if row := self.get(key):
            return row
        for log in self._siblings:
            if row := log.get(key):
                with kept(self):
                    return self.append(row)
        return None

    def rows(self, start: int = 0) -> Iterator[dict]:
        """All rows in the order of the file, or those after a former `end`."""
        self._check_file()
        if start < self.end:
            with open(self.path, "rb") as file:
                file.seek(start)
                for line in iter(file.readline, b""):
                    if file.tell() > self.end:
                        return
                    if line.strip():
                        yield json.loads(line)

    def use(self, row: dict) -> None:
        """Note that the running stage used a row. The first stage that used it counts."""
        if not any(row["key"] in keys for keys in self.used.values()):
            stage = STAGE.get()
            place = stage.name if stage else "(none)", row["model"]
            self.used.setdefault(place, {})[row["key"]] = None

    def append(self, row: dict) -> dict:
        """Write a row to the file. Returns what the log holds for its key: an older row stays.

        Raises:
            RuntimeError: another process writes to the file, or it was changed.
            OSError: the file cannot be written to, or the disk is full.
        """
        with self._lock:
            if older := self.get(row["key"]):
                return older
            file = self.open_to_write()
            line = self._joint + json.dumps(row, ensure_ascii=False).encode(errors=ESCAPE) + b"\n"
            file.truncate(self.end)  # cuts off a torn line, and what a full disk left of a row
            self._size = self.end
            written = file.write(line)
            self._size += written
            if written < len(line):
                raise OSError(28, f"No space left on device ({written} bytes written)")
            self._index[row["key"]] = self.end + len(self._joint)
            self.end = self._size
            self._joint = b""
            if time.monotonic() - self._synced > SYNC_SECONDS:
                self.sync()
        return row

    def sync(self) -> None:
        """Wait until all that was written is on the disk, so that a power cut does not lose it."""
        if self._writer is not None:
            os.fsync(self._writer.fileno())
            self._synced = time.monotonic()

    def open_to_write(self) -> Any:
        """The file, open for this log alone. A run that records opens it before it asks.

        Raises:
            RuntimeError: another process writes to it, or has written since it was read here.
            OSError: it cannot be written to.
        """
        self._check_file()
        if self._writer is None:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            # A cell that runs again opens the log again. Within a process, the newest log writes.
            older = _writers.pop(self.path.resolve(), None)
            if older is not None:  # an empty log is false
                older.close()
            try:
                self._file_lock.acquire(timeout=0)
                if (self.path.stat().st_size if self.path.exists() else 0) != self._size:
                    raise Timeout(str(self.path))
                self._writer = open(self.path, "a+b", buffering=0)
            except OSError as error:  # filelock's Timeout is one
                self._file_lock.release()
                if not isinstance(error, Timeout):
                    raise
                raise RuntimeError(
                    f"{self.path}: another process is recording to this log, or has since it was "
                    "opened here. Let it end, then run this one again."
                ) from None
            _writers[self.path.resolve()] = self
        return self._writer

    def _check_file(self) -> None:
        """RunStopped if the file is no longer the one that this log writes to, as it left it."""
        if self._writer is None:
            return
        ours = os.fstat(self._writer.fileno())
        there = os.stat(self.path) if self.path.exists() else None
        if there is None or not os.path.samestat(there, ours) or there.st_size != self._size:
            how = "was deleted" if there is None else "was replaced or changed by another program"
            raise RunStopped(
                f"{self.path} {how} while this run was recording to it, so answers could not be "
                "kept. Put the file back if you can, restart the notebook and run again."
            )

    def close(self) -> None:
        """Sync the file, and let another process write to it."""
        with self._lock:
            if self._writer is not None:
                self.sync()
                self._writer.close()
                self._writer = None
            self._file_lock.release()

    def collect(self, call: dict) -> None:
        """Write a call to `requests.jsonl`, in the request format of the OpenAI Batch API."""
        with self._lock:
            if (name := request_id(call)) in self._collected:
                return
            body = {"model": call["model"], "messages": call["messages"], **call["params"]}
            request = {"custom_id": name, "method": "POST", "url": "/v1/chat/completions"}
            self.path.parent.mkdir(parents=True, exist_ok=True)
            mode = "a" if self._collected else "w"
            with open(self.requests_path, mode, encoding="utf-8", errors=ESCAPE) as file:
                file.write(json.dumps({**request, "body": body}, ensure_ascii=False) + "\n")
            self._collected.add(name)

    def explain_missing(self, call: dict) -> str:
        """Say which call is missing, the nearest recorded prompt, and where the two differ."""
        text, stage, model = prompt_text(call), STAGE.get(), call["model"]

        def distance(row: dict) -> tuple[bool, int]:
            differing = set(text.split()) ^ set(prompt_text(row).split())
            return row["model"] != model, len(differing)

        nearest = min(self.rows(), key=distance, default=None)
        place = f" of stage {stage.name!r}" if stage else ""
        said = [f"{self.path}: no recorded answer for this call{place} to model {model!r}."]
        if nearest is None:
            said.append("The log holds no calls.")
        elif (theirs := prompt_text(nearest)) == text:
            said += [
                f"The same prompt is recorded with {field} {nearest[field]!r}; this call has "
                f"{call[field]!r}."
                for field in ("model", "params", "sample")
                if nearest[field] != call[field]
            ]
        else:
            at = len(os.path.commonprefix([text, theirs]))
            here = slice(max(0, at - 40), at + 60)
            said += [
                f"The nearest recorded prompt (key {nearest['key'][:12]}, model "
                f"{nearest['model']!r}) differs first at character {at}:",
                f"  recorded: {theirs[here]!r}\n  this run: {text[here]!r}",
            ]
        said.append(
            "To have it answered: `make record` (a live model) or `make collect` (requests to "
            "answer elsewhere); see 'Going live' in README.md."
        )
        return "\n".join(said)

    def _scan(self) -> None:
        with open(self.path, "rb") as file:
            for number, line in enumerate(file, 1):
                where, whole = f"{self.path}, line {number}", line.endswith(b"\n")
                self._size += len(line)
                try:
                    row = parse_row(line, where)
                except DamagedFile:
                    if whole:
                        raise
                    torn = f"a torn last line of {len(line)} bytes, left by an interrupted run"
                    warnings.warn(f"{where}: dropped {torn}", stacklevel=3)
                    return
                check_row(row, where)
                older = self.get(row["key"])
                if older and older["response"] != row["response"]:
                    raise DamagedFile(
                        f"{where}: key {row['key'][:12]} has another answer further up; expected "
                        "one answer a key"
                    )
                self._index.setdefault(row["key"], self.end)
                self.end, self._joint = self._size, b"" if whole else b"\n"


def check_row(row: dict, where: str) -> None:
    """Raise DamagedFile if this is no row of `calls.jsonl`."""
    wrong = ""
    if row.get("v") != SCHEMA:
        wrong = f"row of schema version {row.get('v')!r}, expected {SCHEMA}"
    elif set(row) - OPTIONAL != set(FIELDS):
        wrong = f"expected the fields {', '.join(FIELDS)}; found {', '.join(row)}"
    elif not isinstance(row["response"], str):
        wrong = f"expected text in 'response', found {type(row['response']).__name__}"
    elif row["key"] != (key := call_key(*(row[name] for name in FIELDS[2:6]))):
        wrong = f"key {str(row['key'])[:12]} does not match its content, expected {key[:12]}"
    if wrong:
        raise DamagedFile(f"{where}: {wrong}")


def prompt_text(call: dict) -> str:
    """A call's messages as one text."""
    return "\n".join(f"{message['role']}: {message['content']}" for message in call["messages"])


def request_id(call: dict) -> str:
    """A call's `custom_id` in a batch: its sample, which the body lacks, and part of its key."""
    return f"{call['sample']}-{call_key(**call)[:40]}"


@contextmanager
def kept(log: CallLog, so: str = "") -> Iterator[None]:
    """Stop the run if the log cannot be written to: further answers could not be kept either."""
    try:
        yield
    except (OSError, RuntimeError) as error:
        raise RunStopped(f"{log.path}: an answer could not be kept{so}: {error}") from error


class LoggedLLM(CustomLLM):
    """A chat LLM in front of a call log. Made by `CallLog.llm`."""

    model_name: str
    sample: int = 0
    params: dict = {}
    _log: CallLog = PrivateAttr()
    _live: Any = PrivateAttr()

    def __init__(self, log: CallLog, live: Any = None, **settings: Any) -> None:
        super().__init__(**settings)
        if live is not None and not isinstance(live, LLM) and not hasattr(live, "ask"):
            found = type(live).__name__
            raise TypeError(f"live: expected live(setting) or a LlamaIndex LLM, found {found}")
        self._log, self._live = log, _Bare(live) if isinstance(live, LLM) else live

    @property
    def metadata(self) -> LLMMetadata:
        """The logged name, and that this is a chat model."""
        # The window decides how chunks are packed into prompts, so it is the same in all modes.
        return LLMMetadata(model_name=self.model_name, is_chat_model=True, context_window=8192)

    def _call(self, messages: Iterable[ChatMessage], kwargs: dict) -> dict:
        for message in messages:
            if any(block.block_type != "text" for block in message.blocks):
                raise ValueError(
                    f"the call log holds text only, and this {message.role.value} message has more"
                )
        plain = [{"role": message.role.value, "content": message.content} for message in messages]
        asked = {"model": self.model_name, "messages": plain}
        return {**asked, "params": {**self.params, **kwargs}, "sample": self.sample}

    def _known(self, call: dict) -> dict | None:
        """The logged row of a call. None if the live model is to be asked."""
        if row := self._log.find(call_key(**call)):
            return row
        # A model on this machine costs nothing, so it is asked where others are collected.
        local = getattr(self._live, "setting", "").startswith("local:")
        if self._log.mode == "collect" and not local:
            self._log.collect(call)
            raise Collected(self._log.requests_path)
        if self._log.mode == "replay":
            raise MissingCall(self._log.explain_missing(call))
        if self._live is None:
            raise ValueError(
                f"JUDGE_MODE=record needs a live model for {self.model_name!r}: pass live=... to "
                "CallLog.llm"
            )
        with kept(self._log, ", so none is asked for"):
            self._log.open_to_write()
        return None

    def _keep(self, call: dict, response: ChatResponse) -> dict:
        places = [sorted(place, key=lambda one: one.logprob) for place in response.logprobs or []]
        # Of a token that is listed twice, the likelier one stays.
        tokens = [{one.token: one.logprob for one in place} for place in places]
        usage, finish_reason, model = details_of(response.raw)
        text = response.message.content or ""
        row = make_row(call, text, usage, finish_reason, tokens, replied_by=model)
        with kept(self._log):
            return self._log.append(row)

    def _response(self, row: dict) -> ChatResponse:
        self._log.use(row)
        FINISH.set(row["finish_reason"])
        logprobs = [
            [LogProb(token=token, logprob=p) for token, p in tokens.items()]
            for tokens in row.get("logprobs", [])
        ]
        return ChatResponse(
            message=ChatMessage(role="assistant", content=row["response"]),
            logprobs=logprobs or None,
            raw={"usage": row["usage"], "finish_reason": row["finish_reason"]},
        )

    @llm_chat_callback()
    def chat(self, messages: list[ChatMessage], **kwargs: Any) -> ChatResponse:
        """The logged answer, or the live model's, which is logged before it is returned."""
        call = self._call(messages, kwargs)
        if (row := self._known(call)) is None:
            row = self._keep(call, self._live.ask_and_block(self._log, call, messages))
        return self._response(row)

    @llm_chat_callback()
    async def achat(self, messages: list[ChatMessage], **kwargs: Any) -> ChatResponse:
        """As `chat`. Two equal calls at the same time are one: the second waits for the first."""
        call = self._call(messages, kwargs)
        place = asyncio.get_running_loop(), call_key(**call)
        async with self._log.asking.setdefault(place, asyncio.Lock()):
            if (row := self._known(call)) is None:
                row = self._keep(call, await self._live.ask(self._log, call, messages))
        return self._response(row)

    def complete(self, prompt: str, formatted: bool = False, **kwargs: Any) -> CompletionResponse:
        """As `chat`, for a prompt that is one text."""
        response = self.chat([ChatMessage(content=prompt)], **kwargs)
        return generic_utils.chat_response_to_completion_response(response)

    async def acomplete(
        self, prompt: str, formatted: bool = False, **kwargs: Any
    ) -> CompletionResponse:
        """As `achat`, for a prompt that is one text."""
        response = await self.achat([ChatMessage(content=prompt)], **kwargs)
        return generic_utils.chat_response_to_completion_response(response)

    def stream_chat(self, messages: Sequence[ChatMessage], **kwargs: Any) -> ChatResponseGen:
        """As `chat`: a recorded answer is whole, so the stream has one piece."""
        response = self.chat(list(messages), **kwargs)
        response.delta = response.message.content
        yield response

    def stream_complete(self, prompt: str, formatted: bool = False, **kwargs: Any) -> Any:
        """As `complete`, in one piece."""
        pieces = self.stream_chat([ChatMessage(content=prompt)], **kwargs)
        return generic_utils.stream_chat_response_to_completion_response(pieces)


@dataclass
class _Bare:
    """A LlamaIndex LLM as it is: asked once a call, without a budget."""

    llm: LLM

    async def ask(self, log: CallLog, call: dict, messages: list[ChatMessage]) -> ChatResponse:
        with self._failing():
            return await self.llm.achat(messages, **call["params"])

    def ask_and_block(self, log: CallLog, call: dict, messages: list[ChatMessage]) -> ChatResponse:
        with self._failing():
            return self.llm.chat(messages, **call["params"])

    @contextmanager
    def _failing(self) -> Iterator[None]:
        if name := next(filter(cap, ("BUDGET_CALLS", "BUDGET_DOLLARS")), None):
            raise RunStopped(
                f"{name} is set, and this LLM keeps no budget: hand it to the log as live(llm), or "
                "unset the budget"
            )
        try:
            yield
        except Exception as error:  # of whatever client
            said = redact(f"{type(error).__name__}: {error}")
            raise CallFailed(said) from None  # the error itself may quote a key


def details_of(raw: Any) -> tuple[dict | None, str | None, str | None]:
    """(usage, finish reason, model id) of a provider's raw response, if it has OpenAI's form."""
    raw = raw if isinstance(raw, dict) else getattr(raw, "__dict__", {})
    ends = ("finish_reason", "stop_reason", "done_reason")  # as providers call it
    wanted = {name: raw.get(name) for name in ("usage", "choices", "model", *ends)}
    plain = to_jsonable_python(wanted, fallback=str, inf_nan_mode="null")
    usage, choices, model = (plain[name] for name in ("usage", "choices", "model"))
    usage = usage if isinstance(usage, dict) else {}
    usage.pop(BATCH, None)  # only `fill` may set it
    choice = choices[0] if isinstance(choices, list) and choices else None
    told = {**plain, **choice} if isinstance(choice, dict) else plain
    reason = next(filter(None, map(told.get, ends)), None)
    return usage or None, reason and str(reason), model if isinstance(model, str) else None


async def run_stage(
    stage: str, jobs: Iterable[Coroutine], concurrency: int | None = None
) -> list[Any]:
    """Await all jobs, at most `concurrency` at a time; their results, in the order of the jobs.

    Every job runs to its end before a failure is raised, so that all answers are in the log. But
    after a RunStopped no other job begins.

    Raises:
        RunStopped: no further call makes sense or is allowed.
        Collected: some calls were written out to be answered (JUDGE_MODE=collect).
        Exception: the first failure of a job; a note on it says how many failed.
    """
    jobs = list(jobs)
    left, results = iter(enumerate(jobs)), list[Any]([None]) * len(jobs)
    state, stopped = Stage(stage), False

    async def work(worker: int) -> None:
        nonlocal stopped
        STAGE.set(state)
        # Start one worker per turn of the event loop. If all started in one turn, all replies
        # would come at once, and each would wait for all others.
        for _ in range(worker):
            await asyncio.sleep(0)
        while not stopped and (job := next(left, None)):
            place, awaited = job
            ROW.set(place)
            FINISH.set(None)  # the last finish reason belongs to another row
            try:
                results[place] = await awaited
            except Exception as error:  # raised below, when all jobs are done
                results[place] = error
                stopped |= isinstance(error, RunStopped)
                state.failed += isinstance(error, CallFailed)
            bar.set_postfix_str(f"{state.failed} failed{state.spent}", refresh=False)
            bar.update()

    try:
        workers = int(number("CONCURRENCY") if concurrency is None else concurrency)
        if workers < 1:
            raise ValueError(f"{workers} calls at once: expected 1 or more")
        kind, shown = tqdm.tqdm if terminal() else tqdm.auto.tqdm, judge_mode() != "replay"
        with kind(total=len(jobs), desc=stage, file=terminal(), disable=not shown) as bar:
            await asyncio.gather(*map(work, range(min(workers, len(jobs)))))
    finally:
        for _, job in left:  # the run was stopped or interrupted
            job.close()
        for log in list(_writers.values()):
            with kept(log):
                log.sync()
    return _results(stage, results)


def _results(stage: str, results: list) -> list:
    """A stage's results, if no job failed."""
    failures = [one for one in results if isinstance(one, Exception)]
    for failure in failures:
        if isinstance(failure, RunStopped):
            done = sum(one is not None for one in results) - len(failures)
            said = f"stage {stage!r}: {failure} ({done} of {len(results)} rows were done)"
            raise RunStopped(said) from failure.__cause__
    for failure in failures:
        if not isinstance(failure, Collected):
            many = f"{len(failures)} of {len(results)} rows failed; what was answered is kept"
            failure.add_note(f"stage {stage!r}: {many}")
            raise failure
    if failures:
        raise Collected(
            f"stage {stage!r}: {len(failures)} of {len(results)} rows wait for answers. Their "
            f"requests are in {failures[0]}: have them answered, merge the results with "
            "`make fill`, and run again."
        )
    return results
