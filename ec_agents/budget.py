"""What a run may spend: tokens, money, seconds, calls.

A budget covers every step sampled inside it, in whatever task, thread or sub-agent: losing candidates, retries and
responses that were thrown away count too.
"""

import logging
import math
import threading
import time
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field, fields
from types import TracebackType
from typing import Self

from ec_agents.errors import BudgetExceeded, ConfigError

_log = logging.getLogger(__name__)

_OPEN: ContextVar[tuple["Budget", ...]] = ContextVar("ec_agents_budgets", default=())
_MODEL: ContextVar[str] = ContextVar("ec_agents_budget_model", default="")


@dataclass(frozen=True, slots=True, kw_only=True)
class Price:
    """Prices of a model per million tokens, in any currency.

    Raises:
        ConfigError: A price is negative or not a number.
    """

    input: float
    """Per million input tokens."""
    output: float
    """Per million output tokens, reasoning included."""
    cached: float | None = None
    """Per million input tokens read from the provider's cache; None: as ``input``."""

    def __post_init__(self) -> None:
        """Check the prices."""
        for item in fields(self):
            found = getattr(self, item.name)
            if found is not None and not _is_amount(found):
                raise ConfigError(f"price {item.name} must be 0 or more per million tokens; found {found!r}")

    def cost(self, usage: Mapping[str, int]) -> float:
        """Return the cost of a response."""
        cached = min(usage.get("cached_tokens", 0), usage.get("input_tokens", 0))
        fresh = usage.get("input_tokens", 0) - cached
        reading = self.input if self.cached is None else self.cached
        return (fresh * self.input + cached * reading + usage.get("output_tokens", 0) * self.output) / 1e6


@dataclass(slots=True, kw_only=True)
class Spent:
    """What was spent so far."""

    calls: int = 0
    """Requests sent, retries and hedges included."""
    responses: int = 0
    """Responses that came with their usage."""
    input_tokens: int = 0
    """Tokens of all prompts."""
    cached_tokens: int = 0
    """Those of them that the provider read from its cache."""
    output_tokens: int = 0
    """Tokens of all responses."""
    cost: float = 0.0
    """Cost of the responses whose model has a price."""
    unpriced: set[str] = field(default_factory=set[str])
    """Models without a price: the cost does not include them."""

    @property
    def tokens(self) -> int:
        """Input and output tokens together."""
        return self.input_tokens + self.output_tokens


