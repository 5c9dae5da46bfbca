"""Evaluate judgements: the agreement with the teacher, and its uncertainty."""

import warnings
from collections.abc import Callable, Hashable, Iterable, Sequence
from functools import cache

import numpy as np
import pandas as pd

LEVEL = 0.95
RESAMPLES = 1000
METRICS = ("correlation", "spearman", "kappa", "mae", "coverage")

# A function of an array of row numbers. It returns one figure, or an array of figures.
Statistic = Callable[[np.ndarray], float | np.ndarray]


def judgements(rows: list[dict], judge: str) -> list[dict]:
    """A judge's evaluation of each row; a KeyError names a row that does not have exactly one."""
    found = []
    for number, row in enumerate(rows):
        judges = [evaluation["llm"] for evaluation in row.get("evaluations", [])]
        if judges.count(judge) != 1:
            raise KeyError(
                f"row {number} has {judges.count(judge)} judgements by {judge!r}, expected one; "
                f"the judges of this row are {judges}"
            )
        found.append(row["evaluations"][judges.index(judge)])
    return found


def scores_of(rows: list[dict], judge: str) -> np.ndarray:
    """A judge's score for each row, (rows,), NaN if invalid. Raises what `judgements` raises."""
    return np.array([evaluation["score"] for evaluation in judgements(rows, judge)], dtype=float)


def valid_rows(rows: list[dict], judges: Sequence[str]) -> list[dict]:
    """The rows on which the judgements of all `judges` are valid; a ValueError if there is none."""
    scores = np.array([scores_of(rows, judge) for judge in judges])
    invalid: np.ndarray = np.isnan(scores).any(axis=0)
    if invalid.all():
        raise ValueError(f"no row on which {', '.join(judges)} are all valid")
    return [row for row, out in zip(rows, invalid) if not out]


def agreement(teacher: np.ndarray, student: np.ndarray) -> np.ndarray:
    """The figures of METRICS for two arrays of scores, each of shape (rows,).

    A NaN score is an invalid judgement. A figure is NaN where it is undefined: for example, a
    constant judge has no correlation. Pearson's correlation, Spearman's correlation, kappa and the
    mean absolute error use the rows on which both judgements are valid. Coverage is the share of
    the teacher's valid rows on which the student is valid too.
    """
    judged = ~np.isnan(teacher)
    both = judged & ~np.isnan(student)
    coverage = both.sum() / judged.sum() if judged.any() else np.nan
    x, y = teacher[both], student[both]
    if not len(x):
        return np.array([np.nan, np.nan, np.nan, np.nan, coverage])
    spearman = _pearson(_ranks(x), _ranks(y))
    error = np.abs(x - y).mean()
    return np.array([_pearson(x, y), spearman, quadratic_kappa(x, y), error, coverage])


def quadratic_kappa(x: np.ndarray, y: np.ndarray) -> float:
    """Cohen's kappa with quadratic weights (1968): 1 - observed / expected squared difference.

    On an evenly spaced scale it equals scikit-learn's. It needs no categories: 3.7 is fine.
    """
    expected = np.mean(x**2) + np.mean(y**2) - 2 * x.mean() * y.mean()
    return float(1 - np.mean((x - y) ** 2) / expected) if expected > 1e-12 else np.nan


def _pearson(x: np.ndarray, y: np.ndarray) -> float:
    x, y = x - x.mean(), y - y.mean()
    scale = np.sqrt((x @ x) * (y @ y))
    return float(x @ y / scale) if scale > 1e-12 else np.nan


def _ranks(x: np.ndarray) -> np.ndarray:
    """Ranks from 1. Equal values share the mean of their ranks.

    scipy's rankdata gives the same ranks. Its checks make it ten times as slow, and the bootstrap
    calls this function thousands of times.
    """
    _, place, counts = np.unique(x, return_inverse=True, return_counts=True)
    return (counts.cumsum() - (counts - 1) / 2)[place]


