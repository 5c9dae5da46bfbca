"""The Batch API: the requests of `collect`, answered within a day at half the price, with no connection to hold."""

import json
import time
from pathlib import Path

from .calls import fill
from .costs import BATCH_PRICE, caps
from .models import ask_and_block, openai_client, request_settings
from .settings import LOCAL, STAND_IN, RunStopped, id_of, models_of, name_of, number
from .snapshots import CallLog, load_rows, save_rows, write_text

ENDED = ("completed", "failed", "expired", "cancelled")
WINDOW_HOURS = 26  # the service gives up after 24


def answer_requests(log: CallLog) -> list[str]:
    """Send the requests that `collect` left beside a log to the Batch API, wait, and fill the log. Returns what went wrong, a line each.

    Each model's requests are a batch of their own. A batch is noted in `batches.json` beside the log as soon as it is started, so that an
    interrupted run picks it up by its id. What failed, or was not answered in time, is collected again by the next run.

    Raises:
        RunStopped: a model that has no Batch API, a refused or failed batch, a budget that does not allow it.
    """
    notes_path, results_path = log.path.with_name("batches.json"), log.path.with_name("results.jsonl")
    noted = json.loads(notes_path.read_text(encoding="utf-8")) if notes_path.exists() else {}  # batch id -> its requests' ids, its model

    def note() -> None:
        write_text(notes_path, json.dumps(noted, indent=1) + "\n")

    pending = {request["custom_id"]: request for request in load_rows(log.requests_path)}
    noted = {id: batch for id, batch in noted.items() if pending.keys() & set(batch["requests"])}
    sent = {request for batch in noted.values() for request in batch["requests"]}
    for id, batch in noted.items():
        print(f"batch {id} of {len(batch['requests'])} requests to {batch['model']}: picked up", flush=True)
    models, new = models_of(log.path.parent), {}
    for request in pending.values():
        if request["custom_id"] not in sent:
            logged = request["body"]["model"]
            new.setdefault(_setting_of(log.models.get(logged, logged), models), []).append(request)
    _check_budget(log, [request for part in new.values() for request in part])
    for model, part in new.items():
        id = _submit(openai_client(model), name_of(model), part, log.path.with_name("batch_input.jsonl"))
        noted[id] = {"model": id_of(model), "requests": [request["custom_id"] for request in part]}
        note()
        print(f"batch {id} of {len(part)} requests to {name_of(model)}: started", flush=True)
    results = []
    for id in list(noted):
        client = openai_client(_setting_of(noted[id]["model"], models))
        batch = _wait(client, id)
        if batch.status == "failed" or not (batch.output_file_id or batch.error_file_id):
            noted.pop(id)  # the next run sends its requests anew
            note()
            reasons = "; ".join(f"{error.message} (line {error.line})" for error in (batch.errors and batch.errors.data) or [])
            raise RunStopped(f"batch {id} {batch.status}: {reasons or 'no reason given'}")
        results += _results(client, batch)
    save_rows(results_path, [result for result in results if result.get("custom_id") in pending])
    wrong = fill(log, results_path)
    noted.clear()  # what they answered is in the log, and what failed may be sent anew
    note()
    return wrong


def _setting_of(name: str, models: dict[str, str]) -> str:
    """The setting of a model's id: the role's that has it; a fine-tuned model stands where its base does."""
    model = next((model for model in models.values() if id_of(model) == name), None) or name + "".join(models["student"].partition("@")[1:])
    if model.startswith(("hf:", "local:", STAND_IN)) or model == LOCAL:
        raise RunStopped(f"{model!r} has no Batch API, which is OpenAI's: name another model, or answer the requests in another way "
                         "and use `make fill`")
    return model


def _check_budget(log: CallLog, part: list[dict]) -> None:
    calls, dollars = caps()
    if not part:
        return
    if calls is not None and len(log) + len(part) > calls:
        raise RunStopped(f"{len(part)} more calls on {len(log)} are over the budget of {calls:g} (BUDGET_CALLS); raise it and run again")
    if dollars is not None:
        most = BATCH_PRICE * sum(log.ledger.most({"params": {}, **request["body"]}) for request in part)
        if log.ledger.spent() + most > dollars:
            raise RunStopped(f"this batch may cost ${most:.4f}, and ${log.ledger.spent():.4f} of the budget of ${dollars:g} is spent "
                             "(BUDGET_DOLLARS); raise it and run again")


def _submit(client, name: str, part: list[dict], path: Path) -> str:
    """Upload the requests under the model's own id, as they would be sent live, and start a batch. Returns its id."""
    lines = []
    for request in part:
        params = {key: value for key, value in request["body"].items() if key not in ("model", "messages")}
        lines.append({**request, "body": {"model": name, "messages": request["body"]["messages"], **request_settings(name, params)}})
    save_rows(path, lines)
    content = path.read_bytes()
    file = ask_and_block(lambda: client.files.create(file=(path.name, content), purpose="batch"))
    attempts: list = []

    def create():
        # After a broken connection the batch may be there all the same: it has our file.
        if attempts and (batch := next((batch for batch in client.batches.list(limit=20) if batch.input_file_id == file.id), None)):
            return batch
        attempts.append(1)
        return client.batches.create(input_file_id=file.id, endpoint="/v1/chat/completions", completion_window="24h")

    return ask_and_block(create).id


def _wait(client, id: str):
    """Wait until a batch has ended, looking every POLL_SECONDS; prints each new state."""
    end, said = time.monotonic() + WINDOW_HOURS * 3600, None
    while (batch := ask_and_block(lambda: client.batches.retrieve(id))).status not in ENDED:
        counts = batch.request_counts
        if (state := f"{batch.status}, {counts.completed} of {counts.total} answered" if counts else batch.status) != said:
            print(f"batch {id}: {(said := state)}", flush=True)
        if time.monotonic() > end:
            raise RunStopped(f"batch {id} is still {batch.status!r} after {WINDOW_HOURS} hours; run again to wait for it")
        time.sleep(number("POLL_SECONDS"))
    print(f"batch {id}: {batch.status}", flush=True)
    return batch


def _results(client, batch) -> list[dict]:
    """The lines of a batch's output and error files, in whatever order the service wrote them."""
    lines = []
    for file in filter(None, (batch.output_file_id, batch.error_file_id)):
        lines += ask_and_block(lambda: client.files.content(file).text).splitlines()
    return [json.loads(line) for line in lines if line.strip()]
