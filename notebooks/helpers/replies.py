"""Read judges' replies: scores, verdicts, distributions. No other module parses them.

Thoughts, code and quotations are cut, and the rest is spelt in one way (`plain`). Then patterns
find each place that states a value. A place does not count if the words around it take the value
back. All other places must agree, or else the reply is invalid.
"""

import math
import re
import tomllib
import unicodedata
from collections.abc import Iterator
from pathlib import Path

from llama_index.core.base.llms.types import LogProb


WORDS = tomllib.loads(Path(__file__).with_name("words.toml").read_text(encoding="utf-8"))


def _words(kind: str) -> list[str]:
    """The words of one kind in all languages, the longest first."""
    return sorted({w for language in WORDS.values() for w in language.get(kind, "").split()}, key=len, reverse=True)


def _any(kind: str) -> str:
    """A pattern of any of these words."""
    return rf"\b(?:{'|'.join(_words(kind))})(?![^\W\d_])"


NAMES, SMALL = _any("names"), rf"(?:(?-i:\ba )|{_any('small')})"
TEXT = "(?:answer|response|reference|text|assistant|author|reply|output)"
CLAUSE = r"(?:(?!\b(?:so|hence|therefore|thus|but|yet|and i)\b)[^.,;:!?()\n])*"
DENIED = re.compile(  # before a value, in its clause or sentence
    rf"(?i)(?:{_any('deny')}|n't\b|would have|far from|short of|instead of|at first|no (?:case|way)|\bto (?:earn|"
    rf"get|reach|achieve|deserve|merit|receive)\b|{TEXT} (?:gives?|gave|sa\w+|stat\w+|claims?|assigns?|"
    rf"awards?|rates?)\b|不|没){CLAUSE}\Z|\bnot (?:\w+ )?{NAMES}\W*\Z|\b(?:no|for an?) (?:\w+ of )?\Z|"
    r"(?:^|[.!?,;:\n] ?)\W*(?:(?:if(?! i\b)|unless|had|were|only an?|wenn|si|если)\b|如果|若|もし)(?:[^.!?\n]|\.\d)*\Z"
)
OTHER = re.compile(  # there too, before a score: it is the score of something else
    rf"(?i)(?:{_any('other')}|{TEXT} (?:(?-i:[AB])|\d|one|two)\b){CLAUSE}\Z"
)
TAKEN_BACK = re.compile(  # right after a value
    r"(?i)[^\w\n]{0,2}(?:would|could|might|may|requires?|needs?|means|cannot|can't|if|unless|when|were|had|loses|"
    r"isn't|at most|was (?!given|assigned)|is (?!(?:\w+ly |the |my )*(?:fair|deserved|right|given|due|appropriate|"
    r"justified|warranted|correct|better|best|preferred|favou?red|superior|stronger|winner|more|chosen)))\b|"
    r"[^.;\n]{0,30}(?<!even )\bif\b|[^.!\n]*\?| for [^.\n]*\d[^.\n]* for\b|.{0,4}(?:아니|아닙|않|없|못|ではな|ではあり)"
)
NUMBER = r"[-+]?(?:\d+(?:\.\d+|,(?!\d{3}\b)\d+)?|(?<!\d)[.,]\d+)(?:e[-+]?\d+)?(?: [13]/[234](?!\d))?"
UNIT = r"(?: ?(?:points?|stars?|marks?|pts|punkten?|sternen?|étoiles?|estrellas?|балл\w*|点|分|점)(?!\w))?"
SCORE = (  # a number that may be a score, unlike those in "4-5", "4th", "4 dates", "4 for accuracy"
    rf"(?<![a-z\d_.,/^×+-])(?P<value>{NUMBER}){UNIT}(?: ?\(? ?(?:/|out of|of|von|sur|de|из) ?(?:a )?"
    rf"(?:possible |max\w* )?(?P<top>{NUMBER}){UNIT}| ?(?P<percent>%|per ?cent))?(?![.,:]?\d|[a-z_^×+*]|"
    r" ?[/⁄%]|-\w| ?= ?[a-z]| ?(?:[-–—~〜到至]|to\b|or\b|bis\b|oder\b|ou\b) ?\d| ?[个個つ名人年月日번倍项处钟]|가지|"
    rf"(?-i: +(?!{_any('after')})[a-zà-öø-ÿа-я])|[ (]+(?:for|on|in) (?:the )?(?:{_any('aspects')}|assistant|"
    r"first|second|(?-i:[AB])\b))"
)
SKIP = rf"(?:[^\w\n<>~≈≤≥.!?-]|-(?!\d)|\([^()\n]*\)|{SMALL})*?"
NAME = (
    rf"(?P<aspect>{_any('aspects')}[ :(|—–-]*)?(?:^[^\w\n]*(?:A )?|[^\w\s] *|{SMALL} *){NAMES}"
)
GIVEN = (
    r"(?:\b(?:i|we|i'\w+)\b[^\d.,;:!?\n]{0,60}?\b(?:give|rate|score|grade|assign|award|say|go|settle)\b|"
    r"\b(?:gets|earns|receives|deserves|merits|warrants)\b(?=.*\ba| \d)|\b(?:it|this|that)(?:'s| is) an?\b|"
    rf"{_any('gives')})"
)
LINE, END = r"[^\w\n<>~≈≤≥.,+\[-]*", r"(?=[^\w\n.\]]*$)"
IS = r"[:=|(\[,—–-]|\b(?:is|be|was|ist|est|es)\b|은|는|は|为|是"
SCORES = [  # what is before a score, what is after it, and whether it plainly is the score
    (rf"\A\[?{LINE}", r"(?=[^\w\n]*$)", True),
    (rf"^.*(?:{NAMES}|assessment|judge?ment|feedback|verdict)[^\w\n]*\n{LINE}", END, True),
    (rf"[.!?)'] *\n{LINE}", r"(?=[^\w\n.\]]*\Z)", True),
    (rf"^{LINE}", END, False),
    (rf"\A{LINE}", r"(?=[:,;]\s| +\(| [-–—] (?!\d)| (?:because|since)\b|(?:(?<=[a-z])|(?<=/\d))[.!] )", True),
    (rf"{NAME}{SKIP}(?:{IS}){SKIP}|^[^\w\n]*{NAMES}[^\w\n<>~≈≤≥.,+-]*", "", True),
    (rf"{GIVEN}(?:{SKIP}|[^\d.,;:!?\n]{{0,60}}?\b(?:an?|of|at|with|de|von)\b{SKIP})", "", True),
    (rf"(?:^|[,;:] )(?:so )?(?-i:[Aa]) (?:{SMALL} )*(?:{NAMES} of )?|^\W*final\W*", "", True),
    (r"\[\[ *", "", True),
    (rf"(?:{NAME}|{_any('revised')}|\brather(?! than)|\binstead(?! of))(?:(?!{_any('aspects')})[^\d.;!?\n]){{0,40}}?", "", False),
]
MORE = re.compile(  # from a score to another one
    rf"(?i)(?:(?:[^\w\n.]|\([^()\n]*\)|\b(?:and|or|to|perhaps|maybe|possibly|even|vs|then|but)\b)+|"
    rf"[^.!?\n]*?(?:[,;/&]|\b(?:and|or)\b) *(?=[\d.]+(?:\W*$|[,.;)]| for\b))){SCORE}"
)
TOPS = re.compile(  # where the scale ends
    r"(?i)scale\D{0,15}\d+\D{1,9}(\d+)|(\d+)[- ]point scale|(?<!\d )\bout of (\d+)(?! [a-z])|满分(\d+)|(\d+)点満点|"
    rf"(?:{NAMES}|\d) *[\[(]\d+ ?(?:-|–|to|bis) ?(\d+)[\])]|\bmax\w*\W(?:score|points)?\W*(\d+)|"
    r"(\d+) = (?:best|excellent|perfect)"
)
SIDE, TIE = "(?:assistant |response |answer |model |option )?", rf"(?:an? )?{_any('ties')}"
MARKER = (
    rf"\[\[ *(?P<value>{SIDE}(?P<one>[abc])|{TIE}|(?P<left>[ab]) *(?P<sign>[<>=~≈]+) *(?P<right>[ab])) *\]\]"
)
LETTER = (
    rf"\[?(?P<value>{SIDE}(?P<one>(?-i:[ABC]))(?=(?:'s)? *(?:$|[^\w\s/&<>=~≈]|(?:is|wins|because|since|as|"
    rf"for|over|has|by|with|better|answer|response)\b))|{TIE})"
)
PREFERRED = (
    r"(?=[^\w\n]*$|[.;!] |\s*[-–—(]|,? (?:because|since|as|for(?! assistant| an? tie)|it)\b| wins\b|"
    r" (?:is|was) (?:\w+ )*?(?:better|best|preferred|favou?red|superior|stronger|winner|more|chosen)\b|"
    r" \w+s (?:more|better)\b| *(?!(?:(?!지만|으나)[^.,\n])*?(?:부정|아니|않|없|못|덜|부족|떨어|틀|나쁜|나쁘|不|差|错|劣|"
    r"ない|ません|誤))[^\x00-\u02ff])"
)
MARKS = [  # as SCORES, with the form of the verdict
    (rf"{_any('verdicts')}{SKIP}", MARKER, "", True),
    (rf"{_any('verdicts')}{SKIP}(?:{IS}|>|\bgoes\b){SKIP}", LETTER, "", True),
    (r"^[^\w\n\[]*|[:—–-][^\w\n\[]*", MARKER, r"(?=[^\w\n]*$)", True),
    (r"^[^\w\n\[]*", MARKER, r"(?=\W*[:.(—–-])", True),
    (r"(?<!\bor )(?<!\band )(?<!\bover )", MARKER, PREFERRED, False),
]
STATED = {
    "score": [(re.compile(f"(?im)(?:{a}){SCORE}{b}"), sure) for a, b, sure in SCORES],
    "verdict": [(re.compile(f"(?im)(?:{a}){mark}{b}"), sure) for a, mark, b, sure in MARKS],
}
THOUGHT = r"(?:think(?:ing)?|thoughts?|reasoning)"
THOUGHT_ENDS = rf"(?:[<\[◁]/{THOUGHT}\s*[>\]▷]|<\|channel\|>final<\|message\|>)"
ALIKE = {
    "\u00ad\u200b\u200c\u200d\u200e\u200f\u2060\ufeff": "", "¹²³⁰⁴⁵⁶⁷⁸⁹": "^", "“”„«»「」『』": '"',
    "‘’": "'", "【〔": "[", "】〕": "]", "−": "-", "٫": ".", "。": ". ", "、，": ", ", "→⇒": ":",
    "¼": " 1/4", "½": " 1/2", "¾": " 3/4", "⅓": " 1/3", "⅔": " 2/3",
}
SAME = str.maketrans({sign: new for signs, new in ALIKE.items() for sign in signs})
GLUED = [  # words of languages that are written without spaces
    w for kind in ("names", "verdicts", "ties", "gives", "small") for w in _words(kind) if w > "一" and (w[1:] or w < "가")
]
ITEM = r"^[^\w\n\[]*(?:[a-z]+ )?(\d{1,2})([.):]| [-–—])(?=[ \t]|$)"  # the number in a list
SPELLING = [  # what is not read, and what is read instead; in this order
    (r"(?s)\A\s*(?:```(?:json|xml|text)?\n((?:(?!```).)*)(?:```)?|[\"`]([^\"`]*)[\"`])\s*\Z", r"\1\2"),
    (r"(?s)^ *```(?:json|xml|yaml)\n(.*?)(?:^ *```|\Z)", r"\1"),
    (r"(?s)^[ \t]*(```|~~~).*?(?:^[ \t]*\1|\Z)", "\n"),
    (r"([\"'])(\w+)\1\s*:|(?<=: )\"([^\"\n]*)\"(?=\s*[,}\]])", r"\2\3:"),
    (r"\[result\]", "\nscore: "),
    (r"\"(?![\s\d])(?:[^\"\n]|\n(?!\s*\n))*?[\s:](?:[^\"\n]|\n(?!\s*\n))*\"|(?<!\w)'(?!\d)[^'\n]*[\s:][^'\n]*'(?!\w)", " "),
    (r"(?<=[^\n`])`(?!\d)[^`\n]*[\s:][^`\n]*`|`(?!\d)[^`\n]*[\s:][^`\n]*`(?=[^\n`])", " "),
    (  # "the answer says:", and what follows in this line or the next one
        rf"\b{TEXT}\b[^.\n]*?\b(?:(?:clos|end|sa[yi]|stat|claim|read|conclud|writ|quot|print|add)\w*(?:[ \t]+"
        r"\w+){0,7}[ \t]*:[ \t]*\n?.*|(?:begin|contain|includ|open|has|gives|lists)\w*(?:[ \t]+\w+){0,7}[ \t]*:"
        rf"[ \t]*\n.*)|\b(?:for example|e\.g\.)[^\w\n]{{1,5}}(?:{NAMES}|\[\[).*", ""),
    (r"(?s)<!--.*?-->|~~.*?~~|<(sup|code|pre|blockquote|q|s|del)\b[^>]*>.*?</\1>|\[\^\w+\]|^[ \t]*>[^\n]*", " "),
    (r"\\[dt]?frac\{(\d+)\}\{(\d+)\}", r"\1/\2"),
    (r"\\(?:text|math)\w*\s*\{([^{}]*)\}", r"\1"),
    (r"\\boxed\s*\{([^{}]*)\}", r"[[\1]]"),
    (r"\$|\\(?=[^\w\s])|</?(?:b|i|u|em|strong|span)\b[^<>]*>", ""),
    (r"</?(?:p|br|div|li|ul|ol|t[drh]|h\d)\b[^<>]*>|</[\w-]+>", "\n"),
    (r"<([a-z][^<>\[\]\n]*)>", r"\n\1: "),
    (r"(?<![<>=])[-=]+>", ":"),
    (r"^[ \t]*\|([^|\n]+)\|.*\n[ \t]*\|[-:| ]+\|[ \t]*\n[ \t]*\|([^|\n]+)\|.*$(?!\n[ \t]*\|)", r"\1: \2"),
    (r"[*#`{}\"]|^[ \t]*[-•][ \t]+", ""),
    (r"([★⭐]+)(☆+)|([★⭐]{2,})", lambda stars: f" {len(stars[1] or stars[0])}/{len(stars[0]) if stars[2] else 5} "),
    (r"(?-i:(?<=[a-z])(?=[A-Z]))|(?<=[a-z])_(?=[a-z])|_+", " "),
    (rf"({'|'.join(GLUED)})", r" \1 "),
    (r"[ \t|]+$|^[ \t|]+|[ \t]+(?=[ \t])", ""),
    (r"^\W*\n", ""),
]