def clusters_of(rows: list[dict]) -> list[np.ndarray]:
    """The rows' numbers, grouped by `document`.

    A row without a document is a group of its own. The published files have such rows.
    """
    groups: dict[Hashable, list[int]] = {}
    for number, row in enumerate(rows):
        document = row.get("document")
        group = ("row", number) if document is None else document
        groups.setdefault(group, []).append(number)
    return [np.array(group) for group in groups.values()]


def interval(rows: list[dict], statistic: Statistic) -> tuple[np.ndarray, np.ndarray]:
    """The 95 % interval of a statistic, from scipy's percentile bootstrap.

    Questions on one document are not independent. So the bootstrap draws whole documents (Miller
    2024, arXiv:2411.00640). With few documents this interval is too narrow: with three, it hardly
    goes beyond the worst and the best document. So a second bootstrap draws rows, and the result
    covers both intervals. With few documents, the true uncertainty is at least this large.

    Returns:
        (low, high), each with the shape of the statistic. NaN if there is only one document.
    """
    clusters = clusters_of(rows)
    if len(clusters) < 2:
        undefined = np.full(np.shape(statistic(np.arange(len(rows)))), np.nan)
        return undefined, undefined.copy()

    def of_documents(draw: np.ndarray) -> float | np.ndarray:
        return statistic(np.concatenate([clusters[i] for i in draw]))

    low, high = _bootstrap(len(clusters), of_documents)
    if len(clusters) < len(rows):
        low_of_rows, high_of_rows = _bootstrap(len(rows), statistic)
        low, high = np.fmin(low, low_of_rows), np.fmax(high, high_of_rows)
    return low, high


def _bootstrap(count: int, statistic: Statistic) -> np.ndarray:
    """The interval of a statistic of `count` things, shape (2, *shape of the statistic)."""
    from scipy.stats import DegenerateDataWarning, bootstrap

    def of_draws(draws: np.ndarray, axis: int = -1) -> np.ndarray:
        return np.moveaxis(np.array([statistic(draw) for draw in draws]), 0, -1)

    with warnings.catch_warnings():
        # scipy and numpy warn about an undefined figure. Here its interval is NaN.
        warnings.simplefilter("ignore", DegenerateDataWarning)
        warnings.filterwarnings("ignore", "All-NaN slice")
        figures = bootstrap(
            (np.arange(count),),
            of_draws,
            n_resamples=RESAMPLES,
            vectorized=True,
            method="percentile",
            rng=np.random.default_rng(0),
        ).bootstrap_distribution
        # Leave out the draws in which the figure is undefined.
        return np.nanquantile(figures, [(1 - LEVEL) / 2, (1 + LEVEL) / 2], axis=-1)


def measured(rows: list[dict], names: Sequence[str], statistic: Statistic) -> dict[str, float]:
    """Figures and their 95 % intervals, as the cells of a report.

    `statistic` takes an array of row numbers and returns one figure for each name. The cells are
    `<name>` for each name, then `<name>_low` and `<name>_high` for each name.
    """
    cells = dict(zip(names, np.asarray(statistic(np.arange(len(rows))))))
    for name, low, high in zip(names, *interval(rows, statistic)):
        cells |= {f"{name}_low": float(low), f"{name}_high": float(high)}
    return cells


def by_judge(judges: Iterable[str], cells: Callable[[str], dict]) -> pd.DataFrame:
    """A report with one row for each judge. `cells(judge)` returns {column: value}."""
    report = {judge: cells(judge) for judge in judges}
    return pd.DataFrame.from_dict(report, orient="index").rename_axis("judge")


