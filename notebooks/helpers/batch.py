"""The Batch API: the requests of `collect`, answered within a day at half the price, with no connection to hold."""

import json
import time
from pathlib import Path

from .calls import fill
from .costs import BATCH_PRICE, caps
from .models import CallFailed, ask_and_block, openai_client, request_settings
from .settings import LOCAL, STAND_IN, RunStopped, id_of, models_of, name_of, number, served_like
from .snapshots import CallLog, load_rows, save_rows, write_text

ENDED = ("completed", "failed", "expired", "cancelled")
WINDOW_HOURS = 26  # the service gives up after 24


def answer_requests(log: CallLog) -> list[str]:
    """Send the requests that `collect` left beside a log to the Batch API, wait, and fill the log. Returns what went wrong, a line each.

    Each model's requests are a batch of their own. Its file is noted in `batches.json` beside the log before the batch is started, and its
    id as soon as it is, so an interrupted run picks it up. What failed, or was not answered in time, is collected again by the next run.

    Raises:
        RunStopped: a model that has no Batch API, a refused, failed or unknown batch, a budget that does not allow it.
        CallFailed: the service cannot be reached; run again to go on.
    """
    log.open_to_write()  # or somebody else is at it
    notes_path, results_path = (
        log.path.with_name("batches.json"),
        log.path.with_name("results.jsonl"),
    )
    noted = (
        json.loads(notes_path.read_text(encoding="utf-8")) if notes_path.exists() else {}
    )  # file id -> batch, model, requests

    def note() -> None:
        write_text(notes_path, json.dumps(noted, indent=1) + "\n")

    pending = {request["custom_id"]: request for request in load_rows(log.requests_path)}
    noted = {
        file: batch for file, batch in noted.items() if pending.keys() & set(batch["requests"])
    }
    known = set(noted)
    sent = {request for batch in noted.values() for request in batch["requests"]}
    models, new = models_of(log.path.parent), {}
    for request in pending.values():
        if request["custom_id"] not in sent:
            logged = request["body"]["model"]
            new.setdefault(_setting_of(log.models.get(logged, logged), models), []).append(request)
    if new:
        _check_budget(log, list(pending.values()))
    for model, part in new.items():
        file = _upload(
            openai_client(model), name_of(model), part, log.path.with_name("batch_input.jsonl")
        )
        noted[file] = {
            "batch": None,
            "model": id_of(model),
            "requests": [request["custom_id"] for request in part],
        }
        note()
    for file, batch in noted.items():
        if batch["batch"] is None:
            batch["batch"] = _start(
                openai_client(_setting_of(batch["model"], models)),
                file,
                perhaps_started=file in known,
            )
            note()
        print(
            f"batch {batch['batch']} of {len(batch['requests'])} requests to {batch['model']}: "
            f"{'picked up' if file in known else 'started'}",
            flush=True,
        )
    results, wrong = [], []
    for file, noted_batch in list(noted.items()):
        client = openai_client(_setting_of(noted_batch["model"], models))
        try:
            batch = _wait(client, noted_batch["batch"])
        except RunStopped as error:
            if error.status != 404:
                raise
            raise RunStopped(
                f"batch {noted_batch['batch']} is not known to this account. Delete {notes_path} to send its requests anew."
            ) from error
        if batch.status == "failed" or not (batch.output_file_id or batch.error_file_id):
            noted.pop(file)  # the next run sends its requests anew
            note()
            reasons = "; ".join(
                f"{error.message} (line {error.line})"
                for error in (batch.errors and batch.errors.data) or []
            )
            raise RunStopped(f"batch {batch.id} {batch.status}: {reasons or 'no reason given'}")
        for line in _lines(client, batch):
            try:
                result = json.loads(line)
                results += [result] if result["custom_id"] in pending else []
            except (ValueError, LookupError, TypeError) as error:
                wrong.append(
                    f"batch {batch.id}: a line that is no result ({type(error).__name__}: {error}): {line[:80]!r}"
                )
    save_rows(results_path, results)
    wrong += fill(log, results_path)
    noted.clear()  # what they answered is in the log, and what failed may be sent anew
    note()
    return wrong


