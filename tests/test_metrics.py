"""Agreement and its uncertainty."""

import numpy as np
import pytest
from scipy.stats import pearsonr, spearmanr
from sklearn.metrics import cohen_kappa_score

from helpers import compare_students, correctness_report, scores_of, with_intervals
from helpers.metrics import agreement, interval, quadratic_kappa


def judged(documents: int = 6, each: int = 8, seed: int = 0, **noise) -> list[dict]:
    """Rows with a teacher's scores and students that add noise of the given spread."""
    rng = np.random.default_rng(seed)
    rows = []
    for i in range(documents * each):
        truth = rng.integers(2, 11) / 2
        scores = {
            name: float(np.clip(np.round(2 * (truth + rng.normal(scale=spread))) / 2, 1, 5))
            for name, spread in noise.items()
        }
        rows.append(
            {
                "document": f"d{i % documents}",
                "evaluations": [
                    {"llm": name, "score": score}
                    for name, score in {"teacher": truth, **scores}.items()
                ],
            }
        )
    return rows


def test_the_figures_are_those_of_scipy_and_scikit_learn():
    rows = judged(student=1.0)
    x, y = scores_of(rows, "teacher"), scores_of(rows, "student")
    report = correctness_report(rows, "teacher", ["student"]).loc["student"]
    assert (
        report["correlation"]
        == pytest.approx(pearsonr(x, y).statistic)
        == pytest.approx(np.corrcoef(x, y)[0, 1])
    )
    assert report["spearman"] == pytest.approx(spearmanr(x, y).statistic)
    categories = {"labels": np.arange(2, 11), "weights": "quadratic"}
    assert report["kappa"] == pytest.approx(
        cohen_kappa_score((2 * x).astype(int), (2 * y).astype(int), **categories)
    )
    assert report["mae"] == pytest.approx(np.abs(x - y).mean())
    assert report["n"] == 48 and report["coverage"] == 1
    for name in ("correlation", "spearman", "kappa", "mae"):
        assert report[name + "_low"] < report[name] < report[name + "_high"]


def test_columns_are_in_the_promised_order():
    report = correctness_report(judged(a=1, b=2), "teacher", ["b", "a"])
    assert list(report.index) == ["b", "a"]
    assert list(report.columns[:6]) == ["n", "correlation", "spearman", "kappa", "mae", "coverage"]


def test_an_invalid_judgement_costs_coverage_and_nothing_else():
    rows = judged(student=1.0)
    for row in rows[:6]:
        row["evaluations"][1]["score"] = None
    rows[6]["evaluations"][0]["score"] = None  # the teacher's own: no row to be judged on
    report = correctness_report(rows, "teacher", ["student"]).loc["student"]
    rest = correctness_report(rows[7:], "teacher", ["student"]).loc["student"]
    assert report["n"] == 41 and report["coverage"] == pytest.approx(41 / 47)
    assert report["correlation"] == pytest.approx(rest["correlation"]) and report[
        "mae"
    ] == pytest.approx(rest["mae"])


def test_undefined_figures_are_nan_and_shown_as_a_dash(recwarn):
    rows = judged(student=0)
    for row in rows:
        row["evaluations"][1]["score"] = 3.0
    report = correctness_report(rows, "teacher", ["student"])
    assert np.isnan(
        report.loc["student", ["correlation", "spearman", "correlation_low"]].astype(float)
    ).all()
    assert report.loc["student", "kappa"] == 0
    assert with_intervals(report).loc["student", "correlation"] == "–"
    for row in rows:
        row["evaluations"][1]["score"] = None
    report = correctness_report(rows, "teacher", ["student"]).loc["student"]
    assert report["n"] == 0 and report["coverage"] == 0 and np.isnan(report["mae"])
    assert not recwarn.list


def test_one_document_gives_no_interval():
    report = correctness_report(judged(documents=1, each=20, student=1), "teacher", ["student"])
    assert np.isnan(report.loc["student", "mae_low"])
    assert "[" not in with_intervals(report).loc["student", "mae"]


def test_rows_without_a_document_stand_alone():
    rows = judged(student=1)
    low, high = interval(rows, lambda at: float(len(np.unique(at))))
    for number, row in enumerate(rows):
        if number % 2:
            del row["document"]
        else:
            row["document"] = None
    low_alone, high_alone = interval(rows, lambda at: float(len(np.unique(at))))
    assert low % 8 == high % 8 == 0 and np.isfinite(low_alone) and (low_alone % 8 or high_alone % 8)


