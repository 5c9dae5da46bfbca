"""Live models: from a setting to an LLM, which failures to try again, and which end the run."""

import asyncio
import email.utils
import random
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from llama_index.core.base.llms.types import ChatMessage, ChatResponse, LogProb
from llama_index.core.bridge.pydantic import PrivateAttr
from llama_index.core.llms import LLM, LLMMetadata
from tenacity import RetryCallState, Retrying, retry_if_exception, stop_after_attempt
from tenacity.asyncio import AsyncRetrying
from tenacity.wait import wait_exponential_jitter

from .. import settings
from ..log import CallLog
from ..settings import CallFailed, RunStopped, id_of, name_of, redact, setting
from .budget import Budget, reasons, reply_cap

ATTEMPTS = 6
FIRST_WAIT = 0.5  # seconds, doubled each time: at least 15 in all, enough for a server's restart
LONGEST_WAIT = 600.0  # seconds; a call whose provider asks for a longer wait is given up
TIMEOUT = 120.0  # seconds, of a call
TEMPERATURE = 0.1  # of a call that names none, as in LlamaIndex
HUGGING_FACE = "https://router.huggingface.co/v1"  # its inference providers, as OpenAI's API
STOPS = {
    401: "the key is missing or not valid",
    402: "the account has no credit left",
    403: "the key may not do this",
    404: "there is no such model, or no such address",
}
FAILED = ("failed", "cancelled", "expired")
ENDED = ("succeeded", "completed", *FAILED)  # the last statuses of a fine-tuning job or a batch


class Live:
    """A live model for `CallLog.llm`, made by `live`. It keeps to the budget, and tries again."""

    def __init__(self, model: str | LLM) -> None:
        self.setting = model if isinstance(model, str) else ""
        self._llm = None if isinstance(model, str) else model

    def __call__(self) -> LLM:
        """The LLM by itself, without log, budget and retries."""
        if self._llm is None:
            make = _local if self.setting.startswith("local:") else _endpoint
            self._llm = make(self.setting)
        return self._llm

    async def ask(self, log: CallLog, call: dict, messages: list[ChatMessage]) -> ChatResponse:
        """The model's reply to a call. RunStopped or CallFailed if there is none."""
        async with Budget.of(log).room_for(call):
            return await ask(self().achat, messages, **call["params"])

    def ask_and_block(self, log: CallLog, call: dict, messages: list[ChatMessage]) -> ChatResponse:
        """As `ask`, for a call that is not awaited."""
        with Budget.of(log).reserved(call):
            return ask_and_block(self().chat, messages, **call["params"])


def live(model: str | LLM) -> Live:
    """The live model of a setting (see `models_of`), or of a LlamaIndex LLM, for `CallLog.llm`."""
    return Live(model)


def access(model: str, whole_api: bool = False) -> tuple[str | None, str]:
    """(base URL or None for OpenAI's own, key) of a hosted model. RunStopped if it has none.

    `whole_api` asks for OpenAI's API with files, batches and embeddings, not for chats alone.
    """
    if model.startswith("local:") or whole_api and model.startswith("hf:"):
        raise RunStopped(
            f"{id_of(model)!r}: this needs a model behind OpenAI's API, or one compatible with it "
            "(an id, or id@url)"
        )
    if model.startswith(settings.STAND_IN):
        raise RunStopped(
            f"{model!r} is the name of recorded calls, not of a model: set TEACHER_MODEL, "
            "WRITER_MODEL, ANSWERER_MODEL (README.md, 'Going live')"
        )
    url, name = model.partition("@")[2], "OPENAI_API_KEY"
    if model.startswith("hf:"):
        url, name = url or HUGGING_FACE, "HF_TOKEN"
    elif url:  # OpenAI's key goes to no other host
        name = "ENDPOINT_API_KEY"
    else:
        url = setting("OPENAI_API_BASE") or setting("OPENAI_BASE_URL")
    if "@" in url:
        raise RunStopped(
            f"{id_of(model)!r}: its endpoint's URL holds a password, which would be shown; give "
            f"it as {name} instead"
        )
    if key := setting(name) or (name == "HF_TOKEN" and setting("HUGGING_FACE_TOKEN")):
        return url or None, key
    if name == "ENDPOINT_API_KEY":
        return url, "none"  # the client must send a key, also to a server that wants none
    raise RunStopped(f"no key for {id_of(model)!r}: set {name} in the environment or in .env")


def request_settings(model: str, params: dict) -> dict:
    """What is sent with a call besides model and messages: its parameters, and the reply's cap.

    OpenAI's models that reason refuse a temperature and `max_tokens`, so they get neither.
    """
    if reasons(model):
        refused = ("temperature", "top_p", "logprobs", "top_logprobs", "max_tokens")
        taken = {name: value for name, value in params.items() if name not in refused}
        return {**taken, "max_completion_tokens": reply_cap(model)}
    return {"temperature": TEMPERATURE, "max_tokens": reply_cap(model), **params}


