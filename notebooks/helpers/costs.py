"""What calls cost: before a run at most, while it runs against its budget, and after it from the recorded usage."""

import asyncio
import contextvars
import json
import math
import re
from collections import Counter
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import pandas as pd
from llama_index.core.utils import (
    get_tokenizer,
)  # by default cl100k_base, which ships with LlamaIndex

from .models import reply_cap, unreachable
from .settings import LOCAL, ROLES, STAND_IN, RunStopped, name_of, number, setting, terminal
from .snapshots import STAGE, CallLog, prompt_text

# US dollars per million tokens of prompt and reply: OpenAI's list as deploybase.ai (March 2026) and losclouds.com (April 2026) give it,
# which agree; then of training, from oreateai.com (gpt-4.1, undated) and tokenmix.ai (gpt-4o-mini, April 2026). All read in November
# 2026, and other pages differ: see developers.openai.com/api/docs/pricing before you pay. PRICES adds to these and overrides them.
PRICES = {"gpt-4.1": (2.00, 8.00), "gpt-4.1-mini": (0.40, 1.60), "gpt-4.1-nano": (0.10, 0.40)}
TRAINING_PRICES = {"gpt-4.1": 25.00, "gpt-4o-mini": 3.00}
EPOCHS = 3  # of a fine-tuning job, where it is not said otherwise
# What the stand-ins' calls are priced as, so that a replay of the bundled snapshot tells what a live run would have cost.
PRICED_AS = {
    "stand-in-teacher": "gpt-4.1",
    "stand-in-question-writer": "gpt-4.1-mini",
    "stand-in-answerer": "gpt-4.1-nano",
}
BATCH, BATCH_PRICE = (
    "batch",
    0.5,
)  # in a row's usage: it was answered by the Batch API; its share of the price
# The longest prompt that the notebooks make: three texts of MAX_TOKENS at most, or a chunk or two of 256, and the instructions.
PROMPT_TOKENS = 4096
MARGIN = 1.25  # what another tokenizer may make of a prompt, over ours


def caps() -> tuple[float | None, float | None]:
    """The budget: the most calls and the most dollars, None where there is no cap."""
    return number("BUDGET_CALLS"), number("BUDGET_DOLLARS")


@dataclass
class Meter:
    """Of a stage, for its progress bar: how many calls failed, and what the log's calls have cost so far; and its budget."""

    failed: int = 0
    ledger: "Ledger | None" = None
    caps: tuple | None = None  # as the stage found them

    def __str__(self) -> str:
        spent = (
            f", ${self.ledger.spent():.4f}{' and what has no price' if self.ledger.unpriced else ''} so far"
            if self.ledger
            else ""
        )
        return f"{self.failed} failed{spent}"


METER = contextvars.ContextVar("meter", default=Meter())  # of the stage that is running


@lru_cache(maxsize=1)
def _given(text: str) -> dict[str, list[float]]:
    """{model: its prices} as PRICES says: prompt, reply and perhaps training."""
    given = {}
    for part in filter(None, map(str.strip, text.split(","))):
        model, _, figures = part.rpartition("=")
        try:
            given[model.strip()] = [float(figure) for figure in figures.split("/")]
            assert (
                model.strip()
                and len(given[model.strip()]) in (2, 3)
                and min(given[model.strip()]) >= 0
            )
        except (ValueError, AssertionError) as error:
            raise ValueError(
                f'PRICES: {part!r}: expected "model=0.15/0.60" or "model=0.15/0.60/3.00", dollars per million tokens of prompt, '
                "reply and training"
            ) from error
    return given


def _of_family(table: dict, model: str) -> Any:
    """A model's entry; a dated id has that of its family, and a fine-tuned one that of "ft:" and its base."""
    name = name_of(model)
    if name not in table and name.startswith("ft:"):
        name = ":".join(name.split(":")[:2])
    return table.get(name, table.get(re.sub(r"-\d{4}-\d{2}-\d{2}$", "", name)))


def price_of(model: str) -> tuple[float, float] | None:
    """Dollars per million tokens of prompt and of reply, None if they are not known; a model on this machine costs nothing."""
    given = _given(setting("PRICES"))
    return (
        (0.0, 0.0)
        if model.startswith("local:")
        else _of_family(PRICES | {name: tuple(prices[:2]) for name, prices in given.items()}, model)
    )


def training_price_of(model: str) -> float | None:
    """Dollars per million tokens of training, None if it is not known."""
    return _of_family(
        TRAINING_PRICES
        | {name: given[2] for name, given in _given(setting("PRICES")).items() if len(given) == 3},
        model,
    )