def without_thought(text: str) -> str:
    """A reply without what the model said to itself, even if its tags are not a pair."""
    opened = rf"[<\[◁]{THOUGHT}\b[^<>\[\]]*[>\]▷].*?(?:{THOUGHT_ENDS}|\Z)"
    text = re.sub(opened, "", text, flags=re.S | re.I)
    return re.sub(rf"\A.*{THOUGHT_ENDS}", "", text, flags=re.S | re.I)


def plain(reply: str) -> str:
    """The lines of a reply that may state something, spelt in one way."""
    text = unicodedata.normalize("NFKC", without_thought(reply).translate(SAME))
    text = re.sub(r"\d", lambda digit: str(int(digit[0])), text)
    for pattern, new in SPELLING:
        text = re.sub(f"(?im){pattern}", new, text)
    items = {(item[2], int(item[1])) for item in re.finditer(ITEM, text, re.M | re.I)}
    for mark, number in items:  # a number counts a list if the one before or after it is there, too
        if {(mark, number - 1), (mark, number + 1)} & items:
            text = re.sub(f"(?im)^([^\\w\\n\\[]*(?:[a-z]+ )?){number}(?={re.escape(mark)}([ \\t]|$))", r"\1", text)
    return text.strip()


def _stated(text: str, kind: str) -> Iterator[tuple[re.Match, bool]]:
    """Each value that the text states and does not take back, and whether it states it plainly."""
    for pattern, sure in STATED[kind]:
        for match in pattern.finditer(text):
            before, score = text[: match.start("value")], kind == "score"
            if DENIED.search(before) or TAKEN_BACK.match(text, match.end()):
                continue
            if score and (match["aspect"] if "aspect" in match.groupdict() else sure and OTHER.search(before)):
                continue
            yield match, sure
            if score and (second := MORE.match(text, match.end())):
                yield second, False


