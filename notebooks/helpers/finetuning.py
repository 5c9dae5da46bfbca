"""Fine-tune: judgements -> chats to learn from -> engines that learn."""

import json
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
from llama_index.core.instrumentation import get_dispatcher
from llama_index.core.instrumentation.event_handlers import BaseEventHandler
from llama_index.core.instrumentation.events.llm import LLMChatEndEvent
from llama_index.core.llms import LLM
from llama_index.core.utils import get_tokenizer

from .calls import ROW
from .costs import EPOCHS, TRAINING_PRICES, job_path, noted_job, training_price_of
from .grading import lower_median
from .models import live
from .pairs import PROMPT, PairStudent, read_pair_prompt
from .replies import read_score, read_verdict
from .settings import LOCAL, name_of, served_like
from .snapshots import CallLog, DamagedFile, load_rows, write_text
from .student import Student, check_settings, read_prompt

ROLES = ["system", "user", "assistant"]
MIN_EXAMPLES = 10  # OpenAI refuses smaller files


class _Recorder(BaseEventHandler):
    chats: dict  # in the order of ending; the key holds the messages by identity, the value keeps them alive

    @classmethod
    def class_name(cls) -> str:
        return "finetuning_recorder"

    def handle(self, event, **kwargs) -> None:
        if isinstance(event, LLMChatEndEvent) and event.response is not None:
            # OpenAIFineTuningHandler, where it is in use too, has put the reply into the caller's list.
            asked = [message for message in event.messages if message is not event.response.message]
            # An LLM that wraps another reports the same messages twice, first the inner, then the outer: one chat.
            self.chats[ROW.get(), *map(id, asked)] = [*asked, event.response.message]


@contextmanager
def finetuning_events():
    """Collect every finished LLM chat of the block: `with finetuning_events() as events: await judge_rows(...)`.

    An event is {"messages": system, user and assistant, "row": the row it belongs to}. However the calls interleave, the
    events come out by row, and within a row in the order in which they were asked. A failed call leaves no event.
    LlamaIndex's own OpenAIFineTuningHandler keeps the order of starting, breaks on a failed call, and cannot be told apart
    from the students' calls once it is set globally.
    """
    dispatcher, recorder, events = get_dispatcher(), _Recorder(chats={}), []
    dispatcher.add_event_handler(recorder)
    try:
        yield events
    finally:
        dispatcher.event_handlers.remove(recorder)
        events += [
            {
                "messages": [{"role": m.role.value, "content": m.content} for m in chat],
                "row": key[0],
            }
            for key, chat in sorted(recorder.chats.items(), key=lambda item: item[0][0])
        ]


def readable_events(events: list[dict], low: float = 1, high: float = 5) -> list[dict]:
    """The chats whose reply holds a score from `low` to `high`: what cannot be read cannot be learnt from."""
    return [
        event
        for event in events
        if read_score(event["messages"][-1]["content"], low, high)[0] is not None
    ]


def save_events(path: str | Path, events: list[dict]) -> None:
    """Write chats as an OpenAI fine-tuning file, line for line as OpenAIFineTuningHandler does."""
    write_text(path, "\n".join(json.dumps({"messages": event["messages"]}) for event in events))


def check_events(path: str | Path, least: int = MIN_EXAMPLES) -> list[dict]:
    """Read a fine-tuning file and check it: system, user and assistant in each line, each with text, and enough lines.

    Raises:
        DamagedFile: says which line, and what was expected.
    """
    events = load_rows(path)
    for number, event in enumerate(events, 1):
        messages = event.get("messages")
        well_formed = isinstance(messages, list) and all(
            isinstance(message, dict) for message in messages
        )
        roles = [message.get("role") for message in messages] if well_formed else messages
        if roles != ROLES:
            raise DamagedFile(
                f"{path}, line {number}: expected messages of the roles {', '.join(ROLES)}; found {roles}"
            )
        for message in messages:
            if not isinstance(message.get("content"), str) or not message["content"].strip():
                raise DamagedFile(f"{path}, line {number}: the {message['role']} message is empty")
    if len(events) < least:
        raise DamagedFile(f"{path}: {len(events)} examples, expected at least {least}")
    return events


