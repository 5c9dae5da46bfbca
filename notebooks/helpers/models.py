"""Live models: from a setting to an LLM; which failures to try again, and when; what may not be shown."""

import asyncio
import email.utils
import re
import time
from contextlib import contextmanager
from typing import Any, Awaitable, Callable

from llama_index.core.base.embeddings.base import BaseEmbedding
from llama_index.core.base.llms.types import ChatMessage, ChatResponse, LogProb, MessageRole
from llama_index.core.bridge.pydantic import PrivateAttr
from llama_index.core.llms import LLM, LLMMetadata
from tenacity import AsyncRetrying, RetryCallState, Retrying, retry_if_exception, stop_after_attempt
from tenacity.wait import wait_exponential_jitter

from .settings import KEYS, LOCAL, ROLES, STAND_IN, RunStopped, base_url, id_of, name_of, setting

ATTEMPTS = 6
FIRST_WAIT = (
    0.5  # seconds; doubled each time: in all at least 15, enough for a server that restarts
)
LONGEST_WAIT = 600.0  # a provider that asks for more is not waited for
TIMEOUT = 120.0  # seconds, of a call
TEMPERATURE = 0.1  # of a call that names none, as in LlamaIndex
MAX_TOKENS = 1024  # of a reply
THINKING_TOKENS = 4096  # besides, of a model that reasons before it replies
# OpenAI's models that reason: o-series, and GPT-5 and later but for those named chat. They refuse `max_tokens` and a temperature.
REASONING = re.compile(r"(?:[\w-]+/)?(?:ft:)?(?:o\d|gpt-(?:[5-9]|\d\d))(?!.*-chat)")
LISTS_NONE = (
    400,
    404,
    405,
    501,
)  # what an endpoint that does not list its models says when it is asked for one
KEY_LIKE = re.compile(
    r"\b(?:sk|hf)[-_][\w*.-]{4,}|(?<=://)[^/@\s]+(?=@)"
)  # the latter: a password in a URL


class CallFailed(RuntimeError):
    """The live model failed to answer this call; the row that needed it is invalid, and asked again in the next run."""

    status: int | None = None  # the HTTP status, if there was one


def access(model: str) -> tuple[str | None, str]:
    """(base URL or None for the provider's own, key) of a hosted model."""
    if model.startswith(STAND_IN):
        raise RunStopped(
            f"{model!r} is the name of recorded calls, not of a model: set {', '.join(list(ROLES.values())[:3])} (README.md, "
            "'Going live')"
        )
    own = model.partition("@")[2]
    if "@" in (own or base_url() or ""):
        raise RunStopped(
            f"{id_of(model)!r}: its endpoint's URL holds a password, which would be shown; give it as "
            f"{'ENDPOINT_API_KEY' if own else 'OPENAI_API_KEY'} instead"
        )
    if model.startswith("hf:"):
        return own or None, _key("HF_TOKEN", "HUGGING_FACE_TOKEN", model=model)
    if own:  # not OpenAI's key, which is no business of another host; a server that wants none gets "none", for the client must send one
        return own, setting("ENDPOINT_API_KEY") or "none"
    return base_url(), _key("OPENAI_API_KEY", model=model)


def reply_cap(model: str) -> int:
    """The most tokens that a model may spend on a reply."""
    return MAX_TOKENS + (THINKING_TOKENS if REASONING.match(name_of(model)) else 0)


def request_settings(model: str, params: dict) -> dict:
    """What is sent with a call, live or in a batch, besides model and messages: its parameters, as far as the model takes them, and the
    cap on the reply."""
    if REASONING.match(name_of(model)):
        refused = ("temperature", "top_p", "logprobs", "top_logprobs", "max_tokens")
        return {
            **{name: value for name, value in params.items() if name not in refused},
            "max_completion_tokens": reply_cap(model),
        }
    return {"temperature": TEMPERATURE, "max_tokens": MAX_TOKENS, **params}


def openai_client(model: str):
    """OpenAI's own client for a model: for files, fine-tuning jobs, batches. It does not retry.

    Raises:
        RunStopped: the model is not behind OpenAI's API.
    """
    if model.startswith(("hf:", "local:")):
        raise RunStopped(
            f"{id_of(model)!r}: this needs a model behind OpenAI's API, or one compatible with it (an id, or id@url)"
        )
    return _client(*access(model))


def _client(url: str | None, key: str):
    import openai

    return openai.OpenAI(base_url=url, api_key=key, timeout=TIMEOUT, max_retries=0)


