"""Show: tables and plots of judgements."""

from importlib.metadata import version
from pathlib import Path

import numpy as np
import pandas as pd

from .finetuning import count_tokens
from .grade_metrics import grading_report, probabilities_of
from .grading import ACCEPTABLE
from .metrics import METRICS, correctness_report, evaluation_of, scores_of
from .pair_metrics import pairwise_report
from .snapshots import load_rows

pd.set_option("display.width", 140)  # as wide as a terminal, for `make run`

BLUE, GREY, ORANGE = "#2a6f97", "#8d99ae", "#e07a3f"


def versions(*packages: str) -> pd.Series:
    """The installed versions of packages."""
    return pd.Series({package: version(package) for package in packages}, name="version")


def with_intervals(report: pd.DataFrame, metrics: tuple = METRICS, digits: int = 2) -> pd.DataFrame:
    """A report for reading: each figure as text with its interval, "0.81 [0.70, 0.88]"; a dash where it is undefined."""

    def text(row: pd.Series, metric: str) -> str:
        figure, low, high = (
            round(row[metric + end], digits) + 0.0 for end in ("", "_low", "_high")
        )  # + 0.0: no "-0.00"
        if np.isnan(figure):
            return "–"
        return (
            f"{figure:.{digits}f}"
            if np.isnan(low)
            else f"{figure:.{digits}f} [{low:.{digits}f}, {high:.{digits}f}]"
        )

    counts = {
        column: report[column]
        for column in report.columns
        if pd.api.types.is_integer_dtype(report[column])
    }
    table = {
        **counts,
        **{metric: [text(row, metric) for _, row in report.iterrows()] for metric in metrics},
    }
    return pd.DataFrame(table, index=report.index)


def show_pair(row: dict, judge: str):
    """One pairwise judgement as a table: question, source, both answers, both verdicts and the judge's words."""
    evaluation = evaluation_of(row, 0, judge)
    first, second = row["answers"]
    verdicts = " then, flipped, ".join(f"[[{verdict}]]" for verdict in evaluation["verdicts"])
    table = pd.DataFrame(
        {
            "": {
                "question": row["question"],
                "source": row["source"],
                f"first: {first['model']}": first["text"],
                f"second: {second['model']}": second["text"],
                "verdicts": verdicts,
                "score, by": f"{evaluation['score']}, {evaluation['source']}",
                f"{judge}": evaluation["text"],
            }
        }
    )
    # With a name of its own the table is the same in each run: Styler makes one up otherwise.
    return (
        table.style.set_uuid("pair")
        .set_properties(**{"text-align": "left", "white-space": "pre-wrap"})
        .hide(axis="columns")
    )


def compare_designs(folder: Path) -> pd.DataFrame:
    """The three designs side by side, from the stage files in a snapshot's folder; a design without files is left out.

    Per design: what the notebook fixes (in words), then what is counted: rows to learn from and to test on, the teacher's calls a
    row and tokens a training row (`count_tokens`), and the headline figure of the student, of the untrained base and of the best
    trivial judge, with 95 % intervals.
    """
    table = {}
    for name, (events, told, report, figure, trivial) in DESIGNS.items():
        path = folder / name
        if not (path / "test_qa_complete.jsonl").exists():
            continue
        train, test, chats = (
            load_rows(path / file) for file in ("train_qa.jsonl", "test_qa_complete.jsonl", events)
        )
        result = report(test, "teacher", ["fine_tuned", "base", *trivial])
        shown, best = (
            with_intervals(result, (figure,))[figure],
            result.loc[trivial, figure].fillna(-np.inf).idxmax(),
        )
        table[name] = {
            **told,
            "rows to learn from": f"{len(train)}",
            "rows to test on": f"{len(test)}",
            "teacher's calls a row": f"{len(chats) / len(train):.0f}",
            "teacher's tokens a row": f"{sum(count_tokens(chats)) / len(train):,.0f}",
            "figure": FIGURES[figure],
            "student": shown["fine_tuned"],
            "base": shown["base"],
            "best trivial judge": f"{shown[best]} ({best})",
        }
    return pd.DataFrame(table)


FIGURES = {
    "correlation": "correlation with the teacher",
    "agreement_overall": "agreement with the teacher",
    "auc": "area under ROC",
}
DESIGNS = {  # stage file, what the design is, its report, headline figure, trivial judges
    "correctness": (
        "correction_finetuning_events.jsonl",
        {
            "judged": "one answer",
            "against": "a reference answer",
            "scale": "1 to 5",
            "the teacher is asked": "once",
            "learnt is": "the score",
        },
        correctness_report,
        "correlation",
        ["overlap", "longer", "constant"],
    ),
    "pairwise": (
        "pairwise_finetuning_events.jsonl",
        {
            "judged": "two answers",
            "against": "each other and the source",
            "scale": "A, B or tie",
            "the teacher is asked": "in both orders",
            "learnt is": "the verdict that stands",
        },
        pairwise_report,
        "agreement_overall",
        ["longer", "shorter", "overlap", "first"],
    ),
    "single_grading": (
        "single_grading_finetuning_events.jsonl",
        {
            "judged": "one answer",
            "against": "the context",
            "scale": "0 to 1",
            "the teacher is asked": "three times, sampled",
            "learnt is": "the score, or its distribution",
        },
        grading_report,
        "auc",
        ["overlap", "longer", "constant"],
    ),
}


