"""People as judges: labels out and in, and who agrees with whom."""

import numpy as np
import pandas as pd
import pytest
from sklearn.metrics import cohen_kappa_score

from helpers import (
    add_labels,
    agreement_with_people,
    correctness_report,
    disagreements,
    grading_report,
    invalid_judgements,
    pairwise_report,
    scores_of,
    to_label,
)
from helpers.pair_metrics import pair_scores

PAIRS = [
    {
        "question": f"Which, {i}?",
        "source": "It is\nso, or not.",
        "answers": [{"model": "secret", "text": f"«{i}»"}, {"model": "secret", "text": "no, 1"}],
        "evaluations": [{"llm": "teacher", "score": 1.0, "source": "original"}],
    }
    for i in range(4)
]


def filled(path, labels, column="label"):
    """Fill the column of labels as a person does in a spreadsheet."""
    table = pd.read_csv(path, dtype=str, keep_default_na=False, encoding="utf-8-sig")
    table[column] = labels
    table.to_csv(path, index=False)
    return path


def labelled(**judges) -> list[dict]:
    """Rows with these scores of each judge, two rows a document."""
    return [
        {
            "question": f"Q{i}?",
            "document": i // 2,
            "evaluations": [{"llm": name, "score": score} for name, score in zip(judges, scores)],
        }
        for i, scores in enumerate(zip(*judges.values()))
    ]


def test_scores_go_out_and_come_back(rows, tmp_path):
    to_label(rows, tmp_path / "a.csv")
    text = (tmp_path / "a.csv").read_text(encoding="utf-8-sig")
    assert text.splitlines()[0] == "number,question,reference,answer,label"
    assert text.splitlines()[3] == "2,Question 2?,The reference number 2.,The answer number 2.,"
    filled(tmp_path / "a.csv", [" 4.5 ", "", *["1"] * 10])
    known = add_labels(rows, tmp_path / "a.csv", "human_1")
    assert scores_of(known, "human_1")[[0, 2]].tolist() == [4.5, 1] and "evaluations" not in rows[0]
    assert known[1]["evaluations"] == [
        {"llm": "human_1", "score": None, "text": "", "invalid": "not labelled"}
    ]
    assert invalid_judgements(known).loc["human_1", "reasons"] == "1 x not labelled"
    again = add_labels(known, filled(tmp_path / "a.csv", ["2"] * 12), "human_1")
    assert scores_of(again, "human_1").tolist() == [2] * 12  # the older labels are replaced
    with pytest.raises(FileExistsError):
        to_label(rows, tmp_path / "a.csv")


def test_pairs_go_out_and_come_back(tmp_path):
    to_label(PAIRS, tmp_path / "a.csv")
    table = pd.read_csv(tmp_path / "a.csv", keep_default_na=False)
    assert list(table) == ["number", "question", "source", "answer A", "answer B", "label"]
    assert "secret" not in table.to_string() and table["answer A"][3] == "«3»"
    known = add_labels(PAIRS, filled(tmp_path / "a.csv", ["A", "B", "tie", ""]), "me")
    assert pair_scores(known, "me")[0][:3].tolist() == [1, 0, 0.5]
    assert pairwise_report(known, "me", ["teacher"])["compared"].tolist() == [3]


def test_grades_go_out_and_come_back(rows, tmp_path):
    graded = [{"question": row["question"], "response_data": row["response_data"]} for row in rows]
    to_label(graded, tmp_path / "a.csv")
    assert "context" in pd.read_csv(tmp_path / "a.csv")
    known = add_labels(graded, filled(tmp_path / "a.csv", ["0.9", "0.8"] * 6), "me")
    assert [row["evaluations"][0]["acceptable"] for row in known[:2]] == [True, False]
    assert grading_report(known, "me", ["me"])["accuracy"].tolist() == [1]


def test_all_bad_lines_are_named_at_once(rows, tmp_path):
    to_label(rows, tmp_path / "a.csv")
    filled(tmp_path / "a.csv", ["7", "4,5", "nan", "good", "0", *["3"] * 7])
    filled(tmp_path / "a.csv", [*range(5), "12", "-1", "x", "8", "8", "10", "11"], "number")
    questions = [row["question"] for row in rows]
    filled(tmp_path / "a.csv", [*questions[:11], "Another?"], "question")
    with pytest.raises(ValueError) as caught:
        add_labels(rows, tmp_path / "a.csv", "me")
    first, *others = str(caught.value).split("; ")
    assert first.endswith("has 10 bad lines: number 0: label '7', expected a number from 1 to 5")
    assert others == [
        *(
            f"number {i + 1}: label {label!r}, expected a number from 1 to 5"
            for i, label in enumerate(["4,5", "nan", "good", "0"])
        ),
        *(f"number {said}: there is no such row (0 to 11)" for said in ("12", "-1", "x")),
        "number 8: the row is there twice",
        "number 11: question 'Another?' is not that of the row",
    ]
    to_label(PAIRS, tmp_path / "pairs.csv")
    with pytest.raises(ValueError, match="number 0: label 'first', expected A, B, tie"):
        add_labels(PAIRS, filled(tmp_path / "pairs.csv", ["first", "A", "B", "tie"]), "me")
    (tmp_path / "other.csv").write_text("number;label\n0;1\n")
    with pytest.raises(ValueError, match="lacks the column 'number'; it has"):
        add_labels(rows, tmp_path / "other.csv", "me")


