"""Evaluate pairs: verdicts -> agreement, position, length, each with its uncertainty."""

import numpy as np
import pandas as pd

from .metrics import evaluation_of, interval, measured

FLIPPED = ("corrected", "as_published")
RATES = ("agreement_rate", "correlation", "jaccard", "coverage", "agreement_overall", "kappa")


def _verdicts(row: dict, number: int, judge: str) -> list:
    evaluation = evaluation_of(row, number, judge)
    if "verdicts" not in evaluation:
        raise KeyError(
            f"row {number}: the judgement by {judge!r} has no 'verdicts' of both orders (the published rows do not have them)"
        )
    return evaluation["verdicts"]


def pair_scores(
    rows: list[dict], judge: str, flipped: str = "corrected"
) -> tuple[np.ndarray, np.ndarray]:
    """(scores, invalid), each (rows,): 1 the first answer, 0 the second, 0.5 a tie, NaN where the judge reached no verdict.

    `flipped="corrected"` turns the score of a verdict from the flipped order, which the rows hold as that order gave it;
    "as_published" takes it at face value, as the original notebooks did.

    Raises:
        KeyError: a row has no judgement by that judge, or more than one.
    """
    if flipped not in FLIPPED:
        raise ValueError(f"flipped={flipped!r}: expected one of {', '.join(FLIPPED)}")
    scores, invalid = np.full(len(rows), np.nan), np.zeros(len(rows), dtype=bool)
    for number, row in enumerate(rows):
        evaluation = evaluation_of(row, number, judge)
        invalid[number] = evaluation["score"] is None
        if evaluation["source"] in ("original", "flipped") and not invalid[number]:
            turn = flipped == "corrected" and evaluation["source"] == "flipped"
            scores[number] = 1 - evaluation["score"] if turn else evaluation["score"]
    return scores, invalid


def pair_agreement(teacher: np.ndarray, student: np.ndarray) -> np.ndarray:
    """The figures of RATES for two score arrays as from `pair_scores`; NaN where one is undefined.

    The first three, as in the original, are over the rows on which both reached a verdict: agreement rate, Pearson's
    correlation, Jaccard index weighted by the teacher's verdicts. The others are over all rows on which the teacher did: how
    often the student did too, how often it did and agreed, and Cohen's kappa with "no verdict" as a verdict of its own.
    """
    judged = ~np.isnan(teacher)
    x, y = teacher[judged], student[judged]
    both = ~np.isnan(y)
    if not both.any():
        return np.array(
            [np.nan, np.nan, np.nan, *([0.0, 0.0, 0.0] if judged.any() else [np.nan] * 3)]
        )
    agreed = (x == y).sum()
    kappa_y = np.where(both, y, -1.0)
    expected = sum(
        (x == verdict).mean() * (kappa_y == verdict).mean() for verdict in (0.0, 0.5, 1.0)
    )
    kappa = (agreed / len(x) - expected) / (1 - expected) if expected < 1 else np.nan
    x, y = x[both], y[both]
    spread = x.std() * y.std()
    correlation = np.corrcoef(x, y)[0, 1] if spread > 1e-12 else np.nan
    wanted, given = (np.array([side == verdict for verdict in np.unique(x)]) for side in (x, y))
    jaccard = np.average((wanted & given).sum(1) / (wanted | given).sum(1), weights=wanted.sum(1))
    return np.array(
        [agreed / len(x), correlation, jaccard, both.mean(), agreed / judged.sum(), kappa]
    )


def pairwise_report(
    rows: list[dict], teacher: str, students: list[str], flipped: str = "corrected"
) -> pd.DataFrame:
    """How close each student comes to the teacher on pairs.

    Returns:
        A row a student. Columns: `inconclusive` (pairs on which the two orders contradict each other), `agreements` out of
        `compared` (both judges conclusive), `agreement_rate`, `correlation`, `jaccard`, `coverage`, `agreement_overall`,
        `kappa` (see `pair_agreement`), and `invalid` judgements; then the rates' 95 % intervals, as `<figure>_low`, `_high`.

    Source: the original pairwise notebook, which has the first six, with flipped="as_published".
    """
    truth, _ = pair_scores(rows, teacher, flipped)
    report = {}
    for student in students:
        given, invalid = pair_scores(rows, student, flipped)
        report[student] = {
            "inconclusive": int((np.isnan(given) & ~invalid).sum()),
            "agreements": int((truth == given).sum()),
            "compared": int((~np.isnan(truth) & ~np.isnan(given)).sum()),
            **measured(rows, RATES, lambda at: pair_agreement(truth[at], given[at])),
            "invalid": int(invalid.sum()),
        }
    return pd.DataFrame.from_dict(report, orient="index").rename_axis("judge")


