"""What calls cost: prices, the budget that a run keeps to, and the table after it."""

import asyncio
import json
import math
import re
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any

import pandas as pd
from llama_index.core.utils import get_tokenizer  # cl100k_base, which comes with LlamaIndex

from ..log import STAGE, CallLog, prompt_text
from ..settings import STAND_IN, RunStopped, cap, name_of, setting

Price = tuple[float, float]  # dollars per million tokens of prompt and of reply

MAX_TOKENS = 1024  # of a reply
THINKING_TOKENS = 4096  # more, for a model that reasons before it replies
# OpenAI's models that reason: the o-series, and GPT-5 and later except those named chat.
REASONING = re.compile(r"(?:[\w-]+/)?(?:ft:)?(?:o\d|gpt-(?:[5-9]|[12]\d)(?!\d))(?!.*-chat)")
# Dollars per million tokens of training, which genai-prices does not have. From oreateai.com
# (gpt-4.1, undated) and tokenmix.ai (gpt-4o-mini, April 2026), read in November 2026. See
# developers.openai.com/api/docs/pricing before you pay; PRICES adds to these.
TRAINING_PRICES = {"gpt-4.1": 25.00, "gpt-4o-mini": 3.00}
EPOCHS = 3  # of a fine-tuning job that names no other number
# The stand-ins' calls get these models' prices, so a replay shows what a live run would cost.
PRICED_AS = {
    "stand-in-teacher": "gpt-4.1",
    "stand-in-question-writer": "gpt-4.1-mini",
    "stand-in-answerer": "gpt-4.1-nano",
}
BATCH, BATCH_PRICE = "batch", 0.5  # a mark in a row's usage: from a batch, at half the price
# The longest prompt of the notebooks: three texts of MAX_TOKENS, or two chunks, and instructions.
PROMPT_TOKENS = 4096
MARGIN = 1.25  # another tokenizer may count this much more than ours

_budgets: weakref.WeakKeyDictionary = weakref.WeakKeyDictionary()


def reasons(model: str) -> bool:
    """Whether a model is one of OpenAI's that reason before they reply."""
    return bool(REASONING.match(name_of(model)))


def reply_cap(model: str) -> int:
    """The most tokens that a model may spend on a reply."""
    return MAX_TOKENS + (THINKING_TOKENS if reasons(model) else 0)


@lru_cache(maxsize=1)
def _given(text: str) -> dict[str, list[float]]:
    """{model: its prices} from PRICES: of prompt, of reply and perhaps of training."""
    given = {}
    for part in filter(None, map(str.strip, text.split(","))):
        model, _, figures = part.rpartition("=")
        try:
            prices = [float(figure) for figure in figures.split("/")]
            if not model.strip() or len(prices) not in (2, 3) or not min(prices) >= 0:
                raise ValueError("not two or three prices of a model")
        except ValueError as error:
            raise ValueError(
                f'PRICES: {part!r}: expected "model=0.15/0.60" or "model=0.15/0.60/3.00", dollars '
                "per million tokens of prompt, reply and training"
            ) from error
        given[model.strip()] = prices
    return given


def _of_family(table: dict, model: str) -> Any:
    """A model's entry. A dated id has that of its family, a fine-tuned one that of "ft:<base>"."""
    name = name_of(model)
    if name not in table and name.startswith("ft:"):
        name = ":".join(name.split(":")[:2])
    return table.get(name, table.get(re.sub(r"-\d{4}-\d{2}-\d{2}$", "", name)))


def price_of(model: str) -> Price | None:
    """Dollars per million tokens of prompt and of reply; None if they are not known.

    PRICES comes first, then genai-prices, an offline list. A model on this machine costs nothing.
    """
    if model.startswith("local:"):
        return 0.0, 0.0
    if given := _of_family(_given(setting("PRICES")), model):
        return given[0], given[1]
    return _listed_price(name_of(model))


@lru_cache
def _listed_price(name: str) -> Price | None:
    from genai_prices import Usage, calc_price  # half a second, only where prices are asked for

    try:
        price = calc_price(
            Usage(input_tokens=1000, output_tokens=1000), model_ref=name, provider_id="openai"
        )
    except LookupError:
        return None
    return float(price.input_price) * 1000, float(price.output_price) * 1000


def training_price_of(model: str) -> float | None:
    """Dollars per million tokens of training, None if it is not known."""
    given = {name: three[2] for name, three in _given(setting("PRICES")).items() if len(three) == 3}
    return _of_family(TRAINING_PRICES | given, model)