def read_score(reply: str, low: float = 1, high: float = 5) -> tuple[float | None, str | None]:
    """Read the score in a judge's reply.

    It stands alone on the first or the last line, opens the reply ("4 - right"), follows a word for
    it ("Score: 4", "I give it a 4"), or is marked ("[[4]]"). On a scale that begins at 0, a fraction
    or a percentage is a share of `high`: on a scale to 1, "8/10" and "80 %" are 0.8. On other
    scales, a fraction must be out of `high`.

    Returns:
        (score, None), or (None, reason). The reason says that the reply has no score, or more than
        one, or one on another scale or outside `low` to `high`.
    """
    if not without_thought(reply).strip():
        return None, "empty reply"
    text = plain(reply)
    end = min({float(max(ends, key=len)) for ends in TOPS.findall(text)} - {high}, default=high)
    plainly, perhaps = {}, {}
    for match, sure in _stated(TOPS.sub(" ", text), "score"):
        top = _number(match["top"]) if match["top"] else 100.0 if match["percent"] else end
        score = round(_number(match["value"]) / top * high, 9) if top else math.inf
        if sure or low <= score <= high:
            (plainly if sure else perhaps).setdefault(score, (match["value"], top))
    if not plainly:
        return None, "no score in the reply"
    if len(plainly | perhaps) > 1:
        numbers = sorted({number for number, _ in [*plainly.values(), *perhaps.values()]})
        return None, f"more than one score in the reply: {', '.join(numbers)}"
    [(score, (number, top))] = plainly.items()
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
    return next((n for n, start in enumerate(starts, 1) if any(_stated(plain(start), "score"))), 1)


