"""Read judges' replies: scores, verdicts, and what token log-probabilities say. A reply is read here, and here only."""

import math
import re

from llama_index.core.base.llms.types import LogProb

NUMBER = r"[-+]?(?:\d+(?:[.,]\d+)?|[.,]\d+)"
OF = rf"(?:\s*(?:/|out of)\s*({NUMBER})|\s*(%|per ?cent))?"
LABEL = r"(?:(?:my|the|final|overall)\s+)*(?:score|rating|grade)\s*(?:is|of|[:=])+\s*"
MARKS = re.compile(r"[*_`#\[\]]")  # markdown around a score says nothing about it
SCORE_LINE = re.compile(rf"^(?:{LABEL})?({NUMBER}){OF}\s*[.:]?$", re.I)
SCORE_FIRST = re.compile(rf"^(?:{LABEL})?({NUMBER}){OF}\s*(?::\s+|[-–—]\s+(?!\d))\S", re.I)
# "4-5" and "3 or 4" are no score, and one that would need something is not given.
LABELLED = re.compile(
    rf"\b{LABEL}({NUMBER}){OF}(?![.,]?\d)(?!\s*(?:[-–—]|to\b|or\b)\s*\d)"
    r"(?!\s+(?:would|could|might|requires?|needs?|is not|isn['’]t)\b)",
    re.I,
)


def read_score(reply: str, low: float = 1, high: float = 5) -> tuple[float | None, str | None]:
    """Read the score in a judge's reply.

    A score stands alone on a line ("4.5", "**4.0**", "4/5", "Score: 4"), or else opens the reply ("4 - correct"), or else
    follows a word for it ("I give a score of 4"). Other numbers are not scores. A fraction or a percentage is read as a share
    of `high` where the scale begins at 0 ("8/10" and "80 %" are 0.8 of 1); on other scales it must be out of `high`.

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
    scores = {
        (_number(score), 100.0 if percent else _number(of) if of else high)
        for score, of, percent in found
    }
    if len(scores) > 1:
        return (
            None,
            f"more than one score in the reply: {', '.join(sorted(score for score, _, _ in found))}",
        )
    [(score, of)] = scores
    if of != high:
        if low != 0 or of <= 0:
            return None, f"score out of {of:g}, expected out of {high:g}"
        score = score * high / of
    if not low <= score <= high:
        return None, f"score {score:g} is outside {low:g} to {high:g}"
    return score, None


def _number(text: str) -> float:
    return float(text.replace(",", "."))


def read_score_tokens(
    logprobs: list[list[LogProb]], high: float = 100, least: float = 0.5
) -> tuple[dict[float, float], str | None]:
    """The distribution over scores that a model's token log-probabilities give, from one call.

    The score must be one token, which a whole number up to three digits long is to the tokenizers of OpenAI's models: then the
    alternatives at its place are the scores that the model weighed. (Of a score spread over several tokens, such as 0.85, the
    log-probabilities show one path only.)

    Args:
        logprobs: of each token of the reply, the alternatives, as in LlamaIndex's ChatResponse.
        high: the scale is from 0 to `high`.
        least: how much of the probability must lie on scores.

    Returns:
        ({score: probability}, None), the probabilities summing to 1; or ({}, reason).

    Source: G-Eval (Liu et al. 2023, arXiv:2303.16634) weighs scores by their tokens' probabilities.
    """
    likeliest = [
        max(tokens, key=lambda token: token.logprob).token for tokens in logprobs if tokens
    ]
    place = next(
        (i for i, token in enumerate(likeliest) if re.fullmatch(NUMBER, token.strip())), None
    )
    if place is None:
        return {}, "no log-probabilities of a score"
    if re.match(r"\d|[.,]\d?$", "".join(likeliest[place + 1 : place + 2])):
        return {}, "the score is spread over several tokens: ask for whole numbers, with scale=100"
    distribution: dict[float, float] = {}
    for token in logprobs[place]:
        if (
            re.fullmatch(NUMBER, token.token.strip())
            and 0 <= (score := _number(token.token)) <= high
        ):
            distribution[score] = distribution.get(score, 0.0) + math.exp(token.logprob)
    seen = sum(distribution.values())
    if seen < least:
        return {}, f"only {seen:.0%} of the probability is on scores from 0 to {high:g}"
    return {score: probability / seen for score, probability in sorted(distribution.items())}, None


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
        before, after = line[: marks[-1].start()], line[marks[-1].end() :]
        if len({mark[1].upper() for mark in marks}) == 1 and not IN_PASSING.search(before):
            if (
                not re.search(r"\w", after)
                or LABEL_BEFORE.search(before)
                and not re.match(r"\W*if\b", after, re.I)
            ):
                return marks[-1][1].upper(), None
    if not reply.strip():
        return None, "empty reply"
    marked = {mark.upper() for mark in MARKER.findall(reply)}
    if not marked:
        return None, "no verdict in the reply"
    return None, "more than one verdict in the reply" if len(
        marked
    ) > 1 else "a verdict only in passing"


def cut_off(finish_reason: str | None) -> str | None:
    """Why a reply cannot be trusted to be whole; None if it can. Of a score that was cut off, 4.5 may be left as 4."""
    return (
        f"cut off (finish_reason {finish_reason})"
        if finish_reason in ("length", "content_filter")
        else None
    )
