"""Show judgements: tables and plots."""

import re
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import pandas as pd

from .finetune import count_tokens
from .grade_metrics import grading_report, probabilities_of
from .judge import ACCEPTABLE
from .metrics import METRICS, correctness_report, evaluation_of, scores_of
from .pair_metrics import pairwise_report
from .rows import load_rows

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from pandas.io.formats.style import Styler

BLUE, GREY, ORANGE = "#2a6f97", "#8d99ae", "#e07a3f"


def versions(*packages: str) -> pd.Series:
    """The installed versions of packages."""
    return pd.Series({package: version(package) for package in packages}, name="version")


def with_intervals(
    report: pd.DataFrame, metrics: Sequence[str] = METRICS, digits: int = 2
) -> pd.DataFrame:
    """A report for reading: the counts, then the figures as text, "0.81 [0.70, 0.88]".

    A dash is an undefined figure.
    """

    def text(row: pd.Series, metric: str) -> str:
        values = [round(row[metric + end], digits) for end in ("", "_low", "_high")]
        # Adding 0.0 turns -0.0 into 0.0.
        figure, low, high = (f"{value + 0.0:.{digits}f}" for value in values)
        if np.isnan(values[0]):
            return "–"
        return figure if np.isnan(values[1]) else f"{figure} [{low}, {high}]"

    columns: dict[str, Any] = dict(report.select_dtypes("integer"))
    for metric in metrics:
        columns[metric] = [text(row, metric) for _, row in report.iterrows()]
    return pd.DataFrame(columns, index=report.index)


def show_pair(row: dict, judge: str) -> "Styler":
    """One pairwise judgement as a table: question, source, answers, verdicts, the judge's reply."""
    evaluation = evaluation_of(row, 0, judge)
    first, second = row["answers"]
    cells = {
        "question": row["question"],
        "source": row["source"],
        f"first: {first['model']}": first["text"],
        f"second: {second['model']}": second["text"],
        "verdicts": " then, flipped, ".join(f"[[{given}]]" for given in evaluation["verdicts"]),
        "score, by": f"{evaluation['score']}, {evaluation['source']}",
        judge: evaluation["text"],
    }
    style = {"text-align": "left", "white-space": "pre-wrap"}
    # Styler gives a table a random id. A fixed id makes the output of each run the same.
    table = pd.DataFrame({"": cells}).style.set_uuid("pair")
    return table.set_properties(**style).hide(axis="columns")


class Design(NamedTuple):
    """One notebook's design, for `compare_designs`."""

    events: str  # the file with the teacher's chats
    fixed: tuple[str, ...]  # one text for each row of FIXED
    report: Callable[..., pd.DataFrame]
    figure: str  # the most important figure of the report
    trivial: list[str]  # the trivial judges


FIXED = ("judged", "against", "scale", "the teacher is asked", "learnt is")
FIGURES = {
    "correlation": "correlation with the teacher",
    "agreement_overall": "agreement with the teacher",
    "auc": "area under ROC",
}
DESIGNS = {
    "correctness": Design(
        "correction_finetuning_events.jsonl",
        ("one answer", "a reference answer", "1 to 5", "once", "the score"),
        correctness_report,
        "correlation",
        ["overlap", "longer", "constant"],
    ),
    "pairwise": Design(
        "pairwise_finetuning_events.jsonl",
        (
            "two answers",
            "each other and the source",
            "A, B or tie",
            "in both orders",
            "the verdict that stands",
        ),
        pairwise_report,
        "agreement_overall",
        ["longer", "shorter", "overlap", "first"],
    ),
    "single_grading": Design(
        "single_grading_finetuning_events.jsonl",
        (
            "one answer",
            "the context",
            "0 to 1",
            "three times, sampled",
            "the score, or its distribution",
        ),
        grading_report,
        "auc",
        ["overlap", "longer", "constant"],
    ),
}


