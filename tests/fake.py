"""A live model for tests: it answers by a rule and remembers what it was asked.

It can be slow, shuffled or broken.
"""

import asyncio
import hashlib
from pathlib import Path
from typing import Any

from llama_index.core import SummaryIndex
from llama_index.core.base.llms.types import (
    ChatMessage,
    ChatResponse,
    CompletionResponse,
    LLMMetadata,
)
from llama_index.core.bridge.pydantic import PrivateAttr
from llama_index.core.llms import LLM, CustomLLM
from llama_index.core.schema import TextNode

from helpers import answer_questions


def answered(llm: LLM, *pairs: dict) -> list[dict]:
    """Let an LLM answer each pair's `question` from its `context` alone."""
    indices = (SummaryIndex([TextNode(text=pair["context"])]) for pair in pairs)
    engines = [("m", index.as_query_engine(llm=llm)) for index in indices]
    return asyncio.run(answer_questions(list(pairs), engines))


class FakeLive(CustomLLM):
    """Replies `<score>\\nreason`, with a score and a delay that depend on the prompt alone.

    Args:
        asked: a file to which each prompt's hash is appended, to be read from outside.
        delay: seconds, at most; calls end in another order than they began. Without one, a call is
            never left half done.
        broken: prompts that hold this text raise.
    """

    asked: Path | None = None
    delay: float = 0.0
    broken: str | None = None
    _count: list = PrivateAttr(default_factory=list)

    @property
    def metadata(self) -> LLMMetadata:
        return LLMMetadata(model_name="fake", is_chat_model=True)

    @property
    def count(self) -> int:
        return len(self._count)

    def chat(self, messages: list[ChatMessage], **kwargs: Any) -> ChatResponse:
        text = messages[-1].content
        digest = hashlib.sha256(text.encode()).hexdigest()
        self._count.append(digest)
        if self.asked:
            with open(self.asked, "a", encoding="utf-8", newline="\n") as file:
                file.write(digest + "\n")
        if self.broken and self.broken in text:
            raise ConnectionError("the line is dead")
        return ChatResponse(
            message=ChatMessage(
                role="assistant",
                content=f"{1 + int(digest[:4], 16) % 9 / 2}\nBecause {digest[:8]}.",
            )
        )

    async def achat(self, messages: list[ChatMessage], **kwargs: Any) -> ChatResponse:
        response = self.chat(messages)
        digest = hashlib.sha256(messages[-1].content.encode()).digest()
        if self.delay:
            await asyncio.sleep(self.delay * digest[9] / 255)
        return response

    def complete(self, prompt: str, formatted: bool = False, **kwargs: Any) -> CompletionResponse:
        return CompletionResponse(
            text=self.chat([ChatMessage(role="user", content=prompt)]).message.content
        )

    def stream_complete(self, prompt: str, formatted: bool = False, **kwargs: Any):
        raise NotImplementedError
