"""Calls that are answered elsewhere: results merged into a log, and the Batch API."""

import json
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

from ..log import CallLog, make_row, request_id
from ..rows import DamagedFile, load_rows, save_rows, write_text
from ..settings import LOCAL, STAND_IN, RunStopped, id_of, models_of, name_of, served_like
from .budget import BATCH, Budget
from .models import ask_and_block, client_of, request_settings, start_once, wait_for

ENDED = ("completed", "failed", "expired", "cancelled")
WINDOW_HOURS = 26  # the service gives up after 24


def fill(
    log: CallLog, results_path: str | Path, requests_path: str | Path | None = None
) -> list[str]:
    """Merge a results file, in the output format of the OpenAI Batch API, into the log.

    Returns what was wrong, a line each: results that are unknown, double, failed, damaged or at
    odds with the log, and requests without a result. `requests_path` is by default
    `requests.jsonl` beside the log.
    """
    requests_path = Path(requests_path or log.requests_path)
    calls, wrong = _calls(requests_path), []
    answers: dict[str, list] = {}  # custom_id -> (where, parts of the row) of each good result
    for number, line in enumerate(Path(results_path).read_bytes().splitlines(), 1):
        where = f"{results_path}, line {number}"
        try:
            name, parts, failed = _read_result(json.loads(line))
        except (ValueError, LookupError, TypeError, AttributeError) as error:
            why = f"{type(error).__name__}: {error}"
            wrong.append(f"{where}: not a result of the Batch API's form ({why})")
            continue
        answers.setdefault(name, []).extend([] if failed else [(where, parts)])
        if failed:
            wrong.append(f"{where}: {name}: failed: {failed[:200]}")
    for name, given in answers.items():
        if name not in calls:
            source = given[0][0] if given else results_path
            wrong.append(f"{source}: {name}: no such request in {requests_path}")
        elif len(given) > 1:
            wrong.append(f"{given[1][0]}: {name}: answered {len(given)} times, so none was taken")
        elif given:
            row = make_row(calls[name], *given[0][1])
            if log.append(row)["response"] != row["response"]:
                wrong.append(f"{given[0][0]}: {name}: the log holds another answer, which stays")
    log.sync()
    return wrong + [f"{requests_path}: {name}: no result" for name in calls if name not in answers]


def _calls(path: Path) -> dict[str, dict]:
    """{custom_id: the call} of a file of requests."""
    calls = {}
    for number, request in enumerate(load_rows(path), 1):
        name, params = request["custom_id"], dict(request["body"])
        call = {"model": params.pop("model"), "messages": params.pop("messages")}
        calls[name] = {**call, "params": params, "sample": int(name.split("-")[0])}
        if request_id(calls[name]) != name:
            raise DamagedFile(f"{path}, line {number}: custom_id does not match the request's body")
    return calls


def _read_result(result: dict) -> tuple[str, tuple, str]:
    """(custom_id, parts of the row, what failed or "") of one result."""
    name, error, reply = result["custom_id"], result.get("error"), result.get("response") or {}
    if not isinstance(name, str):
        raise TypeError("custom_id is not text")
    if error or reply.get("status_code") != 200:
        return name, (), json.dumps(error or reply, ensure_ascii=False)
    choice, usage = reply["body"]["choices"][0], reply["body"].get("usage")
    places = (choice.get("logprobs") or {}).get("content") or []
    tops = [
        sorted(place.get("top_logprobs") or [], key=lambda one: one["logprob"]) for place in places
    ]
    tokens = [{one["token"]: one["logprob"] for one in top} for top in tops] if any(tops) else []
    if usage and str(result.get("id")).startswith("batch_req"):
        usage = {**usage, BATCH: True}
    content = choice["message"]["content"]
    if not isinstance(content, str | None):
        raise TypeError("content is not text")
    # A refusal has no content. It was paid for, and is an empty reply.
    return name, (content or "", usage, choice.get("finish_reason"), tokens), ""


