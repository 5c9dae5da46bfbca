"""Read judges' replies: scores, verdicts, distributions. No other module parses them.

`plain` cuts thoughts, code and quotations, and spells the rest in one way. The tables in `wordings`
say where a text states a value. A place does not count if the words around it take the value back.
All other places must agree, or else the reply is invalid.
"""

import math
import re
from collections.abc import Iterator

from llama_index.core.base.llms.types import LogProb

from .wordings import DENIED, MARKER, SCORES, TAKEN_BACK, TOPS, VERDICTS, plain, without_thought

WINDOW = 200  # so many characters before a value are looked at
# What providers call the end of a reply that is whole.
WHOLE = "stop stop_sequence end_turn eos eos_token endoftext complete completed finish".split()


def _stated(text: str, tables: list) -> Iterator[tuple[re.Match, bool]]:
    """Each value that the text states and does not take back, and whether it states it plainly."""
    for values, leads, other, more in tables:
        for match in values.finditer(text):
            start, end = max(0, match.start("value") - WINDOW), match.end()
            before = "x" * (start > 0) + text[start : match.start()]
            if DENIED.search(before) or TAKEN_BACK.match(text, end):
                continue
            for lead, after, plainly in leads:
                led = lead.search(before)
                if not led or led.groupdict().get("aspect") or not after.match(text, end):
                    continue
                if plainly and other and other.search(before):
                    continue
                yield match, plainly
                if more and (second := more.match(text, end)):
                    yield second, False


def read_score(reply: str, low: float = 1, high: float = 5) -> tuple[float | None, str | None]:
    """Read the score in a judge's reply.

    It stands alone on the first or the last line, opens the reply ("4 - right"), follows a word for
    it ("Score: 4", "I give it a 4"), or is marked ("[[4]]"). On a scale that begins at 0, "8/10"
    and "80 %" are shares of `high`. On other scales, a fraction must be out of `high`.

    Returns:
        (score, None), or (None, reason). The reason says that the reply has no score, or more than
        one, or one on another scale or outside `low` to `high`.
    """
    if not without_thought(reply).strip():
        return None, "empty reply"
    text = plain(reply)
    end = min({float(max(ends, key=len)) for ends in TOPS.findall(text)} - {high}, default=high)
    found: dict[float, tuple[str, float]] = {}
    possible: dict[float, tuple[str, float]] = {}
    for match, plainly in _stated(TOPS.sub(" ", text), SCORES):
        top = _number(match["top"]) if match["top"] else 100.0 if match["percent"] else end
        score = round(_number(match["value"]) / top * high, 9) if top else math.inf
        if plainly or low <= score <= high:
            (found if plainly else possible).setdefault(score, (match["value"], top))
    if not found:
        return None, "no score in the reply"
    if len(found | possible) > 1:
        numbers = sorted({number for number, _ in [*found.values(), *possible.values()]})
        return None, f"more than one score in the reply: {', '.join(numbers)}"
    [(score, (number, top))] = found.items()
    if top != high and (low != 0 or top <= 0):
        return None, f"score out of {top:g}, expected out of {high:g}"
    if top == high > 1 and low == 0 and 0 < score <= 1 and re.fullmatch(r"\d*[.,]\d+", number):
        return None, f"score {number} may be a share of 1, expected out of {high:g}"
    if not low <= score <= high:
        return None, f"score {score:g} is outside {low:g} to {high:g}"
    return score, None


def _number(text: str) -> float:
    """The value of "4.5", "4,5", "4e-1" or "4 1/2"."""
    whole, _, part = text.replace(",", ".").partition(" ")
    above, _, below = part.partition("/")
    return float(whole) + (int(above) / int(below) if part else 0)


def lines_to_score(reply: str) -> int:
    """How many lines of a reply it takes to state a score; 1 if none does."""
    lines = reply.splitlines()
    starts = ("\n".join(lines[:count]) for count in range(1, len(lines) + 1))
    return next((n for n, start in enumerate(starts, 1) if any(_stated(plain(start), SCORES))), 1)


