"""Evaluate: judgements -> agreement with the teacher, and how sure one can be of it."""

import warnings
from functools import lru_cache

import numpy as np
import pandas as pd

LEVEL = 0.95
RESAMPLES = 1000
METRICS = ("correlation", "spearman", "kappa", "mae", "coverage")


def evaluation_of(row: dict, number: int, judge: str) -> dict:
    """A judge's evaluation of a row, whose `number` is for the error only.

    Raises:
        KeyError: there is none, or more than one.
    """
    given = [evaluation for evaluation in row.get("evaluations", []) if evaluation["llm"] == judge]
    if len(given) != 1:
        raise KeyError(
            f"row {number} has {len(given)} judgements by {judge!r}, expected one; it has "
            f"{[evaluation['llm'] for evaluation in row.get('evaluations', [])]}"
        )
    return given[0]


def scores_of(rows: list[dict], judge: str) -> np.ndarray:
    """A judge's score for each row, shape (rows,), with NaN where the judgement is invalid.

    Raises:
        KeyError: a row has no judgement by that judge, or more than one.
    """
    return np.array(
        [evaluation_of(row, number, judge)["score"] for number, row in enumerate(rows)], dtype=float
    )


def agreement(teacher: np.ndarray, student: np.ndarray) -> np.ndarray:
    """The figures of METRICS for two score arrays of shape (rows,); NaN scores are invalid judgements.

    Correlation (Pearson's), Spearman's, kappa and the mean absolute error are over the rows on which both are valid;
    coverage is the share of the teacher's valid rows on which the student is valid too. NaN where a figure is undefined
    (a constant judge has no correlation).
    """
    judged = ~np.isnan(teacher)
    both = judged & ~np.isnan(student)
    coverage = both.sum() / judged.sum() if judged.any() else np.nan
    x, y = teacher[both], student[both]
    if not len(x):
        return np.array([np.nan, np.nan, np.nan, np.nan, coverage])
    return np.array(
        [
            _pearson(x, y),
            _pearson(_ranks(x), _ranks(y)),
            quadratic_kappa(x, y),
            np.abs(x - y).mean(),
            coverage,
        ]
    )


def quadratic_kappa(x: np.ndarray, y: np.ndarray) -> float:
    """Cohen's kappa with quadratic weights (Cohen 1968): 1 minus observed over expected squared difference.

    For scores on an evenly spaced scale this is scikit-learn's cohen_kappa_score(weights="quadratic"); written this way it
    needs no categories, so it takes a student that answers 3.7 as it is.
    """
    expected = np.mean(x**2) + np.mean(y**2) - 2 * x.mean() * y.mean()
    return float(1 - np.mean((x - y) ** 2) / expected) if expected > 1e-12 else np.nan


def _pearson(x: np.ndarray, y: np.ndarray) -> float:
    x, y = x - x.mean(), y - y.mean()
    scale = np.sqrt((x @ x) * (y @ y))
    return float(x @ y / scale) if scale > 1e-12 else np.nan


def _ranks(x: np.ndarray) -> np.ndarray:
    """Ranks from 1, ties sharing their mean: scipy's rankdata, whose checks take ten times as long in each of thousands of draws."""
    _, place, counts = np.unique(x, return_inverse=True, return_counts=True)
    return (counts.cumsum() - (counts - 1) / 2)[place]


def clusters_of(rows: list[dict]) -> list[np.ndarray]:
    """The rows' numbers, grouped by `document`; rows without one stand alone (as in the published files)."""
    groups: dict = {}
    for number, row in enumerate(rows):
        document = row.get("document")
        groups.setdefault(("row", number) if document is None else document, []).append(number)
    return [np.array(group) for group in groups.values()]


def interval(rows: list[dict], statistic) -> tuple[np.ndarray, np.ndarray]:
    """The 95 % interval of a statistic, from scipy's percentile bootstrap: the outer ends of two, of whole documents and of rows.

    Questions on one document are not independent, so documents are drawn, not rows alone (Miller 2024, arXiv:2411.00640). Of few
    documents the bootstrap is too narrow (of three, hardly more than from the worst to the best of them), so the interval is never
    narrower than if rows were independent. With few documents it is the least doubt one should have, not all of it.

    Args:
        rows: the rows, for their documents.
        statistic: of an array of row numbers; returns one figure, or an array of k.

    Returns:
        (low, high), each of the statistic's shape; NaN where there is but one document.
    """
    clusters, every = clusters_of(rows), np.arange(len(rows))
    shape = np.shape(statistic(every))
    if len(clusters) < 2:
        return np.full(shape, np.nan), np.full(shape, np.nan)
    low, high = _bootstrap(
        len(clusters), lambda draw: statistic(np.concatenate([clusters[i] for i in draw])), shape
    )
    if len(clusters) < len(rows):
        low_of_rows, high_of_rows = _bootstrap(len(rows), statistic, shape)
        low, high = np.fmin(low, low_of_rows), np.fmax(high, high_of_rows)
    return low, high


