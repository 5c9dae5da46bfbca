"""Show judgements: tables and plots."""

import re
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path

import numpy as np
import pandas as pd

from .finetune import count_tokens
from .grade_metrics import grading_report, probabilities_of
from .judge import ACCEPTABLE
from .metrics import by_judge, correctness_report, judgements, scores_of
from .pair_metrics import pairwise_report
from .rows import load_rows

BLUE, GREY, ORANGE = "#2a6f97", "#8d99ae", "#e07a3f"
# What the plots call a figure.
WORDS = {
    "mae": "mean error",
    "brier": "Brier score",
    "error": "mean error",
    "log_loss": "log loss",
    "auc": "area under ROC",
    "agreement_overall": "agreement with the teacher",
}
LESS_IS_BETTER = ("mae", "brier", "error", "log_loss")


def versions(*packages: str) -> pd.Series:
    """The installed versions of packages."""
    return pd.Series({package: version(package) for package in packages}, name="version")


def with_intervals(
    report: pd.DataFrame, metrics: Sequence[str] | None = None, digits: int = 2
) -> pd.DataFrame:
    """A report for reading: the counts, then the figures as text, "0.81 [0.70, 0.88]".

    `metrics` are the figures to show, by default all. The columns `low` and `high` belong to the
    column before them. A dash is an undefined figure.
    """
    names = list(report)
    if "low" in names:
        figure = names[names.index("low") - 1]
        report = report.rename(columns={end: f"{figure}_{end}" for end in ("low", "high")})
    shown = report.select_dtypes("integer")
    if metrics is None:
        metrics = [name for name in report if not name.endswith(("_low", "_high"))]
        metrics = [name for name in metrics if name not in shown]

    def text(row: pd.Series, metric: str) -> str:
        # The "z" shows -0.00 as 0.00.
        ends = (row.get(metric + end, np.nan) for end in ("", "_low", "_high"))
        figure, low, high = (f"{end:z.{digits}f}" for end in ends)
        if figure == "nan":
            return "–"
        return figure if low == "nan" else f"{figure} [{low}, {high}]"

    texts = {metric: [text(row, metric) for _, row in report.iterrows()] for metric in metrics}
    return shown.assign(**texts)


def readable(table: pd.DataFrame) -> "pd.io.formats.style.Styler":
    """A table of texts for reading: aligned to the left, with its line breaks."""
    # Styler gives a table a random id. A fixed id makes the output of each run the same.
    shown = table.style.set_uuid("texts")
    # A reply may hold HTML, and a script in it would run in the page and in Jupyter.
    shown = shown.format(escape="html").format_index(escape="html")
    return shown.set_properties(**{"text-align": "left", "white-space": "pre-wrap"})


def show_pair(row: dict, judge: str) -> "pd.io.formats.style.Styler":
    """One pairwise judgement as a table: question, source, answers, verdicts, the judge's reply."""
    [evaluation] = judgements([row], judge)
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
    return readable(pd.DataFrame({"": cells})).hide(axis="columns")


# What the notebooks fix, in the order of DESIGNS.
FIXED = {
    "judged": ("one answer", "two answers", "one answer"),
    "against": ("a reference answer", "each other and the source", "the context"),
    "scale": ("1 to 5", "A, B or tie", "0 to 1"),
    "the teacher is asked": ("once", "in both orders", "three times, sampled"),
    "learnt is": ("the score", "the verdict that stands", "the score, or its distribution"),
}
FIGURES = ("correlation with the teacher", "agreement with the teacher", "area under ROC")
RULES = "best_feature overlap longer shorter constant first".split()
# For each folder: the name of the chats' file, the report, and its main figure.
DESIGNS = {
    "correctness": ("correction", correctness_report, "correlation"),
    "pairwise": ("pairwise", pairwise_report, "agreement_overall"),
    "single_grading": ("single_grading", grading_report, "auc"),
}