def read_score_tokens(
    logprobs: list[list[LogProb]], high: float = 100, least: float = 0.5, reply: str | None = None
) -> tuple[dict[float, float], str | None]:
    """Read a distribution over scores from the token log-probabilities of one call.

    The alternatives to the token of the score are the other scores that the model considered. So
    the score must be one token. OpenAI's models write a whole number of up to three digits as one
    token, and 0.85 as several.

    Args:
        logprobs: The alternatives for each token of the reply, as in LlamaIndex's ChatResponse.
        high: The scale goes from 0 to `high`.
        least: The least total probability that must be on scores.
        reply: Its text; by default, the likeliest tokens.

    Returns:
        ({score: probability}, None), or ({}, reason). The probabilities add up to 1.

    Source: G-Eval (Liu et al. 2023, arXiv:2303.16634) weights scores by token probabilities.
    """
    # A token that is listed twice counts once, as the likelier one.
    ordered = [sorted(place, key=lambda one: one.logprob) for place in logprobs]
    places = [{one.token: one.logprob for one in place} for place in ordered]
    if reply is None or len(places) == 1:  # the local student's one place is the whole score
        reply = "".join(place[-1].token if place else "" for place in ordered)
    score, end, reason = read_score(reply, 0, high)[0], 0, "no log-probabilities of a score"
    for place in places:
        # The token of the reply is the one that goes on where the last one ended.
        there = [(reply.find(one, end), -len(one), one) for one in place if one in reply[end:]]
        start, _, token = min(there, default=(end, 0, ""))
        head, end = reply[:start], start + len(token)
        line = reply[end:].partition("\n")[0]
        if not re.search(r"\d", token):
            continue
        if re.search(r"[\d.,]{2}", head[-1:] + token[:1]) or re.match(r"[.,]?\d", line):
            reason = "the score is spread over several tokens: use whole numbers, with scale=100"
            continue
        reads = {one: read_score(head + one + line, 0, high)[0] for one in [*place, " 0", " 1"]}
        # It is the score if another number in its place is read as another score.
        if len({reads[" 0"], reads[" 1"], None}) == 3 and score in (None, reads[token]):
            break
    else:
        return {}, reason
    distribution: dict[float, float] = {}
    for token, logprob in place.items():
        if (value := reads[token]) is not None:
            distribution[value] = distribution.get(value, 0.0) + math.exp(logprob)
    seen = sum(distribution.values())
    if seen < least:
        return {}, f"only {seen:.0%} of the probability is on scores from 0 to {high:g}"
    return {value: p / seen for value, p in sorted(distribution.items())}, None


def read_verdict(reply: str) -> tuple[str | None, str | None]:
    """Read the verdict in a pairwise judge's reply.

    It is one of the markers [[A]], [[B]], [[C]], or "[[A>B]]" and the like. After a word such as
    "verdict", a letter will do. A marker that stands alone or after such a word outweighs those in
    the sentences before it. A line with two different markers states nothing, nor do the options,
    listed one a line.

    Returns:
        (verdict, None), or (None, reason). The verdict is "A", "B" or "C".
    """
    if not without_thought(reply).strip():
        return None, "empty reply"
    lines = plain(reply).split("\n")
    marks = [[_side(mark) for mark in re.finditer(MARKER, line, re.I)] for line in lines]
    opens = [re.match(r"[^\w\[]*\[\[", line) for line in lines]
    first = [sides[0] if sides and opened else "" for sides, opened in zip(marks, opens)]
    for i, sides in enumerate(marks):
        options = {*first[max(0, i - 1) : i + 2]} - {""}
        if len({*sides}) > 1 or first[i] and len(options) > 1:
            lines[i] = ""
    stated = _stated("\n".join(lines), VERDICTS)
    found = [(match.start("value"), _side(match), plainly) for match, plainly in stated]
    last = max((place for place, _, plainly in found if plainly), default=-1)
    given = {side for place, side, plainly in found if plainly or place > last}
    if len(given) == 1:
        return given.pop(), None
    marked = given.union(*marks)
    if not marked:
        return None, "no verdict in the reply"
    several = "more than one verdict in the reply"
    return None, several if len(marked) > 1 else "a verdict only in passing"


def _side(mark: re.Match) -> str:
    """The verdict of a mark: "A", "B" or "C"."""
    sign = mark.groupdict().get("sign") or ""
    one = mark["one"] or (">" in sign and mark["left"]) or ("<" in sign and mark["right"])
    return one.upper() if one else "C"


def cut_off(finish_reason: str | None) -> str | None:
    """Say why a reply may not be whole; None if it is. A score of 4.5 may be cut to 4."""
    name = re.sub(r"^finish_?reason[._]", "", str(finish_reason or "stop").lower())
    return None if name in WHOLE else f"cut off (finish_reason {finish_reason})"
