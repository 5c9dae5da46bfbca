"""People as judges: rows to label, labels to rows, and how far people and judges agree."""

from collections.abc import Sequence
from itertools import combinations
from pathlib import Path

import numpy as np
import pandas as pd

from .judge import ACCEPTABLE
from .metrics import METRICS, agreement, by_judge, measured
from .pair_metrics import RATES, are_pairs, pair_agreement, verdicts_of
from .student import items_of

WINNERS: dict[float | None, int] = {1.0: 0, 0.0: 1}  # score -> the answer's number in the row
VERDICTS = {"A": 1.0, "B": 0.0, "tie": 0.5}  # what a person writes of a pair, and its score


def to_label(rows: list[dict], path: str | Path) -> None:
    """Write a CSV file of rows for a person, who fills the empty column `label`.

    The other columns are the row's `number` and the texts that a judge sees: they do not say who
    answered. It is a FileExistsError if there is such a file, which may hold labels.
    """
    names = ["source", "answer A", "answer B"]
    if "answers" not in rows[0]:
        names = ["reference" if "reference" in rows[0] else "context", "answer"]
    table = pd.DataFrame(items_of(rows), columns=["question", *names]).rename_axis("number")
    table.assign(label="").to_csv(path, mode="x", encoding="utf-8-sig")


def add_labels(rows: list[dict], path: str | Path, name: str) -> list[dict]:
    """Return the rows, each with one more evaluation: a person's label, from a file of `to_label`.

    A label is a score on the rows' scale or, for a pair, A, B or tie. A row that has none gets an
    invalid evaluation. An older evaluation of the same name is replaced.

    Raises:
        ValueError: the file lacks a column, or lines of it are bad: a row that does not exist, a
            row twice, another question than the row's, or a label off the scale. All are named.
    """
    table = pd.read_csv(path, dtype=str, keep_default_na=False, encoding="utf-8-sig")
    if missing := [column for column in ("number", "question", "label") if column not in table]:
        raise ValueError(f"{path} lacks the column {missing[0]!r}; it has {list(table)}")
    scores: dict[int, float | None] = {}
    bad = []
    for number, question, label in table[["number", "question", "label"]].itertuples(index=False):
        at, why = int(number) if number.isdecimal() else len(rows), ""
        if at >= len(rows):
            why = f"there is no such row (0 to {len(rows) - 1})"
        elif at in scores:
            why = "the row is there twice"
        elif question.split() != rows[at]["question"].split():
            why = f"question {question[:40]!r} is not that of the row"
        else:
            scores[at], why = _score(rows[at], label.strip())
        bad += [f"number {number}: {why}"] if why else []
    if bad:
        raise ValueError(f"{path} has {len(bad)} bad lines: " + "; ".join(bad))
    labelled = []
    for at, row in enumerate(rows):
        score = scores.get(at)
        evaluation = {"llm": name, "score": score, "text": ""}
        if "answers" in row:
            evaluation |= {"source": "original", "winner": WINNERS.get(score)}
        elif "reference" not in row:
            evaluation["acceptable"] = None if score is None else score > ACCEPTABLE
        evaluation |= {"invalid": "not labelled"} if score is None else {}
        others = [old for old in row.get("evaluations", []) if old["llm"] != name]
        labelled.append({**row, "evaluations": [*others, evaluation]})
    return labelled


def _score(row: dict, label: str) -> tuple[float | None, str]:
    """(the score of a label or None, what is wrong with the label)."""
    low, high = (1, 5) if "reference" in row else (0, 1)
    expected = ", ".join(VERDICTS) if "answers" in row else f"a number from {low} to {high}"
    try:
        score = VERDICTS[label] if "answers" in row else float(label)
    except (KeyError, ValueError):
        score = np.nan
    if low <= score <= high or not label:
        return (score, "") if label else (None, "")
    return None, f"label {label!r}, expected {expected}"


def agreement_with_people(
    rows: list[dict], people: str | Sequence[str], teacher: str, students: Sequence[str] = ()
) -> pd.DataFrame:
    """Agreement among people, and of each judge with them, all on the same rows.

    The figures of people are the mean over each two of them, those of a judge the mean over its
    agreement with each person. So the lines compare: nobody is compared with a majority.

    Returns:
        A row `among people`, one for the teacher, one for each student. `n` rows have a label by
        all people and, where they are scored, a valid score by all judges. With 95 % intervals (see
        `measured`) come `correlation`, `kappa` and `mae` or, for pairs, `agreement_overall` and
        `kappa`: there, a missing verdict of a judge does not agree. One person alone has NaN.

    Raises:
        KeyError: a row lacks a judgement, or has it twice.
        ValueError: no people, a judge named twice, or a label off the teacher's scale.
    """
    people, pairs = [people] if isinstance(people, str) else list(people), are_pairs(rows)
    judges = [*people, teacher, *students]
    if not people or len(set(judges)) < len(judges):
        raise ValueError(f"people, teacher and students are {judges}: name a person, and each once")
    said = {judge: verdicts_of(rows, judge) for judge in judges}
    low, high = (1, 5) if (said[teacher] > 1).any() else (0, 1)
    for person in people:
        if wrong := np.flatnonzero((said[person] < low) | (said[person] > high)).tolist():
            label = said[person][wrong[0]]
            raise ValueError(f"row {wrong[0]}: {person!r} gave {label:g}, outside {low} to {high}")
    valid = [~np.isnan(said[judge]) for judge in (people if pairs else judges)]
    kept = np.flatnonzero(np.all(valid, axis=0))
    shown = ("agreement_overall", "kappa") if pairs else ("correlation", "kappa", "mae")
    compare, known = (pair_agreement, RATES) if pairs else (agreement, METRICS)
    columns = [known.index(name) for name in shown]

    def cells(judge: str) -> dict:
        both = [(person, judge) for person in people] if judge in said else combinations(people, 2)
        given = [(said[one][kept], said[other][kept]) for one, other in both]
        if not given:
            return {"n": len(kept)}

        def mean(at: np.ndarray) -> np.ndarray:
            return np.mean([compare(a[at], b[at])[:, columns] for a, b in given], axis=0)

        return {"n": len(kept), **measured([rows[at] for at in kept], shown, mean)}

    return by_judge(["among people", teacher, *students], cells)


def disagreements(rows: list[dict], judges: Sequence[str]) -> pd.DataFrame:
    """The rows on which these judges, people or not, do not all say the same.

    Returns:
        One row for each, by its `number`, the furthest apart first: the `question`, what each judge
        says, and the `gap` between the highest and the lowest. A missing verdict is NaN.
    """
    table = pd.DataFrame({judge: verdicts_of(rows, judge) for judge in judges})
    gap = table.max(axis=1) - table.min(axis=1)
    parted = (gap > 0) | (table.isna().any(axis=1) & table.notna().any(axis=1))
    table.insert(0, "question", [row.get("question", "") for row in rows])
    table = table.assign(gap=gap)[parted].rename_axis("number")
    return table.sort_values("gap", ascending=False, kind="stable")
