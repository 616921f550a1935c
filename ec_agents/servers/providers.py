"""Stage 2 - know: what a server can return; refuse early what cannot work.

The table, ``providers.toml``, is a prior. The first response of each endpoint, with and without tools, is verified, and
the verdict is remembered.
"""

import re
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache, lru_cache
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal, cast
from urllib.parse import urlsplit

import msgspec
import numpy as np

from ec_agents.candidates import Candidate
from ec_agents.errors import UnsupportedLogprobs
from ec_agents.servers.redaction import sdk_clients

Covered = Literal["all", "partial", "none", "unknown"]

_WITHOUT = "or pass top_logprobs=None to sample without measuring"
_ENOUGH_COVERED = 0.9
_CERTAIN = 1e-6
"""Nats; the entropy of a token whose alternatives are all impossible is at most this."""
_BELIEVED = 600.0
"""Seconds."""
CONCORDANT = 3
"""Responses that have to agree before it is believed that something cannot be measured."""
_BY_CHANCE = 1e-4
"""Probability below which equal responses are not taken for chance."""
_MANY = 20
"""Tokens; fewer say nothing about a distribution."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Capabilities:
    """What one provider or server does with a request for log-probabilities."""

    provider: str
    """Key of the provider: ``openai``, ``vllm``, …"""
    name: str
    """Its name in messages."""
    models: str = ""
    """Regular expression that the model's name starts with."""
    status: Literal["supported", "ignored", "rejected", "unknown"]
    """``ignored``: nothing comes back, without an error."""
    k_max: int | None = None
    """Most alternatives; 0: only the sampled token; None: set by the server."""
    n_max: int | None = None
    """Most candidates in one request; None: set by the server."""
    tool_tokens: Literal["all", "none", "unknown"] = "unknown"
    """Whether the tokens of tool calls are covered."""
    reasoning_tokens: Literal["merged", "separate", "none", "unknown"] = "unknown"
    """Whether the tokens of reasoning are covered, among the others or in a field of their own."""
    distribution: Literal["raw", "temperature", "top_p", "server", "unknown"] = "unknown"
    """What the numbers describe: the model, or what is left after temperature or top-p; ``server``: its option."""
    sentinel: float | None = None
    """Stands for "impossible" or "unknown"."""
    json_schema: Literal["yes", "no", "unknown"] = "unknown"
    """Whether ``response_format`` takes a JSON schema."""
    must: Mapping[str, Any] = field(default_factory=dict[str, Any])
    """Parameters that have to be set so."""
    may_only: Mapping[str, Any] = field(default_factory=dict[str, Any])
    """Parameters that, if set, have to be set so."""
    needs_reasoning: bool = False
    """Whether the reasoning of earlier answers has to be sent back in a tool loop."""
    limitation: str
    """What does not work, in words."""
    remedy: str
    """What to do about it."""
    confidence: Literal["high", "medium", "low"]
    """How sure the row is."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Endpoint:
    """Where a model is served."""

    provider: str
    """Key of the provider; ``""`` if it is not known."""
    base_url: str
    """Base URL, or the provider's key where the client has its own."""
    model: str
    """Name of the model."""

    @property
    def capabilities(self) -> Capabilities | None:
        """What the table says, if it says anything."""
        return capabilities(self.provider, self.model)


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """What the first responses of an endpoint showed."""

    usable: bool
    """Whether there is anything to measure."""
    coverage: float | None
    """Least share of the reported output tokens that has log-probabilities; None if no usage is reported."""
    n_alternatives: int
    """Most alternatives of a token."""
    tool_tokens: Covered
    """Whether the tokens of tool calls are covered."""
    answers: int = 1
    """How many responses it rests on."""
    problems: Mapping[str, str]
    """Name of each problem → what was found: ``missing``, ``alternatives``, ``coverage``, ``sentinels``, ``sums``,
    ``identical``, ``degenerate``."""


@dataclass(frozen=True, slots=True)
class _Table:
    hosts: Mapping[str, str]
    classes: Mapping[str, str]
    unverified: Mapping[str, str]
    row: tuple[Capabilities, ...]


@cache
def table() -> _Table:
    """Read the table: ``row``, and which ``hosts`` and classes belong to which provider.

    The tests run every class in ``classes`` against a server of its form, and none of those in ``unverified``.
    """
    return msgspec.toml.decode(Path(__file__).with_suffix(".toml").read_bytes(), type=_Table)


