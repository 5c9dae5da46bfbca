"""What is committed: the bundled snapshot, the notebooks, the README."""

import ast
import collections
import json
import os
import re
import subprocess
import sys

import nbformat
import pytest
from conftest import ROOT

from helpers import (
    CallLog,
    check_events,
    compare_designs,
    correctness_report,
    load_rows,
    pairwise_report,
    read_score,
    resolve_pairwise_events,
    with_intervals,
)
from helpers.judge import resolve_orders
from helpers.rows import DATA
from helpers.settings import SETTINGS

CORRECTNESS, PAIRWISE, SINGLE = FOLDERS = (
    DATA / "correctness",
    DATA / "pairwise",
    DATA / "single_grading",
)
GENERATORS = "old-index old-paragraph cut-off extractive sentences small closed-book".split()
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
LEARNT = ["best_feature", "who_answered"]
PAIR_JUDGES = ["fine_tuned", "base", "longer", "shorter", "overlap", "first", *LEARNT]
JUDGES = ["teacher_again", "fine_tuned", "base", "overlap", "longer", "constant", *LEARNT]
GRADERS = ["fine_tuned", "base", "overlap", "longer", "constant", *LEARNT]


@pytest.fixture(scope="module", params=FOLDERS, ids=lambda folder: folder.name)
def folder(request):
    return request.param


@pytest.fixture(scope="module")
def calls(folder):
    return list(CallLog(folder / "calls.jsonl", "replay").rows())


@pytest.fixture(scope="module")
def graded():
    """All single-grading rows: training, then test with every judge's grade."""
    return load_rows(SINGLE / "train_qa.jsonl"), load_rows(SINGLE / "test_qa_complete.jsonl")


@pytest.fixture(scope="module")
def pairs():
    """All pairwise rows: training, then test with every judge's verdict."""
    return load_rows(PAIRWISE / "train_qa.jsonl"), load_rows(PAIRWISE / "test_qa_complete.jsonl")


@pytest.fixture(scope="module")
def judged():
    """All correctness rows: training, then test with every judge's verdict."""
    return load_rows(CORRECTNESS / "train_qa.jsonl"), load_rows(
        CORRECTNESS / "test_qa_complete.jsonl"
    )


def test_there_is_enough_of_it(judged):
    train, test = judged
    assert (
        len(train) >= 79 and len(test) >= 44 and len(train) == int(0.65 * (len(train) + len(test)))
    )
    assert len({row["question"] for part in judged for row in part}) == len(train) + len(test)


def test_every_call_has_its_provenance(folder, calls):
    roles = {f"stand-in-{role}" for role in ("question-writer", "teacher", "answerer")}
    assert {call["model"] for call in calls} == {*roles, "SmolLM2-135M-Instruct"}
    assert all(call["response"].strip() for call in calls)
    for call in calls:
        capped = "max_tokens" in call["params"]
        assert call["finish_reason"] in (("stop", "length") if capped else ("stop",))
        assert call["model"] == "SmolLM2-135M-Instruct" or call["batch"]
    assert not any(
        re.search(r"gpt-?4|gpt-?3|llama-?2|mistral", json.dumps(call), re.I) for call in calls
    )


def responses(folder) -> dict[str, set]:
    said = collections.defaultdict(set)
    for call in CallLog(folder / "calls.jsonl", "replay").rows():
        said[call["model"]].add(call["response"])
    return said


def answered(said, generator) -> set:
    """The replies of a generator's model."""
    return said["SmolLM2-135M-Instruct" if generator == "small" else "stand-in-answerer"]


def test_every_correctness_row_comes_from_the_log(judged):
    said = responses(CORRECTNESS)
    for row in judged[0] + judged[1]:
        if row["response_data"]["model"] != "extractive":
            assert row["response_data"]["text"] in answered(said, row["response_data"]["model"])
        assert row["reference"] in said["stand-in-question-writer"]
        for evaluation in row["evaluations"]:
            if evaluation["llm"].startswith("teacher"):
                assert evaluation["text"] in said["stand-in-teacher"]
                assert evaluation["score"] == read_score(evaluation["text"])[0]


