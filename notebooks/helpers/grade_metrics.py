"""Evaluate single grading: scores and verdicts -> agreement with the teacher, with intervals."""

import numpy as np
import pandas as pd

from .judge import ACCEPTABLE, score_distribution
from .metrics import (
    Judge,
    Statistic,
    by_judge,
    judgements,
    measured,
    paired,
    pearson,
    ranks,
    scores_of,
    valid_rows,
)

GRADES = tuple("correlation mae accuracy precision recall kappa auc brier coverage".split())


def probabilities_of(rows: list[dict], judge: str) -> np.ndarray:
    """A judge's probability that each answer is acceptable, (rows,); NaN if it is invalid.

    It is the probability that the judge's `distribution` or `samples` give to scores above
    ACCEPTABLE. If the judge gives only a score, it is the score itself.
    """
    probabilities = scores_of(rows, judge)
    for number, given in enumerate(judgements(rows, judge)):
        if given["score"] is not None and ("distribution" in given or "samples" in given):
            distribution = score_distribution(given).items()
            probabilities[number] = sum(p for score, p in distribution if score > ACCEPTABLE)
    return probabilities


def grade_agreement(teacher: np.ndarray, scores: np.ndarray, p: np.ndarray) -> np.ndarray:
    """The figures of GRADES for arrays of shape (rows,): scores, and a judge's probabilities `p`.

    A NaN score is an invalid judgement. A figure is NaN where it is undefined. Coverage is the
    share of the teacher's valid rows on which the judge is valid too. The other figures use the
    rows on which both are valid. Correlation (Pearson's) and the mean absolute error are of the
    scores. Accuracy, precision, recall and Cohen's kappa are of the verdicts: is the score above
    ACCEPTABLE? The area under the ROC curve and the Brier score (0 is perfect) are of `p`. The
    second row of the array, (2, 9), has the number of rows behind each figure.
    """
    judged = ~np.isnan(teacher)
    both = judged & ~np.isnan(scores)
    x, y, p, n = teacher[both], scores[both], p[both], both.sum()
    coverage = n / judged.sum() if judged.any() else np.nan
    if not n:
        return np.array([[np.nan] * (len(GRADES) - 1) + [coverage], [0] * 8 + [judged.sum()]])
    truth, given = x > ACCEPTABLE, y > ACCEPTABLE
    hits, accuracy = (truth & given).sum(), (truth == given).mean()
    precision = hits / given.sum() if given.any() else np.nan
    recall = hits / truth.sum() if truth.any() else np.nan
    expected = truth.mean() * given.mean() + (1 - truth.mean()) * (1 - given.mean())
    kappa = (accuracy - expected) / (1 - expected) if expected < 1 else np.nan
    auc, ranked = _auc(truth, p)
    figures = [pearson(x, y), np.abs(x - y).mean(), accuracy, precision, recall, kappa, auc]
    counts = [n, n, n, given.sum(), truth.sum(), n, ranked, n, judged.sum()]
    return np.array([[*figures, ((p - truth) ** 2).mean(), coverage], counts])


def _auc(truth: np.ndarray, p: np.ndarray) -> tuple[float, float]:
    """The probability that an acceptable answer ranks above an unacceptable one: Mann-Whitney.

    With it comes the number of rows on which a share would be as uncertain (Hanley, McNeil 1982).
    """
    good, bad = truth.sum(), (~truth).sum()
    if not good * bad:
        return np.nan, 0
    auc = float((ranks(p)[truth].sum() - good * (good + 1) / 2) / (good * bad))
    more = (good - 1) * (1 - auc) / (2 - auc) + (bad - 1) * auc / (1 + auc)
    return auc, good * bad / (1 + more)


def _statistic(rows: list[dict], teacher: Judge, judge: str) -> Statistic:
    truth, scores, p = (
        scores_of(rows, teacher),
        scores_of(rows, judge),
        probabilities_of(rows, judge),
    )
    return lambda at: grade_agreement(truth[at], scores[at], p[at])


def grading_report(rows: list[dict], teacher: Judge, judges: list[str]) -> pd.DataFrame:
    """Compare each judge with the teacher, or with people (see `scores_of`), on single grading.

    Returns:
        One row for each judge: `n` (rows on which both are valid), `acceptable` (how many of these
        the teacher accepts), then the figures of GRADES (see `grade_agreement`) with their 95 %
        intervals (see `measured`).
    """

    def cells(judge: str) -> dict:
        statistic = _statistic(rows, teacher, judge)
        counts = dict(zip(GRADES, statistic(np.arange(len(rows)))[1].astype(int)))
        shown = {"n": int(counts["brier"]), "acceptable": int(counts["recall"])}
        return {**shown, **measured(rows, GRADES, statistic)}

    return by_judge(judges, cells)


def compare_graders(rows: list[dict], teacher: Judge, student: str, other: str) -> pd.DataFrame:
    """Compare how close `student` and `other` are to the teacher, on the rows valid for all three.

    The table is that of `paired`, for `mae`, `accuracy`, `auc` and `brier`. It is a ValueError if
    there is no such row, or if `student` is `other`.
    """
    rows = valid_rows(rows, (teacher, student, other))
    table = paired(rows, GRADES, student, other, lambda judge: _statistic(rows, teacher, judge))
    return table.loc[["mae", "accuracy", "auc", "brier"]]
