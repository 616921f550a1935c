"""The request of one step: model, options, action format, policy; and what the responses show about the endpoint.

Requests that cannot work are refused before they are sent; the first responses of an endpoint are verified. The graph,
the middleware and the chat model share this and differ only in how they make a call.
"""

import logging
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import replace
from operator import is_
from typing import Any, get_args

from langchain_core.language_models import BaseChatModel
from langchain_core.messages import BaseMessage
from langchain_core.runnables import RunnableBinding, RunnableConfig

from ec_agents.agents.quiet_model import logprobs_settings, one_step, silent_model
from ec_agents.agents.step import Write, describe_failure, outline, total_usage
from ec_agents.agents.telemetry import sampling_span
from ec_agents.candidates import Candidate, CandidateSet
from ec_agents.errors import ActionError, ConfigError, LogprobsMissing, SamplingError, UnsupportedLogprobs
from ec_agents.policy import SamplingPolicy
from ec_agents.sampling import sample
from ec_agents.servers.fast_logprobs import loop_safe
from ec_agents.servers.json_actions import ActionFormat, acting_in_json, json_request
from ec_agents.servers.providers import (
    Endpoint,
    complaint,
    endpoint_of,
    refuse_unsupported,
    remember,
    verdict_on,
    verify,
)

Options = Mapping[str, Any]
Variants = Sequence[tuple[BaseChatModel, Options]]
"""The models to call and their options; candidates take them in turn."""
Ask = Callable[[BaseChatModel, Options, int], Awaitable[Any]]
"""Makes one call: model, options, index of the candidate → awaitable of the response."""

Parse = Callable[[Any, int], Candidate]
"""Response and index → candidate."""

_TYPED = (ActionError, ConfigError, UnsupportedLogprobs)
"""Errors identical for every call; re-raised directly if all fail."""

_KEPT = 8
"""Prepared models that ``remembering`` keeps."""

_log = logging.getLogger(__name__)


class StepModel:
    """A chat model prepared for sampling.

    Args:
        model: A chat model, or one with ``.bind(...)``.
        run: Configuration of the run, which resolves a configurable model.
        top_logprobs: Alternatives to request per token; None requests nothing, and nothing is refused or verified.
        action_format: ``native`` tool calls; ``json`` in the content; ``auto``: ``json`` where the provider table or a
            response shows that tool calls carry no log-probabilities.

    Raises:
        ConfigError: ``action_format`` is unknown, or ``model`` is not a chat model.
    """

    def __init__(
        self,
        model: object,
        run: RunnableConfig | None = None,
        *,
        top_logprobs: int | None,
        action_format: ActionFormat,
    ) -> None:
        check_action_format(action_format)
        silent, bound, self.config = silent_model(model, run)
        self.model = loop_safe(silent)
        self.options: Options = {**logprobs_settings(top_logprobs), **bound}
        self.action_format = action_format
        self.endpoint = None if top_logprobs is None else endpoint_of(self.model)
        self._copies: dict[tuple[bool, int], BaseChatModel] = {}

    def with_tools(self, tools: Sequence[Any], **options: Any) -> Options:
        """Return the options of calls with tools bound, in the model's own form.

        Raises:
            ConfigError: ``bind_tools`` of the model does not return a binding.
        """
        binding: Any = self.model.bind_tools(tools, **options)
        if not isinstance(binding, RunnableBinding):
            found = type(binding).__name__
            raise ConfigError(
                f"bind_tools() of {type(self.model).__name__} must return a RunnableBinding; found {found}"
            )
        return {**self.options, **binding.kwargs}

    def variants(self, options: Options, n: int, *, as_json: bool) -> Variants:
        """Return what to call. A seed that is set is offset by the candidate's index, so that candidates differ."""
        if isinstance(options.get("seed"), int):
            model = self._copy(0, as_json=as_json)
            return [(model, {**options, "seed": options["seed"] + index}) for index in range(n)]
        several = n if isinstance(getattr(self.model, "seed", None), int) else 1
        return [(self._copy(index, as_json=as_json), options) for index in range(several)]

    def _copy(self, index: int, *, as_json: bool) -> BaseChatModel:
        """Return the model for one candidate, made once."""
        if (as_json, index) not in self._copies:
            model = self.model
            if index:
                model = model.model_copy(update={"seed": getattr(model, "seed", 0) + index})
            self._copies[as_json, index] = acting_in_json(model) if as_json else model
        return self._copies[as_json, index]