def live(model: str) -> Callable[[], LLM]:
    """A function that makes the LLM of a setting (see `models_of`), for `CallLog.llm`. Retries are left to the log, so that they
    are one layer."""

    def make() -> LLM:
        if model.startswith("local:"):
            return _local_class()(
                model_name=name_of(model), tokenizer_name=name_of(model), max_new_tokens=MAX_TOKENS
            )
        if model.startswith("hf:"):
            url, token = access(model)
            return _inference_class()(
                model_name=url or name_of(model),
                token=token,
                num_output=MAX_TOKENS,
                timeout=TIMEOUT,
            )
        url, key = access(model)
        return _endpoint_class()(
            model=name_of(model), api_base=url, api_key=key, timeout=TIMEOUT, max_retries=0
        )

    make.model = model
    return make


def live_embedding(model: str) -> BaseEmbedding:
    """LlamaIndex's client for a hosted embedding model."""
    from llama_index.embeddings.openai import OpenAIEmbedding

    with openai_client(model) as client:  # raises where there is none
        url, key = str(client.base_url), client.api_key
    return OpenAIEmbedding(
        model_name=name_of(model), api_base=url, api_key=key, timeout=TIMEOUT, max_retries=0
    )


def unreachable(model: str) -> str:
    """Why a model cannot be asked; "" if it can. Its endpoint is asked for the model's name, which costs nothing.

    An endpoint that lists no models is not held against it.
    """
    if model == LOCAL or model.startswith("local:"):
        return ""
    try:
        if model.startswith("hf:") and "@" not in model:
            from huggingface_hub import HfApi

            hub = HfApi(token=access(model)[1])
            ask_and_block(lambda: hub.model_info(name_of(model)))
            return ""
        with _client(*access(model)) as client:
            try:
                ask_and_block(lambda: client.models.retrieve(name_of(model)))
            except (RunStopped, CallFailed) as error:
                if error.status not in LISTS_NONE:
                    raise
                known = _listed(client)
                return (
                    f"{redact(str(client.base_url))} does not have it, but {', '.join(known[:8])}"
                    if known and name_of(model) not in known
                    else ""
                )
    except (RunStopped, CallFailed) as error:
        return str(error)
    return ""


def _listed(client) -> list[str]:
    """The ids of an endpoint's models; none if it does not say."""
    try:
        return [one.id for one in ask_and_block(client.models.list)]
    except (RunStopped, CallFailed) as error:
        if error.status in LISTS_NONE:
            return []
        raise


def _key(*names: str, model: str = "") -> str:
    for name in names:
        if value := setting(name):
            return value
    raise RunStopped(f"no key for {id_of(model)!r}: set {names[0]} in the environment or in .env")


def _endpoint_class():
    import httpx
    from llama_index.llms.openai import OpenAI
    from llama_index.llms.openai.utils import to_openai_message_dicts
    from openai import AsyncOpenAI, DefaultAioHttpClient

    async def opened(url: str | None, key: str):
        """Yields a client; it is closed with its event loop, as every generator is. Over aiohttp, which takes half of httpx's time."""
        async with AsyncOpenAI(
            base_url=url,
            api_key=key,
            http_client=DefaultAioHttpClient(timeout=TIMEOUT),
            max_retries=0,
        ) as client:
            yield client

    class Endpoint(OpenAI):
        """OpenAI's client for any model id: its own looks the id up in a table and refuses those that it does not know."""

        _loop: Any = PrivateAttr(default=None)

        @property
        def metadata(self) -> LLMMetadata:
            return LLMMetadata(model_name=self.model, is_chat_model=True)

        async def achat(self, messages: Any, **kwargs: Any) -> ChatResponse:
            # A connection of another event loop sends its request and then fails: the call would be paid twice.
            if self._loop is not (loop := asyncio.get_running_loop()):
                self._loop, self._opened = loop, opened(self.api_base, self.api_key)
                self._aclient = await anext(self._opened)
            # By the client's plain `post`: its typed method walks through every field of request and reply, which doubles what a call costs.
            body = {
                "messages": to_openai_message_dicts(messages, model=self.model),
                **self._get_model_kwargs(**kwargs),
            }
            raw = (
                await self._aclient.post("/chat/completions", cast_to=httpx.Response, body=body)
            ).json()
            choice = raw["choices"][0]
            places = (choice.get("logprobs") or {}).get("content") or []
            logprobs = [
                [
                    LogProb(token=one["token"], logprob=one["logprob"])
                    for one in place["top_logprobs"]
                ]
                for place in places
            ]
            message = ChatMessage(
                role=MessageRole.ASSISTANT, content=choice["message"].get("content")
            )
            return ChatResponse(message=message, raw=raw, logprobs=logprobs or None)

        def _get_model_kwargs(self, **kwargs: Any) -> dict:
            return {"model": self.model, **request_settings(self.model, kwargs)}

    return Endpoint