def test_every_pair_comes_from_the_log(pairs):
    said = responses(PAIRWISE)
    for row in pairs[0] + pairs[1]:
        assert all(answer["text"] in answered(said, answer["model"]) for answer in row["answers"])
        teacher = row["evaluations"][0]
        assert teacher["llm"] == "teacher" and teacher["text"] in said["stand-in-teacher"]
        assert (teacher["score"], teacher["source"]) == resolve_orders(*teacher["verdicts"])


def test_every_grade_comes_from_the_log(graded):
    said = responses(SINGLE)
    for row in graded[0] + graded[1]:
        if row["response_data"]["model"] != "extractive":
            assert row["response_data"]["text"] in answered(said, row["response_data"]["model"])
        teacher = row["evaluations"][0]
        assert (
            teacher["llm"] == "teacher"
            and teacher["text"] in said["stand-in-teacher"]
            and len(teacher["samples"]) == 3
        )
        assert (
            teacher["score"]
            == sorted(teacher["samples"])[1]
            == read_score(teacher["text"], 0, 1)[0]
        )
        assert teacher["acceptable"] == (teacher["score"] > 0.8)


def test_every_generator_answers_and_no_question_is_on_both_sides(judged, graded):
    questions = [{row["question"] for row in part} for part in graded]
    assert not questions[0] & questions[1]
    for parts, generators in ((judged, GENERATORS), (graded, GENERATORS[:-1])):
        models = collections.Counter(row["response_data"]["model"] for row in sum(parts, []))
        assert set(models) == set(generators) and min(models.values()) >= 8


def test_the_single_grading_stage_files_agree_with_each_other(graded):
    train, test = graded
    chats = check_events(SINGLE / "single_grading_finetuning_events.jsonl")
    assert len(chats) == 3 * len(train)
    for number, row in enumerate(train):
        three = chats[3 * number : 3 * number + 3]
        assert all(row["response_data"]["text"] in chat["messages"][1]["content"] for chat in three)
        assert sorted(
            read_score(chat["messages"][2]["content"], 0, 1)[0] for chat in three
        ) == sorted(row["evaluations"][0]["samples"])
    assert load_rows(SINGLE / "test_qa.jsonl") == [
        {**row, "evaluations": row["evaluations"][:1]} for row in test
    ]
    assert [evaluation["llm"] for evaluation in test[0]["evaluations"]] == ["teacher", *GRADERS]


def test_there_are_pairs_enough_and_no_document_on_both_sides(pairs):
    train, test = pairs
    assert not {row["document"] for row in train} & {row["document"] for row in test}
    decided = collections.Counter(tuple(row["evaluations"][0]["verdicts"]) for row in train + test)
    del decided["C", "C"]
    assert decided["A", "B"] >= 0.2 * decided.total() <= 5 * decided["B", "A"], (
        "one place wins nearly always"
    )


def test_the_pairwise_stage_files_agree_with_each_other(pairs):
    train, test = pairs
    chats = load_rows(PAIRWISE / "pairwise_finetuning_events.jsonl")
    assert len(chats) == 2 * len(train)
    assert check_events(
        PAIRWISE / "resolved_pairwise_finetuning_events.jsonl"
    ) == resolve_pairwise_events(chats, train)
    assert load_rows(PAIRWISE / "test_qa.jsonl") == [
        {**row, "evaluations": row["evaluations"][:1]} for row in test
    ]


def test_responses_are_not_cut_from_one_cloth(calls):
    """Whole responses and sentences of the teacher's reasoning hardly ever recur."""
    longer = [
        call["response"] for call in calls if len(call["response"]) > 60 and call["sample"] == 0
    ]
    assert len(set(longer)) >= 0.98 * len(longer)
    reasons = [
        re.sub(r"^[\d.]+\n|\n+.*\[\[.\]\].*$", "", call["response"])
        for call in calls
        if call["model"] == "stand-in-teacher" and call["sample"] == 0
    ]
    sentences = [
        sentence for reason in reasons for sentence in re.split(r"(?<=[.!?])\s+", reason.strip())
    ]
    sentences = [
        sentence for sentence in sentences if len(sentence.split()) > 6
    ]  # "Assistant B is better." is anyone's
    assert len(set(sentences)) >= 0.98 * len(sentences)
    openings = collections.Counter(" ".join(reason.split()[:5]) for reason in reasons)
    assert openings.most_common(1)[0][1] <= 0.1 * len(reasons), openings.most_common(3)


