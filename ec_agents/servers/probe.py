"""Probe a live endpoint: what works, what does not, what to change."""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, cast

import openai
from langchain_core.messages import AIMessage, HumanMessage, convert_to_openai_messages

from ec_agents.candidates import Candidate
from ec_agents.errors import ActionError, ConfigError, EcAgentsError, LogprobsMalformed
from ec_agents.responses import response_candidates
from ec_agents.servers.json_actions import JsonActions
from ec_agents.servers.providers import Endpoint, Verdict, capabilities, provider_of, remember, verify
from ec_agents.servers.transport import is_about_n

_TALK = "Write one sentence of about twenty words about the sea."
_ACT = "What is the weather in Oslo? Use the tool get_weather."
_MAX_TOKENS = 200
_FEW = 5
_TOOL = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "The weather in a city now.",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    },
}
_OWNERS = {"vllm": "vllm", "sglang": "sglang", "llamacpp": "llama-server", "library": "ollama"}
_PAGES = {"/props": "llama-server", "/api/version": "ollama", "/server_info": "sglang", "/version": "vllm"}
"""Pages that only one server has, the most telling first."""
_KEY = "set OPENAI_API_KEY to a key of this server"
_MODEL = "check the model name, and that the base URL ends as the server wants it, usually in /v1"
_CREDIT = "add credit to the account that the key belongs to"
_REFUSALS = (400, 403, 415, 422, 501)
"""Statuses with which servers refuse a parameter, among other things."""
_ABOUT = {
    "logprobs": re.compile("log_?prob", re.IGNORECASE),
    "n": re.compile("^n$"),
    "tools": re.compile("tool|function", re.IGNORECASE),
    "response_format": re.compile("response_format|schema|structured|grammar", re.IGNORECASE),
}
_CAUSES = {
    r"insufficient[_ ](quota|balance|credit|fund)|billing|payment required|out of credit|credit balance": _CREDIT,
    r"context_length|context (length|window|size)|prompt is too long": "serve the model with a context of 2048 tokens",
    "content_(filter|policy)|content management|moderation": "a content filter refused the prompt; try another model",
    r"api[ _-]?key|unauthori[sz]ed|authentication": _KEY,
    r"model_not_found|(unknown|invalid) model|model.{0,80}(not found|not exist)": _MODEL,
}
"""Causes that say nothing about log-probabilities, by code or words → what to do."""
_BY_STATUS = {
    401: _KEY,
    402: _CREDIT,
    403: "use a key that may use this model",
    404: _MODEL,
    408: "try again later",
    409: "try again later",
    429: "try again later",
}
_ADVICE = {
    "identical": "send no fixed seed, switch off response caches, and keep the temperature above 0",
    "degenerate": "keep the temperature above 0 and set no top_p",
    "sums": "with vLLM, use --logprobs-mode raw_logprobs",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class ProbeFinding:
    """The result of one request or two."""

    what: str
    """What was tried."""
    works: bool | None
    """None: unknown, because of an error about something else or an empty answer."""
    found: str
    """What came back."""
    advice: str = ""
    """What to change."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ProbeReport:
    """What a probe found out about an endpoint."""

    base_url: str
    """Where the model is served."""
    model: str
    """Name of the model."""
    provider: str
    """Key of the provider or server; ``""`` if it is not known."""
    findings: Sequence[ProbeFinding]
    """In the order in which they were found."""

    @property
    def usable(self) -> bool:
        """Whether plain answers can be measured."""
        return bool(self.findings) and self.findings[0].works is True

    def lines(self) -> list[str]:
        """The report as text."""
        known = capabilities(self.provider, self.model)
        marks = {True: "works", False: "does not work", None: "unknown"}
        lines = [f"{self.model} at {self.base_url}: {known.name if known else 'a server that is not in the table'}"]
        lines += [f"  {marks[f.works]:<14} {f.what}: {f.found}" for f in self.findings]
        if known:
            lines.append(f"  from the table {known.limitation}")
        advice = list(dict.fromkeys(f.advice for f in self.findings if f.advice))
        lines += ["What to change:", *(f"  - {text}" for text in advice)] if advice else ["Nothing to change."]
        return lines


async def probe_endpoint(base_url: str, model: str, *, api_key: str = "none", top_logprobs: int = 20) -> ProbeReport:
    """Try what sampling needs on a live endpoint: five requests, at most 200 tokens each.

    The verdicts are remembered, as those of any first response.

    Args:
        base_url: Base URL of an OpenAI-compatible server, usually ending in ``/v1``.
        model: Name of the model on it.
        api_key: Sent as bearer token.
        top_logprobs: Alternatives to request at each token.

    Raises:
        ConfigError: ``base_url`` is not an http address, or ``top_logprobs`` is below 1.
    """
    if not base_url.startswith(("http://", "https://")):
        raise ConfigError(f"base_url must begin with http:// or https://; found {base_url!r}")
    if top_logprobs < 1:
        raise ConfigError(f"top_logprobs must be 1 or more; found {top_logprobs}")
    async with openai.AsyncOpenAI(base_url=base_url, api_key=api_key, timeout=120, max_retries=1) as client:
        provider = provider_of(base_url) or await _recognized(client)
        probe = _Probe(client, Endpoint(provider=provider, base_url=base_url.rstrip("/"), model=model), top_logprobs)
        findings = [await probe.plain_answers()]
        if findings[0].works:
            findings += [await probe.several_choices(), await probe.tool_calls(), await probe.json_actions()]
    return ProbeReport(base_url=base_url, model=model, provider=provider, findings=findings)


async def _recognized(client: openai.AsyncOpenAI) -> str:
    """Key of the server, by what ``/models`` says or by a page that only it has; ``""`` if neither helps."""
    try:
        models = await _page(client, "models")
        owner = cast("list[Mapping[str, Any]]", models.get("data") or [{}])[0].get("owned_by")
        if owner in _OWNERS:
            return _OWNERS[owner]
    except (openai.OpenAIError, AttributeError, TypeError, ValueError, LookupError):
        pass
    root = str(client.base_url).rstrip("/").removesuffix("/v1")
    for page, provider in _PAGES.items():
        try:
            if isinstance(await _page(client, root + page), dict):
                return provider
        except (openai.OpenAIError, ValueError):
            continue
    return ""


async def _page(client: openai.AsyncOpenAI, path: str) -> Any:
    return await client.get(path, cast_to=object, options={"max_retries": 0, "timeout": 10})


class _Probe:
    """The requests to one endpoint."""

    def __init__(self, client: openai.AsyncOpenAI, endpoint: Endpoint, top_logprobs: int) -> None:
        self._client, self._endpoint, self._k = client, endpoint, top_logprobs

    async def plain_answers(self) -> ProbeFinding:
        """Whether a plain answer can be measured, and whether two of them differ."""
        what = "log-probabilities of plain answers"
        try:
            responses = [await self._ask(_TALK) for _ in range(2)]
            verdict = self._verify([r for response in responses for r in _candidates(response)], tools=False)
        except openai.OpenAIError as error:
            if _is_refusal(error, "logprobs") and self._k > _FEW:
                return await self._with_few(what, error)
            return _failed(what, error, "logprobs", self._remedy())
        except (EcAgentsError, ValueError) as error:
            return ProbeFinding(
                what=what, works=None, found=_words(error), advice="is this an OpenAI-compatible server?"
            )
        return self._judged(what, verdict)

    async def _with_few(self, what: str, refusal: openai.OpenAIError) -> ProbeFinding:
        """The same with few alternatives, which is all that some servers give."""
        asked, self._k = self._k, _FEW
        finding = await self.plain_answers()
        if not finding.works:
            return _failed(what, refusal, "logprobs", self._remedy())
        found = f"{finding.found}; {asked} alternatives are refused: {_words(refusal)}"
        return replace(finding, found=found, advice=f"top_logprobs={_FEW}")

    async def several_choices(self) -> ProbeFinding:
        """Whether one request gives several candidates."""
        what = "several candidates in one request (n=2)"
        try:
            found = len(_candidates(await self._ask(_TALK, n=2)))
        except (openai.OpenAIError, EcAgentsError, ValueError) as error:
            return _failed(what, error, "n", "")
        text = f"{found} came" if found == 2 else f"{found} came; one request each works all the same"
        return ProbeFinding(what=what, works=found == 2, found=text)

    async def tool_calls(self) -> ProbeFinding:
        """Whether the tokens of a tool call can be measured."""
        what = "log-probabilities of tool calls"
        json_advice = "with tools, use action_format='json'; 'auto' does so by itself"
        try:
            response = await self._ask(_ACT, tools=[_TOOL])
            if not _candidates(response)[0].tool_calls:
                response = await self._ask(_ACT, tools=[_TOOL], tool_choice="required")
            candidates = _candidates(response)
        except (openai.OpenAIError, EcAgentsError, ValueError) as error:
            return _failed(what, error, "tools", json_advice)
        if not candidates[0].tool_calls:
            found = "the model called no tool, so nothing is known"
            return ProbeFinding(what=what, works=None, found=found, advice="try a model that calls tools")
        verdict = self._verify(candidates, tools=True)
        finding = self._judged(what, verdict)
        return finding if finding.works else replace(finding, advice=json_advice)

    async def json_actions(self) -> ProbeFinding:
        """Whether an action can be had as JSON in the content, and measured."""
        what = "actions as JSON (response_format json_schema)"
        advice = "with tools, use a server that measures tool calls: vLLM, SGLang or llama-server"
        actions = JsonActions([_TOOL])
        messages = convert_to_openai_messages(actions.encode([HumanMessage(_ACT)]))
        try:
            response = await self._ask(messages, response_format=actions.response_format)
            candidate = _candidates(response)[0]
        except (openai.OpenAIError, EcAgentsError, ValueError) as error:
            return _failed(what, error, "response_format", advice)
        if candidate.finish_reason == "length":
            return ProbeFinding(what=what, works=None, found=f"cut off after {_MAX_TOKENS} tokens, so nothing is known")
        try:
            actions.decode(AIMessage(candidate.content))
        except ActionError as error:
            return ProbeFinding(what=what, works=False, found=_words(error), advice=advice)
        return self._judged(what, verify([candidate], top_logprobs=self._k))

    async def _ask(self, prompt: Any, **options: Any) -> dict[str, Any]:
        messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
        limit = "max_completion_tokens" if self._endpoint.provider in ("openai", "azure") else "max_tokens"
        create: Any = self._client.chat.completions.with_raw_response.create
        raw = await create(
            model=self._endpoint.model,
            messages=messages,
            logprobs=True,
            top_logprobs=self._k,
            temperature=1,
            **{limit: _MAX_TOKENS},
            **options,
        )
        response: Any = json.loads(raw.content)
        if not isinstance(response, dict):
            raise LogprobsMalformed(f"a chat completion must be a JSON object; found {response!r:.100}")
        return cast("dict[str, Any]", response)

    def _verify(self, candidates: Sequence[Candidate], *, tools: bool) -> Verdict | None:
        verdict = verify(candidates, top_logprobs=self._k)
        if verdict is not None:
            remember(self._endpoint, verdict, tools=tools)
        return verdict

    def _judged(self, what: str, verdict: Verdict | None) -> ProbeFinding:
        """A verdict in words."""
        if verdict is None:
            return ProbeFinding(what=what, works=None, found="the answer was empty", advice="try another model")
        if not verdict.usable:
            found = verdict.problems.get("missing") or "no alternatives, only the sampled token"
            return ProbeFinding(what=what, works=False, found=found, advice=self._remedy())
        share = "" if verdict.coverage is None else f", {verdict.coverage:.0%} of the tokens"
        problems = {name: text for name, text in verdict.problems.items() if name != "alternatives"}
        found = "; ".join([f"{verdict.n_alternatives} alternatives per token{share}", *problems.values()])
        advice = "; ".join(_ADVICE.get(name) or self._remedy() for name in problems)
        return ProbeFinding(what=what, works=True, found=found, advice=advice)

    def _remedy(self) -> str:
        known = self._endpoint.capabilities
        if known is None:
            return "serve the model with vLLM, SGLang or llama-server, and ask it directly rather than through a proxy"
        return known.remedy


def _candidates(response: Mapping[str, Any]) -> list[Candidate]:
    usage: Mapping[str, Any] = response.get("usage") or {}
    found = response_candidates(response)
    counts = {"output_tokens": usage.get("completion_tokens") or 0} if len(found) == 1 else None
    return [replace(candidate, usage=counts) for candidate in found]


def _failed(what: str, error: Exception, parameter: str, advice: str) -> ProbeFinding:
    """A trial that ended in an error: the server refused what was tried, or the error says nothing about that."""
    if _is_refusal(error, parameter):
        return ProbeFinding(what=what, works=False, found=_words(error), advice=advice)
    return ProbeFinding(what=what, works=None, found=_words(error), advice=_other_causes(error))


def _is_refusal(error: Exception, parameter: str) -> bool:
    """Tell whether a server refuses a parameter or log-probabilities, as opposed to the request for another reason."""
    if not isinstance(error, openai.APIStatusError) or error.status_code not in _REFUSALS:
        return False
    if error.param is not None:
        return bool(_ABOUT[parameter].search(str(error.param)) or _ABOUT["logprobs"].search(str(error.param)))
    if _named_cause(error) is not None:
        return False
    text = _words(error)
    return bool(
        _ABOUT["logprobs"].search(text) or (is_about_n(error) if parameter == "n" else _ABOUT[parameter].search(text))
    )


def _named_cause(error: openai.APIStatusError) -> str | None:
    """What to do about a cause that the error names by code or in words."""
    text = f"{error.code} {error.type} {_words(error)}"
    return next((advice for pattern, advice in _CAUSES.items() if re.search(pattern, text, re.IGNORECASE)), None)


def _other_causes(error: Exception) -> str:
    """What to do about an error that says nothing about what was tried."""
    if isinstance(error, openai.APIStatusError):
        known = _named_cause(error) or _BY_STATUS.get(error.status_code)
        other = "the server refuses the request for another reason; see its message"
        return known or ("try again later" if error.status_code >= 500 else other)
    if isinstance(error, openai.APIConnectionError):
        return "check that the server runs at this base URL"
    return "is this an OpenAI-compatible server?"


def _words(error: Exception) -> str:
    """The message of an error, in one line; of validation errors only the places and messages, not the request."""
    text = error.message if isinstance(error, openai.APIStatusError) else f"{type(error).__name__}: {error}"
    body: Any = getattr(error, "body", None)
    details: Any = cast("Mapping[str, Any]", body).get("detail") if isinstance(body, Mapping) else None
    if isinstance(details, list):
        found = [cast("Mapping[str, Any]", one) for one in cast("list[Any]", details) if isinstance(one, Mapping)]
        text = "; ".join(f"{'.'.join(map(str, one.get('loc') or ()))}: {one.get('msg')}" for one in found) or text
    return " ".join(text.split())[:300]
