"""The local student: a judge that anyone can train. Frozen encoder, lexical features, a softmax head over the verdicts."""

import re
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Callable

import numpy as np
from llama_index.core.base.llms.types import (
    ChatMessage,
    ChatResponse,
    CompletionResponse,
    LLMMetadata,
    LogProb,
    MessageRole,
)
from llama_index.core.bridge.pydantic import PrivateAttr
from llama_index.core.llms import CustomLLM
from llama_index.core.llms.callbacks import llm_chat_callback

from .embeddings import local_embedding

Item = tuple[
    str, str, str
]  # question, evidence (the reference answer, or the context), answer to judge

SECTIONS = re.compile(
    r"## User Query\n(.*?)\n\n## (?:Reference Answer|Context)\n(.*?)\n\n## Generated Answer\n(.*?)\n?\Z",
    re.S,
)
WORD = re.compile(r"[^\W_]+(?:['’][^\W_]+)*")
STOPWORDS = frozenset(
    "a an and are as at be been but by did do does for from had has have he her him his how i in into is it "
    "its no not of on or our she so than that the their them then there these they this to was we were what "
    "when where which while who whom whose why will with would you your".split()
)
FOLDS = 5


def read_prompt(messages: list[dict]) -> Item:
    """(question, evidence, answer) from the messages of a CorrectnessEvaluator or SingleGradingEvaluator prompt.

    Raises:
        ValueError: the prompt does not have the evaluators' three sections.
    """
    text = next((message["content"] for message in messages if message["role"] == "user"), "")
    if not (match := SECTIONS.search(text)):
        raise ValueError(
            "a local judge reads CorrectnessEvaluator's prompt, with the sections User Query, Reference Answer (or "
            f"Context) and Generated Answer; this one begins {text[:80]!r}"
        )
    return match.groups()


def items_of(rows: list[dict]) -> list[Item]:
    """The items of correctness rows or, where rows have no reference, of single-grading rows."""
    return [
        (
            row["question"],
            row["reference"] if "reference" in row else row["response_data"]["context"],
            row["response_data"]["text"],
        )
        for row in rows
    ]


def words(text: str) -> set[str]:
    """The distinct content words of a text, in lower case."""
    return set(WORD.findall(text.lower())) - STOPWORDS


def overlap(reference: str, answer: str) -> float:
    """F1 of the content words of two texts, 0 to 1."""
    wanted, given = words(reference), words(answer)
    return 2 * len(wanted & given) / (len(wanted) + len(given)) if wanted or given else 1.0


def embed(texts: list[str]) -> np.ndarray:
    """Unit vectors of the local encoder, shape (texts, 384)."""
    return np.array(local_embedding().get_text_embedding_batch(texts))


def _share(part: set, whole: set) -> float:
    return len(part & whole) / len(part) if part else 1.0


def _names(text: str) -> set[str]:
    return {word.lower() for word in WORD.findall(text) if word[0].isupper()} - STOPWORDS


def _numbers(text: str) -> set[str]:
    return set(re.findall(r"\d+(?:\.\d+)?", text.replace(",", "")))


@lru_cache(maxsize=100_000)  # cross-validation asks for the same items over and over
def lexical_features(item: Item) -> list[float]:
    """What can be counted: how much of the reference the answer holds, and how much it holds besides."""
    question, reference, answer = item
    asked, wanted, given = words(question), words(reference), words(answer)
    features = []
    for wanted_kind, given_kind, known in [
        (wanted, given, asked),
        (_names(reference), _names(answer), _names(question)),
        (_numbers(reference), _numbers(answer), _numbers(question)),
    ]:
        # What the question itself says proves nothing, so it is taken out of both sides.
        key, said = wanted_kind - known, given_kind - known
        features += [
            _share(key, said),
            _share(said, key),
            np.log1p(len(key - said)),
            np.log1p(len(said - key)),
        ]
    lengths = [len(WORD.findall(text)) for text in (reference, answer)]
    return features + [
        overlap(reference, answer),
        np.log1p(lengths[1]),
        np.log1p(lengths[1]) - np.log1p(lengths[0]),
    ]


def featurize(items: list[Item], kinds: str) -> np.ndarray:
    """Features of items, shape (items, features).

    `kinds`: "lexical", or "similarity", which adds the encoder's cosines of reference and answer, question and answer,
    question and reference.
    """
    columns = [np.array([lexical_features(item) for item in items])]
    if kinds != "lexical":
        question, reference, answer = (embed([item[i] for item in items]) for i in range(3))
        columns.append(
            np.stack(
                [
                    (reference * answer).sum(1),
                    (question * answer).sum(1),
                    (question * reference).sum(1),
                ],
                axis=1,
            )
        )
    return np.concatenate(columns, axis=1)