def client_of(model: str, whole_api: bool = False) -> Any:
    """OpenAI's own client for whatever serves a model. RunStopped as in `access`."""
    import openai

    url, key = access(model, whole_api)
    return openai.OpenAI(base_url=url, api_key=key, timeout=TIMEOUT, max_retries=0)


def _endpoint(model: str) -> LLM:
    import httpx  # these clients take seconds to import
    from llama_index.llms.openai import OpenAI
    from openai import AsyncOpenAI, DefaultAioHttpClient

    async def opened(url: str | None, key: str | None) -> AsyncIterator[AsyncOpenAI]:
        """Yield a client that is closed with its event loop. aiohttp takes half of httpx's time."""
        http = DefaultAioHttpClient(timeout=TIMEOUT)
        async with AsyncOpenAI(base_url=url, api_key=key, http_client=http, max_retries=0) as one:
            yield one

    class Endpoint(OpenAI):
        """OpenAI's client for any model id. LlamaIndex's own refuses ids that it does not know."""

        _loop: Any = PrivateAttr(default=None)
        _opened: Any = PrivateAttr()
        _open_client: Any = PrivateAttr()

        @property
        def metadata(self) -> LLMMetadata:
            return LLMMetadata(model_name=self.model, is_chat_model=True)

        async def achat(self, messages: Any, **kwargs: Any) -> ChatResponse:
            # A connection of an older event loop sends its request, and then fails.
            if self._loop is not (loop := asyncio.get_running_loop()):
                self._loop, self._opened = loop, opened(self.api_base, self.api_key)
                self._open_client = await anext(self._opened)
            # The client's typed method checks every field, which doubles what a call costs.
            plain = [{"role": one.role.value, "content": one.content} for one in messages]
            body = {"messages": plain, **self._get_model_kwargs(**kwargs)}
            path, cast_to = "/chat/completions", httpx.Response
            raw = (await self._open_client.post(path, cast_to=cast_to, body=body)).json()
            choice = raw["choices"][0]
            message = ChatMessage(role="assistant", content=choice["message"].get("content"))
            tokens = [
                [LogProb(token=token, logprob=p) for token, p in place.items()]
                for place in logprobs_of(choice)
            ]
            return ChatResponse(message=message, raw=raw, logprobs=tokens or None)

        def _get_model_kwargs(self, **kwargs: Any) -> dict:
            return {"model": self.model, **request_settings(self.model, kwargs)}

    url, key = access(model)
    return Endpoint(model=name_of(model), api_base=url, api_key=key, max_retries=0)


def logprobs_of(choice: dict) -> list[dict[str, float]]:
    """{alternative: log-probability} of each token of a choice in OpenAI's form; [] without any."""
    places = (choice.get("logprobs") or {}).get("content") or []
    tops = [place.get("top_logprobs") or [] for place in places]
    for top in tops:
        top.sort(key=lambda one: one["logprob"])  # of a token that is listed twice, the likelier
    return [{one["token"]: one["logprob"] for one in top} for top in tops] if any(tops) else []


def _local(model: str) -> LLM:
    from llama_index.llms.huggingface import HuggingFaceLLM

    class Local(HuggingFaceLLM):
        """HuggingFaceLLM with the call's temperature, which the original ignores."""

        def complete(self, prompt: str, formatted: bool = False, **kwargs: Any) -> Any:
            if (temperature := kwargs.get("temperature")) is not None:
                sampling = {"do_sample": True, "temperature": temperature}
                self.generate_kwargs = sampling if temperature > 0 else {"do_sample": False}
            return super().complete(prompt, formatted=formatted, **kwargs)

    name = name_of(model)
    return Local(model_name=name, tokenizer_name=name, max_new_tokens=reply_cap(model))


def status_of(error: BaseException) -> int | None:
    """The HTTP status of a client's error, if it has one."""
    response = getattr(error, "response", None)
    return getattr(error, "status_code", None) or getattr(response, "status_code", None)


def is_transient(error: BaseException) -> bool:
    """Whether the same call may succeed later: too many requests, a server's fault, a timeout."""
    import httpx
    import openai
    import requests

    too_long = (retry_after(error) or 0) > LONGEST_WAIT
    if too_long or getattr(error, "code", None) == "insufficient_quota":
        return False
    if (status := status_of(error)) is not None:
        return status in (408, 409, 429) or status >= 500 and status != 501  # 501: never will be
    broken = openai.APIConnectionError, httpx.TransportError, ConnectionError, TimeoutError
    return isinstance(error, (*broken, requests.ConnectionError, requests.Timeout))


