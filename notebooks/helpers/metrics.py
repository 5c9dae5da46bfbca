"""Evaluate: judgements -> agreement with the teacher, and how sure one can be of it."""

import warnings

import numpy as np
import pandas as pd

LEVEL = 0.95
RESAMPLES = 2000
METRICS = ("correlation", "spearman", "kappa", "mae", "coverage")


def scores_of(rows: list[dict], judge: str) -> np.ndarray:
    """A judge's score for each row, shape (rows,), with NaN where the judgement is invalid.

    Raises:
        KeyError: a row has no judgement by that judge, or more than one.
    """
    scores = []
    for number, row in enumerate(rows):
        given = [evaluation["score"] for evaluation in row.get("evaluations", []) if evaluation["llm"] == judge]
        if len(given) != 1:
            raise KeyError(f"row {number} has {len(given)} judgements by {judge!r}, expected one; it has "
                           f"{[evaluation['llm'] for evaluation in row.get('evaluations', [])]}")
        scores.append(np.nan if given[0] is None else given[0])
    return np.array(scores, dtype=float)


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
    return np.array([_pearson(x, y), _pearson(_ranks(x), _ranks(y)), quadratic_kappa(x, y), np.abs(x - y).mean(), coverage])


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
    from scipy.stats import rankdata

    return rankdata(x)


def clusters_of(rows: list[dict]) -> list[np.ndarray]:
    """The rows' numbers, grouped by `document`; rows without one stand alone (as in the published files)."""
    groups: dict = {}
    for number, row in enumerate(rows):
        groups.setdefault(row.get("document", number), []).append(number)
    return [np.array(group) for group in groups.values()]


def interval(rows: list[dict], statistic) -> tuple[np.ndarray, np.ndarray]:
    """The 95 % interval of a statistic: scipy's percentile bootstrap, resampling whole documents.

    Questions on one document are not independent, so documents are drawn, not rows (Miller 2024, arXiv:2411.00640).

    Args:
        rows: the rows, for their documents.
        statistic: of an array of row numbers; returns one figure, or an array of k.

    Returns:
        (low, high), each of the statistic's shape; NaN where there is but one document.
    """
    from scipy.stats import DegenerateDataWarning, bootstrap

    clusters = clusters_of(rows)
    shape = np.shape(statistic(np.arange(len(rows))))
    if len(clusters) < 2:
        return np.full(shape, np.nan), np.full(shape, np.nan)

    def of_draws(draws: np.ndarray, axis: int = -1) -> np.ndarray:
        draws = np.moveaxis(np.atleast_2d(draws), axis, -1)
        figures = np.array([statistic(np.concatenate([clusters[i] for i in draw])) for draw in draws])
        return np.moveaxis(figures, 0, -1)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DegenerateDataWarning)  # scipy's word on a figure that is undefined: NaN here
        figures = bootstrap((np.arange(len(clusters)),), of_draws, n_resamples=RESAMPLES, vectorized=True, method="percentile",
                            rng=np.random.default_rng(0)).bootstrap_distribution
    # A draw in which a figure is undefined says nothing of it and is left out.
    ends = [np.quantile(draws[~np.isnan(draws)], [(1 - LEVEL) / 2, (1 + LEVEL) / 2]) if not np.isnan(draws).all()
            else [np.nan, np.nan] for draws in figures.reshape(-1, RESAMPLES)]
    low, high = np.array(ends).T.reshape(2, *shape)
    return low, high


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
        figures = agreement(truth, given)
        low, high = interval(rows, lambda at: agreement(truth[at], given[at]))
        report[student] = {"n": int((~np.isnan(truth) & ~np.isnan(given)).sum()), **dict(zip(METRICS, figures)),
                           **{f"{name}_{end}": value for i, name in enumerate(METRICS)
                              for end, value in (("low", low[i]), ("high", high[i]))}}
    return pd.DataFrame.from_dict(report, orient="index").rename_axis("judge")


def compare_students(rows: list[dict], teacher: str, student: str, other: str) -> pd.DataFrame:
    """Is `student` closer to the teacher than `other`, on the very same rows? A paired comparison.

    Returns:
        A row for `correlation`, `kappa` and `mae`: the figure of each, `difference` (student minus other) with its 95 %
        interval by document (`low`, `high`), and `p`: two-sided, from exchanging the two students' judgements a whole
        document at a time (scipy's permutation test). Rows that either left invalid are left out; `n` says how many remain.

    Raises:
        ValueError: no row is left.
    """
    from scipy.stats import permutation_test

    truth, ours, theirs = (scores_of(rows, judge) for judge in (teacher, student, other))
    valid = ~np.isnan(truth + ours + theirs)
    if not valid.any():
        raise ValueError(f"no row on which {teacher}, {student} and {other} are all valid")
    rows, truth, ours, theirs = [row for row, keep in zip(rows, valid) if keep], truth[valid], ours[valid], theirs[valid]
    clusters, all_rows = clusters_of(rows), np.arange(len(rows))
    cluster = np.empty(len(rows), dtype=int)
    for number, members in enumerate(clusters):
        cluster[members] = number

    def figures(given: np.ndarray, at: np.ndarray) -> np.ndarray:
        x, y = truth[at], given[at]
        return np.array([_pearson(x, y), quadratic_kappa(x, y), np.abs(x - y).mean()])

    def difference(a: np.ndarray, b: np.ndarray, at: np.ndarray = all_rows) -> np.ndarray:
        return figures(a, at) - figures(b, at)

    low, high = interval(rows, lambda at: difference(ours, theirs, at))

    def exchanged(first: np.ndarray, second: np.ndarray) -> np.ndarray:
        swap = (first > second)[cluster]
        return difference(np.where(swap, theirs, ours), np.where(swap, ours, theirs))

    # Sample i is the pair (0, 1) of document i: permuting within samples is exchanging the two students there.
    sides, observed = (np.zeros(len(clusters)), np.ones(len(clusters))), difference(ours, theirs)
    tests = [permutation_test(sides, lambda a, b, k=k: exchanged(a, b)[k], permutation_type="samples", vectorized=False,
                              n_resamples=RESAMPLES, rng=np.random.default_rng(0)) for k in range(3)]
    return pd.DataFrame({student: figures(ours, all_rows), other: figures(theirs, all_rows), "difference": observed, "low": low, "high": high,
                         "p": [test.pvalue for test in tests], "n": len(rows)},
                        index=pd.Index(["correlation", "kappa", "mae"], name="figure"))