def priced_as(log: CallLog, name: str) -> str:
    """The model whose price a logged name has: without a persona, and for a stand-in a real one."""
    if name.startswith(STAND_IN):
        return next(
            (model for stand_in, model in PRICED_AS.items() if name.startswith(stand_in)), name
        )
    return log.models.get(name, name)


def tokens_of(row: dict) -> tuple[int, int, bool]:
    """(prompt tokens, reply tokens, whether the provider reported them) of a row of the log; what is not reported is counted."""
    usage = row["usage"] or {}
    reported = usage.get("prompt_tokens"), usage.get("completion_tokens", 0)
    if None not in reported:
        return *reported, True
    embedded = any(message["role"] == "input" for message in row["messages"])
    return prompt_tokens(row), 0 if embedded else len(get_tokenizer()(row["response"])), False


def prompt_tokens(call: dict) -> int:
    """The tokens of a call's messages, counted: exact for OpenAI's models up to GPT-4, a few per cent off for others."""
    return len(get_tokenizer()(prompt_text(call))) + 4 * len(call["messages"])


def _dollars(
    price: tuple[float, float], prompt: int, reply: int, usage: dict | None = None
) -> float:
    return (
        (price[0] * prompt + price[1] * reply)
        / 1e6
        * (BATCH_PRICE if (usage or {}).get(BATCH) else 1)
    )


def _no_price(model: str, training: bool = False) -> str:
    return (
        f"BUDGET_DOLLARS is set, and the price of {'training ' * training}{name_of(model)!r} is not known: give it in PRICES, as "
        f'"{name_of(model)}=0.15/0.60{"/3.00" * training}" (dollars per million tokens of prompt, reply{" and training" * training}; 0 if free)'
    )


def job_path(log: CallLog) -> Path:
    """Where a snapshot keeps its fine-tuning job."""
    return log.path.with_name("finetuning_job.json")


def noted_job(log: CallLog) -> dict:
    """The fine-tuning job of a snapshot, {} if there is none."""
    return json.loads(job_path(log).read_text(encoding="utf-8")) if job_path(log).exists() else {}


def job_cost(job: dict) -> float | None:
    """Dollars of a fine-tuning job and of those before it; None if a price is not known."""
    parts = [
        (training_price_of(one["base_model"]), one["tokens"])
        for one in [job, *job.get("earlier", [])]
        if one.get("tokens")
    ]
    return (
        None
        if any(price is None for price, _ in parts)
        else sum(price * tokens for price, tokens in parts) / 1e6
    )