def _log_softmax(logits: np.ndarray) -> np.ndarray:
    from scipy.special import log_softmax

    return log_softmax(logits, axis=1)


def distillation_loss(
    weights: np.ndarray,
    x: np.ndarray,
    hard: np.ndarray,
    soft: np.ndarray,
    alpha: float = 1.0,
    temperature: float = 1.0,
    strength: float = 0.0,
) -> tuple[float, np.ndarray]:
    """alpha * CE(hard label) + (1 - alpha) * T^2 * KL(teacher || student), and its gradient.

    Args:
        weights: flat, of a (features + 1, verdicts) matrix; its last row is the bias.
        x: features, (rows, features).
        hard: the teacher's verdicts, one-hot, (rows, verdicts).
        soft: the teacher's distributions, (rows, verdicts), each row summing to 1.
        alpha: share of the hard labels; 1 is plain cross-entropy.
        temperature: T; both distributions are softened by it in the second term.
        strength: of the L2 penalty, strength / 2 * sum of squares, without the bias.

    Returns:
        (loss, gradient), in nats a row; the gradient has the shape of `weights`.

    Source: Hinton, Vinyals, Dean 2015, "Distilling the Knowledge in a Neural Network" (arXiv:1503.02531).
    """
    w = weights.reshape(x.shape[1] + 1, hard.shape[1])
    logits = x @ w[:-1] + w[-1]
    loss, error = strength / 2 * (w[:-1] ** 2).sum(), 0.0
    if alpha > 0:
        log_student = _log_softmax(logits)
        loss -= alpha * (hard * log_student).sum() / len(x)
        error = alpha * (np.exp(log_student) - hard)
    if alpha < 1:
        log_student = _log_softmax(logits / temperature)
        teacher = soft ** (1 / temperature)
        teacher = teacher / teacher.sum(axis=1, keepdims=True)
        log_teacher = np.log(np.maximum(teacher, np.finfo(float).tiny))
        loss += (
            (1 - alpha) * temperature**2 * (teacher * (log_teacher - log_student)).sum() / len(x)
        )
        error = error + (1 - alpha) * temperature * (np.exp(log_student) - teacher)
    error = error / len(x)
    gradient = np.concatenate([x.T @ error + strength * w[:-1], error.sum(axis=0, keepdims=True)])
    return loss, gradient.ravel()


def folds(items: list[tuple]) -> list[tuple[np.ndarray, np.ndarray]]:
    """(train, held out) masks of the folds of cross-validation, seeded; items with the same question on the same evidence, their first two
    parts, stay together.

    Raises:
        ValueError: there are not as many questions as folds.
    """
    questions = list(dict.fromkeys(item[:2] for item in items))
    if len(questions) < FOLDS:
        raise ValueError(
            f"{len(questions)} different questions (or references, contexts, sources) are too few to learn from: at least {FOLDS}"
        )
    fold = dict(zip(questions, np.random.default_rng(0).permutation(len(questions)) % FOLDS))
    fold = np.array([fold[item[:2]] for item in items])
    return [(fold != k, fold == k) for k in range(FOLDS)]


def check_settings(alpha: float, temperature: float) -> None:
    """Raise ValueError where the loss is not defined."""
    if not 0 <= alpha <= 1:
        raise ValueError(f"alpha={alpha}: expected 0 to 1, the share of the hard labels")
    if not temperature > 0:
        raise ValueError(f"temperature={temperature}: expected above 0")


def fit_head(
    x: np.ndarray,
    hard: np.ndarray,
    soft: np.ndarray,
    basis: np.ndarray | None = None,
    **settings: float,
) -> np.ndarray:
    """The weights, (features + 1, verdicts), that minimise `distillation_loss`; found by L-BFGS from zero.

    `basis`, (weights, parameters), ties weights together: the weights searched are basis @ parameters.
    """
    from scipy.optimize import minimize
    from threadpoolctl import threadpool_limits

    shape = x.shape[1] + 1, hard.shape[1]

    def loss(parameters: np.ndarray) -> tuple[float, np.ndarray]:
        if basis is None:
            return distillation_loss(parameters, x, hard, soft, **settings)
        value, gradient = distillation_loss(basis @ parameters, x, hard, soft, **settings)
        return value, basis.T @ gradient

    start = np.zeros(np.prod(shape) if basis is None else basis.shape[1])
    # The matrices are tiny: more BLAS threads would only wait for one another, and cost ten times the processor time.
    with threadpool_limits(1, user_api="blas"):
        found = minimize(
            loss,
            start,
            jac=True,
            method="L-BFGS-B",
            options={"maxiter": 1000, "ftol": 1e-12, "gtol": 1e-7},
        ).x
    return (found if basis is None else basis @ found).reshape(shape)


