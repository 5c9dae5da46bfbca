"""Generate: documents -> chunks -> questions with reference answers -> answers to judge."""

import json
import random
import re
from collections.abc import Coroutine
from pathlib import Path
from typing import Any

import numpy as np
from llama_index.core import SummaryIndex
from llama_index.core.evaluation.dataset_generation import DEFAULT_QUESTION_GENERATION_PROMPT
from llama_index.core.llms import LLM, CompletionResponse, CustomLLM, LLMMetadata
from llama_index.core.node_parser.text.utils import split_by_sentence_tokenizer
from llama_index.core.prompts import PromptTemplate
from llama_index.core.query_engine import BaseQueryEngine
from llama_index.core.readers.base import BaseReader
from llama_index.core.schema import BaseNode, Document, MetadataMode, TextNode

from .embeddings import embed
from .log import FINISH, run_stage
from .replies import cut_off, without_thought
from .rows import DATA, judge_mode, snapshot_folder, write_text
from .settings import redact

QA_PROMPT = re.compile(r"-{21}\n(.*)\n-{21}\n.*\nQuery: (.*)\nAnswer: ?\Z", re.S)
ASK_AGAIN = (
    "to ask for it again, delete the line of calls.jsonl that holds this reply, or leave the "
    "chunk out"
)
NUMBERING = re.compile(
    r"^\s*(?:[-*]\s+)?(?:\d+[.)]\s*)?(?:\**q(?:uestion)?\s*\d*\**\s*:\**\s*)?", re.I
)
CONTEXT_CHARS = 1000  # of the best chunk, kept in a row as in the original notebooks


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


async def write_questions(nodes: list[BaseNode], llm: LLM, instruction: str) -> list[dict]:
    """One question a node: dicts of `question` and `document`, the title in the node's metadata.

    `instruction` says what to ask for. The prompt is that of LlamaIndex's DatasetGenerator, which
    is deprecated and needs spaCy.

    Raises:
        ValueError: a reply holds no question, or was cut off.
    """
    template = PromptTemplate(DEFAULT_QUESTION_GENERATION_PROMPT)
    contexts = [node.get_content(MetadataMode.LLM) for node in nodes]
    calls = [llm.apredict(template, context_str=one, query_str=instruction) for one in contexts]
    questions = []
    for node, reply in zip(nodes, await run_stage("questions", map(_whole, calls))):
        title = node.metadata.get("title")
        try:
            questions.append({"question": clean_question(reply), "document": title})
        except ValueError as error:
            raise ValueError(f"a chunk of {title!r}: {error}; {ASK_AGAIN}") from error
    return questions


async def generate_questions(nodes: list[BaseNode], llm: LLM, instruction: str) -> list[dict]:
    """As `write_questions`, with a `reference`: the model's answer from that node alone."""
    questions = await write_questions(nodes, llm, instruction)
    calls = [_from_one(node, llm, asked["question"]) for node, asked in zip(nodes, questions)]
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
        if "?" in (question := NUMBERING.sub("", line).strip()):
            return question
    raise ValueError(f"no question in the reply {reply[:200]!r}")


def _from_one(node: BaseNode, llm: LLM, question: str) -> Coroutine:
    """A question, asked about one chunk."""
    return SummaryIndex([node]).as_query_engine(llm=llm).aquery(question)


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


def _context(response: Any) -> str:
    return response.source_nodes[0].node.text[:CONTEXT_CHARS] + "..."


async def answer_questions(
    pairs: list[dict], engines: list[tuple[str, BaseQueryEngine]]
) -> list[dict]:
    """Let the i-th (model name, query engine) answer the i-th pair's question.

    Returns:
        The pairs (see `generate_questions`) as correctness rows: with `response_data` of `model`,
        `text` and `context`, the first CONTEXT_CHARS characters of the best chunk.
    """
    if len(pairs) != len(engines):
        raise ValueError(
            f"{len(pairs)} pairs and {len(engines)} engines: expected an engine a pair"
        )
    calls = [engine.aquery(pair["question"]) for pair, (_, engine) in zip(pairs, engines)]
    rows = []
    for pair, (model, _), reply in zip(
        pairs, engines, await run_stage("answers", map(_answered, calls))
    ):
        answer = {"model": model, "text": _text(reply), "context": _context(reply)}
        asked = {"question": pair["question"], "reference": pair["reference"]}
        rows.append({**asked, "response_data": answer, "document": pair["document"]})
    return rows


async def answer_pairs(
    questions: list[dict], engines: list[tuple[str, BaseQueryEngine]], seed: int = 0
) -> list[dict]:
    """Let two (model name, query engine), drawn and ordered with the seed, answer each question.

    All engines must share one retriever, so that both answers have the same source.

    Returns:
        Pairwise rows: `question`, two `answers` of `model` and `text`, `source` (the first
        CONTEXT_CHARS characters of the best chunk), `document`.
    """
    draw = random.Random(seed)
    drawn = [(asked, *one) for asked in questions for one in draw.sample(engines, 2)]
    calls = [engine.aquery(asked["question"]) for asked, _, engine in drawn]
    replies = await run_stage("answers", map(_answered, calls))
    answers = [
        {"model": model, "text": _text(reply)} for (_, model, _), reply in zip(drawn, replies)
    ]
    return [
        {
            "question": asked["question"],
            "answers": answers[2 * i : 2 * i + 2],
            "source": _context(replies[2 * i]),
            "document": asked["document"],
        }
        for i, asked in enumerate(questions)
    ]


async def answer_in_context(pairs: list[dict], generators: list[tuple[str, LLM]]) -> list[dict]:
    """Let every generator, a (model name, LLM), answer every question from the chunk with it.

    A pair has a `question`, a `context` (the whole chunk) and, if known, a `document`.

    Returns:
        Single-grading rows, a question's together: `question`, `response_data` of `model`, `text`
        and `context`, `document`.
    """
    for number, pair in enumerate(pairs):
        for field in ("question", "context"):
            if not isinstance(found := pair.get(field), str) or not found.strip():
                raise ValueError(f"pair {number}: {field} must be a text, found {found!r}")
    asked = [(pair, model, llm) for pair in pairs for model, llm in generators]
    calls = [
        _from_one(TextNode(text=pair["context"]), llm, pair["question"]) for pair, _, llm in asked
    ]
    rows = []
    for (pair, model, _), reply in zip(asked, await run_stage("answers", map(_answered, calls))):
        answer = {"model": model, "text": _text(reply), "context": pair["context"]}
        row = {"question": pair["question"], "response_data": answer}
        rows.append(row | {"document": pair["document"]} if "document" in pair else row)
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
        parts = [part.strip() for part in split_by_sentence_tokenizer()(context)]
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
