"""Live models: from a setting to an LLM; which failures to try again, and when; what may not be shown."""

import email.utils
import os
import re
import time
from typing import Any, Awaitable, Callable

from llama_index.core.llms import LLM, LLMMetadata
from tenacity import AsyncRetrying, RetryCallState, Retrying, retry_if_exception, stop_after_attempt
from tenacity.wait import wait_exponential_jitter

from .snapshots import ROOT

STAND_IN = "stand-in-"
ROLES = {"teacher": "TEACHER_MODEL", "question-writer": "WRITER_MODEL", "answerer": "ANSWERER_MODEL"}
ATTEMPTS = 6
FIRST_WAIT = 0.5  # seconds; doubled each time: in all at least 15, enough for a server that restarts
LONGEST_WAIT = 600.0  # a provider that asks for more is not waited for
TIMEOUT = 120.0
MAX_TOKENS = 1024  # of a reply
KEYS = ("OPENAI_API_KEY", "HF_TOKEN", "HUGGING_FACE_TOKEN")
KEY_LIKE = re.compile(r"\b(?:sk|hf)[-_][\w*.-]{4,}")


class RunStopped(RuntimeError):
    """No further call makes sense or is allowed; all that was answered is kept. The message says what to do."""


class CallFailed(RuntimeError):
    """The live model failed to answer this call; the row that needed it is invalid, and asked again in the next run."""


def load_env() -> None:
    """Read `.env` in the project's folder, `NAME=value` a line; what the environment already has stays."""
    path = ROOT / ".env"
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else ():
        name, equals, value = line.partition("=")
        if equals and not name.lstrip().startswith("#"):
            os.environ.setdefault(name.removeprefix("export ").strip(), value.strip().strip("'\""))


def model_for(role: str) -> str:
    """The model that plays a role, "teacher", "question-writer" or "answerer": what <ROLE>_MODEL says, or the bundled stand-in.

    A setting is a model id, then perhaps `@` and the base URL of the endpoint that serves it. "hf:" before the id is Hugging Face's
    inference API, "local:" a model on this machine; else it is OpenAI's API, or one compatible with it.
    """
    load_env()
    return os.environ.get(ROLES[role]) or STAND_IN + role


def name_of(model: str) -> str:
    """The name under which a model's calls are logged: its id, wherever it is served."""
    return re.sub(r"^(?:hf|local):", "", model.split("@")[0])


def base_url() -> str | None:
    """The one base URL for judge and fine-tuning client, which read different variables: OPENAI_API_BASE or OPENAI_BASE_URL."""
    load_env()
    return os.environ.get("OPENAI_API_BASE") or os.environ.get("OPENAI_BASE_URL") or None


def live(model: str) -> Callable[[], LLM]:
    """A function that makes the LLM of a setting (see `model_for`), for `CallLog.llm`. Retries are left to the log, so that they
    are one layer."""

    def make() -> LLM:
        load_env()
        if model.startswith(STAND_IN):
            raise RunStopped(f"{model!r} is the name of recorded calls, not of a model: set {', '.join(ROLES.values())} (README.md, "
                             "'Going live')")
        if model.startswith("local:"):
            from llama_index.llms.huggingface import HuggingFaceLLM

            return HuggingFaceLLM(model_name=name_of(model), tokenizer_name=name_of(model), max_new_tokens=MAX_TOKENS)
        if model.startswith("hf:"):
            from llama_index.llms.huggingface_api import HuggingFaceInferenceAPI

            token = _key("HF_TOKEN", "HUGGING_FACE_TOKEN", model=model)
            served_at = model.partition("@")[2]
            return HuggingFaceInferenceAPI(model_name=served_at or name_of(model), token=token, num_output=MAX_TOKENS, timeout=TIMEOUT)
        url = model.partition("@")[2] or base_url()
        # A server of one's own wants no key, but the client wants one to send.
        key = os.environ.get("OPENAI_API_KEY") or ("none" if model.partition("@")[2] else _key("OPENAI_API_KEY", model=model))
        return _endpoint_class()(model=name_of(model), api_base=url, api_key=key, timeout=TIMEOUT, max_retries=0, max_tokens=MAX_TOKENS)

    return make


def _key(*names: str, model: str = "") -> str:
    for name in names:
        if value := os.environ.get(name):
            return value
    raise RunStopped(f"no key for {model!r}: set {names[0]} in the environment or in .env")


