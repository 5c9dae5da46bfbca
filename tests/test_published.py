"""Real verdicts from public repositories: their download, and the snapshots made of them."""

import asyncio
import hashlib
import json
import os
import re
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import product

import numpy as np
import pytest
from llama_index.core.evaluation import CorrectnessEvaluator, PairwiseComparisonEvaluator

from helpers import (
    LocalFinetuneEngine,
    SingleGradingEvaluator,
    correctness_report,
    grading_report,
    judge_rows,
    length_report,
    load_rows,
    pair_scores,
    pairwise_report,
    position_report,
    resolve_pairwise_events,
    save_events,
    untrained_judges,
    untrained_pair_judges,
)
from helpers.__main__ import main
from helpers.live import published
from helpers.pair_metrics import answer_lengths
from helpers.rows import DATA

LISTED = published.SUMS.read_text(encoding="utf-8")
NAMES = [line.split("published/")[1] for line in LISTED.splitlines() if " published/" in line]
TEXTS = {name: f"{name}\n".encode() * 1000 for name in NAMES[:3]}
VICUNA, MT_BENCH = (f"eval/benchmark/data/{name}_eval.json" for name in ("vicuna", "mt_bench"))
NATURAL = "Dataset/LLMBar/Natural/evaluators/GPT-4/CoT/result.json"
PEOPLE = "Dataset/Processed/MT-Bench/evaluators/GPT-4/Vanilla_NoRules/result.json"


@pytest.fixture
def mirror(tmp_path, monkeypatch):
    """A function that lays out a set's files and their checksums, and points to them."""

    def lay_out(name: str, texts: dict[str, bytes]):
        sums = ""
        for file, text in texts.items():
            path = tmp_path / "mirror" / file
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(text)
            sums += f"{hashlib.sha256(text).hexdigest()}  {name}/{file}\n"
        (tmp_path / "sums").write_text(sums, encoding="utf-8")
        monkeypatch.setattr(published, "SUMS", tmp_path / "sums")
        monkeypatch.setattr(published, "FOLDER", tmp_path / "new")
        monkeypatch.setenv("PUBLISHED_URL", (tmp_path / "mirror").as_uri())
        return tmp_path / "mirror"

    return lay_out


@pytest.fixture
def base(mirror):
    return mirror("published", TEXTS)


def left_behind(folder) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def test_all_files_come_and_a_second_run_fetches_nothing(base, tmp_path, monkeypatch):
    assert published.download() == []
    assert left_behind(tmp_path / "new" / "published") == sorted(TEXTS)
    monkeypatch.setenv("PUBLISHED_URL", "file:///nowhere")
    assert published.download() == []


def test_a_wrong_checksum_and_a_missing_file_leave_nothing_and_stop_nothing(base, tmp_path):
    first, second, third = TEXTS
    (base / first).write_bytes(b"something else")
    (base / second).unlink()
    wrong = published.download()
    assert left_behind(tmp_path / "new" / "published") == [third]
    assert len(wrong) == 2 and first in wrong[0] and second in wrong[1]
    for text in (b"something else", TEXTS[first]):  # the checksum found and the one expected
        assert hashlib.sha256(text).hexdigest() in wrong[0]
    (base / first).write_bytes(TEXTS[first])
    (base / second).write_bytes(TEXTS[second])
    assert published.download() == []
    assert left_behind(tmp_path / "new" / "published") == sorted(TEXTS)


def test_a_file_that_was_changed_is_said_and_left(base, tmp_path):
    published.download()
    changed = tmp_path / "new" / "published" / list(TEXTS)[0]
    changed.write_text("mine", encoding="utf-8")
    assert "remove it to fetch it anew" in published.download()[0]
    assert changed.read_text(encoding="utf-8") == "mine"


@pytest.mark.parametrize(
    "fault, said", [("404", "404"), ("cut", "after|IncompleteRead"), ("ok", None)]
)
def test_over_http(base, tmp_path, monkeypatch, fault, said):
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            text = TEXTS[self.path.lstrip("/")]
            self.send_response(404 if fault == "404" else 200)
            self.send_header("Content-Length", str(len(text)))
            self.end_headers()
            self.wfile.write(text[:100] if fault == "cut" else text)

        def log_message(self, *args):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        monkeypatch.setenv("PUBLISHED_URL", f"http://127.0.0.1:{server.server_port}")
        wrong = published.download()
    finally:
        server.shutdown()
        server.server_close()
    if said:
        assert len(wrong) == 3 and all(re.search(said, line) for line in wrong)
        assert left_behind(tmp_path / "new") == []
    else:
        assert wrong == [] and left_behind(tmp_path / "new" / "published") == sorted(TEXTS)


