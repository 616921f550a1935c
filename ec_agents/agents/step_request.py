"""The request of one step: model, options, action format, policy; and what the responses show about the endpoint.

Requests that cannot work are refused before they are sent; the first responses of an endpoint are verified. The graph,
the middleware and the chat model share this and differ only in how they make a call.
"""

import logging
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from operator import is_
from typing import Any, get_args

from langchain_core.language_models import BaseChatModel
from langchain_core.messages import BaseMessage
from langchain_core.runnables import RunnableBinding, RunnableConfig

from ec_agents.agents.quiet_model import logprobs_settings, one_step, silent_model
from ec_agents.agents.step import Write, describe_failure, outline, total_usage
from ec_agents.agents.telemetry import sampling_span
from ec_agents.budget import calls_of
from ec_agents.candidates import Candidate, CandidateSet
from ec_agents.effort import Effort, StepView, effort_for
from ec_agents.errors import ActionError, ConfigError, LogprobsMissing, SamplingError, UnsupportedLogprobs
from ec_agents.policy import SamplingPolicy
from ec_agents.sampling import sample
from ec_agents.servers.fast_logprobs import loop_safe
from ec_agents.servers.json_actions import ActionFormat, acting_in_json, json_request
from ec_agents.servers.providers import (
    CONCORDANT,
    Endpoint,
    complaint,
    endpoint_of,
    identical,
    is_good,
    refuse_unsupported,
    remember,
    remember_without_schemas,
    takes_schemas,
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

Sampled = Callable[..., Awaitable[CandidateSet]]
"""Samples once: ``parse`` and ``as_json`` → candidates."""

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
        self._warned: set[str] = set()

    def warn_once(self, name: str, text: str) -> None:
        """Log a problem, unless one of this name was logged for this model before."""
        if name not in self._warned:
            self._warned.add(name)
            where = f"{self.endpoint.model} at {self.endpoint.base_url}" if self.endpoint else type(self.model).__name__
            _log.warning("%s: %s: %s", where, name, text)

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
        effort: Decides how many of the N candidates are drawn; None draws all at once.
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
        effort: Effort | None = None,
        tools: bool | None = None,
    ) -> None:
        self._model, self._options, self._n = model, options, n
        self._policy, self._parse, self._effort = policy, parse, effort
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
        learned = not native or self._model.action_format != "native"
        refuse_unsupported(self._where, top_logprobs=k, tools=native, options=named, learned=learned)

    def writes_json(self) -> bool:
        """Tell whether actions are requested as JSON, as far as is known now."""
        if not self.may_learn or self._where is None:
            return self._tools and self._model.action_format == "json"
        if not takes_schemas(self._where):
            return False
        verdict, known = verdict_on(self._where, tools=True), self._where.capabilities
        if verdict is not None and verdict.tool_tokens != "unknown":
            return verdict.tool_tokens == "none"
        return known is not None and known.tool_tokens == "none"

    @property
    def may_learn(self) -> bool:
        """Whether responses may show that actions have to be requested as JSON."""
        return self._tools and self._model.action_format == "auto" and self._where is not None

    async def draw(
        self, ask: Ask, *, write: Write, view: StepView | None = None, begins_as_json: bool | None = None
    ) -> CandidateSet:
        """Sample the candidates of the step.

        Where tool calls turn out to have no log-probabilities, the step is sampled again with actions as JSON; where
        the server gives none, with tool calls.

        Args:
            ask: Makes one call.
            write: Receives the ``custom`` events.
            view: What the effort may know of the step.
            begins_as_json: Whether to request JSON first, where that is settled. All N calls are then waited for, so
                that a step that runs again makes the same calls.

        Raises:
            ConfigError: The candidates would all be identical, or the tools have no JSON form.
            UnsupportedLogprobs: The table or earlier responses say that nothing can be measured.
            LogprobsMissing: The responses show it.
            ActionError: No response is the JSON that was requested, or the server refuses ``response_format``.
            SamplingError: Fewer calls succeeded than the policy needs.
        """
        self.refuse()
        sampled = partial(self._sampled, ask, write, self._effort and effort_for(self._effort, view or StepView()))
        as_json = self.writes_json() if begins_as_json is None else begins_as_json
        if as_json:
            try:
                return await self._measured(sampled, as_json=True)
            except ActionError:
                if not self.may_learn or self._where is None:
                    raise
                remember_without_schemas(self._where)
            return await self._measured(sampled, as_json=False)
        if not self.may_learn or self._where is None:
            return await self._measured(sampled, as_json=False)
        return await self._learned(self._where, sampled, stops=begins_as_json is None and self._is_new())

    async def _learned(self, where: Endpoint, sampled: Sampled, *, stops: bool) -> CandidateSet:
        """Sample with tool calls and, if they cannot be measured, once more as JSON.

        Args:
            where: The endpoint.
            sampled: Samples once.
            stops: Whether the calls end as soon as enough tool calls have landed, all without log-probabilities.
        """
        found, landed = None, list[Candidate]()
        try:
            parse = _until_unmeasured(self._parse, landed) if stops and takes_schemas(where) else self._parse
            found = await sampled(parse, as_json=False)
        except _UnmeasuredCall:
            pass
        candidates = landed if found is None else found.candidates
        problem = self._problem(candidates, as_json=False)
        if problem is None and found is not None:
            return found
        if found is not None and not (takes_schemas(where) and _are_calls_unmeasured(candidates)):
            return _any_measured(found, problem)
        _log.warning("asking again, with actions as JSON: %s", problem)
        try:
            again = await self._measured(sampled, as_json=True)
        except ActionError:
            remember_without_schemas(where)
            if found is None:
                found = await sampled(self._parse, as_json=False)
                self._problem(found.candidates, as_json=False)
            if any(candidate.signals for candidate in found.candidates):
                return found
            raise
        return replace(again, spent=total_usage(found or CandidateSet(candidates=candidates)))

    async def _measured(self, sampled: Sampled, *, as_json: bool) -> CandidateSet:
        """Sample once.

        Raises:
            LogprobsMissing: The responses cannot be measured.
        """
        found = await sampled(self._parse, as_json=as_json)
        if problem := self._problem(found.candidates, as_json=as_json):
            raise LogprobsMissing(problem)
        return found

    async def _sampled(
        self, ask: Ask, write: Write, effort: Effort | None, parse: Parse, *, as_json: bool
    ) -> CandidateSet:
        """Sample once, with a ``custom`` event per candidate and a span for all."""
        variants = self._model.variants(self._options, self._n, as_json=as_json)

        def call(index: int) -> Awaitable[Any]:
            return ask(*variants[index % len(variants)], index)

        def on_result(index: int, result: Candidate | BaseException) -> None:
            shown = outline(result) if isinstance(result, Candidate) else {"failure": describe_failure(result)}
            write({"ec_agents": "candidate", "index": index, **shown})

        model, options = variants[0]
        try:
            with sampling_span(model.bind(**options), self._n) as report, one_step(), calls_of(_name(model, options)):
                found = await sample(
                    call, n=self._n, policy=self._policy, effort=effort, parse=parse, on_result=on_result
                )
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
        """Explain why the responses cannot be measured.

        They are verified where the endpoint is not known in this respect, and where they may contradict what is known.
        """
        if self._options.get("top_logprobs") is not None and (same := identical(candidates)):
            self._model.warn_once("identical", same)
        if self._where is None:
            return None
        tools = self._tools and not as_json
        known = verdict_on(self._where, tools=tools)
        calls = any(candidate.tool_calls for candidate in candidates)
        if known is None or not is_good(known) or (tools and calls and known.tool_tokens == "unknown"):
            return self._verified(candidates, tools=tools)
        return None

    def _verified(self, candidates: Sequence[Candidate], *, tools: bool) -> str | None:
        """Remember what the responses show, and explain why they cannot be measured, if so."""
        verdict = verify(candidates, top_logprobs=self._options["top_logprobs"])
        if verdict is None or self._where is None:
            return None
        remember(self._where, verdict, tools=tools)
        for name, text in verdict.problems.items():
            if name != "identical":
                self._model.warn_once(name, text)
        return complaint(self._where, verdict, tools=tools)

    def _option(self, name: str) -> Any:
        return self._options.get(name, getattr(self._model.model, name, None))


