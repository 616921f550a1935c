"""One step's candidates from a chat model: what it is asked, in which form it acts, and whether that can be measured.

Requests that cannot work are refused before they are sent; the first responses of an endpoint are verified.
"""

import logging
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any, get_args

from langchain_core.language_models import BaseChatModel
from langchain_core.messages import AIMessage, BaseMessage
from langchain_core.runnables import Runnable, RunnableConfig

from ec_agents.actions import ActionFormat, JsonActions
from ec_agents.candidates import CandidateSet
from ec_agents.errors import ActionError, ConfigError, LogprobsMissing, SamplingError
from ec_agents.loops import loop_safe
from ec_agents.messages import sampling_model
from ec_agents.models import silent_model
from ec_agents.providers import complaint, endpoint_of, refuse_unsupported, remember, verdict_on, verify

Draw = Callable[[Callable[[int], Awaitable[AIMessage]]], Awaitable[CandidateSet]]

_log = logging.getLogger(__name__)


class StepModel:
    """A chat model as the steps of an agent ask it.

    Each candidate has a seed of its own: the one that is set, plus the candidate's index. Without one, none is sent.

    Args:
        model: A chat model, or one with ``.bind(...)``.
        tools: Tools to bind.
        n: How many candidates a step has.
        top_logprobs: Alternatives to ask for at each token; None asks for nothing, and nothing is refused or verified.
        action_format: ``native`` tool calls; ``json`` in the content; ``auto``: ``json`` where the provider table or a
            response says that tool calls carry no log-probabilities.

    Raises:
        ConfigError: An argument is out of range, the model is none, or its candidates would all be equal.
        UnsupportedLogprobs: The provider cannot return what is to be measured.
    """

    def __init__(
        self, model: object, tools: Sequence[Any], *, n: int, top_logprobs: int | None, action_format: ActionFormat
    ) -> None:
        if action_format not in get_args(ActionFormat):
            raise ConfigError(f"action_format must be one of {get_args(ActionFormat)}; found {action_format!r}")
        silent, self._bound, self._config = silent_model(model)
        self._silent = loop_safe(silent)
        refuse_equal_candidates(self._option("temperature"), n)
        self._model, self._tools, self._n, self._k = model, tools, n, top_logprobs
        self._action_format: ActionFormat = action_format
        self._endpoint = None if top_logprobs is None else endpoint_of(self._silent)
        self._ready: dict[bool, list[Any]] = {}
        self._actions = JsonActions(tools) if tools and self._writes_json() else None
        self._refuse()
        self._models(as_json=self._writes_json())

    @property
    def prepared(self) -> Runnable[Any, AIMessage]:
        """The model as the first candidate comes from it."""
        return self._models(as_json=self._writes_json())[0]

    async def draw(self, messages: Sequence[BaseMessage], config: RunnableConfig | None, run: Draw) -> CandidateSet:
        """The candidates of one step.

        Args:
            messages: The conversation.
            config: Configuration of the calls.
            run: Makes the calls, as ``sample`` does.

        Raises:
            UnsupportedLogprobs: An earlier response showed that nothing can be measured.
            LogprobsMissing: The first responses show it.
            ActionError: The server refuses ``response_format``.
            SamplingError: As ``run`` does.
        """
        self._refuse()
        as_json = self._writes_json()
        drawn = await self._drawn(messages, config, run, as_json=as_json)
        problem = self._verified(drawn, with_tools=bool(self._tools) and not as_json)
        if problem is None:
            return drawn
        if as_json or not self._writes_json():
            raise LogprobsMissing(problem)
        _log.warning("asking again, with actions as JSON: %s", problem)
        drawn = await self._drawn(messages, config, run, as_json=True)
        if problem := self._verified(drawn, with_tools=False):
            raise LogprobsMissing(problem)
        return drawn

    async def _drawn(
        self, messages: Sequence[BaseMessage], config: RunnableConfig | None, run: Draw, *, as_json: bool
    ) -> CandidateSet:
        models = self._models(as_json=as_json)
        if not as_json:
            return await run(lambda index: models[index % len(models)].ainvoke(list(messages), config))
        actions = self._json_actions()
        encoded = actions.encode(messages)

        async def call(index: int) -> AIMessage:
            return actions.decode(await models[index % len(models)].ainvoke(encoded, config))

        try:
            return await run(call)
        except SamplingError as error:
            if refused := _refused_schema(error):
                where = self._endpoint.base_url if self._endpoint else "this server"
                raise ActionError(
                    f"{where} refuses response_format json_schema, which action_format='json' needs: {refused}; use "
                    "action_format='native' with a server that measures tool calls: vLLM, SGLang or llama-server"
                ) from error
            raise

    def _writes_json(self) -> bool:
        """Whether actions are asked for as JSON, as far as is known now."""
        if not self._tools or self._action_format != "auto":
            return bool(self._tools) and self._action_format == "json"
        if self._endpoint is None:
            return False
        verdict = verdict_on(self._endpoint, tools=True)
        if verdict is not None and verdict.tool_tokens != "unknown":
            return verdict.tool_tokens == "none"
        known = self._endpoint.capabilities
        return known is not None and known.tool_tokens == "none"

    def _models(self, *, as_json: bool) -> list[Any]:
        """The prepared model, or where a seed is set, one for each candidate."""
        if as_json not in self._ready:
            tools = () if as_json else self._tools
            variants = seeded(self._silent, self._bound, self._n)
            ask = _asking(self._json_actions().response_format, self._silent, self._bound) if as_json else {}
            self._ready[as_json] = [
                sampling_model(model.bind(**{**bound, **ask}).with_config(self._config), tools, self._k)
                for model, bound in variants
            ]
        return self._ready[as_json]

    def _json_actions(self) -> JsonActions:
        self._actions = self._actions or JsonActions(self._tools)
        return self._actions

    def _refuse(self) -> None:
        if self._endpoint is None or self._k is None:
            return
        known = self._endpoint.capabilities
        names = {**known.must, **known.may_only} if known else {}
        options = {name: self._option(name) for name in names}
        k = self._bound.get("top_logprobs", self._k)
        tools = bool(self._tools) and not self._writes_json()
        refuse_unsupported(self._endpoint, top_logprobs=k, tools=tools, options=options)

    def _verified(self, drawn: CandidateSet, *, with_tools: bool) -> str | None:
        """What is wrong with the responses of an endpoint that was not verified before."""
        if self._endpoint is None or self._k is None:
            return None
        known = verdict_on(self._endpoint, tools=with_tools)
        if known is not None and not (with_tools and known.tool_tokens == "unknown"):
            return None
        verdict = verify(drawn.candidates, top_logprobs=self._k)
        if verdict is None:
            return None
        remember(self._endpoint, verdict, tools=with_tools)
        if known is None:
            for name, text in verdict.problems.items():
                _log.warning("%s at %s: %s: %s", self._endpoint.model, self._endpoint.base_url, name, text)
        return complaint(self._endpoint, verdict, tools=with_tools)

    def _option(self, name: str) -> Any:
        return self._bound.get(name, getattr(self._silent, name, None))