def test_a_folder_that_cannot_be_written_is_an_error(base, tmp_path):
    file, text = tmp_path / "new", "a file where the folder should be"
    file.write_text(text, encoding="utf-8")
    assert len(published.download()) == 3 and file.read_text(encoding="utf-8") == text


def test_the_list_is_of_fifteen_files_of_three_commits():
    lines = re.findall(r"^[0-9a-f]{64}  (\w+)/\S+$", LISTED, re.M)
    assert {name: lines.count(name) for name in published.SETS} == {
        "published": 7,
        "llmbar": 6,
        "prometheus": 2,
    }
    assert len(lines) == len(LISTED.splitlines()) == 15
    assert all(re.search(r"/[0-9a-f]{40}(/|$)", url) for url in published.SETS.values())
    assert os.path.isabs(published.FOLDER)


def test_the_command_knows_its_sets_and_fails_where_a_file_is_missing(
    base, tmp_path, monkeypatch, capsys
):
    def run(*given):
        monkeypatch.setattr(sys, "argv", ["helpers", "published", *given])
        return main()

    assert (
        run() == 0 and "SNAPSHOT=published make run NOTEBOOK=02_pairwise" in capsys.readouterr()[0]
    )
    with pytest.raises(SystemExit, match="2"):
        run("mine")
    assert "prometheus" in capsys.readouterr()[1]
    (tmp_path / "new" / "published" / list(TEXTS)[0]).write_bytes(b"changed")
    assert run("published") == 1 and "SHA-256" in capsys.readouterr()[0]


# The snapshots

COLOURS = "Amber Blue Crimson Denim Ecru Fawn Green Hazel Ivory Jade Khaki Lilac".split()


def answers_of(questions: range) -> bytes:
    """Answers that name some of four colours, as Prometheus' files have them: a point for each."""
    answers = []
    for n, answerer in product(questions, ("first", "second")):
        named = [COLOURS[(n * k + n) % 12] for k in range(1, 5)]
        right = (n * 3 + len(answerer)) % 5
        said = [*named[:right], *(colour for colour in COLOURS if colour not in named)][:4]
        prompt = (
            "###Task Description:\nWrite a score.\n\n"
            f"###The instruction to evaluate:\nWhich colours has flag {n}?\n\n"
            f"###Response to evaluate:\nIt has {' and '.join(said)}.\n\n"
            f"###Reference Answer (Score 5):\nIt has {', '.join(named)}.\n\n"
            "###Score Rubrics:\n[Is it right?]\nScore 1: No.\n\n###Feedback: "
        )
        answers.append(
            {
                "response_source": answerer,
                "instruction": prompt,
                "gpt4_score": [right + 1, min(5, right + 1 + (n % 4 == 0)), right + 1],
                "gpt4_feedback": [f"Sample {k}: hardly a 4." for k in range(3)],
            }
        )
    return json.dumps(answers).encode()


@pytest.fixture
def scored(mirror, tmp_path):
    mirror("prometheus", {VICUNA: answers_of(range(30)), MT_BENCH: answers_of(range(29, 60))})
    return tmp_path / "new" / "prometheus"


def both_sides(folder) -> list[list[dict]]:
    return [load_rows(folder / f"{name}.jsonl") for name in ("train_qa", "test_qa_complete")]


