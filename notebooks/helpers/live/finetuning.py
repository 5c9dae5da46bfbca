"""A hosted student: OpenAI's fine-tuning on the same file that the local student learns from."""

import hashlib
import json
from functools import partial
from pathlib import Path
from typing import Any

import pandas as pd
from llama_index.core.llms import LLM

from ..finetune import check_events, count_tokens
from ..log import CallLog
from ..rows import load_rows, write_text
from ..settings import LOCAL, CallFailed, RunStopped, name_of, number, redact, served_like, terminal
from .budget import EPOCHS, TRAINING_PRICES, Budget, job_path, noted_job, training_dollars
from .models import ask_and_block, client_of, live, start_once, wait_for

ENDED = ("succeeded", "failed", "cancelled")
CLOSED = (
    "OpenAI takes no new fine-tuning jobs after 2027-01-06, and since 2026-05-07 none from "
    "accounts that had none before. To train on the same file on your own machine, use "
    "LocalFinetuneEngine and unset STUDENT_MODEL."
)


class FinetuningFailed(RunStopped):
    """There will be no fine-tuned model. The message gives the service's reason."""


class HostedFinetuneEngine:
    """OpenAI's fine-tuning, with the methods of llama-index-finetuning's OpenAIFinetuneEngine.

    The original posts a refused job again once a minute, for ever, never says why a job failed, and
    knows of no base URL. Here a refusal raises, the job can be waited for, and a job that fails
    says why. Key and base URL are the judge's.

    Args:
        base_model: an id that may be fine-tuned, with its base URL if it has one (`models_of`).
        data_path: the fine-tuning file. It is checked before it is uploaded.
        start_job_id: the id of a job to wait for, in place of `finetune()`.
        settings: of the job, as OpenAI's client takes them: `suffix`, `seed`, `method`, ...
    """

    def __init__(
        self, base_model: str, data_path: str | Path, start_job_id: str = "", **settings: Any
    ) -> None:
        self.base_model, self.data_path, self.settings = base_model, Path(data_path), settings
        self.job_id, self._client = start_job_id, client_of(base_model, whole_api=True)

    def finetune(self) -> Any:
        """Check and upload the file, and start the job. Returns the job.

        Raises:
            DamagedFile: the file is not what it must be.
            FinetuningFailed: the service refuses the job; the message has its words.
        """
        check_events(self.data_path)
        name, client = name_of(self.base_model), self._client
        file = (self.data_path.name, self.data_path.read_bytes())
        try:
            upload = ask_and_block(partial(client.files.create, file=file, purpose="fine-tune"))
            create = partial(client.fine_tuning.jobs.create, training_file=upload.id, model=name)
            job = start_once("fine-tuning job", partial(create, **self.settings))
        except (RunStopped, CallFailed) as error:
            kind, advice = RunStopped, "Run again to go on."
            if error.status in (400, 403, 404):
                kind, advice = FinetuningFailed, CLOSED
            raise kind(f"fine-tuning {name!r}: {error} {advice}") from error.__cause__
        self.job_id = job.id
        _tell(f"fine-tuning job {job.id} of {name}: started")
        return job

    def get_current_job(self) -> Any:
        """The job as it is now.

        Raises:
            ValueError: there is none yet.
            FinetuningFailed: there is no job of that id.
        """
        if not self.job_id:
            raise ValueError("call finetune() first")
        try:
            return ask_and_block(partial(self._client.fine_tuning.jobs.retrieve, self.job_id))
        except RunStopped as error:
            if error.status != 404:
                raise
            said = f"fine-tuning job {self.job_id} is not known to this account: {error}"
            raise FinetuningFailed(said) from error.__cause__

    def wait(self) -> Any:
        """Wait at most FINETUNING_HOURS until the job has ended. Returns it, however it ended.

        Raises:
            RunStopped: it has not ended in time. It goes on; `start_job_id` waits for it again.
        """
        what, hours = f"fine-tuning job {self.job_id}", number("FINETUNING_HOURS")
        return wait_for(what, self.get_current_job, ENDED, hours, _tell)

    def get_finetuned_model(self) -> LLM:
        """The fine-tuned model as an LLM; `wait()` first.

        Raises:
            FinetuningFailed: the job failed or was cancelled; the message gives the reason.
            ValueError: it has not ended.
        """
        job = self.get_current_job()
        if job.status not in ENDED:
            raise ValueError(f"fine-tuning job {job.id} is {job.status!r}: call wait() first")
        return live(served_like(_succeeded(job).fine_tuned_model, self.base_model))()


