"""Agreement and its uncertainty."""

import numpy as np
import pytest
from scipy.stats import beta, binomtest, pearsonr, spearmanr, t, ttest_1samp
from sklearn.metrics import cohen_kappa_score, roc_auc_score

from helpers import (
    cascade,
    cascade_cut,
    compare_students,
    correctness_report,
    measured,
    ppi_mean,
    scores_of,
    with_intervals,
)
from helpers.grade_metrics import _auc
from helpers.metrics import agreement, clusters_of, jackknife, quadratic_kappa


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


def test_one_document_gives_no_interval_and_a_warning():
    rows = judged(documents=1, each=20, student=1, other=2)
    with pytest.warns(UserWarning, match="rows of two documents or more, and here are 1"):
        report = correctness_report(rows, "teacher", ["student"])
    assert np.isnan(report.loc["student", ["mae_low", "correlation_low", "coverage_low"]]).all()
    assert "[" not in with_intervals(report).loc["student", "mae"]
    with pytest.warns(UserWarning, match="here are 1"):
        compared = compare_students(rows, "teacher", "student", "other")
    assert np.isfinite(compared["difference"]).all()
    assert compared[["low", "high", "p"]].isna().all(axis=None)
    with pytest.warns(UserWarning, match="here are 0"):
        assert np.isnan(correctness_report([], "teacher", ["student"]).loc["student", "mae"])


def test_rows_without_a_document_stand_alone():
    rows = [{"document": "d"}, {}, {"document": None}, {"document": "d"}]
    assert [group.tolist() for group in clusters_of(rows)] == [[0, 3], [1], [2]]


def test_the_interval_of_a_mean_of_independent_rows_is_that_of_the_t_test():
    values = np.array([0.3, 1.2, -0.4, 2.2, 0.9, 0.1])
    cells = measured([{}] * 6, ("mae",), lambda at: values[at].mean())
    expected = ttest_1samp(values, 0).confidence_interval()
    assert (cells["mae_low"], cells["mae_high"]) == pytest.approx((expected.low, expected.high))
    assert jackknife(np.arange(6)[:, None], lambda at: values[at].mean())[2][0] == pytest.approx(
        ttest_1samp(values, 0).pvalue
    )


