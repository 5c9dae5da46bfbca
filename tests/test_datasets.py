"""Documents, questions, answers."""

import asyncio
import contextlib
import re

import numpy as np
import pytest
from fake import FakeLive, answered
from llama_index.core import Document, SummaryIndex
from llama_index.core.base.embeddings.base import BaseEmbedding
from llama_index.core.evaluation import DatasetGenerator
from llama_index.core.node_parser import SentenceSplitter
from llama_index.core.readers.base import BaseReader
from llama_index.core.schema import TextNode

from helpers import (
    CallLog,
    SnapshotReader,
    answer_questions,
    deal,
    embeddings,
    generate,
    load_rows,
    pipelines,
    write_questions,
    write_references,
)
from helpers.embeddings import local_embedding
from helpers.generate import BRIEF, PARAGRAPH, ClosedBook, clean_question
from helpers.rows import DATA


@pytest.mark.parametrize(
    "reply",
    [
        "Who was he?",
        "Question: Who was he?",
        "**Question:** Who was he?",
        "1. Who was he?",
        "Q1: Who was he?",
        "**Question 2:** Who was he?",
        "- Who was he?",
        "Sure, here is a question:\n\n1) Who was he?\n2) Who was she?",
        "question:  Who was he?  ",
    ],
)
def test_a_question_is_freed_of_what_models_put_before_it(reply):
    assert clean_question(reply) == "Who was he?"


@pytest.mark.parametrize(
    "reply, question",
    [
        ("who was he", "who was he"),
        ("Here is one.\n\n1. In which year did it burn", "In which year did it burn"),
        ("**Question:** is it true that he left", "is it true that he left"),
        ("how many bridges are there now", "how many bridges are there now"),
        ("the bridge of 1937, who built it?", "the bridge of 1937, who built it?"),
    ],
)
def test_a_question_as_people_type_it_is_read(reply, question):
    assert clean_question(reply) == question


@pytest.mark.parametrize("reply", ["", "I cannot.", "The city burnt in 1666.", "Howard left."])
def test_a_reply_without_a_question_is_an_error(reply):
    with pytest.raises(ValueError, match=f"no question in the reply '{reply}'"):
        clean_question(reply)


@pytest.mark.parametrize("reason", ["length", "no choice in the reply: overloaded", "stop", None])
def test_a_question_or_reference_that_was_cut_off_is_not_used(reason, tmp_path):
    """An answer that was cut off is; an error in the place of an answer is not."""
    nodes = [TextNode(text="Ada wrote it.", metadata={"title": "Ada"})]
    pair = {"question": "Who wrote it?", "document": "Ada", "context": "Ada wrote it."}

    class Cut(FakeLive):
        said: str = "Who wrote it? Was it"

        def chat(self, messages, **kwargs):
            response = super().chat(messages)
            response.message.content = self.said
            response.raw = {"finish_reason": reason}
            return response

    def llm(said):
        return CallLog(tmp_path / f"{said}.jsonl", "record").llm("m", Cut(said=said))

    def refused_if_cut():
        whole, said = reason in ("stop", None), f"cut off.*{reason}"
        return contextlib.nullcontext() if whole else pytest.raises(ValueError, match=said)

    with refused_if_cut():
        [asked] = asyncio.run(write_questions(nodes, llm("Who wrote it?"), ["Ask."]))
        assert asked == {"question": "Who wrote it?", "document": "Ada"}
    with refused_if_cut():
        [asked] = asyncio.run(write_references(nodes, [pair], llm("Ada.")))
        assert asked == {"question": "Who wrote it?", "reference": "Ada.", "document": "Ada"}
    assert answered(llm("Ada di"), pair)[0]["response_data"]["text"] == "Ada di"
    with refused_if_cut():
        assert answered(llm(""), pair)[0]["response_data"]["text"] == ""