def _tell(text: str) -> None:
    print(text, file=terminal(), flush=True)


def _succeeded(job: Any) -> Any:
    if job.status == "succeeded":
        return job
    error, how = job.error, "was cancelled" if job.status == "cancelled" else "failed"
    reason = f"{error.message} ({error.code})" if error and error.message else "no reason given"
    raise FinetuningFailed(f"fine-tuning job {job.id} {how}: {redact(reason)}")


def hosted_students(
    model: str, data_path: str | Path, log: CallLog, n_epochs: int = EPOCHS, **settings: Any
) -> dict[str, LLM]:
    """A hosted model to compare the local student with, before and after fine-tuning.

    A run that records or collects starts the job and waits for it. The job's id is noted in
    `finetuning_job.json` beside the log, so an interrupted run waits for the same job. Another
    model, file or setting means a new job. A replay needs the note only.

    Args:
        model: of the role "student" (see `models_of`).
        data_path: the fine-tuning file.
        log: the calls of both models go through it.
        n_epochs: of the job.
        settings: of the job, such as `suffix` and `seed`.

    Returns:
        {"hosted": the fine-tuned model, "hosted_base": the model as it was}; {} if `model` is
        "minilm".

    Raises:
        FinetuningFailed: the job was refused, failed or cancelled; the next run starts a new one.
        RunStopped: the budget does not allow it, or it has not ended in time.
    """
    if model == LOCAL:
        return {}
    job = noted_job(log)
    if log.mode != "replay":
        method = {"type": "supervised", "supervised": {"hyperparameters": {"n_epochs": n_epochs}}}
        job = _finetuned(model, Path(data_path), log, n_epochs, {"method": method, **settings})
    if not job.get("fine_tuned_model"):
        said = f"no fine-tuned model of {model!r} was recorded; run with JUDGE_MODE=record"
        raise FileNotFoundError(f"{job_path(log)}: {said}")
    ids = {"hosted": job["fine_tuned_model"], "hosted_base": name_of(model)}
    zero = {"temperature": 0}
    return {
        name: log.llm(id, live(served_like(id, model)), params=zero) for name, id in ids.items()
    }


def _finetuned(model: str, data_path: Path, log: CallLog, epochs: int, settings: dict) -> dict:
    """Run the job that is noted beside the log, or a new one, to its end. Returns its note."""
    job, path = noted_job(log), job_path(log)
    wanted = {
        "base_model": name_of(model),
        "training_file_sha256": hashlib.sha256(data_path.read_bytes()).hexdigest(),
        "settings": settings,
    }
    estimate = epochs * sum(count_tokens(load_rows(data_path)))
    failed, earlier = job.get("status") in ENDED[1:], job.get("earlier", [])
    if job and (failed or any(job[name] != value for name, value in wanted.items())):
        why = f"was {job['status']}" if failed else "is of another model, file or setting"
        _tell(f"the fine-tuning job noted in {path.name} {why}: a new one is started")
        earlier = [*earlier, {name: job[name] for name in ("base_model", "tokens", "id")}]
        job = {}
    if job.get("fine_tuned_model"):
        return job

    def note(found: Any) -> dict:
        counted = 0 if found.status in ENDED[1:] else estimate
        seen = {name: getattr(found, name) for name in ("id", "status", "fine_tuned_model")}
        trained = {
            "trained_tokens": found.trained_tokens,
            "tokens": found.trained_tokens or counted,
        }
        noted = {**wanted, "earlier": earlier, **seen, **trained}
        write_text(path, json.dumps(noted, indent=1) + "\n")
        return noted

    engine = HostedFinetuneEngine(model, data_path, job.get("id", ""), **settings)
    if not job:
        Budget.of(log).allow_training(model, estimate)
        note(engine.finetune())
    try:
        ended = engine.wait()
    except FinetuningFailed as error:
        raise FinetuningFailed(f"{error} Delete {path} to start a new one.") from error.__cause__
    noted = note(ended)
    _succeeded(ended)
    return noted


def training_cost(events: list[dict], epochs: int = EPOCHS) -> pd.DataFrame:
    """What it would cost to fine-tune a hosted model on these chats.

    Returns:
        A row a model: tokens over all epochs, the price per million, dollars.
    """
    tokens, prices = sum(count_tokens(events)) * epochs, TRAINING_PRICES
    table = pd.DataFrame({"model": list(prices)}).set_index("model").assign(tokens=tokens)
    table["$ per million"] = [training_dollars(model, 1_000_000) for model in prices]
    return table.assign(**{"$": [round(training_dollars(model, tokens), 2) for model in prices]})
