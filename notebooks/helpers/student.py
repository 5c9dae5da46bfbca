"""The local student: counts, a frozen encoder's cosines, and a softmax head over the verdicts."""

import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from operator import itemgetter
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from llama_index.core.base.llms.types import CompletionResponse, LLMMetadata, LogProb
from llama_index.core.bridge.pydantic import PrivateAttr
from llama_index.core.llms import ChatMessage, ChatResponse, CustomLLM, MessageRole
from llama_index.core.llms.callbacks import llm_chat_callback
from numpy import ndarray

from .embeddings import embed
from .log import SHOWN

Item = tuple[str, ...]  # question, evidence (reference answer or context), answer to judge

SECTIONS = re.compile(
    r"## User Query\n(.*?)\n\n## (?:Reference Answer|Context)\n(.*?)\n\n"
    r"## Generated Answer\n(.*?)\n?\Z",
    re.S,
)
WORD = re.compile(r"[^\W_]+(?:['’][^\W_]+)*")
STOPWORDS = frozenset(
    "a an and are as at be been but by did do does for from had has have he her him his how i in "
    "into is it its no not of on or our she so than that the their them then there these they this "
    "to was we were what when where which while who whom whose why will with would you your".split()
)
FOLDS = 5


def read_prompt(messages: list[dict], sections: re.Pattern = SECTIONS) -> Item:
    """The texts of an evaluator's prompt; a ValueError if it does not have these `sections`."""
    text = next((message["content"] for message in messages if message["role"] == "user"), "")
    if not (match := sections.search(text)):
        raise ValueError(
            "a local judge reads CorrectnessEvaluator's prompt or SingleGradingEvaluator's, and a "
            f"local judge of pairs PairwiseComparisonEvaluator's; this one begins {text[:80]!r}"
        )
    return match.groups()


def items_of(rows: list[dict]) -> list[Item]:
    """The items of correctness rows, of single-grading rows (no reference), or of pairs."""
    items: list[Item] = []
    for row in rows:
        if "answers" in row:
            answers = [answer["text"] for answer in row["answers"]]
            items.append((row["question"], row["source"], *answers))
            continue
        answer = row["response_data"]
        items.append((row["question"], row.get("reference", answer.get("context")), answer["text"]))
    return items


def words(text: str) -> set[str]:
    """The distinct content words of a text, in lower case."""
    return set(WORD.findall(text.lower())) - STOPWORDS


def names(text: str) -> set[str]:
    """The distinct capitalised words of a text, in lower case."""
    return {word.lower() for word in WORD.findall(text) if word[0].isupper()} - STOPWORDS


def numbers(text: str) -> set[str]:
    """The distinct numbers of a text; a comma in a number is left out."""
    return set(re.findall(r"\d+(?:\.\d+)?", text.replace(",", "")))


def share(part: set, whole: set) -> float:
    """How much of a part is in the whole, 0 to 1; 1 of an empty part."""
    return len(part & whole) / len(part) if part else 1.0


def overlap(reference: str, answer: str) -> float:
    """F1 of the content words of two texts, 0 to 1."""
    wanted, given = words(reference), words(answer)
    return 2 * len(wanted & given) / (len(wanted) + len(given)) if wanted or given else 1.0


# What `lexical_features` counts, in its order.
COUNTS = (
    *(
        count.format(kind)
        for kind in ("words", "names", "numbers")
        for count in (
            "share of the reference's {} that the answer has",
            "share of the answer's {} that the reference has",
            "number of the reference's {} that the answer lacks",
            "number of the answer's {} that the reference lacks",
        )
    ),
    "F1 of the words",
    "length of the answer",
    "length of the answer, against that of the reference",
)


@lru_cache(maxsize=100_000)  # cross-validation asks for the same items over and over
def lexical_features(item: Item) -> tuple[float, ...]:
    """What can be counted: how much of the reference the answer holds, and how much besides."""
    question, reference, answer = item
    features: list[float] = []
    for kind in (words, names, numbers):
        # What the question itself says proves nothing, so it is left out of both sides.
        key, said = kind(reference) - kind(question), kind(answer) - kind(question)
        features += [share(key, said), share(said, key)]
        features += [np.log1p(len(key - said)), np.log1p(len(said - key))]
    wanted, given = (np.log1p(len(WORD.findall(text))) for text in (reference, answer))
    return (*features, overlap(reference, answer), given, given - wanted)


def _log_softmax(logits: ndarray) -> ndarray:
    from scipy.special import log_softmax

    return log_softmax(logits, axis=1)


