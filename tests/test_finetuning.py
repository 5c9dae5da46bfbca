"""Events, the fine-tuning file, and the local engine."""

import asyncio
import json

import pytest
from fake import FakeLive
from llama_index.core.callbacks import CallbackManager
from llama_index.core.evaluation import CorrectnessEvaluator

from helpers import (
    CallLog,
    LocalFinetuneEngine,
    check_events,
    count_tokens,
    finetuning_events,
    judge_rows,
    load_rows,
    save_events,
    training_cost,
)
from helpers.finetune import majority
from helpers.rows import DATA, DamagedFile


@pytest.fixture
def events(tmp_path, rows):
    async def go():
        with finetuning_events() as events:
            await judge_rows(
                rows,
                CorrectnessEvaluator(
                    llm=CallLog(tmp_path / "c.jsonl", "record").llm("m", FakeLive())
                ),
                name="t",
            )
        return events

    return asyncio.run(go())


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_sequential_run_writes_what_llama_index_s_handler_writes(tmp_path, rows):
    import logging

    root = logging.getLogger()
    before = root.handlers[:], root.level
    from llama_index.finetuning.callbacks import OpenAIFineTuningHandler

    root.handlers[:], root.level = before  # the import adds handlers to the root logger
    rows[3]["response_data"]["text"] = 'Café – ‘quoted’ \u2028 日本 \\ "x"'

    async def go():
        handler = OpenAIFineTuningHandler()
        llm = CallLog(tmp_path / "c.jsonl", "record").llm("m", FakeLive())
        llm.callback_manager = CallbackManager([handler])
        with finetuning_events() as events:
            await judge_rows(rows, CorrectnessEvaluator(llm=llm), name="t", concurrency=1)
        handler.save_finetuning_events(str(tmp_path / "theirs.jsonl"))
        save_events(tmp_path / "ours.jsonl", events)

    asyncio.run(go())
    assert (tmp_path / "ours.jsonl").read_bytes() == (tmp_path / "theirs.jsonl").read_bytes()
    assert len(check_events(tmp_path / "ours.jsonl")) == len(rows)


def test_what_runs_outside_the_block_leaves_no_event(tmp_path, rows, events):
    assert len(events) == len(rows)
    llm = CallLog(tmp_path / "c.jsonl", "replay").llm("m")
    asyncio.run(judge_rows(rows, CorrectnessEvaluator(llm=llm), name="student"))
    assert len(events) == len(rows)


@pytest.mark.parametrize(
    "change, said",
    [
        (lambda e: e.clear(), "x.jsonl: 0 examples, expected at least 10"),
        (lambda e: e.__delitem__(slice(9, None)), "x.jsonl: 9 examples, expected at least 10"),
        (
            lambda e: e[4]["messages"].pop(0),
            r"line 5: expected messages of the roles system, user, assistant; "
            r"found \['user', 'assistant'\]",
        ),
        (lambda e: e[11]["messages"].pop(), "line 12: expected messages"),
        (lambda e: e[2].pop("messages"), "line 3: expected messages .* found None"),
        (lambda e: e[2].update(messages=["a", "b", "c"]), "line 3: expected messages"),
        (
            lambda e: e[2]["messages"][2].update(content=" "),
            "line 3: the assistant message is empty",
        ),
        (lambda e: e[2]["messages"][1].update(content=None), "line 3: the user message is empty"),
        (
            lambda e: e[6]["messages"][2].update(content="No idea."),
            "line 7: cannot learn from the reply: no score in the reply",
        ),
        (
            lambda e: e[6]["messages"][1].update(content="What?"),
            "line 7: a local judge reads CorrectnessEvaluator's prompt",
        ),
    ],
)
def test_a_bad_fine_tuning_file_says_which_line(tmp_path, events, change, said):
    change(events)
    (tmp_path / "x.jsonl").write_text(
        "".join(json.dumps(event) + "\n" for event in events), encoding="utf-8"
    )
    with pytest.raises(DamagedFile, match=said):
        LocalFinetuneEngine("minilm", tmp_path / "x.jsonl").finetune()


def test_tokens_and_cost(monkeypatch):
    event = {
        "messages": [
            {"role": role, "content": "one two"} for role in ("system", "user", "assistant")
        ]
    }
    assert count_tokens([event] * 2) == [3 + 3 * (3 + 1 + 2)] * 2
    monkeypatch.setenv("PRICES", "gpt-4.1=2/8/99")
    cost = training_cost([event] * 1000)
    assert cost.loc["gpt-4.1", "$ per million"] == 99
    assert cost.loc["gpt-4o-mini", "tokens"] == 63_000
    assert cost.loc["gpt-4o-mini", "$"] == pytest.approx(63_000 * 3 / 1e6, abs=0.01)


def test_the_engine_has_the_face_of_openai_s(tmp_path):
    chats = load_rows(DATA / "correctness" / "correction_finetuning_events.jsonl")[:20]
    save_events(tmp_path / "x.jsonl", chats)
    engine = LocalFinetuneEngine(base_model="minilm", data_path=tmp_path / "x.jsonl", alpha=1.0)
    for early in (engine.get_current_job, engine.get_finetuned_model):
        with pytest.raises(ValueError, match=r"call finetune\(\) first"):
            early()
    engine.finetune()
    job = engine.get_current_job()
    assert (job.status, job.trained_examples, job.training_file) == (
        "succeeded",
        len(chats),
        "x.jsonl",
    )
    rows = load_rows(DATA / "correctness" / "test_qa.jsonl")[:12]  # they need no encoder
    done = asyncio.run(
        judge_rows(rows, CorrectnessEvaluator(llm=engine.get_finetuned_model()), name="student")
    )
    assert all(1 <= row["evaluations"][-1]["score"] <= 5 for row in done)
    with pytest.raises(ValueError, match="'gpt-4'"):
        LocalFinetuneEngine("gpt-4", tmp_path / "x.jsonl")


def test_contradicting_verdicts_on_one_prompt_are_a_tie():
    """As when two answers are the same, and both orders are kept."""
    assert (
        majority({"A": 0.5, "B": 0.5}) == "C" == majority({"C": 1.0})
        and majority({"A": 1 / 3, "B": 2 / 3}) == "B"
    )
    assert majority({"C": 0.4, "A": 0.4, "B": 0.2}) == "C"


def test_a_block_within_a_block_leaves_the_outer_one_whole(tmp_path, rows):
    judge = CorrectnessEvaluator(
        llm=CallLog(tmp_path / "c.jsonl", "record").llm("m", FakeLive(), params={"temperature": 0})
    )
    with finetuning_events() as outer:
        asyncio.run(judge_rows(rows[:2], judge, name="a"))
        with finetuning_events() as inner:
            asyncio.run(judge_rows(rows[2:5], judge, name="b"))
        asyncio.run(judge_rows(rows[5:6], judge, name="c"))
    assert (len(inner), len(outer)) == (3, 6)