@dataclass
class Student:
    """A trained judge: `kinds` of features, their `mean` and `scale`, head `weights`, the verdicts' `labels`."""

    kinds: str
    mean: np.ndarray
    scale: np.ndarray
    weights: np.ndarray
    labels: np.ndarray
    held_out: np.ndarray | None = None

    KINDS = ("lexical", "similarity")
    STRENGTHS = (0.01, 0.03, 0.1)

    @classmethod
    def fit(
        cls,
        items: list[tuple],
        verdicts: list,
        soft: list[dict] | None = None,
        alpha: float = 1.0,
        temperature: float = 1.0,
    ) -> "Student":
        """Train on the teacher's verdicts.

        Feature kinds and strength are chosen by cross-validation on these items alone. Items with the same question stay together
        in it, so that nothing is held out of which a sibling is learnt. `held_out` of the trained student are the distributions
        that it gave each item when it was held out, (items, verdicts).

        Args:
            items: question, evidence and answer, a row each.
            verdicts: the teacher's score of each row, on any scale: the hard labels.
            soft: the teacher's distribution of each row, {score: probability}; by default all on its verdict.
            alpha, temperature: see `distillation_loss`.

        Raises:
            ValueError: alpha or temperature out of range, or too little to learn from.
        """
        check_settings(alpha, temperature)
        if missing := [
            number
            for number, verdict in enumerate(verdicts)
            if verdict != verdict or verdict is None
        ]:
            raise ValueError(
                f"row {missing[0]} has no verdict of the teacher's (of {len(missing)} rows): leave such rows out"
            )
        soft = soft or [{verdict: 1.0} for verdict in verdicts]
        if not items:
            raise ValueError("no rows to learn from")
        if len(set(verdicts)) < 2:
            raise ValueError(
                f"all {len(items)} rows have the verdict {verdicts[0]}: there is nothing to tell apart"
            )
        labels = cls._labels(verdicts, soft)
        hard = (np.asarray(verdicts)[:, None] == labels).astype(float)
        shares = np.array([[row.get(label, 0.0) for label in labels.tolist()] for row in soft])
        settings = {"alpha": alpha, "temperature": temperature}
        best = (np.inf, None, None, None, None)
        for kinds in cls.KINDS:
            x = cls.featurize(items, kinds)
            if len(items) < x.shape[1]:
                raise ValueError(
                    f"{len(items)} rows are too few to learn from: the student has {x.shape[1]} features"
                )
            for strength in cls.STRENGTHS:
                unseen = np.empty(hard.shape)
                for train, held in folds(items):
                    unseen[held] = cls._fit(
                        kinds, x[train], hard[train], shares[train], labels, strength, settings
                    )._predict(x[held])
                best = min(
                    best,
                    (cls._error(unseen, hard, labels), kinds, strength, x, unseen),
                    key=lambda choice: choice[0],
                )
        _, kinds, strength, x, unseen = best
        student = cls._fit(kinds, x, hard, shares, labels, strength, settings)
        student.held_out = unseen
        return student

    # What a kind of judge has of its own.

    @staticmethod
    def featurize(items: list[Item], kinds: str) -> np.ndarray:
        return featurize(items, kinds)

    @staticmethod
    def _labels(verdicts: list, soft: list[dict]) -> np.ndarray:
        return np.unique([*verdicts, *(score for row in soft for score in row)])

    @staticmethod
    def _standard(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(mean, scale) of the features."""
        return x.mean(axis=0), x.std(axis=0)

    @staticmethod
    def _basis(features: int) -> np.ndarray | None:
        return None

    @staticmethod
    def _error(probabilities: np.ndarray, hard: np.ndarray, labels: np.ndarray) -> float:
        """What cross-validation makes small: squared error of the expected score."""
        return float(((probabilities @ labels - hard @ labels) ** 2).sum())

    def _logits(self, z: np.ndarray) -> np.ndarray:
        return z @ self.weights[:-1] + self.weights[-1]

    # What all have in common.

    @classmethod
    def _fit(cls, kinds, x, hard, soft, labels, strength, settings) -> "Student":
        mean, scale = cls._standard(x)
        scale = np.where(scale > 1e-9, scale, 1.0)
        weights = fit_head(
            (x - mean) / scale, hard, soft, cls._basis(x.shape[1]), strength=strength, **settings
        )
        return cls(kinds, mean, scale, weights, labels)

    def _predict(self, x: np.ndarray) -> np.ndarray:
        return np.exp(_log_softmax(self._logits((x - self.mean) / self.scale)))

    def probabilities(self, items: list[tuple]) -> np.ndarray:
        """The student's distribution over `labels`, (items, verdicts)."""
        return self._predict(self.featurize(items, self.kinds))

    def scores(self, items: list[Item]) -> np.ndarray:
        """The expected score of each item under the student's distribution, shape (items,).

        To one decimal, or two where the labels lie within 1: finer ones would differ between machines, by float noise alone.
        """
        return np.round(self.probabilities(items) @ self.labels, self._decimals())

    def _decimals(self) -> int:
        return 1 if np.ptp(self.labels) > 1 else 2

    def llm(self, name: str = "local-student") -> "LocalJudge":
        """The student as a LlamaIndex LLM, for `CorrectnessEvaluator(llm=...)` and `SingleGradingEvaluator`. It answers on the
        scale of the scores that it learnt."""

        def judge(item: Item) -> tuple[float, str, dict]:
            probabilities = self.probabilities([item])[0]
            likely = sorted(zip(-probabilities, self.labels))[:2]
            verdicts = " or ".join(f"{label:.1f} ({-p:.0%})" for p, label in likely)
            found = _share(words(item[1]) - words(item[0]), words(item[2]))
            reason = (
                f"Most like answers that the teacher gave {verdicts}. Of what the reference adds to the question, the answer "
                f"has {found:.0%}, word for word."
            )
            return (
                float(self.scores([item])[0]),
                reason,
                dict(zip(self.labels.tolist(), probabilities.tolist())),
            )

        return LocalJudge(judge, model_name=name, decimals=self._decimals())

    def save(self, path: str | Path) -> None:
        """Write the student to an `.npz` file (the ending is added where it is missing)."""
        np.savez(path, **{name: value for name, value in vars(self).items() if name != "held_out"})

    @classmethod
    def load(cls, path: str | Path):
        """Read what `save` wrote; nothing in the file is executed."""
        with np.load(str(path).removesuffix(".npz") + ".npz", allow_pickle=False) as file:
            return cls(**{**{name: file[name] for name in file.files}, "kinds": str(file["kinds"])})


class LocalJudge(CustomLLM):
    """A function of (question, reference, answer) behind the face of an LLM: it reads the judge's prompt, and answers in form.

    Args:
        judge: returns (score, reason), or (score, reason, {score: probability}); the last becomes the reply's log-probabilities.
        model_name: its name.
        decimals: of the score in the reply. Finer ones would differ between machines, by float noise alone.
    """

    model_name: str
    decimals: int = 1
    _judge: Callable = PrivateAttr()

    def __init__(self, judge: Callable[[Item], tuple], **settings: Any) -> None:
        super().__init__(**settings)
        self._judge = judge

    @property
    def metadata(self) -> LLMMetadata:
        return LLMMetadata(model_name=self.model_name, is_chat_model=True)

    @llm_chat_callback()
    def chat(self, messages: list[ChatMessage], **kwargs: Any) -> ChatResponse:
        reply, distribution = self._reply(
            [{"role": m.role.value, "content": m.content} for m in messages]
        )
        tokens = [
            LogProb(token=f"{score:g}", logprob=float(np.log(p)))
            for score, p in distribution.items()
            if p > 0
        ]
        return ChatResponse(
            message=ChatMessage(role=MessageRole.ASSISTANT, content=reply),
            logprobs=[tokens] if tokens else None,
        )

    def _reply(self, messages: list[dict]) -> tuple[str, dict]:
        score, reason, *distribution = self._judge(read_prompt(messages))
        return f"{score:.{self.decimals}f}\n{reason}", distribution[0] if distribution else {}

    def complete(self, prompt: str, formatted: bool = False, **kwargs: Any) -> CompletionResponse:
        return CompletionResponse(
            text=self.chat([ChatMessage(role=MessageRole.USER, content=prompt)]).message.content
        )

    def stream_complete(self, prompt: str, formatted: bool = False, **kwargs: Any):
        yield self.complete(prompt)


def untrained_judges(constant: float, low: float = 1, high: float = 5) -> dict[str, LocalJudge]:
    """The judges that learn nothing, on a scale from `low` to `high`: the base student, and the trivial ones.

    - `base`: the encoder's cosine of evidence (reference or context) and answer, untrained.
    - `overlap`: F1 of the words of evidence and answer.
    - `longer`: the longer the better, full marks from 60 words on.
    - `constant`: always the same score (give it the training rows' median).
    """

    def scaled(share: float) -> float:
        return low + (high - low) * min(1.0, max(0.0, share))

    rules = {
        "base": lambda item: (
            scaled(float(np.dot(*embed([item[1], item[2]])))),
            "Cosine of the embeddings.",
        ),
        "overlap": lambda item: (scaled(overlap(item[1], item[2])), "Words in common."),
        "longer": lambda item: (scaled(len(WORD.findall(item[2])) / 60), "Length."),
        "constant": lambda item: (constant, "Always this."),
    }
    return {
        name: LocalJudge(rule, model_name=name, decimals=1 if high - low > 1 else 2)
        for name, rule in rules.items()
    }
