"""How judges word their replies: the tables by which `replies` reads them.

`words.toml` has the words of each language. Here are the patterns that are made of them.
"""

import re
import tomllib
import unicodedata
from collections.abc import Callable
from pathlib import Path

WORDS = tomllib.loads(Path(__file__).with_name("words.toml").read_text(encoding="utf-8"))


def _words(*kinds: str) -> list[str]:
    """The words of some kinds in all languages, the longest first."""
    lines = " ".join(language.get(kind, "") for language in WORDS.values() for kind in kinds)
    return [word.replace("_", " ") for word in sorted({*lines.split()}, key=len, reverse=True)]


def _bare(kind: str) -> str:
    """A pattern of any word of a kind, even within another word."""
    return "|".join(_words(kind))


def _any(kind: str) -> str:
    """A pattern of any word of a kind."""
    return rf"\b(?:{_bare(kind)})(?![^\W\d_])"


NAMES, VERDICT, ASPECTS, TEXTS = map(_any, ("names", "verdicts", "aspects", "texts"))
SMALL = rf"(?:(?-i:\ba )|{_any('small')})"
# What is read at all. All patterns leave case out of account, and "^" and "$" are ends of lines.
NUMBER = r"[-+]?(?:\d+(?:\.\d+|,(?!\d{3}\b)\d+)?|(?<!\d)[.,]\d+)(?:e[-+]?\d+)?(?: [13]/[234]\b)?"
UNIT = rf"(?: ?(?:{_bare('units')})(?![a-zа-я]))?"
SCORE = (  # a number that may be a score, unlike those in "4-5", "4th", "4 dates", "4 for accuracy"
    rf"(?<![a-z\d_.,/^×+-])(?P<value>{NUMBER}){UNIT}(?:\]\]{UNIT})?+"
    rf"(?: ?\(? ?(?:/|{_bare('out_of')}) ?(?:a )?(?:possible |max\w* )?(?P<top>{NUMBER})"
    rf"{UNIT}| ?(?P<percent>%|per ?cent))?"
    rf"(?![.,:]?\d|[a-z_^×+*]| ?[/⁄%]|-\w| ?= ?[a-z]| ?(?:{_bare('counters')})"
    rf"|(?!(?:{_bare('particles')}))[\u3040-\u9fff\uac00-\ud7a3]"
    r"| ?(?:[-–—~〜]|to\b|or\b|bis\b|oder\b|ou\b|或) ?\d"
    rf"|(?-i: +(?!{_any('after')})[a-zà-öø-ÿа-я])"
    rf"|[ (]+(?:for|on|in) (?:the )?(?:\w+ )?(?:{ASPECTS}|assistant|first|second|(?-i:[AB])\b))"
)
SIDE, TIE = "(?:assistant |response |answer |model |option )?", rf"(?:an? )?{_any('ties')}"
MARKER = (
    rf"\[\[ *(?P<value>{SIDE}(?P<one>[abc])|{TIE}"
    r"|(?P<left>[ab]) *(?P<sign>[<>=~≈]+) *(?P<right>[ab])) *\]\]"
)
GOES_ON = rf"(?!and\b){_any('after')}|(?:wins|over|has|by|better|answer)\b"
LETTER = (
    rf"\[?(?P<value>{SIDE}(?P<one>(?-i:[ABC]))(?=(?:'s)? *(?:$|[^\w\s/&<>=~≈]|{GOES_ON}))|{TIE})"
)
# What leads to a value.
SKIP = rf"(?:[^\w\n<>~≈≤≥.!?-]|-(?!\d)|\([^()\n]*\)|{SMALL})*?"
IS = rf"[:=|(\[,—–-]|{_any('is')}"
NAME = (
    rf"(?P<aspect>{ASPECTS}[ :(|—–-]*(?![.!?,;\n]))?(?:^[^\w\n]*(?:A )?|[^\w\s] *|{SMALL} *){NAMES}"
)
GIVES = (
    rf"(?:\b(?:i|we|i'\w+)\b[^\d.,;:!?\n]{{0,40}}?{_any('i_give')}|{_any('gets')}(?=.*\ba| *\Z)"
    rf"|\b(?:it|this|that)(?:'s| is) an?\b|{_any('gives')})"
)
REVISED = rf"{_any('revised')}|\brather(?! than)|\binstead(?! of)"
LINE, END = r"[^\w\n<>~≈≤≥.,+\[-]*", r"(?=[^\w\n.\]]*$)"
AFTER_OPENING = r"(?=[:,;]\s| +\(| [-–—] (?!\d)| (?:because|since)\b|(?:(?<=[a-z])|(?<=/\d))[.!] )"
PREFERRED = (
    r"(?=[^\w\n]*$|[.;!] |\s*[-–—(]|,? (?:because|since|as|for(?! assistant| an? tie)|it)\b| wins\b"
    rf"| (?:is|was) (?:\w+ )*?{_any('better')}| \w+s (?:more|better)\b"
    rf"| *(?!(?:(?!지만|으나)[^.,\n])*?(?:{_bare('worse')}))[^\x00-\u02ff])"
)
# Rows: what is before a value, what is after it, and whether the value is plainly stated.
NUMBERED = [
    (rf"\A\[?{LINE}", r"(?=[^\w\n]*$)", True),  # alone on the first line
    (rf"^.*(?:{NAMES}|judge?ment|feedback|verdict)(?: {SMALL})?[^\w\n]*\n{LINE}", END, True),
    (rf"[.!?)'] *\n{LINE}", r"(?=[^\w\n.\]]*\Z)", True),  # on the last one
    (rf"^{LINE}", END, False),
    (rf"\A{LINE}", AFTER_OPENING, True),
    (rf"{NAME}{SKIP}(?:{IS}){SKIP}|^[^\w\n]*{NAMES}[^\w\n<>~≈≤≥.,+-]*", "", True),
    (rf"{GIVES}(?:{SKIP}|[^\d.,;:!?\n]{{0,40}}?\b(?:an?|of|at|with|de|von)\b{SKIP})", "", True),
    (rf"(?:^|[,;:] )(?:so )?(?-i:[Aa]) (?:{SMALL} )*(?:{NAMES} of )?|^\W*final\W*", "", True),
    (r"(?:^|[.!?:;,(\[—–-]|[^\x00-\u02ff]) *\[\[ *", "", True),
    (r"\[\[ *", "", False),
    (rf"(?:{NAME}|{REVISED})(?:(?!{ASPECTS})[^\d.;!?\n]){{0,40}}?", "", False),
]
MARKED = [
    (rf"{VERDICT}{SKIP}", r"(?!\W*or\b)", True),
    (r"^[^\w\n\[]*|[:—–-][^\w\n\[]*", r"(?=[^\w\n]*$)", True),
    (r"^[^\w\n\[]*", r"(?=\W*[:.(—–-])", True),
    (r"(?<!\bor )(?<!\band )(?<!\bover )", PREFERRED, False),
]
LETTERED = [(rf"{VERDICT}{SKIP}(?:{IS}|>|\bgoes\b){SKIP}", r"(?!\W*or\b)", True)]
MORE = re.compile(  # from a score to another one
    r"(?im)(?:(?:[^\w\n.]|\([^()\n]*\)"
    r"|\b(?:and|or|to|perhaps|maybe|possibly|even|vs|then|but|或)\b)+"
    rf"|[^.!?\n]{{0,80}}?(?:[,;/&]|\b(?:and|or)\b) *(?=[\d.]+(?:\W*$|[,.;)]| for\b))){SCORE}"
)
TOPS = re.compile(  # where the scale ends; what is named `kept` is read on
    r"(?i)scale\D{0,15}\d+\D{1,9}(\d+)|(\d+)[- ]point scale|(?<!\d )\bout of (\d+)(?! [a-z])"
    rf"|(?P<kept>{NAMES}|\d(?:\]\])?) *[\[(]\d+ ?(?:-|–|to|bis) ?(\d+)(?: scale)?[\])]"
    r"|(\d+) (?:=|is|being) (?:the )?(?:best|excellent|perfect|highest)"
    r"|\bmax\w*\W(?:score|points)?\W*(\d+)"
    r"|满分(\d+)|(\d+)(?:点満点|점 ?만점)|[01](?:到|至|から|에서) ?(\d+)"
)
CLAUSE = r"(?:(?!\b(?:so|hence|therefore|thus|but|yet|and i)\b)[^.,;:!?()\n])*"
DENIED = re.compile(  # before a value, in its clause or sentence
    rf"(?i)(?:{_any('deny')}|n't\b|{TEXTS} (?:{_any('says')}|{_any('quotes')})|不|没){CLAUSE}\Z"
    rf"|\bnot (?:\w+ )?{NAMES}\W*\Z|\b(?:no|for an?) (?:\w+ of )?\Z"
    rf"|(?:^|[.!?,;:\n] ?)\W*(?:{_any('if')}|if\b(?! i\b)|如果|若|もし)(?:[^.!?\n]|\.\d)*\Z"
)
OTHER = re.compile(  # there too: the score is that of another text
    rf"(?i)(?:{_any('other')}|{TEXTS} (?:(?-i:[AB])|\d|one|two)\b"
    rf"|\b(?:an?|any|every|each) (?:\w+ )?{TEXTS}|reference(?: answer)? {_any('gets')}){CLAUSE}\Z"
)
TAKEN_BACK = re.compile(  # right after a value
    rf"(?i)[^\w\n]{{0,4}}(?:{_any('deny_after')}|was (?!given|assigned)"
    rf"|is (?!(?:\w+ly |the |my )*{_any('better')}))"
    r"|[^.;\n]{0,30}(?<!even )\bif\b|[^.!\n]{0,200}\?| for [^.\n]*\d[^.\n]* for\b"
    rf"|.{{0,4}}(?:{_bare('not_after')})"
)