@lru_cache(maxsize=256)
def capabilities(provider: str, model: str = "") -> Capabilities | None:
    """The first row of the provider that fits the model; a maker's prefix like ``openai/`` does not matter."""
    name = model.lower().rsplit("/", 1)[-1]
    return next((row for row in table().row if row.provider == provider and re.match(row.models, name)), None)


def provider_of(base_url: str) -> str:
    """Return the key of the provider that serves a base URL; ``""`` if it is not known."""
    try:
        parts = urlsplit(base_url if "//" in base_url else f"//{base_url}")
        host, port = parts.hostname or "", f":{parts.port}"
    except ValueError:
        return ""
    return next((name for known, name in _hosts() if known.fullmatch(host)), table().hosts.get(port, ""))


@cache
def _hosts() -> list[tuple[re.Pattern[str], str]]:
    """The hosts of the table; ``*`` stands for anything within a label, and any labels may come before."""
    names = {host: re.escape(host).replace(re.escape("*"), "[^.]*") for host in table().hosts}
    return [(re.compile(f"(.+[.])?{names[host]}"), provider) for host, provider in table().hosts.items()]


def provider_of_client(client: object) -> str:
    """Return the key of the provider that a client of the OpenAI SDK is made for; ``""`` if it is for several."""
    return _by_class(client) or provider_of(str(getattr(client, "base_url", "")))


def _by_class(owner: object) -> str:
    known = _providers_of_classes()
    return next((known[kind.__name__] for kind in type(owner).__mro__ if kind.__name__ in known), "")


@cache
def _providers_of_classes() -> Mapping[str, str]:
    return {**table().classes, **table().unverified}


def endpoint_of(model: object) -> Endpoint | None:
    """Return where a LangChain chat model sends its requests; None if it does not say.

    Looks at the class name, the clients of the OpenAI SDK and the attributes of the model, so that no integration has
    to be installed.
    """
    known = getattr(model, "endpoint", None)
    if isinstance(known, Endpoint):
        return known
    clients = sdk_clients(model)
    owners: list[object] = [model, *clients]
    provider: str = next((found for owner in owners if (found := _by_class(owner))), "")
    urls = [url for client in clients for url in _texts(client, "base_url")]
    urls += _texts(model, "openai_api_base", "azure_endpoint", "base_url", "api_base", "endpoint_url")
    base_url = next(iter(urls), provider)
    if not base_url:
        return None
    name = next(iter(_texts(model, "model_name", "model", "model_id", "deployment_name")), "")
    return Endpoint(provider=provider or provider_of(base_url), base_url=base_url.rstrip("/"), model=name)


def refuse_unsupported(
    endpoint: Endpoint,
    *,
    top_logprobs: int,
    tools: bool,
    options: Mapping[str, Any] = MappingProxyType({}),
    learned: bool = True,
) -> None:
    """Stop a request whose response could not be measured before it is sent.

    Args:
        endpoint: Where it would go.
        top_logprobs: Alternatives that it would ask for.
        tools: Whether it would carry tools, so that the answer may be a tool call.
        options: Its other parameters.
        learned: Whether earlier responses count, besides the table.

    Raises:
        UnsupportedLogprobs: It cannot work; the message names the limitation and the remedy.
    """
    known, verdict = endpoint.capabilities, verdict_on(endpoint, tools=tools)
    if verdict is not None and learned:
        _refuse_by_verdict(endpoint, verdict, tools=tools)
    if known is None:
        return
    if verdict is None and known.status in ("rejected", "ignored"):
        raise _unsupported(endpoint, known.limitation)
    if verdict is None and tools and known.tool_tokens == "none":
        raise _unsupported(endpoint, known.limitation)
    if known.k_max == 0:
        raise _unsupported(endpoint, known.limitation)
    if known.k_max is not None and top_logprobs > known.k_max:
        raise _unsupported(endpoint, f"at most {known.k_max} alternatives, and {top_logprobs} are asked for")
    for name, needed in {**known.must, **known.may_only}.items():
        found = options.get(name)
        if found != needed and (found is not None or name in known.must):
            raise _unsupported(endpoint, f"{name}={needed!r} is needed; found {found!r}; {known.limitation}")


