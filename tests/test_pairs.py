"""Pairs: verdicts, both orders, the chats to keep, the antisymmetric student, the metrics."""

import asyncio
import json
from itertools import product

import numpy as np
import pytest
from fake import FakeLive, answered
from hypothesis import given, settings
from hypothesis import strategies as st
from llama_index.core.evaluation import PairwiseComparisonEvaluator
from scipy.stats import ttest_1samp
from sklearn.metrics import cohen_kappa_score, jaccard_score

from helpers import (
    CallLog,
    LocalFinetuneEngine,
    PairJudge,
    check_events,
    compare_pair_students,
    finetuning_events,
    judge_rows,
    length_report,
    load_rows,
    metrics,
    order_table,
    pair_scores,
    pair_up,
    pairwise_report,
    position_report,
    resolve_pairwise_events,
    save_events,
    show_pair,
    untrained_pair_judges,
)
from helpers.judge import resolve_orders
from helpers.pair_metrics import answer_lengths
from helpers.pairs import PAIR_SECTIONS, PairStudent, answer_features
from helpers.rows import DATA, DamagedFile
from helpers.student import read_prompt


@pytest.fixture(autouse=True, scope="module")
def few_resamples():
    """The properties are not about the intervals."""
    metrics.RESAMPLES = 50
    yield
    metrics.RESAMPLES = 1000


def pair(i: int, first: str = "first", second: str = "second") -> dict:
    return {
        "question": f"Question {i}?",
        "source": f"The source number {i}.",
        "document": f"document {i % 3}",
        "answers": [
            {"model": "m", "text": f"The {first} answer {i}."},
            {"model": "n", "text": f"The {second} answer {i}."},
        ],
    }


@pytest.fixture
def pairs():
    return [pair(i) for i in range(12)]


def judged(rows, llm, name="t", **settings):
    return asyncio.run(
        judge_rows(rows, PairwiseComparisonEvaluator(llm=llm), name=name, **settings)
    )


@pytest.mark.parametrize("original, flipped", list(product("ABC", repeat=2)))
def test_the_orders_are_resolved_as_llama_index_resolves_them(original, flipped):
    def by_order(shown):
        return original if "first" in shown[2] else flipped

    llm = PairJudge(lambda shown: (by_order(shown), "x"), model_name="j")
    evaluator = PairwiseComparisonEvaluator(llm=llm)
    library = asyncio.run(
        evaluator.aevaluate(query="q?", response="first", second_response="second", reference="s")
    )
    source = getattr(library.pairwise_source, "value", library.pairwise_source)
    assert resolve_orders(original, flipped) == (library.score, source)
    # Turned right, the score says what the two verdicts together say. The library's own score does
    # not in (C, A) and (C, B).
    votes = {"A": 1, "B": -1, "C": 0}[original] - {"A": 1, "B": -1, "C": 0}[flipped]
    [row] = judged([pair(0)], llm)
    scores, _ = pair_scores([row], "t")
    as_published, _ = pair_scores([row], "t", "as_published")
    if source == "neither":
        assert np.isnan(scores[0]) and votes == 0
    else:
        assert scores[0] == 0.5 + 0.5 * np.sign(votes)
        assert (scores[0] != as_published[0]) == ((original, flipped) in {("C", "A"), ("C", "B")})


class Scripted(FakeLive):
    """Replies by what is shown first; one reply may be unreadable, one call may fail."""

    def chat(self, messages, **kwargs):
        asked = [{"role": "user", "content": messages[-1].content}]
        question, _, first, _ = read_prompt(asked, PAIR_SECTIONS)
        response = super().chat(messages)
        number, order = int(question.split()[1][:-1]), "original" if "first" in first else "flipped"
        response.message.content = f"I saw {order} {number}.\n\n" + {
            (3, "original"): "no idea",
            (7, "flipped"): "[[A]] or [[B]]",
        }.get((number, order), "[[A]]" if order == "original" else "[[B]]")
        return response


