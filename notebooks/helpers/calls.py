"""Calls in motion: the LLM that replays, records or collects; stages run with bounded concurrency; `fill`."""

import asyncio
import contextvars
import gc
import json
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Awaitable, Callable, Iterable

from llama_index.core.base.llms.types import (
    ChatMessage,
    ChatResponse,
    CompletionResponse,
    LLMMetadata,
    LogProb,
    MessageRole,
)
from llama_index.core.bridge.pydantic import Field, PrivateAttr
from llama_index.core.llms import LLM, CustomLLM
from llama_index.core.llms.callbacks import llm_chat_callback

from .costs import BATCH, METER, Meter, caps
from .models import ask, ask_and_block
from .settings import RunStopped, name_of, number, terminal
from .snapshots import (
    STAGE,
    CallLog,
    DamagedFile,
    call_key,
    judge_mode,
    load_rows,
    make_row,
    request_id,
)

ROW = contextvars.ContextVar("row", default=0)  # which row of its stage a call belongs to
FINISH = contextvars.ContextVar(
    "finish", default=None
)  # why the last reply of this task ended: evaluators do not hand it on


class MissingCall(LookupError):
    """Replay met a call that the log does not hold."""


class NotAnswered(Exception):
    """`collect` wrote this call's request out. `run_stage` turns all of a stage's into one `Collected`."""


class Collected(Exception):
    """The run stops here: the requests of a stage wait in a file to be answered."""


class LoggedLLM(CustomLLM):
    """A chat LLM in front of a call log. Made by `CallLog.llm`.

    Args:
        log: the call log.
        live: the LLM that `record` asks, or a function that makes it, called when it is first needed.
        model_name: the name under which calls are logged.
        sample: which of several samples of a prompt this LLM draws; part of the key.
        params: sampling parameters, such as {"temperature": 0}; sent with each call, and part of the key.
        system_prompt: put before every prompt.
        context_window: in tokens. It decides how chunks are packed into prompts, hence is one value for all modes.
    """

    model_name: str
    sample: int = 0
    params: dict = Field(default_factory=dict)
    context_window: int = 8192
    _log: CallLog = PrivateAttr()
    _live: Any = PrivateAttr()

    def __init__(self, log: CallLog, live: Any = None, **settings: Any) -> None:
        super().__init__(**settings)
        self._log, self._live = log, live

    @property
    def metadata(self) -> LLMMetadata:
        return LLMMetadata(
            model_name=self.model_name, is_chat_model=True, context_window=self.context_window
        )

    def _call(self, messages: list[ChatMessage], kwargs: dict) -> dict:
        for message in messages:
            if any(block.block_type != "text" for block in message.blocks):
                raise ValueError(
                    f"the call log holds text only, and this {message.role.value} message holds more"
                )
        plain = [{"role": message.role.value, "content": message.content} for message in messages]
        return {
            "model": self.model_name,
            "messages": plain,
            "params": {**self.params, **kwargs},
            "sample": self.sample,
        }

    def _recorded(self, key: str, call: dict) -> ChatResponse | None:
        """The logged answer; None if the live model is to be asked."""
        if row := self._log.get(key):
            self._log.ledger.use(row)
            return _response(row)
        if self._log.mode == "collect":
            self._log.collect(call)
            raise NotAnswered(self._log.requests_path)
        if self._log.mode == "replay":
            raise MissingCall(self._log.explain_missing(call))
        if self._live is None:
            raise ValueError(
                f"JUDGE_MODE=record needs a live model for {self.model_name!r}: pass live=... to CallLog.llm"
            )
        _check_writable(self._log)
        if not isinstance(self._live, LLM):
            self._live = self._live()
        return None

    @llm_chat_callback()
    def chat(self, messages: list[ChatMessage], **kwargs: Any) -> ChatResponse:
        call = self._call(messages, kwargs)
        key, row, ledger = call_key(**call), None, self._log.ledger
        if recorded := self._recorded(key, call):
            return recorded
        ledger.reserve(key, call)
        try:
            response = ask_and_block(lambda: self._live.chat(messages, **call["params"]))
            with _kept():
                row = self._log.append(_row_of(call, response))
        finally:
            ledger.settle(key, row)
        ledger.use(row)
        return _response(row)

    @llm_chat_callback()
    async def achat(self, messages: list[ChatMessage], **kwargs: Any) -> ChatResponse:
        call = self._call(messages, kwargs)
        key, row, ledger = call_key(**call), None, self._log.ledger
        if recorded := self._recorded(key, call):
            return recorded
        # Two equal calls at once would be paid twice: the second waits for the first and takes its answer.
        asking = asyncio.get_running_loop(), key  # a lock belongs to one event loop
        async with ledger.asking.setdefault(asking, asyncio.Lock()):
            if recorded := self._recorded(key, call):
                return recorded
            await ledger.admit(key, call)
            try:
                response = await ask(lambda: self._live.achat(messages, **call["params"]))
                with _kept():
                    row = await self._log.append_soon(_row_of(call, response))
            finally:
                ledger.settle(key, row)
                if (
                    row
                ):  # after a failure, those that wait and those that come must still go one by one
                    ledger.asking.pop(asking, None)
        ledger.use(row)
        return _response(row)

    def complete(self, prompt: str, formatted: bool = False, **kwargs: Any) -> CompletionResponse:
        return _completion(
            self.chat([ChatMessage(role=MessageRole.USER, content=prompt)], **kwargs)
        )

    async def acomplete(
        self, prompt: str, formatted: bool = False, **kwargs: Any
    ) -> CompletionResponse:
        return _completion(
            await self.achat([ChatMessage(role=MessageRole.USER, content=prompt)], **kwargs)
        )

    # A recorded answer is whole at once, so a stream is one piece.
    def stream_chat(self, messages: list[ChatMessage], **kwargs: Any):
        yield _whole(self.chat(messages, **kwargs))

    def stream_complete(self, prompt: str, formatted: bool = False, **kwargs: Any):
        yield _whole(self.complete(prompt, **kwargs))


