"""Settings: the environment variables that say what a run does, and the models that play its roles."""

import json
import os
import re
import sys
from functools import lru_cache
from pathlib import Path

from dotenv import dotenv_values

ROOT = Path(__file__).resolve().parents[2]
STAND_IN = "stand-in-"
LOCAL = "minilm"
# name -> (default, what it says). All but the first two may also stand in `.env`, which only a run that records or collects reads.
SETTINGS = {
    "JUDGE_MODE": (
        "replay",
        "what happens to a call that the log does not hold: replay, record or collect",
    ),
    "SNAPSHOT": (
        "",
        "the folder in data/ to read from and record to; unset, the bundled snapshot is replayed, and recordings go to data/recorded",
    ),
    "TEACHER_MODEL": ("", "the strong judge"),
    "WRITER_MODEL": ("", "writes questions and reference answers"),
    "ANSWERER_MODEL": ("", "answers, in several personas"),
    "STUDENT_MODEL": (LOCAL, "a hosted model to fine-tune beside the local student"),
    "EMBEDDING_MODEL": (LOCAL, "finds the chunks to answer from"),
    "DOCUMENTS": ("bundled", "what to read: bundled, or wikipedia"),
    "WIKIPEDIA_USER_AGENT": ("", "names you to Wikipedia, with a way to reach you"),
    "OPENAI_API_BASE": (
        "",
        "base URL of the judges' and the fine-tuning endpoint (OPENAI_BASE_URL says the same)",
    ),
    "CONCURRENCY": ("16", "calls under way at once"),
    "BUDGET_CALLS": ("", "the most calls that a notebook's log may come to hold"),
    "BUDGET_DOLLARS": ("", "the most that the calls in a notebook's log may come to cost"),
    "PRICES": (
        "",
        'dollars per million tokens of prompt, reply and, if it is to be fine-tuned, training: "my-model=0.15/0.60/3, other=0/0"',
    ),
    "FINETUNING_HOURS": ("12", "the longest wait for a fine-tuning job"),
    "POLL_SECONDS": ("30", "between two looks at a fine-tuning job or a batch"),
}
KEYS = ("OPENAI_API_KEY", "HF_TOKEN", "HUGGING_FACE_TOKEN", "ENDPOINT_API_KEY")
ROLES = {
    "teacher": "TEACHER_MODEL",
    "question-writer": "WRITER_MODEL",
    "answerer": "ANSWERER_MODEL",
    "student": "STUDENT_MODEL",
    "embedding": "EMBEDDING_MODEL",
}


class RunStopped(RuntimeError):
    """No further call makes sense or is allowed; all that was answered is kept. The message says what to do."""

    status: int | None = None  # the HTTP status, if it was one that stopped the run


def setting(name: str) -> str:
    """What the environment or `.env` says, else the default; "" if there is none. Keys are settings too, and are read at each use."""
    default = SETTINGS.get(name, ("",))[0]
    if value := os.environ.get(name):
        return value
    if name in ("JUDGE_MODE", "SNAPSHOT") or setting("JUDGE_MODE") == "replay":
        return default  # a file that lies about cannot make a replay go live, or come out otherwise
    path = ROOT / ".env"
    return path.exists() and _env_file(path, path.stat().st_mtime_ns).get(name) or default


@lru_cache(maxsize=1)
def _env_file(path: Path, changed: int) -> dict:
    return dotenv_values(path)


def number(name: str) -> float | None:
    """A setting that is a number above 0; None if it is not set."""
    text = setting(name)
    try:
        value = float(text) if text else None
    except ValueError:
        value = -1.0
    if value is not None and not 0 < value < float("inf"):
        raise ValueError(f"{name}={text!r}: expected a number above 0")
    return value


def base_url() -> str | None:
    """The one base URL for judge and fine-tuning client, which read different variables."""
    return setting("OPENAI_API_BASE") or setting("OPENAI_BASE_URL") or None


def id_of(model: str) -> str:
    """A model's setting without the endpoint that serves it."""
    return model.split("@")[0]


def served_like(id: str, model: str) -> str:
    """The setting of a model's id at the endpoint of another, as a fine-tuned model stands where its base does."""
    return id + "".join(model.partition("@")[1:])


def name_of(model: str) -> str:
    """The name under which a model's calls are logged: its id, wherever it is served."""
    return re.sub(r"^(?:hf|local):", "", id_of(model))


def models_of(snapshot: Path) -> dict[str, str]:
    """The models of a snapshot's part by role: "teacher", "question-writer", "answerer", "student", "embedding".

    A model is an id, then perhaps `@` and the base URL of the endpoint that serves it. "hf:" before the id is Hugging Face's
    inference API, "local:" a model on this machine; else it is OpenAI's API, or one compatible with it. "minilm" is the local student
    and encoder. A run that records or collects takes them from the settings (`ROLES`) and leaves their ids in the snapshot's
    `models.json`; a replay takes them from there, and a snapshot without that file is one of the bundled ones, by stand-ins.
    """
    path, replay = snapshot / "models.json", setting("JUDGE_MODE") == "replay"
    kept = json.loads(path.read_text(encoding="utf-8")) if replay and path.exists() else {}
    stand_ins = {role: SETTINGS[name][0] or STAND_IN + role for role, name in ROLES.items()}
    models = {
        role: (kept.get(role) if replay else setting(name)) or stand_ins[role]
        for role, name in ROLES.items()
    }
    if not replay and not any(
        model.startswith(STAND_IN) for model in models.values()
    ):  # a run that has none is stopped before long
        snapshot.mkdir(parents=True, exist_ok=True)
        draft = path.with_name("models.json.tmp")
        draft.write_text(
            json.dumps({role: id_of(model) for role, model in models.items()}, indent=1) + "\n",
            encoding="utf-8",
        )
        os.replace(draft, path)
    return models


def terminal():
    """Where progress is told: on the terminal, if make runs the notebook there; else None, in the notebook."""
    return sys.__stderr__ if os.environ.get("PROGRESS") == "terminal" else None
