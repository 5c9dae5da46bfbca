"""Calls that are answered elsewhere: results merged into a log, and the Batch API."""

import json
from pathlib import Path
from typing import Any

from ..log import BATCH, CallLog, details_of, make_row, request_id
from ..rows import DamagedFile, load_rows, save_rows, write_text
from ..settings import RunStopped, models_of, name_of, served_like
from .budget import Budget
from .models import (
    ask_and_block,
    client_of,
    read_body,
    request_settings,
    start_once,
    tell,
    wait_for,
)

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
    held = {f"{row['sample']}-{row['key'][:40]}" for row in log.rows()}
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
        elif name not in calls and name not in held:
            wrong.append(f"{where}: {name}: no such request in {requests_path}")
    for name, given in answers.items():
        if len(given) > 1:
            wrong.append(f"{given[1][0]}: {name}: answered {len(given)} times, so none was taken")
        elif given and name in calls:
            *parts, model = given[0][1]
            row = make_row(calls[name], *parts, replied_by=model, batch=Path(results_path).stem)
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
    if not isinstance(reply["body"]["choices"][0]["message"]["content"], str | list | None):
        raise TypeError("content is not text")
    text, reason, logprobs = read_body(reply["body"])
    usage, _, model = details_of(reply["body"])
    if usage and str(result.get("id")).startswith("batch_req"):
        usage[BATCH] = True
    return name, (text, usage, reason, logprobs, model), ""


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
    path, roles = log.path.with_name("batches.json"), models_of(log.path.parent)
    pending = {request["custom_id"]: request for request in load_rows(log.requests_path)}
    noted = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    noted = {id: one for id, one in noted.items() if pending.keys() & set(one["requests"])}
    new: dict[str, list[dict]] = {}  # model -> its requests
    for name, request in pending.items():
        if not any(name in one["requests"] for one in noted.values()):
            new.setdefault(request["body"]["model"], []).append(request)
    places, clients = {name_of(model): model for model in roles.values()}, {}
    for model in {*new, *(one["model"] for one in noted.values())}:
        # A fine-tuned model is where its base is.
        place = places.get(model, served_like(model, roles["student"]))
        clients[model] = client_of(place, whole_api=True)
    for id, one in noted.items():
        tell(f"batch {id} of {len(one['requests'])} requests to {one['model']}: picked up")

    def note() -> None:
        write_text(path, json.dumps(noted, indent=1) + "\n")

    with Budget.of(log).reserved(*(request["body"] for part in new.values() for request in part)):
        for model, part in new.items():
            batch = _start(model, part, log.path.with_name("batch_input.jsonl"), clients[model])
            noted[batch.id] = {"model": model, "requests": [one["custom_id"] for one in part]}
            note()
            tell(f"batch {batch.id} of {len(part)} requests to {model}: started")
    results = []
    for id, one in list(noted.items()):
        client = clients[one["model"]]
        batch = wait_for("batch", client.batches.retrieve, id, WINDOW_HOURS, path)
        files = list(filter(None, (batch.output_file_id, batch.error_file_id)))
        if batch.status == "failed" or not files:
            noted.pop(id)  # the next run sends its requests again
            note()
            errors = (batch.errors and batch.errors.data) or []
            reasons = "; ".join(f"{error.message} (line {error.line})" for error in errors)
            raise RunStopped(f"batch {id} {batch.status}: {reasons or 'no reason given'}")
        results += [ask_and_block(client.files.content, file).content for file in files]
    results_path = log.path.with_name("results.jsonl")
    results_path.write_bytes(b"\n".join(map(bytes.strip, results)))
    wrong = fill(log, results_path)
    noted.clear()  # the answers are in the log, and what failed may be sent again
    note()
    return wrong


def _start(model: str, part: list[dict], path: Path, client: Any) -> Any:
    """Send requests with the settings that a live run would send. Returns the batch."""
    lines = []
    for request in part:
        params = dict(request["body"])
        asked = {name: params.pop(name) for name in ("model", "messages")}
        lines.append({**request, "body": {**asked, **request_settings(model, params)}})
    save_rows(path, lines)
    file = path.name, path.read_bytes()
    upload = ask_and_block(client.files.create, file=file, purpose="batch")
    body = {"input_file_id": upload.id, "completion_window": "24h"}
    return start_once("batch", client.batches.create, endpoint="/v1/chat/completions", **body)
