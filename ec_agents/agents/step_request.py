"""One step's candidates from a chat model: what it is asked, in which form it acts, and whether that can be measured.

Requests that cannot work are refused before they are sent; the first responses of an endpoint are verified. The graph,
the middleware and the chat model share all of it, and differ in how they make a call.
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

from ec_agents.agents.quiet_model import logprobs_settings, silent_model
from ec_agents.agents.step import Write, draw, total_usage
from ec_agents.candidates import Candidate, CandidateSet
from ec_agents.errors import ActionError, ConfigError, LogprobsMissing, SamplingError, UnsupportedLogprobs
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
"""What to call and with which options, for the candidates in turn."""
Ask = Callable[[Variants], Callable[[int], Awaitable[Any]]]
"""Variants → index of a candidate → its response."""

Parse = Callable[[Any, int], Candidate]
"""Response and index → candidate."""

_TYPED = (ActionError, ConfigError, UnsupportedLogprobs)
"""What says the same of every call, and is raised itself where all calls failed with it."""

_KEPT = 8
"""Models that are kept ready."""

_log = logging.getLogger(__name__)


class StepModel:
    """A chat model as the steps of an agent ask it.

    Args:
        model: A chat model, or one with ``.bind(...)``.
        top_logprobs: Alternatives to ask for at each token; None asks for nothing, and nothing is refused or verified.
        action_format: ``native`` tool calls; ``json`` in the content; ``auto``: ``json`` where the provider table or a
            response says that tool calls carry no log-probabilities.

    Raises:
        ConfigError: ``action_format`` is none of these, or the model is no chat model.
    """

    def __init__(self, model: object, *, top_logprobs: int | None, action_format: ActionFormat) -> None:
        _check_format(action_format)
        silent, bound, self.config = silent_model(model)
        self.model = loop_safe(silent)
        self.options: Options = {**logprobs_settings(top_logprobs), **bound}
        self.action_format = action_format
        self.endpoint = None if top_logprobs is None else endpoint_of(self.model)
        self._copies: dict[tuple[bool, int], BaseChatModel] = {}

    def with_tools(self, tools: Sequence[Any], **options: Any) -> Options:
        """The options of calls with tools bound, in the model's own form.

        Raises:
            ConfigError: The model binds tools in a way of its own.
        """
        binding: Any = self.model.bind_tools(tools, **options)
        if not isinstance(binding, RunnableBinding):
            found = type(binding).__name__
            raise ConfigError(f"bind_tools() of {type(self.model).__name__} must give a binding; found {found}")
        return {**self.options, **binding.kwargs}

    def variants(self, options: Options, n: int, *, as_json: bool) -> Variants:
        """What to call. Where a seed is set, each candidate has one of its own: that one plus the candidate's index."""
        if isinstance(options.get("seed"), int):
            model = self._copy(0, as_json=as_json)
            return [(model, {**options, "seed": options["seed"] + index}) for index in range(n)]
        several = n if isinstance(getattr(self.model, "seed", None), int) else 1
        return [(self._copy(index, as_json=as_json), options) for index in range(several)]

    def _copy(self, index: int, *, as_json: bool) -> BaseChatModel:
        """The model for one candidate, made once: copies differ in the tools that they remember to have bound."""
        if (as_json, index) not in self._copies:
            model = self.model
            if index:
                model = model.model_copy(update={"seed": getattr(model, "seed", 0) + index})
            self._copies[as_json, index] = acting_in_json(model) if as_json else model
        return self._copies[as_json, index]


class StepModels:
    """The models of a caller who may bring another one at every step. Each is made ready once, and again if it changes.

    Args:
        top_logprobs: As of ``StepModel``.
        action_format: As of ``StepModel``.

    Raises:
        ConfigError: As ``StepModel`` does.
    """

    def __init__(self, *, top_logprobs: int | None, action_format: ActionFormat) -> None:
        _check_format(action_format)
        self._make = partial(StepModel, top_logprobs=top_logprobs, action_format=action_format)
        self._made: list[tuple[BaseChatModel, list[Any], StepModel]] = []

    def of(self, model: object) -> StepModel:
        """The model as steps ask it."""
        if not isinstance(model, BaseChatModel):  # it may stand for another one each time
            return self._make(model)
        fields = [*vars(model).values(), *(model.__pydantic_private__ or {}).values()]
        for known, had, made in self._made:
            if known is model and len(had) == len(fields) and all(map(is_, had, fields)):
                return made
        made = self._make(model)
        self._made = [(model, fields, made), *(entry for entry in self._made if entry[0] is not model)][:_KEPT]
        return made


