"""A hosted embedding model in front of a call log: each text is paid for once."""

import base64
from typing import Any

import numpy as np
from llama_index.core.base.embeddings.base import BaseEmbedding
from llama_index.core.bridge.pydantic import PrivateAttr

from ..embeddings import local_embedding
from ..log import CallLog, MissingCall, call_key, kept, make_row
from ..settings import LOCAL, name_of
from .models import access, ask, ask_and_block, http_settings


class HostedEmbedding(BaseEmbedding):
    """A hosted embedding model in front of a call log. Vectors are kept in half precision.

    A text's row in the log has one message of the role "input". Batches hold chats only, so a run
    that collects asks for embeddings at once.

    Args:
        model: its setting (see `models_of`).
        log: the call log.

    Raises:
        MissingCall: a replay, and the log does not hold a text.
    """

    _log: CallLog = PrivateAttr()
    _model: str = PrivateAttr()

    def __init__(self, model: str, log: CallLog) -> None:
        super().__init__(model_name=name_of(model), embed_batch_size=64)
        self._log, self._model = log, model

    def _get_text_embeddings(self, texts: list[str]) -> list[list[float]]:
        if new := self._new(texts):
            of = self._log, *new.values()
            vectors = ask_and_block(self._client().get_text_embedding_batch, list(new), of=of)
            self._keep(new, vectors)
        return self._kept(texts)

    async def _aget_text_embeddings(self, texts: list[str]) -> list[list[float]]:
        """As above, without blocking the event loop, in which chats may be under way."""
        if new := self._new(texts):
            of = self._log, *new.values()
            vectors = await ask(self._client().aget_text_embedding_batch, list(new), of=of)
            self._keep(new, vectors)
        return self._kept(texts)

    def _client(self) -> BaseEmbedding:
        import openai
        from llama_index.embeddings.openai import OpenAIEmbedding

        url, key = access(self._model, whole_api=True)
        return OpenAIEmbedding(
            model_name=self.model_name,
            api_base=url,
            api_key=key,
            max_retries=0,
            http_client=openai.DefaultHttpxClient(**http_settings()),
            async_http_client=openai.DefaultAsyncHttpxClient(**http_settings(awaited=True)),
        )

    def _call(self, text: str) -> dict:
        message = {"role": "input", "content": text}
        return {"model": self.model_name, "messages": [message], "params": {}, "sample": 0}

    def _new(self, texts: list[str]) -> dict[str, dict]:
        """{text: its call} of the texts that the log does not hold."""
        calls = {text: self._call(text) for text in texts}
        new = {text: one for text, one in calls.items() if not self._log.find(call_key(**one))}
        if new and self._log.mode == "replay":
            raise MissingCall(self._log.explain_missing(next(iter(new.values()))))
        if new:
            with kept(self._log, ", so none is asked for"):
                self._log.open_to_write()
        return new

    def _keep(self, calls: dict[str, dict], vectors: list[list[float]]) -> None:
        with kept(self._log):
            for call, vector in zip(calls.values(), vectors, strict=True):
                packed = base64.b64encode(np.array(vector, dtype="<f2").tobytes()).decode()
                self._log.append(make_row(call, packed))

    def _kept(self, texts: list[str]) -> list[list[float]]:
        found = []
        for text in texts:
            row: Any = self._log.get(call_key(**self._call(text)))  # it is there by now
            self._log.use(row)
            vector = np.frombuffer(base64.b64decode(row["response"]), dtype="<f2")
            found.append(vector.astype(float).tolist())
        return found

    def _get_text_embedding(self, text: str) -> list[float]:
        return self._get_text_embeddings([text])[0]

    def _get_query_embedding(self, query: str) -> list[float]:
        return self._get_text_embedding(query)

    async def _aget_query_embedding(self, query: str) -> list[float]:
        return (await self._aget_text_embeddings([query]))[0]


def embedding_of(model: str, log: CallLog) -> BaseEmbedding:
    """The embedding of a setting: "minilm" on this machine, else a model behind OpenAI's API."""
    return local_embedding() if model == LOCAL else HostedEmbedding(model, log)