@pytest.mark.parametrize("concurrency", [1, 16])
def test_one_unreadable_order_makes_the_pair_invalid_and_shifts_nothing(
    tmp_path, pairs, concurrency
):
    """With two bad rows, pairing by number goes wrong unseen: the two shifts cancel out."""

    async def go():
        llm = CallLog(tmp_path / "c.jsonl", "record").llm("m", Scripted(delay=0.03))
        with finetuning_events() as events:
            rows = await judge_rows(
                pairs, PairwiseComparisonEvaluator(llm=llm), name="t", concurrency=concurrency
            )
        return rows, events

    rows, events = asyncio.run(go())
    assert [row["evaluations"][0]["source"] for row in rows] == ["original"] * 3 + [None] + [
        "original"
    ] * 3 + [None] + ["original"] * 4
    bad = rows[7]["evaluations"][0]
    assert (
        bad["score"] is None
        and bad["verdicts"] == ["A", None]
        and bad["invalid"] == "flipped: more than one verdict in the reply"
    )
    assert len(events) == 24, "both orders are always asked"
    kept = resolve_pairwise_events(events, rows)
    assert len(kept) == 10
    for row, event in zip([row for i, row in enumerate(rows) if i not in (3, 7)], kept):
        assert row["question"] in event["messages"][1]["content"]
        assert event["messages"][2]["content"] == row["evaluations"][0]["text"]
    # The result is the same in any order, and without the chats that the library would not make.
    fewer = [event for event in events if "I saw flipped 3" not in event["messages"][2]["content"]]
    assert [e["messages"] for e in resolve_pairwise_events(fewer[::-1], rows)] == [
        e["messages"] for e in kept
    ]
    report = pairwise_report(
        [
            {**row, "evaluations": row["evaluations"] + [{**row["evaluations"][0], "llm": "s"}]}
            for row in rows
        ],
        "t",
        ["s"],
    )
    assert report.loc["s", ["inconclusive", "invalid", "compared"]].tolist() == [0, 2, 10]


def test_a_failed_order_is_invalid_and_the_other_is_kept(tmp_path, pairs):
    rows = judged(
        pairs,
        CallLog(tmp_path / "c.jsonl", "record").llm(
            "m", Scripted(broken="Answer]\nThe first answer 5.")
        ),
    )
    assert rows[5]["evaluations"][0]["invalid"].startswith(
        "original: the call failed: ConnectionError"
    )
    assert rows[4]["evaluations"][0]["score"] == 1.0


def test_identical_answers_and_double_questions_keep_their_chats(tmp_path):
    rows = [pair(0), pair(1, "same", "same"), pair(0, "other", "first")]

    async def go():
        llm = CallLog(tmp_path / "c.jsonl", "record").llm(
            "m", PairJudge(lambda shown: ("C", shown[2]), model_name="j")
        )
        with finetuning_events() as events:
            return await judge_rows(rows, PairwiseComparisonEvaluator(llm=llm), name="t"), events

    done, events = asyncio.run(go())
    assert len(events) == 6 and len(load_rows(tmp_path / "c.jsonl")) == 5, (
        "one prompt stands for both orders of equal answers"
    )
    kept = resolve_pairwise_events(events, done)
    assert [event["messages"][2]["content"] for event in kept] == [
        row["evaluations"][0]["text"] for row in done
    ]
    assert len(resolve_pairwise_events(events, done, both_orders=True)) == 6
    with pytest.raises(ValueError, match="event 6 belongs to none of the rows"):
        resolve_pairwise_events(events + [events[0]], done)
    with pytest.raises(ValueError, match="row 0 was decided by its original order, but"):
        resolve_pairwise_events(events[1:], done)


@pytest.mark.parametrize(
    "change, said",
    [
        (lambda row: row["answers"].pop(), "row 2: answers must be two, found 1"),
        (lambda row: row["answers"].append({"text": "x"}), "row 2: answers must be two, found 3"),
        (lambda row: row.pop("answers"), "row 2: answers must be two, found None"),
        (
            lambda row: row["answers"][1].pop("text"),
            r"row 2: answers\[1\].text must be a text, found None",
        ),
        (lambda row: row.pop("source"), "row 2: source must be a text"),
        (lambda row: row.update(question=""), "row 2: question must be a text"),
    ],
)
def test_a_bad_pair_is_named(pairs, change, said):
    change(pairs[2])
    with pytest.raises(ValueError, match=said):
        judged(pairs, PairJudge(lambda shown: ("A", ""), model_name="j"))


