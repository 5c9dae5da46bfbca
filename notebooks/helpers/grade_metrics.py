"""Evaluate single grading: scores and verdicts -> agreement with the teacher, with intervals."""

import numpy as np
import pandas as pd

from .judge import ACCEPTABLE, score_distribution
from .metrics import _pearson, _ranks, by_judge, judgements, measured, paired, scores_of, valid_rows

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
    ACCEPTABLE? The area under the ROC curve and the Brier score (0 is perfect) are of `p`.
    """
    judged = ~np.isnan(teacher)
    both = judged & ~np.isnan(scores)
    coverage = both.sum() / judged.sum() if judged.any() else np.nan
    x, y, p = teacher[both], scores[both], p[both]
    if not len(x):
        return np.array([np.nan] * (len(GRADES) - 1) + [coverage])
    truth, given = x > ACCEPTABLE, y > ACCEPTABLE
    hits = (truth & given).sum()
    accuracy = (truth == given).mean()
    precision = hits / given.sum() if given.any() else np.nan
    recall = hits / truth.sum() if truth.any() else np.nan
    expected = truth.mean() * given.mean() + (1 - truth.mean()) * (1 - given.mean())
    kappa = (accuracy - expected) / (1 - expected) if expected < 1 else np.nan
    of_scores = [_pearson(x, y), np.abs(x - y).mean()]
    of_probabilities = [_auc(truth, p), ((p - truth) ** 2).mean()]
    return np.array([*of_scores, accuracy, precision, recall, kappa, *of_probabilities, coverage])


def _auc(truth: np.ndarray, p: np.ndarray) -> float:
    """The probability that an acceptable answer ranks above an unacceptable one: Mann-Whitney."""
    positive = truth.sum()
    pairs = positive * (len(truth) - positive)
    if not pairs:
        return np.nan
    return float((_ranks(p)[truth].sum() - positive * (positive + 1) / 2) / pairs)


def grading_report(rows: list[dict], teacher: str, judges: list[str]) -> pd.DataFrame:
    """Compare each judge with the teacher on single grading.

    Returns:
        One row for each judge: `n` (rows on which both are valid), `acceptable` (how many of these
        the teacher accepts), then the figures of GRADES (see `grade_agreement`) with their 95 %
        intervals (see `measured`).
    """
    truth = scores_of(rows, teacher)

    def cells(judge: str) -> dict:
        scores, p = scores_of(rows, judge), probabilities_of(rows, judge)
        both = ~np.isnan(truth) & ~np.isnan(scores)
        return {
            "n": int(both.sum()),
            "acceptable": int((truth[both] > ACCEPTABLE).sum()),
            **measured(rows, GRADES, lambda at: grade_agreement(truth[at], scores[at], p[at])),
        }

    return by_judge(judges, cells)


def compare_graders(rows: list[dict], teacher: str, student: str, other: str) -> pd.DataFrame:
    """Compare how close `student` and `other` are to the teacher, on the rows valid for all three.

    The table is that of `paired`, for `mae`, `accuracy`, `auc` and `brier`. It is a ValueError if
    there is no such row, or if `student` is `other`.
    """
    names = ("mae", "accuracy", "auc", "brier")
    rows = valid_rows(rows, (teacher, student, other))
    truth = scores_of(rows, teacher)

    def said_by(judge: str) -> np.ndarray:
        p = probabilities_of(rows, judge)
        return np.column_stack([scores_of(rows, judge), p, _ranks(p)])

    def figures(said: np.ndarray, at: np.ndarray) -> np.ndarray:
        scores, p, ranks = said.T
        figure = dict(zip(GRADES, grade_agreement(truth[at], scores, p)))
        # `paired` swaps judges. Swap ranks, not probabilities: the judges may use different scales.
        figure["auc"] = _auc(truth[at] > ACCEPTABLE, ranks)
        return np.array([figure[name] for name in names])

    return paired(rows, names, figures, student, said_by(student), other, said_by(other))
