"""Judge: rows -> judgements. Replies are read here, and here only."""

import copy
import re

from llama_index.core.evaluation import BaseEvaluator, CorrectnessEvaluator, EvaluationResult, PairwiseComparisonEvaluator

from .calls import CallFailed, run_stage

NUMBER = r"[-+]?\d+(?:[.,]\d+)?"
LABEL = r"(?:(?:my|the|final|overall)\s+)*(?:score|rating|grade)\s*(?:is|of|[:=])+\s*"
MARKS = re.compile(r"[*_`#\[\]]")  # markdown around a score says nothing about it
SCORE_LINE = re.compile(rf"^(?:{LABEL})?({NUMBER})(?:\s*(?:/|out of)\s*({NUMBER}))?\s*[.:]?$", re.I)
SCORE_FIRST = re.compile(rf"^(?:{LABEL})?({NUMBER})(?:\s*(?:/|out of)\s*({NUMBER}))?\s*[-–—:]\s+\S", re.I)
LABELLED = re.compile(rf"\b{LABEL}({NUMBER})(?:\s*(?:/|out of)\s*({NUMBER}))?", re.I)


def read_score(reply: str, low: float = 1, high: float = 5) -> tuple[float | None, str | None]:
    """Read the score in a judge's reply.

    A score stands alone on a line ("4.5", "**4.0**", "4/5", "Score: 4"), or else opens the reply ("4 - correct"), or else
    follows a word for it ("I give a score of 4"). A fraction must be of `high`. Other numbers are not scores.

    Returns:
        (score, None), or (None, reason) where there is no score, more than one, or one outside `low` to `high`.
    """
    lines = [plain for line in reply.splitlines() if (plain := MARKS.sub("", line).strip())]
    found = [match.groups() for line in lines if (match := SCORE_LINE.match(line))]
    found = found or [match.groups() for line in lines[:1] if (match := SCORE_FIRST.match(line))]
    found = found or [match.groups() for match in LABELLED.finditer("\n".join(lines))]
    if not lines:
        return None, "empty reply"
    if not found:
        return None, "no score in the reply"
    scores = {(float(score.replace(",", ".")), float((of or str(high)).replace(",", "."))) for score, of in found}
    if len(scores) > 1:
        return None, f"more than one score in the reply: {', '.join(sorted(score for score, _ in found))}"
    [(score, of)] = scores
    if of != high:
        return None, f"score out of {of:g}, expected out of {high:g}"
    if not low <= score <= high:
        return None, f"score {score:g} is outside {low:g} to {high:g}"
    return score, None


MARKER = re.compile(r"\[\[\s*([ABC])\s*\]\]", re.I)
# What stands before a marker where it is a verdict: nothing, a label, or a sentence that it closes; but no "not" or "than".
IN_PASSING = re.compile(r"\b(?:not|n't|than|or|nor|and|over|if|against)\W*$", re.I)
LABEL_BEFORE = re.compile(r"(?:\bverdict\b[^.]{0,20}|^\W*)$", re.I)


def read_verdict(reply: str) -> tuple[str | None, str | None]:
    """Read the verdict in a pairwise judge's reply: by the last line that is one.

    Such a line holds one of [[A]], [[B]], [[C]] and no other ("[[a]]" and "[[ A ]]" count), at its end, at its beginning or
    after the word "verdict", and not in passing ("rather than [[A]]").

    Returns:
        ("A", "B" or "C", None), or (None, reason).
    """
    lines = [line for line in reply.splitlines() if MARKER.search(line)]
    for line in reversed(lines):
        marks = list(MARKER.finditer(line))
        before, after = line[: marks[-1].start()], line[marks[-1].end():]
        if len({mark[1].upper() for mark in marks}) == 1 and not IN_PASSING.search(before):
            if not re.search(r"\w", after) or LABEL_BEFORE.search(before) and not re.match(r"\W*if\b", after, re.I):
                return marks[-1][1].upper(), None
    if not reply.strip():
        return None, "empty reply"
    marked = {mark.upper() for mark in MARKER.findall(reply)}
    if not marked:
        return None, "no verdict in the reply"
    return None, "more than one verdict in the reply" if len(marked) > 1 else "a verdict only in passing"


# What the verdicts in the original and the flipped order come to: the score (1 the first answer, 0 the second) as the call of
# that order gave it, and the order that decides. In the flipped order "A" is the second answer.
SCORES = {"A": 1.0, "B": 0.0, "C": 0.5}


def resolve_orders(original: str, flipped: str) -> tuple[float, str]:
    """(score, source) of a pair's two verdicts, each "A", "B" or "C", as LlamaIndex resolves them.

    The source is "original" or "flipped" for the order whose verdict stands, or "neither" where they contradict. As in
    LlamaIndex and the published files, a score from the flipped order is left as that order gave it: 1.0 there means the
    *second* answer. `true_score` turns it right.
    """
    votes_first = SCORES[original] + 1 - SCORES[flipped]
    if votes_first == 1:
        return 0.5, "original" if original == "C" else "neither"
    winner = votes_first > 1
    if SCORES[original] == float(winner):
        return SCORES[original], "original"
    return SCORES[flipped], "flipped"


