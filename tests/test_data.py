"""What the bundled data are like: the figures that the data card gives, held to their limits."""

import collections
import re

import numpy as np
import pytest

from helpers import CallLog, load_rows, pair_scores
from helpers.judge import SCORES
from helpers.pair_metrics import answer_lengths
from helpers.replies import read_score, read_verdict
from helpers.rows import DATA

FOLDERS = ("correctness", "pairwise", "single_grading")
CARD = (DATA / "README.md").read_text(encoding="utf-8")


def rows_of(name):
    return [
        row
        for file in ("train_qa", "test_qa_complete")
        for row in load_rows(DATA / name / f"{file}.jsonl")
    ]


@pytest.fixture(scope="module")
def rows():
    return {name: rows_of(name) for name in FOLDERS}


def grouped(rows):
    """{generator: the teacher's scores}."""
    scores = collections.defaultdict(list)
    for row in rows:
        scores[row["response_data"]["model"]].append(row["evaluations"][0]["score"])
    return scores


def explained(rows) -> float:
    """The share of the variance of the teacher's scores that lies between the generators."""
    scores = grouped(rows)
    every = np.concatenate([*scores.values()])
    between = sum(len(one) * (np.mean(one) - every.mean()) ** 2 for one in scores.values())
    return between / len(every) / every.var()


def answers(rows):
    """All answers, and those that a language model wrote with the prompt that it was sent."""
    return [
        answer
        for row in rows
        for answer in ([row["response_data"]] if "response_data" in row else row["answers"])
    ]


def lengths(rows):
    return np.array([len(answer["text"].split()) for answer in answers(rows)])


def cut_off(name, rows) -> float:
    """The share of the answers that were cut off at their cap."""
    log = CallLog(DATA / name / "calls.jsonl", "replay")
    cut = {call["response"] for call in log.rows() if call["finish_reason"] == "length"}
    return float(np.mean([answer["text"] in cut for answer in answers(rows)]))


def figures(rows) -> dict[str, str]:
    """The lines of the card's table of figures: {what: the figures as text}."""
    said = {}
    for name in ("correctness", "single_grading"):
        teacher = [row["evaluations"][0] for row in rows[name]]
        scores = np.array([one["score"] for one in teacher])
        said[f"{name}: variance of the scores between generators"] = f"{explained(rows[name]):.0%}"
        top, count = collections.Counter(scores.tolist()).most_common(1)[0]
        said[f"{name}: the most frequent score"] = f"{top} on {count / len(scores):.0%}"
        if name == "correctness":
            said["correctness: below 4"] = f"{np.mean(scores < 4):.0%}"
            pairs = [
                [one["score"] for one in row["evaluations"] if one["llm"].startswith("teacher")]
                for row in rows[name]
            ]
            once, again = np.array([pair for pair in pairs if len(pair) == 2]).T
            said["correctness: the teacher's second judgement"] = (
                f"r = {np.corrcoef(once, again)[0, 1]:.2f}, equal on {np.mean(once == again):.0%}"
            )
        else:
            said["single_grading: acceptable"] = f"{np.mean(scores > 0.8):.0%}"
            same = np.mean([len(set(one["samples"])) == 1 for one in teacher])
            said["single_grading: all three samples equal"] = f"{same:.0%}"
    for name in FOLDERS:
        words = lengths(rows[name])
        quartiles = " / ".join(f"{q:g}" for q in np.quantile(words, [0.25, 0.5, 0.75]))
        between = np.mean((words >= 60) & (words <= 120))
        said[f"{name}: words of an answer, quartiles"] = quartiles
        said[f"{name}: answers of 60 to 120 words"] = f"{between:.0%}"
        said[f"{name}: answers cut off"] = f"{cut_off(name, rows[name]):.0%}"
    pairs = rows["pairwise"]
    scores, n = pair_scores(pairs, "teacher")[0], len(pairs)
    verdicts = [row["evaluations"][0]["verdicts"] for row in pairs]
    turned = np.array([SCORES[one] + SCORES[other] != 1 for one, other in verdicts])
    said["pairwise: ties"] = f"{(scores == 0.5).sum()} of {n}"
    said["pairwise: no verdict (the orders contradict each other)"] = (
        f"{np.isnan(scores).sum()} of {n}"
    )
    said["pairwise: the order changes the verdict"] = f"{turned.sum()} of {n}"
    said["pairwise: the two answers are identical"] = (
        f"{sum(a['text'] == b['text'] for a, b in (row['answers'] for row in pairs))} of {n}"
    )
    longer = np.array([np.sign(a - b) for a, b in map(answer_lengths, pairs)])
    won = np.sign(np.nan_to_num(scores - 0.5)) * (longer != 0)
    said["pairwise: the longer answer wins"] = (
        f"{(won == longer)[won != 0].sum()} of {(won != 0).sum()}"
    )
    return said


def percent(text: str) -> float:
    return float(re.search(r"([\d.]+)%", text)[1]) / 100


