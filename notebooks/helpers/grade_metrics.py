"""Evaluate single grading: scores and verdicts (acceptable or not) -> agreement with the teacher, each figure with its uncertainty."""

import numpy as np
import pandas as pd

from .grading import ACCEPTABLE, score_distribution
from .metrics import _pearson, _ranks, evaluation_of, measured, paired, scores_of

GRADES = (
    "correlation",
    "mae",
    "accuracy",
    "precision",
    "recall",
    "kappa",
    "auc",
    "brier",
    "coverage",
)


def probabilities_of(rows: list[dict], judge: str) -> np.ndarray:
    """A judge's probability that each answer is acceptable, (rows,), NaN where its judgement is invalid.

    What a judge's `distribution` or `samples` put above ACCEPTABLE; the score itself of a judge that gives nothing but a score.
    """
    probabilities = scores_of(rows, judge)
    for number, row in enumerate(rows):
        evaluation = evaluation_of(row, number, judge)
        if evaluation["score"] is not None and (
            "distribution" in evaluation or "samples" in evaluation
        ):
            probabilities[number] = sum(
                p for score, p in score_distribution(evaluation).items() if score > ACCEPTABLE
            )
    return probabilities


def grade_agreement(
    teacher: np.ndarray, scores: np.ndarray, probabilities: np.ndarray
) -> np.ndarray:
    """The figures of GRADES for arrays of shape (rows,); NaN scores are invalid judgements.

    On the rows on which both are valid: Pearson's correlation and mean absolute error of the scores; then of the verdicts (score
    above ACCEPTABLE) accuracy, precision and recall of "acceptable", Cohen's kappa; of the probabilities the area under the ROC
    curve and the Brier score (0 is perfect). Coverage is the share of the teacher's valid rows on which the judge is valid too.
    NaN where a figure is undefined.
    """
    judged = ~np.isnan(teacher)
    both = judged & ~np.isnan(scores)
    coverage = both.sum() / judged.sum() if judged.any() else np.nan
    x, y, p = teacher[both], scores[both], probabilities[both]
    if not len(x):
        return np.array([np.nan] * (len(GRADES) - 1) + [coverage])
    truth, given = x > ACCEPTABLE, y > ACCEPTABLE
    accuracy, hits = (truth == given).mean(), (truth & given).sum()
    expected = truth.mean() * given.mean() + (1 - truth.mean()) * (1 - given.mean())
    return np.array(
        [
            _pearson(x, y),
            np.abs(x - y).mean(),
            accuracy,
            hits / given.sum() if given.any() else np.nan,
            hits / truth.sum() if truth.any() else np.nan,
            (accuracy - expected) / (1 - expected) if expected < 1 else np.nan,
            _auc(truth, p),
            ((p - truth) ** 2).mean(),
            coverage,
        ]
    )


def _auc(truth: np.ndarray, p: np.ndarray) -> float:
    """The probability that an acceptable answer is ranked above one that is not (Mann-Whitney's U over all pairs)."""
    positive = truth.sum()
    pairs = positive * (len(truth) - positive)
    return (
        float((_ranks(p)[truth].sum() - positive * (positive + 1) / 2) / pairs) if pairs else np.nan
    )


def grading_report(rows: list[dict], teacher: str, judges: list[str]) -> pd.DataFrame:
    """How close each judge comes to the teacher on single grading.

    Returns:
        A row a judge. Columns: `n` (rows on which both are valid), `acceptable` (how many of these the teacher accepts), and the
        figures of GRADES (see `grade_agreement`), then their 95 % intervals as `<figure>_low` and `<figure>_high`.
    """
    truth = scores_of(rows, teacher)
    report = {}
    for judge in judges:
        scores, p = scores_of(rows, judge), probabilities_of(rows, judge)
        both = ~np.isnan(truth) & ~np.isnan(scores)
        report[judge] = {
            "n": int(both.sum()),
            "acceptable": int((truth[both] > ACCEPTABLE).sum()),
            **measured(rows, GRADES, lambda at: grade_agreement(truth[at], scores[at], p[at])),
        }
    return pd.DataFrame.from_dict(report, orient="index").rename_axis("judge")


def compare_graders(rows: list[dict], teacher: str, student: str, other: str) -> pd.DataFrame:
    """Is `student` closer to the teacher than `other`, on the very same rows? As `paired`, for `mae`, `accuracy`, `auc` and `brier`.

    Raises:
        ValueError: no row is left on which all three are valid.
    """
    names = ("mae", "accuracy", "auc", "brier")
    truth = scores_of(rows, teacher)
    ours, theirs = (
        np.stack([scores_of(rows, judge), probabilities_of(rows, judge)], axis=1)
        for judge in (student, other)
    )
    valid = ~np.isnan(truth + ours[:, 0] + theirs[:, 0])
    if not valid.any():
        raise ValueError(f"no row on which {teacher}, {student} and {other} are all valid")
    rows, truth = [row for row, keep in zip(rows, valid) if keep], truth[valid]
    # A ranking is a judge's own: exchanged are ranks, for of two judges' probabilities together one may always stand above the other.
    ours, theirs = (
        np.column_stack([said[valid], _ranks(said[valid, 1])]) for said in (ours, theirs)
    )

    def figures(said: np.ndarray, at: np.ndarray) -> np.ndarray:
        figure = dict(
            zip(GRADES, grade_agreement(truth[at], said[:, 0], said[:, 1])),
            auc=_auc(truth[at] > ACCEPTABLE, said[:, 2]),
        )
        return np.array([figure[name] for name in names])

    return paired(rows, names, figures, student, ours, other, theirs)