def _table(value: str, rows: list, other: re.Pattern | None, more: re.Pattern | None) -> tuple:
    leads = [(re.compile(rf"(?im)(?:{a})\Z"), re.compile(f"(?im){b}"), ok) for a, b, ok in rows]
    return re.compile(f"(?im){value}"), leads, other, more


SCORES = [_table(SCORE, NUMBERED, OTHER, MORE)]
VERDICTS = [_table(MARKER, MARKED, None, None), _table(LETTER, LETTERED, None, None)]

# How a reply is spelt before it is read.
SAME: dict = str.maketrans(
    "“”„«»「」『』‘’【】〔〕−٫→⇒¹²³⁰⁴⁵⁶⁷⁸⁹",
    '"""""""""\'\'[][]-.::^^^^^^^^^^',
    "\u00ad\u200b\u200c\u200d\u200e\u200f\u2060\ufeff",
)
SPACED = {"。": ". ", "、": ", ", "，": ", "}
FRACTIONS = {"½": " 1/2", "¼": " 1/4", "¾": " 3/4", "⅓": " 1/3", "⅔": " 2/3"}
SAME |= {ord(sign): new for sign, new in {**SPACED, **FRACTIONS}.items()}
# Words of languages that set no spaces get some, apart from the particles of Japanese and Korean.
KINDS = ("names", "verdicts", "ties", "gives", "small")
UNSPACED = [word for word in _words(*KINDS) if word > "一" and (word[1:] or word < "가")]
LONG = r"(?![\s\d])(?:[^{0}\n]|\n(?!\s*\n))*?[\s:](?:[^{0}\n]|\n(?!\s*\n))*"  # in quotation marks
COLON = r"(?:[ \t]+\w+){0,7}[ \t]*:[ \t]*"
ITEM = r"^[^\w\n\[]*(?:[a-z]+ )?(\d{1,2})([.):]| [-–—])(?=[ \t]|$)"  # the number in a list