def test_dealing_takes_turns():
    assert deal([["a1", "a2", "a3"], ["b1"], ["c1", "c2"]]) == ["a1", "b1", "c1", "a2", "c2", "a3"]
    assert deal([]) == deal([[], []]) == []


def test_the_bundled_pages_are_read_by_title():
    [document] = SnapshotReader().load_data(pages=["History of Paris"])
    assert document.metadata == {"title": "History of Paris"} and "Lutetia" in document.text
    with pytest.raises(FileNotFoundError, match=r"no page 'History of Oslo' .*History_of_Oslo.txt"):
        SnapshotReader().load_data(pages=["History of Paris", "History of Oslo"])


class Live(BaseReader):
    """A WikipediaReader that says how often it was asked."""

    def __init__(self):
        self.asked = []

    def load_data(self, pages):
        self.asked.append(pages)
        return [Document(text=f"All about {pages[0]}.")]


def test_a_live_reader_is_asked_once_and_its_pages_are_frozen(monkeypatch, tmp_path):
    monkeypatch.setenv("SNAPSHOT", str(tmp_path))
    monkeypatch.setenv("JUDGE_MODE", "record")
    live = Live()
    for _ in range(2):
        documents = SnapshotReader(live).load_data(pages=["Oslo", "Bergen"])
    assert [document.text for document in documents] == ["All about Oslo.", "All about Bergen."]
    assert live.asked == [["Oslo"], ["Bergen"]]
    monkeypatch.setenv("JUDGE_MODE", "replay")
    assert SnapshotReader(live).load_data(pages=["Oslo"])[0].text == "All about Oslo."
    with pytest.raises(FileNotFoundError, match="no page 'Trondheim'"):
        SnapshotReader(live).load_data(pages=["Trondheim"])
    assert len(live.asked) == 2


def test_a_snapshot_without_documents_uses_the_bundled_ones(monkeypatch, tmp_path):
    monkeypatch.setenv("SNAPSHOT", str(tmp_path))
    monkeypatch.setenv("JUDGE_MODE", "record")
    assert SnapshotReader().load_data(pages=["History of Tokyo"])[0].text == (
        DATA / "documents" / "History_of_Tokyo.txt"
    ).read_text(encoding="utf-8")


def nodes(n=3):
    documents = [
        Document(text=f"Fact {i} is so.", metadata={"title": f"Page {i}"}) for i in range(n)
    ]
    return SentenceSplitter().get_nodes_from_documents(documents)


class Writer(FakeLive):
    def chat(self, messages, **kwargs):
        response = super().chat(messages)
        if "generate only questions" in messages[-1].content:
            response.message.content = (
                f"Question: What of {messages[-1].content.split('Fact ')[1][0]}?"
            )
        return response


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_the_prompts_are_those_of_llama_index_s_generator(tmp_path):
    """What DatasetGenerator sends for a node, ours sends too."""
    log = CallLog(tmp_path / "ours.jsonl", "record")
    pairs = asyncio.run(write_questions(nodes(), log.llm("m", Writer()), ["Ask one thing."]))
    ours = {row["messages"][-1]["content"] for row in load_rows(log.path)}
    theirs_log = CallLog(tmp_path / "theirs.jsonl", "record")
    generator = DatasetGenerator(
        nodes=nodes(), llm=theirs_log.llm("m", Writer()), question_gen_query="Ask one thing."
    )
    questions = asyncio.run(generator.agenerate_questions_from_nodes())
    theirs = {row["messages"][-1]["content"] for row in load_rows(theirs_log.path)}
    assert theirs == ours
    assert questions == [f"Question: {pair['question']}" for pair in pairs]  # they keep the prefix
    assert [pair["document"] for pair in pairs] == ["Page 0", "Page 1", "Page 2"]