def test_rows_with_three_scores_train_and_judge(scored):
    assert published.download("prometheus") == []
    part = scored / "correctness"
    train, test = both_sides(part)
    assert (len(train), len(test)) == (82, 40)
    assert not {row["question"] for row in train} & {row["question"] for row in test}
    asked = [row["document"] for row in train + test if "flag 29?" in row["question"]]
    assert asked == ["vicuna_eval 58"] * 4, "one question in two files is one document"
    assert train[0] == {
        "question": "Which colours has flag 0?",
        "reference": "It has Amber, Amber, Amber, Amber.",
        "response_data": {
            "model": "first",
            "text": "It has Blue and Crimson and Denim and Ecru.",
            "context": "It has Amber, Amber, Amber, Amber.",
        },
        "rubric": "[Is it right?]\nScore 1: No.",
        "document": "vicuna_eval 0",
        "evaluations": [
            {"llm": "teacher", "score": 1.0, "text": "1.00\nSample 0: hardly a 4."},
            {"llm": "teacher_again", "score": 2.0, "text": "2.00\nSample 1: hardly a 4."},
            {"llm": "teacher_third", "score": 1.0, "text": "1.00\nSample 2: hardly a 4."},
        ],
    }
    chats = part / "correction_finetuning_events.jsonl"
    assert len(load_rows(chats)) == 3 * len(train)
    engine = LocalFinetuneEngine(data_path=chats, kinds="lexical")
    engine.finetune()
    llms = {"fine_tuned": engine.get_finetuned_model()} | untrained_judges(3.0)
    del llms["base"]  # it needs the encoder
    for name, llm in llms.items():
        test = asyncio.run(judge_rows(test, CorrectnessEvaluator(llm), name=name))
    report = correctness_report(test, "teacher", ["teacher_again", *llms])
    assert (report["n"] == len(test)).all()
    assert report["mae"]["fine_tuned"] < report["mae"][["longer", "constant"]].min()
    assert report["correlation"]["teacher_again"] > 0.9


def test_the_same_rows_on_a_scale_from_0_to_1(scored):
    published.download("prometheus")
    train, test = both_sides(scored / "single_grading")
    said = [one for row in train + test for one in row["evaluations"]]
    assert {one["score"] for one in said} == {0, 0.25, 0.5, 0.75, 1}
    assert all(one["acceptable"] == (one["score"] == 1) for one in said)
    chats = scored / "single_grading" / "single_grading_finetuning_events.jsonl"
    engine = LocalFinetuneEngine(data_path=chats, scale=(0, 1), alpha=0.5, kinds="lexical")
    engine.finetune()
    student = SingleGradingEvaluator(engine.get_finetuned_model(), "Any.", logprobs=True)
    test = asyncio.run(judge_rows(test, student, name="fine_tuned"))
    report = grading_report(test, "teacher", ["teacher_again", "fine_tuned"])
    assert report["auc"]["fine_tuned"] > 0.6 and (report["n"] == len(test)).all()


def test_a_changed_file_leaves_the_snapshot_and_a_missing_one_is_left_out(scored, tmp_path):
    assert published.download("prometheus") == []
    rows = scored / "correctness" / "train_qa.jsonl"
    whole = rows.read_bytes()
    (scored / VICUNA).unlink()
    (tmp_path / "mirror" / VICUNA).write_bytes(b"[]")
    [wrong] = published.download("prometheus")
    assert VICUNA in wrong and rows.read_bytes() == whole and not (scored / VICUNA).exists()
    (tmp_path / "mirror" / VICUNA).unlink()
    wrong, made = published.download("prometheus")
    assert VICUNA in wrong and "is made without the files above" in made
    assert {row["document"].split()[0] for row in load_rows(rows)} == {"mt_bench_eval"}


def pairs_of(questions: range) -> bytes:
    """Pairs as LLMBar's files have them. GPT-4 takes the longer answer, people the one with "yes".

    At each seventh, GPT-4 takes the answer that it sees first.
    """
    pairs = []
    for n in questions:
        outputs = ["word " * (5 + n * 7 % 11) + "yes.", "word " * (3 + n * 5 % 13) + "no."]
        if n % 2:
            outputs.reverse()
        longer = "1" if len(outputs[0].split()) >= len(outputs[1].split()) else "2"
        winners = ("1", "2") if n % 7 == 0 else (longer, longer)
        said = {
            f"swap = {swap}": {"completion": [f"Reason {n} {swap}.", "stop"], "winner": winner}
            for swap, winner in zip((False, True), winners)
        }
        texts = {"input": f"Question {n}?", "output_1": outputs[0], "output_2": outputs[1]}
        pairs.append({**texts, "label": 1 + n % 2, "results": [{}, said]})
    return json.dumps(pairs).encode()


@pytest.fixture
def compared(mirror, tmp_path, monkeypatch):
    # In the encoder's place:
    monkeypatch.setattr("helpers.pairs.embed", lambda texts: np.ones((len(texts), 2)) / 2**0.5)
    mirror("llmbar", {NATURAL: pairs_of(range(60)), PEOPLE: pairs_of(range(59, 90))})
    assert published.download("llmbar") == []
    return tmp_path / "new" / "llmbar" / "pairwise"


