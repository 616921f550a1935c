"""What a live endpoint returns, in plain words: what works, what does not, what to change."""

import json
from collections.abc import AsyncGenerator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from typing import Any, cast

import openai
from langchain_core.messages import AIMessage, HumanMessage, convert_to_openai_messages

from ec_agents.candidates import Candidate
from ec_agents.errors import ActionError, ConfigError, EcAgentsError
from ec_agents.logprobs import response_candidates
from ec_agents.servers.json_actions import JsonActions
from ec_agents.servers.providers import Capabilities, Endpoint, Verdict, capabilities, provider_of, remember, verify

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
_ADVICE = {
    "identical": "send no fixed seed, switch off response caches, and keep the temperature above 0",
    "degenerate": "keep the temperature above 0 and set no top_p",
    "sums": "with vLLM, use --logprobs-mode raw_logprobs",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """The result of one trial."""

    what: str
    """What was tried."""
    works: bool | None
    """None: it could not be found out."""
    found: str
    """What came back."""
    advice: str = ""
    """What to change."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """What was found out about an endpoint."""

    base_url: str
    """Where the model is served."""
    model: str
    """Its name."""
    provider: str
    """Key of the provider or server; ``""`` if it is not known."""
    findings: Sequence[Finding]
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


async def check_endpoint(base_url: str, model: str, *, api_key: str = "none", top_logprobs: int = 20) -> Report:
    """Try what sampling needs on a live endpoint: five requests, at most 200 tokens each.

    The verdicts are remembered, as those of any first response.

    Args:
        base_url: Base URL of an OpenAI-compatible server, usually ending in ``/v1``.
        model: Name of the model on it.
        api_key: Sent as bearer token.
        top_logprobs: Alternatives to ask for at each token.

    Raises:
        ConfigError: ``base_url`` is no http address, or ``top_logprobs`` is below 1.
    """
    if not base_url.startswith(("http://", "https://")):
        raise ConfigError(f"base_url must begin with http:// or https://; found {base_url!r}")
    if top_logprobs < 1:
        raise ConfigError(f"top_logprobs must be 1 or more; found {top_logprobs}")
    async with _trial(base_url, model, api_key, top_logprobs) as trial:
        provider = provider_of(base_url) or await trial.recognise()
        trial.endpoint = Endpoint(provider=provider, base_url=base_url.rstrip("/"), model=model)
        findings = [await trial.plain_answers()]
        if findings[0].works:
            findings += [await trial.several_choices(), await trial.tool_calls(), await trial.json_actions()]
    return Report(base_url=base_url, model=model, provider=provider, findings=findings)


@asynccontextmanager
async def _trial(base_url: str, model: str, api_key: str, top_logprobs: int) -> AsyncGenerator["_Trial"]:
    async with openai.AsyncOpenAI(base_url=base_url, api_key=api_key, timeout=120, max_retries=1) as client:
        yield _Trial(client, model, top_logprobs)


class _Trial:
    """The requests to one endpoint."""

    endpoint: Endpoint

    def __init__(self, client: openai.AsyncOpenAI, model: str, top_logprobs: int) -> None:
        self._client, self._model, self._k = client, model, top_logprobs

    @property
    def _known(self) -> Capabilities | None:
        return self.endpoint.capabilities

    async def recognise(self) -> str:
        """Key of the server, by what ``/models`` says or by a page that only it has; ``""`` if neither helps."""
        try:
            models = await self._page("models")
            owner = cast("list[Mapping[str, Any]]", models.get("data") or [{}])[0].get("owned_by")
        except (openai.OpenAIError, AttributeError, TypeError, ValueError):
            owner = None
        if owner in _OWNERS:
            return _OWNERS[owner]
        root = str(self._client.base_url).rstrip("/").removesuffix("/v1")
        for page, provider in _PAGES.items():
            try:
                if isinstance(await self._page(root + page), dict):
                    return provider
            except (openai.OpenAIError, ValueError):
                continue
        return ""

    async def plain_answers(self) -> Finding:
        """Whether a plain answer can be measured, and whether two of them differ."""
        what = "log-probabilities of plain answers"
        try:
            responses = [await self._ask(_TALK) for _ in range(2)]
            verdict = self._verify([r for response in responses for r in _candidates(response)], tools=False)
        except openai.OpenAIError as error:
            if _refused(error) and self._k > _FEW:
                return await self._with_few(what, error)
            return self._failed(what, error, self._remedy())
        except (EcAgentsError, ValueError) as error:
            return Finding(what=what, works=None, found=_words(error), advice="is this an OpenAI-compatible server?")
        return self._judged(what, verdict)

    async def _with_few(self, what: str, refusal: openai.OpenAIError) -> Finding:
        """The same with few alternatives, which is all that some servers give."""
        asked, self._k = self._k, _FEW
        finding = await self.plain_answers()
        if not finding.works:
            return self._failed(what, refusal, self._remedy())
        found = f"{finding.found}; {asked} alternatives are refused: {_words(refusal)}"
        return replace(finding, found=found, advice=f"top_logprobs={_FEW}")

    async def several_choices(self) -> Finding:
        """Whether one request gives several candidates."""
        what = "several candidates in one request (n=2)"
        try:
            found = len((await self._ask(_TALK, n=2)).get("choices") or [])
        except openai.OpenAIError as error:
            return self._failed(what, error, "")
        text = f"{found} came" if found == 2 else f"{found} came; one request each works all the same"
        return Finding(what=what, works=found == 2, found=text)

    async def tool_calls(self) -> Finding:
        """Whether the tokens of a tool call can be measured."""
        what = "log-probabilities of tool calls"
        json_advice = "with tools, use action_format='json'; 'auto' does so by itself"
        try:
            response = await self._ask(_ACT, tools=[_TOOL])
            if not _candidates(response)[0].tool_calls:
                response = await self._ask(_ACT, tools=[_TOOL], tool_choice="required")
            candidates = _candidates(response)
        except (openai.OpenAIError, EcAgentsError, ValueError) as error:
            return self._failed(what, error, json_advice)
        if not candidates[0].tool_calls:
            found = "the model called no tool, so nothing is known"
            return Finding(what=what, works=None, found=found, advice="try a model that calls tools")
        verdict = self._verify(candidates, tools=True)
        finding = self._judged(what, verdict)
        return finding if finding.works else replace(finding, advice=json_advice)

    async def json_actions(self) -> Finding:
        """Whether an action can be had as JSON in the content, and measured."""
        what = "actions as JSON (response_format json_schema)"
        advice = "with tools, use a server that measures tool calls: vLLM, SGLang or llama-server"
        actions = JsonActions([_TOOL])
        messages = convert_to_openai_messages(actions.encode([HumanMessage(_ACT)]))
        try:
            response = await self._ask(messages, response_format=actions.response_format)
            candidate = _candidates(response)[0]
        except (openai.OpenAIError, EcAgentsError, ValueError) as error:
            return self._failed(what, error, advice)
        if candidate.finish_reason == "length":
            return Finding(what=what, works=None, found=f"cut off after {_MAX_TOKENS} tokens, so nothing is known")
        try:
            actions.decode(AIMessage(candidate.content))
        except ActionError as error:
            return Finding(what=what, works=False, found=_words(error), advice=advice)
        return self._judged(what, verify([candidate], top_logprobs=self._k))

    async def _ask(self, prompt: Any, **options: Any) -> dict[str, Any]:
        messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
        limit = "max_completion_tokens" if self.endpoint.provider in ("openai", "azure") else "max_tokens"
        create: Any = self._client.chat.completions.with_raw_response.create
        raw = await create(
            model=self._model,
            messages=messages,
            logprobs=True,
            top_logprobs=self._k,
            temperature=1,
            **{limit: _MAX_TOKENS},
            **options,
        )
        return json.loads(raw.content)

    async def _page(self, path: str) -> Any:
        return await self._client.get(path, cast_to=object, options={"max_retries": 0, "timeout": 10})

    def _verify(self, candidates: Sequence[Candidate], *, tools: bool) -> Verdict | None:
        verdict = verify(candidates, top_logprobs=self._k)
        if verdict is not None:
            remember(self.endpoint, verdict, tools=tools)
        return verdict

    def _failed(self, what: str, error: Exception, advice: str) -> Finding:
        """A trial that ended in an error: the server refused it, or it says nothing about what was tried."""
        if _refused(error):
            return Finding(what=what, works=False, found=_words(error), advice=advice)
        return Finding(what=what, works=None, found=_words(error), advice=_other_causes(error))

    def _judged(self, what: str, verdict: Verdict | None) -> Finding:
        """A verdict in words."""
        if verdict is None:
            return Finding(what=what, works=None, found="the answer was empty", advice="try another model")
        if not verdict.usable:
            found = verdict.problems.get("missing") or "no alternatives, the drawn token only"
            return Finding(what=what, works=False, found=found, advice=self._remedy())
        share = "" if verdict.coverage is None else f", {verdict.coverage:.0%} of the tokens"
        problems = {name: text for name, text in verdict.problems.items() if name != "alternatives"}
        found = "; ".join([f"{verdict.n_alternatives} alternatives a token{share}", *problems.values()])
        advice = "; ".join(_ADVICE.get(name) or self._remedy() for name in problems)
        return Finding(what=what, works=True, found=found, advice=advice)

    def _remedy(self) -> str:
        if self._known is None:
            return "serve the model with vLLM, SGLang or llama-server, and ask it directly rather than through a proxy"
        return self._known.remedy


def _candidates(response: Mapping[str, Any]) -> list[Candidate]:
    usage: Mapping[str, Any] = response.get("usage") or {}
    found = response_candidates(response)
    counts = {"output_tokens": usage.get("completion_tokens") or 0} if len(found) == 1 else None
    return [replace(candidate, usage=counts) for candidate in found]


def _refused(error: Exception) -> bool:
    """Whether a server says that it does not take such a request."""
    return isinstance(error, openai.BadRequestError | openai.UnprocessableEntityError) or (
        isinstance(error, openai.APIStatusError) and error.status_code in (403, 501)
    )


def _other_causes(error: Exception) -> str:
    if isinstance(error, openai.AuthenticationError):
        return "set OPENAI_API_KEY to a key of this server"
    if isinstance(error, openai.NotFoundError):
        return "check the model name, and that the base URL ends as the server wants it, usually in /v1"
    if isinstance(error, openai.APIConnectionError):
        return "check that the server runs at this base URL"
    return "try again later"


def _words(error: Exception) -> str:
    """What an error says, in one line."""
    text = error.message if isinstance(error, openai.APIStatusError) else f"{type(error).__name__}: {error}"
    return " ".join(text.split())[:300]
