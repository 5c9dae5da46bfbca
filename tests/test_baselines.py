"""The judges that a student is set against."""

import asyncio

import numpy as np
import pytest
from llama_index.core.evaluation import CorrectnessEvaluator, PairwiseComparisonEvaluator

from helpers import (
    best_feature,
    correctness_report,
    grading_report,
    judge_rows,
    load_rows,
    position_report,
    probabilities_of,
    scores_of,
    who_answered,
)
from helpers.pair_metrics import pair_scores
from helpers.pairs import ANSWER_COUNTS, answer_features
from helpers.rows import DATA
from helpers.student import COUNTS, lexical_features


def answered(model: str, score: float | None, **fields) -> dict:
    said = {"llm": "teacher", "score": score}
    return {"response_data": {"model": model, "text": "x"}, "evaluations": [said], **fields}


def pair(first: str, second: str, score: float = 0.5, source: str = "original") -> dict:
    answers = [{"model": first, "text": "x"}, {"model": second, "text": "y"}]
    said = {"llm": "teacher", "score": score, "source": source}
    return {"answers": answers, "evaluations": [said]}


def test_each_count_has_a_name():
    assert len(COUNTS) == len(set(COUNTS)) == len(lexical_features(("q", "r", "a")))
    assert len(ANSWER_COUNTS) == len(set(ANSWER_COUNTS)) == len(answer_features("q", "s", "a"))


def test_who_answered_says_the_mean_of_a_model():
    scores = {"a": (5, 4, None), "b": (1,)}
    train = [answered(who, score, reference="r") for who in scores for score in scores[who]]
    test = [answered(who, 3, reference="r") for who in ("a", "b", "new")]
    judged = who_answered(train, test, "teacher")
    assert scores_of(judged, "who_answered").tolist() == pytest.approx([4.5, 1, 10 / 3])
    assert [len(row["evaluations"]) for row in (*test, *judged)] == [1] * 3 + [2] * 3
    again = who_answered(train[:2], judged, "teacher")
    assert scores_of(again, "who_answered").tolist() == [4.5] * 3  # the older one is replaced
    assert correctness_report(judged, "teacher", ["who_answered"])["n"].tolist() == [3]


def test_who_answered_gives_a_distribution_of_grades():
    train = [answered("a", score) for score in (0.5, 0.9, 1, 1)] + [answered("b", 0.2)]
    judged = who_answered(train, [answered("a", 1), answered("b", 0.1)], "teacher")
    assert scores_of(judged, "who_answered").tolist() == [0.9, 0.2]
    assert [row["evaluations"][1]["acceptable"] for row in judged] == [True, False]
    assert probabilities_of(judged, "who_answered").tolist() == [0.75, 0]
    assert grading_report(judged, "teacher", ["who_answered"])["accuracy"].tolist() == [1]


def test_who_answered_knows_a_pair_of_models_in_either_order():
    train = [
        pair("a", "b", 1),
        pair("b", "a", 1, "flipped"),  # in the flipped order the first is a
        pair("a", "b", 0),
        *(pair("c", "c", score) for score in (1, 0, 0)),
        *(pair("a", "c", score) for score in (1, 0)),
        pair("b", "c", 0.5, "neither"),
    ]
    test = [pair(*two) for two in ("ab", "ba", "cc", "ac", "ca", "cb")]
    judged = who_answered(train, test, "teacher")
    # Unseen is c with b: of all verdicts in the rows' order, "second" is the most frequent.
    assert pair_scores(judged, "who_answered")[0].tolist() == [1, 0, 0, 0.5, 0.5, 0]
    assert position_report(judged, ["who_answered"])["consistency"].tolist() == [1]


def test_where_both_answers_are_of_one_model_who_answered_is_no_better_than_chance():
    rng = np.random.default_rng(0)
    rows = [pair(who, who, score) for who in "abc" for score in rng.permutation([0.0, 1.0] * 50)]
    test = [rows[i] for i in range(300) if i % 2]
    judged = who_answered([rows[i] for i in range(300) if not i % 2], test, "teacher")
    said, truth = (pair_scores(judged, one)[0] for one in ("who_answered", "teacher"))
    assert len(set(said[:50])) == 1 and 0.3 < (said == truth).mean() < 0.7


def test_what_who_answered_cannot_learn_from_is_refused():
    with pytest.raises(ValueError, match="'teacher' reached no verdict in any of the 2 training"):
        who_answered([answered("a", None)] * 2, [answered("a", 1)], "teacher")
    with pytest.raises(ValueError, match="row 1 does not say which model answered"):
        who_answered([answered("a", 1), answered("", 1)], [], "teacher")


@pytest.mark.parametrize(
    "part, kind, prepared",
    [
        ("correctness", CorrectnessEvaluator, COUNTS),
        ("pairwise", PairwiseComparisonEvaluator, None),
    ],
)
def test_the_best_feature_is_one_count_that_judges(part, kind, prepared):
    train = load_rows(DATA / part / "train_qa.jsonl")
    rows = load_rows(DATA / part / "test_qa.jsonl")
    best = best_feature(train, "teacher")
    assert best.kinds in (prepared or ANSWER_COUNTS) and best.weights.shape[0] == 2
    judged = asyncio.run(judge_rows(rows, kind(llm=best.llm("best_feature")), name="best_feature"))
    assert all(row["evaluations"][-1]["score"] is not None for row in judged)
    if part == "pairwise":
        assert position_report(judged, ["best_feature"])["consistency"].tolist() == [1]


def test_the_best_feature_is_chosen_by_the_training_rows():
    """The teacher counts words: what it says follows from the length alone."""
    rng, train = np.random.default_rng(0), []
    for i, length in enumerate(rng.integers(1, 40, size=60).tolist()):
        text = " ".join(rng.choice(["ash", "birch", "cedar", "dogwood"], size=length))
        row = answered("m", 1 + min(4, length // 8), question=f"Q{i}?", reference="Elm, ash.")
        row["response_data"]["text"] = text
        train.append(row)
    train[0]["evaluations"][0]["score"] = None  # it is left out
    best = best_feature(train, "teacher")
    assert best.kinds in (
        "length of the answer",
        "length of the answer, against that of the reference",
    )
    reports = asyncio.run(judge_rows(train, CorrectnessEvaluator(llm=best.llm()), name="best"))
    assert correctness_report(reports, "teacher", ["best"]).loc["best", "correlation"] > 0.9
