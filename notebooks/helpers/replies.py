"""Read judges' replies: scores, verdicts, distributions. No other module parses them."""

import math
import re

from llama_index.core.base.llms.types import LogProb

# A comma before three digits separates thousands, and is no decimal point.
NUMBER = r"[-+]?(?:\d+(?:\.\d+|,(?!\d{3}\b)\d+)?(?![.,]\d)|[.,]\d+)"
OF = rf"(?:\s*(?:/|out of)\s*({NUMBER})(?:\s+(?:stars?|points?))?|\s*(%|per ?cent))?"
LABEL = (
    r"(?:(?:my|the|final|overall)\s+)*(?:score|rating|grade)\s*(?:\([^)]*\)\s*)?(?:is|of|[:=])+\s*"
)
THOUGHT = re.compile(r"<think>.*?(?:</think>|\Z)", re.S | re.I)  # what a model says to itself
MARKS = re.compile(r"[*_`#\[\]]")  # markdown around a score has no meaning here
SCORE_LINE = re.compile(rf"^(?:{LABEL})?({NUMBER}){OF}\s*[.:]?$", re.I)
SCORE_FIRST = re.compile(rf"^(?:{LABEL})?({NUMBER}){OF}\s*(?::\s+|[-–—]\s+(?!\d))\S", re.I)
# "4-5" and "3 or 4" are not scores. "A score of 4 would need ..." does not give a score either.
LABELLED = re.compile(
    rf"\b{LABEL}({NUMBER}){OF}(?![.,]?\d)(?!\s*(?:[-–—]|to\b|or\b)\s*\d)"
    r"(?!\s+(?:would|could|might|requires?|needs?|is not|isn['’]t)\b)",
    re.I,
)


def read_score(reply: str, low: float = 1, high: float = 5) -> tuple[float | None, str | None]:
    """Read the score in a judge's reply.

    Thoughts in <think> tags are left out. The score is alone on a line ("4.5", "**4.0**", "4/5",
    "Score: 4"). If there is no such line, the score opens the reply ("4 - correct"). If it does
    not, the score follows a word for it ("I give a score of 4"). Other numbers are not scores. On a
    scale that begins at 0, a fraction or a percentage is a share of `high`: on a scale to 1, "8/10"
    and "80 %" are 0.8. On other scales, a fraction must be out of `high`.

    Returns:
        (score, None), or (None, reason). The reason says that the reply has no score, or more than
        one, or one outside `low` to `high`.
    """
    reply = THOUGHT.sub("", reply)
    lines = [plain for line in reply.splitlines() if (plain := MARKS.sub("", line).strip())]
    if not lines:
        return None, "empty reply"
    found = [match.groups() for line in lines if (match := SCORE_LINE.match(line))]
    if not found and (match := SCORE_FIRST.match(lines[0])):
        found = [match.groups()]
    if not found:
        found = [match.groups() for match in LABELLED.finditer("\n".join(lines))]
    if not found:
        return None, "no score in the reply"
    scores = set()
    for number, of, percent in found:
        top = _number(of) if of else high
        scores.add((_number(number), 100.0 if percent else top))
    if len(scores) > 1:
        numbers = ", ".join(sorted(number for number, _, _ in found))
        return None, f"more than one score in the reply: {numbers}"
    [(score, top)] = scores
    if top != high:
        if low != 0 or top <= 0:
            return None, f"score out of {top:g}, expected out of {high:g}"
        score = score * high / top
    if not low <= score <= high:
        return None, f"score {score:g} is outside {low:g} to {high:g}"
    return score, None


def _number(text: str) -> float:
    return float(text.replace(",", "."))


def _is_number(token: str) -> bool:
    return re.fullmatch(NUMBER, token.strip()) is not None


def read_score_tokens(
    logprobs: list[list[LogProb]], high: float = 100, least: float = 0.5
) -> tuple[dict[float, float], str | None]:
    """Read a distribution over scores from the token log-probabilities of one call.

    The score must be one token. Then the alternatives to this token are the other scores that the
    model considered. The tokenizers of OpenAI's models write a whole number of up to three digits
    as one token. They write 0.85 as several tokens, and the log-probabilities do not show the
    alternatives to all of them together.

    Args:
        logprobs: The alternatives for each token of the reply, as in LlamaIndex's ChatResponse.
        high: The scale goes from 0 to `high`.
        least: The least total probability that must be on scores.

    Returns:
        ({score: probability}, None), or ({}, reason). The probabilities add up to 1.

    Source: G-Eval (Liu et al. 2023, arXiv:2303.16634) weights scores by token probabilities.
    """
    likeliest = [max(tokens, key=lambda one: one.logprob).token for tokens in logprobs if tokens]
    place = next((i for i, token in enumerate(likeliest) if _is_number(token)), None)
    if place is None:
        return {}, "no log-probabilities of a score"
    following = "".join(likeliest[place + 1 : place + 2])
    if re.match(r"\d|[.,]\d?$", following):
        return {}, "the score is spread over several tokens: ask for whole numbers, with scale=100"
    distribution: dict[float, float] = {}
    for token in logprobs[place]:
        if _is_number(token.token) and 0 <= (score := _number(token.token)) <= high:
            distribution[score] = distribution.get(score, 0.0) + math.exp(token.logprob)
    seen = sum(distribution.values())
    if seen < least:
        return {}, f"only {seen:.0%} of the probability is on scores from 0 to {high:g}"
    return {score: probability / seen for score, probability in sorted(distribution.items())}, None


MARKER = re.compile(r"\[\[\s*([ABC])\s*\]\]", re.I)
# A marker after one of these words is not a verdict.
IN_PASSING = re.compile(r"\b(?:not|n't|than|or|nor|and|over|if|against)\W*$", re.I)
# A marker after the word "verdict", or at the beginning of a line, is a verdict.
LABEL_BEFORE = re.compile(r"(?:\bverdict\b[^.]{0,20}|^\W*)$", re.I)


def read_verdict(reply: str) -> tuple[str | None, str | None]:
    """Read the verdict in a pairwise judge's reply. The last line with a verdict counts.

    Such a line has one of the markers [[A]], [[B]], [[C]] and no other marker. "[[a]]" and
    "[[ A ]]" count too. The marker is at the end or the beginning of the line, or after the word
    "verdict". It does not count in a phrase such as "rather than [[A]]".

    Returns:
        (verdict, None), or (None, reason). The verdict is "A", "B" or "C".
    """
    reply = THOUGHT.sub("", reply)
    for line in reversed(reply.splitlines()):
        marks = list(MARKER.finditer(line))
        if len({mark[1].upper() for mark in marks}) != 1:
            continue
        before, after = line[: marks[-1].start()], line[marks[-1].end() :]
        at_end = not re.search(r"\w", after)
        labelled = LABEL_BEFORE.search(before) and not re.match(r"\W*if\b", after, re.I)
        if (at_end or labelled) and not IN_PASSING.search(before):
            return marks[-1][1].upper(), None
    if not reply.strip():
        return None, "empty reply"
    marked = {mark.upper() for mark in MARKER.findall(reply)}
    if not marked:
        return None, "no verdict in the reply"
    if len(marked) > 1:
        return None, "more than one verdict in the reply"
    return None, "a verdict only in passing"


def cut_off(finish_reason: str | None) -> str | None:
    """Say why a reply is incomplete; None if it is complete. A score of 4.5 may be cut to 4."""
    if finish_reason in ("length", "content_filter"):
        return f"cut off (finish_reason {finish_reason})"
    return None
