"""Fine-tune a hosted student: llama-index-finetuning's OpenAIFinetuneEngine, with its faults closed.

Imported only where it is used: the package below takes seconds to import and sets up logging for everyone.
"""

import hashlib
import json
import logging
import time
import warnings
from pathlib import Path
from typing import Any

_root = logging.getLogger()
_handlers, _level = _root.handlers[:], _root.level
with warnings.catch_warnings():
    warnings.simplefilter(
        "ignore", DeprecationWarning
    )  # that it is unmaintained is why it is wrapped here
    from llama_index.finetuning import OpenAIFinetuneEngine
_root.handlers[:], _ = (
    _handlers,
    _root.setLevel(_level),
)  # it sets two handlers that print every request

from llama_index.core.llms import LLM

from .costs import EPOCHS, job_path, noted_job
from .finetuning import check_events, count_tokens
from .models import CallFailed, ask_and_block, live, openai_client, redact
from .settings import RunStopped, name_of, number, served_like, terminal
from .snapshots import CallLog, load_rows, write_text

ENDED = ("succeeded", "failed", "cancelled")
CLOSED = (
    "OpenAI takes no new fine-tuning jobs after 2027-01-06, and since 2026-05-07 none from accounts that had none before. To train on "
    "the same file on your own machine, use LocalFinetuneEngine and unset STUDENT_MODEL."
)


class FinetuningFailed(RunStopped):
    """There will be no fine-tuned model; the message gives the service's reason."""


class UnknownJob(FinetuningFailed):
    """There is no such job for this key."""


class HostedFinetuneEngine(OpenAIFinetuneEngine):
    """OpenAI's fine-tuning as llama-index-finetuning offers it, made safe to wait for. The key and the base URL are the judge's.

    Where the original posts the job again once a minute for as long as it is refused, a refusal raises here; the job can be waited for,
    and its failure says why; a job is never started twice for one upload.

    Args:
        base_model: an id that may be fine-tuned, with its base URL if it has one (see `models_of`).
        data_path, validation_path: fine-tuning files, each checked before it is uploaded.
        suffix: part of the fine-tuned model's name, up to 64 characters.
        seed: of the job.
        hyperparameters: such as {"n_epochs": 3}; the service chooses what is not given.
        start_job_id: of a job to be picked up, in place of `finetune()`.

    Raises:
        FinetuningFailed: there is no such job.
    """

    def __init__(
        self,
        base_model: str,
        data_path: str | Path,
        *,
        validation_path: str | Path | None = None,
        suffix: str | None = None,
        seed: int | None = None,
        hyperparameters: dict | None = None,
        start_job_id: str | None = None,
    ) -> None:
        # Not the original's, which makes a client that knows of no base URL.
        self.base_model, self.data_path, self.validation_path = (
            name_of(base_model),
            data_path,
            validation_path,
        )
        self._model = base_model
        method = (
            {"type": "supervised", "supervised": {"hyperparameters": hyperparameters}}
            if hyperparameters
            else None
        )
        self._extras = {
            name: value
            for name, value in (("suffix", suffix), ("seed", seed), ("method", method))
            if value is not None
        }
        self._client = openai_client(base_model)
        self._start_job = None
        if start_job_id:
            try:
                self._start_job = ask_and_block(
                    lambda: self._client.fine_tuning.jobs.retrieve(start_job_id)
                )
            except (RunStopped, CallFailed) as error:
                if error.status != 404:
                    raise RunStopped(
                        f"fine-tuning job {start_job_id} cannot be seen: {error} Run again to go on."
                    ) from error.__cause__
                raise UnknownJob(
                    f"fine-tuning job {start_job_id} is not known to this account: {error}"
                ) from error.__cause__

    def finetune(self) -> None:
        """Check and upload the files, and start the job.

        Raises:
            DamagedFile: a file is not what it must be.
            FinetuningFailed: the service refuses the job; the message has its words.
        """
        self.start(self.upload())

    def upload(self) -> dict[str, str]:
        """Check and upload the files: {"training_file": id, and perhaps "validation_file": id}."""
        paths = {
            "training_file": self.data_path,
            **({"validation_file": self.validation_path} if self.validation_path else {}),
        }
        for path in paths.values():
            check_events(path)
        return {name: self._upload(Path(path)) for name, path in paths.items()}

    def start(self, files: dict[str, str], perhaps_started: bool = False) -> None:
        """Start the job on uploaded files. If it was `perhaps_started` before, it is looked for first."""

        def create():
            # After a broken connection, or a killed run, the job may be there all the same: it has our file.
            if attempts and (
                job := next(
                    (
                        job
                        for job in self._client.fine_tuning.jobs.list(limit=20)
                        if job.training_file == files["training_file"]
                    ),
                    None,
                )
            ):
                return job
            attempts.append(1)
            return self._client.fine_tuning.jobs.create(
                model=self.base_model, **files, **self._extras
            )

        attempts = [0] if perhaps_started else []
        self._start_job = self._or_refused(create)
        print(
            f"fine-tuning job {self._start_job.id} of {self.base_model}: started",
            file=terminal(),
            flush=True,
        )

    def _upload(self, path: Path) -> str:
        content = path.read_bytes()
        file = self._or_refused(
            lambda: self._client.files.create(file=(path.name, content), purpose="fine-tune")
        )
        end = time.monotonic() + 600
        while file.status not in ("processed", "error") and time.monotonic() < end:
            time.sleep(number("POLL_SECONDS"))
            file = self._or_refused(lambda: self._client.files.retrieve(file.id))
        if file.status == "error":
            raise FinetuningFailed(
                f"{path}: the service cannot read it: {getattr(file, 'status_details', None) or 'no reason given'}"
            )
        return file.id

    def _or_refused(self, call) -> Any:
        try:
            return ask_and_block(call)
        except (RunStopped, CallFailed) as error:
            if error.status in (400, 403, 404):
                raise FinetuningFailed(
                    f"fine-tuning {self.base_model!r}: {error} {CLOSED}"
                ) from error.__cause__
            raise RunStopped(
                f"fine-tuning {self.base_model!r}: {error} Run again to go on."
            ) from error.__cause__

    def get_current_job(self) -> Any:
        """The job as it stands now."""
        if self._start_job is None:
            raise ValueError("call finetune() first")
        return ask_and_block(super().get_current_job)

    def wait(self) -> Any:
        """Wait until the job has ended, at most FINETUNING_HOURS, looking every POLL_SECONDS. Prints each new status; returns the job.

        Raises:
            FinetuningFailed: the job failed or was cancelled; the message gives the reason.
            RunStopped: it has not ended in time; it goes on without us, and can be picked up by its id.
        """
        hours, said = number("FINETUNING_HOURS"), None
        end = time.monotonic() + hours * 3600
        job = self._start_job
        while job.status not in ENDED:
            try:
                job = ask_and_block(super().get_current_job)
                now = job.status
            except CallFailed as error:  # the job goes on, whether we can see it or not
                now = f"not seen ({error})"
            if now != said and now not in ENDED:
                print(f"fine-tuning job {job.id}: {(said := now)}", file=terminal(), flush=True)
            if job.status not in ENDED:
                if time.monotonic() > end:
                    raise RunStopped(
                        f"fine-tuning job {job.id} is {job.status!r} after {hours:g} hours (FINETUNING_HOURS). It goes on; run "
                        "again to wait for it."
                    )
                time.sleep(number("POLL_SECONDS"))
        print(f"fine-tuning job {job.id}: {job.status}", file=terminal(), flush=True)
        if job.status != "succeeded":
            raise _failure(job)
        return job

    def get_finetuned_model(self) -> LLM:
        """The fine-tuned model as an LLM; `wait()` first.

        Raises:
            FinetuningFailed: the job failed or was cancelled.
            ValueError: it has not ended.
        """
        job = self.get_current_job()
        if job.status not in ENDED:
            raise ValueError(f"fine-tuning job {job.id} is {job.status!r}: call wait() first")
        if job.status != "succeeded":
            raise _failure(job)
        return live(served_like(job.fine_tuned_model, self._model))()