@pytest.mark.slow
def test_an_empty_source_and_empty_answers_are_judged(pairs):
    pairs[0]["source"] = ""
    pairs[1]["answers"][0]["text"] = ""
    for name, llm in untrained_pair_judges().items():
        assert all(
            row["evaluations"][0]["score"] is not None for row in judged(pairs[:2], llm, name)
        )


@pytest.fixture(scope="module")
def two_answers(tmp_path_factory):
    """Two rows of answers to each of twenty questions."""
    log = CallLog(tmp_path_factory.mktemp("log") / "c.jsonl", "record")
    asked = [
        {"question": f"What of {i}?", "context": f"So is {i}.", "document": "d"} for i in range(20)
    ]
    return [answered(log.llm(name, FakeLive()), *asked) for name in ("one", "other")]


def test_two_answers_to_a_question_are_paired_in_an_order_that_the_seed_draws(two_answers):
    first, second = two_answers
    for row, answer in zip(second, range(20)):
        row["response_data"]["text"] = f"The other answer {answer}."
    rows = pair_up(first, second, seed=1)
    assert rows == pair_up(first, second, seed=1) != pair_up(first, second, seed=2)
    turned = [row["answers"][0]["text"].startswith("The other") for row in rows]
    assert 4 < sum(turned) < 16
    for row, i, other_first, *both in zip(rows, range(20), turned, first, second):
        answers = [{"model": "m", "text": one["response_data"]["text"]} for one in both]
        assert row == {
            "question": f"What of {i}?",
            "answers": answers[::-1] if other_first else answers,
            "source": f"So is {i}.",
            "document": "d",
        }


@pytest.mark.parametrize("change", [{"question": "What?"}, {"response_data": {"context": "No."}}])
def test_answers_to_another_question_or_from_another_context_are_no_pair(two_answers, change):
    first, second = two_answers
    with pytest.raises(ValueError, match="row 3: .* have another question or context"):
        pair_up(first, [*second[:3], {**second[3], **change}, *second[4:]])
    with pytest.raises(ValueError, match="shorter"):
        pair_up(first, second[:5])


# The student

BUNDLED = DATA / "pairwise"


@pytest.fixture(scope="module")
def trained():
    engine = LocalFinetuneEngine("minilm", BUNDLED / "resolved_pairwise_finetuning_events.jsonl")
    engine.finetune()
    return engine.student


@pytest.fixture(scope="module")
def tested():
    return [
        (row["question"], row["source"], *(a["text"] for a in row["answers"]))
        for row in load_rows(BUNDLED / "test_qa.jsonl")
    ]


def swap(pairs):
    return [(question, source, second, first) for question, source, first, second in pairs]


def test_swapping_the_answers_swaps_the_probabilities_to_the_bit(trained, tested):
    one, other = trained.probabilities(tested), trained.probabilities(swap(tested))
    assert (one[:, [1, 0, 2]] == other).all()
    turned = {"A": "B", "B": "A", "C": "C"}
    assert trained.verdicts(swap(tested)) == [
        turned[verdict] for verdict in trained.verdicts(tested)
    ]
    same = [(q, s, a, a) for q, s, a, _ in tested]
    assert set(trained.verdicts(same)) == {"C"}


def test_the_head_was_fitted_as_it_is_used(trained):
    """In the fit, a difference counts for A as much as against B, and a likeness for a tie only."""
    differences, likenesses = trained.weights[:-4], trained.weights[-4:]
    assert (
        (differences[:, 0] == -differences[:, 1]).all()
        and not differences[:, 2].any()
        and differences[:, 0].any()
    )
    assert not likenesses[:, :2].any() and likenesses[:, 2].all()