def compare_pair_students(
    rows: list[dict], teacher: str, student: str, other: str, flipped: str = "corrected"
) -> pd.Series:
    """Does `student` agree with the teacher more often than `other`, on all pairs on which the teacher reached a verdict?

    No verdict counts as no agreement. Returns how many pairs `both`, `only <student>`, `only <other>` and `neither` got
    right, the `difference` of the two rates with its 95 % interval (`low`, `high`), and the two-sided `p` of the exact McNemar
    test (a binomial test on the pairs that only one got right), which takes pairs for independent, as the interval does not.
    """
    from scipy.stats import binomtest

    truth, ours, theirs = (
        pair_scores(rows, judge, flipped)[0] for judge in (teacher, student, other)
    )
    decided = np.flatnonzero(~np.isnan(truth))
    right, others = truth == ours, truth == theirs
    only, against = int((right & ~others).sum()), int((others & ~right).sum())

    def difference(at: np.ndarray) -> float:
        at = at[~np.isnan(truth[at])]
        return right[at].mean() - others[at].mean() if len(at) else np.nan

    low, high = interval(rows, difference)
    return pd.Series(
        {
            "both": int((right & others).sum()),
            f"only {student}": only,
            f"only {other}": against,
            "neither": len(decided) - int((right | others).sum()),
            "difference": difference(decided),
            "low": float(low),
            "high": float(high),
            "p": binomtest(only, only + against).pvalue if only + against else 1.0,
        }
    )


def position_report(rows: list[dict], judges: list[str]) -> pd.DataFrame:
    """Does the order sway the judge? A row a judge, over the pairs of which both orders' verdicts could be read.

    Columns: `pairs`; `consistency`, the share on which both orders come to the same; `prefers_first` and `prefers_second`,
    the shares on which the judge leans to a place: it takes that place's answer in one order, and does not in the other
    (it takes the same place again, or calls a tie); each share with its 95 % interval.
    """
    report = {}
    for judge in judges:
        verdicts = [_verdicts(row, number, judge) for number, row in enumerate(rows)]
        read = np.array([None not in pair for pair in verdicts])
        # +1 leans to the first place, -1 to the second, 0 to neither: the two orders' verdicts, as places, add up.
        lean = np.array(
            [
                np.sign(sum({"A": 1, "B": -1, "C": 0}[verdict] for verdict in pair)) if ok else 0
                for pair, ok in zip(verdicts, read)
            ]
        )

        def shares(at: np.ndarray) -> np.ndarray:
            signs = lean[at][read[at]]
            return np.array(
                [(signs == sign).mean() if len(signs) else np.nan for sign in (0, 1, -1)]
            )

        report[judge] = {
            "pairs": int(read.sum()),
            **measured(rows, ("consistency", "prefers_first", "prefers_second"), shares),
        }
    return pd.DataFrame.from_dict(report, orient="index").rename_axis("judge")


def order_table(rows: list[dict], judge: str) -> pd.DataFrame:
    """How often a judge came to which verdicts in the two orders, 3 x 3, both in terms of the first and second answer."""
    table = pd.DataFrame(
        0,
        index=pd.Index(["first", "tie", "second"], name="original order"),
        columns=pd.Index(["first", "tie", "second"], name="flipped order"),
    )
    for number, row in enumerate(rows):
        original, turned = _verdicts(row, number, judge)
        if original and turned:
            table.loc[
                {"A": "first", "B": "second", "C": "tie"}[original],
                {"A": "second", "B": "first", "C": "tie"}[turned],
            ] += 1
    return table


def answer_lengths(row: dict) -> list[int]:
    """Words of the two answers; rows without texts (the published verdicts) hold them as `words`."""
    return (
        row["words"]
        if "words" in row
        else [len(answer["text"].split()) for answer in row["answers"]]
    )


def length_report(rows: list[dict], judges: list[str], flipped: str = "corrected") -> pd.DataFrame:
    """Does the longer answer win? A row a judge: `with_winner`, the pairs of unequal length in which one answer won, and the share
    `longer_wins` of them with its 95 % interval. A half would be no leaning; but the longer answer may also be the better one."""
    longer = np.array([np.sign(first - second) for first, second in map(answer_lengths, rows)])
    report = {}
    for judge in judges:
        scores, _ = pair_scores(rows, judge, flipped)
        side = np.where(np.isnan(scores), 0, np.sign(scores - 0.5)) * (longer != 0)

        def share(at: np.ndarray) -> np.ndarray:
            decided = at[side[at] != 0]
            return np.array([(side[decided] == longer[decided]).mean() if len(decided) else np.nan])

        report[judge] = {
            "with_winner": int((side != 0).sum()),
            **measured(rows, ("longer_wins",), share),
        }
    return pd.DataFrame.from_dict(report, orient="index").rename_axis("judge")
