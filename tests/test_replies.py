"""Reading replies: scores, verdicts, distributions, thoughts, chats to learn from, cut-off replies.

`cases.jsonl` holds replies from public reports, retold, each with what is right. `wordings.jsonl`
holds further ones that were made to break the reader, a line each: the reply, what is right (null:
it is invalid), and the ends of the scale (if they are not 1 and 5) or "verdict".
"""

import asyncio
import json
import math
from pathlib import Path

import pytest
from fake import FakeLive, answered
from hypothesis import given, settings
from hypothesis import strategies as st
from llama_index.core.base.llms.types import (
    ChatMessage,
    ChatResponse,
    LogProb,
    TextBlock,
    ThinkingBlock,
)
from llama_index.core.evaluation import CorrectnessEvaluator
from llama_index.core.schema import TextNode

from helpers import (
    CallLog,
    SingleGradingEvaluator,
    SnapshotReader,
    check_events,
    fill,
    finetuning_events,
    invalid_judgements,
    judge_rows,
    load_rows,
    read_score,
    read_score_tokens,
    save_events,
    save_rows,
    write_questions,
)
from helpers.log import Collected
from helpers.replies import cut_off, lines_to_score, read_verdict, without_thought
from helpers.rows import DATA, DamagedFile

HERE = Path(__file__).parent
CASES = {case["id"]: case for case in load_rows(HERE / "cases.jsonl")}
WORDINGS = [json.loads(line) for line in (HERE / "wordings.jsonl").read_text("utf-8").splitlines()]


def read(reply, *form):
    return read_verdict(reply) if form == ("verdict",) else read_score(reply, *form)


def form_of(case) -> tuple | None:
    """How a case's reply is read; None where the case is no reply to a reader."""
    call = case["input"]["call"]
    if call == "read_verdict(reply)":
        return ("verdict",)
    if call.startswith("read_score(reply"):
        return tuple(map(float, call.strip(")").split(", ")[1:]))
    return None


@pytest.mark.parametrize("id", [id for id, case in CASES.items() if form_of(case)])
def test_a_case_from_the_reports(id):
    case = CASES[id]
    value, reason = read(case["input"]["reply"], *form_of(case))
    assert value == (None if case["expected"] == "invalid" else case["expected"]), case["kind"]
    assert (value is None) == bool(reason)


def test_every_case_has_a_test():
    others = {id for id, case in CASES.items() if not form_of(case)}
    tested = "c106 c108 c109 c111 c112 c113 c115 c117 c118 c119".split()
    assert len(CASES) == 79 and others == set(tested)


@pytest.mark.parametrize("wording", WORDINGS, ids=lambda wording: repr(wording[0])[:60])
def test_a_wording_made_to_break_the_reader(wording):
    reply, right, *form = wording
    value = read(reply, *form)[0]
    assert value == (right if isinstance(right, str | None) else pytest.approx(right))


@settings(max_examples=300, deadline=None)
@given(st.text(max_size=300))
def test_any_text_is_read_or_refused_with_a_reason(text):
    for form in ((), (0, 1), (0, 100), ("verdict",)):
        value, reason = read(text, *form)
        assert (value is None) == (reason is not None)


@settings(max_examples=100, deadline=None)
@given(st.sampled_from([wording[0] for wording in WORDINGS]), st.sampled_from("12345"))
def test_a_second_score_is_never_passed_over(reply, second):
    """Whatever a reply says, a plain score after it that differs makes it invalid."""
    first = read_score(reply)[0]
    value = read_score(f"{reply}\n\nFinal score: {second}")[0]
    assert value in (None, float(second)) and (first is None or value in (None, first))