def invalid_judgements(rows: list[dict]) -> pd.DataFrame:
    """Per judge: how many judgements there are, how many could not be used, and why."""
    table: dict = {}
    for row in rows:
        for evaluation in row.get("evaluations", []):
            line = table.setdefault(
                evaluation["llm"], {"judgements": 0, "invalid": 0, "reasons": set()}
            )
            line["judgements"] += 1
            if evaluation["score"] is None:
                line["invalid"] += 1
                line["reasons"].add(evaluation.get("invalid", "unknown"))
    for line in table.values():
        line["reasons"] = "; ".join(sorted(line["reasons"]))
    return pd.DataFrame.from_dict(table, orient="index").rename_axis("judge")


def _axes(columns: int = 1, width: float = 4.2, height: float = 3.8):
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(
        1, columns, figsize=(width * columns, height), squeeze=False, layout="constrained"
    )
    for axis in axes[0]:
        axis.spines[["top", "right"]].set_visible(False)
    return figure, axes[0]


def plot_scores(
    rows: list[dict], teacher: str, students: list[str], low: float = 1, high: float = 5
) -> None:
    """Each student's scores against the teacher's, one panel a student; a dot is as large as the rows that it stands for."""
    room = 0.075 * (high - low)
    figure, axes = _axes(len(students))
    truth = scores_of(rows, teacher)
    for axis, student in zip(axes, students):
        points = pd.Series(zip(truth, scores_of(rows, student))).value_counts()
        x, y = np.array(points.index.tolist()).T
        axis.plot([low, high], [low, high], color=GREY, linewidth=1, zorder=0)
        axis.scatter(x, y, s=24 * points.to_numpy(), color=BLUE, alpha=0.6, linewidths=0)
        axis.set(
            title=student,
            xlabel=f"score of {teacher}",
            xlim=(low - room, high + room),
            ylim=(low - room, high + room),
        )
    axes[0].set_ylabel("score of the student")
    _show(figure)


def plot_judges(report: pd.DataFrame, metrics: tuple = ("correlation", "kappa", "mae")) -> None:
    """Every judge's figures with their intervals, one panel a metric."""
    figure, axes = _axes(len(metrics), height=0.45 * len(report) + 1)
    places = np.arange(len(report))[::-1]
    for axis, metric in zip(axes, metrics):
        figures, low, high = (report[metric + end] for end in ("", "_low", "_high"))
        axis.hlines(places, low, high, color=GREY, linewidth=2)
        axis.scatter(figures, places, color=BLUE, zorder=2)
        axis.set(
            title=metric,
            yticks=places,
            yticklabels=report.index if axis is axes[0] else [""] * len(report),
        )
        axis.set_ylim(-0.6, len(report) - 0.4)
        axis.grid(axis="x", color="#e5e5e5")
    _show(figure)


def plot_sweep(report: pd.DataFrame, metrics: tuple, chosen: float | None = None) -> None:
    """Figures of a report over its index (a setting), each with its interval, one panel a figure; `chosen` is marked."""
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
    """Left the ROC curve of each judge's probability that an answer is acceptable; right its reliability: of the answers to which
    it gave some probability, the share that the teacher accepts (bins of equal counts). On the diagonal it means what it says."""
    from sklearn.calibration import calibration_curve
    from sklearn.metrics import roc_curve

    figure, (roc, reliability) = _axes(2)
    graded = scores_of(rows, teacher)
    truth = graded > ACCEPTABLE
    colors = (BLUE, ORANGE, GREY)
    if len(judges) > len(colors):
        raise ValueError(
            f"{len(judges)} judges: expected {len(colors)} at most, or nobody can tell them apart"
        )
    for judge, color in zip(judges, colors):
        p = probabilities_of(rows, judge)
        valid = ~np.isnan(p) & ~np.isnan(graded)
        false, true, _ = roc_curve(truth[valid], p[valid])
        roc.plot(false, true, color=color, label=judge)
        share, said = calibration_curve(
            truth[valid], np.clip(p[valid], 0, 1), n_bins=bins, strategy="quantile"
        )
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
    """Verdicts in the two orders, 3 x 3, one panel a judge (`order_table`). Off the diagonal, the order changed the mind."""
    figure, axes = _axes(len(tables), width=3.2, height=3.4)
    most = max(int(table.to_numpy().max()) for table in tables.values())
    for axis, (judge, table) in zip(axes, tables.items()):
        axis.imshow(table, cmap="Blues", vmin=0, vmax=max(1, most))
        for i, j in np.ndindex(table.shape):
            count = table.iloc[i, j]
            axis.text(
                j,
                i,
                str(count) if count else "",
                ha="center",
                va="center",
                color="white" if count > most / 2 else "black",
            )
        axis.set(
            title=judge,
            xticks=range(3),
            xticklabels=table.columns,
            yticks=range(3),
            yticklabels=table.index,
            xlabel="flipped order says",
        )
    axes[0].set_ylabel("original order says")
    _show(figure)


def _show(figure) -> None:
    import matplotlib.pyplot as plt

    plt.show()
    plt.close(figure)