def resolve_pairwise_events(
    events: list[dict], rows: list[dict], both_orders: bool = False
) -> list[dict]:
    """From the chats of both orders, those to learn from: of each row, the chat of the order that decided it.

    Rows without a verdict (the orders contradict, or one is invalid) give none. An event finds its row and order by what its
    prompt shows, never by counting: so retries, failures and concurrency shift nothing.

    Args:
        events: chats with PairwiseComparisonEvaluator's prompt, in any number and order; from `finetuning_events` or a file.
        rows: pairwise rows, whose first evaluation is the teacher's.
        both_orders: keep the other order's chat too, where the row has a verdict (swap augmentation).

    Returns:
        The chats, in the order of the rows.

    Raises:
        ValueError: an event belongs to no row, or a row lacks the chat that decided it.

    Source: the original pairwise notebook, which pairs events by even and odd numbers.
    """
    places: dict = {}
    for number, row in enumerate(rows):
        first, second = (answer["text"] for answer in row["answers"])
        places.setdefault((row["question"], row["source"], first, second), []).append(
            (number, "original")
        )
        places.setdefault((row["question"], row["source"], second, first), []).append(
            (number, "flipped")
        )
    chats = {}
    for number, event in enumerate(events):
        waiting = places.get(read_pair_prompt(event["messages"]))
        if not waiting:
            raise ValueError(
                f"event {number} belongs to none of the rows (or a row's chat stands there more than twice)"
            )
        chats[waiting.pop(0)] = event
    kept = []
    for number, row in enumerate(rows):
        source = row["evaluations"][0]["source"]
        if source not in ("original", "flipped"):
            continue
        if (number, source) not in chats:
            raise ValueError(
                f"row {number} was decided by its {source} order, but the events hold no such chat"
            )
        orders = [source] + [
            order for order in ("original", "flipped") if order != source and both_orders
        ]
        kept += [chats[number, order] for order in orders if (number, order) in chats]
    return kept


def count_tokens(events: list[dict]) -> list[int]:
    """Training tokens of each chat, counted as OpenAI's fine-tuning guide does (3 a message, 3 for the reply, and the texts)."""
    tokenize = (
        get_tokenizer()
    )  # cl100k_base, which ships with LlamaIndex; other OpenAI encodings come within a few per cent
    return [
        3
        + sum(3 + len(tokenize(m["role"])) + len(tokenize(m["content"])) for m in event["messages"])
        for event in events
    ]


def training_cost(events: list[dict], epochs: int = EPOCHS) -> pd.DataFrame:
    """What uploading these chats would cost. A row a model: tokens over all epochs, the price per million, dollars."""
    tokens = sum(count_tokens(events)) * epochs
    prices = {model: training_price_of(model) for model in TRAINING_PRICES}
    return pd.DataFrame(
        [
            {
                "model": model,
                "tokens": tokens,
                "$ per million": price,
                "$": round(tokens * price / 1e6, 2),
            }
            for model, price in prices.items()
        ]
    ).set_index("model")


@dataclass
class LocalJob:
    """What `get_current_job` returns: the fields of OpenAI's FineTuningJob that a local run has."""

    status: str
    model: str
    training_file: str
    trained_examples: int
    features: str
    verdicts: list


def majority(distribution: dict[str, float]) -> str:
    """The likeliest verdict; of several that are equally likely, a tie."""
    likeliest = [verdict for verdict, p in distribution.items() if p == max(distribution.values())]
    return likeliest[0] if len(likeliest) == 1 else "C"