@pytest.mark.parametrize(
    "word", ["I give ", "a score of ", "answer says ", "not ", "| a ", "( ", "[[A]] "]
)
def test_a_reply_that_runs_in_circles_is_read_in_time(word):
    """A model may repeat itself up to its cap: no pattern may take more than linear time."""
    text = word * (12_000 // len(word))
    assert read_score(text)[0] is None
    read_verdict(text)


# Tests that were there before the tables


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
def test_a_score_that_a_person_would_read_is_read(reply, score):
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
def test_a_reply_without_a_plain_score_is_invalid_with_a_reason(reply, reason):
    assert read_score(reply) == (None, reason)


def test_another_scale():
    assert read_score("0.8", 0, 1) == (0.8, None)
    assert read_score("4", 0, 1) == (None, "score 4 is outside 0 to 1")


@pytest.mark.parametrize(
    "reply, score",
    [
        ("0.8\nFine.", 0.8),
        ("85 %", 0.85),
        ("85%\nGood.", 0.85),
        ("0.8/1", 0.8),
        ("8/10", 0.8),
        ("Score: 90 percent", 0.9),
        ("**1.0**", 1.0),
        (".7", 0.7),
        ("0,7", 0.7),
        ("0", 0.0),
        ("1", 1.0),
        ("Score: 0.5/1.0\nHalf.", 0.5),
        ("0.6 - half of it", 0.6),
    ],
)
def test_what_is_fairly_readable_on_a_scale_to_one_is_read(reply, score):
    assert read_score(reply, 0, 1) == (score, None)


def test_a_share_is_the_number_that_it_says():
    """70 % as 0.7000000000000001 would be another label than 0.7."""
    assert [read_score(f"{k}%", 0, 1)[0] for k in range(101)] == [k / 100 for k in range(101)]
    assert read_score("49/49", 0, 1)[0] == 1


@pytest.mark.parametrize(
    "reply, reason",
    [
        ("1.2\nSplendid", "score 1.2 is outside 0 to 1"),
        ("-0.1", "score -0.1 is outside 0 to 1"),
        ("120 %", "score 1.2 is outside 0 to 1"),
        ("85\nGood", "score 85 is outside 0 to 1"),
        ("I would rather not grade this.", "no score in the reply"),
        ("", "empty reply"),
        ("0.4\nor rather\n0.6", "more than one score in the reply: 0.4, 0.6"),
        ("3/0", "score out of 0, expected out of 1"),
    ],
)
def test_the_rest_is_invalid_with_a_reason(reply, reason):
    assert read_score(reply, 0, 1) == (None, reason)


def test_a_share_is_no_score_where_the_scale_does_not_begin_at_zero():
    assert read_score("80 %", 1, 5) == (None, "score out of 100, expected out of 5")
    assert read_score("8/10", 1, 5) == (None, "score out of 10, expected out of 5")


def tokens(*places):
    return [
        [LogProb(token=token, logprob=math.log(p)) for token, p in place.items()]
        for place in places
    ]


def test_token_probabilities_become_a_distribution():
    distribution, reason = read_score_tokens(
        tokens({"90": 0.6, " 70": 0.2, "\n90": 0.1, "The": 0.1}, {"\n": 1.0})
    )
    assert reason is None and distribution == {
        70: pytest.approx(0.2 / 0.9),
        90: pytest.approx(0.7 / 0.9),
    }
    assert list(read_score_tokens(tokens({"Score": 1.0}, {":": 1.0}, {" 80": 1.0}))[0]) == [80]
    # Where other words were likelier than numbers, the place of the score is further on.
    assert read_score_tokens(tokens({"Score": 0.9, "10": 0.1}, {" 30": 1.0}))[0] == {30: 1.0}
    assert read_score_tokens(tokens({"0.9": 0.5, "1": 0.5}), high=1)[0] == {0.9: 0.5, 1: 0.5}


@pytest.mark.parametrize(
    "given, reason",
    [
        (tokens({"0": 1.0}, {".": 1.0}, {"85": 1.0}), "spread over several tokens"),
        (tokens({"8": 1.0}, {"5": 1.0}), "spread over several"),
        (tokens({"The": 1.0}), "no log-probabilities of a score"),
        ([], "no log-probabilities of a score"),
        (
            tokens({"90": 0.4, "x": 0.3, "y": 0.3}),
            "only 40% of the probability is on scores from 0 to 100",
        ),
        (tokens({"300": 0.6, "90": 0.4}), "only 40%"),
    ],
)
def test_token_probabilities_that_say_too_little_are_invalid(given, reason):
    distribution, said = read_score_tokens(given)
    assert distribution == {} and reason in said


@pytest.mark.parametrize(
    "reply, verdict",
    [
        ("[[A]]", "A"),
        ("Because.\n\nFinal Verdict: [[B]]", "B"),
        ("x\n[[ A ]]", "A"),
        ("[[a]]", "A"),
        ("**[[C]]**", "C"),
        ("Final verdict: [[C]] for a tie.", "C"),
        ("The verdict is [[B]].", "B"),
        ("So A is better: [[A]].", "A"),
        ("[[A]] or [[B]]?\nFinal Verdict: [[B]]", "B"),
        ("First I thought [[A]].\nBut: [[B]]", "B"),
        ("[[A]]\nSince B is wrong.", "A"),
        ("[[A]] - it is right.", "A"),
        ("<think>\nMaybe [[A]]\n</think>\nB is better: [[B]]", "B"),
    ],
)
def test_a_verdict_is_read_by_the_last_line_that_is_one(reply, verdict):
    assert read_verdict(reply) == (verdict, None)


@pytest.mark.parametrize(
    "reply, reason",
    [
        ("<think>\nMaybe [[A]]\n</think>\nB is better.", "no verdict in the reply"),
        ("", "empty reply"),
        ("A is better.", "no verdict in the reply"),
        ("[A]", "no verdict in the reply"),
        ("[[D]]", "no verdict in the reply"),
        ("[[B]] because not [[A]]", "more than one verdict in the reply"),
        ("[[C]] rather than [[A]]", "more than one verdict in the reply"),
        ("It is not [[A]]", "a verdict only in passing"),
        ("better than [[A]].", "a verdict only in passing"),
        ("'[[A]]' if assistant A is better", "a verdict only in passing"),
    ],
)
def test_what_is_no_verdict_is_invalid_with_a_reason(reply, reason):
    assert read_verdict(reply) == (None, reason)


# Log-probabilities


class Says(FakeLive):
    """Replies with a text and the alternatives at each place."""

    def __init__(self, text, *places):
        super().__init__()
        self.__dict__["said"] = (
            text,
            [place if isinstance(place, list) else tokens(place)[0] for place in places],
        )

    def chat(self, messages, **kwargs):
        text, places = self.__dict__["said"]
        return ChatResponse(message=ChatMessage(role="assistant", content=text), logprobs=places)

    async def achat(self, messages, **kwargs):
        return self.chat(messages)


def graded(llm, tmp_path=None):
    if tmp_path:
        llm = CallLog(tmp_path / "calls.jsonl", "record").llm("m", llm)
    return asyncio.run(
        SingleGradingEvaluator(llm, "x", scale=100, logprobs=True).grade("q", "c", "a")
    )


SURE = {"Of": 1.0}, {" ": 1.0}, {"3": 1.0}, {" claims all hold. Score:": 1.0}, {" ": 1.0}


def test_the_distribution_is_that_of_the_score_that_was_read():
    """c109"""
    place = {"85": 0.9, "90": 0.1}
    found = graded(Says("Of 3 claims all hold. Score: 85", *SURE, place))
    assert found["score"] == 0.85
    assert found["distribution"] == [[0.85, pytest.approx(0.9)], [0.9, pytest.approx(0.1)]]
    again = graded(
        Says("85 of 85 hold.\nScore: 85", {"85": 1.0}, {" of 85 hold.\nScore: ": 1.0}, place)
    )
    assert again["distribution"] == found["distribution"]


def test_the_log_keeps_the_log_probabilities_up_to_the_score(tmp_path):
    """c111"""
    places = (
        {"Score": 1.0},
        {":": 1.0},
        {"\n": 1.0},
        {"85": 0.9, "90": 0.1},
        {"\n": 1.0},
        {"Good": 1.0},
    )
    found = graded(Says("Score:\n85\nGood", *places), tmp_path)
    assert (found["score"], len(found["distribution"])) == (0.85, 2)
    assert len(load_rows(tmp_path / "calls.jsonl")[0]["logprobs"]) == 5, (
        "none after the score's line"
    )
    assert [lines_to_score(text) for text in ("85\nok", "\n\n85\nok", "No.\nNo.", "")] == [
        1,
        3,
        1,
        1,
    ]


def test_a_token_that_is_listed_twice_counts_once(tmp_path):
    """c112"""
    twice = [
        LogProb(token=t, logprob=math.log(p)) for t, p in (("85", 0.9), ("90", 0.05), ("85", 0.001))
    ]
    assert graded(Says("85\nok", twice, {"\n": 1.0}, {"ok": 1.0}), tmp_path)["score"] == 0.85
    [(low, share), _] = read_score_tokens([twice])[0].items()
    assert (low, share) == (85, pytest.approx(0.9 / 0.95))


@pytest.mark.parametrize(
    "given, high, scores",
    [
        (tokens({"90": 0.9, "80": 0.1}, {".\n": 1.0}, {"Good": 1.0}), 100, [80, 90]),
        (tokens({"80%": 0.6, "0.8": 0.4}), 1, [0.8]),
        (
            tokens({"Score": 1.0}, {": ": 1.0}, {"85": 0.9, "4": 0.1}, {"/": 1.0}, {"100": 1.0}),
            100,
            [4, 85],
        ),
        (
            tokens({"My": 1.0}) + [[]] + tokens({" Score: ": 1.0}, {"85": 0.8, "90": 0.2}),
            100,
            [85, 90],
        ),
        (tokens({"[[": 1.0}, {"85": 0.8, "90": 0.2}, {"]]": 1.0}), 100, [85, 90]),
        (tokens({"85": 1.0}, {". Final score: ": 1.0}, {"85": 1.0}), 100, [85]),
    ],
)
def test_the_place_of_the_score_is_found(given, high, scores):
    assert list(read_score_tokens(given, high)[0]) == scores


@pytest.mark.parametrize(
    "given",
    [
        tokens({".": 1.0}, {"85": 1.0}),
        tokens({"0": 1.0}, {".85": 1.0}),
        tokens({"8": 1.0}, {"5": 1.0}),
    ],
)
@pytest.mark.parametrize("before", ["", "Score: "])
def test_a_score_of_several_tokens_is_refused(given, before):
    lead = tokens({before: 1.0}) if before else []
    for high in (1, 100):
        assert "spread over several tokens" in read_score_tokens(lead + given, high)[1]


def test_an_unknown_token_shifts_no_place():
    places = [[], *tokens({"85": 0.8, "90": 0.2}, {"\n": 1.0})]
    for reply in ("Score: 85\n", " 85\n"):
        assert list(read_score_tokens(places, reply=reply)[0]) == [85, 90]
    assert read_score_tokens(places, reply="85.5\n")[1], "a token may hide that the number goes on"


# Thoughts


@pytest.mark.parametrize(
    "reply",
    [
        "<think>Is it 2?</think>\n\n4",
        "Is it 2?\n</think>\n\n4",
        "<thinking>\n2\n</thinking>4",
        "<reasoning>2</reasoning>\n4",
        "[THINK]2[/THINK]4",
        "<think>a <think>b</think> 2</think>4",
        "<|channel|>analysis<|message|>2<|end|><|start|>assistant<|channel|>final<|message|>4",
    ],
)
def test_a_thought_is_cut(reply):
    assert without_thought(reply) == "4"


def test_a_thought_that_does_not_end_leaves_nothing():
    assert without_thought("<think>\n4") == "" and read_score("<think>4")[1] == "empty reply"
    assert without_thought("I think 4 < 5.") == "I think 4 < 5."


class Thinks(FakeLive):
    """Replies with a thought, in a field of its own or in the text."""

    def __init__(self, text, block=True):
        super().__init__()
        self.__dict__["said"] = text, block

    def chat(self, messages, **kwargs):
        text, block = self.__dict__["said"]
        blocks = [ThinkingBlock(content="2?"), TextBlock(text=text)]
        text = f"Hm: What is 2?\n</think>\n\n{text}"
        message = ChatMessage(
            role="assistant", **({"blocks": blocks} if block else {"content": text})
        )
        return ChatResponse(message=message)


@pytest.mark.parametrize("block", [True, False])
def test_no_thought_is_judged_asked_answered_or_learnt(tmp_path, rows, block):
    log = CallLog(tmp_path / "c.jsonl", "record")
    judge = CorrectnessEvaluator(llm=log.llm("m", Thinks("4\nGood.", block)))
    with finetuning_events() as events:
        judged = asyncio.run(judge_rows(rows[:1], judge, name="t"))
    assert judged[0]["evaluations"][0]["score"] == 4
    assert events[0]["messages"][-1]["content"] == "4\nGood."
    node = TextNode(text="A chunk.", metadata={"title": "d"})
    [asked] = asyncio.run(write_questions([node], log.llm("q", Thinks("Why 4?", block)), ["Ask."]))
    assert asked["question"] == "Why 4?"
    pair = {"question": "Why?", "context": "A chunk."}
    [row] = answered(log.llm("a", Thinks("So.", block)), pair)
    assert row["response_data"]["text"] == "So."


# Whole replies


@pytest.mark.parametrize(
    "reason",
    [
        None,
        "",
        "stop",
        "STOP",
        "FINISH_REASON_STOP",
        "FinishReason.STOP",
        "end_turn",
        "stop_sequence",
    ]
    + ["eos", "eos_token", "COMPLETE", "completed"],
)
def test_a_reply_that_ended_by_itself_is_whole(reason):
    assert cut_off(reason) is None


@pytest.mark.parametrize(
    "reason",
    [
        "length",
        "max_tokens",
        "MAX_TOKENS",
        "content_filter",
        "SAFETY",
        "tool_calls",
        "refusal",
        "error",
    ],
)
def test_any_other_finish_reason_is_named(tmp_path, rows, reason):
    assert cut_off(reason) == f"cut off (finish_reason {reason})"

    class Cut(FakeLive):
        def chat(self, messages, **kwargs):
            response = super().chat(messages)
            response.raw = {"stop_reason": reason}
            return response

    judge = CorrectnessEvaluator(llm=CallLog(tmp_path / "c.jsonl", "record").llm("m", Cut()))
    with finetuning_events() as events:
        [row] = asyncio.run(judge_rows(rows[:1], judge, name="t"))
    assert row["evaluations"][0]["invalid"] == cut_off(reason) and events == []


def test_unread_replies_are_counted_by_judge_and_reason():
    said = {
        "a": ["score 7 is outside 1 to 5", "score -8.5 is outside 1 to 5", "empty reply", None],
        "b": ["original: empty reply; flipped: the call failed: 500; try again"],
    }
    rows = [
        {"evaluations": [{"llm": judge, "score": None, "invalid": reason}]}
        if reason
        else {"evaluations": [{"llm": judge, "score": 3.0}]}
        for judge, reasons in said.items()
        for reason in reasons
    ]
    table = invalid_judgements([*rows, {"question": "?"}])
    assert table.loc["a"].tolist() == [4, 3, "2 x score # is outside # to #; 1 x empty reply"]
    failed = "1 x empty reply; 1 x the call failed: #; try again"
    assert table.loc["b"].tolist() == [1, 1, failed]


# Chats to learn from, and results of a batch


@pytest.fixture
def chats():
    return load_rows(DATA / "correctness" / "correction_finetuning_events.jsonl")[:12]


@pytest.mark.parametrize(
    "change, said",
    [
        ({"content": "So <|fim_suffix|> it is."}, r"holds <\|fim_suffix\|>, a special token"),
        ({"content": "<|endoftext|>"}, r"holds <\|endoftext\|>, a special token"),
        ({"weight": 5}, "has the weight 5, expected 0 or 1"),
        ({"weight": 0.5}, "has the weight 0.5"),
        ({"weight": None}, "has the weight None"),
        ({"content": None, "tool_calls": [{"id": "x"}]}, "calls a tool"),
        ({"content": "", "function_call": {"name": "x"}}, "calls a tool"),
    ],
)
@pytest.mark.parametrize("place, role", [(1, "user"), (2, "assistant")])
def test_a_chat_that_cannot_be_learnt_from_is_refused_by_line(
    tmp_path, chats, change, said, place, role
):
    """c115"""
    chats[4]["messages"][place] |= change
    save_rows(tmp_path / "x.jsonl", chats)
    with pytest.raises(DamagedFile, match=f"line 5: the {role} message {said}"):
        check_events(tmp_path / "x.jsonl")


def test_a_chat_of_weight_0_is_not_learnt_from(tmp_path, chats):
    """c117"""
    chats[0]["messages"][2]["weight"], chats[1]["messages"][2]["weight"] = 0, 1
    save_events(tmp_path / "x.jsonl", chats)
    assert check_events(tmp_path / "x.jsonl") == chats[1:]
    for chat in chats:
        chat["messages"][2]["weight"] = 0
    save_events(tmp_path / "x.jsonl", chats)
    with pytest.raises(
        DamagedFile, match=r"0 examples \(12 more have the weight 0\), expected at least 10"
    ):
        check_events(tmp_path / "x.jsonl")


def collected(tmp_path, rows):
    """A log, and what waits for an answer."""
    log = CallLog(tmp_path / "calls.jsonl", "collect")
    with pytest.raises(Collected):
        asyncio.run(judge_rows(rows, CorrectnessEvaluator(llm=log.llm("m")), name="t"))
    return log, [request["custom_id"] for request in load_rows(log.requests_path)]


def result(name, content, **more):
    choice = {"message": {"role": "assistant", "content": content}, "finish_reason": "stop", **more}
    return {"custom_id": name, "response": {"status_code": 200, "body": {"choices": [choice]}}}


def test_half_a_character_loses_no_reply(tmp_path, rows):
    """c106"""
    log, names = collected(tmp_path, rows[:2])
    lines = [result(names[0], "4\nfine \ud83d"), result(names[1], "3\nok")]
    (tmp_path / "results.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert fill(log, tmp_path / "results.jsonl") == []
    again = CallLog(log.path, "replay")
    done = asyncio.run(judge_rows(rows[:2], CorrectnessEvaluator(llm=again.llm("m")), name="t"))
    assert [row["evaluations"][0]["score"] for row in done] == [4, 3]
    assert done[0]["evaluations"][0]["text"] == "4\nfine \ud83d"


@pytest.mark.parametrize("mode", ["record", "collect"])
def test_half_a_character_in_a_question_is_sent(tmp_path, rows, mode):
    """c108"""
    rows[0]["question"] = json.loads('"Why \\udcb2?"')
    log, live = CallLog(tmp_path / "c.jsonl", mode), Says("4")
    job = judge_rows(rows[:1], CorrectnessEvaluator(llm=log.llm("m", live)), name="t")
    if mode == "collect":
        with pytest.raises(Collected):
            asyncio.run(job)
        assert "\udcb2" in load_rows(log.requests_path)[0]["body"]["messages"][1]["content"]
    else:
        assert asyncio.run(job)[0]["evaluations"][0]["score"]
        save_rows(tmp_path / "rows.jsonl", rows)
        assert load_rows(tmp_path / "rows.jsonl") == rows


def test_a_result_without_alternatives_is_taken(tmp_path, rows):
    """c113"""
    log, names = collected(tmp_path, rows[:1])
    token = {"token": "4", "logprob": -0.1, "bytes": [52]}
    save_rows(tmp_path / "results.jsonl", [result(names[0], "4", logprobs={"content": [token]})])
    assert fill(log, tmp_path / "results.jsonl") == []
    [row] = log.rows()
    assert row["response"] == "4" and "logprobs" not in row


def test_a_result_whose_id_is_no_text_is_one_complaint(tmp_path, rows):
    """c119"""
    log, names = collected(tmp_path, rows[:1])
    save_rows(tmp_path / "results.jsonl", [result(["x"], "3"), result(names[0], "4")])
    [wrong] = fill(log, tmp_path / "results.jsonl")
    assert "line 1: not a result" in wrong and "custom_id is not text" in wrong
    assert [row["response"] for row in log.rows()] == ["4"]


def test_two_titles_are_two_files(tmp_path, monkeypatch):
    """c118"""
    from llama_index.core.schema import Document

    class Live:
        def load_data(self, pages, **settings):
            return [Document(text=f"About {pages[0]}.")]

    monkeypatch.setenv("JUDGE_MODE", "record")
    monkeypatch.setenv("SNAPSHOT", str(tmp_path / "snapshot"))
    reader = SnapshotReader(live=Live())
    texts = [reader.load_data(pages=[title])[0].text for title in ("AC/DC", "AC DC")]
    assert texts == ["About AC/DC.", "About AC DC."]
