"""`make bench`: what the README promises, measured in one run; a line a figure, with its limit."""

import asyncio
import contextlib
import cProfile
import io
import itertools
import json
import logging
import math
import os
import pstats
import re
import subprocess
import sys
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Awaitable
from dataclasses import dataclass, field
from pathlib import Path

import aiohttp

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "notebooks"))

from llama_index.core.base.llms.types import ChatMessage
from llama_index.core.evaluation import BatchEvalRunner, CorrectnessEvaluator
from llama_index.llms.openai import OpenAI
from server import Server

from helpers import (
    CallLog,
    Student,
    finetuning_events,
    items_of,
    judge_rows,
    live,
    load_rows,
    score_distribution,
    scores_of,
    untrained_judges,
)
from helpers.embeddings import embed, local_embedding
from helpers.log import make_row
from helpers.rows import DATA
from helpers.settings import ROOT

LOGGED = "judge_rows, with the log"
missed = []


def show(
    what: str, figure: float, unit: str, limit: float | None = None, more_is_better: bool = False
) -> None:
    good = limit is None or (figure >= limit if more_is_better else figure <= limit)
    bound = ""
    if limit is not None:
        side = "at least" if more_is_better else "at most"
        bound = f"   ({side} {limit:,.6g}{'' if good else ': MISSED'})"
    print(f"  {what:<62}{figure:>12,.2f} {unit}{bound}", flush=True)
    if not good:
        missed.append(what)


def seconds(job) -> float:
    start = time.perf_counter()
    job()
    return time.perf_counter() - start


def call(i: int) -> dict:
    return {
        "model": "m",
        "messages": [
            {"role": "system", "content": "You judge. " * 60},
            {"role": "user", "content": f"Row {i}. " * 40},
        ],
        "params": {"temperature": 0},
        "sample": 0,
    }


def write_log(path: Path, rows: int) -> None:
    with open(path, "w", encoding="utf-8") as file:
        for i in range(rows):
            file.write(
                json.dumps(make_row(call(i), f"{1 + i % 5}\nBecause of this and that, {i}.")) + "\n"
            )


OPENING = """
import psutil, sys, time
from helpers import CallLog
before = psutil.Process().memory_info().rss
start = time.perf_counter()
log = CallLog(sys.argv[1], "replay")
took = time.perf_counter() - start
print(took, (psutil.Process().memory_info().rss - before) / 1e6, len(log))
"""


def opening(path: Path) -> tuple[float, float]:
    """(seconds, MB) that opening a log takes, in a process of its own."""
    run = subprocess.run(
        [sys.executable, "-c", OPENING, str(path)],
        capture_output=True,
        encoding="utf-8",
        check=True,
        cwd=ROOT / "notebooks",
    )
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
        show(
            "opening it: time, against a log of half the length",
            whole_time / half_time,
            "times",
            2.4,
        )
        llm = CallLog(whole, "replay").llm("m", params={"temperature": 0})
        prompts = [
            [ChatMessage(role=m["role"], content=m["content"]) for m in call(i * 49)["messages"]]
            for i in range(2000)
        ]

        async def ask() -> None:
            for messages in prompts:
                await llm.achat(messages)

        show(
            "answers",
            len(prompts) / seconds(lambda: asyncio.run(ask())),
            "a second",
            2000,
            more_is_better=True,
        )


def student() -> None:
    print("The local student")
    train = load_rows(DATA / "correctness" / "train_qa.jsonl")[:79]
    rows = load_rows(DATA / "correctness" / "test_qa_complete.jsonl")
    items, scores = items_of(train), scores_of(train, "teacher")
    embed(
        ["start the encoder"]
    )  # what it embeds here comes with the snapshot, and is timed by the encoder itself
    encode = local_embedding().encoder.get_text_embedding_batch
    texts = [text for item in items for text in item]
    show("embedding the texts of 79 events", seconds(lambda: encode(texts)), "s")
    taught = []
    show("training on them", seconds(lambda: taught.append(Student.fit(items, scores))), "s", 5)
    many = items_of(rows) * 50
    embedding = seconds(lambda: encode([text for item in items_of(rows) for text in item]))
    show(f"embedding the texts of {len(rows)} rows to judge", embedding, "s")
    show(
        "judging in one batch, texts embedded",
        len(many) / seconds(lambda: taught[0].scores(many)),
        "rows a second",
        1000,
        True,
    )

    def one_by_one(llm) -> None:
        asyncio.run(judge_rows(rows, CorrectnessEvaluator(llm=llm), name="bench"))

    plain = seconds(lambda: one_by_one(untrained_judges(3.0)["constant"]))
    show(
        "one by one through CorrectnessEvaluator, against a constant judge",
        seconds(lambda: one_by_one(taught[0].llm())) / plain,
        "times",
    )
    with finetuning_events():
        recorded = seconds(lambda: one_by_one(untrained_judges(3.0)["constant"]))
    show("keeping the events of a judge, against not keeping them", recorded / plain, "times")


