"""Reading replies, and judging rows."""

import asyncio

import pytest
from llama_index.core.evaluation import CorrectnessEvaluator, FaithfulnessEvaluator
from llama_index.core.llms import MockLLM

from helpers import CallLog, invalid_judgements, judge_rows, read_score
from helpers.log import make_row
from helpers.student import LocalJudge


@pytest.mark.parametrize(
    "reply, score",
    [
        ("4.5", 4.5),
        ("4.0\nFine.", 4),
        ("\n\n3\nMeh.", 3),
        ("Score: 4", 4),
        ("Score: 4\nAll there.", 4),
        ("**4.0**\nGood.", 4),
        ("**Score:** 3.5\nHalf.", 3.5),
        ("4/5", 4),
        ("4 / 5\nok", 4),
        ("3,5\nHalf a point less.", 3.5),
        ("Final score: 2", 2),
        ("The score is 4.", 4),
        ("I would give this a score of 4 because 1906 is right.", 4),
        ("My rating: 4 out of 5.", 4),
        ("4 - the year is wrong by 2", 4),
        ("4: 3 of 5 are right", 4),
        ("A score of 4 is deserved.", 4),
        ("4.5: right", 4.5),
        ("# 5\nPerfect.", 5),
        ("[5]\nPerfect.", 5),
        ("1", 1),
        ("5.0.", 5),
        ("4.0\nIt names 3 of 5 parts, in 1906.", 4),
        ("2.0\nScore: 2.0", 2),
        ("4.0\n\n## Reasoning\n1. It is right.", 4),
        ("<think>\n3.0\nor so?\n</think>\n4.0\nGood.", 4),
        ("4 out of 5 stars", 4),
        ("Score (1-5): 4", 4),
    ],
)
def test_what_is_fairly_readable_is_read(reply, score):
    assert read_score(reply) == (score, None)


@pytest.mark.parametrize(
    "reply, reason",
    [
        ("", "empty reply"),
        ("1,000", "no score in the reply"),
        ("Score: 1,000", "no score in the reply"),
        ("<think>\nI start with\n3.0", "empty reply"),
        (" \n ", "empty reply"),
        ("I cannot judge this.", "no score in the reply"),
        ("The earthquake of 1906 killed 3,000.", "no score in the reply"),
        ("nan", "no score in the reply"),
        ("inf\nHuge", "no score in the reply"),
        ("7.5\nSplendid", "score 7.5 is outside 1 to 5"),
        ("0\nBad", "score 0 is outside 1 to 5"),
        ("-3", "score -3 is outside 1 to 5"),
        ("1000", "score 1000 is outside 1 to 5"),
        ("2.0\nNo, better:\n3.0", "more than one score in the reply: 2.0, 3.0"),
        ("8/10", "score out of 10, expected out of 5"),
        ("between 2 and 3", "no score in the reply"),
        ("four", "no score in the reply"),
        ("4 - 5", "no score in the reply"),
        ("Score: 4-5", "no score in the reply"),
        ("Score: 3 or 4", "no score in the reply"),
        ("My score is 3 to 4.", "no score in the reply"),
        ("Score: 4.5.1", "no score in the reply"),
        ("4:30 is when it opens", "no score in the reply"),
        ("A score of 5 would need all three dates; this answer has one.", "no score in the reply"),
        ("A score of 5 is not deserved.", "no score in the reply"),
    ],
)
def test_the_rest_is_invalid_with_a_reason(reply, reason):
    assert read_score(reply) == (None, reason)


def test_another_scale():
    assert read_score("0.8", 0, 1) == (0.8, None)
    assert read_score("4", 0, 1) == (None, "score 4 is outside 0 to 1")


def test_a_reply_is_kept_whole_and_never_defaulted(tmp_path, rows):
    replies = ["4.5", "Score: 3\nWell.", "no idea", "7\nGreat"] * 3
    log = CallLog(tmp_path / "c.jsonl", "collect")

    class Echo(MockLLM):
        def complete(self, prompt, formatted=False, **kwargs):
            number = int(prompt.split("Question ")[1].split("?")[0])
            return super().complete(replies[number], formatted=True)

    log.mode = "record"
    evaluator = CorrectnessEvaluator(llm=log.llm("m", Echo()))
    done = asyncio.run(judge_rows(rows, evaluator, name="t"))
    assert [row["evaluations"][0]["score"] for row in done] == [4.5, 3, None, None] * 3
    assert [row["evaluations"][0]["text"] for row in done] == replies
    assert (
        done[2]["evaluations"][0]["invalid"] == "no score in the reply"
        and "invalid" not in done[0]["evaluations"][0]
    )
    table = invalid_judgements(done)
    assert table.loc["t"].tolist() == [12, 6, "no score in the reply; score 7 is outside 1 to 5"]
    with pytest.raises(
        ValueError
    ):  # the evaluator itself is left as it was, with a parser that fails on a bare "4.5"
        asyncio.run(evaluator.aevaluate(query="Question 0?", response="a", reference="r"))


def constant(score: float) -> CorrectnessEvaluator:
    return CorrectnessEvaluator(llm=LocalJudge(lambda item: (score, "because"), model_name="c"))


def test_evaluations_add_up_and_replace_their_own_kind(rows):
    once = asyncio.run(judge_rows(rows, constant(2), name="a"))
    twice = asyncio.run(judge_rows(once, constant(3), name="b"))
    again = asyncio.run(judge_rows(twice, constant(4), name="a"))
    assert "evaluations" not in rows[0] and len(once[0]["evaluations"]) == 1
    assert [(e["llm"], e["score"]) for e in again[0]["evaluations"]] == [("b", 3), ("a", 4)]


@pytest.mark.parametrize(
    "change, said",
    [
        (lambda row: row.pop("reference"), "row 7: reference must be a text, found None"),
        (lambda row: row.update(question=" "), "row 7: question must be a text, found ' '"),
        (
            lambda row: row.update(response_data="text"),
            "row 7: response_data.text must be a text, found None",
        ),
        (
            lambda row: row["response_data"].update(text=3),
            "row 7: response_data.text must be a text, found 3",
        ),
    ],
)
def test_a_bad_row_is_named_before_anything_is_asked(rows, change, said):
    change(rows[7])
    with pytest.raises(ValueError, match=said):
        asyncio.run(judge_rows(rows, constant(3), name="a"))


def test_an_empty_answer_is_judged(rows):
    rows[0]["response_data"]["text"] = ""
    assert asyncio.run(judge_rows(rows, constant(1), name="a"))[0]["evaluations"][0]["score"] == 1


def test_another_evaluator_is_refused(rows):
    with pytest.raises(TypeError, match="FaithfulnessEvaluator"):
        asyncio.run(judge_rows(rows, FaithfulnessEvaluator(llm=MockLLM()), name="a"))


def test_rows_are_made_to_be_used(rows):
    assert make_row({"model": "m", "messages": [], "params": {}, "sample": 0}, "x")["v"] == 1