def distillation_loss(
    weights: ndarray,
    x: ndarray,
    hard: ndarray,
    soft: ndarray,
    alpha: float = 1.0,
    temperature: float = 1.0,
    strength: float = 0.0,
) -> tuple[float, ndarray]:
    """Loss alpha * CE(hard label) + (1 - alpha) * T^2 * KL(teacher || student), and gradient.

    `weights` is a (features + 1, verdicts) matrix, flat. Its last row is the bias. The features `x`
    are (rows, features). The teacher's verdicts `hard`, one-hot, and its distributions `soft` are
    (rows, verdicts). T, the `temperature`, softens both distributions. A penalty is added:
    `strength` / 2 * the sum of the squared weights, without the bias. Loss and gradient, which is
    flat, are in nats a row.

    Source: Hinton, Vinyals, Dean 2015, "Distilling the Knowledge in a Neural Network"
    (arXiv:1503.02531).
    """
    w = weights.reshape(x.shape[1] + 1, hard.shape[1])
    logits = x @ w[:-1] + w[-1]
    log_student = _log_softmax(logits)
    loss = strength / 2 * (w[:-1] ** 2).sum() - alpha * (hard * log_student).sum() / len(x)
    error = alpha * (np.exp(log_student) - hard)
    if alpha < 1:
        log_student = _log_softmax(logits / temperature)
        teacher = soft ** (1 / temperature)
        teacher = teacher / teacher.sum(axis=1, keepdims=True)
        log_teacher = np.log(np.maximum(teacher, np.finfo(float).tiny))
        divergence = (teacher * (log_teacher - log_student)).sum() / len(x)
        loss += (1 - alpha) * temperature**2 * divergence
        error = error + (1 - alpha) * temperature * (np.exp(log_student) - teacher)
    error = error / len(x)
    gradient = np.concatenate([x.T @ error + strength * w[:-1], error.sum(axis=0, keepdims=True)])
    return loss, gradient.ravel()


def folds(items: list[Item]) -> list[tuple[ndarray, ndarray]]:
    """(train, held out) masks of each fold of cross-validation; the draw is seeded.

    Items with the same question stay together or, if all ask the same few questions, those with the
    same evidence. It is a ValueError if there are fewer of either than folds.
    """
    part = 0 if len({item[0] for item in items}) >= FOLDS else 1
    questions = list(dict.fromkeys(item[part] for item in items))
    if len(questions) < FOLDS:
        raise ValueError(
            f"{len(questions)} different questions (or references, contexts, sources) are too few "
            f"to learn from: at least {FOLDS}"
        )
    drawn = np.random.default_rng(0).permutation(len(questions)) % FOLDS
    fold_of = dict(zip(questions, drawn))
    fold = np.array([fold_of[item[part]] for item in items])
    return [(fold != k, fold == k) for k in range(FOLDS)]


def check_settings(alpha: float, temperature: float) -> None:
    """Raise ValueError where the loss is not defined."""
    if not 0 <= alpha <= 1:
        raise ValueError(f"alpha={alpha}: expected 0 to 1, the share of the hard labels")
    if not temperature > 0:
        raise ValueError(f"temperature={temperature}: expected above 0")


def fit_head(
    x: ndarray, hard: ndarray, soft: ndarray, ties: ndarray | None = None, **settings: float
) -> ndarray:
    """The weights, (features + 1, verdicts), that minimise `distillation_loss`: L-BFGS from zero.

    For `x`, `hard`, `soft` and `settings` see there. `ties`, (features + 1, verdicts), makes each
    row of the weights a number times its own row.
    """
    from scipy.optimize import minimize
    from threadpoolctl import threadpool_limits

    shape = x.shape[1] + 1, hard.shape[1]

    def weights(parameters: ndarray) -> ndarray:
        return parameters.reshape(shape) if ties is None else parameters[:, None] * ties

    def loss(parameters: ndarray) -> tuple[float, ndarray]:
        value, gradient = distillation_loss(weights(parameters), x, hard, soft, **settings)
        return value, gradient if ties is None else (gradient.reshape(shape) * ties).sum(axis=1)

    start = np.zeros(np.prod(shape) if ties is None else shape[0])
    options = {"maxiter": 1000, "ftol": 1e-12, "gtol": 1e-7}
    # The matrices are tiny. More BLAS threads wait for one another, at ten times the CPU time.
    with threadpool_limits(1, user_api="blas"):
        return weights(minimize(loss, start, jac=True, method="L-BFGS-B", options=options).x)