def training_dollars(model: str, tokens: int) -> float:
    """Dollars of so many tokens of training; NaN where the price is not known."""
    price = training_price_of(model)
    return math.nan if price is None else price * tokens / 1e6


def priced_as(log: CallLog, name: str) -> str:
    """The model whose price a logged name has: the model behind a persona or a stand-in."""
    if name.startswith(STAND_IN):
        known = (model for stand_in, model in PRICED_AS.items() if name.startswith(stand_in))
        return next(known, name)
    return log.models.get(name, name)


def dollars_of(price: Price | None, prompt: int, reply: int, usage: dict | None = None) -> float:
    """Dollars of so many tokens; NaN where the price is not known."""
    if price is None:
        return math.nan
    share = BATCH_PRICE if (usage or {}).get(BATCH) else 1
    return (price[0] * prompt + price[1] * reply) / 1e6 * share


def row_dollars(row: dict, model: str) -> float:
    """Dollars of a row of the log at a model's price; NaN where that is not known."""
    prompt, reply, _ = tokens_of(row)
    return dollars_of(price_of(model), prompt, reply, row["usage"])


def tokens_of(row: dict) -> tuple[int, int, bool]:
    """(prompt tokens, reply tokens, whether the provider reported them, or they were counted)."""
    usage = row["usage"] or {}
    prompt, reply = usage.get("prompt_tokens"), usage.get("completion_tokens", 0)
    if prompt is not None and reply is not None:
        return prompt, reply, True
    embedded = any(message["role"] == "input" for message in row["messages"])
    return prompt_tokens(row), 0 if embedded else len(get_tokenizer()(row["response"])), False


def prompt_tokens(call: dict) -> int:
    """The tokens of a call's messages: exact for OpenAI's models up to GPT-4, else a few % off."""
    return len(get_tokenizer()(prompt_text(call))) + 4 * len(call["messages"])


def no_price(model: str, training: bool = False) -> str:
    """What to set where BUDGET_DOLLARS has no price to go by."""
    name, third = name_of(model), "/3.00" if training else ""
    return (
        f"BUDGET_DOLLARS is set, and the price of {'training ' if training else ''}{name!r} is not "
        f'known: give it in PRICES, as "{name}=0.15/0.60{third}" (dollars per million tokens of '
        f"prompt, reply{' and training' if training else ''}; 0 if free)"
    )


def job_path(log: CallLog) -> Path:
    """Where a snapshot notes its fine-tuning job."""
    return log.path.with_name("finetuning_job.json")


def noted_job(log: CallLog) -> dict:
    """The fine-tuning job of a snapshot, {} if there is none."""
    path = job_path(log)
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}


def job_dollars(job: dict) -> float:
    """Dollars of a fine-tuning job and of those before it; NaN if a price is not known."""
    return sum(
        training_dollars(one["base_model"], one["tokens"])
        for one in [job, *job.get("earlier", [])]
        if one.get("tokens")
    )