def _setting_of(name: str, models: dict[str, str]) -> str:
    """The setting of a model's id: the role's that has it; a fine-tuned model stands where its base does."""
    model = next((model for model in models.values() if id_of(model) == name), None) or served_like(
        name, models["student"]
    )
    if model.startswith(("hf:", "local:", STAND_IN)) or model == LOCAL:
        raise RunStopped(
            f"{id_of(model)!r} has no Batch API, which is OpenAI's: name another model, or answer the requests in another way "
            "and use `make fill`"
        )
    return model


def _check_budget(log: CallLog, part: list[dict]) -> None:
    calls, dollars = caps()
    if calls is not None and len(log) + len(part) > calls:
        raise RunStopped(
            f"{len(part)} more calls on {len(log)} are over the budget of {calls:g} (BUDGET_CALLS); raise it and run again"
        )
    if dollars is not None:
        most = BATCH_PRICE * sum(log.ledger.most(request["body"]) for request in part)
        if log.ledger.spent() + most > dollars:
            raise RunStopped(
                f"this batch may cost ${most:.4f}, and ${log.ledger.spent():.4f} of the budget of ${dollars:g} is spent "
                "(BUDGET_DOLLARS); raise it and run again"
            )


def _upload(client, name: str, part: list[dict], path: Path) -> str:
    """Upload the requests under the model's own id, as they would be sent live. Returns the file's id."""
    lines = []
    for request in part:
        params = {
            key: value for key, value in request["body"].items() if key not in ("model", "messages")
        }
        lines.append(
            {
                **request,
                "body": {
                    "model": name,
                    "messages": request["body"]["messages"],
                    **request_settings(name, params),
                },
            }
        )
    save_rows(path, lines)
    content = path.read_bytes()
    return ask_and_block(lambda: client.files.create(file=(path.name, content), purpose="batch")).id


def _start(client, file: str, perhaps_started: bool) -> str:
    """Start a batch on an uploaded file, unless it was `perhaps_started` before and is there. Returns its id."""
    attempts = [0] if perhaps_started else []

    def create():
        # After a broken connection, or a killed run, the batch may be there all the same: it has our file.
        if attempts and (
            batch := next(
                (batch for batch in client.batches.list(limit=20) if batch.input_file_id == file),
                None,
            )
        ):
            return batch
        attempts.append(1)
        return client.batches.create(
            input_file_id=file, endpoint="/v1/chat/completions", completion_window="24h"
        )

    return ask_and_block(create).id


def _wait(client, id: str):
    """Wait until a batch has ended, looking every POLL_SECONDS; prints each new state."""
    end, said, batch = time.monotonic() + WINDOW_HOURS * 3600, None, None
    while batch is None or batch.status not in ENDED:
        try:
            batch = ask_and_block(lambda: client.batches.retrieve(id))
            counts = batch.request_counts
            state = (
                f"{batch.status}, {counts.completed} of {counts.total} answered"
                if counts
                else batch.status
            )
        except CallFailed as error:  # the batch goes on, whether we can see it or not
            state = f"not seen ({error})"
        if state != said:
            print(f"batch {id}: {(said := state)}", flush=True)
        if batch is None or batch.status not in ENDED:
            if time.monotonic() > end:
                raise RunStopped(
                    f"batch {id} has not ended after {WINDOW_HOURS} hours; run again to wait for it"
                )
            time.sleep(number("POLL_SECONDS"))
    return batch


def _lines(client, batch) -> list[bytes]:
    """The lines of a batch's output and error files, in whatever order the service wrote them."""
    lines: list[bytes] = []
    for file in filter(None, (batch.output_file_id, batch.error_file_id)):
        lines += ask_and_block(lambda: client.files.content(file).content).splitlines()
    return [line for line in lines if line.strip()]