def _name(model: BaseChatModel, options: Options) -> str:
    """Return the name of the model that is asked, as price tables have it."""
    names = (options.get("model"), getattr(model, "model_name", None), getattr(model, "model", None))
    return next((name for name in names if isinstance(name, str)), type(model).__name__)


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


def _are_calls_unmeasured(candidates: Sequence[Candidate]) -> bool:
    calls = [found for found in candidates if found.tool_calls and "refused" not in found.flaws]
    return bool(calls) and not any(found.signals for found in calls)


def _any_measured(found: CandidateSet, problem: str | None) -> CandidateSet:
    """Return the candidates if at least one can be ranked.

    Raises:
        LogprobsMissing: None can.
    """
    if problem is not None and not any(candidate.signals for candidate in found.candidates):
        raise LogprobsMissing(problem)
    return found


class _UnmeasuredCall(BaseException):
    """Ends all calls of a step; a BaseException, so that no policy takes it for a failed call."""


def _until_unmeasured(parse: Parse, landed: list[Candidate]) -> Parse:
    """Return ``parse`` that ends the step once enough tool calls have landed, all without log-probabilities.

    ``landed`` collects the candidates until then. What lands in the same turn of the event loop comes too late.
    """

    def watched(response: Any, index: int) -> Candidate:
        candidate = parse(response, index)
        if _is_enough(landed):
            raise _UnmeasuredCall
        landed.append(candidate)
        if _is_enough(landed):
            raise _UnmeasuredCall
        return candidate

    return watched


def _is_enough(landed: Sequence[Candidate]) -> bool:
    calls = sum(bool(found.tool_calls) and "refused" not in found.flaws for found in landed)
    return calls >= CONCORDANT and _are_calls_unmeasured(landed)
