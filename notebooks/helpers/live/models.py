"""Live models: from a setting to an LLM, which failures to try again, and which end the run."""

import asyncio
import email.utils
import operator
import random
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import contextmanager
from functools import lru_cache
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


class Live:
    """A live model for `CallLog.llm`, made by `live`. It keeps to the budget, and tries again."""

    def __init__(self, model: str | LLM) -> None:
        self.setting = model if isinstance(model, str) else ""
        self._llm = None if isinstance(model, str) else model
        self._loop: Any = None

    def __call__(self) -> LLM:
        """The LLM by itself, without log, budget and retries."""
        if self._llm is None:
            self._llm = _local(self.setting) or _endpoint(self.setting)
        return self._llm

    async def ask(self, log: CallLog, call: dict, messages: list[ChatMessage]) -> ChatResponse:
        """The model's reply to a call. RunStopped or CallFailed if there is none."""
        budget, loop = Budget.of(log), asyncio.get_running_loop()
        await budget.room_for(call)
        with budget.reserved(call):
            if self._loop is not loop and self.setting and not self.setting.startswith("local:"):
                # A connection of an older event loop sends its request, and then fails.
                self._llm = None
            self._loop, llm = loop, self()
            return await ask(lambda: llm.achat(messages, **call["params"]))

    def ask_and_block(self, log: CallLog, call: dict, messages: list[ChatMessage]) -> ChatResponse:
        """As `ask`, for a call that is not awaited."""
        with Budget.of(log).reserved(call):
            return ask_and_block(lambda: self().chat(messages, **call["params"]))


def live(model: str | LLM) -> Live:
    """The live model of a setting (see `models_of`), or of a LlamaIndex LLM, for `CallLog.llm`."""
    return Live(model)


def access(model: str) -> tuple[str | None, str]:
    """(base URL or None for OpenAI's own, key) of a hosted model. RunStopped if it has none."""
    if model.startswith(settings.STAND_IN):
        raise RunStopped(
            f"{model!r} is the name of recorded calls, not of a model: set "
            f"{', '.join(list(settings.ROLES.values())[:3])} (README.md, 'Going live')"
        )
    own, base = model.partition("@")[2], setting("OPENAI_API_BASE") or setting("OPENAI_BASE_URL")
    if "@" in (own or base):
        raise RunStopped(
            f"{id_of(model)!r}: its endpoint's URL holds a password, which would be shown; give "
            f"it as {'ENDPOINT_API_KEY' if own else 'OPENAI_API_KEY'} instead"
        )
    if own and not model.startswith("hf:"):
        # OpenAI's key goes to no other host. The client must send a key: a server that wants none
        # gets "none".
        return own, setting("ENDPOINT_API_KEY") or "none"
    names = ["HF_TOKEN", "HUGGING_FACE_TOKEN"] if model.startswith("hf:") else ["OPENAI_API_KEY"]
    if key := next(filter(None, map(setting, names)), ""):
        return own or (HUGGING_FACE if model.startswith("hf:") else base) or None, key
    raise RunStopped(f"no key for {id_of(model)!r}: set {names[0]} in the environment or in .env")


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
    """OpenAI's own client for whatever serves a model, or its `whole_api`: not only chats."""
    import openai

    if model.startswith("local:") or whole_api and model.startswith("hf:"):
        raise RunStopped(
            f"{id_of(model)!r}: this needs a model behind OpenAI's API, or one compatible with it "
            "(an id, or id@url)"
        )
    url, key = access(model)
    return openai.OpenAI(base_url=url, api_key=key, timeout=TIMEOUT, max_retries=0)


def _endpoint(model: str) -> LLM:
    url, key = access(model)
    return _endpoint_class()(model=name_of(model), api_base=url, api_key=key, max_retries=0)


@lru_cache(maxsize=1)
def _endpoint_class() -> Any:
    """Made when it is first needed: the clients take seconds to import."""
    import httpx
    from llama_index.llms.openai import OpenAI
    from openai import AsyncOpenAI, DefaultAioHttpClient

    async def opened(url: str | None, key: str | None) -> AsyncIterator[AsyncOpenAI]:
        """Yield a client that is closed with its event loop. aiohttp takes half of httpx's time."""
        http = DefaultAioHttpClient(timeout=TIMEOUT)
        async with AsyncOpenAI(base_url=url, api_key=key, http_client=http, max_retries=0) as one:
            yield one

    class Endpoint(OpenAI):
        """OpenAI's client for any model id. LlamaIndex's own refuses ids that it does not know."""

        _opened: Any = PrivateAttr(default=None)
        _open_client: Any = PrivateAttr(default=None)

        @property
        def metadata(self) -> LLMMetadata:
            return LLMMetadata(model_name=self.model, is_chat_model=True)

        async def achat(self, messages: Any, **kwargs: Any) -> ChatResponse:
            if self._open_client is None:
                self._opened = opened(self.api_base, self.api_key)
                self._open_client = await anext(self._opened)
            # The client's typed method checks every field, which doubles what a call costs.
            plain = [{"role": one.role.value, "content": one.content} for one in messages]
            body = {"messages": plain, **self._get_model_kwargs(**kwargs)}
            path, cast_to = "/chat/completions", httpx.Response
            raw = (await self._open_client.post(path, cast_to=cast_to, body=body)).json()
            choice = raw["choices"][0]
            message = ChatMessage(role="assistant", content=choice["message"].get("content"))
            places = (choice.get("logprobs") or {}).get("content") or []
            tokens = [
                [
                    LogProb(token=one["token"], logprob=one["logprob"])
                    for one in place["top_logprobs"]
                ]
                for place in places
            ]
            return ChatResponse(message=message, raw=raw, logprobs=tokens or None)

        def _get_model_kwargs(self, **kwargs: Any) -> dict:
            return {"model": self.model, **request_settings(self.model, kwargs)}

    return Endpoint