def _item(item: re.Match) -> str:
    """Nothing of a list's number, if the number before or after it is in the list too."""
    items = {(int(one[1]), one[2]) for one in re.finditer(f"(?im){ITEM}", item.string)}
    return "" if {(int(item[1]) + step, item[2]) for step in (-1, 1)} & items else item[0]


def _stars(stars: re.Match) -> str:
    full = len(stars[1] or stars[0])
    return f" {full}/{len(stars[0]) if stars[2] else 5} "


SPELLING: list[tuple[str, str | Callable[[re.Match], str]]] = [  # what is written instead, in order
    (r"(?s)\A\s*```(?:json|xml|text)?\n((?:(?!```).)*)(?:```)?\s*\Z", r"\1"),
    (r"\A\s*[\"`]([^\"`]*)[\"`]\s*\Z", r"\1"),
    (r"(?s)^ *```(?:json|xml|yaml)\n(.*?)(?:^ *```|\Z)", r"\1"),
    (r"(?s)^[ \t]*(```|~~~).*?(?:^[ \t]*\1|\Z)", "\n"),
    (r"([\"'])(\w+)\1\s*:|(?<=: )\"([^\"\n]*)\"(?=\s*[,}\]])", r"\2\3:"),  # in JSON
    (r"\[result\]", "\nscore: "),
    (rf"\"{LONG.format(chr(34))}\"|(?<!\w)'(?!\d)[^'\n]*[\s:][^'\n]*'(?!\w)", " "),
    (r"(?<=[^\n`])`(?!\d)[^`\n]*[\s:][^`\n]*`|`(?!\d)[^`\n]*[\s:][^`\n]*`(?=[^\n`])", " "),
    (rf"{TEXTS}[^.\n]{{0,80}}?(?:{_any('quotes')}{COLON}\n?|{_any('lists')}{COLON}\n).*", ""),
    (rf"\b(?:for example|e\.g\.)[^\w\n]{{1,5}}(?:{NAMES}|\[\[).*", ""),
    (r"(?s)<!--.*?-->|~~.*?~~|<(sup|code|pre|blockquote|q|s|del)\b[^>]*>.*?</\1>", " "),
    (r"\[\^\w+\]|^[ \t]*>.*", " "),
    (r"\\[dt]?frac\{(\d+)\}\{(\d+)\}", r"\1/\2"),
    (r"\\(?:text|math)\w*\s*\{([^{}]*)\}", r"\1"),
    (r"\\boxed\s*\{([^{}]*)\}", r"[[\1]]"),
    (r"\$|\\(?=[^\w\s])|</?(?:b|i|u|em|strong|span)\b[^<>]*>", ""),
    (r"</?(?:p|br|div|li|ul|ol|t[drh]|h\d)\b[^<>]*>|</[\w-]+>", "\n"),
    (r"<([a-z][^<>\[\]\n]*)>", r"\n\1: "),
    (r"(?<![<>=-])[-=]{1,3}>", ":"),
    (
        r"^ *\|([^|\d\n]+)\|[^\d\n]*\n *\|[-:| ]+\| *\n *\|([^|\n]+)\|.*$(?!\n *\|)",
        r"\1: \2",
    ),  # a table
    (r"[*#`{}\"]|^[ \t]*[-•][ \t]+", ""),
    (r"([★⭐]+)(☆+)|[★⭐]{2,}", _stars),
    (r"(?-i:(?<=[a-z])(?=[A-Z]))|(?<=[a-z])_(?=[a-z])|_+", " "),
    (rf"({'|'.join(UNSPACED)})", r" \1 "),
    (r"[ \t|]+$|^[ \t|]+|[ \t]+(?=[ \t])", ""),
    (r"^\W*\n", ""),
    (ITEM, _item),
]


def plain(reply: str) -> str:
    """The lines of a reply that may state something, spelt in one way."""
    text = unicodedata.normalize("NFKC", reply.translate(SAME))
    text = re.sub(r"\d", lambda digit: str(int(digit[0])), text)
    for pattern, new in SPELLING:
        text = re.sub(f"(?im){pattern}", new, text)
    return text.strip()