@dataclass
class Student:
    """A trained judge."""

    kinds: str  # of features that it uses
    mean: ndarray  # of each feature on the training rows
    scale: ndarray  # of each feature
    weights: ndarray  # of the head, (features + 1, verdicts)
    labels: ndarray  # the verdicts
    held_out: ndarray | None = None  # distribution of each training item when it was held out

    KINDS: ClassVar[tuple[str, ...]] = ("lexical", "similarity")
    STRENGTHS: ClassVar[tuple[float, ...]] = (0.01, 0.03, 0.1)
    LABELS: ClassVar[tuple[str, ...]] = ()  # if there are none, the scores of the training rows

    @classmethod
    def fit(
        cls,
        items: list[Item],
        verdicts: list | ndarray,
        soft: list[dict] | None = None,
        alpha: float = 1.0,
        temperature: float = 1.0,
        kinds: str | None = None,
    ) -> "Student":
        """Train on the teacher's verdicts: the score of each row, on any scale.

        Cross-validation on these items alone chooses the strength of the penalty and, unless one of
        KINDS is given, the `kinds` of features. `soft` has {score: probability} of each row; by
        default all of it is on the verdict. For `alpha` and `temperature` see `distillation_loss`.

        Raises:
            ValueError: alpha or temperature is out of range, there are no such kinds, or there is
                too little to learn from.
        """
        check_settings(alpha, temperature)
        if kinds not in (None, *cls.KINDS):
            raise ValueError(f"kinds={kinds!r}: expected one of {', '.join(cls.KINDS)}")
        if not items:
            raise ValueError("no rows to learn from")
        missing = [n for n, one in enumerate(verdicts) if one is None or one != one]
        if missing:
            raise ValueError(
                f"row {missing[0]} has no verdict of the teacher's (of {len(missing)} rows): leave "
                "such rows out"
            )
        if len(set(verdicts)) < 2:
            raise ValueError(
                f"all {len(items)} rows have the verdict {verdicts[0]}: nothing to learn"
            )
        soft = soft or [{verdict: 1.0} for verdict in verdicts]
        scores = [*verdicts, *(score for row in soft for score in row)]
        labels = np.array(cls.LABELS) if cls.LABELS else np.unique(scores)
        hard = (np.asarray(verdicts)[:, None] == labels).astype(float)
        shares = np.array([[row.get(label, 0.0) for label in labels.tolist()] for row in soft])

        def train(rows: Any, kinds: str, x: ndarray, strength: float) -> Student:
            x, ties = x[rows], cls._ties(x.shape[1])
            mean = x.mean(axis=0)
            if ties is not None:  # A feature that tells A from B is not centred: 0 is the middle.
                mean[ties[:-1].sum(axis=1) == 0] = 0
            scale = np.sqrt(((x - mean) ** 2).mean(axis=0))
            scale = np.where(scale > 1e-9, scale, 1.0)
            settings = {"alpha": alpha, "temperature": temperature, "strength": strength}
            weights = fit_head((x - mean) / scale, hard[rows], shares[rows], ties, **settings)
            return cls(kinds, mean, scale, weights, labels)

        tried: list[tuple] = []
        for kind in [kinds] if kinds else cls.KINDS:
            x = cls.featurize(items, kind)
            if len(items) < x.shape[1]:
                raise ValueError(
                    f"{len(items)} rows are too few to learn from: the student has {x.shape[1]} "
                    "features"
                )
            for strength in cls.STRENGTHS:
                unseen = np.empty(hard.shape)
                for learnt, held in folds(items):
                    unseen[held] = train(learnt, kind, x, strength)._predict(x[held])
                tried.append((cls._error(unseen, hard, labels), unseen, kind, x, strength))
        _, unseen, *chosen = min(tried, key=itemgetter(0))
        student = train(slice(None), *chosen)
        student.held_out = unseen
        return student

    # Another kind of judge overrides these three:

    @staticmethod
    def featurize(items: list[Item], kinds: str) -> ndarray:
        """Features, (items, features): "lexical" are counts; "similarity" adds three cosines."""
        counted = np.array([lexical_features(item) for item in items])
        if kinds == "lexical":
            return counted
        question, reference, answer = (embed([item[i] for item in items]) for i in range(3))
        pairs = (reference, answer), (question, answer), (question, reference)
        return np.column_stack([counted, *((one * other).sum(1) for one, other in pairs)])

    @staticmethod
    def _ties(features: int) -> ndarray | None:
        return None

    @staticmethod
    def _error(probabilities: ndarray, hard: ndarray, labels: ndarray) -> float:
        """What cross-validation makes small: the squared error of the expected score."""
        return float(((probabilities @ labels - hard @ labels) ** 2).sum())

    def _predict(self, x: ndarray) -> ndarray:
        z = (x - self.mean) / self.scale
        # Not z @ weights: BLAS may add up each column in another order, and then swapped answers
        # would not swap P(A) and P(B) to the bit.
        logits = (z[:, :, None] * self.weights[:-1]).sum(axis=1) + self.weights[-1]
        return np.exp(_log_softmax(logits))

    def probabilities(self, items: list[Item]) -> ndarray:
        """The student's distribution over `labels`, (items, verdicts)."""
        return self._predict(self.featurize(items, self.kinds))

    def scores(self, items: list[Item]) -> ndarray:
        """The expected score of each item, (items,), rounded to `_decimals`."""
        return np.round(self.probabilities(items) @ self.labels, _decimals(np.ptp(self.labels)))

    def llm(self, name: str = "local-student") -> "LocalJudge":
        """The student as a LlamaIndex LLM. It answers on the scale of the scores that it learnt."""

        def judge(item: Item) -> tuple[float, str, dict]:
            probabilities = self.probabilities([item])[0]
            likely = sorted(zip(-probabilities, self.labels))[:2]
            verdicts = " or ".join(f"{label:.1f} ({-p:.0%})" for p, label in likely)
            found = share(words(item[1]) - words(item[0]), words(item[2]))
            reason = (
                f"Most like answers that the teacher gave {verdicts}. Of what the reference adds "
                f"to the question, the answer has {found:.0%}, word for word."
            )
            distribution = dict(zip(self.labels.tolist(), probabilities.tolist()))
            return float(self.scores([item])[0]), reason, distribution

        return LocalJudge(judge, model_name=name, decimals=_decimals(np.ptp(self.labels)))

    def save(self, path: str | Path) -> None:
        """Write the student to an `.npz` file (the ending is added where it is missing)."""
        np.savez(path, **{name: part for name, part in vars(self).items() if name != "held_out"})

    @classmethod
    def load(cls, path: str | Path) -> "Student":
        """Read what `save` wrote. Nothing in the file is executed."""
        with np.load(str(path).removesuffix(".npz") + ".npz", allow_pickle=False) as file:
            return cls(**{**file, "kinds": str(file["kinds"])})