def test_documents_of_equal_size_give_the_t_interval_of_their_means():
    values = np.array([1.0, 2, 2, 3, 6, 8])
    rows = [{"document": i // 2} for i in range(6)]
    cells = measured(rows, ("mae",), lambda at: values[at].mean())
    expected = ttest_1samp([1.5, 2.5, 7], 0).confidence_interval()
    assert (cells["mae_low"], cells["mae_high"]) == pytest.approx((expected.low, expected.high))


@pytest.mark.parametrize("right", [0, 3, 30, 57, 60])
def test_a_share_is_as_wide_as_wilsons_interval_or_wider(right):
    """Three documents that are alike say next to nothing about others."""
    values = np.tile(np.arange(20) < right / 3, 3)
    rows = [{"document": i // 20} for i in range(60)]
    cells = measured(rows, ("accuracy",), lambda at: values[at].mean())
    found = cells["accuracy_low"], cells["accuracy_high"]
    wilson = binomtest(right, 60).proportion_ci(method="wilson")
    assert found == pytest.approx((wilson.low, wilson.high), abs=1e-6)
    rows = [{"document": max(i // 20, i % 20 // 7)} for i in range(60)]  # these are not alike
    cells = measured(rows, ("accuracy",), lambda at: values[at].mean())
    assert cells["accuracy_low"] <= found[0] and cells["accuracy_high"] >= found[1]


def test_a_correlation_is_as_wide_as_fishers_interval_or_wider():
    x, noise = np.random.default_rng(3).normal(size=(2, 30))
    x, y = np.tile(x, 3), np.tile(x + noise, 3)  # three documents that are the same
    rows = [{"document": i // 30} for i in range(90)]
    cells = measured(rows, ("kappa",), lambda at: np.array([pearsonr(x[at], y[at]).statistic]))
    fisher = pearsonr(x, y).confidence_interval()
    found = cells["kappa_low"], cells["kappa_high"]
    assert found == pytest.approx((fisher.low, fisher.high), abs=1e-6)


def test_an_area_under_the_curve_is_as_wide_as_hanleys_interval_or_wider():
    """Hanley and McNeil 1982: a standard error from the area and the numbers of both kinds."""
    truth, p = np.arange(60) % 2 == 0, np.random.default_rng(5).normal(size=60)
    p = p + truth
    auc, n = _auc(truth, p)
    assert auc == pytest.approx(roc_auc_score(truth, p))
    q1, q2 = auc / (2 - auc), 2 * auc**2 / (1 + auc)
    error = np.sqrt((auc * (1 - auc) + 29 * (q1 - auc**2) + 29 * (q2 - auc**2)) / 900)
    assert np.sqrt(auc * (1 - auc) / n) == pytest.approx(error)
    rows = [{"document": i // 2} for i in range(60)]
    cells = measured(rows, ("auc",), lambda at: np.reshape(_auc(truth[at], p[at]), (2, 1)))
    assert cells["auc_high"] - cells["auc_low"] >= 3.8 * error
    perfect = measured(rows, ("auc",), lambda at: np.reshape(_auc(truth[at], truth[at]), (2, 1)))
    assert 0.88 < perfect["auc_low"] < 0.95 and perfect["auc_high"] == 1


def test_no_interval_has_the_width_zero():
    rows = judged(same=0, off=0)
    for row in rows:
        row["evaluations"][2]["score"] += 0.1  # the errors are equal but for their last digits
    report = correctness_report(rows, "teacher", ["same", "off"])
    # A correlation of 1 has no Fisher interval, and a constant error has no spread.
    assert with_intervals(report).loc["off", ["correlation", "mae"]].tolist() == ["1.00", "0.10"]
    assert with_intervals(report, ("coverage",)).loc["same", "coverage"] == "1.00 [0.93, 1.00]"
    ends = (report.filter(like=end).to_numpy() for end in ("_low", "_high"))
    assert not np.less_equal(*reversed([*ends])).any()


def test_a_figure_that_one_document_decides_has_no_interval():
    truth = np.array([1.0, 2, 3, 3, 3, 3])
    rows = [{"document": "ab"[i // 3]} for i in range(6)]
    cells = measured(rows, ("correlation",), lambda at: agreement(truth[at], truth[at] ** 2)[:, :1])
    assert cells["correlation"] > 0.9 and np.isnan(cells["correlation_low"])


def test_a_missing_or_double_judgement_is_an_error():
    rows = judged(student=1)
    with pytest.raises(KeyError, match="row 0 has 0 judgements by 'other'"):
        scores_of(rows, "other")
    rows[3]["evaluations"] *= 2
    with pytest.raises(KeyError, match="row 3 has 2 judgements"):
        scores_of(rows, "teacher")


def test_a_comparison_sees_what_is_there():
    better = compare_students(judged(documents=10, good=0.4, bad=1.5), "teacher", "good", "bad")
    assert (better["p"] < 0.01).all()
    assert better.loc["mae", "high"] < 0 < better.loc["correlation", "low"]
    same = compare_students(judged(documents=10, a=0, b=0), "teacher", "a", "b")
    assert (same["difference"] == 0).all() and same[["low", "high", "p"]].isna().all(axis=None)


@pytest.mark.parametrize("documents", [2, 3, 8, 48])
def test_p_and_interval_agree(documents):
    found = set()
    for seed in range(25):
        rows = judged(documents, 48 // documents, seed, a=0.8, b=1.2)
        compared = compare_students(rows, "teacher", "a", "b")
        outside = (compared["low"] > 0) | (compared["high"] < 0)
        assert (outside == (compared["p"] < 0.05)).all()
        found |= set(outside)
    assert found == {True, False} or documents == 2


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
    assert np.isnan(compared.loc["correlation", ["difference", "p"]]).all()
    assert (compared.loc[["kappa", "mae"], "p"] < 0.1).all()


def test_a_comparison_needs_common_rows():
    rows = judged(a=1, b=1)
    for i, row in enumerate(rows):
        row["evaluations"][1 + i % 2]["score"] = None
    with pytest.raises(ValueError, match="no row on which"):
        compare_students(rows, "teacher", "a", "b")


def test_kappa_and_agreement_by_hand():
    x = np.array([1.0, 2, 3])
    assert quadratic_kappa(x, x) == 1
    assert quadratic_kappa(x, x[::-1]) == pytest.approx(1 - (8 / 3) / (2 * 14 / 3 - 8))
    figures, counts = agreement(x, np.array([2.0, np.nan, 2]))
    assert figures[[3, 4]] == pytest.approx([1, 2 / 3]) and counts.tolist() == [2, 2, 2, 2, 3]


def test_every_table_can_be_shown_as_it_is():
    rows = judged(a=0.5, b=1)
    shown = with_intervals(compare_students(rows, "teacher", "a", "b"))
    assert list(shown) == ["n", "a", "b", "difference", "p"]
    assert " [" in shown.loc["mae", "difference"]
    assert list(with_intervals(correctness_report(rows, "teacher", ["a"]))) == [
        *("n", "correlation", "spearman", "kappa", "mae", "coverage")
    ]
    shown = with_intervals(ppi_mean([1, 0, 1], [1, 0, 0], [1, 0]).to_frame("it").T)
    assert list(shown) == ["mean", "lam", "saved", "labels"] and " [" in shown.loc["it", "labels"]


# What a student is for

LABELS = np.array([4.0, 2, 5, 3.5, 1, 4.5, 3, 2.5, 5, 4, 1.5, 3])
PREDICTED = np.array([3.5, 2.5, 4.5, 3, 2, 4, 3.5, 2, 4, 4.5, 2.5, 3])
REST = np.array([3, 2.5, 4, 4.5, 2, 3.5, 3, 1.5, 5, 4, 2.5, 3, 3.5, 2, 4.5, 3, 4, 2.5, 3.5, 1.0])


@pytest.mark.parametrize(
    "labels, predictions, rest, mean, low, high, lam, labels_low, labels_high",
    [
        (LABELS, PREDICTED, REST, 3.172128, 2.624479, 3.719777, 0.622979, 2.533391, 3.966609),
        (
            (LABELS >= 4).astype(float),
            (PREDICTED - 1) / 4,
            (REST - 1) / 4,
            *(0.387888, 0.167359, 0.608417, 0.920926, 0.137727, 0.695606),
        ),
        (LABELS, PREDICTED[::-1], REST, 3.190749, 2.566357, 3.815141, 0.474006, 2.533391, 3.966609),
    ],
)
def test_prediction_powered_inference_is_that_of_ppi_py(
    labels, predictions, rest, mean, low, high, lam, labels_low, labels_high
):
    """Version 0.2.3. It uses the normal distribution and divides by n, ours t and n - 1."""
    found = ppi_mean(labels, predictions, rest)
    wider = t.ppf(0.975, 11) / 1.959964 * np.sqrt(12 / 11)
    assert found[["mean", "lam"]].tolist() == pytest.approx([mean, lam], abs=2e-6)
    half, alone = (high - low) / 2 * wider, (labels_high - labels_low) / 2 * wider
    assert found[["low", "high"]].tolist() == pytest.approx([mean - half, mean + half], abs=1e-5)
    assert found[["labels_low", "labels_high"]].tolist() == pytest.approx(
        [labels.mean() - alone, labels.mean() + alone], abs=1e-5
    )
    assert found["saved"] == pytest.approx(1 - (half / alone) ** 2, abs=1e-5)


def test_a_student_without_information_saves_nothing():
    found = ppi_mean(LABELS, np.full(12, 3.0), np.full(20, 3.0))
    assert found[["lam", "saved"]].tolist() == [0, 0] and found["mean"] == LABELS.mean()
    assert found["low"] == found["labels_low"]


def test_labels_of_few_documents_make_a_wide_interval():
    rows = ppi_mean(LABELS, PREDICTED, REST)
    few = ppi_mean(LABELS, PREDICTED, REST, [*"aaaabbbbcccc", *"abcd" * 5])
    assert few["mean"] == rows["mean"] and few["low"] < rows["low"]
    with pytest.warns(UserWarning, match="here are 1"):
        one = ppi_mean(LABELS, PREDICTED, REST, ["a"] * 12 + ["b"] * 20)
    assert one[["low", "high", "saved", "labels_low"]].isna().all()
    for given in ([LABELS, PREDICTED[1:], REST], [LABELS, PREDICTED, []], [[], [], REST]):
        with pytest.raises(ValueError, match="expected n, n, N and n \\+ N values"):
            ppi_mean(*given)
    with pytest.raises(ValueError, match="no NaN"):
        ppi_mean([np.nan, *LABELS[1:]], PREDICTED, REST)
    with pytest.raises(ValueError, match="lengths are \\(12, 12, 20, 31\\)"):
        ppi_mean(LABELS, PREDICTED, REST, ["a"] * 31)


def test_a_cascade_by_hand():
    teacher, student = np.array(list("AABBC")), np.array(list("ABBBA"))
    curve = cascade(teacher, student, np.array([0.9, 0.5, 0.9, 0.7, np.nan]))
    assert curve.index.tolist() == [0.9, 0.7, 0.5]
    assert curve["saved"].tolist() == pytest.approx([0.4, 0.6, 0.8])
    assert curve["agreement"].tolist() == pytest.approx([1, 1, 0.8])
    assert curve["random"].tolist() == pytest.approx([1 - 0.4 * 0.4, 1 - 0.6 * 0.4, 1 - 0.8 * 0.4])
    chosen = cascade(teacher, student, np.arange(5), cuts=[1.5, np.inf])
    assert chosen.loc[np.inf].tolist() == [0, 1, 1] and chosen.loc[1.5, "saved"] == 0.6
    with pytest.raises(ValueError, match="no verdict on row 1: leave such rows out"):
        cascade(np.array([1.0, np.nan]), np.ones(2), np.ones(2))


def test_the_cut_is_the_lowest_that_is_safe():
    """200 rows: the most confident 100 are right, the others are right half of the time."""
    student, confidence = np.ones(200), np.linspace(1, 0, 200)
    teacher = np.where((np.arange(200) >= 100) & (np.arange(200) % 2 == 0), 0.0, 1.0)
    cut = cascade_cut(teacher, student, confidence)
    wrong = int(((teacher == 0) & (confidence >= cut)).sum())
    assert beta.ppf(0.9, wrong + 1, 200 - wrong) <= 0.05 < beta.ppf(0.9, wrong + 2, 199 - wrong)
    assert teacher[np.flatnonzero(confidence < cut)[0]] == 0  # one more would be one too many
    assert cascade_cut(teacher, student, confidence, agreement=0.7, sure=0.5) == 0
    assert cascade_cut(*(np.ones(44) for _ in range(3))) == np.inf
    assert cascade_cut(*(np.ones(45) for _ in range(3))) == 1


def test_several_people_are_one_truth():
    rows = judged(a=0.5, b=0.5, c=0.5, student=1)
    rows[0]["evaluations"][1]["score"] = None
    people = ["a", "b", "c"]
    each = np.array([scores_of(rows, one) for one in people])
    assert scores_of(rows, people).tolist() == np.nanmedian(each, axis=0).tolist()
    report = correctness_report(rows, people, ["teacher", "student"])
    assert report["n"].tolist() == [48, 48]
    assert report.loc["teacher", "mae"] < report.loc["student", "mae"]
    assert len(compare_students(rows, people, "teacher", "student")) == 3