def compare_designs(folder: Path) -> pd.DataFrame:
    """The three designs side by side, from the stage files in a snapshot's folder.

    A design without files is left out. A design's column has: what the notebook fixes (in words);
    the number of rows to learn from and to test on; the teacher's calls for each row and tokens
    for each training row (`count_tokens`); and the most important figure of the student, of the
    untrained base and of the best trivial judge, with 95 % intervals.
    """
    table = {}
    for name, design in DESIGNS.items():
        path = folder / name
        if not (path / "test_qa_complete.jsonl").exists():
            continue
        train = load_rows(path / "train_qa.jsonl")
        test = load_rows(path / "test_qa_complete.jsonl")
        chats = load_rows(path / design.events)
        report = design.report(test, "teacher", ["fine_tuned", "base", *design.trivial])
        shown = with_intervals(report, (design.figure,))[design.figure]
        best = report.loc[design.trivial, design.figure].fillna(-np.inf).idxmax()
        table[name] = {
            **dict(zip(FIXED, design.fixed)),
            "rows to learn from": f"{len(train)}",
            "rows to test on": f"{len(test)}",
            "teacher's calls a row": f"{len(chats) / len(train):.0f}",
            "teacher's tokens a row": f"{sum(count_tokens(chats)) / len(train):,.0f}",
            "figure": FIGURES[design.figure],
            "student": shown["fine_tuned"],
            "base": shown["base"],
            "best trivial judge": f"{shown[best]} ({best})",
        }
    return pd.DataFrame(table)


def invalid_judgements(rows: list[dict]) -> pd.DataFrame:
    """For each judge: the number of judgements, the number of invalid ones, and the reasons."""
    table: dict[str, dict] = {}
    for row in rows:
        for evaluation in row.get("evaluations", []):
            new = {"judgements": 0, "invalid": 0, "reasons": set()}
            line = table.setdefault(evaluation["llm"], new)
            line["judgements"] += 1
            if evaluation["score"] is None:
                line["invalid"] += 1
                line["reasons"].add(evaluation.get("invalid", "unknown"))
    for line in table.values():
        line["reasons"] = "; ".join(sorted(line["reasons"]))
    return pd.DataFrame.from_dict(table, orient="index").rename_axis("judge")


def unread_replies(rows: list[dict]) -> pd.DataFrame:
    """How many replies of each judge were not read, by the reason.

    Returns:
        One row for each judge and reason, the most frequent first, with the number of `replies`. A
        number in a reason is written as "#". Both orders of a pair count.
    """
    counts: dict[tuple[str, str], int] = {}
    for row in rows:
        for evaluation in row.get("evaluations", []):
            for reason in evaluation.get("invalid", "").split("; "):
                said = re.sub(r"-?\d[\d.,]*", "#", re.sub("^(original|flipped): ", "", reason))
                if said:
                    counts[evaluation["llm"], said] = counts.get((evaluation["llm"], said), 0) + 1
    order = sorted(counts.items(), key=lambda item: (item[0][0], -item[1]))
    index = pd.MultiIndex.from_tuples([key for key, _ in order], names=["judge", "reason"])
    return pd.DataFrame({"replies": [count for _, count in order]}, index=index)


def _axes(columns: int, width: float = 4.2, height: float = 3.8) -> tuple["Figure", np.ndarray]:
    """A figure with one row of panels."""
    import matplotlib.pyplot as plt

    size = (width * columns, height)
    figure, axes = plt.subplots(1, columns, figsize=size, squeeze=False, layout="constrained")
    for axis in axes[0]:
        axis.spines[["top", "right"]].set_visible(False)
    return figure, axes[0]


def plot_scores(
    rows: list[dict], teacher: str, students: list[str], low: float = 1, high: float = 5
) -> None:
    """Each student's scores against the teacher's, in one panel for each student.

    The area of a dot shows its number of rows.
    """
    room = 0.075 * (high - low)
    limits = (low - room, high + room)
    figure, axes = _axes(len(students))
    truth = scores_of(rows, teacher)
    for axis, student in zip(axes, students):
        points = pd.Series(zip(truth, scores_of(rows, student))).value_counts()
        x, y = np.array(points.index.tolist()).T
        axis.plot([low, high], [low, high], color=GREY, linewidth=1, zorder=0)
        axis.scatter(x, y, s=24 * points.to_numpy(), color=BLUE, alpha=0.6, linewidths=0)
        axis.set(title=student, xlabel=f"score of {teacher}", xlim=limits, ylim=limits)
    axes[0].set_ylabel("score of the student")
    _show(figure)