def read_score_tokens(
    logprobs: list[list[LogProb]], high: float = 100, least: float = 0.5, reply: str | None = None
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
        reply: The text; by default, the likeliest tokens.

    Returns:
        ({score: probability}, None), or ({}, reason). The probabilities add up to 1.

    Source: G-Eval (Liu et al. 2023, arXiv:2303.16634) weights scores by token probabilities.
    """
    # A token that is listed twice counts once.
    places = [
        {one.token: one.logprob for one in sorted(place, key=lambda one: one.logprob)}
        for place in logprobs
    ]
    if reply is None:
        reply = "".join(list(place)[-1] if place else "" for place in places)
    score, end, reason = read_score(reply, 0, high)[0], 0, "no log-probabilities of a score"
    for place in places:
        # The token of the reply is the one that goes on where the last one ended.
        nearest = min(((reply.find(t, end), -len(t), t) for t in place if t and t in reply[end:]), default=None)
        if nearest is None:
            continue
        start, _, token = nearest
        head, end = reply[:start], start + len(token)
        line = reply[end:].partition("\n")[0]
        if not re.search(r"\d", token):
            continue
        reads = {one: read_score(head + one + line, 0, high)[0] for one in [*place, " 0", " 1"]}
        if re.search(r"[\d.,]{2}", head[-1:] + token[:1]) or re.match(r"[.,]?\d", line):
            reason = "the score is spread over several tokens: ask for whole numbers, with scale=100"
        elif None is not reads[" 0"] != reads[" 1"] is not None and score in (None, reads[token]):
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
    first = [sides[0] if sides and re.match(r"[^\w\[]*\[\[", line) else "" for line, sides in zip(lines, marks)]
    for i, sides in enumerate(marks):
        if len({*sides}) > 1 or first[i] and {*first[max(0, i - 1) : i + 2]} - {"", first[i]}:
            lines[i] = ""
    found = [(match.start("value"), _side(match), sure) for match, sure in _stated("\n".join(lines), "verdict")]
    last = max((place for place, _, sure in found if sure), default=-1)
    stated = {side for place, side, sure in found if sure or place > last}
    if len(stated) == 1:
        return stated.pop(), None
    marked = stated.union(*marks)
    if not marked:
        return None, "no verdict in the reply"
    return None, "more than one verdict in the reply" if len(marked) > 1 else "a verdict only in passing"


def _side(mark: re.Match) -> str:
    """The verdict of a mark: "A", "B" or "C"."""
    sign = mark.groupdict().get("sign") or ""
    one = mark["one"] or (">" in sign and mark["left"]) or ("<" in sign and mark["right"])
    return one.upper() if one else "C"


# What providers call the end of a reply that is whole.
WHOLE = "stop stop_sequence end_turn eos eos_token endoftext complete completed finish finished".split()


def cut_off(finish_reason: str | None) -> str | None:
    """Say why a reply may not be whole; None if it is. A score of 4.5 may be cut to 4."""
    name = re.sub(r"^.*[._](?=stop|complete)|^finish_?reason[._]", "", (finish_reason or "stop").lower())
    return None if name in WHOLE else f"cut off (finish_reason {finish_reason})"