def remembering(prepare: Callable[[object], StepModel]) -> Callable[[object], StepModel]:
    """Return ``prepare`` with a cache: a model is prepared once, and again when one of its fields changes.

    For callers that may be given another model at every step.
    """
    made: list[tuple[BaseChatModel, list[Any], StepModel]] = []

    def prepared(model: object) -> StepModel:
        if not isinstance(model, BaseChatModel):  # a configurable model resolves to another one each time
            return prepare(model)
        fields = [*vars(model).values(), *(model.__pydantic_private__ or {}).values()]
        for known, had, found in made:
            if known is model and len(had) == len(fields) and all(map(is_, had, fields)):
                return found
        made[:] = [(model, fields, prepare(model)), *(entry for entry in made if entry[0] is not model)][:_KEPT]
        return made[0][2]

    return prepared


class StepRequest:
    """What to ask the model for at one step, and how long to wait.

    Args:
        model: The prepared model.
        options: Sent with each call.
        n: How many candidates.
        policy: Timeouts, retries and limits.
        parse: Response and index → candidate.
        tools: Whether an answer may be a tool call; None: if ``options`` has tools.
    """

    def __init__(
        self,
        model: StepModel,
        options: Options,
        n: int,
        *,
        policy: SamplingPolicy,
        parse: Parse,
        tools: bool | None = None,
    ) -> None:
        self._model, self._options, self._n = model, options, n
        self._policy, self._parse = policy, parse
        self._tools = bool(options.get("tools")) if tools is None else tools
        self._where: Endpoint | None = model.endpoint
        if model.endpoint is not None and isinstance(options.get("model"), str):
            self._where = replace(model.endpoint, model=options["model"])

    def refuse(self) -> None:
        """Refuse a step that cannot work, before anything is sent.

        Raises:
            ConfigError: The temperature is 0 with several candidates, the model has an ``n`` of its own, or the tools
                have no JSON form.
            UnsupportedLogprobs: The table or an earlier response says that nothing can be measured.
        """
        temperature = self._option("temperature")
        if self._n > 1 and isinstance(temperature, int | float) and temperature == 0:
            raise ConfigError(
                f"temperature is 0, so all {self._n} candidates would be identical; set a temperature above 0, for "
                "example 0.7, or n=1"
            )
        several = self._option("n")
        if isinstance(several, int) and several > 1:
            raise ConfigError(
                f"n={several} is set on the model, so each of the {self._n} calls would pay for {several} answers and "
                "use one; leave it out there: n of the agent is the number of candidates"
            )
        as_json = self.writes_json()
        if as_json and self._options.get("tools"):
            json_request(self._model.variants(self._options, 1, as_json=True)[0][0], self._options)
        if self._where is None:
            return
        known = self._where.capabilities
        named = {name: self._option(name) for name in ({**known.must, **known.may_only} if known else ())}
        k, native = self._options["top_logprobs"], self._tools and not as_json
        refuse_unsupported(self._where, top_logprobs=k, tools=native, options=named)

    def writes_json(self) -> bool:
        """Tell whether actions are requested as JSON, as far as is known now."""
        if not self.may_learn or self._where is None:
            return self._tools and self._model.action_format == "json"
        verdict, known = verdict_on(self._where, tools=True), self._where.capabilities
        if verdict is not None and verdict.tool_tokens != "unknown":
            return verdict.tool_tokens == "none"
        return known is not None and known.tool_tokens == "none"

    @property
    def may_learn(self) -> bool:
        """Whether responses may show that actions have to be requested as JSON."""
        return self._tools and self._model.action_format == "auto" and self._where is not None

    async def draw(self, ask: Ask, *, write: Write, begins_as_json: bool | None = None) -> CandidateSet:
        """Sample the candidates of the step.

        Args:
            ask: Makes one call.
            write: Receives the ``custom`` events.
            begins_as_json: Whether to request JSON first, where that is settled. All N calls are then waited for, so
                that a step that runs again makes the same calls.

        Raises:
            ConfigError: The candidates would all be identical, or the tools have no JSON form.
            UnsupportedLogprobs: The table or an earlier response says that nothing can be measured.
            LogprobsMissing: The first responses show it.
            ActionError: No response is the JSON that was requested, or the server refuses ``response_format``.
            SamplingError: Fewer calls succeeded than the policy needs.
        """
        self.refuse()
        as_json = self.writes_json() if begins_as_json is None else begins_as_json
        learns = begins_as_json is None and not as_json and self._is_new()
        landed: list[Candidate] = []
        try:
            parse = _until_unmeasured(self._parse, landed) if learns else self._parse
            found = await self._sampled(ask, write, parse, as_json=as_json)
            problem = self._problem(found.candidates, as_json=as_json)
        except _UnmeasuredCall:
            found, problem = CandidateSet(candidates=landed), self._verified(landed, tools=True)
        if problem is None:
            return found
        if as_json or not self.writes_json():
            raise LogprobsMissing(problem)
        _log.warning("asking again, with actions as JSON: %s", problem)
        again = await self._sampled(ask, write, self._parse, as_json=True)
        if problem := self._problem(again.candidates, as_json=True):
            raise LogprobsMissing(problem)
        return replace(again, spent=total_usage(found))

    async def _sampled(self, ask: Ask, write: Write, parse: Parse, *, as_json: bool) -> CandidateSet:
        """Sample once, with a ``custom`` event per candidate and a span for all."""
        variants = self._model.variants(self._options, self._n, as_json=as_json)

        def call(index: int) -> Awaitable[Any]:
            return ask(*variants[index % len(variants)], index)

        def on_result(index: int, result: Candidate | BaseException) -> None:
            shown = outline(result) if isinstance(result, Candidate) else {"failure": describe_failure(result)}
            write({"ec_agents": "candidate", "index": index, **shown})

        model, options = variants[0]
        try:
            with sampling_span(model.bind(**options), self._n) as report, one_step():
                found = await sample(call, n=self._n, policy=self._policy, parse=parse, on_result=on_result)
                report(found)
        except SamplingError as error:
            first = next(iter(error.failures.values()))
            if all(isinstance(failure, _TYPED) for failure in error.failures.values()):
                raise first from first.__cause__
            raise
        return found

    def _is_new(self) -> bool:
        """Tell whether the next tool call will show for the first time if tool calls can be measured."""
        known = verdict_on(self._where, tools=True) if self._where and self.may_learn else None
        return self.may_learn and (known is None or known.tool_tokens == "unknown")

    def _problem(self, candidates: Sequence[Candidate], *, as_json: bool) -> str | None:
        """Explain why the responses cannot be measured; verify them if the endpoint is not known in this respect."""
        if self._where is None:
            return None
        tools = self._tools and not as_json
        known = verdict_on(self._where, tools=tools)
        calls = any(candidate.tool_calls for candidate in candidates)
        if known is None or (tools and calls and known.tool_tokens == "unknown"):
            return self._verified(candidates, tools=tools)
        is_measured = all(candidate.signals for candidate in candidates)
        return None if is_measured else complaint(self._where, known, tools=tools)

    def _verified(self, candidates: Sequence[Candidate], *, tools: bool) -> str | None:
        """Remember what the responses show, and explain why they cannot be measured, if so."""
        verdict = verify(candidates, top_logprobs=self._options["top_logprobs"])
        if verdict is None or self._where is None:
            return None
        is_news = verdict_on(self._where, tools=tools) is None
        remember(self._where, verdict, tools=tools)
        for name, text in verdict.problems.items() if is_news else ():
            _log.warning("%s at %s: %s: %s", self._where.model, self._where.base_url, name, text)
        return complaint(self._where, verdict, tools=tools)

    def _option(self, name: str) -> Any:
        return self._options.get(name, getattr(self._model.model, name, None))


