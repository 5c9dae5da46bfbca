"""`make bench`: what the README and the design promise, measured in one run. Prints a line a figure, with its limit."""

import asyncio
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "notebooks"))

from helpers import CallLog, Student, embed, finetuning_events, items_of, judge_rows, load_rows, scores_of, untrained_judges
from helpers.snapshots import DATA, ROOT, make_row
from llama_index.core.evaluation import CorrectnessEvaluator
from llama_index.core.base.llms.types import ChatMessage

missed = []


def show(what: str, figure: float, unit: str, limit: float | None = None, more_is_better: bool = False) -> None:
    good = limit is None or (figure >= limit if more_is_better else figure <= limit)
    bound = "" if limit is None else f"   ({'at least' if more_is_better else 'at most'} {limit:,.6g}{'' if good else ': MISSED'})"
    print(f"  {what:<62}{figure:>12,.2f} {unit}{bound}", flush=True)
    if not good:
        missed.append(what)


def seconds(job) -> float:
    start = time.perf_counter()
    job()
    return time.perf_counter() - start


def call(i: int) -> dict:
    return {"model": "m", "messages": [{"role": "system", "content": "You judge. " * 60}, {"role": "user", "content": f"Row {i}. " * 40}],
            "params": {"temperature": 0}, "sample": 0}


def write_log(path: Path, rows: int) -> None:
    with open(path, "w", encoding="utf-8") as file:
        for i in range(rows):
            file.write(json.dumps(make_row(call(i), f"{1 + i % 5}\nBecause of this and that, {i}.")) + "\n")


OPENING = """
import resource, sys, time
from helpers import CallLog
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
start = time.perf_counter()
log = CallLog(sys.argv[1], "replay")
took = time.perf_counter() - start
unit = 1 if sys.platform == "darwin" else 1024
print(took, (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * unit / 1e6, len(log))
"""


def opening(path: Path) -> tuple[float, float]:
    """(seconds, MB) that opening a log takes, in a process of its own."""
    run = subprocess.run([sys.executable, "-c", OPENING, str(path)], capture_output=True, text=True, check=True, cwd=ROOT / "notebooks")
    took, memory, _ = map(float, run.stdout.split())
    return took, memory


def replay() -> None:
    print("Replay, from a log of 100,000 rows")
    with tempfile.TemporaryDirectory() as folder:
        half, whole = Path(folder) / "half.jsonl", Path(folder) / "whole.jsonl"
        write_log(half, 50_000)
        write_log(whole, 100_000)
        (half_time, _), (whole_time, memory) = opening(half), opening(whole)
        show("size of the log", whole.stat().st_size / 1e6, "MB")
        show("opening it: memory", memory, "MB", 300)
        show("opening it: time, against a log of half the length", whole_time / half_time, "times", 2.4)
        llm = CallLog(whole, "replay").llm("m", params={"temperature": 0})
        prompts = [[ChatMessage(role=m["role"], content=m["content"]) for m in call(i * 49)["messages"]] for i in range(2000)]

        async def ask() -> None:
            for messages in prompts:
                await llm.achat(messages)

        show("answers", len(prompts) / seconds(lambda: asyncio.run(ask())), "a second", 2000, more_is_better=True)


def student() -> None:
    print("The local student")
    train = load_rows(DATA / "correctness" / "train_qa.jsonl")[:79]
    rows = load_rows(DATA / "correctness" / "test_qa_complete.jsonl")
    items, scores = items_of(train), scores_of(train, "teacher")
    embed(["start the encoder"])
    texts = [text for item in items for text in item]
    show("embedding the texts of 79 events", seconds(lambda: embed(texts)), "s")
    taught = []
    show("training on them", seconds(lambda: taught.append(Student.fit(items, scores))), "s", 5)
    many = items_of(rows) * 50
    embedding = seconds(lambda: embed([text for item in items_of(rows) for text in item]))
    show(f"embedding the texts of {len(rows)} rows to judge", embedding, "s")
    show("judging in one batch, texts embedded", len(many) / seconds(lambda: taught[0].scores(many)), "rows a second", 1000, True)

    def one_by_one(llm) -> None:
        asyncio.run(judge_rows(rows, CorrectnessEvaluator(llm=llm), name="bench"))

    plain = seconds(lambda: one_by_one(untrained_judges(3.0)["constant"]))
    show("one by one through CorrectnessEvaluator, against a constant judge", seconds(lambda: one_by_one(taught[0].llm())) / plain, "times")
    with finetuning_events():
        recorded = seconds(lambda: one_by_one(untrained_judges(3.0)["constant"]))
    show("keeping the events of a judge, against not keeping them", recorded / plain, "times")


def notebooks() -> None:
    print("The notebooks, from a clean kernel")
    import nbformat
    from nbclient import NotebookClient

    total = 0.0
    for path in sorted((ROOT / "notebooks").glob("*.ipynb")):
        notebook = nbformat.read(path, as_version=4)
        took = seconds(NotebookClient(notebook, kernel_name="python3", resources={"metadata": {"path": str(path.parent)}},
                                      extra_arguments=["--IPKernelApp.log_level=ERROR"]).execute)
        total += took
        show(path.stem, took, "s")
        for cost, cell in sorted(((cell_seconds(cell), cell) for cell in notebook.cells if cell.cell_type == "code"),
                                 key=lambda pair: -pair[0])[:5]:
            show(f"  of that: {cell.source.strip().splitlines()[-1][:48]}", cost, "s")
    show("all together", total, "s", 120)


def cell_seconds(cell) -> float:
    from dateutil.parser import parse

    times = cell.metadata["execution"]
    return (parse(times["iopub.status.idle"]) - parse(times["iopub.status.busy"])).total_seconds()


if __name__ == "__main__":
    replay()
    student()
    notebooks()
    sys.exit(f"missed: {', '.join(missed)}" if missed else 0)
