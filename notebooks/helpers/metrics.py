"""Evaluate judgements: the agreement with the teacher, how sure it is, and what a student saves."""

import warnings
from collections.abc import Callable, Hashable, Iterable, Sequence

import numpy as np
import pandas as pd

Z = 1.959964  # the quantile of the normal distribution for an interval of 95 %
METRICS = ("correlation", "spearman", "kappa", "mae", "coverage")
# The figures whose intervals are computed on Fisher's z, and those on the logit.
CORRELATIONS = frozenset(("correlation", "spearman", "kappa"))
SHARES = frozenset(
    "accuracy precision recall auc coverage agreement_rate jaccard agreement_overall consistency "
    "prefers_first prefers_second longer_wins".split()
)

# A judge, or several whose median or majority counts as one: for example people.
Judge = str | Sequence[str]
# A function of an array of row numbers. It returns one figure, or an array of figures; in an array
# of two rows, the second says on how many independent rows each figure rests.
Statistic = Callable[[np.ndarray], np.ndarray]


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


def scores_of(rows: list[dict], judge: Judge) -> np.ndarray:
    """A judge's score for each row, (rows,), NaN if invalid. Raises what `judgements` raises.

    Of several judges (a list of names, for example of people): the median of the valid scores.
    """
    if isinstance(judge, str):
        said = judgements(rows, judge)
        return np.array([evaluation["score"] for evaluation in said], dtype=float)
    return pd.DataFrame([scores_of(rows, one) for one in judge]).median().to_numpy()


def valid_rows(rows: list[dict], judges: Sequence[Judge]) -> list[dict]:
    """The rows on which the judgements of all `judges` are valid; a ValueError if there is none."""
    scores = np.array([scores_of(rows, judge) for judge in judges])
    invalid: np.ndarray = np.isnan(scores).any(axis=0)
    if invalid.all():
        raise ValueError(f"no row on which {', '.join(map(str, judges))} are all valid")
    return [row for row, out in zip(rows, invalid) if not out]


def agreement(teacher: np.ndarray, student: np.ndarray) -> np.ndarray:
    """The figures of METRICS for two arrays of scores, (rows,), and the rows of each, (2, 5).

    A NaN score is an invalid judgement. A figure is NaN where it is undefined: for example, a
    constant judge has no correlation. Pearson's correlation, Spearman's correlation, kappa and the
    mean absolute error use the rows on which both judgements are valid. Coverage is the share of
    the teacher's valid rows on which the student is valid too.
    """
    judged = ~np.isnan(teacher)
    both = judged & ~np.isnan(student)
    x, y, n = teacher[both], student[both], both.sum()
    figures = [np.nan] * 4
    if n:
        spearman = pearson(ranks(x), ranks(y))
        figures = [pearson(x, y), spearman, quadratic_kappa(x, y), np.abs(x - y).mean()]
    coverage = n / judged.sum() if judged.any() else np.nan
    return np.array([[*figures, coverage], [n, n, n, n, judged.sum()]])


def quadratic_kappa(x: np.ndarray, y: np.ndarray) -> float:
    """Cohen's kappa with quadratic weights (1968): 1 - observed / expected squared difference.

    On an evenly spaced scale it equals scikit-learn's. It needs no categories: 3.7 is fine.
    """
    expected = np.mean(x**2) + np.mean(y**2) - 2 * x.mean() * y.mean()
    return float(1 - np.mean((x - y) ** 2) / expected) if expected > 1e-12 else np.nan


def pearson(x: np.ndarray, y: np.ndarray) -> float:
    """Pearson's correlation; NaN if one of the arrays is constant."""
    x, y = x - x.mean(), y - y.mean()
    scale = np.sqrt((x @ x) * (y @ y))
    return float(x @ y / scale) if scale > 1e-12 else np.nan


def ranks(x: np.ndarray) -> np.ndarray:
    """Ranks from 1; equal values share the mean of their ranks. A fast form of scipy's rankdata."""
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


