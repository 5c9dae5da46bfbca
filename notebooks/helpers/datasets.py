"""Generate: chunks -> questions with reference answers -> answers to judge."""

import json
import random
import re
from pathlib import Path
from typing import Any

import numpy as np
from llama_index.core import SummaryIndex
from llama_index.core.evaluation.dataset_generation import DEFAULT_QUESTION_GENERATION_PROMPT
from llama_index.core.llms import LLM, CompletionResponse, CustomLLM, LLMMetadata
from llama_index.core.node_parser.text.utils import split_by_sentence_tokenizer
from llama_index.core.prompts import PromptTemplate
from llama_index.core.query_engine import BaseQueryEngine
from llama_index.core.schema import BaseNode, MetadataMode, TextNode

from .calls import run_stage
from .embeddings import local_embedding
from .snapshots import write_text

QA_PROMPT = re.compile(r"-{21}\n(.*)\n-{21}\n.*\nQuery: (.*)\nAnswer: ?\Z", re.S)
ASK_AGAIN = "to have it asked again, delete the line of calls.jsonl that holds this reply, or leave the chunk out"
CONTEXT_CHARS = 1000  # of the best chunk, kept in a row as in the original notebooks


def deal(groups: list[list]) -> list:
    """Deal out groups in turn, the first of each, then the second of each, until all are empty."""
    longest = max(map(len, groups), default=0)
    return [group[i] for i in range(longest) for group in groups if i < len(group)]


async def write_questions(
    nodes: list[BaseNode], llm: LLM, instruction: str, concurrency: int | None = None
) -> list[dict]:
    """One question a node, with the prompt of LlamaIndex's DatasetGenerator, which is deprecated and needs spaCy.

    Returns:
        Per node a dict of `question` and `document` (the title of the node's document).
    """
    template = PromptTemplate(DEFAULT_QUESTION_GENERATION_PROMPT)
    replies = await run_stage(
        "questions",
        [
            llm.apredict(
                template, context_str=node.get_content(MetadataMode.LLM), query_str=instruction
            )
            for node in nodes
        ],
        concurrency,
    )
    questions = []
    for node, reply in zip(nodes, replies):
        try:
            questions.append(
                {"question": clean_question(reply), "document": node.metadata.get("title")}
            )
        except ValueError as error:
            raise ValueError(
                f"a chunk of {node.metadata.get('title')!r}: {error}; {ASK_AGAIN}"
            ) from error
    return questions


async def generate_questions(
    nodes: list[BaseNode], llm: LLM, instruction: str, concurrency: int | None = None
) -> list[dict]:
    """As `write_questions`, and to each question the `reference`: the model's answer to it from that node alone."""
    questions = await write_questions(nodes, llm, instruction, concurrency)
    references = await run_stage(
        "references",
        [
            SummaryIndex([node]).as_query_engine(llm=llm).aquery(question["question"])
            for node, question in zip(nodes, questions)
        ],
        concurrency,
    )
    pairs = [
        {
            "question": question["question"],
            "reference": _said(reference).strip(),
            "document": question["document"],
        }
        for question, reference in zip(questions, references)
    ]
    for pair in pairs:
        if not pair["reference"]:
            raise ValueError(
                f"a chunk of {pair['document']!r}: an empty reply in place of the reference answer to {pair['question']!r}; {ASK_AGAIN}"
            )
    return pairs


def clean_question(reply: str) -> str:
    """The question in a model's reply, without the numbering or the "Question:" that models like to put before it."""
    lines = [
        re.sub(
            r"^\s*(?:[-*]\s+)?(?:\d+[.)]\s*)?(?:\**q(?:uestion)?\s*\d*\**\s*:\**\s*)?",
            "",
            line,
            flags=re.I,
        ).strip()
        for line in reply.splitlines()
    ]
    for line in lines:
        if "?" in line:
            return line
    raise ValueError(f"no question in the reply {reply[:200]!r}")


def _said(response: Any) -> str:
    """What the model said; nothing, where LlamaIndex puts words of its own in the place of an empty reply."""
    return "" if str(response) == "Empty Response" else str(response)


async def answer_questions(
    pairs: list[dict], engines: list[tuple[str, BaseQueryEngine]], concurrency: int | None = None
) -> list[dict]:
    """Let the i-th query engine answer the i-th question.

    Args:
        pairs: dicts of `question`, `reference` and `document`, as from `generate_questions`.
        engines: a (model name, query engine) a pair.

    Returns:
        The pairs as correctness rows: with `response_data` of `model`, `text` and `context`, the head of the best chunk.
    """
    if len(pairs) != len(engines):
        raise ValueError(
            f"{len(pairs)} pairs and {len(engines)} engines: expected an engine a pair"
        )
    responses = await run_stage(
        "answers",
        [engine.aquery(pair["question"]) for pair, (_, engine) in zip(pairs, engines)],
        concurrency,
    )
    return [
        {
            "question": pair["question"],
            "reference": pair["reference"],
            "response_data": {
                "model": model,
                "text": _said(response),
                "context": response.source_nodes[0].node.text[:CONTEXT_CHARS] + "...",
            },
            "document": pair["document"],
        }
        for pair, (model, _), response in zip(pairs, engines, responses)
    ]