def plot_judges(
    report: pd.DataFrame, metrics: Sequence[str] = ("correlation", "kappa", "mae")
) -> None:
    """Every judge's figures with their intervals, in one panel for each metric."""
    figure, axes = _axes(len(metrics), height=0.45 * len(report) + 1)
    places = np.arange(len(report))[::-1]
    for axis, metric in zip(axes, metrics):
        axis.hlines(places, report[metric + "_low"], report[metric + "_high"], GREY, linewidth=2)
        axis.scatter(report[metric], places, color=BLUE, zorder=2)
        labels = report.index if axis is axes[0] else [""] * len(report)
        axis.set(title=metric, yticks=places, yticklabels=labels)
        axis.set_ylim(-0.6, len(report) - 0.4)
        axis.grid(axis="x", color="#e5e5e5")
    _show(figure)


def plot_sweep(report: pd.DataFrame, metrics: Sequence[str], chosen: float | None = None) -> None:
    """A report's figures over its index (a setting), in one panel for each figure.

    The band is the interval. The dotted line marks the `chosen` value.
    """
    figure, axes = _axes(len(metrics), height=2.6)
    for axis, metric in zip(axes, metrics):
        low, high = report[metric + "_low"], report[metric + "_high"]
        axis.fill_between(report.index, low, high, color=GREY, alpha=0.3, linewidth=0)
        axis.plot(report.index, report[metric], color=BLUE, marker="o", markersize=4)
        if chosen is not None:
            axis.axvline(chosen, color=BLUE, linewidth=1, linestyle=":")
        axis.set(title=metric, xlabel=report.index.name)
    _show(figure)


def plot_probabilities(rows: list[dict], teacher: str, judges: list[str], bins: int = 5) -> None:
    """Each judge's probability that an answer is acceptable: its ROC curve and its reliability.

    The left panel shows the ROC curve. For the right panel, the answers are put in bins of equal
    counts by the judge's probability. The panel shows the share that the teacher accepts in each
    bin. On the diagonal, this share equals the probability.
    """
    from sklearn.calibration import calibration_curve
    from sklearn.metrics import roc_curve

    figure, (roc, reliability) = _axes(2)
    graded = scores_of(rows, teacher)
    colors = (BLUE, ORANGE, GREY)
    if len(judges) > len(colors):
        raise ValueError(
            f"{len(judges)} judges: expected {len(colors)} at most, one for each colour"
        )
    for judge, color in zip(judges, colors):
        p = probabilities_of(rows, judge)
        valid = ~np.isnan(p) & ~np.isnan(graded)
        truth, p = graded[valid] > ACCEPTABLE, p[valid]
        false, true, _ = roc_curve(truth, p)
        roc.plot(false, true, color=color, label=judge)
        share, said = calibration_curve(truth, np.clip(p, 0, 1), n_bins=bins, strategy="quantile")
        reliability.plot(said, share, color=color, marker="o", label=judge)
    for axis in (roc, reliability):
        axis.plot([0, 1], [0, 1], color="#d0d0d0", linewidth=1, zorder=0)
    roc.set(
        title="ROC",
        xlabel="share accepted of the unacceptable",
        ylabel="share accepted of the acceptable",
    )
    reliability.set(
        title="reliability",
        xlabel="probability that the judge gives",
        ylabel="share that the teacher accepts",
    )
    roc.legend(frameon=False)
    _show(figure)


def plot_orders(tables: dict[str, pd.DataFrame]) -> None:
    """The verdicts in the two orders (`order_table`), in one panel for each judge.

    Off the diagonal, the order changed the result.
    """
    figure, axes = _axes(len(tables), width=3.2, height=3.4)
    most = max(int(table.to_numpy().max()) for table in tables.values())
    for axis, (judge, table) in zip(axes, tables.items()):
        axis.imshow(table, cmap="Blues", vmin=0, vmax=max(1, most))
        for (i, j), count in np.ndenumerate(table):
            color = "white" if count > most / 2 else "black"
            axis.text(j, i, str(count or ""), ha="center", va="center", color=color)
        axis.set_xticks(range(3), table.columns)
        axis.set_yticks(range(3), table.index)
        axis.set(title=judge, xlabel="flipped order says")
    axes[0].set_ylabel("original order says")
    _show(figure)


def _show(figure: "Figure") -> None:
    import matplotlib.pyplot as plt

    plt.show()
    plt.close(figure)