class LocalFinetuneEngine:
    """Trains the local student on a fine-tuning file; the face of llama-index-finetuning's OpenAIFinetuneEngine.

    Args:
        base_model: "minilm", the one encoder there is.
        data_path: the JSONL that would be uploaded to OpenAI.
        alpha, temperature: of the loss (see `distillation_loss`). Where a prompt stands in the file more than once, as it does if
            the teacher was sampled several times, the replies are its distribution; the hard label is their lower median, or the verdict of most (`majority`).
        scale: the ends of the teacher's scale, where it gave scores.
    """

    def __init__(
        self,
        base_model: str = "minilm",
        data_path: str | Path = "",
        alpha: float = 1.0,
        temperature: float = 1.0,
        scale: tuple[float, float] = (1, 5),
    ) -> None:
        if base_model != LOCAL:
            raise ValueError(f"base_model={base_model!r}: the local engine has {LOCAL!r} only")
        check_settings(alpha, temperature)
        self.data_path, self.alpha, self.temperature, self.scale = (
            data_path,
            alpha,
            temperature,
            scale,
        )
        self.student: Student | PairStudent | None = None
        self._job: LocalJob | None = None

    def finetune(self) -> None:
        """Check the file and train on it, here and now. Whether it holds scores or pairs, its first prompt tells."""
        events = check_events(self.data_path)
        pairs = bool(PROMPT.search(events[0]["messages"][1]["content"]))
        read_input = read_pair_prompt if pairs else read_prompt
        samples: dict = {}  # what the teacher said to each prompt
        for number, event in enumerate(events, 1):
            reply = event["messages"][-1]["content"]
            label, reason = read_verdict(reply) if pairs else read_score(reply, *self.scale)
            if label is None:
                raise DamagedFile(
                    f"{self.data_path}, line {number}: cannot learn from the reply: {reason}"
                )
            try:
                samples.setdefault(read_input(event["messages"]), []).append(label)
            except ValueError as error:
                raise DamagedFile(f"{self.data_path}, line {number}: {error}") from error
        soft = [
            {label: said.count(label) / len(said) for label in said} for said in samples.values()
        ]
        hard = [(majority if pairs else lower_median)(distribution) for distribution in soft]
        self.student = (PairStudent if pairs else Student).fit(
            list(samples), hard, soft, self.alpha, self.temperature
        )
        self._job = LocalJob(
            "succeeded",
            LOCAL,
            Path(self.data_path).name,
            len(events),
            self.student.kinds,
            self.student.labels.tolist(),
        )

    def get_current_job(self) -> LocalJob:
        """The finished job."""
        if self._job is None:
            raise ValueError("call finetune() first")
        return self._job

    def get_finetuned_model(self) -> LLM:
        """The trained student, as an LLM that judges."""
        self.get_current_job()
        return self.student.llm()


def hosted_students(
    model: str, data_path: str | Path, log: CallLog, **settings: Any
) -> dict[str, LLM]:
    """A hosted model to compare the local student with: {"hosted": fine-tuned on the file, "hosted_base": as it was}, both in front of the
    log; {} if `model` is "minilm", and none is wanted.

    A run that records or collects starts the job and waits for it. The job is noted in `finetuning_job.json` beside the log as soon as it
    is started, so an interrupted run picks it up by its id; for another model or another file a new one is started. A replay needs the
    note only.

    Args:
        model: of the role "student" (see `models_of`).
        settings: `validation_path`, `suffix`, `seed`, `hyperparameters` of `HostedFinetuneEngine`.

    Raises:
        FinetuningFailed: the job was refused, failed or cancelled; the next run starts a new one.
        RunStopped: the budget does not allow it, or it has not ended in time.
    """
    if model == LOCAL:
        return {}
    if log.mode == "replay":
        job = noted_job(log)
        if not job.get("fine_tuned_model"):
            raise FileNotFoundError(
                f"{job_path(log)}: no fine-tuned model of {model!r} was recorded; run with JUDGE_MODE=record"
            )
    else:
        from .hosted import finetune_or_pick_up

        job = finetune_or_pick_up(model, data_path, log, settings)
    return {
        name: log.llm(id, live(served_like(id, model)), params={"temperature": 0})
        for name, id in (("hosted", job["fine_tuned_model"]), ("hosted_base", name_of(model)))
    }