class Ledger:
    """What the calls of a log came to, by stage and in all, and what may still be spent. `CallLog` has one.

    A call reserves the most that it can cost before it is sent, so that calls under way together cannot pass the cap. One that does
    not fit waits until those under way have settled, and only then stops the run.
    """

    def __init__(self, log: CallLog) -> None:
        self._log = log
        self.used: dict[
            tuple[str, str], dict[bytes, None]
        ] = {}  # (stage, logged name) -> keys of its rows, by first use
        self._seen: set[bytes] = set()
        self.dollars: float | None = None  # of all rows with a known price, once it is asked for
        self.unpriced = False  # whether a price was missing
        self.asking: dict[
            tuple, asyncio.Lock
        ] = {}  # (event loop, key) -> held by the call that asks
        self._reserved: dict[str, float] = {}  # key -> dollars
        self._waiting: list[asyncio.Future] = []

    def use(self, row: dict) -> None:
        """Note that the running stage used a row."""
        if (key := bytes.fromhex(row["key"])) not in self._seen:
            self._seen.add(key)
            self.used.setdefault((STAGE.get(), row["model"]), {})[key] = None

    def spent(self) -> float:
        """Dollars that the log's rows have cost, as far as their prices are known. With BUDGET_DOLLARS they must be."""
        if self.dollars is None:
            training = job_cost(job := noted_job(self._log))
            if training is None and number("BUDGET_DOLLARS") is not None:
                raise RunStopped(_no_price(job["base_model"], training=True))
            self.unpriced |= training is None
            self.dollars = sum(map(self._cost, self._log.rows())) + (training or 0.0)
        return self.dollars

    def _price(self, name: str) -> tuple[float, float]:
        price = price_of(model := priced_as(self._log, name))
        if price is None and number("BUDGET_DOLLARS") is not None:
            raise RunStopped(_no_price(model))
        self.unpriced |= price is None
        return price or (0.0, 0.0)

    def _cost(self, row: dict) -> float:
        price = self._price(row["model"])
        return _dollars(price, *tokens_of(row)[:2], row["usage"]) if any(price) else 0.0

    def most(self, call: dict) -> float:
        """Dollars that a call can cost at most."""
        model, price = priced_as(self._log, call["model"]), self._price(call["model"])
        return _dollars(price, math.ceil(MARGIN * prompt_tokens(call)), reply_cap(model))

    def try_to_reserve(self, key: str, call: dict) -> str | None:
        """Reserve a call's cost; or say why the budget does not allow it."""
        self.spent()  # added up before the first call is under way, so that no row is counted twice
        calls, dollars = METER.get().caps or caps()
        if calls is not None and len(self._log) + len(self._reserved) >= calls:
            return f"the budget of {calls:g} calls is used up (BUDGET_CALLS)"
        most = self.most(call) if dollars is not None else 0.0
        if (
            dollars is not None
            and (so_far := self.spent() + sum(self._reserved.values())) + most > dollars
        ):
            return f"the budget of ${dollars:g} does not allow another call: ${so_far:.4f} is spent, the next may cost ${most:.4f} (BUDGET_DOLLARS)"
        self._reserved[key] = most
        return None

    def reserve(self, key: str, call: dict) -> None:
        """Reserve a call's cost.

        Raises:
            RunStopped: the budget does not allow it.
        """
        if why := self.try_to_reserve(key, call):
            raise RunStopped(
                f"{why}. What was answered is kept; raise the cap and run again to go on."
            )

    async def admit(self, key: str, call: dict) -> None:
        """As `reserve`, but while calls are under way, wait for what they leave."""
        while self.try_to_reserve(key, call):
            if not self._reserved:
                self.reserve(key, call)
                return
            self._waiting.append(settled := asyncio.get_running_loop().create_future())
            await settled

    def allow_training(self, model: str, tokens: int) -> None:
        """Check that the budget allows a fine-tuning job.

        Raises:
            RunStopped: it does not, or the price is not known.
        """
        if (cap := number("BUDGET_DOLLARS")) is None:
            return
        if (price := training_price_of(model)) is None:
            raise RunStopped(_no_price(model, training=True))
        if self.spent() + price * tokens / 1e6 > cap:
            raise RunStopped(
                f"the budget of ${cap:g} does not allow the fine-tuning job: ${self.spent():.4f} is spent, and {tokens:,} tokens "
                f"of training cost ${price * tokens / 1e6:.4f} (BUDGET_DOLLARS). Raise the cap and run again to go on."
            )

    def settle(self, key: str, row: dict | None) -> None:
        """Give back what a call reserved, and count what its row cost (None: it was not answered)."""
        self._reserved.pop(key, None)
        meter = METER.get()
        meter.ledger = self
        if row is None:
            meter.failed += 1
        elif self.dollars is not None:
            self.dollars += self._cost(row)
        waiting, self._waiting = self._waiting, []
        for one in waiting:
            if not one.done():
                one.set_result(None)


def cost_table(log: CallLog) -> pd.DataFrame:
    """What the calls of this run cost when they were recorded, by stage and model; the last line is their sum.

    Columns: calls; prompt and reply tokens, and whether the provider reported or the project counted them; the model whose price was
    taken, and dollars, NaN where no price is known. A row is counted in the first stage that used it; what the log holds
    besides (recorded by an earlier form of the run) has a line of its own.
    """
    stage_of = {key: place for place, keys in log.ledger.used.items() for key in keys}
    lines: dict = {place: Counter() for place in log.ledger.used}
    for row in log.rows():
        place = stage_of.get(bytes.fromhex(row["key"]), ("(not used by this run)", row["model"]))
        prompt, reply, reported = tokens_of(row)
        price = price_of(priced_as(log, row["model"]))
        lines.setdefault(place, Counter()).update(
            {
                "calls": 1,
                "prompt tokens": prompt,
                "reply tokens": reply,
                "reported": reported,
                "$": float("nan")
                if price is None
                else _dollars(price, prompt, reply, row["usage"]),
            }
        )
    table = pd.DataFrame(
        [
            {
                "stage": stage,
                "model": model,
                "calls": line["calls"],
                "prompt tokens": line["prompt tokens"],
                "reply tokens": line["reply tokens"],
                "tokens": "reported"
                if line["reported"] == line["calls"]
                else "counted"
                if not line["reported"]
                else "some counted",
                "priced as": priced_as(log, model),
                "$": line["$"],
            }
            for (stage, model), line in lines.items()
        ]
    )
    if table.empty:
        return table
    if job := noted_job(log):
        jobs, training = [job, *job["earlier"]], job_cost(job)
        line = {
            "stage": "fine-tuning",
            "model": job["base_model"],
            "calls": len(jobs),
            "prompt tokens": sum(one["tokens"] for one in jobs),
            "reply tokens": 0,
            "tokens": "reported" if job.get("trained_tokens") else "counted",
            "priced as": job["base_model"],
            "$": float("nan") if training is None else training,
        }
        table = pd.concat([table, pd.DataFrame([line])], ignore_index=True)
    total = {
        "stage": "in all",
        **table[["calls", "prompt tokens", "reply tokens"]].sum(),
        "$": table["$"].sum(skipna=False),
    }
    table = pd.concat([table, pd.DataFrame([total])], ignore_index=True).fillna(
        {"model": "", "tokens": "", "priced as": ""}
    )
    return (
        table.astype({"calls": int, "prompt tokens": int, "reply tokens": int})
        .round({"$": 4})
        .set_index(["stage", "model"])
    )


