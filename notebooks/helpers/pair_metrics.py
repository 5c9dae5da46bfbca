"""Evaluate pairs: verdicts -> agreement, position and length, each with its interval."""

import numpy as np
import pandas as pd

from .judge import SCORES
from .metrics import Judge, Statistic, by_judge, judgements, measured, paired, pearson, scores_of

RATES = ("agreement_rate", "correlation", "jaccard", "coverage", "agreement_overall", "kappa")


def _verdicts(rows: list[dict], judge: str) -> list:
    evaluations = judgements(rows, judge)
    for number, evaluation in enumerate(evaluations):
        if "verdicts" not in evaluation:
            raise KeyError(
                f"row {number}: the judgement by {judge!r} has no 'verdicts' of both orders (the "
                "published rows do not have them)"
            )
    return [evaluation["verdicts"] for evaluation in evaluations]


def pair_scores(
    rows: list[dict], judge: Judge, flipped: str = "corrected"
) -> tuple[np.ndarray, np.ndarray]:
    """A judge's scores, and which judgements are invalid: (scores, invalid), each (rows,).

    A score is 1 for the first answer, 0 for the second and 0.5 for a tie. It is NaN where the judge
    reached no verdict. The rows hold a score as its order gave it. `flipped="corrected"` reverses a
    score from the flipped order. `flipped="as_published"` keeps it, as the original notebooks did.
    Of several judges (a list of names, for example of people): what most of those say who reached a
    verdict, and a tie if there is no majority. A KeyError names a row without a judgement.
    """
    if flipped not in ("corrected", "as_published"):
        raise ValueError(f"flipped={flipped!r}: expected 'corrected' or 'as_published'")
    if not isinstance(judge, str):
        each, invalid = zip(*(pair_scores(rows, one, flipped) for one in judge))
        median = pd.DataFrame(each).median()
        return median.where(~median.isin([0.25, 0.75]), 0.5).to_numpy(), np.all(invalid, axis=0)
    said = pd.DataFrame(judgements(rows, judge), columns=["score", "source"])
    scores = said["score"].where(said["source"].isin(["original", "flipped"])).astype(float)
    if flipped == "corrected":
        scores = scores.where(said["source"] != "flipped", 1 - scores)
    return scores.to_numpy(), said["score"].isna().to_numpy()


def are_pairs(rows: list[dict]) -> bool:
    """Whether these rows are pairs: their judgements say from which order a score comes."""
    return any("source" in evaluation for row in rows[:1] for evaluation in row["evaluations"])


def verdicts_of(rows: list[dict], judge: Judge) -> np.ndarray:
    """A judge's scores, (rows,): those of `scores_of` or, for pairs, of `pair_scores`."""
    return pair_scores(rows, judge)[0] if are_pairs(rows) else scores_of(rows, judge)


def pair_agreement(teacher: np.ndarray, student: np.ndarray) -> np.ndarray:
    """The figures of RATES for two arrays of scores as from `pair_scores`, and the pairs of each.

    The first three are those of the original, on the rows on which both judges reached a verdict:
    agreement rate, Pearson's correlation, and the Jaccard index, weighted by the teacher's
    verdicts. The others use all rows on which the teacher reached a verdict: how often the student
    reached one too, how often it agreed, and Cohen's kappa, which counts "no verdict" as a verdict
    of its own. A figure is NaN where it is undefined. The array is (2, 6).
    """
    judged = ~np.isnan(teacher)
    x, y = teacher[judged], student[judged]
    both = ~np.isnan(y)
    counts = [both.sum()] * 3 + [len(x)] * 3
    if not both.any():
        overall = 0.0 if judged.any() else np.nan
        return np.array([[np.nan] * 3 + [overall] * 3, counts])
    agreed = (x == y).sum()
    overall = agreed / len(x)
    expected = sum((x == verdict).mean() * (y == verdict).mean() for verdict in (0.0, 0.5, 1.0))
    kappa = (overall - expected) / (1 - expected) if expected < 1 else np.nan
    x, y = x[both], y[both]
    wanted, given = (np.array([side == verdict for verdict in np.unique(x)]) for side in (x, y))
    shares = (wanted & given).sum(axis=1) / (wanted | given).sum(axis=1)  # one for each verdict
    jaccard = np.average(shares, weights=wanted.sum(axis=1))
    rates = [agreed / len(x), pearson(x, y), jaccard, both.mean(), overall, kappa]
    return np.array([rates, counts])


def _statistic(rows: list[dict], teacher: Judge, student: str, flipped: str) -> Statistic:
    truth, given = (pair_scores(rows, judge, flipped)[0] for judge in (teacher, student))
    return lambda at: pair_agreement(truth[at], given[at])


