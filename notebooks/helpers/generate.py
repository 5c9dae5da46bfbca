"""Generate: documents -> chunks -> questions with reference answers -> answers to judge."""

import itertools
import json
import random
import re
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

import numpy as np
from llama_index.core import SummaryIndex, VectorStoreIndex
from llama_index.core.base.base_retriever import BaseRetriever
from llama_index.core.base.embeddings.base import BaseEmbedding
from llama_index.core.evaluation.dataset_generation import DEFAULT_QUESTION_GENERATION_PROMPT
from llama_index.core.llms import LLM, CompletionResponse, CustomLLM, LLMMetadata
from llama_index.core.node_parser.text.utils import split_by_sentence_tokenizer
from llama_index.core.prompts import PromptTemplate
from llama_index.core.query_engine import BaseQueryEngine, CustomQueryEngine, RetrieverQueryEngine
from llama_index.core.readers.base import BaseReader
from llama_index.core.schema import BaseNode, Document, MetadataMode

from .embeddings import embed
from .log import FINISH, run_stage
from .replies import cut_off, without_thought
from .rows import DATA, judge_mode, snapshot_folder, write_text
from .settings import redact

QA_PROMPT = re.compile(r"-{21}\n(.*)\n-{21}\n.*\nQuery: (.*)\nAnswer: ?\Z", re.S)
TITLE = re.compile(r"^title: .*\n+", re.M)  # the metadata that a chunk brings into the prompt
ABBREVIATED = re.compile(r"\b(?:St|Ste|Mr|Mrs|Dr|Mt|Jr|No|Gen)\.$")  # no end of a sentence
ASK_AGAIN = (
    "to ask for it again, delete the line of calls.jsonl that holds this reply, or leave the "
    "chunk out"
)

# Half of the questions are asked as in the original notebooks (LlamaIndex, MIT licence), which the
# first prompt quotes. The other half is asked as people ask.
_PROFESSOR = (
    "You are a Teacher/ Professor. Your task is to setup a quiz/examination. Using the "
    "provided context, formulate a single question that captures an important fact from "
    "the context. Restrict the question to the context information provided."
)
_PERSON = "You play a person who asks a question-answering service about the history of cities. "
_PLAIN = _PERSON + (
    "You have not read the context, but it holds what you want to know. Type one question as "
    "people type: plain, about one thing, twelve words at most. Name the city or the thing that "
    "you ask about."
)
_VAGUE = _PERSON + (
    "You remember only roughly what the context is about. Type one short question about it, "
    "without the city's name and without dates, as people do who think that the service knows "
    "what they mean."
)
_MISTAKEN = _PERSON + (
    "You have one thing in the context wrong, such as a date, a name, a number or a cause, "
    "and you do not know it. Type one short question that takes the wrong thing for granted."
)
_BEYOND = _PERSON + (
    "You have heard of what the context is about. Type one short question on that subject "
    "that the context does not answer."
)
_TENTH = (_PLAIN, _VAGUE, _PLAIN, _MISTAKEN, _BEYOND)
PARAGRAPH = (
    "Answer in one full paragraph of some 120 words, for a reader who is new to the subject."
)
BRIEF = "Answer from what you know, in two to four sentences."
QUESTION_PROMPTS = [prompt for asked in _TENTH for prompt in (_PROFESSOR, asked)]


class UnreadPages(RuntimeError):
    """Some pages could not be read: each is named with its reason. The snapshot has the others."""


class SnapshotReader(BaseReader):
    """Reads pages by title from a snapshot's `documents/` folder, as LlamaIndex's readers do.

    A run that records or collects reads missing pages with the reader `live`, such as
    `live_reader()`, and keeps them: a page is frozen when it is first read. Without one, a snapshot
    that has no documents uses the bundled ones.
    """

    def __init__(self, live: BaseReader | None = None) -> None:
        self._live = live

    def load_data(self, pages: list[str]) -> list[Document]:  # type: ignore[override]
        """One Document a page, in the order of `pages`, with its title in the metadata.

        Raises:
            FileNotFoundError: a page is not there, and there is no reader for it.
            UnreadPages: the live reader could not read some pages. The snapshot has the others.
        """
        live: Any = None if judge_mode() == "replay" else self._live
        own = snapshot_folder("") / "documents"
        folder = own if own.is_dir() or live else DATA / "documents"
        paths = {title: folder / _file_name(title) for title in pages}
        unread = []
        for title, path in paths.items():
            if path.exists():
                continue
            if live is None:
                raise FileNotFoundError(
                    f"no page {title!r} in this snapshot (looked for {path}); to add it, put its "
                    "text there, or record with a live reader (DOCUMENTS=wikipedia)"
                )
            try:
                write_text(path, live.load_data(pages=[title])[0].text)
            except Exception as error:  # of whatever reader; raised below, with the others
                why = getattr(live, "why", repr)(error)
                unread.append(f"\n  {title}: {redact(why)}")
        if unread:
            raise UnreadPages(
                f"{len(unread)} of {len(paths)} pages could not be read; the others are in "
                f"{folder}.{''.join(unread)}"
            )
        return [
            Document(text=paths[title].read_text(encoding="utf-8"), metadata={"title": title})
            for title in pages
        ]