def _check_writable(log: CallLog) -> None:
    try:
        log.open_to_write()
    except (OSError, RuntimeError) as error:
        raise RunStopped(f"answers could not be kept, so none is asked for: {error}") from error


@contextmanager
def _kept():
    try:
        yield
    except (
        OSError,
        RuntimeError,
    ) as error:  # a full disk, another writer: what is asked next could not be kept either
        raise RunStopped(f"an answer could not be kept: {error}") from error


def _row_of(call: dict, response: ChatResponse) -> dict:
    tokens = [
        {token.token: token.logprob for token in alternatives}
        for alternatives in response.logprobs or []
    ]
    return make_row(
        call, response.message.content or "", *_details(response.raw), _first_line(tokens)
    )


def embed_through(
    log: CallLog, model: str, texts: list[str], ask_live: Callable[[list[str]], list[str]]
) -> list[str]:
    """The embeddings of texts from the log, each as the text that `ask_live` made of it; what is missing is asked for in one request.

    A row of an embedding has one message of the role "input". Batches hold chats only, so a run that collects asks for them live too.

    Raises:
        MissingCall: a replay, and the log does not hold them all.
    """
    calls = {
        text: {
            "model": name_of(model),
            "messages": [{"role": "input", "content": text}],
            "params": {},
            "sample": 0,
        }
        for text in texts
    }
    keys = {text: call_key(**call) for text, call in calls.items()}
    if new := [text for text, key in keys.items() if not log.get(key)]:
        if log.mode == "replay":
            raise MissingCall(log.explain_missing(calls[new[0]]))
        _check_writable(log)
        rows, reserved = {}, []
        try:
            for text in new:
                log.ledger.reserve(keys[text], calls[text])
                reserved.append(text)
            for text, answer in zip(new, ask_and_block(lambda: ask_live(new)), strict=True):
                with _kept():
                    rows[text] = log.append(make_row(calls[text], answer))
        finally:
            for text in reserved:
                log.ledger.settle(keys[text], rows.get(text))
    found = [log.get(keys[text]) for text in texts]
    for row in found:
        log.ledger.use(row)
    return [row["response"] for row in found]