def pairwise_report(
    rows: list[dict], teacher: Judge, students: list[str], flipped: str = "corrected"
) -> pd.DataFrame:
    """Compare each student with the teacher, or with people (see `pair_scores`), on pairs.

    Returns:
        One row for each student: `inconclusive` (pairs on which the two orders contradict each
        other), `agreements` out of `compared` (pairs on which both judges reached a verdict), the
        figures of RATES (see `pair_agreement`) with their 95 % intervals (see `measured`), and the
        number of `invalid` judgements.

    Source: the original pairwise notebook, which has the first six, with flipped="as_published".
    """
    truth, _ = pair_scores(rows, teacher, flipped)

    def cells(student: str) -> dict:
        given, invalid = pair_scores(rows, student, flipped)
        return {
            "inconclusive": int((np.isnan(given) & ~invalid).sum()),
            "agreements": int((truth == given).sum()),
            "compared": int((~np.isnan(truth) & ~np.isnan(given)).sum()),
            **measured(rows, RATES, _statistic(rows, teacher, student, flipped)),
            "invalid": int(invalid.sum()),
        }

    return by_judge(students, cells)


def compare_pair_students(
    rows: list[dict], teacher: Judge, student: str, other: str, flipped: str = "corrected"
) -> pd.DataFrame:
    """Compare how often `student` and `other` agree with the teacher, where it reached a verdict.

    The table is that of `paired`, for `agreement_overall` and `kappa`: a missing verdict of a
    student counts as not agreeing.
    """
    decided = ~np.isnan(pair_scores(rows, teacher, flipped)[0])
    rows = [row for row, kept in zip(rows, decided) if kept]
    table = paired(
        rows, RATES, student, other, lambda judge: _statistic(rows, teacher, judge, flipped)
    )
    return table.loc[["agreement_overall", "kappa"]]


def position_report(rows: list[dict], judges: list[str]) -> pd.DataFrame:
    """Measure how the order of the answers influences each judge.

    Returns:
        One row for each judge: `pairs` (with a readable verdict in both orders), and shares of them
        with 95 % intervals: `consistency` (both orders give the same result), `prefers_first` and
        `prefers_second` (the judge chooses this place in one order, and it or a tie in the other).
    """
    names = ("consistency", "prefers_first", "prefers_second")

    def cells(judge: str) -> dict:
        # Positive if the judge prefers the first place; NaN if a verdict is missing.
        verdicts = _verdicts(rows, judge)
        lean = [SCORES.get(one, np.nan) + SCORES.get(other, np.nan) - 1 for one, other in verdicts]
        preferred = np.sign(lean)

        def shares(at: np.ndarray) -> np.ndarray:
            signs = preferred[at][~np.isnan(preferred[at])]
            each = [(signs == sign).mean() if len(signs) else np.nan for sign in (0, 1, -1)]
            return np.array([each, [len(signs)] * 3])

        return {"pairs": int(np.isfinite(lean).sum()), **measured(rows, names, shares)}

    return by_judge(judges, cells)


def order_table(rows: list[dict], judge: str) -> pd.DataFrame:
    """Count a judge's verdicts in the two orders, 3 x 3. "first" names the same answer in both."""
    in_original = {"A": "first", "C": "tie", "B": "second"}
    in_flipped = {"B": "first", "C": "tie", "A": "second"}
    index = pd.Index(in_original.values(), name="original order")
    table = pd.DataFrame(0, index=index, columns=index.rename("flipped order"))
    for original, flipped in _verdicts(rows, judge):
        if original and flipped:
            table.loc[in_original[original], in_flipped[flipped]] += 1
    return table


def answer_lengths(row: dict) -> list[int]:
    """The number of words of each answer. Rows without texts (the published ones) hold `words`."""
    if "words" in row:
        return row["words"]
    return [len(answer["text"].split()) for answer in row["answers"]]


def length_report(rows: list[dict], judges: list[str]) -> pd.DataFrame:
    """Measure how often the longer answer wins.

    Returns:
        One row for each judge: `with_winner` (pairs of unequal length in which one answer won), and
        `longer_wins`, the share of them that the longer answer won, with its 95 % interval. A judge
        without a preference has 0.5. But the longer answer may also be the better one.
    """
    longer = np.array([np.sign(first - second) for first, second in map(answer_lengths, rows)])

    def cells(judge: str) -> dict:
        scores, _ = pair_scores(rows, judge)
        winner = np.where(np.isnan(scores), 0, np.sign(scores - 0.5)) * (longer != 0)

        def share(at: np.ndarray) -> np.ndarray:
            decided = at[winner[at] != 0]
            wins = winner[decided] == longer[decided]
            return np.array([[wins.mean() if len(wins) else np.nan], [len(wins)]])

        count = int((winner != 0).sum())
        return {"with_winner": count, **measured(rows, ("longer_wins",), share)}

    return by_judge(judges, cells)