def _file_name(title: str) -> str:
    """The file of a page. Signs that a file system may refuse are written as % and their code."""
    safe = re.sub(r'[%/\\:*?"<>|_]', lambda sign: f"%{ord(sign[0]):02X}", title)
    return safe.replace(" ", "_") + ".txt"


def deal(groups: list[list]) -> list:
    """Take the first of each group, then the second of each, until all are empty."""
    longest = max(map(len, groups), default=0)
    return [group[i] for i in range(longest) for group in groups if i < len(group)]


NUMBERING = re.compile(
    r"^\s*(?:[-*]\s+)?(?:\d+[.)]\s*)?(?:\**q(?:uestion)?\s*\d*\**\s*:\**\s*)?", re.I
)
# People leave the question mark out.
ASKING = re.compile(
    r".*\?|(?:(?:in|at|on|by|for|from|to)\s+)?(?:who|whose|what|when|where|why|which|how|is|are|was"
    r"|were|do|does|did|has|had|can|could)\b",
    re.I,
)


async def write_questions(nodes: list[BaseNode], llm: LLM, instructions: list[str]) -> list[dict]:
    """One question a node: dicts of `question` and `document`, the title in the node's metadata.

    `instructions` say what to ask for; the nodes take them in turn. The prompt is that of
    LlamaIndex's DatasetGenerator, which is deprecated and needs spaCy.

    Raises:
        ValueError: a reply holds no question, or was cut off.
    """
    template = PromptTemplate(DEFAULT_QUESTION_GENERATION_PROMPT)
    calls = [
        llm.apredict(template, context_str=node.get_content(MetadataMode.LLM), query_str=asked)
        for node, asked in zip(nodes, itertools.cycle(instructions))
    ]
    questions = []
    for node, reply in zip(nodes, await run_stage("questions", map(_whole, calls))):
        title = node.metadata.get("title")
        try:
            questions.append({"question": clean_question(reply), "document": title})
        except ValueError as error:
            raise ValueError(f"a chunk of {title!r}: {error}; {ASK_AGAIN}") from error
    return questions


async def write_references(nodes: list[BaseNode], questions: list[dict], llm: LLM) -> list[dict]:
    """The questions with a `reference`: the model's answer from the question's own node alone."""
    calls = [
        SummaryIndex([node]).as_query_engine(llm=llm).aquery(asked["question"])
        for node, asked in zip(nodes, questions, strict=True)
    ]
    pairs = []
    for asked, reply in zip(questions, await run_stage("references", map(_whole, calls))):
        question, title, reference = asked["question"], asked["document"], _text(reply).strip()
        if not reference:
            raise ValueError(
                f"a chunk of {title!r}: an empty reply in place of the reference answer to "
                f"{question!r}; {ASK_AGAIN}"
            )
        pairs.append({"question": question, "reference": reference, "document": title})
    return pairs


def clean_question(reply: str) -> str:
    """The question in a model's reply, without the numbering or "Question:" before it.

    Raises:
        ValueError: there is none.
    """
    for line in without_thought(reply).splitlines():
        if ASKING.match(question := NUMBERING.sub("", line).strip()):
            return question
    raise ValueError(f"no question in the reply {reply[:200]!r}")


async def _whole(call: Coroutine, or_a_part: bool = False) -> Any:
    """A call's reply; ValueError if it may not be whole, or has not even a part."""
    reply = await call
    if (cut := cut_off(FINISH.get())) and not (or_a_part and _text(reply)):
        raise ValueError(f"a reply was {cut}: {_text(reply)[:200]!r}; {ASK_AGAIN}")
    return reply


def _answered(call: Coroutine) -> Coroutine:
    """An answer that was cut off is what its model said, and is judged like the others."""
    return _whole(call, or_a_part=True)


def _text(response: Any) -> str:
    """A response's text. LlamaIndex says "Empty Response" where the reply was empty."""
    text = without_thought(str(response))
    return "" if text == "Empty Response" else text


class ClosedBook(CustomQueryEngine):
    """A query engine without retrieval: `llm` gets the question and nothing else."""

    llm: LLM

    def custom_query(self, query_str: str) -> str:
        """The model's answer."""
        return self.llm.predict(PromptTemplate("{query_str}"), query_str=query_str)

    async def acustom_query(self, query_str: str) -> str:
        """The model's answer."""
        return await self.llm.apredict(PromptTemplate("{query_str}"), query_str=query_str)