class StepRequest:
    """What the N candidates of a step are asked.

    Args:
        model: The model to ask.
        options: What is sent with each call.
        n: How many candidates.
        tools: Whether an answer may be a tool call; None: if ``options`` has tools.
    """

    def __init__(self, model: StepModel, options: Options, n: int, *, tools: bool | None = None) -> None:
        self._model, self._options, self._n = model, options, n
        self._tools = bool(options.get("tools")) if tools is None else tools
        self._where: Endpoint | None = model.endpoint
        if model.endpoint is not None and isinstance(options.get("model"), str):
            self._where = replace(model.endpoint, model=options["model"])

    def refuse(self) -> None:
        """Stop a step that cannot work before anything is sent.

        Raises:
            ConfigError: The temperature is 0 with several candidates, or there is no JSON form of the tools.
            UnsupportedLogprobs: The table or an earlier response says that nothing can be measured.
        """
        temperature = self._option("temperature")
        if self._n > 1 and isinstance(temperature, int | float) and temperature == 0:
            raise ConfigError(
                f"temperature is 0, so that all {self._n} candidates would be equal and there would be nothing to "
                "choose; set a temperature above 0, for example 0.7, or n=1"
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
        """Whether actions are asked for as JSON, as far as is known now."""
        if not self.may_learn or self._where is None:
            return self._tools and self._model.action_format == "json"
        verdict, known = verdict_on(self._where, tools=True), self._where.capabilities
        if verdict is not None and verdict.tool_tokens != "unknown":
            return verdict.tool_tokens == "none"
        return known is not None and known.tool_tokens == "none"

    @property
    def may_learn(self) -> bool:
        """Whether responses may show that actions have to be asked for as JSON."""
        return self._tools and self._model.action_format == "auto" and self._where is not None

    async def draw(
        self,
        sampling: Callable[..., Awaitable[CandidateSet]],
        ask: Ask,
        *,
        write: Write,
        parse: Parse,
        begins_as_json: bool | None = None,
    ) -> CandidateSet:
        """The candidates of the step.

        Args:
            sampling: ``sample``, with its limits.
            ask: Makes the calls.
            write: Takes the events.
            parse: Response and index → candidate.
            begins_as_json: Whether to ask for JSON at first, where that is settled. Then all N calls are waited for, so
                that a step that is run again makes the same calls.

        Raises:
            ConfigError: The candidates would all be equal, or the tools cannot be asked for as JSON.
            UnsupportedLogprobs: The table or an earlier response says that nothing can be measured.
            LogprobsMissing: The first responses show it.
            ActionError: No answer is the JSON that was asked for, or the server refuses ``response_format``.
            SamplingError: Fewer calls succeeded than are needed.
        """
        self.refuse()
        as_json = self.writes_json() if begins_as_json is None else begins_as_json
        learns = begins_as_json is None and not as_json and self._is_new()
        drawn, landed = partial(self._drawn, sampling, ask, write), list[Candidate]()
        try:
            found = await drawn(_until_unmeasured(parse, landed) if learns else parse, as_json=as_json)
            problem = self._problem(found.candidates, as_json=as_json)
        except _UnmeasuredCall:
            found, problem = CandidateSet(candidates=landed), self._verified(landed, tools=True)
        if problem is None:
            return found
        if as_json or not self.writes_json():
            raise LogprobsMissing(problem)
        _log.warning("asking again, with actions as JSON: %s", problem)
        again = await drawn(parse, as_json=True)
        if problem := self._problem(again.candidates, as_json=True):
            raise LogprobsMissing(problem)
        return replace(again, spent=total_usage(found))

    async def _drawn(
        self, sampling: Callable[..., Awaitable[CandidateSet]], ask: Ask, write: Write, parse: Parse, *, as_json: bool
    ) -> CandidateSet:
        variants = self._model.variants(self._options, self._n, as_json=as_json)
        model, options = variants[0]
        try:
            return await draw(sampling, ask(variants), n=self._n, model=model.bind(**options), write=write, parse=parse)
        except SamplingError as error:
            first = next(iter(error.failures.values()))
            if all(isinstance(failure, _TYPED) for failure in error.failures.values()):
                raise first from first.__cause__
            raise

    def _is_new(self) -> bool:
        """Whether the next tool call shows for the first time if it can be measured."""
        known = verdict_on(self._where, tools=True) if self._where and self.may_learn else None
        return self.may_learn and (known is None or known.tool_tokens == "unknown")

    def _problem(self, candidates: Sequence[Candidate], *, as_json: bool) -> str | None:
        """Why the responses cannot be measured; they are verified where their endpoint is not known in this respect."""
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
        """Remember what the responses show; why they cannot be measured."""
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
    """Makes calls of the model itself."""

    def ask(variants: Variants) -> Callable[[int], Awaitable[Any]]:
        def call(index: int) -> Awaitable[Any]:
            model, options = variants[index % len(variants)]
            return model.ainvoke(list(messages), config, **options)

        return call

    return ask


def _check_format(action_format: object) -> None:
    if action_format not in get_args(ActionFormat):
        raise ConfigError(f"action_format must be one of {get_args(ActionFormat)}; found {action_format!r}")


class _UnmeasuredCall(BaseException):
    """Ends the calls of a step at once; no policy takes it for a failed call."""


def _until_unmeasured(parse: Parse, landed: list[Candidate]) -> Parse:
    """``parse``, ending at the first tool call if that has no log-probabilities; ``landed`` takes what was parsed."""

    def watched(response: Any, index: int) -> Candidate:
        candidate = parse(response, index)
        landed.append(candidate)
        calls = [found for found in landed if found.tool_calls and "refused" not in found.flaws]
        if calls == [candidate] and candidate.signals is None:
            raise _UnmeasuredCall
        return candidate

    return watched
