"""Downloads GPT-4's real verdicts from public repositories, and makes snapshots of them.

`published.sha256` lists the files; in `data/`, `sha256sum -c` can read it too.
"""

import asyncio
import hashlib
import http.client
import json
import os
import re
import urllib.request
from functools import partial
from pathlib import Path

from llama_index.core.evaluation import CorrectnessEvaluator, PairwiseComparisonEvaluator

from ..finetune import finetuning_events, save_events
from ..judge import SingleGradingEvaluator, judge_rows
from ..pairs import PairJudge
from ..rows import DATA, save_rows, write_text
from ..student import LocalJudge

GITHUB = "https://raw.githubusercontent.com"
SETS = {  # a set's folder in a public commit (licences: MIT, MIT, Apache-2.0)
    "published": f"{GITHUB}/run-llama/llama_index/6d495ce03f8457fa0b5dd23d4b0501808c12954b"
    "/docs/examples/finetuning/llm_judge",
    "llmbar": f"{GITHUB}/princeton-nlp/LLMBar/900616bff90b6c6c8e1681f7d079250637c55992",
    "prometheus": f"{GITHUB}/prometheus-eval/prometheus-eval"
    "/dcfb44272d5d0414832f5dbb8c2a05ebc2614234",
}
FOLDER, SUMS = DATA, Path(__file__).with_suffix(".sha256")
RUBRIC = "Grade the answer by the context, which is an answer of full marks."
SAMPLES = "teacher", "teacher_again", "teacher_third"
PROMETHEUS = re.compile(  # the sections of a prompt
    r"###The instruction to evaluate:\s*(.*?)\s*###Response to evaluate:\s*(.*?)\s*"
    r"###Reference Answer \(Score 5\):\s*(.*?)\s*###Score Rubrics:\s*(.*?)\s*###Feedback:",
    re.S,
)


def download(name: str = "published") -> list[str]:
    """Fetch a set's files into `data/<name>`, check each, and make a snapshot of them there.

    They come from PUBLISHED_URL or else the public commit. Files that are there are left alone.
    Returns what went wrong, a line a file. A file that is missing is left out of the snapshot. If a
    file is not what it was, no snapshot is made, and an older one is left as it is.
    """
    url = (os.environ.get("PUBLISHED_URL") or SETS[name]).rstrip("/")
    wrong, contents, changed = [], {}, False
    for expected, file in re.findall(rf"(\w+)  ({name}/.+)", SUMS.read_text(encoding="utf-8")):
        path = FOLDER / file
        there = path.exists()
        source = path.as_uri() if there else url + file.removeprefix(name)
        try:
            with urllib.request.urlopen(source, timeout=60) as response:
                data = response.read()  # raises IncompleteRead where the connection breaks
            if (found := hashlib.sha256(data).hexdigest()) != expected:
                changed, hint = True, "; remove it to fetch it anew" if there else ""
                raise ValueError(f"its SHA-256 is {found}, expected {expected}{hint}")
            if not there:
                write_text(path, data.decode())
            contents[file] = data
        except (OSError, ValueError, http.client.HTTPException) as error:  # URLError is an OSError
            wrong.append(f"{source}: {error}")
    if name in SNAPSHOTS and contents and not changed:
        files = {file: json.loads(data) for file, data in contents.items()}
        asyncio.run(SNAPSHOTS[name](FOLDER / name, files))
        if wrong:
            wrong.append(f"{FOLDER / name}: the snapshot is made without the files above")
    return wrong