def test_the_instructions_are_taken_in_turn(tmp_path):
    log = CallLog(tmp_path / "c.jsonl", "record")
    asyncio.run(write_questions(nodes(5), log.llm("m", Writer()), ["Ask one.", "Ask two."]))
    prompts = "".join(row["messages"][-1]["content"] for row in log.rows())
    asked = dict(re.findall(r"Fact (\d) is so(?:.|\n)*?Ask (\w+)\.", prompts))
    assert asked == {"0": "one", "1": "two", "2": "one", "3": "two", "4": "one"}


def test_a_reference_is_written_from_its_own_chunk_alone(tmp_path):
    log = CallLog(tmp_path / "c.jsonl", "record")
    asked = [{"question": f"What of {i}?", "document": f"Page {i}"} for i in range(3)]
    pairs = asyncio.run(write_references(nodes(), asked, log.llm("m", FakeLive())))
    for pair, before in zip(pairs, asked, strict=True):
        [row] = [row for row in log.rows() if before["question"] in row["messages"][-1]["content"]]
        assert pair == {**before, "reference": row["response"]}
        facts = re.findall(r"Fact (\d)", row["messages"][-1]["content"])
        assert facts == [before["document"][-1]]


def test_an_empty_reference_names_its_chunk_and_the_way_out(tmp_path):
    class Mute(FakeLive):
        def chat(self, messages, **kwargs):
            response = super().chat(messages)
            if "What of 1?" in messages[-1].content:
                response.message.content = " "
            return response

    asked = [{"question": f"What of {i}?", "document": f"Page {i}"} for i in range(3)]
    llm = CallLog(tmp_path / "c.jsonl", "record").llm("m", Mute())

    with pytest.raises(
        ValueError,
        match="a chunk of 'Page 1': an empty reply .* to 'What of 1\\?'; to ask for it again",
    ):
        asyncio.run(write_references(nodes(), asked, llm))


def test_each_engine_answers_its_question(tmp_path):
    log = CallLog(tmp_path / "c.jsonl", "record")
    all_nodes = nodes()
    engines = [
        (
            f"m{i}",
            SummaryIndex(all_nodes).as_query_engine(
                llm=log.llm(f"m{i}", FakeLive(), system_prompt=f"You are {i}.")
            ),
        )
        for i in range(3)
    ]
    pairs = [
        {"question": f"What of {i}?", "reference": "So.", "document": f"Page {i}"} for i in range(3)
    ]
    rows = asyncio.run(answer_questions(pairs, engines))
    assert [row["response_data"]["model"] for row in rows] == ["m0", "m1", "m2"]
    assert [row["messages"][0]["content"] for row in load_rows(log.path)] == [
        "You are 0.",
        "You are 1.",
        "You are 2.",
    ]
    context = "Fact 0 is so.\n\nFact 1 is so.\n\nFact 2 is so."
    assert rows[2]["response_data"]["context"] == context and rows[2]["document"] == "Page 2"
    with pytest.raises(
        ValueError, match="3 questions and 2 engines: expected an engine a question"
    ):
        asyncio.run(answer_questions(pairs, engines[:2]))


class Near(BaseEmbedding):
    """Texts are the nearer, the nearer their first numbers are."""

    def _get_text_embedding(self, text):
        angle = float(re.search(r"\d+(\.\d+)?", text)[0]) / 10
        return [np.cos(angle), np.sin(angle)]

    def _get_query_embedding(self, query):
        return self._get_text_embedding(query)

    async def _aget_query_embedding(self, query):
        return self._get_text_embedding(query)