def answer_requests(log: CallLog) -> list[str]:
    """Send the requests that `collect` left beside a log to the Batch API, wait, and fill the log.

    Each model's requests are one batch. A batch's id is noted in `batches.json` beside the log as
    soon as there is one, so an interrupted run waits for the same batch. The next run collects
    again what failed or was not answered in time. Returns what went wrong, a line each.

    Raises:
        RunStopped: no Batch API, or the batch is refused, failed, unknown, or over the budget.
        CallFailed: the service cannot be reached; run again to go on.
    """
    log.open_to_write()  # or another process is at it
    notes_path, models = log.path.with_name("batches.json"), models_of(log.path.parent)
    pending = {request["custom_id"]: request for request in load_rows(log.requests_path)}
    noted = json.loads(notes_path.read_text(encoding="utf-8")) if notes_path.exists() else {}
    noted = {id: one for id, one in noted.items() if pending.keys() & set(one["requests"])}
    sent = {request for batch in noted.values() for request in batch["requests"]}
    new: dict[str, list[dict]] = {}  # model -> its requests
    for name, request in pending.items():
        if name not in sent:
            logged = request["body"]["model"]
            new.setdefault(_setting_of(log.models.get(logged, logged), models), []).append(request)

    def note() -> None:
        write_text(notes_path, json.dumps(noted, indent=1) + "\n")

    for id, batch in noted.items():
        _tell(f"batch {id} of {len(batch['requests'])} requests to {batch['model']}: picked up")
    with Budget.of(log).reserved(*(request["body"] for part in new.values() for request in part)):
        for model, part in new.items():
            id, requests = _start(model, part, log.path), [one["custom_id"] for one in part]
            noted[id] = {"model": id_of(model), "requests": requests}
            note()
            _tell(f"batch {id} of {len(part)} requests to {id_of(model)}: started")
    results: list[dict] = []
    wrong: list[str] = []
    for id, batch in list(noted.items()):
        client = client_of(_setting_of(batch["model"], models), whole_api=True)
        ended = _wait(client, id, notes_path)
        if ended.status == "failed" or not (ended.output_file_id or ended.error_file_id):
            noted.pop(id)  # the next run sends its requests again
            note()
            errors = (ended.errors and ended.errors.data) or []
            reasons = "; ".join(f"{error.message} (line {error.line})" for error in errors)
            raise RunStopped(f"batch {id} {ended.status}: {reasons or 'no reason given'}")
        for line in _lines(client, ended):
            try:
                result = json.loads(line)
                results += [result] * (result["custom_id"] in pending)
            except (ValueError, LookupError, TypeError) as error:
                why = f"{type(error).__name__}: {error}"
                wrong.append(f"batch {id}: a line that is no result ({why}): {line[:80]!r}")
    results_path = log.path.with_name("results.jsonl")
    save_rows(results_path, results)
    wrong += fill(log, results_path)
    noted.clear()  # the answers are in the log, and what failed may be sent again
    note()
    return wrong


def _tell(text: str) -> None:
    print(text, flush=True)


def _setting_of(id: str, models: dict[str, str]) -> str:
    """The setting of a model's id, from its role. A fine-tuned model is where its base is."""
    known = (model for model in models.values() if id_of(model) == id)
    model = next(known, served_like(id, models["student"]))
    if model.startswith(("hf:", "local:", STAND_IN)) or model == LOCAL:
        raise RunStopped(
            f"{id_of(model)!r} has no Batch API, which is OpenAI's: name another model, or answer "
            "the requests in another way and use `make fill`"
        )
    return model


def _start(model: str, part: list[dict], log_path: Path) -> str:
    """Send requests under the model's own id, as a live run would. Returns the batch's id."""
    lines, path = [], log_path.with_name("batch_input.jsonl")
    for request in part:
        params = dict(request["body"], model=name_of(model))
        asked = {name: params.pop(name) for name in ("model", "messages")}
        lines.append({**request, "body": {**asked, **request_settings(model, params)}})
    save_rows(path, lines)
    client, file = client_of(model, whole_api=True), (path.name, path.read_bytes())
    upload = ask_and_block(partial(client.files.create, file=file, purpose="batch"))
    create = partial(client.batches.create, endpoint="/v1/chat/completions")
    started = partial(create, input_file_id=upload.id, completion_window="24h")
    return start_once("batch", started).id


def _wait(client: Any, id: str, notes_path: Path) -> Any:
    """The batch when it has ended."""

    def state(batch: Any) -> str:
        counts = batch.request_counts
        answered = f", {counts.completed} of {counts.total} answered" if counts else ""
        return batch.status + answered

    try:
        look = partial(ask_and_block, partial(client.batches.retrieve, id))
        return wait_for(f"batch {id}", look, ENDED, WINDOW_HOURS, _tell, state)
    except RunStopped as error:
        if error.status != 404:
            raise
        said = f"batch {id} is not known to this account. Delete {notes_path} to send its requests"
        raise RunStopped(f"{said} again.") from error


def _lines(client: Any, batch: Any) -> Iterator[bytes]:
    """The lines of a batch's output and error files, in whatever order the service wrote them."""
    for file in filter(None, (batch.output_file_id, batch.error_file_id)):
        content = ask_and_block(partial(client.files.content, file)).content
        yield from filter(bytes.strip, content.splitlines())
