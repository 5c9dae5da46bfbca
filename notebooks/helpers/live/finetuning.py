"""A hosted student: OpenAI's fine-tuning on the same file that the local student learns from."""

import hashlib
import json
from pathlib import Path
from typing import Any

import pandas as pd
from llama_index.core.llms import LLM

from ..finetune import check_events, count_tokens
from ..log import CallLog
from ..rows import write_text
from ..settings import LOCAL, CallFailed, RunStopped, name_of, number, redact, served_like
from .budget import EPOCHS, JOB, TRAINING_PRICES, Budget, dollars_of, noted_jobs
from .models import FAILED, ask_and_block, client_of, live, start_once, tell, wait_for

SETTINGS = {
    "method": {"type": "supervised", "supervised": {"hyperparameters": {"n_epochs": EPOCHS}}}
}
CLOSED = (
    "OpenAI takes no new fine-tuning jobs after 2027-01-06, and since 2026-05-07 none from "
    "accounts that had none before. To train on the same file on your own machine, use "
    "LocalFinetuneEngine and unset STUDENT_MODEL."
)


def hosted_students(model: str, data_path: str | Path, log: CallLog) -> dict[str, LLM]:
    """A hosted model to compare the local student with, before and after fine-tuning.

    A run that records or collects starts the job and waits for it, FINETUNING_HOURS at most. The
    job's id is noted in `finetuning_job.json` beside the log, so an interrupted run waits for the
    same job. Another model or file means a new job. A replay needs the note only.

    Args:
        model: of the role "student" (see `models_of`).
        data_path: the fine-tuning file. It is checked before it is uploaded.
        log: the calls of both models go through it.

    Returns:
        {"hosted": the fine-tuned model, "hosted_base": the model as it was}; {} if `model` is
        "minilm".

    Raises:
        DamagedFile: the file is not what it must be.
        RunStopped: the job was refused, failed or was cancelled, and why (the next run starts a new
            one); the budget does not allow it; or it has not ended in time.
    """
    if model == LOCAL:
        return {}
    if log.mode != "replay":
        _finetune(model, Path(data_path), log)
    jobs = noted_jobs(log)
    if not jobs or not jobs[0]["fine_tuned_model"]:
        said = f"no fine-tuned model of {model!r} was recorded; run with JUDGE_MODE=record"
        raise FileNotFoundError(f"{log.path.with_name(JOB)}: {said}")
    ids = {"hosted": jobs[0]["fine_tuned_model"], "hosted_base": name_of(model)}
    zero = {"temperature": 0}
    return {
        name: log.llm(id, live(served_like(id, model)), params=zero) for name, id in ids.items()
    }


def _finetune(model: str, path: Path, log: CallLog) -> None:
    """Bring the job that is noted beside the log, or a new one, to its end, and note that."""
    note, client = log.path.with_name(JOB), client_of(model, whole_api=True)
    estimate = EPOCHS * sum(count_tokens(check_events(path)))
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    wanted = {"base_model": name_of(model), "training_file_sha256": digest, "settings": SETTINGS}
    job, *earlier = noted_jobs(log) or [{}]
    failed = job.get("status") in FAILED
    if job and (failed or any(job[name] != value for name, value in wanted.items())):
        why = f"was {job['status']}" if failed else "is of another model or file"
        tell(f"the fine-tuning job noted in {note.name} {why}: a new one is started")
        job, earlier = {}, [job, *earlier]
    if job.get("fine_tuned_model"):
        return

    def keep(job: Any) -> dict:
        names = ("id", "status", "fine_tuned_model", "trained_tokens")
        seen = {name: getattr(job, name) for name in names}
        tokens = job.trained_tokens or (0 if job.status in FAILED else estimate)
        noted = {**wanted, "earlier": earlier, **seen, "tokens": tokens}
        write_text(note, json.dumps(noted, indent=1) + "\n")
        return noted

    if not job:
        Budget.of(log).allow_training(model, estimate)
        job = keep(_start(client, path, name_of(model)))
        tell(f"fine-tuning job {job['id']} of {name_of(model)}: started")
    id, hours = job["id"], number("FINETUNING_HOURS")
    ended = wait_for("fine-tuning job", client.fine_tuning.jobs.retrieve, id, hours, note)
    keep(ended)
    if ended.status in FAILED:
        error, how = ended.error, "was cancelled" if ended.status == "cancelled" else "failed"
        why = f"{error.message} ({error.code})" if error and error.message else "no reason given"
        raise RunStopped(f"fine-tuning job {id} {how}: {redact(why)}")


def _start(client: Any, path: Path, name: str) -> Any:
    """Upload the file, and start a job. Returns the job."""
    file, jobs = (path.name, path.read_bytes()), client.fine_tuning.jobs
    try:
        upload = ask_and_block(client.files.create, file=file, purpose="fine-tune")
        body = {"training_file": upload.id, "model": name, **SETTINGS}
        return start_once("fine-tuning job", jobs.create, **body)
    except (RunStopped, CallFailed) as error:
        advice = CLOSED if error.status in (400, 403, 404) else "Run again to go on."
        raise RunStopped(f"fine-tuning {name!r}: {error} {advice}") from error.__cause__


def training_cost(events: list[dict]) -> pd.DataFrame:
    """What it would cost to fine-tune a hosted model on these chats.

    Returns:
        A row a model: tokens over EPOCHS epochs, the price per million, dollars.
    """
    tokens, models = sum(count_tokens(events)) * EPOCHS, list(TRAINING_PRICES)
    table = pd.DataFrame({"tokens": tokens}, index=pd.Index(models, name="model"))
    table["$ per million"] = [dollars_of(model, trained=1_000_000) for model in models]
    return table.assign(**{"$": (table["$ per million"] * tokens / 1e6).round(2)})