def test_the_data_are_as_real_as_they_are_said_to_be(rows):
    said = figures(rows)
    print("\n".join(f"{what}: {figure}" for what, figure in said.items()))
    assert len(rows["correctness"]) >= 150 and len(rows["pairwise"]) >= 140
    assert len(rows["single_grading"]) >= 180
    assert all(len(row["evaluations"][0]["samples"]) == 3 for row in rows["single_grading"])
    for name in ("correctness", "single_grading"):
        assert percent(said[f"{name}: variance of the scores between generators"]) <= 0.35
        assert percent(said[f"{name}: the most frequent score"]) <= 0.40
    assert percent(said["correctness: below 4"]) >= 0.25
    assert 0.25 <= 1 - percent(said["single_grading: acceptable"])
    every = np.concatenate([lengths(rows[name]) for name in FOLDERS])
    assert np.mean((every >= 60) & (every <= 120)) >= 0.1
    for name in FOLDERS:
        assert 0.05 <= percent(said[f"{name}: answers cut off"]) <= 0.2, name


def test_the_card_gives_these_figures(rows):
    for what, figure in figures(rows).items():
        assert f"| {what} | {figure} |" in CARD, (what, figure)


def test_both_answers_of_a_pair_come_from_one_generator(rows):
    assert all(len({answer["model"] for answer in row["answers"]}) == 1 for row in rows["pairwise"])


def test_no_row_is_judged_against_a_text_that_its_answerer_did_not_see(rows):
    """The context is, whole and in order, in the prompt of the call that gave the answer."""
    for name in FOLDERS:
        asked = collections.defaultdict(list)
        for call in CallLog(DATA / name / "calls.jsonl", "replay").rows():
            prompt = call["messages"][-1]["content"]
            asked[call["response"]].append(re.sub(r"^title: .*\n\s*", "", prompt, flags=re.M))
        for row in rows[name]:
            shown = row.get("source", row.get("response_data", {}).get("context"))
            for answer in [row["response_data"]] if "response_data" in row else row["answers"]:
                if answer["model"] == "extractive":
                    assert answer["text"][:40] in shown
                elif answer["model"] != "closed-book":
                    context = re.sub(r"\s+", " ", shown)
                    prompts = [re.sub(r"\s+", " ", one) for one in asked[answer["text"]]]
                    assert any(context in one and row["question"] in one for one in prompts)
                else:
                    assert shown == ""


def test_a_winner_is_an_answer_of_its_row(rows):
    for row in rows["pairwise"]:
        for said, score in zip(
            row["evaluations"], [pair_scores([row], one["llm"])[0][0] for one in row["evaluations"]]
        ):
            assert said["winner"] == {1.0: 0, 0.0: 1}.get(score)


def test_batches_hold_both_sides_and_the_orders_of_a_pair_lie_in_different_ones(rows):
    for name in FOLDERS:
        train = {row["question"] for row in load_rows(DATA / name / "train_qa.jsonl")}
        batches, texts = collections.defaultdict(list), collections.defaultdict(list)
        for call in CallLog(DATA / name / "calls.jsonl", "replay").rows():
            if call["model"] == "stand-in-teacher":
                prompt = call["messages"][-1]["content"]
                question = next(one["question"] for one in rows[name] if one["question"] in prompt)
                batches[call["batch"]].append(question in train)
                answer = re.split(r"## Generated Answer|Assistant [AB]’s Answer\]", prompt)
                key = (question, *sorted(part for part in answer[1:]))
                texts[key].append(call["batch"])
        assert all(len(batch) <= 30 and 0 < sum(batch) < len(batch) for batch in batches.values())
        assert all(len(set(given)) == len(given) for given in texts.values())


def moves() -> dict[str, list]:
    """{notebook: for each anchor, what the batches said of it}."""
    said = collections.defaultdict(lambda: collections.defaultdict(list))
    for row in load_rows(DATA / "anchors.jsonl"):
        read = {"correctness": lambda text: read_score(text, 1, 5)[0], "pairwise": None}.get(
            row["notebook"], lambda text: read_score(text, 0, 1)[0]
        )
        verdict = read(row["response"]) if read else read_verdict(row["response"])[0]
        said[row["notebook"]][row["key"]].append(verdict)
    return {name: list(anchors.values()) for name, anchors in said.items()}


def test_the_card_says_how_far_the_anchors_moved():
    said = moves()
    gaps = np.concatenate([np.abs(np.subtract(one, np.mean(one))) for one in said["correctness"]])
    most = max(np.ptp(one) for one in said["correctness"])
    assert f"on average {gaps.mean():.2f} points from its mean, at most {most:g} apart" in CARD
    gaps = np.concatenate(
        [np.abs(np.subtract(one, np.mean(one))) for one in said["single_grading"]]
    )
    most = max(np.ptp(one) for one in said["single_grading"])
    assert f"on average {gaps.mean():.3f} from its mean, at most {most:.1f} apart" in CARD
    same = [max(collections.Counter(one).values()) for one in said["pairwise"]]
    total = [len(one) for one in said["pairwise"]]
    assert f"the same verdict in {sum(same)} of {sum(total)} judgements" in CARD