async def _llmbar(folder: Path, files: dict[str, list[dict]]) -> None:
    """Pairs, judged by GPT-4 in both orders and by people; and the figures of them alone."""
    rows: list[dict] = []
    documents: dict[str, str] = {}  # by question
    said: dict[tuple, tuple] = {}
    for file, pairs in files.items():
        subset = file.split("/")[-5]
        for item, pair in enumerate(pairs):
            question, answers = pair["input"], (pair["output_1"], pair["output_2"])
            for swap, step, letters in ((False, 1, "AB"), (True, -1, "BA")):
                one = pair["results"][-1][f"swap = {swap}"]
                verdict = letters[int(one["winner"]) - 1]
                said[question, "", *answers[::step]] = verdict, one["completion"][0]
            row: dict = {"set": "MT-Bench" if subset == "MT-Bench" else "LLMBar", "subset": subset}
            row |= {"item": item, "document": documents.setdefault(question, f"{subset} {item}")}
            row |= {"words": [len(text.split()) for text in answers], "question": question}
            row |= {"source": "", "answers": [{"model": "unknown", "text": one} for one in answers]}
            people = {"llm": "people", "score": 2.0 - pair["label"], "source": "original"}
            people["winner"] = pair["label"] - 1
            rows.append({**row, "evaluations": [people]})
    gpt_4 = PairJudge(said.__getitem__, model_name="gpt-4")  # type: ignore[call-arg,arg-type]
    with finetuning_events() as events:
        rows = await judge_rows(rows, PairwiseComparisonEvaluator(llm=gpt_4), name="gpt_4")
    for row in rows:
        row["evaluations"].reverse()  # the teacher comes first
    _save(folder / "pairwise", "pairwise", rows, events)
    for row in rows:
        del row["question"], row["source"], row["answers"], row["evaluations"][0]["text"]
    save_rows(folder / "pairwise" / "llmbar_verdicts.jsonl", rows)


async def _prometheus(folder: Path, files: dict[str, list[dict]]) -> None:
    """Answers with three scores by GPT-4 each, on the scales of two notebooks: 1 to 5, 0 to 1."""
    rows: list[dict] = []
    documents: dict[str, str] = {}  # by question
    said: list[dict] = [{} for _ in SAMPLES]
    for file, answers in files.items():
        for item, one in enumerate(answers):
            [(question, answer, reference, rubric)] = PROMETHEUS.findall(one["instruction"])
            given = {"model": one["response_source"], "text": answer, "context": reference}
            row = {"question": question, "reference": reference, "response_data": given}
            document = documents.setdefault(question, f"{Path(file).stem} {item}")
            rows.append({**row, "rubric": rubric, "document": document})
            for sample, score, why in zip(said, one["gpt4_score"], one["gpt4_feedback"]):
                sample[question, reference, answer] = score, why
    shares = [{item: ((n - 1) / 4, why) for item, (n, why) in sample.items()} for sample in said]
    grader = partial(SingleGradingEvaluator, rubric=RUBRIC)
    for part, chats, kind, samples in (
        ("correctness", "correction", CorrectnessEvaluator, said),
        ("single_grading", "single_grading", grader, shares),
    ):
        judged = rows
        with finetuning_events() as events:
            for name, sample in zip(SAMPLES, samples):
                gpt_4 = LocalJudge(sample.__getitem__, model_name="gpt-4", decimals=2)
                judged = await judge_rows(judged, kind(llm=gpt_4), name=name)
        _save(folder / part, chats, judged, events)


def _save(folder: Path, chats: str, rows: list[dict], events: list[dict]) -> None:
    """Write a snapshot's part. The rows of a third of the questions are for testing."""
    tested = [int(row["document"].split()[-1]) % 3 == 2 for row in rows]
    save_rows(folder / "train_qa.jsonl", [row for row, test in zip(rows, tested) if not test])
    save_rows(folder / "test_qa_complete.jsonl", [row for row, test in zip(rows, tested) if test])
    learnt = [event for event in events if not tested[event["row"]]]
    save_events(folder / f"{chats}_finetuning_events.jsonl", learnt)
    models = {"teacher": "gpt-4", "question-writer": "people", "answerer": "several models"}
    write_text(folder / "models.json", json.dumps(models))


SNAPSHOTS = {"llmbar": _llmbar, "prometheus": _prometheus}