def test_through_the_evaluator_it_never_contradicts_itself(trained):
    rows = judged(load_rows(BUNDLED / "test_qa.jsonl"), trained.llm(), "s")
    assert pairwise_report(rows, "teacher", ["s"]).loc[
        "s", ["inconclusive", "invalid"]
    ].tolist() == [0, 0]
    assert position_report(rows, ["s"]).loc["s", "consistency"] == 1


def test_the_pair_student_is_deterministic_and_can_be_saved(trained, tested, tmp_path):
    engine = LocalFinetuneEngine("minilm", BUNDLED / "resolved_pairwise_finetuning_events.jsonl")
    engine.finetune()
    assert engine.student.weights.tobytes() == trained.weights.tobytes()
    trained.save(tmp_path / "s.npz")
    assert PairStudent.load(tmp_path / "s.npz").verdicts(tested) == trained.verdicts(tested)
    assert engine.get_current_job().verdicts == ["A", "B", "C"]


def test_a_pairwise_file_with_a_bad_line_names_it(tmp_path):
    events = check_events(BUNDLED / "resolved_pairwise_finetuning_events.jsonl")
    events[4]["messages"][2]["content"] = "Both are fine."
    save_events(tmp_path / "x.jsonl", events)
    with pytest.raises(DamagedFile, match="line 5: cannot learn from the reply: no verdict"):
        LocalFinetuneEngine("minilm", tmp_path / "x.jsonl").finetune()
    with pytest.raises(ValueError, match="all 3 rows have the verdict A"):
        PairStudent.fit([("q", "s", "a", "b")] * 3, ["A"] * 3)


def test_features_do_not_fail_on_odd_texts():
    for answer in ("", "   ", "«»", "1,234.5", "日本", "a" * 5000):
        assert np.isfinite(answer_features("q?", "", answer)).all()


# The metrics

VERDICT = st.sampled_from(
    [
        ("original", 1.0),
        ("original", 0.0),
        ("original", 0.5),
        ("flipped", 1.0),
        ("flipped", 0.0),
        ("neither", 0.5),
        (None, None),
    ]
)


def with_verdicts(*columns) -> list[dict]:
    return [
        {
            "words": [1, 2],
            "evaluations": [
                {"llm": name, "source": source, "score": score}
                for name, (source, score) in zip("tsu", row)
            ],
        }
        for row in zip(*columns)
    ]


columns = st.integers(4, 25).flatmap(
    lambda n: st.tuples(*[st.lists(VERDICT, min_size=n, max_size=n)] * 3)
)


@given(columns)
@settings(max_examples=60, deadline=None)
def test_counts_agree_with_counting_by_hand(data):
    rows = with_verdicts(*data)
    report = pairwise_report(rows, "t", ["s"]).loc["s"]
    right = {("flipped", 1.0): 0.0, ("flipped", 0.0): 1.0}
    t, s = (
        [right.get(v, v[1] if v[0] == "original" else None) for v in column] for column in data[:2]
    )
    decided = [i for i in range(len(rows)) if t[i] is not None]
    both = [i for i in decided if s[i] is not None]
    agreed = [i for i in both if t[i] == s[i]]
    assert (report["compared"], report["agreements"]) == (len(both), len(agreed))
    assert report["inconclusive"] == sum(v[0] == "neither" for v in data[1]) and report[
        "invalid"
    ] == sum(v[0] is None for v in data[1])
    if decided:
        assert report["coverage"] == pytest.approx(len(both) / len(decided))
        assert report["agreement_overall"] == pytest.approx(len(agreed) / len(decided))
    if both:
        x, y = [str(t[i]) for i in both], [str(s[i]) for i in both]
        assert report["agreement_rate"] == pytest.approx(len(agreed) / len(both))
        assert report["jaccard"] == pytest.approx(
            jaccard_score(x, y, average="weighted", zero_division=0)
        )
    if len({t[i] for i in decided}) > 1 and both:
        assert report["kappa"] == pytest.approx(
            cohen_kappa_score([str(t[i]) for i in decided], [str(s[i]) for i in decided])
        )