def _decimals(extent: float) -> int:
    """The decimals of a score on a scale of this extent. Further ones differ between machines."""
    return 1 if extent > 1 else 2


class LocalJudge(CustomLLM):
    """A function of (question, evidence, answer) as an LLM: it reads the judge's prompt.

    `judge` returns (score, reason), or (score, reason, {score: probability}). The last becomes the
    reply's log-probabilities.
    """

    model_name: str
    decimals: int = 1  # of the score in the reply
    sections: ClassVar[re.Pattern] = SECTIONS  # of the prompt
    _judge: Callable = PrivateAttr()

    def __init__(self, judge: Callable[[Item], tuple], **settings: Any) -> None:
        super().__init__(**settings)
        self._judge = judge

    @property
    def metadata(self) -> LLMMetadata:
        """The name, and that this is a chat model."""
        return LLMMetadata(model_name=self.model_name, is_chat_model=True)

    @llm_chat_callback()
    def chat(self, messages: list[ChatMessage], **kwargs: Any) -> ChatResponse:
        """The judge's reply to an evaluator's prompt; a ValueError if it is another prompt."""
        plain = [{"role": one.role.value, "content": one.content} for one in messages]
        item = read_prompt(plain, self.sections)  # also where the texts are known: it checks
        reply, distribution = self._reply(SHOWN.get() or item)
        tokens = [
            LogProb(token=f"{score:g}", logprob=float(np.log(p)))
            for score, p in distribution.items()
            if p > 0
        ]
        message = ChatMessage(role=MessageRole.ASSISTANT, content=reply)
        return ChatResponse(message=message, logprobs=[tokens] if tokens else None)

    def _reply(self, item: Item) -> tuple[str, dict]:
        score, reason, *distribution = self._judge(item)
        return f"{score:.{self.decimals}f}\n{reason}", distribution[0] if distribution else {}

    def complete(self, prompt: str, formatted: bool = False, **kwargs: Any) -> CompletionResponse:
        """As `chat`, for a prompt that is one text."""
        response = self.chat([ChatMessage(role=MessageRole.USER, content=prompt)])
        return CompletionResponse(text=response.message.content or "")

    def stream_complete(self, prompt: str, formatted: bool = False, **kwargs: Any) -> Any:
        """As `complete`, in one piece."""
        yield self.complete(prompt)