def _response(row: dict) -> ChatResponse:
    FINISH.set(row["finish_reason"])
    logprobs = [
        [LogProb(token=token, logprob=p) for token, p in tokens.items()]
        for tokens in row.get("logprobs", [])
    ]
    return ChatResponse(
        message=ChatMessage(role=MessageRole.ASSISTANT, content=row["response"]),
        logprobs=logprobs or None,
        raw={"usage": row["usage"], "finish_reason": row["finish_reason"]},
    )


def _first_line(tokens: list[dict]) -> list[dict]:
    """The alternatives of the tokens up to the first line break: a score stands there, and the rest would be a hundred times as
    much."""
    ends = (
        i
        for i, alternatives in enumerate(tokens)
        if alternatives and "\n" in max(alternatives, key=alternatives.get)
    )
    return tokens[: next(ends, len(tokens)) + 1]


def _completion(response: ChatResponse) -> CompletionResponse:
    return CompletionResponse(text=response.message.content, raw=response.raw)


def _whole(response):
    response.delta = (
        response.message.content if isinstance(response, ChatResponse) else response.text
    )
    return response


def _details(raw: Any) -> tuple[dict | None, str | None]:
    """Usage and finish reason, where a provider's raw response has them in OpenAI's form."""
    raw = raw.model_dump() if hasattr(raw, "model_dump") else raw
    if not isinstance(raw, dict):
        return None, None
    usage, choices = raw.get("usage"), raw.get("choices") or [{}]
    usage = usage.model_dump() if hasattr(usage, "model_dump") else usage
    choice = choices[0] if isinstance(choices[0], dict) else vars(choices[0])
    return dict(usage) if usage else None, choice.get("finish_reason") or raw.get("finish_reason")


async def run_stage(stage: str, jobs: Iterable[Awaitable], concurrency: int | None = None) -> list:
    """Await all jobs, at most `concurrency` (by default CONCURRENCY) at a time. Returns their results in the order of the jobs.

    Every job is run to its end, so that all that was answered is in the log, before a failure is raised; but after a RunStopped no
    other job is begun.

    Raises:
        RunStopped: no further call makes sense or is allowed.
        Collected: some calls were written out to be answered (JUDGE_MODE=collect).
        Exception: of the jobs that failed, the first one's; a note on it says how many there were.
    """
    if terminal():
        from tqdm import tqdm
    else:
        from tqdm.auto import tqdm

    jobs = list(jobs)
    try:
        if (workers := int(number("CONCURRENCY") if concurrency is None else concurrency)) < 1:
            raise ValueError(f"{workers} calls at once: expected 1 or more")
        meter = Meter(caps=caps())
    except ValueError:
        for job in jobs:
            job.close()
        raise
    waiting_jobs, results, stopped = iter(enumerate(jobs)), [None] * len(jobs), []

    async def work(number: int) -> None:
        STAGE.set(stage)
        METER.set(meter)
        # One begins with each turn of the event loop. Begun in one turn, they would ask at once and be answered at once, and then
        # every reply waits until all others are dealt with.
        for _ in range(number):
            await asyncio.sleep(0)
        for place, job in waiting_jobs:
            if stopped:  # what would be asked now would be refused like the one before
                job.close()
                results[place] = stopped[0]
                continue
            ROW.set(place)
            FINISH.set(None)  # the caller's last reply was another's
            try:
                results[place] = await job
            except Exception as error:  # told below, when all are done
                results[place] = error
                if isinstance(error, RunStopped):
                    stopped.append(error)
            bar.set_postfix_str(str(meter), refresh=False)
            bar.update()

    with tqdm(
        total=len(jobs), desc=stage, file=terminal(), disable=judge_mode() == "replay"
    ) as bar:
        if judge_mode() == "record":
            gc.freeze()  # LlamaIndex's half a million objects: to look through them takes a quarter of a second, while calls wait
        try:
            await asyncio.gather(*map(work, range(min(workers, len(jobs)))))
        finally:
            gc.unfreeze()
            for _, job in waiting_jobs:  # interrupted
                job.close()
    failures = [result for result in results if isinstance(result, BaseException)]
    if stopped:
        raise RunStopped(
            f"stage {stage!r}: {stopped[0]} ({len(results) - len(failures)} of {len(results)} rows were done)"
        ) from stopped[0].__cause__
    waiting = [failure for failure in failures if isinstance(failure, NotAnswered)]
    for failure in failures:
        if failure not in waiting:
            failure.add_note(
                f"stage {stage!r}: {len(failures)} of {len(results)} rows failed; what was answered is kept"
            )
            raise failure
    if waiting:
        raise Collected(
            f"stage {stage!r}: {len(waiting)} of {len(results)} rows wait for answers. Their requests are in "
            f"{waiting[0]}: have them answered, merge the results with `make fill`, and run again."
        )
    return results


