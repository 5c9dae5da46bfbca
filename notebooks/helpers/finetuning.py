"""Fine-tune: judgements -> chats to learn from -> engines that learn."""

import json
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pandas as pd
from llama_index.core.instrumentation import get_dispatcher
from llama_index.core.instrumentation.event_handlers import BaseEventHandler
from llama_index.core.instrumentation.events.llm import LLMChatEndEvent
from llama_index.core.llms import LLM

from .calls import ROW
from .judging import read_score
from .snapshots import DamagedFile, load_rows, write_text
from .student import Student, read_prompt

ROLES = ["system", "user", "assistant"]
MIN_EXAMPLES = 10  # OpenAI refuses smaller files
EPOCHS = 3
# US dollars per million tokens of training. Source: developers.openai.com/api/docs/pricing, as of April 2026. OpenAI takes
# no new fine-tuning jobs after 2027-01-06, and none since 2026-05-07 from accounts that had none before.
TRAINING_PRICES = {"gpt-4.1": 25.00, "gpt-4.1-mini": 5.00, "gpt-4.1-nano": 1.50, "gpt-4o-mini": 3.00}


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
        events += [{"messages": [{"role": m.role.value, "content": m.content} for m in chat], "row": key[0]}
                   for key, chat in sorted(recorder.chats.items(), key=lambda item: item[0][0])]


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
        well_formed = isinstance(messages, list) and all(isinstance(message, dict) for message in messages)
        roles = [message.get("role") for message in messages] if well_formed else messages
        if roles != ROLES:
            raise DamagedFile(f"{path}, line {number}: expected messages of the roles {', '.join(ROLES)}; found {roles}")
        for message in messages:
            if not isinstance(message.get("content"), str) or not message["content"].strip():
                raise DamagedFile(f"{path}, line {number}: the {message['role']} message is empty")
    if len(events) < least:
        raise DamagedFile(f"{path}: {len(events)} examples, expected at least {least}")
    return events


def count_tokens(events: list[dict]) -> list[int]:
    """Training tokens of each chat, counted as OpenAI's fine-tuning guide does (3 a message, 3 for the reply, and the texts)."""
    from llama_index.core.utils import get_tokenizer

    tokenize = get_tokenizer()  # cl100k_base, which ships with LlamaIndex; other OpenAI encodings come within a few per cent
    return [3 + sum(3 + len(tokenize(m["role"])) + len(tokenize(m["content"])) for m in event["messages"]) for event in events]


def training_cost(events: list[dict], epochs: int = EPOCHS) -> pd.DataFrame:
    """What uploading these chats would cost. A row a model: tokens over all epochs, the price per million, dollars."""
    tokens = sum(count_tokens(events)) * epochs
    return pd.DataFrame([{"model": model, "tokens": tokens, "$ per million": price, "$": round(tokens * price / 1e6, 2)}
                         for model, price in TRAINING_PRICES.items()]).set_index("model")


@dataclass
class LocalJob:
    """What `get_current_job` returns: the fields of OpenAI's FineTuningJob that a local run has."""

    status: str
    model: str
    training_file: str
    trained_examples: int
    features: str
    verdicts: list[float]


class LocalFinetuneEngine:
    """Trains the local student on a fine-tuning file; the face of llama-index-finetuning's OpenAIFinetuneEngine.

    Args:
        base_model: "minilm", the one encoder there is.
        data_path: the JSONL that would be uploaded to OpenAI.
        alpha: share of the hard labels in the loss (see `distillation_loss`).
    """

    def __init__(self, base_model: str = "minilm", data_path: str | Path = "", alpha: float = 1.0) -> None:
        if base_model != "minilm":
            raise ValueError(f"base_model={base_model!r}: the local engine has 'minilm' only")
        self.data_path, self.alpha = data_path, alpha
        self.student: Student | None = None
        self._job: LocalJob | None = None

    def finetune(self) -> None:
        """Check the file and train on it, here and now."""
        items, scores = [], []
        for number, event in enumerate(check_events(self.data_path), 1):
            score, reason = read_score(event["messages"][-1]["content"])
            if score is None:
                raise DamagedFile(f"{self.data_path}, line {number}: cannot learn from the reply: {reason}")
            try:
                items.append(read_prompt(event["messages"]))
            except ValueError as error:
                raise DamagedFile(f"{self.data_path}, line {number}: {error}") from error
            scores.append(score)
        self.student = Student.fit(items, scores, alpha=self.alpha)
        self._job = LocalJob("succeeded", "minilm", Path(self.data_path).name, len(items), self.student.kinds,
                             self.student.labels.tolist())

    def get_current_job(self) -> LocalJob:
        """The finished job."""
        if self._job is None:
            raise ValueError("call finetune() first")
        return self._job

    def get_finetuned_model(self) -> LLM:
        """The trained student, as an LLM that judges."""
        self.get_current_job()
        return self.student.llm()
