"""`make bench`: what the README and the design promise, measured in one run. Prints a line a figure, with its limit."""

import asyncio
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "notebooks"))

from helpers import (CallLog, Student, embed, finetuning_events, items_of, judge_rows, load_rows, local_embedding, score_distribution,
                     scores_of, untrained_judges)
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
    embed(["start the encoder"])  # what it embeds here comes with the snapshot, and is timed by the encoder itself
    encode = local_embedding().encoder.get_text_embedding_batch
    texts = [text for item in items for text in item]
    show("embedding the texts of 79 events", seconds(lambda: encode(texts)), "s")
    taught = []
    show("training on them", seconds(lambda: taught.append(Student.fit(items, scores))), "s", 5)
    many = items_of(rows) * 50
    embedding = seconds(lambda: encode([text for item in items_of(rows) for text in item]))
    show(f"embedding the texts of {len(rows)} rows to judge", embedding, "s")
    show("judging in one batch, texts embedded", len(many) / seconds(lambda: taught[0].scores(many)), "rows a second", 1000, True)

    def one_by_one(llm) -> None:
        asyncio.run(judge_rows(rows, CorrectnessEvaluator(llm=llm), name="bench"))

    plain = seconds(lambda: one_by_one(untrained_judges(3.0)["constant"]))
    show("one by one through CorrectnessEvaluator, against a constant judge", seconds(lambda: one_by_one(taught[0].llm())) / plain, "times")
    with finetuning_events():
        recorded = seconds(lambda: one_by_one(untrained_judges(3.0)["constant"]))
    show("keeping the events of a judge, against not keeping them", recorded / plain, "times")


def soft_targets() -> None:
    print("Training on soft targets (single grading), texts embedded")
    rows = load_rows(DATA / "single_grading" / "train_qa.jsonl")
    items, scores = items_of(rows), scores_of(rows, "teacher").tolist()
    soft = [score_distribution(row["evaluations"][0]) for row in rows]
    embed([text for item in items for text in item])

    def train(times: int, alpha: float) -> float:
        # Questions of their own in each copy, so that cross-validation parts them as it does others.
        many = [(f"{question} {copy}", context, answer) for copy in range(times) for question, context, answer in items]
        embed([question for question, _, _ in many])
        return seconds(lambda: Student.fit(many, scores * times, soft * times, alpha))

    for alpha in (0.0, 0.5, 1.0):
        show(f"{len(rows)} rows, alpha = {alpha}", train(1, alpha), "s", 5)
    show("8 times the rows, against 4 times", train(8, 0.5) / train(4, 0.5), "times", 2.6)


def notebooks() -> None:
    print("The notebooks, from clean kernels, all at once")
    run = seconds(lambda: subprocess.run([sys.executable, "-m", "helpers", "run"], check=True, stdout=subprocess.DEVNULL, cwd=ROOT / "notebooks"))
    show("make run", run, "s", 120)


if __name__ == "__main__":
    replay()
    student()
    soft_targets()
    notebooks()
    sys.exit(f"missed: {', '.join(missed)}" if missed else 0)
