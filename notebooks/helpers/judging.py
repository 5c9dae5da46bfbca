"""Judge: rows -> judgements. Replies are read here, and here only."""

import copy
import re

from llama_index.core.evaluation import BaseEvaluator, CorrectnessEvaluator, EvaluationResult

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


async def judge_rows(rows: list[dict], evaluator: BaseEvaluator, *, name: str, concurrency: int = 16) -> list[dict]:
    """Judge every row, and return the rows with one more evaluation each, in the same order.

    An evaluation is {"llm": name, "score", "text", "source"}: `text` is the judge's whole reply. A reply that cannot be
    read, or a live call that failed, has the score None and the reason under "invalid". An evaluation that
    already bears the name is replaced. The rows passed in are left as they are.

    Args:
        rows: correctness rows: `question`, `reference`, `response_data.text`.
        evaluator: a CorrectnessEvaluator; its own parser is not used, since it raises on a bare "4.5" and lets 7.5 pass.
        name: of the judge.
        concurrency: how many calls may be under way at once.

    Raises:
        TypeError: an evaluator of another kind.
        ValueError: a row lacks a field; the message says which row and field.
    """
    if not isinstance(evaluator, CorrectnessEvaluator):
        raise TypeError(f"judge_rows knows CorrectnessEvaluator, not {type(evaluator).__name__}")
    for number, row in enumerate(rows):
        _check_row(row, number)
    judge = copy.copy(evaluator)
    judge.parser_function = lambda reply: (read_score(reply)[0], reply)
    evaluations = await run_stage(f"judge: {name}", [_judge(judge, row, name) for row in rows], concurrency)
    return [{**row, "evaluations": [old for old in row.get("evaluations", []) if old["llm"] != name] + [new]}
            for row, new in zip(rows, evaluations)]


async def _judge(evaluator: CorrectnessEvaluator, row: dict, name: str) -> dict:
    try:
        result: EvaluationResult = await evaluator.aevaluate(
            query=row["question"], response=row["response_data"]["text"], reference=row["reference"])
    except CallFailed as error:
        return {"llm": name, "score": None, "text": None, "invalid": f"the call failed: {error}"}
    score, reason = read_score(result.feedback)
    return {"llm": name, "score": score, "text": result.feedback, **({"invalid": reason} if reason else {})}


def _check_row(row: dict, number: int) -> None:
    answer = row.get("response_data")
    for field, value in [("question", row.get("question")), ("reference", row.get("reference")),
                         ("response_data.text", answer.get("text") if isinstance(answer, dict) else None)]:
        if not isinstance(value, str) or (not value.strip() and field != "response_data.text"):
            raise ValueError(f"row {number}: {field} must be a text, found {value!r}")