def refuse_equal_candidates(temperature: object, n: int) -> None:
    """Refuse to draw several candidates at temperature 0.

    Raises:
        ConfigError: All would be equal.
    """
    if n > 1 and isinstance(temperature, int | float) and temperature == 0:
        raise ConfigError(
            f"temperature is 0, so that all {n} candidates would be equal and there would be nothing to choose; set a "
            "temperature above 0, for example 0.7, or n=1"
        )


def seeded(model: BaseChatModel, bound: Mapping[str, Any], n: int) -> list[tuple[BaseChatModel, Mapping[str, Any]]]:
    """The model and what is bound to it; where a seed is set, once for each candidate, with seeds that differ."""
    if isinstance(bound.get("seed"), int):
        return [(model, {**bound, "seed": bound["seed"] + index}) for index in range(n)]
    seed = getattr(model, "seed", None)
    if isinstance(seed, int):
        return [(model.model_copy(update={"seed": seed + index}), bound) for index in range(n)]
    return [(model, bound)]


def _asking(response_format: Mapping[str, Any], model: BaseChatModel, bound: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments that ask for a form of response.

    ChatOpenAI turns ``response_format`` into a call that fails where an answer was cut off; in ``extra_body`` it
    reaches the server as it is.
    """
    if not hasattr(model, "extra_body"):
        return {"response_format": response_format}
    body: Mapping[str, Any] = bound.get("extra_body") or getattr(model, "extra_body", None) or {}
    return {"extra_body": {**body, "response_format": response_format}}


def _refused_schema(error: SamplingError) -> str | None:
    """The server's words, if it refused every call because of the form of the response."""
    texts = [str(f) for f in error.failures.values() if getattr(f, "status_code", None) in (400, 415, 422, 501)]
    if len(texts) < len(error.failures) or not all("response_format" in t or "json_schema" in t for t in texts):
        return None
    return texts[0]