def compare_designs(folder: Path) -> pd.DataFrame:
    """The three designs side by side, from the stage files in a snapshot's folder.

    A design that lacks one of its three files is left out. A column says what the notebook fixes;
    how many rows there are; the teacher's calls and tokens (`count_tokens`) for each training row;
    and the main figure of the student, of the untrained base, of who answered, and of the best of
    the simple RULES.
    """
    table = {}
    for place, (name, (chats_of, report_of, figure)) in enumerate(DESIGNS.items()):
        files = "train_qa", "test_qa_complete", f"{chats_of}_finetuning_events"
        paths = [folder / name / f"{file}.jsonl" for file in files]
        if not all(path.exists() for path in paths):
            continue
        train, test, chats = map(load_rows, paths)
        judges = {evaluation["llm"] for evaluation in test[0]["evaluations"]}
        trivial = [judge for judge in RULES if judge in judges]
        report = report_of(test, "teacher", ["fine_tuned", "base", "who_answered", *trivial])
        shown = with_intervals(report, (figure,))[figure]
        best = report.loc[trivial, figure].fillna(-np.inf).idxmax()
        table[name] = {
            **{what: words[place] for what, words in FIXED.items()},
            "rows to learn from": f"{len(train)}",
            "rows to test on": f"{len(test)}",
            "teacher's calls a row": f"{len(chats) / len(train):.0f}",
            "teacher's tokens a row": f"{sum(count_tokens(chats)) / len(train):,.0f}",
            "figure": FIGURES[place],
            "student": shown["fine_tuned"],
            "untrained base": shown["base"],
            "who answered": shown["who_answered"],
            "best simple rule": f"{shown[best]} ({best})",
        }
    return pd.DataFrame(table)


def invalid_judgements(rows: list[dict]) -> pd.DataFrame:
    """For each judge: the number of judgements, of invalid ones, and of each reason for them.

    The most frequent reason comes first. A number in a reason is written as "#". The two orders of
    a pair count apart, so a pair may have two reasons.
    """
    given: dict[str, list] = {}
    for row in rows:
        for evaluation in row.get("evaluations", []):
            given.setdefault(evaluation["llm"], []).append(evaluation)

    def cells(judge: str) -> dict:
        said = given[judge]
        invalid = [one.get("invalid", "unknown") for one in said if one["score"] is None]
        reasons = Counter(
            re.sub(r"^(original|flipped): ", "", re.sub(r"-?\d[\d.,]*", "#", reason))
            for both in invalid
            for reason in re.split(r"; (?=(?:original|flipped): )", both)
        )
        counted = "; ".join(f"{count} x {reason}" for reason, count in reasons.most_common())
        return {"judgements": len(said), "invalid": len(invalid), "reasons": counted}

    return by_judge(given, cells)


@contextmanager
def _panels(columns: int, width: float = 4.2, height: float = 3.8) -> Iterator[np.ndarray]:
    """The axes of a figure with one row of panels. It is shown at the end of the block."""
    import matplotlib.pyplot as plt

    size = (width * columns, height)
    figure, axes = plt.subplots(1, columns, figsize=size, squeeze=False, layout="constrained")
    try:
        for axis in axes[0]:
            axis.spines[["top", "right"]].set_visible(False)
        yield axes[0]
        plt.show()
    finally:
        plt.close(figure)


def plot_scores(rows: list[dict], teacher: str, students: list[str]) -> None:
    """Each student's scores from 1 to 5 against the teacher's, in one panel for each student.

    The area of a dot shows its number of rows.
    """
    truth = scores_of(rows, teacher)
    with _panels(len(students)) as axes:
        for axis, student in zip(axes, students):
            points = pd.Series(zip(truth, scores_of(rows, student))).value_counts()
            x, y = np.array(points.index.tolist()).T
            axis.plot([1, 5], [1, 5], color=GREY, linewidth=1, zorder=0)
            axis.scatter(x, y, s=24 * points.to_numpy(), color=BLUE, alpha=0.6, linewidths=0)
            axis.set(title=student, xlabel=f"score of {teacher}", xlim=(0.7, 5.3), ylim=(0.7, 5.3))
        axes[0].set_ylabel("score of the student")