def turn(row: dict) -> dict:
    """The same judgements, if the same answers had been shown the other way round."""
    other = {"original": "original", "flipped": "flipped", "neither": "neither", None: None}
    return {
        "words": row["words"][::-1],
        "evaluations": [
            {
                **e,
                "source": other[e["source"]],
                "score": e["score"] if e["score"] is None else 1 - e["score"],
            }
            for e in row["evaluations"]
        ],
    }


@given(columns)
@settings(max_examples=40, deadline=None)
def test_swapping_all_answers_leaves_every_figure(data):
    rows = with_verdicts(*data)
    turned = [turn(row) for row in rows]
    np.testing.assert_allclose(
        pairwise_report(rows, "t", ["s"]).astype(float),
        pairwise_report(turned, "t", ["s"]).astype(float),
        atol=1e-12,
    )
    compared = compare_pair_students(rows, "t", "s", "u")
    np.testing.assert_allclose(compared, compare_pair_students(turned, "t", "s", "u"), atol=1e-12)
    np.testing.assert_allclose(
        length_report(rows, ["s"]).astype(float), length_report(turned, ["s"]).astype(float)
    )
    assert compared["difference"].tolist() == pytest.approx(
        (-compare_pair_students(rows, "t", "u", "s")["difference"]).tolist(), nan_ok=True
    )


@given(columns)
@settings(max_examples=40, deadline=None)
def test_turning_twice_changes_nothing(data):
    rows = with_verdicts(*data)

    def turn_flipped(row):
        return {
            **row,
            "evaluations": [
                {**e, "score": 1 - e["score"]} if e["source"] == "flipped" else e
                for e in row["evaluations"]
            ],
        }

    once = [turn_flipped(row) for row in rows]
    assert [turn_flipped(row) for row in once] == rows
    np.testing.assert_array_equal(
        pair_scores(once, "s", "as_published")[0], pair_scores(rows, "s", "corrected")[0]
    )


def test_the_comparison_and_the_tables_by_hand():
    yes, no = ("original", 1.0), ("original", 0.0)
    teacher = [yes] * 10 + [("neither", 0.5)]  # the last pair does not count
    rows = with_verdicts(teacher, [yes] * 9 + [("neither", 0.5), yes], [no] * 6 + [yes] * 4 + [no])
    compared = compare_pair_students(rows, "t", "s", "u").loc["agreement_overall"]
    assert compared[["s", "u", "n"]].tolist() == pytest.approx([0.9, 0.4, 10])
    expected = ttest_1samp([1] * 6 + [0] * 3 + [-1], 0)
    assert compared[["difference", "p"]].tolist() == pytest.approx([0.5, expected.pvalue])
    assert compared["low"] == pytest.approx(expected.confidence_interval().low)
    with pytest.raises(ValueError, match="'s' is compared with itself"):
        compare_pair_students(rows, "t", "s", "s")
    lengths = length_report(rows[:10], ["t", "u"])  # the second answer is the longer one
    assert lengths.loc["t", "longer_wins"] == 0 and lengths.loc["u", "longer_wins"] == 0.6
    with pytest.raises(ValueError, match="flipped='turned'"):
        pair_scores(rows, "t", "turned")
    with pytest.raises(KeyError, match="row 0 has 0 judgements by 'x'"):
        pair_scores(rows, "x")


def test_what_most_people_say_is_one_verdict():
    yes, no, tie = ("original", 1.0), ("flipped", 1.0), ("original", 0.5)
    none = (None, None)
    rows = with_verdicts(
        [yes, yes, yes, yes, none, none], [yes, no, no, tie, none, no], [no, no, tie, yes, none, no]
    )
    scores, invalid = pair_scores(rows, ["t", "s", "u"])
    assert scores[:4].tolist() == [1, 0, 0.5, 1] and np.isnan(scores[4]) and scores[5] == 0
    assert invalid.tolist() == [False] * 4 + [True, False]
    assert pair_scores(rows, ["t", "s"])[0].tolist()[:4] == [1, 0.5, 0.5, 0.5]
    report = pairwise_report(rows, ["t", "s", "u"], ["t"])
    assert report.loc["t", ["agreements", "compared", "invalid"]].tolist() == [2, 4, 2]