def check_run(
    log: CallLog, models: dict[str, str], calls: dict[str, int], examples: int = 0
) -> pd.DataFrame:
    """Before the first call: which models will be asked, and what that can cost at most. A run that records is stopped here if a key is
    missing, a model cannot be reached, or the budget has no price to go by.

    Args:
        models: by role, as `models_of` gives them.
        calls: by role, the most calls that the run makes of it.
        examples: how many chats a hosted student would be fine-tuned on.

    Returns:
        A row a role: model, calls at most (those that the log has already among them), tokens at most (PROMPT_TOKENS a prompt, and
        `reply_cap` a reply; a training example is both, EPOCHS times), the model whose price is taken, dollars at most (NaN where no
        price is known), and whether its endpoint answered.

    Raises:
        RunStopped: says for each role what is wrong and how to mend it.
    """
    recording, wrong, lines, reached = setting("JUDGE_MODE") == "record", [], [], {}
    for role, most in calls.items():
        model = models[role]
        if model == LOCAL:
            continue
        if recording and model not in reached:
            reached[model] = unreachable(model)
        if why := reached.get(model):
            wrong.append(f"{ROLES[role]} ({role}): {why}")
        alias = priced_as(log, name_of(model)) if model.startswith(STAND_IN) else model
        tokens, price = PROMPT_TOKENS + reply_cap(alias), price_of(alias)
        if role == "student":  # half of its calls are the fine-tuned model's, which is dearer
            price = price_of(f"ft:{name_of(model)}")
            alias = f"ft:{name_of(model)}"
        parts = [
            (
                role,
                most,
                most * tokens,
                None if price is None else most * _dollars(price, PROMPT_TOKENS, reply_cap(alias)),
                alias,
                False,
            )
        ]
        if role == "student" and examples:
            training, trained = training_price_of(model), EPOCHS * examples * tokens
            parts.append(
                (
                    "student, fine-tuning",
                    1,
                    trained,
                    None if training is None else training * trained / 1e6,
                    model,
                    True,
                )
            )
        for name, count, most_tokens, dollars, priced, training in parts:
            if recording and dollars is None and number("BUDGET_DOLLARS") is not None:
                wrong.append(f"{ROLES[role]} ({name}): {_no_price(priced, training)}")
            lines.append(
                {
                    "role": name,
                    "model": name_of(model),
                    "calls at most": count,
                    "tokens at most": most_tokens,
                    "priced as": name_of(priced),
                    "$ at most": float("nan") if dollars is None else dollars,
                    "endpoint": "answers" if model in reached else "not asked",
                }
            )
    if wrong:
        raise RunStopped(
            "this run cannot start:\n" + "\n".join(f"  {line}" for line in dict.fromkeys(wrong))
        )
    table = pd.DataFrame(
        lines,
        columns=[
            "role",
            "model",
            "calls at most",
            "tokens at most",
            "priced as",
            "$ at most",
            "endpoint",
        ],
    )
    total = {
        "role": "in all",
        **table[["calls at most", "tokens at most"]].sum(),
        "$ at most": table["$ at most"].sum(skipna=False),
    }
    if recording and terminal():
        print(
            f"at most {total['calls at most']:,} calls, {total['tokens at most']:,} tokens and "
            f"{'an unknown price' if math.isnan(total['$ at most']) else format(total['$ at most'], '.2f') + ' dollars'}",
            file=terminal(),
            flush=True,
        )
    table = pd.concat([table, pd.DataFrame([total])], ignore_index=True).fillna(
        {"model": "", "priced as": "", "endpoint": ""}
    )
    return (
        table.astype({"calls at most": int, "tokens at most": int})
        .round({"$ at most": 2})
        .set_index("role")
    )