def verify(candidates: Sequence[Candidate], *, top_logprobs: int) -> Verdict | None:
    """What responses show about their endpoint; None if they show nothing: no text, no action, no log-probabilities.

    One that has only reasoning, because the token limit cut it off, shows as much as any other.

    Args:
        candidates: Responses of one endpoint, to the same request.
        top_logprobs: Alternatives that were asked for.
    """
    sound = [c for c in candidates if "refused" not in c.flaws]
    answered = [c for c in sound if c.content or c.tool_calls]
    telling = [c for c in sound if c.content or c.tool_calls or c.signals]
    if not telling:
        return None
    k = max((c.signals.n_alternatives for c in telling if c.signals), default=0)
    measured = [c for c in telling if c.signals]
    coverages = [share for c in telling if (share := _coverage(c)) is not None]
    found = {
        "missing": None if len(measured) == len(telling) else _missing(telling),
        "alternatives": f"{k} alternatives per token, {top_logprobs} were asked for" if 0 < k < top_logprobs else None,
        "coverage": _too_little(min(coverages, default=1)) if measured else None,
        "identical": identical(answered),
        "degenerate": _degenerate(measured),
        "sentinels": _sentinels(measured),
        "sums": _sums(measured),
    }
    return Verdict(
        usable=k > 1,
        coverage=min(coverages, default=None),
        n_alternatives=k,
        tool_tokens=_tool_tokens(telling),
        answers=sum(bool(c.tool_calls) for c in telling) or len(telling),
        problems={name: text for name, text in found.items() if text},
    )


_verdicts: dict[tuple[str, str, bool], tuple[Verdict, float]] = {}
_without_schemas: dict[tuple[str, str], float] = {}


def verdict_on(endpoint: Endpoint, *, tools: bool) -> Verdict | None:
    """Return what responses showed about an endpoint, with or without tools; None if that is not known.

    That something cannot be measured is known once three responses agree and none has contradicted them, and is
    believed for ten minutes: a response may have been damaged, or a proxy may have asked another server for once.
    """
    verdict, since = _verdicts.get((endpoint.base_url, endpoint.model, tools), (None, 0.0))
    if verdict is None or is_good(verdict):
        return verdict
    return verdict if verdict.answers >= CONCORDANT and time.monotonic() - since < _BELIEVED else None


def remember(endpoint: Endpoint, verdict: Verdict, *, tools: bool) -> None:
    """Keep a verdict. Equal bad ones add up; a contradiction withdraws the earlier one."""
    key, now = (endpoint.base_url, endpoint.model, tools), time.monotonic()
    before, since = _verdicts.get(key, (None, 0.0))
    if (
        before is not None
        and now - since < _BELIEVED
        and not is_good(verdict)
        and _conclusion(before) == _conclusion(verdict)
    ):
        verdict = replace(verdict, answers=before.answers + verdict.answers)
    _verdicts[key] = verdict, now


def is_good(verdict: Verdict) -> bool:
    """Tell whether responses can be measured, tool calls included as far as there were any."""
    return verdict.usable and verdict.tool_tokens != "none"


def _conclusion(verdict: Verdict) -> tuple[bool, bool]:
    return verdict.usable, verdict.tool_tokens == "none"


def takes_schemas(endpoint: Endpoint) -> bool:
    """Tell whether ``response_format`` may hold a JSON schema, by the table and by what the server refused lately."""
    known, refused = endpoint.capabilities, _without_schemas.get((endpoint.base_url, endpoint.model))
    is_refused = refused is not None and time.monotonic() - refused < _BELIEVED
    return not is_refused and (known is None or known.json_schema != "no")


def remember_without_schemas(endpoint: Endpoint) -> None:
    """Keep, for ten minutes, that a server gave no answer in the form of a JSON schema."""
    _without_schemas[endpoint.base_url, endpoint.model] = time.monotonic()


def forget_verdicts() -> None:
    """Forget every verdict: after a server was repaired, or between tests."""
    _verdicts.clear()
    _without_schemas.clear()


def complaint(endpoint: Endpoint, verdict: Verdict, *, tools: bool) -> str | None:
    """Why the responses of an endpoint cannot be measured, with the remedy; None if they can."""
    if tools and verdict.tool_tokens == "none":
        found = f"its tool calls carry no log-probabilities ({verdict.problems.get('missing', '')})"
    elif not verdict.usable:
        found = verdict.problems.get("missing") or "it gives no alternatives, only the sampled token"
    else:
        return None
    known = endpoint.capabilities
    remedy = f"{known.limitation}: {known.remedy}" if known else "serve the model with vLLM, SGLang or llama-server"
    if tools and verdict.tool_tokens == "none" and "json" not in remedy:
        remedy = f"use action_format='json', or {remedy}"
    return f"{endpoint.model or 'the model'} at {endpoint.base_url}: {found}; {remedy}; {_WITHOUT}"