def plot_judges(
    report: pd.DataFrame, metrics: Sequence[str] = ("correlation", "kappa", "mae")
) -> None:
    """Every judge's figures with their intervals, in one panel for each metric."""
    places = np.arange(len(report))[::-1]
    with _panels(len(metrics), height=0.45 * len(report) + 1) as axes:
        for axis, metric in zip(axes, metrics):
            low, high = report[metric + "_low"], report[metric + "_high"]
            axis.hlines(places, low, high, GREY, linewidth=2)
            axis.scatter(report[metric], places, color=BLUE, zorder=2)
            labels = report.index if axis is axes[0] else [""] * len(report)
            axis.set(title=WORDS.get(metric, metric), yticks=places, yticklabels=labels)
            axis.set_xlabel("← better" if metric in LESS_IS_BETTER else "better →")
            axis.set_ylim(-0.6, len(report) - 0.4)
            axis.grid(axis="x", color="#e5e5e5")


def plot_sweep(report: pd.DataFrame, metrics: Sequence[str], chosen: float) -> None:
    """A report's figures over its index (a setting), in one panel for each figure.

    The band is the interval. The dotted line marks the `chosen` value.
    """
    with _panels(len(metrics), height=2.6) as axes:
        for axis, metric in zip(axes, metrics):
            low, high = report[metric + "_low"], report[metric + "_high"]
            axis.fill_between(report.index, low, high, color=GREY, alpha=0.3, linewidth=0)
            axis.plot(report.index, report[metric], color=BLUE, marker="o", markersize=4)
            axis.axvline(chosen, color=BLUE, linewidth=1, linestyle=":")
            axis.set(title=WORDS.get(metric, metric), xlabel=report.index.name)
            axis.set_ylabel("↓ better" if metric in LESS_IS_BETTER else "better ↑")


def plot_probabilities(rows: list[dict], teacher: str, judges: list[str]) -> None:
    """Each judge's probability that an answer is acceptable: its ROC curve and its reliability.

    For the reliability, the answers are put in five bins of equal counts by the judge's
    probability. On the diagonal, it equals the share of a bin that the teacher accepts. It is a
    ValueError if there are more judges than colours.
    """
    from sklearn.calibration import calibration_curve
    from sklearn.metrics import roc_curve

    colors = (BLUE, ORANGE, GREY)
    if len(judges) > len(colors):
        raise ValueError(f"{len(judges)} judges: expected {len(colors)} at most, one a colour")
    graded = scores_of(rows, teacher)
    with _panels(2) as (roc, reliability):
        for judge, color in zip(judges, colors):
            p = probabilities_of(rows, judge)
            valid = ~np.isnan(p) & ~np.isnan(graded)
            truth, p = graded[valid] > ACCEPTABLE, p[valid]
            false, true, _ = roc_curve(truth, p)
            roc.plot(false, true, color=color, label=judge)
            share, said = calibration_curve(truth, np.clip(p, 0, 1), strategy="quantile")
            reliability.plot(said, share, color=color, marker="o", label=judge)
        for axis in (roc, reliability):
            axis.plot([0, 1], [0, 1], color="#d0d0d0", linewidth=1, zorder=0)
        roc.set(title="ROC", xlabel="share accepted of the unacceptable")
        roc.set_ylabel("share accepted of the acceptable")
        reliability.set(title="reliability", xlabel="probability that the judge gives")
        reliability.set_ylabel("share that the teacher accepts")
        roc.legend(frameon=False)


def plot_orders(tables: dict[str, pd.DataFrame]) -> None:
    """The verdicts in the two orders (`order_table`), in one panel for each judge.

    Off the diagonal, the order changed the result.
    """
    most = max(int(table.to_numpy().max()) for table in tables.values())
    with _panels(len(tables), width=3.2, height=3.4) as axes:
        for axis, (judge, table) in zip(axes, tables.items()):
            axis.imshow(table, cmap="Blues", vmin=0, vmax=max(1, most))
            for (i, j), count in np.ndenumerate(table):
                color = "white" if count > most / 2 else "black"
                axis.text(j, i, str(count or ""), ha="center", va="center", color=color)
            axis.set_xticks(range(3), table.columns)
            axis.set_yticks(range(3), table.index)
            axis.set(title=judge, xlabel="flipped order says")
        axes[0].set_ylabel("original order says")