def retry_after(error: BaseException | None) -> float | None:
    """Seconds that the server asks to wait, in `Retry-After`: a number, or a date."""
    headers = getattr(getattr(error, "response", None), "headers", None) or {}
    said = headers.get("retry-after", "")
    try:
        return max(0.0, float(said))
    except ValueError:
        date = email.utils.parsedate_tz(said)
        return max(0.0, email.utils.mktime_tz(date) - time.time()) if date else None


def _wait(state: RetryCallState) -> float:
    """What the server asks for, else a wait that doubles; with jitter, so that calls spread out."""
    asked = retry_after(state.outcome.exception()) if state.outcome else None
    if asked is not None:
        return asked + random.uniform(0, FIRST_WAIT)
    return wait_exponential_jitter(multiplier=FIRST_WAIT, max=60, jitter=FIRST_WAIT)(state)


def retry_policy(again: Callable[[BaseException], bool] = is_transient) -> dict:
    """For tenacity: what to try again, how often, and when."""
    stop = stop_after_attempt(ATTEMPTS)
    return {"retry": retry_if_exception(again), "wait": _wait, "stop": stop, "reraise": True}


@contextmanager
def _failing(retrying: AsyncRetrying | Retrying) -> Iterator[None]:
    """Raise what fails in the block as RunStopped or CallFailed, without keys, with its status."""
    try:
        yield
    except RunStopped:
        raise
    except Exception as error:  # of whatever client: it ends here, and the row or the run says it
        raw, attempts = f"{type(error).__name__}: {error}", retrying.statistics["attempt_number"]
        said, status = redact(raw), status_of(error)
        no_quota = getattr(error, "code", None) == "insufficient_quota"
        why = "the account has no quota left" if no_quota else STOPS.get(status or 0)
        failure: RunStopped | CallFailed
        if why:
            failure = RunStopped(f"{why}: {said}. What was answered is kept; run again to go on.")
        else:
            failure = CallFailed(said + (f" (asked {attempts} times)" if attempts > 1 else ""))
        failure.status = status
        # The traceback of an error that quotes a key would show the key.
        raise failure from (error if said == raw else None)


async def ask(call: Callable[..., Awaitable], *args: Any, **kwargs: Any) -> Any:
    """Await a live call, and again while it fails for a while. RunStopped or CallFailed if not."""
    with _failing(retrying := AsyncRetrying(**retry_policy())):
        async for attempt in retrying:
            with attempt:
                return await call(*args, **kwargs)


def ask_and_block(call: Callable, *args: Any, **kwargs: Any) -> Any:
    """As `ask`, for a call that is not awaited."""
    with _failing(retrying := Retrying(**retry_policy())):
        return retrying(call, *args, **kwargs)


def start_once(what: str, create: Callable, **settings: Any) -> Any:
    """Start a paid job or batch. RunStopped if the reply is lost: it may have been started."""
    refused = retry_policy(lambda error: is_transient(error) and status_of(error) is not None)
    try:
        with _failing(retrying := Retrying(**refused)):
            return retrying(create, **settings)
    except CallFailed as error:
        if error.status is not None:
            raise
        raise RunStopped(
            f"the {what} may or may not have been started: {error} Look at your account's list "
            "before you run again, and cancel it there, or it will be paid twice."
        ) from error.__cause__


def tell(text: str) -> None:
    """Print a line at once: in the terminal if make runs the notebook, else where it is called."""
    print(text, file=settings.terminal(), flush=True)


def wait_for(what: str, look: Callable, id: str, hours: float, note: Path) -> Any:
    """Look at a job or a batch every POLL_SECONDS until it has ended, and return it.

    It goes on whether it can be seen or not. RunStopped if it has not ended in so many `hours`, or
    if the account does not know it; `note` is the file that says its id.
    """
    what, end, told = f"{what} {id}", time.monotonic() + hours * 3600, ""
    while True:
        try:
            found = ask_and_block(look, id)
            now, ended = found.status, found.status in ENDED
            if counts := getattr(found, "request_counts", None):
                now += f", {counts.completed} of {counts.total} answered"
        except CallFailed as error:
            now, ended = f"not seen ({error})", False
        except RunStopped as error:
            if error.status != 404:
                raise
            said = f"{what} is not known to this account. Delete {note} to start a new one."
            raise RunStopped(said) from error.__cause__
        if now != told:
            tell(f"{what}: {(told := now)}")
        if ended:
            return found
        if time.monotonic() > end:
            raise RunStopped(
                f"{what} is {now!r} after {hours:g} hours. It goes on; run again to wait for it."
            )
        time.sleep(settings.number("POLL_SECONDS"))