def test_positions_by_hand(pairs):
    verdicts = ["AB", "BA", "CC", "AA", "AA", "BB", "AC", "CB", "CA", "BC", "AB", "AB"]
    rows = [
        {**row, "evaluations": [{"llm": "t", "verdicts": list(v)}]}
        for row, v in zip(pairs, verdicts)
    ]
    report = position_report(rows, ["t"]).loc["t"]
    assert report["consistency"] == pytest.approx(5 / 12)
    assert report["prefers_first"] == pytest.approx(4 / 12) and report[
        "prefers_second"
    ] == pytest.approx(3 / 12)
    table = order_table(rows, "t")
    assert (
        table.loc["first", "first"] == 3
        and table.loc["first", "second"] == 2
        and table.loc["tie", "first"] == 1
    )
    assert table.to_numpy().sum() == 12


def test_no_rows_have_no_position():
    with pytest.warns(UserWarning, match="here are 0"):
        report = position_report([], ["t"]).loc["t"]
    assert report["pairs"] == 0 and np.isnan(report["consistency"])


def test_the_pretty_table_is_the_same_each_time(pairs):
    [row] = judged(pairs[:1], PairJudge(lambda shown: ("C", "Equal."), model_name="j"))
    assert show_pair(row, "t").to_html() == show_pair(row, "t").to_html()
    assert "[[C]] then, flipped, [[C]]" in show_pair(row, "t").to_html()
    with pytest.raises(KeyError, match="0 judgements by 'nobody'"):
        show_pair(row, "nobody")


def test_rows_without_both_verdicts_are_named():
    published = load_rows(DATA / "pairwise" / "published_verdicts.jsonl")
    for report in (
        lambda: position_report(published, ["gpt_4"]),
        lambda: order_table(published, "gpt_4"),
    ):
        with pytest.raises(KeyError, match="row 0: the judgement by 'gpt_4' has no 'verdicts'"):
            report()


# The published run


def test_the_published_figures_come_out_to_every_digit():
    rows = load_rows(BUNDLED / "published_verdicts.jsonl")
    students = ["ft_gpt_3p5", "gpt_3p5"]
    report = pairwise_report(rows, "gpt_4", students, flipped="as_published")
    names = ["inconclusive", "agreements", "compared", "agreement_rate", "correlation", "jaccard"]
    assert list(report.columns[:9]) == names + ["coverage", "agreement_overall", "kappa"]
    # The last two digits of a float differ between processors.
    expected = {
        "ft_gpt_3p5": [15, 41, 47, 0.8723404255319149, 0.765365523658036, 0.773126734505088],
        "gpt_3p5": [24, 32, 38, 0.8421052631578947, 0.671929323262293, 0.7308712958867757],
    }
    for student, figures in expected.items():
        assert report.loc[student, names].tolist() == pytest.approx(figures, rel=1e-13)
    right = pairwise_report(rows, "gpt_4", students)
    assert right["agreements"].tolist() == [44, 34] and right["correlation"].round(4).tolist() == [
        0.8932,
        0.7971,
    ]
    assert (right["agreement_overall"] * 60).round(9).tolist() == [44, 34]
    truth = pair_scores(rows, "gpt_4")[0]
    assert int(np.isnan(truth).sum()) == 4
    longer = np.array(
        [0.5 + 0.5 * np.sign(first - second) for first, second in map(answer_lengths, rows)]
    )
    assert (longer == truth).sum() == 45


def test_published_rows_load_and_train_as_they_are(tmp_path):
    """In the published files' schema: no `document`, no `verdicts`, chats without row numbers."""
    rows = load_rows(BUNDLED / "train_qa.jsonl")
    events = [
        {"messages": event["messages"]}
        for event in load_rows(BUNDLED / "pairwise_finetuning_events.jsonl")
    ]
    for row in rows:
        del row["document"]
        row["evaluations"] = [
            {key: row["evaluations"][0][key] for key in ("llm", "score", "text", "source")}
        ]
    assert json.dumps(resolve_pairwise_events(events, rows)) == json.dumps(
        load_rows(BUNDLED / "resolved_pairwise_finetuning_events.jsonl")
    )