def test_each_pipeline_gets_what_its_name_says(tmp_path, monkeypatch):
    log = CallLog(tmp_path / "c.jsonl", "record")

    def ask(instruction=None, **params):
        return log.llm("big", FakeLive(), system_prompt=instruction, params=params)

    def found(text):
        return re.findall(r"(?:Chunk \d is so|Piece [\d.]+\d)\.", text)

    title, question = {"title": "Facts"}, "What of 3.2?"
    chunks = [TextNode(text=f"Chunk {i} is so.", metadata=title) for i in range(6)]
    sentences = [TextNode(text=f"Piece {i}.", metadata=title) for i in (1, 3.1, 3.4)]
    engines = pipelines(chunks, sentences, Near(), ask, log.llm("small", FakeLive()))
    monkeypatch.setattr(
        generate, "embed", lambda texts: np.array([*map(Near()._get_text_embedding, texts)])
    )
    given = {}
    for name, engine in engines.items():
        end = log.end
        [row] = asyncio.run(answer_questions([{"question": question}], [(name, engine)]))
        context = row["response_data"]["context"]
        given[name] = [found(context)]
        for call in log.rows(end):
            texts = [message["content"] for message in call["messages"]]
            assert found(texts[-1]) == found(context) and question in texts[-1]
            assert row["response_data"]["text"] == call["response"]
            told = texts[0] if texts[0] in (PARAGRAPH, BRIEF) else None
            given[name] += [call["model"], told, call["params"]]
        if name == "extractive":
            assert row["response_data"]["text"] == "Chunk 3 is so. Chunk 4 is so.", "no title"
    two = ["Chunk 3 is so.", "Chunk 4 is so."]
    assert given == {
        "old-index": [["Chunk 4 is so."], "big", None, {}],  # it holds chunks 0, 2 and 4
        "old-paragraph": [["Chunk 4 is so.", "Chunk 2 is so."], "big", PARAGRAPH, {}],
        "cut-off": [two, "big", PARAGRAPH, {"max_tokens": 24}],
        "extractive": [two],
        "sentences": [["Piece 3.1."], "big", None, {}],
        "small": [["Piece 3.1."], "small", None, {}],
        "closed-book": [[], "big", BRIEF, {}],
    }
    assert texts == [BRIEF, question] and context == "", "the last one retrieves nothing"


def test_a_closed_book_answers_without_a_context_when_it_is_not_awaited_too(tmp_path):
    engine = ClosedBook(llm=CallLog(tmp_path / "c.jsonl", "record").llm("m", FakeLive()))
    assert str(engine.query("Who?")) == str(asyncio.run(engine.aquery("Who?")))


@pytest.mark.slow
def test_the_bundled_vectors_are_those_of_the_encoder_here():
    """The vectors that a replay takes from the file are the encoder's, to half precision."""
    rows = load_rows(DATA / "single_grading" / "test_qa.jsonl")[::9]
    texts = [
        text
        for row in rows
        for text in (row["question"], row["response_data"]["text"], row["response_data"]["context"])
    ]
    stored = embeddings.read_vectors(embeddings.EMBEDDINGS)
    encoded = np.array(local_embedding().encoder.get_text_embedding_batch(texts))
    assert np.allclose([stored[embeddings._digest(text)] for text in texts], encoded, atol=5e-4)


@pytest.mark.slow
def test_the_encoder_is_loaded_only_for_a_text_that_is_not_there(monkeypatch, tmp_path):
    known = load_rows(DATA / "single_grading" / "test_qa.jsonl")[0]["question"]
    fresh = embeddings.LocalEmbedding()
    first = fresh.get_text_embedding_batch([known, known])
    assert fresh._encoder is None and first[0] == first[1] == fresh.get_query_embedding(known)
    monkeypatch.setenv("KEEP_EMBEDDINGS", str(tmp_path / "kept.npz"))
    new = fresh.get_text_embedding_batch(["A text of nobody's.", known])
    assert fresh._encoder is not None and np.linalg.norm(new[0]) == pytest.approx(1, abs=1e-3)
    monkeypatch.delenv("KEEP_EMBEDDINGS")
    monkeypatch.setattr(embeddings, "EMBEDDINGS", tmp_path / "kept.npz")
    again = embeddings.LocalEmbedding()
    assert (
        again.get_text_embedding_batch(["A text of nobody's.", known]) == new
        and again._encoder is None
    )