def _failure(job) -> FinetuningFailed:
    error = job.error
    reason = f"{error.message} ({error.code})" if error and error.message else "no reason given"
    return FinetuningFailed(
        f"fine-tuning job {job.id} {'was cancelled' if job.status == 'cancelled' else 'failed'}: {redact(reason)}"
    )


def finetune_or_pick_up(model: str, data_path: str | Path, log: CallLog, settings: dict) -> dict:
    """Run the job of `hosted_students` to its end: the one that is noted beside the log, or a new one. Returns its note."""

    def note(**more) -> dict:
        noted = {**wanted, "earlier": earlier, **more}
        write_text(path, json.dumps(noted, indent=1) + "\n")
        log.ledger.dollars = None  # to be added up again, with the job
        return noted

    def note_job(running) -> dict:
        ended_badly, trained = running.status in ENDED[1:], running.trained_tokens
        return note(
            id=running.id,
            status=running.status,
            fine_tuned_model=running.fine_tuned_model,
            trained_tokens=trained,
            tokens=trained or (0 if ended_badly else estimate),
        )

    path, job = job_path(log), noted_job(log)
    settings = {
        **settings,
        "hyperparameters": {"n_epochs": EPOCHS, **(settings.get("hyperparameters") or {})},
    }
    wanted = {
        "base_model": name_of(model),
        "training_file_sha256": hashlib.sha256(Path(data_path).read_bytes()).hexdigest(),
        "settings": {name: str(value) for name, value in settings.items()},
    }
    epochs = settings["hyperparameters"]["n_epochs"]
    estimate = sum(count_tokens(load_rows(data_path))) * (
        epochs if isinstance(epochs, int) else EPOCHS
    )
    earlier = job.get("earlier", [])
    if job and (
        any(job[name] != value for name, value in wanted.items()) or job["status"] in ENDED[1:]
    ):
        why = (
            f"was {job['status']}"
            if job["status"] in ENDED[1:]
            else "is of another model, file or setting"
        )
        print(
            f"the fine-tuning job noted in {path.name} {why}: a new one is started",
            file=terminal(),
            flush=True,
        )
        earlier = [
            *earlier,
            {"base_model": job["base_model"], "tokens": job["tokens"], "id": job.get("id")},
        ]
        job = {}
    if job.get("fine_tuned_model"):
        return job
    if not job:
        log.ledger.allow_training(model, estimate)
    try:
        engine = HostedFinetuneEngine(model, data_path, start_job_id=job.get("id"), **settings)
    except UnknownJob as error:
        raise FinetuningFailed(f"{error} Delete {path} to start a new one.") from error.__cause__
    if not job.get("id"):
        # The file is noted before the job is started, and by it the job is found again, wherever this run is interrupted.
        files, known = job.get("files"), bool(job)
        if not files:
            files = engine.upload()
            note(status="uploaded", files=files, tokens=estimate)
        try:
            engine.start(files, perhaps_started=known)
        except FinetuningFailed:  # there is no job, and so nothing to pay for
            note(status="uploaded", files=files, tokens=0)
            raise
        note_job(engine._start_job)
    try:
        return note_job(engine.wait())
    except FinetuningFailed:
        note_job(engine.get_current_job())
        raise