TRAINING = """
import sys, time
from threadpoolctl import threadpool_limits
from helpers import Student, items_of, load_rows, scores_of
from helpers.rows import DATA

rows = load_rows(DATA / "correctness" / "train_qa.jsonl")
items, scores = items_of(rows), scores_of(rows, "teacher")
Student.fit(items, scores)  # imports, and vectors and counts that are kept
taken = []
with threadpool_limits(int(sys.argv[1])):
    for _ in range(5):
        used = time.process_time()
        Student.fit(items, scores)
        taken.append(time.process_time() - used)
print(min(taken))
"""


def training_by(threads: int) -> float:
    """The least CPU seconds of five `Student.fit` in a process that may use so many threads."""
    variables = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")
    run = subprocess.run(
        [sys.executable, "-c", TRAINING, str(threads)],
        capture_output=True,
        encoding="utf-8",
        check=True,
        cwd=ROOT / "notebooks",
        env={**os.environ, **dict.fromkeys(variables, str(threads))},
    )
    return float(run.stdout)


def training() -> None:
    print("Training on the bundled correctness rows, in CPU seconds, best of 15")
    taken: dict[int, float] = {}
    for _ in range(3):
        for threads in (1, 2):
            taken[threads] = min(taken.get(threads, math.inf), training_by(threads))
    for threads, used in taken.items():
        show(f"Student.fit, {threads} thread(s) allowed", used, "s", 3)
    show("the slower against the faster", max(taken.values()) / min(taken.values()), "times", 1.3)


def soft_targets() -> None:
    print("Training on soft targets (single grading), texts embedded")
    rows = load_rows(DATA / "single_grading" / "train_qa.jsonl")
    items, scores = items_of(rows), scores_of(rows, "teacher").tolist()
    soft = [score_distribution(row["evaluations"][0]) for row in rows]
    embed([text for item in items for text in item])

    def train(times: int, alpha: float) -> float:
        # Each copy has its own questions, so cross-validation parts them as it does others.
        many = [
            (f"{question} {copy}", context, answer)
            for copy in range(times)
            for question, context, answer in items
        ]
        embed([question for question, _, _ in many])
        return seconds(lambda: Student.fit(many, scores * times, soft * times, alpha))

    for alpha in (0.0, 0.5, 1.0):
        show(f"{len(rows)} rows, alpha = {alpha}", train(1, alpha), "s", 5)
    show("8 times the rows, against 4 times", train(8, 0.5) / train(4, 0.5), "times", 2.6)


def notebooks() -> None:
    print("The notebooks, from clean kernels, all at once")
    run = seconds(
        lambda: subprocess.run(
            [sys.executable, "-m", "helpers", "run"],
            check=True,
            stdout=subprocess.DEVNULL,
            cwd=ROOT / "notebooks",
        )
    )
    show("make run", run, "s", 120)