def paired(
    rows: list[dict],
    names: Sequence[str],
    figures: Callable[[np.ndarray, np.ndarray], np.ndarray],
    student: str,
    ours: np.ndarray,
    other: str,
    theirs: np.ndarray,
) -> pd.DataFrame:
    """Compare the figures of two judges on the same rows.

    `ours` and `theirs` are the judgements of `student` and `other`, each of shape (rows, ...).
    `figures` takes a judge's judgements at some rows and the numbers of these rows. It returns one
    figure for each name.

    Returns:
        One row for each name, with these columns: the figure of each judge, `difference` (student
        minus other), its 95 % interval (`low`, `high`), the two-sided `p`, and `n` (rows). `p` is
        from scipy's permutation test, which swaps the two judges on whole documents. A value is
        NaN where a figure is undefined. With one document, `low`, `high` and `p` are NaN.

    Raises:
        ValueError: `student` is `other`.
    """
    from scipy.stats import permutation_test

    if student == other:
        raise ValueError(f"{student!r} is compared with itself: name two judges")
    clusters, every = clusters_of(rows), np.arange(len(rows))
    cluster = np.empty(len(rows), dtype=int)
    for number, members in enumerate(clusters):
        cluster[members] = number

    def difference(a: np.ndarray, b: np.ndarray, at: np.ndarray = every) -> np.ndarray:
        return figures(a[at], at) - figures(b[at], at)

    @cache  # the tests of all figures use the same swaps
    def swapped(documents: bytes) -> np.ndarray:
        swap = np.frombuffer(documents, dtype=bool)[cluster].reshape(-1, *[1] * (ours.ndim - 1))
        return difference(np.where(swap, theirs, ours), np.where(swap, ours, theirs))

    def p_value(k: int) -> float:
        if len(clusters) < 2 or np.isnan(observed[k]):
            return np.nan
        return permutation_test(
            # Sample i is the pair (0, 1) for document i. A pair that is swapped becomes (1, 0).
            (np.zeros(len(clusters)), np.ones(len(clusters))),
            lambda a, b: swapped((a > b).tobytes())[k],
            permutation_type="samples",
            vectorized=False,
            n_resamples=RESAMPLES,
            rng=np.random.default_rng(0),
        ).pvalue

    observed = difference(ours, theirs)
    low, high = interval(rows, lambda at: difference(ours, theirs, at))
    columns = {
        student: figures(ours, every),
        other: figures(theirs, every),
        "difference": observed,
        "low": low,
        "high": high,
        "p": [p_value(k) for k in range(len(names))],
        "n": len(rows),
    }
    return pd.DataFrame(columns, index=pd.Index(names, name="figure"))


def correctness_report(rows: list[dict], teacher: str, students: list[str]) -> pd.DataFrame:
    """Compare each student with the teacher, on the rows that both have judged.

    Returns:
        One row for each student: `n` (rows on which both judgements are valid), then the figures of
        METRICS (see `agreement`) with their 95 % intervals (see `measured`).

    Source: the original correctness notebook, which reports n and the correlation.
    """
    truth = scores_of(rows, teacher)

    def cells(student: str) -> dict:
        given = scores_of(rows, student)
        n = int((~np.isnan(truth) & ~np.isnan(given)).sum())
        return {"n": n, **measured(rows, METRICS, lambda at: agreement(truth[at], given[at]))}

    return by_judge(students, cells)


def compare_students(rows: list[dict], teacher: str, student: str, other: str) -> pd.DataFrame:
    """Compare how close `student` and `other` are to the teacher, on the rows valid for all three.

    The table is that of `paired`, for `correlation`, `kappa` and `mae`. It is a ValueError if there
    is no such row, or if `student` is `other`.
    """
    judges = (teacher, student, other)
    rows = valid_rows(rows, judges)
    truth, ours, theirs = (scores_of(rows, judge) for judge in judges)

    def figures(given: np.ndarray, at: np.ndarray) -> np.ndarray:
        x, y = truth[at], given
        return np.array([_pearson(x, y), quadratic_kappa(x, y), np.abs(x - y).mean()])

    return paired(rows, ("correlation", "kappa", "mae"), figures, student, ours, other, theirs)