def pipelines(
    chunks: list[BaseNode],
    sentences: list[BaseNode],
    embedding: BaseEmbedding,
    ask: Callable[..., LLM],
    small: LLM,
) -> dict[str, BaseQueryEngine]:
    """Seven ways to answer a question, {generator's name: query engine}.

    Nothing tells an answerer to err. The pipelines differ in what is retrieved, in what is asked
    for, in the cap on the reply, and in the model.

    Args:
        chunks: the chunks to retrieve from, one document after the other.
        sentences: the same documents in pieces of a sentence or two.
        embedding: finds the chunks.
        ask: `ask(instruction, **params)` is the answerer with a system prompt and parameters.
        small: a small model.
    """

    def found(parts: list[BaseNode], k: int) -> BaseRetriever:
        return VectorStoreIndex(parts, embed_model=embedding).as_retriever(similarity_top_k=k)

    old = chunks[::2]  # an index that was built before half of the text was written
    two, pieces = found(chunks, 2), found(sentences, 1)
    ways = {
        "old-index": (found(old, 1), ask()),
        "old-paragraph": (found(old, 2), ask(PARAGRAPH)),
        "cut-off": (two, ask(PARAGRAPH, max_tokens=24)),
        "extractive": (two, ExtractiveAnswerer(sentences=2)),
        "sentences": (pieces, ask()),
        "small": (pieces, small),
    }
    engines = {
        name: RetrieverQueryEngine.from_args(retriever, llm=llm)
        for name, (retriever, llm) in ways.items()
    }
    return {**engines, "closed-book": ClosedBook(llm=ask(BRIEF))}


async def answer_questions(
    questions: list[dict], engines: list[tuple[str, BaseQueryEngine]]
) -> list[dict]:
    """Let the i-th (generator's name, query engine) answer the i-th question.

    Returns:
        The questions with `response_data`: `model` (the generator's name), `text`, and `context`,
        all the text that was retrieved for the answer, best chunk first ("" if none was).
    """
    if len(questions) != len(engines):
        raise ValueError(
            f"{len(questions)} questions and {len(engines)} engines: expected an engine a question"
        )
    calls = [engine.aquery(one["question"]) for one, (_, engine) in zip(questions, engines)]
    replies = await run_stage("answers", map(_answered, calls))
    rows = []
    for question, (model, _), reply in zip(questions, engines, replies):
        context = "\n\n".join(found.node.text for found in reply.source_nodes)
        answer = {"model": model, "text": _text(reply), "context": context}
        rows.append({**question, "response_data": answer})
    return rows


def pair_up(first: list[dict], second: list[dict], seed: int = 0) -> list[dict]:
    """Pairwise rows from two rows of `answer_questions` to each question.

    The order of the two answers is drawn with the seed.

    Returns:
        Rows of `question`, two `answers` of `model` and `text`, `source` (the context of both) and
        `document`.

    Raises:
        ValueError: two answers are not to the same question, or not from the same context.
    """
    draw, rows = random.Random(seed), []
    for number, (one, other) in enumerate(zip(first, second, strict=True)):
        source = one["response_data"]["context"]
        same = one["question"] == other["question"], source == other["response_data"]["context"]
        if not all(same):
            raise ValueError(f"row {number}: its two answers have another question or context")
        answers = [
            {name: row["response_data"][name] for name in ("model", "text")} for row in (one, other)
        ]
        draw.shuffle(answers)
        asked = {"question": one["question"], "answers": answers, "source": source}
        rows.append({**asked, "document": one["document"]})
    return rows


class ExtractiveAnswerer(CustomLLM):
    """Answers a query engine's prompt with so many sentences of its context.

    They are those nearest to the question, in the order of the text.
    """

    sentences: int = 1
    model_name: str = "local-extractive"

    @property
    def metadata(self) -> LLMMetadata:
        """The name, and that this is no chat model."""
        return LLMMetadata(model_name=self.model_name, is_chat_model=False)

    def complete(self, prompt: str, formatted: bool = False, **kwargs: Any) -> CompletionResponse:
        """The nearest sentences by `embed`; ValueError if this is another prompt."""
        if not (match := QA_PROMPT.search(prompt)):
            raise ValueError(
                "an extractive answerer reads LlamaIndex's question-answering prompt; this one "
                f"begins {prompt[:80]!r}"
            )
        context, question = match.groups()
        parts: list[str] = []
        for part in split_by_sentence_tokenizer()(TITLE.sub("", context)):
            joined = bool(parts) and ABBREVIATED.search(parts[-1])
            parts[-1:] = [f"{parts[-1]} {part.strip()}"] if joined else [*parts[-1:], part.strip()]
        vectors = embed([question, *parts])
        # Rounded, so that float noise does not choose between equals; of equals, the first.
        likeness = np.round(vectors[1:] @ vectors[0], 4)
        nearest = np.argsort(-likeness, kind="stable")[: self.sentences]
        return CompletionResponse(text=" ".join(parts[i] for i in sorted(nearest)))

    def stream_complete(self, prompt: str, formatted: bool = False, **kwargs: Any) -> Any:
        """As `complete`, in one piece."""
        yield self.complete(prompt)


def save_qrd(path: str | Path, pairs: list[dict]) -> None:
    """Write question and reference pairs as LlamaIndex's QueryResponseDataset does (`qrd.json`)."""
    qrd = {
        "queries": {str(i): pair["question"] for i, pair in enumerate(pairs)},
        "responses": {str(i): pair["reference"] for i, pair in enumerate(pairs)},
    }
    write_text(path, json.dumps(qrd, indent=4))