def jackknife(
    groups: Sequence | np.ndarray, statistic: Statistic
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Figures, the half-widths of their 95 % intervals, and the p of "this figure is 0".

    `groups` are arrays of row numbers, as from `clusters_of`. Questions on one document are not
    independent (Miller 2024, arXiv:2411.00640). So one group at a time is deleted, and the quantile
    is that of t with one degree of freedom less than there are groups (MacKinnon, Nielsen and Webb
    2022, arXiv:2205.03285).

    Returns:
        Three arrays of the statistic's shape. The last two are NaN if a deletion leaves a figure
        undefined, or if there are fewer than two groups, of which a warning tells. Both are 0 if no
        deletion changes the figure.
    """
    from scipy.special import stdtr, stdtrit

    def figures(at: np.ndarray) -> np.ndarray:
        return np.atleast_2d(statistic(at))[0].astype(float)

    every, k = np.arange(sum(map(len, groups))), len(groups)
    whole = figures(every)
    if not enough(k):
        return whole, *np.full((2, *whole.shape), np.nan)
    left = np.array([figures(np.delete(every, group)) for group in groups])
    error = np.sqrt((k - 1) / k * ((left - whole) ** 2).sum(axis=0))
    error[error < 1e-12] = 0
    t = np.divide(whole, error, out=np.full(whole.shape, np.inf), where=error > 0)
    return whole, stdtrit(k - 1, 0.975) * error, 2 * stdtr(k - 1, -np.abs(t))


def enough(documents: int) -> bool:
    """Are there documents enough for an interval? If not, a warning says so."""
    if documents < 2:
        said = f"no interval: it needs rows of two documents or more, and here are {documents}"
        warnings.warn(said, stacklevel=3)
    return documents >= 2


def bounds(name: str, figure: float, half: float, n: float) -> tuple[float, float]:
    """The 95 % interval of a figure, (low, high), from the half-width that the jackknife gives.

    The interval is symmetric on Fisher's z for CORRELATIONS, and on the logit for SHARES. It is
    never narrower than the interval for `n` independent rows: Fisher's (1921) or Wilson's (1927),
    which alone serves a share of 0 or 1. A width of zero would say nothing: it is NaN.
    """
    from scipy.special import expit, logit

    if name in SHARES and half >= 0:
        if (room := figure * (1 - figure)) < 1e-12:
            least = n / (n + Z**2)
            return (least, 1.0) if figure > 0.5 else (0.0, 1 - least)
        half = max(half / room, 2 * np.arcsinh(Z / 2 / np.sqrt(n * room)))
        return float(expit(logit(figure) - half)), float(expit(logit(figure) + half))
    if name in CORRELATIONS:
        if not half >= 0 or n <= 3 or (room := 1 - figure**2) < 1e-12:
            return np.nan, np.nan
        half = max(half / room, Z / np.sqrt(n - 3))
        return float(np.tanh(np.arctanh(figure) - half)), float(np.tanh(np.arctanh(figure) + half))
    return (figure - half, figure + half) if half > 0 else (np.nan, np.nan)


def measured(rows: list[dict], names: Sequence[str], statistic: Statistic) -> dict[str, float]:
    """Figures and their 95 % intervals, as the cells of a report.

    `statistic` takes an array of row numbers and returns one figure for each name and, in a second
    row, the number of rows behind each (by default all). The cells are `<name>` for each name, then
    `<name>_low` and `<name>_high` for each name. See `jackknife` (of documents) and `bounds`.
    """
    every = np.arange(len(rows))
    figures, half, _ = jackknife(clusters_of(rows), statistic)
    others = np.array([name not in CORRELATIONS | SHARES for name in names])
    if others.any():  # they have no formula for independent rows, so delete one row at a time
        half_by_row = jackknife(every[:, None], statistic)[1]
        half = np.where(others, np.maximum(half, half_by_row), half)
    given = np.atleast_2d(statistic(every))
    counts = given[1] if len(given) == 2 else np.full(len(names), len(rows))
    cells = dict(zip(names, figures))
    for name, *of_name in zip(names, figures, half, counts):
        cells[f"{name}_low"], cells[f"{name}_high"] = bounds(name, *of_name)
    return cells


def by_judge(judges: Iterable[str], cells: Callable[[str], dict]) -> pd.DataFrame:
    """A report with one row for each judge. `cells(judge)` returns {column: value}."""
    report = {judge: cells(judge) for judge in judges}
    return pd.DataFrame.from_dict(report, orient="index").rename_axis("judge")


def paired(
    rows: list[dict],
    names: Sequence[str],
    student: str,
    other: str,
    statistic_of: Callable[[str], Statistic],
) -> pd.DataFrame:
    """Compare the figures of two judges on the same rows. For `statistic_of(judge)` see `measured`.

    Returns:
        One row for each name, with these columns: the figure of each judge, `difference` (student
        minus other), its 95 % interval (`low`, `high`), the two-sided `p` of the same t, and `n`
        (rows). Interval and p are by documents or by rows, whichever is wider (see `jackknife`).
        A value is NaN where it is undefined: two judges who never differ have no interval.

    Raises:
        ValueError: `student` is `other`.
    """
    if student == other:
        raise ValueError(f"{student!r} is compared with itself: name two judges")
    ours, theirs = statistic_of(student), statistic_of(other)
    every = np.arange(len(rows))
    by_document, by_row = (
        jackknife(groups, lambda at: ours(at)[0] - theirs(at)[0])
        for groups in (clusters_of(rows), every[:, None])
    )
    difference, half, p = np.maximum(by_document, by_row)
    half[half == 0] = np.nan
    p[np.isnan(half)] = np.nan
    table = {student: ours(every)[0], other: theirs(every)[0], "difference": difference}
    table |= {"low": difference - half, "high": difference + half, "p": p, "n": len(rows)}
    return pd.DataFrame(table, index=pd.Index(names, name="figure"))


def _statistic(rows: list[dict], teacher: Judge, student: str) -> Statistic:
    truth, given = scores_of(rows, teacher), scores_of(rows, student)
    return lambda at: agreement(truth[at], given[at])


def correctness_report(rows: list[dict], teacher: Judge, students: list[str]) -> pd.DataFrame:
    """Compare each student with the teacher, or with people (see `scores_of`), on the same rows.

    Returns:
        One row for each student: `n` (rows on which both judgements are valid), then the figures of
        METRICS (see `agreement`) with their 95 % intervals (see `measured`).

    Source: the original correctness notebook, which reports n and the correlation.
    """

    def cells(student: str) -> dict:
        statistic = _statistic(rows, teacher, student)
        n = int(statistic(np.arange(len(rows)))[1, 0])
        return {"n": n, **measured(rows, METRICS, statistic)}

    return by_judge(students, cells)


def compare_students(rows: list[dict], teacher: Judge, student: str, other: str) -> pd.DataFrame:
    """Compare how close `student` and `other` are to the teacher, on the rows valid for all three.

    The table is that of `paired`, for `correlation`, `kappa` and `mae`. It is a ValueError if there
    is no such row, or if `student` is `other`.
    """
    rows = valid_rows(rows, (teacher, student, other))
    table = paired(rows, METRICS, student, other, lambda judge: _statistic(rows, teacher, judge))
    return table.loc[["correlation", "kappa", "mae"]]


def ppi_mean(
    labels: Sequence, predictions: Sequence, rest: Sequence, documents: Sequence | None = None
) -> pd.Series:
    """Prediction-powered inference (PPI++): the mean of a few labels and many predictions.

    The predictions shorten the interval. Their error on the labelled rows is taken off, so the mean
    is right for any student, if the labelled rows were drawn at random.

    Args:
        labels: the labels of some rows, (n,), from the teacher or from people.
        predictions: the student's predictions of these labels, (n,). It must not have learnt from
            these rows (`Student.held_out` has such predictions).
        rest: the student's predictions on the rows without a label, (N,).
        documents: of the labelled rows, then of the rest, (n + N,). Without them, the rows count as
            independent.

    Returns:
        `mean` with its 95 % interval `low`, `high`; `lam`, the weight of the predictions, 0 to 1;
        `saved`, the share of labels that they save at equal width; `labels`, `labels_low` and
        `labels_high`, the mean and interval of the labels alone. The quantile is that of t.

    Raises:
        ValueError: the lengths differ, or a value is NaN.

    Source: Angelopoulos, Duchi and Zrnic 2023 (arXiv:2311.01453).
    """
    from scipy.special import stdtrit

    y, p, r = (np.asarray(given, dtype=float) for given in (labels, predictions, rest))
    n, unlabelled, every = len(y), len(r), np.arange(len(y) + len(r))
    lengths = n, len(p), unlabelled, len(every if documents is None else documents)
    if not n == len(p) > 0 < unlabelled == lengths[3] - n or np.isnan([*y, *p, *r]).any():
        raise ValueError(f"expected n, n, N and n + N values, no NaN; the lengths are {lengths}")
    codes = every if documents is None else pd.factorize(np.asarray(documents))[0]
    spread = np.append(p, r).var(ddof=1) * (1 + n / unlabelled)
    lam = float(np.clip(np.mean((y - y.mean()) * (p - p.mean())) / spread, 0, 1)) if spread else 0.0

    def half(lam: float, groups: np.ndarray) -> float:
        errors, k = y - lam * p, len(set(groups[:n]))
        parts = (errors - errors.mean()) / n, lam * (r - r.mean()) / unlabelled
        variance = (np.bincount(groups, np.append(*parts)) ** 2).sum() * k / (k - 1)
        return float(stdtrit(k - 1, 0.975) * np.sqrt(variance))

    ours = alone = np.nan
    if enough(len(set(codes[:n]))):
        ours, alone = (max(half(by, codes), half(by, every)) for by in (lam, 0))
    mean, saved = lam * r.mean() + (y - lam * p).mean(), 1 - ours**2 / alone**2 if alone else np.nan
    figures = {"mean": mean, "low": mean - ours, "high": mean + ours, "lam": lam, "saved": saved}
    figures |= {"labels": y.mean(), "labels_low": y.mean() - alone, "labels_high": y.mean() + alone}
    return pd.Series(figures)


def cascade(
    teacher: np.ndarray, student: np.ndarray, confidence: np.ndarray, cuts: Sequence | None = None
) -> pd.DataFrame:
    """A cascade: the student answers where it is confident, and the teacher is asked elsewhere.

    Args:
        teacher: its verdict on each row, (rows,); a ValueError if it has none on a row.
        student: its verdict on each row, (rows,).
        confidence: of the student in its verdict, (rows,); NaN where it has none.
        cuts: the student answers where its confidence is at least the cut. By default, each
            confidence that occurs.

    Returns:
        One row for each cut, from the highest: `saved` (the share of rows on which the teacher is
        not asked), `agreement` (with the teacher, over all rows) and `random` (this agreement, if
        the student answered as many rows drawn at random).
    """
    if missing := np.flatnonzero(pd.isna(teacher)).tolist():
        raise ValueError(f"the teacher has no verdict on row {missing[0]}: leave such rows out")
    sure = np.where(np.isnan(confidence), -np.inf, confidence)
    steps = np.sort(np.unique(sure[sure > -np.inf]) if cuts is None else np.array(cuts))[::-1]
    order, n = np.argsort(-sure), len(sure)
    wrong = np.append(0, np.cumsum((np.asarray(teacher) != np.asarray(student))[order]))
    answered = np.searchsorted(-sure[order], -steps, side="right")
    table = {"saved": answered / n, "agreement": 1 - wrong[answered] / n}
    table["random"] = 1 - table["saved"] * wrong[-1] / n
    return pd.DataFrame(table, index=pd.Index(steps, name="cut"))


def cascade_cut(
    teacher: np.ndarray,
    student: np.ndarray,
    confidence: np.ndarray,
    agreement: float = 0.95,
    sure: float = 0.9,
) -> float:
    """The lowest cut of a `cascade` that keeps this agreement with the probability `sure`.

    Choose it on rows of the training side that were held out. The share of wrong rows is bounded by
    Clopper and Pearson (1934), as if rows were independent. Where no cut will do, it is infinite:
    the teacher is always asked. By default, that is so for fewer than 45 rows.
    """
    from scipy.special import betaincinv

    curve, n = cascade(teacher, student, confidence), len(confidence)
    wrong = np.round((1 - curve["agreement"]) * n)
    kept = curve.index[betaincinv(wrong + 1, n - wrong, sure) <= 1 - agreement]
    return float(kept.min()) if len(kept) else np.inf
