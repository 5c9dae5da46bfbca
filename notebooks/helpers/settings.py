"""The settings of a run, the models that play its roles, and the errors that end it or a call."""

import json
import os
import re
import sys
from functools import lru_cache
from pathlib import Path
from typing import TextIO

from dotenv import dotenv_values

ROOT = Path(__file__).resolve().parents[2]
STAND_IN = "stand-in-"  # the first part of the names of the bundled snapshot's models
LOCAL = "minilm"
# Name -> (default, what it says). A run that records or collects also reads `.env`, except for
# the first two.
SETTINGS = {
    "JUDGE_MODE": (
        "replay",
        "what happens to a call that the log does not hold: replay, record or collect",
    ),
    "SNAPSHOT": (
        "",
        "the folder in data/ to read from and record to; if it is not set, a replay reads the "
        "bundled snapshot and a recording goes to data/recorded",
    ),
    "TEACHER_MODEL": ("", "the strong judge"),
    "WRITER_MODEL": ("", "writes questions and reference answers"),
    "ANSWERER_MODEL": ("", "answers, in most of the pipelines"),
    "SMALL_MODEL": ("local:SmolLM2-135M-Instruct", "answers too, as a small model does"),
    "STUDENT_MODEL": (LOCAL, "a hosted model to fine-tune beside the local student"),
    "EMBEDDING_MODEL": (LOCAL, "finds the chunks to answer from"),
    "DOCUMENTS": ("bundled", "what to read: bundled, or wikipedia"),
    "WIKIPEDIA_USER_AGENT": ("", "names you to Wikipedia, with a way to reach you"),
    "OPENAI_API_BASE": (
        "",
        "base URL of the judges' and the fine-tuning endpoint (OPENAI_BASE_URL says the same)",
    ),
    "CONCURRENCY": ("16", "how many calls may run at the same time"),
    "REPLY_SECONDS": ("120", "the longest wait for a whole reply"),
    "REPLY_MEGABYTES": ("10", "the largest reply that is read"),
    "BUDGET_CALLS": ("", "the most calls that a notebook's log may ask, failed ones included"),
    "BUDGET_DOLLARS": (
        "",
        "the most dollars that the calls of a notebook's log may cost, failed ones included",
    ),
    "PRICES": (
        "",
        "dollars per million tokens of prompt, reply and, for fine-tuning, training: "
        '"my-model=0.15/0.60/3, other=0/0"; these come before the price list of genai-prices',
    ),
    "FINETUNING_HOURS": ("12", "the longest wait for a fine-tuning job"),
    "POLL_SECONDS": ("30", "the time between two looks at a fine-tuning job or a batch"),
}
INTERNAL = ("PROGRESS", "KEEP_EMBEDDINGS")  # what `python -m helpers run` tells its kernels
KEYS = ("OPENAI_API_KEY", "HF_TOKEN", "HUGGING_FACE_TOKEN", "ENDPOINT_API_KEY")
# Anything like a key, and a password in a URL.
KEY_LIKE = re.compile(r"\b(?:sk|hf|gsk|xai)[-_][\w*.-]{4,}|\bAIza[\w-]{20,}|(?<=://)[^/@\s]+(?=@)")
ROLES = {
    "teacher": "TEACHER_MODEL",
    "question-writer": "WRITER_MODEL",
    "answerer": "ANSWERER_MODEL",
    "small-answerer": "SMALL_MODEL",
    "student": "STUDENT_MODEL",
    "embedding": "EMBEDDING_MODEL",
}


class RunStopped(RuntimeError):
    """No further call makes sense or is allowed. All answers are kept. It says what to do."""

    status: int | None = None  # the HTTP status, if one stopped the run


class CallFailed(RuntimeError):
    """The live model did not answer this call. Its row is invalid, and the next run asks again."""

    def __init__(self, said: str, status: int | None = None) -> None:
        super().__init__(said)
        self.status = status  # the HTTP status, if there was one


def setting(name: str) -> str:
    """A setting or key: from the environment, else from `.env`, else the default or ""."""
    value, path = os.environ.get(name), ROOT / ".env"
    # A stray .env cannot turn a replay into a live run, or change its result.
    heeded = name not in ("JUDGE_MODE", "SNAPSHOT") and setting("JUDGE_MODE") != "replay"
    if not value and heeded and path.exists():
        value = _env_file(path, path.stat().st_mtime_ns).get(name)
    return value or SETTINGS.get(name, ("",))[0]


@lru_cache(maxsize=1)
def _env_file(path: Path, changed: int) -> dict:
    return dotenv_values(path)


def cap(name: str) -> float | None:
    """A setting that is a number above 0; None if it is not set; ValueError if it is none."""
    if not (text := setting(name)):
        return None
    try:
        if 0 < (value := float(text)) < float("inf"):
            return value
    except ValueError:
        pass
    raise ValueError(f"{name}={text!r}: expected a number above 0")


def number(name: str) -> float:
    """A setting that is a number above 0 and has a default."""
    return cap(name) or float(SETTINGS[name][0])


def id_of(model: str) -> str:
    """A model's setting without the endpoint that serves it."""
    return model.split("@")[0]


def name_of(model: str) -> str:
    """The name under which a model's calls are logged: its id, wherever it is served."""
    return re.sub(r"^(?:hf|local):", "", id_of(model))


def served_like(id: str, model: str) -> str:
    """The setting of a fine-tuned model's id, at the endpoint of the model that it was made of."""
    return id + "".join(model.partition("@")[1:])


def models_of(snapshot: Path) -> dict[str, str]:
    """{role: model} of a snapshot's part; the roles are the keys of `ROLES`.

    A model is an id, then perhaps `@` and the base URL of the endpoint that serves it. "hf:"
    before the id means Hugging Face's inference API, "local:" a model on this machine; all others
    are behind OpenAI's API or one compatible with it. "minilm" is the local student and encoder.

    A run that records or collects takes the models from the settings, and `check_run` notes their
    ids in the snapshot's `models.json`. A replay takes them from there. A snapshot without that
    file is a bundled one, made with stand-ins.
    """
    replay = setting("JUDGE_MODE") == "replay"
    noted = noted_models(snapshot) if replay else {}
    return {
        role: (noted.get(role) if replay else setting(name)) or SETTINGS[name][0] or STAND_IN + role
        for role, name in ROLES.items()
    }


def noted_models(snapshot: Path) -> dict[str, str]:
    """{role: model id} that a recording left in a snapshot's part; {} if there is none."""
    path = snapshot / "models.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}


def redact(text: str) -> str:
    """The text without anything that is or looks like a key: providers quote keys in errors."""
    for name in KEYS:
        if value := setting(name):
            text = text.replace(value, "[key]")
    return KEY_LIKE.sub("[key]", text)


def terminal() -> TextIO | None:
    """Where progress is shown: the terminal, if make runs the notebook; else None, the notebook."""
    return sys.__stderr__ if os.environ.get("PROGRESS") == "terminal" else None