async def judge_rows(rows: list[dict], evaluator: BaseEvaluator, *, name: str, concurrency: int = 16) -> list[dict]:
    """Judge every row, and return the rows with one more evaluation each, in the same order.

    An evaluation is {"llm": name, "score", "text"}: `text` is the judge's whole reply. A reply that cannot be read, or a live
    call that failed, has the score None and the reason under "invalid". A pairwise evaluation has two keys more: "source" and
    "verdicts", those of the original and of the flipped order (see `resolve_orders`); both orders are always asked, and if
    either cannot be read the pair is invalid. An evaluation that already bears the name is replaced. The rows passed in are
    left as they are.

    Args:
        rows: correctness rows (`question`, `reference`, `response_data.text`) or pairwise rows (`question`, two `answers` with
            a `text` each, `source`).
        evaluator: a CorrectnessEvaluator or a PairwiseComparisonEvaluator. Its own parser is not used: the first's raises on a
            bare "4.5" and lets 7.5 pass, the second's reads "[[B]] because not [[A]]" as A.
        name: of the judge.
        concurrency: how many rows may be under way at once.

    Raises:
        TypeError: an evaluator of another kind.
        ValueError: a row lacks a field; the message says which row and field.
    """
    kinds = {CorrectnessEvaluator: (_check_correctness, _judge_correctness), PairwiseComparisonEvaluator: (_check_pair, _judge_pair)}
    check, judge = next((kinds[kind] for kind in kinds if isinstance(evaluator, kind)), (None, None))
    if judge is None:
        raise TypeError(f"judge_rows knows {' and '.join(kind.__name__ for kind in kinds)}, not {type(evaluator).__name__}")
    for number, row in enumerate(rows):
        check(row, number)
    evaluator = copy.copy(evaluator)
    evaluations = await run_stage(f"judge: {name}", [judge(evaluator, row, name) for row in rows], concurrency)
    return [{**row, "evaluations": [old for old in row.get("evaluations", []) if old["llm"] != name] + [new]}
            for row, new in zip(rows, evaluations)]


async def _judge_correctness(evaluator: CorrectnessEvaluator, row: dict, name: str) -> dict:
    evaluator.parser_function = lambda reply: (read_score(reply)[0], reply)
    try:
        result: EvaluationResult = await evaluator.aevaluate(
            query=row["question"], response=row["response_data"]["text"], reference=row["reference"])
    except CallFailed as error:
        return {"llm": name, "score": None, "text": None, "invalid": f"the call failed: {error}"}
    score, reason = read_score(result.feedback)
    return {"llm": name, "score": score, "text": result.feedback, **({"invalid": reason} if reason else {})}


async def _judge_pair(evaluator: PairwiseComparisonEvaluator, row: dict, name: str) -> dict:
    evaluator._enforce_consensus = False  # an order at a time: so each order's verdict is kept, and the second is always asked
    evaluator._parser_function = lambda reply: (None, 0.5, "")  # the reply comes back as it is, to be read here
    first, second = (answer["text"] for answer in row["answers"])
    replies, reasons = [], []
    for order, (one, other) in (("original", (first, second)), ("flipped", (second, first))):
        try:
            result = await evaluator.aevaluate(query=row["question"], response=one, second_response=other, reference=row["source"])
            replies.append(result.feedback)
            reasons.append(read_verdict(result.feedback)[1])
        except CallFailed as error:
            replies.append(None)
            reasons.append(f"the call failed: {error}")
    verdicts = [reply if reply is None else read_verdict(reply)[0] for reply in replies]
    if None in verdicts:
        invalid = "; ".join(f"{order}: {reason}" for order, reason in zip(("original", "flipped"), reasons) if reason)
        return {"llm": name, "score": None, "text": replies[0], "source": None, "verdicts": verdicts, "invalid": invalid}
    score, source = resolve_orders(*verdicts)
    return {"llm": name, "score": score, "text": replies[source == "flipped"], "source": source, "verdicts": verdicts}


def _check_correctness(row: dict, number: int) -> None:
    answer = row.get("response_data")
    _check_texts(number, {"question": row.get("question"), "reference": row.get("reference")},
                 {"response_data.text": answer.get("text") if isinstance(answer, dict) else None})


def _check_pair(row: dict, number: int) -> None:
    answers = row.get("answers")
    if not isinstance(answers, list) or len(answers) != 2:
        found = len(answers) if isinstance(answers, list) else repr(answers)
        raise ValueError(f"row {number}: answers must be two, found {found}")
    texts = {f"answers[{i}].text": answer.get("text") if isinstance(answer, dict) else None for i, answer in enumerate(answers)}
    _check_texts(number, {"question": row.get("question")}, {"source": row.get("source"), **texts})


def _check_texts(number: int, filled: dict, may_be_empty: dict) -> None:
    for field, value in {**filled, **may_be_empty}.items():
        if not isinstance(value, str) or field in filled and not value.strip():
            raise ValueError(f"row {number}: {field} must be a text, found {value!r}")