def test_people_and_judges_are_compared_on_the_same_rows():
    rng = np.random.default_rng(0)
    truth = rng.integers(1, 6, size=40)
    judges = {
        name: np.clip(truth + rng.integers(-by, by + 1, size=40), 1, 5).tolist()
        for name, by in {"h1": 1, "h2": 1, "h3": 1, "teacher": 1, "student": 3}.items()
    }
    judges["h2"][0] = judges["student"][1] = None
    rows, people = labelled(**judges), ["h1", "h2", "h3"]
    table = agreement_with_people(rows, people, "teacher", ["student"])
    assert table.index.tolist() == ["among people", "teacher", "student"]
    assert table["n"].tolist() == [38] * 3
    kept = {name: np.array(scores[2:], dtype=int) for name, scores in judges.items()}

    def kappa(*pairs):
        scale = {"labels": range(1, 6), "weights": "quadratic"}
        return np.mean([cohen_kappa_score(kept[a], kept[b], **scale) for a, b in pairs])

    assert table["kappa"].tolist() == pytest.approx(
        [
            kappa(("h1", "h2"), ("h1", "h3"), ("h2", "h3")),
            *(kappa(*((one, judge) for one in people)) for judge in ("teacher", "student")),
        ]
    )
    assert (table["mae_low"] < table["mae"]).all() and (table["mae"] < table["mae_high"]).all()
    with_one = agreement_with_people(rows, "h1", "teacher")
    assert with_one["n"].tolist() == [40, 40] and np.isnan(with_one.loc["among people", "kappa"])
    report = correctness_report(rows, "h1", ["teacher"]).loc["teacher"]
    assert with_one.loc["teacher", "kappa"] == pytest.approx(report["kappa"])


def test_a_missing_verdict_on_a_pair_does_not_agree_with_people():
    def pair(*scores):
        said = [
            {"llm": name, "score": score, "source": "original"}
            for name, score in zip(("h1", "h2", "teacher"), scores)
        ]
        said[2]["source"] = "neither" if scores[2] == 0.5 else "original"
        return {"words": [1, 2], "document": scores[0], "evaluations": said}

    rows = [pair(1, 1, 1), pair(1, 0, 1), pair(0, 0, 0.5), pair(0, 0, 0), pair(1, None, 1)]
    table = agreement_with_people(rows, ["h1", "h2"], "teacher")
    assert table["n"].tolist() == [4, 4]
    assert table["agreement_overall"].tolist() == pytest.approx([3 / 4, (3 / 4 + 2 / 4) / 2])
    assert list(table.columns[1:3]) == ["agreement_overall", "kappa"]


def test_the_rows_on_which_they_part():
    rows = labelled(h1=[1, 2, 3, None], h2=[1, 4, 3, 2], teacher=[1, 3, 4, 2])
    parted = disagreements(rows, ["h1", "h2", "teacher"])
    assert parted.index.tolist() == [1, 2, 3] and parted["gap"].tolist() == [2, 1, 0]
    assert parted.loc[1, ["question", "h1", "teacher"]].tolist() == ["Q1?", 2, 3]
    assert disagreements(rows, ["h2", "teacher"]).index.tolist() == [1, 2]


def test_people_who_cannot_be_compared_are_refused():
    rows = labelled(h1=[1, 80, 3, 4], teacher=[1.0, 2, 5, 2])
    with pytest.raises(ValueError, match="row 1: 'h1' gave 80, outside 1 to 5"):
        agreement_with_people(rows, "h1", "teacher")
    grades = labelled(h1=[1, 0.5, 3, 0.2], teacher=[1.0, 0.2, 0.5, 0.2])
    with pytest.raises(ValueError, match="row 2: 'h1' gave 3, outside 0 to 1"):
        agreement_with_people(grades, "h1", "teacher")
    for people in ([], ["h1", "h1"], ["teacher"]):
        with pytest.raises(ValueError, match="name a person, and each once"):
            agreement_with_people(rows, people, "teacher")
    rows[2]["evaluations"] += rows[2]["evaluations"][:1]
    with pytest.raises(KeyError, match="row 2 has 2 judgements by 'h1'"):
        agreement_with_people(rows, "h1", "teacher")
    with pytest.raises(KeyError, match="row 0 has 0 judgements by 'h2'"):
        agreement_with_people(rows, "h2", "teacher")
    with pytest.warns(UserWarning, match="here are 0"):
        none = agreement_with_people(labelled(h1=[None], teacher=[1]), "h1", "teacher")
    assert none.loc["teacher", "n"] == 0 and np.isnan(none.loc["teacher", "mae"])