def calling(messages: Sequence[BaseMessage], config: RunnableConfig) -> Ask:
    """Make calls of the model itself."""

    def ask(model: BaseChatModel, options: Options, index: int) -> Awaitable[Any]:  # noqa: ARG001 - see Ask
        return model.ainvoke(list(messages), config, **options)

    return ask


def check_action_format(action_format: object) -> None:
    """Refuse an unknown action format.

    Raises:
        ConfigError: It is none of ``native``, ``json`` and ``auto``.
    """
    if action_format not in get_args(ActionFormat):
        raise ConfigError(f"action_format must be one of {get_args(ActionFormat)}; found {action_format!r}")


class _UnmeasuredCall(BaseException):
    """Ends all calls of a step; a BaseException, so that no policy takes it for a failed call."""


def _until_unmeasured(parse: Parse, landed: list[Candidate]) -> Parse:
    """Return ``parse`` that ends the step at a first tool call without log-probabilities; ``landed`` collects."""

    def watched(response: Any, index: int) -> Candidate:
        candidate = parse(response, index)
        landed.append(candidate)
        calls = [found for found in landed if found.tool_calls and "refused" not in found.flaws]
        if calls == [candidate] and candidate.signals is None:
            raise _UnmeasuredCall
        return candidate

    return watched