async def answer_pairs(
    questions: list[dict],
    engines: list[tuple[str, BaseQueryEngine]],
    seed: int = 0,
    concurrency: int | None = None,
) -> list[dict]:
    """Let two query engines, drawn and put in order with the seed, answer each question.

    Args:
        questions: dicts of `question` and `document`.
        engines: the (model name, query engine) to draw from; all over one retriever, so that both answer from one source.

    Returns:
        Pairwise rows: `question`, two `answers` of `model` and `text`, `source` (the head of the best chunk), `document`.
    """
    draw = random.Random(seed)
    drawn = [draw.sample(engines, 2) for _ in questions]
    responses = await run_stage(
        "answers",
        [
            engine.aquery(question["question"])
            for question, two in zip(questions, drawn)
            for _, engine in two
        ],
        concurrency,
    )
    return [
        {
            "question": question["question"],
            "answers": [
                {"model": model, "text": _said(response)}
                for (model, _), response in zip(two, responses[2 * i : 2 * i + 2])
            ],
            "source": responses[2 * i].source_nodes[0].node.text[:CONTEXT_CHARS] + "...",
            "document": question["document"],
        }
        for i, (question, two) in enumerate(zip(questions, drawn))
    ]


async def answer_in_context(
    pairs: list[dict], generators: list[tuple[str, LLM]], concurrency: int | None = None
) -> list[dict]:
    """Let every generator answer every question from the one chunk that is given with it: retrieval is simulated.

    Args:
        pairs: dicts of `question`, `context` (the whole chunk) and, if known, `document`.
        generators: (model name, LLM) each.

    Returns:
        Single-grading rows, a question's together: `question`, `response_data` of `model`, `text` and `context`, `document`.
    """
    for number, pair in enumerate(pairs):
        for field in ("question", "context"):
            if not isinstance(pair.get(field), str) or not pair[field].strip():
                raise ValueError(
                    f"pair {number}: {field} must be a text, found {pair.get(field)!r}"
                )
    asked = [
        (pair, model, SummaryIndex([TextNode(text=pair["context"])]).as_query_engine(llm=llm))
        for pair in pairs
        for model, llm in generators
    ]
    responses = await run_stage(
        "answers", [engine.aquery(pair["question"]) for pair, _, engine in asked], concurrency
    )
    return [
        {
            "question": pair["question"],
            "response_data": {"model": model, "text": _said(response), "context": pair["context"]},
            **({"document": pair["document"]} if "document" in pair else {}),
        }
        for (pair, model, _), response in zip(asked, responses)
    ]


class ExtractiveAnswerer(CustomLLM):
    """Answers a query engine's prompt with the sentences of its context that lie nearest to the question, by `local_embedding`.

    Args:
        sentences: how many, in the order of the text.
    """

    sentences: int = 1
    model_name: str = "local-extractive"

    @property
    def metadata(self) -> LLMMetadata:
        return LLMMetadata(model_name=self.model_name, is_chat_model=False)

    def complete(self, prompt: str, formatted: bool = False, **kwargs: Any) -> CompletionResponse:
        if not (match := QA_PROMPT.search(prompt)):
            raise ValueError(
                f"an extractive answerer reads LlamaIndex's question-answering prompt; this one begins {prompt[:80]!r}"
            )
        context, question = match.groups()
        parts = [part.strip() for part in split_by_sentence_tokenizer()(context)]
        vectors = np.array(local_embedding().get_text_embedding_batch([question, *parts]))
        # Rounded, so that float noise between machines does not choose between equals; of equals, the first.
        nearest = np.argsort(-np.round(vectors[1:] @ vectors[0], 4), kind="stable")[
            : self.sentences
        ]
        return CompletionResponse(text=" ".join(parts[i] for i in sorted(nearest)))

    def stream_complete(self, prompt: str, formatted: bool = False, **kwargs: Any):
        yield self.complete(prompt)


def save_qrd(path: str | Path, pairs: list[dict]) -> None:
    """Write question and reference pairs as LlamaIndex's QueryResponseDataset does (`qrd.json`)."""
    qrd = {
        "queries": {str(i): pair["question"] for i, pair in enumerate(pairs)},
        "responses": {str(i): pair["reference"] for i, pair in enumerate(pairs)},
    }
    write_text(path, json.dumps(qrd, indent=4))