def _local(model: str) -> LLM | None:
    """The LLM of a model on this machine; None for a hosted one."""
    if not model.startswith("local:"):
        return None
    from llama_index.llms.huggingface import HuggingFaceLLM

    class Local(HuggingFaceLLM):
        """HuggingFaceLLM with the call's temperature, which the original ignores."""

        def complete(self, prompt: str, formatted: bool = False, **kwargs: Any) -> Any:
            if (temperature := kwargs.get("temperature")) is not None:
                sampling = {"do_sample": True, "temperature": temperature}
                self.generate_kwargs = sampling if temperature > 0 else {"do_sample": False}
            return super().complete(prompt, formatted=formatted, **kwargs)

    name, cap = name_of(model), reply_cap(model)
    return Local(model_name=name, tokenizer_name=name, max_new_tokens=cap)


def status_of(error: BaseException) -> int | None:
    """The HTTP status of a client's error, if it has one."""
    response = getattr(error, "response", None)
    return getattr(error, "status_code", None) or getattr(response, "status_code", None)


def is_transient(error: BaseException) -> bool:
    """Whether the same call may succeed later: too many requests, a server's fault, a timeout."""
    import httpx
    import openai
    import requests

    if getattr(error, "code", None) == "insufficient_quota":
        return False
    if (status := status_of(error)) is not None:
        return status in (408, 409, 429) or status >= 500 and status != 501  # 501: never will be
    of_openai = openai.APIConnectionError, httpx.TransportError
    of_requests = requests.ConnectionError, requests.Timeout
    return isinstance(error, (*of_openai, *of_requests, ConnectionError, TimeoutError))


def retry_after(error: BaseException) -> float | None:
    """Seconds that the server asks to wait: `Retry-After` (seconds or a date), `retry-after-ms`."""
    headers = getattr(getattr(error, "response", None), "headers", None) or {}
    for name, unit in (("retry-after-ms", 1000), ("retry-after", 1)):
        try:
            return max(0.0, float(headers[name]) / unit)
        except KeyError:
            continue
        except ValueError:
            date = email.utils.parsedate_tz(headers[name])
            return max(0.0, email.utils.mktime_tz(date) - time.time()) if date else None
    return None


def _wait(state: RetryCallState) -> float:
    """What the server asks for, else a wait that doubles; with jitter, so that calls spread out."""
    error = state.outcome.exception() if state.outcome else None
    asked = retry_after(error) if error else None
    if asked is not None:
        return asked + random.uniform(0, FIRST_WAIT)
    return wait_exponential_jitter(multiplier=FIRST_WAIT, max=60, jitter=FIRST_WAIT)(state)


def retry_policy(again: Callable[[BaseException], bool] = is_transient) -> dict:
    """For tenacity: what to try again, how often, and when."""

    def in_time(error: BaseException) -> bool:
        return again(error) and (retry_after(error) or 0) <= LONGEST_WAIT

    stop = stop_after_attempt(ATTEMPTS)
    return {"retry": retry_if_exception(in_time), "wait": _wait, "stop": stop, "reraise": True}


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
        failure: RunStopped | CallFailed = CallFailed(
            said + (f" (asked {attempts} times)" if attempts > 1 else "")
        )
        if why:
            failure = RunStopped(f"{why}: {said}. What was answered is kept; run again to go on.")
        failure.status = status
        # The traceback of an error that quotes a key would show the key.
        raise failure from (error if said == raw else None)


async def ask(call: Callable[[], Awaitable]) -> Any:
    """Await a live call, and again while it fails for a while. RunStopped or CallFailed if not."""

    async def once() -> Any:
        return await call()

    with _failing(retrying := AsyncRetrying(**retry_policy())):
        return await retrying(once)


def ask_and_block(call: Callable[[], Any]) -> Any:
    """As `ask`, for a call that is not awaited."""
    with _failing(retrying := Retrying(**retry_policy())):
        return retrying(call)


def start_once(what: str, create: Callable[[], Any]) -> Any:
    """Start a paid job or batch. RunStopped if the reply is lost: it may have been started."""
    refused = retry_policy(lambda error: is_transient(error) and status_of(error) is not None)
    try:
        with _failing(retrying := Retrying(**refused)):
            return retrying(create)
    except CallFailed as error:
        if error.status is not None:
            raise
        raise RunStopped(
            f"the {what} may or may not have been started: {error} Look at your account's list "
            "before you run again, and cancel it there, or it will be paid twice."
        ) from error.__cause__


def wait_for(
    what: str,
    look: Callable[[], Any],
    ended: tuple,
    hours: float,
    tell: Callable[[str], None],
    state: Callable[[Any], str] = operator.attrgetter("status"),
) -> Any:
    """Look at a job or a batch every POLL_SECONDS until its status is in `ended`, and return it.

    `look` raises CallFailed where it cannot be seen; `tell` gets each new `state` as a line.
    RunStopped if it has not ended in so many `hours`: it goes on, and the next run waits again.
    """
    end, told = time.monotonic() + hours * 3600, None
    while True:
        try:
            found = look()
            now, over = state(found), found.status in ended
        except CallFailed as error:  # it goes on, whether we can see it or not
            now, over = f"not seen ({error})", False
        if now != told:
            tell(f"{what}: {(told := now)}")
        if over:
            return found
        if time.monotonic() > end:
            raise RunStopped(
                f"{what} is {now!r} after {hours:g} hours. It goes on; run again to wait for it."
            )
        time.sleep(settings.number("POLL_SECONDS"))