def _endpoint_class():
    from llama_index.llms.openai import OpenAI

    class Endpoint(OpenAI):
        """OpenAI's client for any model id: its own looks the id up in a table and refuses those that it does not know."""

        @property
        def metadata(self) -> LLMMetadata:
            return LLMMetadata(model_name=self.model, is_chat_model=True)

    return Endpoint


def redact(text: str) -> str:
    """The text without anything that is or looks like a key: providers quote them in their errors."""
    for name in KEYS:
        if value := os.environ.get(name):
            text = text.replace(value, "[key]")
    return KEY_LIKE.sub("[key]", text)


def status_of(error: BaseException) -> int | None:
    """The HTTP status of a client's error, if it has one."""
    return getattr(error, "status_code", None) or getattr(getattr(error, "response", None), "status_code", None)


def is_transient(error: BaseException) -> bool:
    """Whether the same call may succeed in a while: too many requests, a fault of the server, a timeout, a broken connection."""
    import httpx
    import openai

    if getattr(error, "code", None) == "insufficient_quota":
        return False
    status = status_of(error)
    if status is not None:
        return status in (408, 409, 429) or status >= 500
    return isinstance(error, (openai.APIConnectionError, httpx.TransportError, ConnectionError, TimeoutError))


def stops_the_run(error: BaseException) -> str | None:
    """Why no other call would fare better: no valid key, no quota, no such model. None if others may."""
    if getattr(error, "code", None) == "insufficient_quota":
        return "the account has no quota left"
    return {401: "the key is missing or not valid", 403: "the key may not do this", 404: "there is no such model, or no such address"}.get(
        status_of(error))


def retry_after(error: BaseException) -> float | None:
    """Seconds that the server asks to wait, from `Retry-After` (seconds or a date) or OpenAI's `retry-after-ms`."""
    headers = getattr(getattr(error, "response", None), "headers", None) or {}
    for name, unit in (("retry-after-ms", 1000), ("retry-after", 1)):
        try:
            return float(headers[name]) / unit
        except KeyError:
            continue
        except ValueError:
            date = email.utils.parsedate_tz(headers[name])
            return max(0.0, email.utils.mktime_tz(date) - time.time()) if date else None
    return None


def _wait(state: RetryCallState) -> float:
    asked = retry_after(state.outcome.exception())
    return asked if asked is not None else wait_exponential_jitter(multiplier=FIRST_WAIT, max=60, jitter=FIRST_WAIT)(state)


def _again(error: BaseException) -> bool:
    return is_transient(error) and (retry_after(error) or 0) <= LONGEST_WAIT


def _policy() -> dict:
    return {"retry": retry_if_exception(_again), "wait": _wait, "stop": stop_after_attempt(ATTEMPTS), "reraise": True}


def _told(error: Exception, attempts: int) -> tuple[Exception, Exception | None]:
    """(RunStopped or CallFailed, its cause): the failure in words that hold no key."""
    if isinstance(error, RunStopped):
        return error, None
    raw = f"{type(error).__name__}: {error}"
    said = redact(raw)
    cause = error if said == raw else None  # a traceback would show the provider's message, and the key that it quotes
    if why := stops_the_run(error):
        return RunStopped(f"{why}: {said}. What was answered is kept; run again to go on."), cause
    return CallFailed(said + (f" (asked {attempts} times)" if attempts > 1 else "")), cause


async def ask(call: Callable[[], Awaitable]) -> Any:
    """Await a live call, and again while its failures are transient, ATTEMPTS times at most.

    Raises:
        RunStopped: the failure is not this call's alone (see `stops_the_run`).
        CallFailed: any other.
    """
    retrying = AsyncRetrying(**_policy())

    async def once() -> Any:
        return await call()

    try:
        return await retrying(once)
    except Exception as error:  # of whatever client: it ends here, told in the row or as the run's end
        failure, cause = _told(error, retrying.statistics["attempt_number"])
        raise failure from cause


def ask_and_block(call: Callable[[], Any]) -> Any:
    """As `ask`, for a call that is not awaited."""
    retrying = Retrying(**_policy())
    try:
        return retrying(call)
    except Exception as error:
        failure, cause = _told(error, retrying.statistics["attempt_number"])
        raise failure from cause