def test_the_stage_files_agree_with_each_other(judged):
    train, test = judged
    qrd = json.loads((CORRECTNESS / "qrd.json").read_text(encoding="utf-8"))
    assert list(qrd["queries"].values()) == [row["question"] for row in train + test]
    assert qrd["responses"] == {
        number: row["reference"] for number, row in zip(qrd["queries"], train + test)
    }
    events = check_events(CORRECTNESS / "correction_finetuning_events.jsonl")
    assert [event["messages"][2]["content"] for event in events] == [
        row["evaluations"][0]["text"] for row in train
    ]
    assert all(
        row["question"] in event["messages"][1]["content"] for row, event in zip(train, events)
    )
    short = load_rows(CORRECTNESS / "test_qa.jsonl")
    assert short == [{**row, "evaluations": row["evaluations"][:1]} for row in test]
    assert [evaluation["llm"] for evaluation in test[0]["evaluations"]] == ["teacher", *JUDGES]


def quoted(judge: str, section: str) -> list[str]:
    """The cells of a judge's line in one of the README's tables."""
    text = (ROOT / "README.md").read_text(encoding="utf-8").split(f"<!-- {section} -->")[1]
    line = next(
        line for line in text.splitlines() if line.startswith((f"| `{judge}` |", f"| {judge} |"))
    )
    return [cell.strip() for cell in line.split("|")[2:-1]]


@pytest.mark.slow
def test_readme_quotes_what_is_computed(judged):
    for what, line in compare_designs(DATA).iterrows():
        assert quoted(what, "designs") == line.tolist()
    metrics = ("correlation", "kappa", "mae")
    table = with_intervals(correctness_report(judged[1], "teacher", JUDGES), metrics)
    for judge, line in table.iterrows():
        assert quoted(judge, "correctness") == line[list(metrics)].tolist()
    published = load_rows(PAIRWISE / "published_verdicts.jsonl")
    for flipped, shown in (("as_published", "as published"), ("corrected", "turned right")):
        report = pairwise_report(published, "gpt_4", ["ft_gpt_3p5", "gpt_3p5"], flipped=flipped)
        cells = [
            f"{line.agreements} of {line.compared}, {line.agreements} of 60"
            for line in report.itertuples()
        ]
        assert quoted(shown, "published") == cells


def test_readme_lists_every_setting():
    listed = (
        (ROOT / "README.md")
        .read_text(encoding="utf-8")
        .split("<!-- settings -->")[1]
        .split("\n\n")[1]
        .splitlines()[2:]
    )
    assert listed == [
        f"| `{name}` | {f'`{default}`' if default else '–'} | {says} |"
        for name, (default, says) in SETTINGS.items()
    ]


def test_the_data_card_counts_right(judged, pairs, graded):
    card = (ROOT / "data" / "README.md").read_text(encoding="utf-8")
    counts = [
        collections.Counter(
            call["model"] for call in CallLog(folder / "calls.jsonl", "replay").rows()
        )
        for folder in FOLDERS
    ]
    for model in set().union(*counts):
        assert f"| `{model}` | " + " | ".join(str(count[model]) for count in counts) + " |" in card
    for parts in (judged, pairs, graded):
        assert f"{len(parts[0])} train and {len(parts[1])} test" in card


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_is_fit_to_be_compared(path):
    """nbval checks none of this, and passes in vain without it."""
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1))
    assert notebook.metadata.kernelspec.name == "python3"
    for cell in code:
        assert not any(
            output.output_type == "error" or output.get("name") == "stderr"
            for output in cell.outputs
        ), cell.source
        assert not re.search(r"^\s*[!%]", cell.source, re.M) and not cell.source.rstrip().endswith(
            ";"
        )
        lines = cell.source.splitlines()
        assert len([line for line in lines if line.strip()]) <= 22 and max(map(len, lines)) <= 95, (
            cell.source
        )
    assert not re.search(r"/(root|home|tmp|Users)/", path.read_text(encoding="utf-8"))