@pytest.mark.slow
def test_the_interval_covers_about_as_often_as_it_says():
    """Coverage of the 95 % interval for a mean, over 150 draws of 20 independent documents."""
    rng = np.random.default_rng(0)
    hits = 0
    for values in rng.normal(size=(150, 20)):
        rows = [{"document": i} for i in range(20)]
        low, high = interval(rows, lambda at, values=values: values[at].mean())
        hits += low <= 0 <= high
    assert 0.86 <= hits / 150 <= 0.99


def test_a_missing_or_double_judgement_is_an_error():
    rows = judged(student=1)
    with pytest.raises(KeyError, match="row 0 has 0 judgements by 'other'"):
        scores_of(rows, "other")
    rows[3]["evaluations"] *= 2
    with pytest.raises(KeyError, match="row 3 has 2 judgements"):
        scores_of(rows, "teacher")


@pytest.mark.slow
def test_the_paired_test_sees_what_is_there_and_not_what_is_not():
    better = compare_students(judged(documents=10, good=0.4, bad=1.5), "teacher", "good", "bad")
    assert (better["p"] < 0.01).all() and better.loc["mae", "high"] < 0 < better.loc[
        "correlation", "low"
    ]
    ps = [
        compare_students(judged(documents=10, a=1, b=1, seed=seed), "teacher", "a", "b").loc[
            "mae", "p"
        ]
        for seed in range(8)
    ]
    assert np.mean(np.array(ps) < 0.05) <= 0.25 and np.mean(ps) > 0.25
    same = compare_students(judged(documents=10, a=0, b=0), "teacher", "a", "b")
    assert (same["difference"] == 0).all() and (same["p"] == 1).all()


def test_a_judge_is_not_compared_with_itself():
    with pytest.raises(ValueError, match="'a' is compared with itself"):
        compare_students(judged(a=1), "teacher", "a", "a")


def test_swapping_the_students_turns_the_difference():
    rows = judged(documents=7, a=0.5, b=1)
    ab, ba = (
        compare_students(rows, "teacher", "a", "b"),
        compare_students(rows, "teacher", "b", "a"),
    )
    assert ab["difference"].tolist() == pytest.approx((-ba["difference"]).tolist())
    assert ab["p"].tolist() == pytest.approx(ba["p"].tolist())


def test_what_is_undefined_has_no_p_value():
    rows = judged(documents=8, student=1, constant=0)
    for row in rows:
        row["evaluations"][2]["score"] = 3.0
    compared = compare_students(rows, "teacher", "student", "constant")
    assert (
        np.isnan(compared.loc["correlation", ["difference", "p"]]).all()
        and (compared.loc[["kappa", "mae"], "p"] < 0.1).all()
    )
    one = compare_students(judged(documents=1, each=20, a=1, b=2), "teacher", "a", "b")
    assert np.isfinite(one["difference"]).all() and one[["low", "high", "p"]].isna().all(axis=None)


def test_an_interval_is_never_narrower_than_for_independent_rows():
    """Three documents that are alike say next to nothing about others."""
    values = np.tile(np.arange(20) % 2.0, 3)
    rows = [{"document": i // 20} for i in range(60)]
    low, high = interval(rows, lambda at: values[at].mean())
    assert high - low > 0.2 and (low, high) == pytest.approx(
        interval([{}] * 60, lambda at: values[at].mean())
    )


def test_the_paired_test_needs_common_rows():
    rows = judged(a=1, b=1)
    for i, row in enumerate(rows):
        row["evaluations"][1 + i % 2]["score"] = None
    with pytest.raises(ValueError, match="no row on which"):
        compare_students(rows, "teacher", "a", "b")


def test_kappa_and_agreement_by_hand():
    x = np.array([1.0, 2, 3])
    assert quadratic_kappa(x, x) == 1
    assert quadratic_kappa(x, x[::-1]) == pytest.approx(1 - (8 / 3) / (2 * 14 / 3 - 8))
    assert agreement(x, np.array([2.0, np.nan, 2]))[[3, 4]] == pytest.approx([1, 2 / 3])