def fill(
    log: CallLog, results_path: str | Path, requests_path: str | Path | None = None
) -> list[str]:
    """Merge a results file, in the output format of the OpenAI Batch API, into the log.

    Good results are appended. Returns what was wrong, a line each: results that are unknown, double, failed, damaged or
    at odds with the log, and requests without a result.
    """
    requests_path = Path(requests_path or log.requests_path)
    calls, wrong, answers = {}, [], {}
    for number, request in enumerate(load_rows(requests_path), 1):
        params = dict(request["body"])
        call = {
            "model": params.pop("model"),
            "messages": params.pop("messages"),
            "params": params,
            "sample": int(request["custom_id"].split("-")[0]),
        }
        if request_id(call) != request["custom_id"]:
            raise DamagedFile(
                f"{requests_path}, line {number}: custom_id does not match the request's body"
            )
        calls[request["custom_id"]] = call
    for number, line in enumerate(Path(results_path).read_bytes().splitlines(), 1):
        where = f"{results_path}, line {number}"
        try:
            result = json.loads(line)
            name, error = result["custom_id"], result.get("error")
            reply = result.get("response") or {}
            if error or reply.get("status_code") != 200:
                wrong.append(
                    f"{where}: {name}: failed: {json.dumps(error or reply, ensure_ascii=False)[:200]}"
                )
                answers.setdefault(name, [])
                continue
            choice = reply["body"]["choices"][0]
            tokens = [
                {one["token"]: one["logprob"] for one in token["top_logprobs"]}
                for token in (choice.get("logprobs") or {}).get("content") or []
            ]
            usage = reply["body"].get("usage")
            if usage and str(result.get("id")).startswith("batch_req"):
                usage = {**usage, BATCH: True}
            content = choice["message"]["content"]
            row_parts = (
                "" if content is None else content,
                usage,
                choice.get("finish_reason"),
                _first_line(tokens),
            )
            if not isinstance(row_parts[0], str):
                raise TypeError("content is not text")
        except (ValueError, LookupError, TypeError, AttributeError) as error:
            wrong.append(
                f"{where}: not a result of the Batch API's form ({type(error).__name__}: {error})"
            )
            continue
        answers.setdefault(name, []).append((where, row_parts))
    for name, given in answers.items():
        if name not in calls:
            wrong.append(
                f"{given[0][0] if given else results_path}: {name}: no such request in {requests_path}"
            )
        elif len(given) > 1:
            wrong.append(f"{given[1][0]}: {name}: answered {len(given)} times, so none was taken")
        elif given:
            where, parts = given[0]
            row = make_row(calls[name], *parts)
            if log.append(row)["response"] != row["response"]:
                wrong.append(f"{where}: {name}: the log holds another answer, which stays")
    wrong += [f"{requests_path}: {name}: no result" for name in calls if name not in answers]
    return wrong