def _bootstrap(count: int, statistic, shape: tuple) -> np.ndarray:
    """The ends of the percentile interval, (2, *shape), of a statistic of `count` things drawn with replacement."""
    from scipy.stats import DegenerateDataWarning, bootstrap

    def of_draws(draws: np.ndarray, axis: int = -1) -> np.ndarray:
        draws = np.moveaxis(np.atleast_2d(draws), axis, -1)
        return np.moveaxis(np.array([statistic(draw) for draw in draws]), 0, -1)

    with warnings.catch_warnings():
        warnings.simplefilter(
            "ignore", DegenerateDataWarning
        )  # scipy's word on a figure that is undefined: NaN here
        figures = bootstrap(
            (np.arange(count),),
            of_draws,
            n_resamples=RESAMPLES,
            vectorized=True,
            method="percentile",
            rng=np.random.default_rng(0),
        ).bootstrap_distribution
    # A draw in which a figure is undefined says nothing of it and is left out.
    ends = [
        np.quantile(draws[~np.isnan(draws)], [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
        if not np.isnan(draws).all()
        else [np.nan, np.nan]
        for draws in figures.reshape(-1, RESAMPLES)
    ]
    return np.array(ends).T.reshape(2, *shape)


def measured(rows: list[dict], names: tuple, statistic) -> dict:
    """Figures and their intervals as the cells of a report: <name>, then <name>_low and <name>_high of each.

    Args:
        statistic: of an array of row numbers; returns a figure a name.
    """
    figures, (low, high) = statistic(np.arange(len(rows))), interval(rows, statistic)
    return {
        **dict(zip(names, figures)),
        **{
            f"{name}_{end}": float(value[i])
            for i, name in enumerate(names)
            for end, value in (("low", low), ("high", high))
        },
    }


def paired(
    rows: list[dict],
    names: tuple,
    figures,
    student: str,
    ours: np.ndarray,
    other: str,
    theirs: np.ndarray,
) -> pd.DataFrame:
    """Two judges' figures on the same rows, compared.

    Args:
        figures: of (what a judge said at some rows, the numbers of these rows); returns a figure a name.
        ours, theirs: what the two judges said, (rows, ...).

    Returns:
        A row a name: the figure of each, `difference` (student minus other) with its 95 % `interval` (`low`, `high`),
        and `p`: two-sided, from exchanging the two judges' judgements a whole document at a time (scipy's permutation test). NaN
        stands where a figure is undefined, and for interval and `p` where all rows are of one document.
    """
    from scipy.stats import permutation_test

    clusters, every = clusters_of(rows), np.arange(len(rows))
    cluster = np.empty(len(rows), dtype=int)
    for number, members in enumerate(clusters):
        cluster[members] = number

    def difference(a: np.ndarray, b: np.ndarray, at: np.ndarray = every) -> np.ndarray:
        return figures(a[at], at) - figures(b[at], at)

    @lru_cache(maxsize=None)  # the tests of all figures go through the same exchanges
    def exchanged(documents: bytes) -> np.ndarray:
        swap = np.frombuffer(documents, dtype=bool)[cluster].reshape(-1, *[1] * (ours.ndim - 1))
        return difference(np.where(swap, theirs, ours), np.where(swap, ours, theirs))

    def p_value(k: int) -> float:
        if len(clusters) < 2 or np.isnan(observed[k]):
            return np.nan
        return permutation_test(
            sides,
            lambda a, b: exchanged((a > b).tobytes())[k],
            permutation_type="samples",
            vectorized=False,
            n_resamples=RESAMPLES,
            rng=np.random.default_rng(0),
        ).pvalue

    # Sample i is the pair (0, 1) of document i: permuting within samples is exchanging the two judges there.
    sides, observed = (np.zeros(len(clusters)), np.ones(len(clusters))), difference(ours, theirs)
    low, high = interval(rows, lambda at: difference(ours, theirs, at))
    return pd.DataFrame(
        {
            student: figures(ours, every),
            other: figures(theirs, every),
            "difference": observed,
            "low": low,
            "high": high,
            "p": [p_value(k) for k in range(len(names))],
            "n": len(rows),
        },
        index=pd.Index(names, name="figure"),
    )


def correctness_report(rows: list[dict], teacher: str, students: list[str]) -> pd.DataFrame:
    """How close each student comes to the teacher, on rows that both have judged.

    Returns:
        A row a student. Columns: `n` (rows on which both judgements are valid), `correlation`, `spearman`, `kappa`
        (quadratic weights), `mae` (in points of the score) and `coverage`; then each figure's 95 % interval, as
        `<figure>_low` and `<figure>_high`.

    Source: the original correctness notebook, which reports n and the correlation.
    """
    truth = scores_of(rows, teacher)
    report = {}
    for student in students:
        given = scores_of(rows, student)
        report[student] = {
            "n": int((~np.isnan(truth) & ~np.isnan(given)).sum()),
            **measured(rows, METRICS, lambda at: agreement(truth[at], given[at])),
        }
    return pd.DataFrame.from_dict(report, orient="index").rename_axis("judge")


def compare_students(rows: list[dict], teacher: str, student: str, other: str) -> pd.DataFrame:
    """Is `student` closer to the teacher than `other`, on the very same rows?

    Returns:
        As `paired`, for `correlation`, `kappa` and `mae`. Rows that a judge left invalid are left out; `n` says how many remain.

    Raises:
        ValueError: no row is left.
    """
    truth, ours, theirs = (scores_of(rows, judge) for judge in (teacher, student, other))
    valid = ~np.isnan(truth + ours + theirs)
    if not valid.any():
        raise ValueError(f"no row on which {teacher}, {student} and {other} are all valid")
    rows, truth = [row for row, keep in zip(rows, valid) if keep], truth[valid]

    def figures(given: np.ndarray, at: np.ndarray) -> np.ndarray:
        return np.array(
            [
                _pearson(truth[at], given),
                quadratic_kappa(truth[at], given),
                np.abs(truth[at] - given).mean(),
            ]
        )

    return paired(
        rows, ("correlation", "kappa", "mae"), figures, student, ours[valid], other, theirs[valid]
    )
