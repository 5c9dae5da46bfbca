"""Another processor moves the features a little: verdicts and printed figures stay."""

import asyncio
import zlib

import numpy as np
import pytest
from llama_index.core.evaluation import CorrectnessEvaluator, PairwiseComparisonEvaluator

from helpers import (
    LocalFinetuneEngine,
    SingleGradingEvaluator,
    correctness_report,
    grading_report,
    judge_rows,
    load_rows,
    pairs,
    pairwise_report,
    position_report,
    student,
    with_intervals,
)
from helpers.grade_metrics import GRADES
from helpers.rows import DATA

pytestmark = pytest.mark.slow

MOVE = 1e-6  # a feature moves by some 1e-7 from one processor to another


def moved(featurize):
    """`featurize`, with each feature moved by MOVE; the signs depend on the item alone."""

    def shaken(items, kinds):
        features = featurize(items, kinds)
        for row, item in zip(features, items, strict=True):
            signs = np.random.default_rng(zlib.crc32(repr(item).encode()))
            row += MOVE * signs.choice([-1, 1], size=row.size)
        return features

    return shaken


def judged(part, chats, evaluator, items_of, **settings):
    """A student trained on a bundled file: (kinds, probabilities, test rows with its verdicts)."""
    engine = LocalFinetuneEngine("minilm", DATA / part / chats, **settings)
    engine.finetune()
    rows = load_rows(DATA / part / "test_qa.jsonl")
    probabilities = engine.student.probabilities(items_of(rows))
    judge = evaluator(engine.get_finetuned_model())
    rows = asyncio.run(judge_rows(rows, judge, name="student"))
    return engine.student.kinds, probabilities, rows


def pairs_of(rows):
    return [(row["question"], row["source"], *(a["text"] for a in row["answers"])) for row in rows]


def by_correctness():
    said = judged(
        "correctness",
        "correction_finetuning_events.jsonl",
        lambda llm: CorrectnessEvaluator(llm=llm),
        student.items_of,
    )
    return *said, [with_intervals(correctness_report(said[-1], "teacher", ["student"]))]


def by_pairs():
    said = judged(
        "pairwise",
        "resolved_pairwise_finetuning_events.jsonl",
        lambda llm: PairwiseComparisonEvaluator(llm=llm),
        pairs_of,
    )
    names = ("coverage", "agreement_overall", "agreement_rate", "correlation", "jaccard")
    tables = [with_intervals(pairwise_report(said[-1], "teacher", ["student"]), names)]
    return *said, [*tables, position_report(said[-1], ["student"])]


def by_grades():
    said = judged(
        "single_grading",
        "single_grading_finetuning_events.jsonl",
        lambda llm: SingleGradingEvaluator(llm, "x", logprobs=True),
        student.items_of,
        alpha=0.5,
        temperature=2.0,
        scale=(0, 1),
    )
    report = grading_report(said[-1], "teacher", ["student"])
    return *said, [with_intervals(report, tuple(GRADES))]


def verdict(row):
    """What the student says of a row, with the percentages in its reason."""
    [by_student] = [one for one in row["evaluations"] if one["llm"] == "student"]
    return [by_student.get(name) for name in ("score", "verdicts", "acceptable", "text")]


@pytest.mark.parametrize("judge", [by_correctness, by_pairs, by_grades])
def test_small_moves_of_the_features_move_no_verdict_and_no_printed_figure(judge, monkeypatch):
    kinds, probabilities, rows, tables = judge()
    for kind in (student.Student, pairs.PairStudent):
        monkeypatch.setattr(kind, "featurize", staticmethod(moved(kind.featurize)))
    kinds_moved, probabilities_moved, rows_moved, tables_moved = judge()
    assert kinds_moved == kinds
    change = np.abs(probabilities_moved - probabilities).max()
    assert 0 < change < 2e-5
    assert list(map(verdict, rows_moved)) == list(map(verdict, rows))
    assert list(map(str, tables_moved)) == list(map(str, tables))