class Budget:
    """Limit what everything inside may spend; a context manager, synchronous and asynchronous.

    When little is left, steps get fewer candidates; when nothing is left, no call is sent any more and
    ``BudgetExceeded`` is raised. Tokens and cost are known only when a response has arrived, so they are exceeded by
    the calls in flight at most. Of nested budgets the tightest holds.

    Args:
        tokens: Input and output tokens.
        cost: Money, in the currency of ``prices``.
        seconds: Time from entering the budget.
        calls: Requests sent.
        prices: Price of each model by its name; needed for ``cost``.

    Raises:
        ConfigError: A limit is out of range, there is none, or ``cost`` is given without ``prices``.

    Example:
        >>> from ec_agents import Budget
        >>> with Budget(calls=100) as budget:
        ...     ...  # run agents
        >>> budget.spent.calls
        0
    """

    def __init__(
        self,
        *,
        tokens: int | None = None,
        cost: float | None = None,
        seconds: float | None = None,
        calls: int | None = None,
        prices: Mapping[str, Price] | None = None,
    ) -> None:
        limits = {"tokens": tokens, "cost": cost, "seconds": seconds, "calls": calls}
        self.limits = {name: limit for name, limit in limits.items() if limit is not None}
        self.prices = dict(prices or {})
        _check(self.limits, self.prices)
        self.spent = Spent()
        self._lock = threading.Lock()
        self._in_flight = 0
        self._started: float | None = None

    @property
    def seconds(self) -> float:
        """Seconds since the budget was entered."""
        return 0.0 if self._started is None else time.monotonic() - self._started

    def affordable(self, n: int) -> int:
        """Return how many of ``n`` more calls the budget allows, by the mean cost of those before."""
        with self._lock:
            return int(min(n, *(self._room(name, limit) for name, limit in self.limits.items())))

    def _room(self, name: str, limit: float) -> float:
        """Return how many more calls fit one limit."""
        left = limit - self._used(name)
        if left <= 0 or name == "calls":
            return max(left, 0)
        if name == "seconds" or not self.spent.responses:
            return math.inf
        mean = self._used(name) / self.spent.responses
        # The last response may exceed the limit: one call is always allowed while something is left.
        return max(left / mean - self._in_flight, 0 if self._in_flight else 1) if mean else math.inf

    def _used(self, name: str) -> float:
        return self.seconds if name == "seconds" else getattr(self.spent, name)

    def exceeded(self) -> BudgetExceeded:
        """Return the error that says what was spent, and which limit ended it."""
        name = min(self.limits, key=lambda name: (self.limits[name] - self._used(name)) / self.limits[name])
        spent = self.spent
        return BudgetExceeded(
            f"the budget is spent: {self._used(name):g} of {self.limits[name]:g} {name}; in all {spent.calls} calls, "
            f"{spent.input_tokens} input and {spent.output_tokens} output tokens",
            name,
        )

    def began(self) -> None:
        """Count a call that is sent."""
        with self._lock:
            self.spent.calls += 1
            self._in_flight += 1

    def ended(self) -> None:
        """Count a call that is no longer in flight."""
        with self._lock:
            self._in_flight -= 1

    def pay(self, usage: Mapping[str, int] | None, model: str) -> None:
        """Count the tokens of a response."""
        if usage is None:
            return
        price = self.prices.get(model)
        with self._lock:
            is_news = price is None and "cost" in self.limits and model not in self.spent.unpriced
            if price is None:
                self.spent.unpriced.add(model)
            self.spent.responses += 1
            self.spent.input_tokens += usage.get("input_tokens", 0)
            self.spent.cached_tokens += usage.get("cached_tokens", 0)
            self.spent.output_tokens += usage.get("output_tokens", 0)
            self.spent.cost += 0.0 if price is None else price.cost(usage)
        if is_news:
            _log.warning("the cost of %s is unknown: add it to prices; its tokens and calls are counted", model or "?")

    def __enter__(self) -> Self:
        if self._started is None:
            self._started = time.monotonic()
        _OPEN.set((*_OPEN.get(), self))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        # By value: a budget may be entered in several tasks at once, and left in another order.
        outer, inner = list(_OPEN.get()), list[Budget]()
        while outer and (budget := outer.pop()) is not self:
            inner.append(budget)
        _OPEN.set((*outer, *reversed(inner)))

    async def __aenter__(self) -> Self:
        return self.__enter__()

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.__exit__(kind, error, traceback)


def affordable(n: int) -> int:
    """Return how many of ``n`` more calls all open budgets allow."""
    for budget in _OPEN.get():
        n = budget.affordable(n)
    return n


def exceeded() -> BudgetExceeded:
    """Return the error of the open budget that allows the fewest calls, the innermost of several."""
    return min(reversed(_OPEN.get()), key=lambda budget: budget.affordable(1)).exceeded()


def seconds_left() -> float:
    """Return the seconds that all open budgets leave."""
    return min((b.limits["seconds"] - b.seconds for b in _OPEN.get() if "seconds" in b.limits), default=float("inf"))


@contextmanager
def one_call() -> Generator[None]:
    """Count a call in all open budgets while it is in flight."""
    budgets = _OPEN.get()
    for budget in budgets:
        budget.began()
    try:
        yield
    finally:
        for budget in budgets:
            budget.ended()


def pay(usage: Mapping[str, int] | None) -> None:
    """Count the tokens of a response in all open budgets."""
    for budget in _OPEN.get():
        budget.pay(usage, _MODEL.get())


@contextmanager
def calls_of(model: str) -> Generator[None]:
    """Name the model of the calls inside, for its price."""
    token = _MODEL.set(model)
    try:
        yield
    finally:
        _MODEL.reset(token)


def _check(limits: Mapping[str, float], prices: Mapping[str, object]) -> None:
    if not limits:
        raise ConfigError("a Budget needs at least one limit: tokens, cost, seconds or calls")
    for name, limit in limits.items():
        whole = name in {"tokens", "calls"}
        if not _is_amount(limit) or not limit or (whole and not isinstance(limit, int)):
            raise ConfigError(f"{name} must be {'an integer ' if whole else ''}above 0; found {limit!r}")
    if "cost" in limits and not prices:
        raise ConfigError("cost needs prices={model name: Price(input=..., output=...)}")
    for model, price in prices.items():
        if not isinstance(price, Price):
            raise ConfigError(f"the price of {model!r} must be a Price(input=..., output=...); found {price!r}")


def _is_amount(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value < float("inf")