def _refuse_by_verdict(endpoint: Endpoint, verdict: Verdict, *, tools: bool) -> None:
    found = complaint(endpoint, verdict, tools=tools)
    if found is not None:
        raise UnsupportedLogprobs(f"an earlier response showed: {found}")


def _unsupported(endpoint: Endpoint, found: str) -> UnsupportedLogprobs:
    known = cast("Capabilities", endpoint.capabilities)
    model = f" ({endpoint.model})" if endpoint.model else ""
    return UnsupportedLogprobs(f"{known.name}{model}: {found}; {known.remedy}; {_WITHOUT}")


def _coverage(candidate: Candidate) -> float | None:
    """Share of the reported output tokens that has log-probabilities; the end-of-text token may lack."""
    tokens = (candidate.usage or {}).get("output_tokens", 0)
    if not tokens or candidate.signals is None:
        return None
    return min((candidate.signals.n_tokens + 1) / tokens, 1.0)


def _missing(candidates: Sequence[Candidate]) -> str:
    without = [c for c in candidates if c.signals is None]
    calls = sum(bool(c.tool_calls) for c in without)
    what = f"{len(without)} of {len(candidates)} responses without log-probabilities"
    return f"{what}, {calls} of them tool calls" if calls else what


def _too_little(coverage: float) -> str | None:
    if coverage >= _ENOUGH_COVERED:
        return None
    return f"only {coverage:.0%} of the output tokens have log-probabilities: tool calls or reasoning are left out"


def _tool_tokens(candidates: Sequence[Candidate]) -> Covered:
    calls = [c for c in candidates if c.tool_calls]
    if not calls:
        return "unknown"
    measured = [c for c in calls if c.signals]
    if not measured:
        return "none"
    whole = len(measured) == len(calls) and min(_coverage(c) or 1 for c in calls) >= _ENOUGH_COVERED
    return "all" if whole else "partial"


def identical(candidates: Sequence[Candidate]) -> str | None:
    """Explain that all responses are the same, token by token, where chance does not; None otherwise.

    Equal actions after different tokens are no cause for alarm, and neither are tokens that were nearly certain.
    """
    signals = [c.signals for c in candidates if c.signals]
    texts = {(c.content, str([(t["name"], t["args"]) for t in c.tool_calls])) for c in candidates}
    if len(texts) != 1 or len(candidates) < 2 or len(signals) < len(candidates):
        return None
    first = signals[0].logprobs
    if any(s.n_tokens != len(first) or not np.allclose(s.logprobs, first, atol=0.05, equal_nan=True) for s in signals):
        return None
    if np.nansum(first) * (len(candidates) - 1) > np.log(_BY_CHANCE):
        return None
    return f"{len(candidates)} responses are the same: a fixed seed, a cache, or a temperature near 0"


def _degenerate(candidates: Sequence[Candidate]) -> str | None:
    entropies = np.concatenate([c.signals.entropies for c in candidates if c.signals] or [np.empty(0)])
    certain = np.count_nonzero(entropies <= _CERTAIN)
    if len(entropies) < _MANY or certain < 0.95 * len(entropies):
        return None
    return f"{certain} of {len(entropies)} tokens have entropy 0: is it temperature 0, top-p, or a grammar?"


def _sentinels(candidates: Sequence[Candidate]) -> str | None:
    """Drawn tokens whose number stands for a missing one."""
    logprobs = np.concatenate([c.signals.logprobs for c in candidates if c.signals] or [np.empty(0)])
    found = np.count_nonzero(np.isnan(logprobs))
    return f"{found} of {len(logprobs)} drawn tokens have no number of their own" if found else None


def _sums(candidates: Sequence[Candidate]) -> str | None:
    excess = max((c.signals.excess for c in candidates if c.signals), default=0.0)
    return f"the alternatives of a token have a total probability of {1 + excess:.3g}" if excess else None


def _texts(owner: object, *names: str) -> list[str]:
    """The attributes that are there and not empty, as text."""
    return [str(value) for name in names if (value := getattr(owner, name, None))]