def _local_class():
    from llama_index.llms.huggingface import HuggingFaceLLM

    class Local(HuggingFaceLLM):
        """HuggingFaceLLM, which pays no heed to a call's temperature, with it."""

        def complete(self, prompt: str, formatted: bool = False, **kwargs: Any) -> Any:
            if (temperature := kwargs.get("temperature")) is not None:
                self.generate_kwargs = (
                    {"do_sample": True, "temperature": temperature}
                    if temperature > 0
                    else {"do_sample": False}
                )
            return super().complete(prompt, formatted=formatted, **kwargs)

    return Local


def _inference_class():
    from huggingface_hub import AsyncInferenceClient
    from llama_index.llms.huggingface_api import HuggingFaceInferenceAPI

    class Inference(HuggingFaceInferenceAPI):
        """Hugging Face's client with its connections renewed for a new event loop, in which the old ones fail."""

        _loop: Any = PrivateAttr(default=None)

        async def achat(self, messages: Any, **kwargs: Any) -> Any:
            if self._loop is not (loop := asyncio.get_running_loop()):
                self._loop, self._async_client = (
                    loop,
                    AsyncInferenceClient(**self._get_inference_client_kwargs()),
                )
            return await super().achat(messages, **kwargs)

    return Inference


def redact(text: str) -> str:
    """The text without anything that is or looks like a key: providers quote them in their errors."""
    for name in KEYS:
        if value := setting(name):
            text = text.replace(value, "[key]")
    return KEY_LIKE.sub("[key]", text)


def status_of(error: BaseException) -> int | None:
    """The HTTP status of a client's error, if it has one."""
    return getattr(error, "status_code", None) or getattr(
        getattr(error, "response", None), "status_code", None
    )


def is_transient(error: BaseException) -> bool:
    """Whether the same call may succeed in a while: too many requests, a fault of the server, a timeout, a broken connection."""
    import httpx
    import httpx2
    import openai
    import requests

    if getattr(error, "code", None) == "insufficient_quota":
        return False
    status = status_of(error)
    if status is not None:
        return (
            status in (408, 409, 429) or status >= 500 and status != 501
        )  # not implemented, and will not be
    return isinstance(
        error,
        (
            openai.APIConnectionError,
            httpx.TransportError,
            httpx2.TransportError,
            requests.ConnectionError,
            requests.Timeout,
            ConnectionError,
            TimeoutError,
        ),
    )


def stops_the_run(error: BaseException) -> str | None:
    """Why no other call would fare better: no valid key, no quota, no such model. None if others may."""
    if getattr(error, "code", None) == "insufficient_quota":
        return "the account has no quota left"
    return {
        401: "the key is missing or not valid",
        402: "the account has no credit left",
        403: "the key may not do this",
        404: "there is no such model, or no such address",
    }.get(status_of(error))


def retry_after(error: BaseException) -> float | None:
    """Seconds that the server asks to wait, from `Retry-After` (seconds or a date) or OpenAI's `retry-after-ms`."""
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
    asked = retry_after(state.outcome.exception())
    return (
        asked
        if asked is not None
        else wait_exponential_jitter(multiplier=FIRST_WAIT, max=60, jitter=FIRST_WAIT)(state)
    )


def _again(error: BaseException) -> bool:
    return is_transient(error) and (retry_after(error) or 0) <= LONGEST_WAIT


def retry_policy() -> dict:
    """For tenacity: what to try again, how often, and when."""
    return {
        "retry": retry_if_exception(_again),
        "wait": _wait,
        "stop": stop_after_attempt(ATTEMPTS),
        "reraise": True,
    }


@contextmanager
def _told(retrying: AsyncRetrying | Retrying):
    """Raise what fails in the block as RunStopped or CallFailed, in words that hold no key, with the HTTP `status`."""
    try:
        yield
    except RunStopped:
        raise
    except (
        Exception
    ) as error:  # of whatever client: it ends here, told in the row or as the run's end
        raw, attempts = f"{type(error).__name__}: {error}", retrying.statistics["attempt_number"]
        said = redact(raw)
        if why := stops_the_run(error):
            failure = RunStopped(f"{why}: {said}. What was answered is kept; run again to go on.")
        else:
            failure = CallFailed(said + (f" (asked {attempts} times)" if attempts > 1 else ""))
        failure.status = status_of(error)
        # A traceback would show the provider's own message too, and the key that it quotes.
        raise failure from (error if said == raw else None)


async def ask(call: Callable[[], Awaitable]) -> Any:
    """Await a live call, and again while its failures are transient, ATTEMPTS times at most.

    Raises:
        RunStopped: the failure is not this call's alone (see `stops_the_run`).
        CallFailed: any other.
    """

    async def once() -> Any:
        return await call()

    retrying = AsyncRetrying(**retry_policy())
    with _told(retrying):
        return await retrying(once)


def ask_and_block(call: Callable[[], Any]) -> Any:
    """As `ask`, for a call that is not awaited."""
    retrying = Retrying(**retry_policy())
    with _told(retrying):
        return retrying(call)