class Budget:
    """What the rows of a log have cost, and what its calls under way may cost.

    A call reserves the most that it can cost before it is sent, so calls under way cannot pass the
    cap together. BUDGET_CALLS and BUDGET_DOLLARS are read at each call.
    """

    def __init__(self, log: CallLog) -> None:
        self.log = weakref.proxy(log)  # the log may go when its notebook lets it go
        self._rows, self._counted = 0.0, 0  # dollars of the rows so far, and where these end
        self._unpriced = False
        self._reserved: list[float] = []  # dollars of each call under way

    @classmethod
    def of(cls, log: CallLog) -> "Budget":
        """The budget of a log."""
        return _budgets.setdefault(log, cls(log))

    def spent(self) -> float:
        """Dollars of the log's rows and fine-tuning jobs. With a cap, all prices must be known."""
        for row in self.log.rows(self._counted):
            model = priced_as(self.log, row["model"])
            self._rows += self._known(model, row_dollars(row, model))
        self._counted, job = self.log.end, noted_job(self.log)
        return self._rows + (self._known(job["base_model"], job_dollars(job), True) if job else 0.0)

    def _known(self, model: str, dollars: float, training: bool = False) -> float:
        """The dollars; 0 where they are not known and there is no cap."""
        if math.isnan(dollars) and cap("BUDGET_DOLLARS"):
            raise RunStopped(no_price(model, training))
        self._unpriced |= math.isnan(dollars)
        return 0.0 if math.isnan(dollars) else dollars

    def __str__(self) -> str:
        return f", ${self.spent():.4f}{' and what has no price' * self._unpriced} so far"

    def _most(self, calls: tuple[dict, ...]) -> list[float]:
        """Dollars that each call can cost at most; 0 where there is no cap."""
        if not cap("BUDGET_DOLLARS"):
            return [0.0] * len(calls)
        models = [priced_as(self.log, call["model"]) for call in calls]
        return [
            self._known(
                model,
                dollars_of(price_of(model), int(MARGIN * prompt_tokens(call)), reply_cap(model)),
            )
            for model, call in zip(models, calls)
        ]

    def _refusal(self, calls: tuple[dict, ...]) -> str:
        """Why the budget does not allow these calls now; "" if it does."""
        most_calls, most_dollars = cap("BUDGET_CALLS"), cap("BUDGET_DOLLARS")
        if most_calls and len(self.log) + len(self._reserved) + len(calls) > most_calls:
            asked = f", and {len(calls)} more are asked for" if len(calls) > 1 else ""
            return f"the budget of {most_calls:g} calls is used up{asked} (BUDGET_CALLS)"
        need, so_far = sum(self._most(calls)), self.spent() + sum(self._reserved)
        if most_dollars is None or so_far + need <= most_dollars:
            return ""
        return (
            f"the budget of ${most_dollars:g} does not allow another call: ${so_far:.4f} is spent, "
            f"the next may cost ${need:.4f} (BUDGET_DOLLARS)"
        )

    async def room_for(self, *calls: dict) -> None:
        """While other calls are under way, wait until the budget allows these."""
        while self._reserved and self._refusal(calls):
            await asyncio.sleep(0.02)

    @contextmanager
    def reserved(self, *calls: dict) -> Iterator[None]:
        """Reserve the most that calls can cost, until they are answered; RunStopped if too much."""
        if stage := STAGE.get():
            stage.spent = self
        if why := self._refusal(calls):
            kept = "What was answered is kept; raise the cap and run again to go on."
            raise RunStopped(f"{why}. {kept}")
        self._reserved += (most := self._most(calls))
        try:
            yield
        finally:
            for dollars in most:
                self._reserved.remove(dollars)

    def allow_training(self, model: str, tokens: int) -> None:
        """RunStopped if the budget does not allow a fine-tuning job, or its price is not known."""
        if (most := cap("BUDGET_DOLLARS")) is None:
            return
        dollars = self._known(model, training_dollars(model, tokens), training=True)
        if self.spent() + dollars > most:
            raise RunStopped(
                f"the budget of ${most:g} does not allow the fine-tuning job: ${self.spent():.4f} "
                f"is spent, and {tokens:,} tokens of training cost ${dollars:.4f} "
                "(BUDGET_DOLLARS). Raise the cap and run again to go on."
            )


def cost_table(log: CallLog) -> pd.DataFrame:
    """What the calls of this run cost when they were recorded; the last line is their sum.

    Returns:
        A row a stage and model. Columns: calls; prompt and reply tokens, and whether the provider
        reported or the project counted them; the model whose price was taken; and dollars, NaN
        where no price is known. A row of the log belongs to the first stage that used it; rows
        that this run did not use have a line of their own.
    """
    stage_of = {key: place for place, keys in log.used.items() for key in keys}
    lines = []
    for row in log.rows():
        unused = "(not used by this run)", row["model"]
        stage, model = stage_of.get(row["key"], unused)
        prompt, reply, reported = tokens_of(row)
        priced = priced_as(log, model)
        dollars = row_dollars(row, priced)
        lines.append((stage, model, 1, prompt, reply, reported, priced, dollars))
    if job := noted_job(log):
        jobs, base, reported = (
            [job, *job["earlier"]],
            job["base_model"],
            bool(job["trained_tokens"]),
        )
        trained = sum(one["tokens"] for one in jobs)
        line = "fine-tuning", base, len(jobs), trained, 0, reported, base, job_dollars(job)
        lines.append(line)
    names = ["stage", "model", "calls", "prompt tokens", "reply tokens", "tokens", "priced as", "$"]
    table = pd.DataFrame(lines, columns=names)
    if table.empty:
        return table
    sums = dict.fromkeys(names[2:5], "sum")
    table = table.groupby(["stage", "model"], sort=False).agg(
        {**sums, "tokens": "mean", "priced as": "first", "$": lambda part: part.sum(skipna=False)}
    )
    table["tokens"] = table["tokens"].map({0.0: "counted", 1.0: "reported"}).fillna("some counted")
    order = [place for place in log.used if place in table.index]
    table = table.loc[order + [place for place in table.index if place not in log.used]]
    total = table[[*sums, "$"]].sum(skipna=False)
    table.loc[("in all", ""), :] = {**total, "tokens": "", "priced as": ""}
    return table.astype(dict.fromkeys(sums, int)).round({"$": 4})