def test_pairs_train_and_judge_beside_people(compared, tmp_path):
    train, test = both_sides(compared)
    assert not {row["question"] for row in train} & {row["question"] for row in test}
    rows = train + test
    assert len(rows) == 91 and train[0]["evaluations"] == [
        {"llm": "gpt_4", "score": 0.5, "text": "Reason 0 False.\n\nFinal Verdict: [[A]]"}
        | {"source": "neither", "verdicts": ["A", "A"], "winner": None},
        {"llm": "people", "score": 1.0, "source": "original", "winner": 0},
    ]
    scores, people = (pair_scores(rows, judge)[0] for judge in ("gpt_4", "people"))
    for row, score, label in zip(rows, scores, people):
        n = int(re.search(r"\d+", row["question"])[0])
        first, second = answer_lengths(row)
        assert np.isnan(score) if n % 7 == 0 else score == (first >= second)
        assert label == row["answers"][0]["text"].endswith("yes.")
    chats = load_rows(compared / "pairwise_finetuning_events.jsonl")
    assert len(chats) == 2 * len(train)
    assert chats[1]["messages"][2]["content"] == "Reason 0 True.\n\nFinal Verdict: [[A]]"
    save_events(tmp_path / "resolved.jsonl", resolve_pairwise_events(chats, train))
    engine = LocalFinetuneEngine(data_path=tmp_path / "resolved.jsonl", kinds="length")
    engine.finetune()
    assert engine.get_current_job().features == "length"
    llms = {"fine_tuned": engine.get_finetuned_model()} | untrained_pair_judges()
    for name, llm in llms.items():
        test = asyncio.run(judge_rows(test, PairwiseComparisonEvaluator(llm), name=name))
    report = pairwise_report(test, "gpt_4", ["people", *llms])
    assert report["agreement_overall"]["fine_tuned"] > 0.9 > report["agreement_overall"]["people"]
    assert pairwise_report(test, "people", ["gpt_4"])["inconclusive"]["gpt_4"] == 4


def test_the_figures_hold_no_text(compared):
    rows = load_rows(compared / "llmbar_verdicts.jsonl")
    assert len(rows) == 91 and rows[0]["subset"] == "Natural" and rows[-1]["set"] == "MT-Bench"
    assert rows[60]["document"] == "Natural 59", "this question was asked before"
    bundled = load_rows(DATA / "pairwise" / "llmbar_verdicts.jsonl")
    assert [*rows[0]] == [*bundled[0]]
    names = "set subset item document words evaluations llm score source verdicts A B LLMBar gpt_4"
    names += " people original flipped neither winner"
    subsets = "MT-Bench|Natural|Neighbor|GPTInst|GPTOut|Manual"
    for said in re.findall(r'"([^"]*)"', json.dumps(rows + bundled)):
        assert said in names.split() or re.fullmatch(rf"({subsets})( \d+)?", said)


@pytest.mark.parametrize(
    "part, pairs, contradicted, right, longer, equal",
    [("LLMBar", 419, 45, 318, 109, 18), ("MT-Bench", 200, 26, 149, 134, 5)],
)
def test_the_bundled_verdicts_give_the_figures_of_their_source(
    part, pairs, contradicted, right, longer, equal
):
    rows = load_rows(DATA / "pairwise" / "llmbar_verdicts.jsonl")
    rows = [row for row in rows if row["set"] == part]
    report = pairwise_report(rows, "people", ["gpt_4"]).loc["gpt_4"]
    assert [len(rows), report["inconclusive"], report["agreements"]] == [pairs, contradicted, right]
    consistency = position_report(rows, ["gpt_4"])["consistency"]["gpt_4"]
    assert round(pairs * (1 - consistency)) == contradicted
    wins = length_report(rows, ["people"]).loc["people"]
    assert wins["with_winner"] == pairs - equal
    assert round(wins["longer_wins"] * wins["with_winner"]) == longer
    lengths = np.array([answer_lengths(row) for row in rows])
    assert (
        np.sign(lengths[:, 0] - lengths[:, 1]) == 2 * pair_scores(rows, "people")[0] - 1
    ).sum() == longer
