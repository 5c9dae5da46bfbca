"""Show: tables and plots of judgements."""

from importlib.metadata import version

import numpy as np
import pandas as pd

from .metrics import METRICS, scores_of

pd.set_option("display.width", 140)  # as wide as a terminal, for `make run`

BLUE, GREY = "#2a6f97", "#8d99ae"


def versions(*packages: str) -> pd.Series:
    """The installed versions of packages."""
    return pd.Series({package: version(package) for package in packages}, name="version")


def with_intervals(report: pd.DataFrame, metrics: tuple = METRICS, digits: int = 2) -> pd.DataFrame:
    """A report for reading: each figure as text with its interval, "0.81 [0.70, 0.88]"; a dash where it is undefined."""

    def text(row: pd.Series, metric: str) -> str:
        figure, low, high = (round(row[metric + end], digits) + 0.0 for end in ("", "_low", "_high"))  # + 0.0: no "-0.00"
        if np.isnan(figure):
            return "–"
        return f"{figure:.{digits}f}" if np.isnan(low) else f"{figure:.{digits}f} [{low:.{digits}f}, {high:.{digits}f}]"

    counts = {column: report[column] for column in report.columns if pd.api.types.is_integer_dtype(report[column])}
    table = {**counts, **{metric: [text(row, metric) for _, row in report.iterrows()] for metric in metrics}}
    return pd.DataFrame(table, index=report.index)


def show_pair(row: dict, judge: str):
    """One pairwise judgement as a table: question, source, both answers, both verdicts and the judge's words."""
    evaluation = next(evaluation for evaluation in row["evaluations"] if evaluation["llm"] == judge)
    first, second = row["answers"]
    verdicts = " then, flipped, ".join(f"[[{verdict}]]" for verdict in evaluation["verdicts"])
    table = pd.DataFrame({"": {
        "question": row["question"], "source": row["source"], f"first: {first['model']}": first["text"],
        f"second: {second['model']}": second["text"], "verdicts": verdicts, "score, by": f"{evaluation['score']}, {evaluation['source']}",
        f"{judge}": evaluation["text"]}})
    # With a name of its own the table is the same in each run: Styler makes one up otherwise.
    return table.style.set_uuid("pair").set_properties(**{"text-align": "left", "white-space": "pre-wrap"}).hide(axis="columns")


def invalid_judgements(rows: list[dict]) -> pd.DataFrame:
    """Per judge: how many judgements there are, how many could not be used, and why."""
    table: dict = {}
    for row in rows:
        for evaluation in row.get("evaluations", []):
            line = table.setdefault(evaluation["llm"], {"judgements": 0, "invalid": 0, "reasons": set()})
            line["judgements"] += 1
            if evaluation["score"] is None:
                line["invalid"] += 1
                line["reasons"].add(evaluation.get("invalid", "unknown"))
    for line in table.values():
        line["reasons"] = "; ".join(sorted(line["reasons"]))
    return pd.DataFrame.from_dict(table, orient="index").rename_axis("judge")


def _axes(columns: int = 1, width: float = 4.2, height: float = 3.8):
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, columns, figsize=(width * columns, height), squeeze=False, layout="constrained")
    for axis in axes[0]:
        axis.spines[["top", "right"]].set_visible(False)
    return figure, axes[0]


def plot_scores(rows: list[dict], teacher: str, students: list[str]) -> None:
    """Each student's scores against the teacher's, one panel a student; a dot is as large as the rows that it stands for."""
    figure, axes = _axes(len(students))
    truth = scores_of(rows, teacher)
    for axis, student in zip(axes, students):
        points = pd.Series(zip(truth, scores_of(rows, student))).value_counts()
        x, y = np.array(points.index.tolist()).T
        axis.plot([1, 5], [1, 5], color=GREY, linewidth=1, zorder=0)
        axis.scatter(x, y, s=24 * points.to_numpy(), color=BLUE, alpha=0.6, linewidths=0)
        axis.set(title=student, xlabel=f"score of {teacher}", xlim=(0.7, 5.3), ylim=(0.7, 5.3))
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
        axis.set(title=metric, yticks=places, yticklabels=report.index if axis is axes[0] else [""] * len(report))
        axis.set_ylim(-0.6, len(report) - 0.4)
        axis.grid(axis="x", color="#e5e5e5")
    _show(figure)


def plot_orders(tables: dict[str, pd.DataFrame]) -> None:
    """Verdicts in the two orders, 3 x 3, one panel a judge (`order_table`). Off the diagonal, the order changed the mind."""
    figure, axes = _axes(len(tables), width=3.2, height=3.4)
    most = max(int(table.to_numpy().max()) for table in tables.values())
    for axis, (judge, table) in zip(axes, tables.items()):
        axis.imshow(table, cmap="Blues", vmin=0, vmax=max(1, most))
        for i, j in np.ndindex(table.shape):
            count = table.iloc[i, j]
            axis.text(j, i, str(count) if count else "", ha="center", va="center", color="white" if count > most / 2 else "black")
        axis.set(title=judge, xticks=range(3), xticklabels=table.columns, yticks=range(3), yticklabels=table.index,
                 xlabel="flipped order says")
    axes[0].set_ylabel("original order says")
    _show(figure)


def _show(figure) -> None:
    import matplotlib.pyplot as plt

    plt.show()
    plt.close(figure)
