"""The judges that a student is set against: rules, the best single count, and who answered."""

from collections import Counter
from collections.abc import Callable
from functools import partial
from typing import ClassVar

import numpy as np

from .embeddings import embed
from .judge import ACCEPTABLE, lower_median
from .pair_metrics import are_pairs, verdicts_of
from .pairs import ANSWER_COUNTS, PairJudge, PairStudent, answer_features
from .student import (
    COUNTS,
    WORD,
    Item,
    LocalJudge,
    Student,
    _decimals,
    items_of,
    lexical_features,
    overlap,
)


def untrained_judges(constant: float, low: float = 1, high: float = 5) -> dict[str, LocalJudge]:
    """The judges that learn nothing, on a scale from `low` to `high`.

    `base` is the encoder's cosine of evidence (reference or context) and answer, `overlap` the F1
    of their words. `longer` gives full marks from 60 words on. `constant` always gives the same
    score (give it the training rows' median).
    """

    def scaled(part: float) -> float:
        return low + (high - low) * min(1.0, max(0.0, float(part)))

    rules: dict[str, Callable[[Item], tuple]] = {
        "base": lambda item: (scaled(np.dot(*embed([*item[1:]]))), "Cosine of the embeddings."),
        "overlap": lambda item: (scaled(overlap(*item[1:])), "Words in common."),
        "longer": lambda item: (scaled(len(WORD.findall(item[2])) / 60), "Length."),
        "constant": lambda item: (constant, "Always this."),
    }
    decimals = _decimals(high - low)
    return {
        name: LocalJudge(rule, model_name=name, decimals=decimals) for name, rule in rules.items()
    }


def untrained_pair_judges() -> dict[str, PairJudge]:
    """The pairwise judges that learn nothing. Where their rule finds both equal, it is a tie.

    `base` chooses the answer whose embedding is nearer the source's, `longer` and `shorter` the one
    with more or fewer words, `overlap` the one with more words in common with the source (F1), and
    `first` the one shown first.
    """
    rules: dict[str, Callable[[Item, int], float]] = {
        "base": lambda pair, i: np.dot(*embed([pair[1], pair[i]])),
        "longer": lambda pair, i: len(pair[i].split()),
        "shorter": lambda pair, i: -len(pair[i].split()),
        "overlap": lambda pair, i: overlap(pair[1], pair[i]),
        "first": lambda pair, i: -i,
    }

    def judge(name: str, pair: Item) -> tuple[str, str]:
        first, second = (rules[name](pair, i) for i in (2, 3))
        return "A" if first > second else "B" if second > first else "C", f"By rule: {name}."

    return {
        name: PairJudge(partial(judge, name), model_name=name)  # type: ignore[call-arg,arg-type]
        for name in rules
    }


class _OneCount(Student):
    """A student with a single feature: cross-validation chooses which of the COUNTS."""

    KINDS: ClassVar[tuple[str, ...]] = COUNTS
    STRENGTHS: ClassVar[tuple[float, ...]] = (0.001,)  # one feature can hardly be overfitted

    @staticmethod
    def featurize(items: list[Item], kinds: str) -> np.ndarray:
        """The count, (items, 1)."""
        return np.array([lexical_features(item) for item in items])[:, [COUNTS.index(kinds)]]


class _OneDifference(PairStudent):
    """A pair student with a single feature: the difference of one of the ANSWER_COUNTS."""

    KINDS: ClassVar[tuple[str, ...]] = ANSWER_COUNTS
    STRENGTHS: ClassVar[tuple[float, ...]] = (0.001,)

    @staticmethod
    def featurize(items: list[Item], kinds: str) -> np.ndarray:
        """The difference of the count, first answer minus second, (pairs, 1)."""
        place = ANSWER_COUNTS.index(kinds)
        counted = [
            [answer_features(q, s, answer)[place] for answer in pair] for q, s, *pair in items
        ]
        return -np.diff(counted, axis=1)

    @staticmethod
    def _ties(features: int) -> np.ndarray:
        return np.array([[1, -1, 0], [0, 0, 1]])


def best_feature(train: list[dict], teacher: str) -> Student:
    """The strongest single count of the student's own, as a judge.

    It is a student with one feature. The training rows choose the feature, as they choose the
    student's kinds of features: by cross-validation. The result's `kinds` is the feature's name,
    and its `llm()` is the judge.

    Args:
        train: correctness rows, single-grading rows or pairs; those on which the teacher reached no
            verdict are left out.
        teacher: the name of its evaluations.
    """
    scores, pairs = verdicts_of(train, teacher), are_pairs(train)
    kept = np.flatnonzero(~np.isnan(scores))
    items = items_of([train[number] for number in kept])
    if pairs:
        return _OneDifference.fit(items, [{1: "A", 0: "B"}.get(scores[at], "C") for at in kept])
    return _OneCount.fit(items, scores[kept])


def who_answered(
    train: list[dict], test: list[dict], teacher: str, *, name: str = "who_answered"
) -> list[dict]:
    """Return the test rows, each with one more evaluation: by a judge that sees only who answered.

    It knows what the teacher said of each model's answers in the training rows. For correctness
    rows its score is their mean. For single grading they are its distribution, with their lower
    median as the score. For pairs, it is the most frequent verdict on this pair of models, whatever
    their order, and a tie where two are equally frequent. A model (or a pair of models) that is not
    in the training rows is judged by all of these. An older evaluation of the same name is
    replaced.

    Raises:
        ValueError: a row does not name the model, or the teacher reached no verdict in training.
    """
    scores, pairs = verdicts_of(train, teacher), are_pairs(train)
    known: dict[tuple, list[float]] = {}
    for (models, turned), score in zip(_who(train), scores.tolist()):
        if score == score:
            known.setdefault(models, []).append(1 - score if turned else score)
            known.setdefault((), []).append(score)
    if not known:
        raise ValueError(f"{teacher!r} reached no verdict in any of the {len(train)} training rows")
    judged = []
    for row, (models, turned) in zip(test, _who(test)):
        seen = Counter(known.get(models, known[()]))
        evaluation: dict = {"llm": name, "text": f"By who answered: {' and '.join(models)}."}
        if pairs:
            (score, most), *others = seen.most_common()
            score = 0.5 if others and others[0][1] == most else score
            score = 1 - score if turned and models in known else score
            verdicts = {1.0: ["A", "B"], 0.0: ["B", "A"]}.get(score, ["C", "C"])
            evaluation |= {"score": score, "source": "original", "verdicts": verdicts}
            evaluation["winner"] = {1.0: 0, 0.0: 1}.get(score)
        elif "reference" in row:
            evaluation["score"] = float(np.mean(list(seen.elements())))
        else:
            shares = {score: count / seen.total() for score, count in sorted(seen.items())}
            score = lower_median(shares)
            evaluation |= {"score": score, "acceptable": score > ACCEPTABLE}
            evaluation["distribution"] = [list(share) for share in shares.items()]
        others = [old for old in row.get("evaluations", []) if old["llm"] != name]
        judged.append({**row, "evaluations": [*others, evaluation]})
    return judged


def _who(rows: list[dict]) -> list[tuple[tuple[str, ...], bool]]:
    """For each row: the sorted names of the models that answered, and whether that turned them."""
    found = []
    for number, row in enumerate(rows):
        answers = row["answers"] if "answers" in row else [row["response_data"]]
        if not all(answer.get("model") for answer in answers):
            raise ValueError(f"row {number} does not say which model answered (its field `model`)")
        models = tuple(answer["model"] for answer in answers)
        found.append((tuple(sorted(models)), models != tuple(sorted(models))))
    return found