class Loopback:
    """The loopback server in a process of its own: `with Loopback(0.2) as url`."""

    def __init__(self, delay: float) -> None:
        self.delay = delay

    def __enter__(self) -> str:
        self.process = subprocess.Popen(
            [sys.executable, str(Path(__file__).with_name("server.py")), str(self.delay)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            encoding="utf-8",
        )
        return self.process.stdout.readline().strip()

    def __exit__(self, *_) -> None:
        self.process.stdin.close()
        self.process.wait(10)
        self.process.stdout.close()


def fresh_rows(count: int) -> list[dict]:
    """Rows that nobody has asked about before."""
    start = next(numbers) * 100_000
    return [
        {
            "question": f"Question {start + i}?",
            "reference": "It is so. " * 20,
            "response_data": {"text": f"Answer {i}. " * 10},
        }
        for i in range(count)
    ]


numbers = itertools.count()


async def bare_gather(evaluator: CorrectnessEvaluator, rows: list[dict], concurrency: int) -> None:
    gate = asyncio.Semaphore(concurrency)

    async def one(row: dict) -> None:
        async with gate:
            await evaluator.aevaluate(
                query=row["question"],
                response=row["response_data"]["text"],
                reference=row["reference"],
            )

    await asyncio.gather(*map(one, rows))


async def in_turn(evaluator: CorrectnessEvaluator, rows: list[dict], concurrency: int) -> None:
    await bare_gather(evaluator, rows, 1)


async def by_runner(evaluator: CorrectnessEvaluator, rows: list[dict], concurrency: int) -> None:
    runner = BatchEvalRunner({"correctness": evaluator}, workers=concurrency)
    await runner.aevaluate_response_strs(
        queries=[row["question"] for row in rows],
        response_strs=[row["response_data"]["text"] for row in rows],
        reference=[row["reference"] for row in rows],
    )


async def raw(url: str, rows: list[dict], concurrency: int) -> None:
    """The same requests by aiohttp alone: what the machine and the server allow."""
    gate = asyncio.Semaphore(concurrency)
    async with aiohttp.ClientSession() as session:

        async def one(row: dict) -> None:
            body = {
                "model": "m",
                "messages": [{"role": "user", "content": json.dumps(row) + "You judge. " * 100}],
            }
            async with gate, session.post(url + "/chat/completions", json=body) as response:
                await response.json()

        await asyncio.gather(*map(one, rows))


@dataclass
class Stopwatch:
    """The least wall time and processor time of each job, in seconds, over all its rounds."""

    walls: dict[str, float] = field(default_factory=dict)
    processor: dict[str, float] = field(default_factory=dict)

    async def measure(self, name: str, job: Awaitable) -> None:
        wall, used = time.perf_counter(), time.process_time()
        await job
        used, wall = time.process_time() - used, time.perf_counter() - wall
        self.walls[name] = min(self.walls.get(name, math.inf), wall)
        self.processor[name] = min(self.processor.get(name, math.inf), used)


async def rounds_of_calls(
    url: str, folder: str, calls: int, concurrency: int, rounds: int, one_by_one: bool
) -> Stopwatch:
    """Time the ways to make many calls. The ways take turns, round by round."""
    log = CallLog(Path(folder) / "calls.jsonl", "record")
    logged = CorrectnessEvaluator(
        llm=log.llm("gpt-4.1", live(f"gpt-4.1@{url}"), params={"temperature": 0})
    )
    endpoint = CorrectnessEvaluator(llm=live(f"gpt-4.1@{url}")())
    theirs = CorrectnessEvaluator(llm=OpenAI(model="gpt-4.1", api_base=url, api_key="none"))
    ways = {
        LOGGED: lambda rows: judge_rows(rows, logged, name="t", concurrency=concurrency),
        "a bare gather of the evaluator, our endpoint": lambda rows: bare_gather(
            endpoint, rows, concurrency
        ),
        "a bare gather of the evaluator, LlamaIndex's": lambda rows: bare_gather(
            theirs, rows, concurrency
        ),
        "LlamaIndex's BatchEvalRunner": lambda rows: by_runner(theirs, rows, concurrency),
        "aiohttp alone": lambda rows: raw(url, rows, concurrency),
    }
    watch = Stopwatch()
    await judge_rows(fresh_rows(concurrency), logged, name="warm", concurrency=concurrency)
    for _ in range(rounds):
        for name, way in ways.items():
            await watch.measure(name, way(fresh_rows(calls)))
    if one_by_one:
        job = in_turn(theirs, fresh_rows(calls), concurrency)
        await watch.measure("one after the other, as the originals", job)
    return watch


def live_calls() -> None:
    """Many slow calls at once: wall time against the limit, calls * delay / concurrency."""
    # LlamaIndex's clients complain when their event loop closes.
    logging.getLogger("asyncio").setLevel(logging.CRITICAL)
    for delay, calls, concurrency, rounds in ((0.2, 128, 16, 5), (1.0, 256, 64, 5)):
        limit = calls * delay / concurrency
        print(f"{calls} live calls of {delay:g} s, {concurrency} at once, best of {rounds}")
        print(f"  (wall time in times of the limit, {limit:g} s)")
        with (
            Loopback(delay) as url,
            tempfile.TemporaryDirectory() as folder,
            contextlib.redirect_stderr(io.StringIO()),
        ):
            watch = asyncio.run(
                rounds_of_calls(url, folder, calls, concurrency, rounds, one_by_one=delay < 1)
            )
        for name, wall in watch.walls.items():
            show(name, wall / limit, "times", 1.15 if name == LOGGED else None)
            show("    processor time a call", watch.processor[name] / calls * 1000, "ms")


def where_it_goes() -> None:
    """By the package whose code runs. Python's own library counts for the package that calls it."""

    def package(function: tuple) -> str:
        found = re.search(r"site-packages/(\w+)|/(helpers|tests)/", function[0])
        return next(filter(None, found.groups())) if found else "Python"

    async def profiled(url: str, folder: str) -> pstats.Stats:
        judge = CorrectnessEvaluator(
            llm=CallLog(Path(folder) / "calls.jsonl", "record").llm(
                "gpt-4.1", live(f"gpt-4.1@{url}")
            )
        )
        await judge_rows(fresh_rows(64), judge, name="warm", concurrency=64)
        rows, profile = (
            fresh_rows(256),
            cProfile.Profile(time.process_time),
        )  # which stands still while calls wait
        profile.enable()
        await judge_rows(rows, judge, name="t", concurrency=64)
        profile.disable()
        return pstats.Stats(profile)

    print("Where the processor time of a logged call goes")
    with (
        Loopback(0) as url,
        tempfile.TemporaryDirectory() as folder,
        contextlib.redirect_stderr(io.StringIO()),
    ):
        stats = asyncio.run(profiled(url, folder)).stats
    shares = Counter()
    for function, (_, _, own, _, callers) in stats.items():
        if package(function) == "Python" and callers:
            for caller, (_, _, part, _) in callers.items():
                shares[package(caller)] += part
        else:
            shares[package(function)] += own
    for name, share in shares.most_common(8):
        show(name, 100 * share / shares.total(), "%")


def log_cost() -> None:
    print("The log's own cost when recording 1,000 rows, written to this disk, best of 3")
    usage = {"prompt_tokens": 1, "completion_tokens": 1}
    numbered = [make_row(call(i), "4.0\nBecause.", usage) for i in range(1000)]

    def write(path: Path) -> None:
        with CallLog(path, "record") as log:
            for row in numbered:
                log.append(row)

    with tempfile.TemporaryDirectory() as folder:
        paths = [Path(folder) / f"{i}.jsonl" for i in range(3)]
        show("a row", min(seconds(lambda path=path: write(path)) for path in paths), "ms", 1)


RESUMING = """
import asyncio, os, psutil, sys
from helpers import CallLog, judge_rows, live
from llama_index.core.evaluation import CorrectnessEvaluator

path, url, count = sys.argv[1], sys.argv[2], int(sys.argv[3])
answers = [{"text": f"Answer {i}."} for i in range(count)]
rows = [
    {"question": f"Question {i}?", "reference": "It is so.", "response_data": answer}
    for i, answer in enumerate(answers)
]
log = CallLog(path, "record")
llm = log.llm("gpt-4.1", live(f"gpt-4.1@{url}"), params={"temperature": 0})
judge = CorrectnessEvaluator(llm=llm)
# The first live call of a process loads what all need.
warm = [{**rows[0], "question": f"Is process {os.getpid()} warm?"}]
asyncio.run(judge_rows(warm, judge, name="t"))
memory = psutil.Process().memory_info
before = memory().rss
judged = asyncio.run(judge_rows(rows, judge, name="t", concurrency=32))
done = sum(row["evaluations"][0]["score"] is not None for row in judged)
print(done, (memory().rss - before) / 1e6)
"""


def resuming() -> None:
    calls = 10_000
    print(f"{calls:,} calls recorded, killed at half, and resumed")
    with Server() as server, tempfile.TemporaryDirectory() as folder:
        environment = {**os.environ, "OPENAI_API_KEY": "none", "JUDGE_MODE": "record"}

        def start(count: int, path: Path) -> subprocess.Popen:
            return subprocess.Popen(
                [sys.executable, "-c", RESUMING, str(path), server.url, str(count)],
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                encoding="utf-8",
                cwd=ROOT / "notebooks",
                env=environment,
            )

        few = start(calls // 4, Path(folder) / "few.jsonl")
        _, small = map(float, few.communicate()[0].split())
        path = Path(folder) / "calls.jsonl"

        def asked() -> int:
            return (
                sum("Question " in body["messages"][-1]["content"] for body in server.bodies)
                - calls // 4
            )

        first = start(calls, path)
        while first.poll() is None and (
            not path.exists() or path.read_bytes().count(b"\n") < calls / 2
        ):
            time.sleep(0.2)
        first.kill()
        first.communicate()
        sent = asked()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of a torn last line
            held = len(CallLog(path, "replay")) - 1
        second = start(calls, path)
        done, large = map(float, second.communicate()[0].split())
        show("answered before the kill", held, "calls")
        show("under way at the kill", sent - held, "calls", 32)
        show(
            "sent by the second run, less what was missing",
            asked() - sent - (calls - held),
            "calls",
            0,
        )
        show("rows in the end, less all", done - calls, "rows", 0)
        show("memory of a quarter of the calls", small, "MB")
        show(
            "memory of all, a row's result and its place in the log",
            1000 * large / calls,
            "KB a row",
            3,
        )


if __name__ == "__main__":
    live_calls()
    where_it_goes()
    log_cost()
    resuming()
    replay()
    training()
    student()
    soft_targets()
    notebooks()
    sys.exit(f"missed: {', '.join(missed)}" if missed else 0)