def test_a_notebook_that_is_not_there_is_said(monkeypatch, capsys):
    from helpers import __main__ as command

    ran = []
    monkeypatch.setattr(command, "run", lambda names, in_place: ran.append(names))
    for given in ([], ["02_pairwise.ipynb"]):
        monkeypatch.setattr(sys, "argv", ["helpers", "run", *given])
        command.main()
    assert ran == [[path.stem for path in NOTEBOOKS], ["02_pairwise"]]
    monkeypatch.setattr(sys, "argv", ["helpers", "run", "Untitled"])
    with pytest.raises(SystemExit):
        command.main()
    assert "no notebook 'Untitled'; there are 01_correctness" in capsys.readouterr().err


def test_importing_the_helpers_is_cheap_and_quiet_and_leaves_pandas_as_it_is():
    program = """
import logging, sys
import pandas as pd
width = pd.get_option("display.width")
import helpers
heavy = {"torch", "sklearn", "scipy", "matplotlib", "openai", "llama_index.finetuning",
         "sentence_transformers", "transformers"}
print(sorted(heavy & set(sys.modules)), logging.getLogger().handlers)
print(pd.get_option("display.width") == width)
"""
    env = {**os.environ, "PYTHONPATH": str(ROOT / "notebooks")}
    run = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, encoding="utf-8", env=env
    )
    assert run.stdout.split("\n") == ["[] []", "True", ""] and not run.stderr


LESSON = """settings rows wordings replies log embeddings generate judge student pairs finetune
metrics grade_metrics pair_metrics baselines people report""".split()
LIVE = "budget models check collect documents embeddings finetuning published".split()
HELPERS = ROOT / "notebooks" / "helpers"


def imports_of(path):
    """(level, module) of each import from the package in a file, indented ones included."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.level:
            names = [node.module] if node.module else [alias.name for alias in node.names]
            yield from ((node.level, name.split(".")[0]) for name in names)
        elif isinstance(node, ast.ImportFrom | ast.Import):
            name = getattr(node, "module", None) or node.names[0].name
            assert not name.startswith("helpers"), f"{path.name}: import {name} relatively"


def test_imports_point_back_up_the_list_and_the_lesson_never_imports_live():
    assert {path.stem for path in HELPERS.glob("*.py")} == {*LESSON, "__init__", "__main__"}
    assert {path.stem for path in (HELPERS / "live").glob("*.py")} == {*LIVE, "__init__"}
    for place, name in enumerate(LESSON):
        for level, module in imports_of(HELPERS / f"{name}.py"):
            assert level == 1 and module in LESSON[:place], f"{name} imports {module}"
    for place, name in enumerate(LIVE):
        for level, module in imports_of(HELPERS / "live" / f"{name}.py"):
            known = LESSON if level == 2 else LIVE[:place]
            assert module in known, f"live/{name} imports {module}"


def test_imports_that_are_indented_are_seen(tmp_path):
    (tmp_path / "a.py").write_text(
        "def f():\n    if 1:\n        from .live.models import live\n", encoding="utf-8"
    )
    assert list(imports_of(tmp_path / "a.py")) == [(1, "live")]


def test_the_pins_are_in_the_lock():
    lock = set((ROOT / "requirements.lock").read_text(encoding="utf-8").splitlines())
    pins = re.findall(r"^(\S+==\S+)", (ROOT / "requirements.txt").read_text(encoding="utf-8"), re.M)
    assert len(pins) > 15 and not [pin for pin in pins if pin not in lock]


@pytest.mark.slow
def test_a_kernel_that_dies_is_said_in_a_line(tmp_path, monkeypatch, capsys):
    from helpers import __main__ as command

    cell = nbformat.v4.new_code_cell("import os\nos._exit(1)")
    notebook = nbformat.v4.new_notebook(cells=[cell])
    nbformat.write(notebook, tmp_path / "01_correctness.ipynb")
    monkeypatch.setattr(command, "NOTEBOOKS", tmp_path)
    monkeypatch.setattr(command, "output_folder", lambda name: tmp_path)
    assert command.run(["01_correctness"]) == 1
    assert "01_correctness.ipynb: stopped: its kernel died" in capsys.readouterr().err
