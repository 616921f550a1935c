"""Stage 2 - parse: LangChain models and messages → candidates, and the record of a choice.

The graph, the middleware and the chat model all prepare their model, read its messages and report their choices here.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, cast

from langchain_core.language_models import LanguageModelInput
from langchain_core.messages import AIMessage
from langchain_core.runnables import Runnable
from langchain_core.tools import BaseTool
from pydantic import BaseModel, ValidationError

from ec_agents.candidates import Candidate, CandidateSet, Selection
from ec_agents.errors import FailedCall, LogprobsError, LogprobsMalformed
from ec_agents.logprobs import choice_candidate, response_candidates, token_signals
from ec_agents.agents.quiet_model import SIGNALS_KEY, silent_model

SHOWN_CHARACTERS = 400
"""Most characters of each candidate's text that the decision in the state shows; every checkpoint has a copy of it."""


def as_candidate(response: object, index: int) -> Candidate:
    """A candidate from what a call returned.

    Understands a ``Candidate``, a LangChain ``AIMessage``, an OpenAI-style response or choice as a dict, and objects of
    the OpenAI SDK. A response with several choices gives the first.

    Raises:
        LogprobsMalformed: The response is none of these.
    """
    if isinstance(response, Candidate):
        return replace(response, index=index)
    if isinstance(response, AIMessage):
        return message_candidate(response, index)
    dump = getattr(response, "model_dump", None)
    data: object = dump() if callable(dump) else response
    if not isinstance(data, Mapping):
        found = type(response).__name__
        raise LogprobsMalformed(f"a call must return an AIMessage, a Candidate or an OpenAI-style dict; found {found}")
    payload = dict(cast("Mapping[str, Any]", data))
    if "choices" in payload:
        return replace(response_candidates(payload)[0], index=index)
    return choice_candidate(payload, index)


def message_candidate(message: AIMessage, index: int) -> Candidate:
    """A candidate from a LangChain message.

    Its signals are those that a model prepared by ``sampling_model`` packed, or those of the log-probabilities in
    OpenAI's form in ``response_metadata["logprobs"]``. Missing or malformed log-probabilities, undecodable tool calls
    and refusals become flaws.
    """
    metadata: dict[str, Any] = message.response_metadata
    flaws: dict[str, str] = {}
    try:
        signals = token_signals(metadata.get(SIGNALS_KEY) or metadata.get("logprobs"))
    except LogprobsError as error:
        signals = None
        flaws["no_signal"] = str(error)
    if message.invalid_tool_calls:
        bad = message.invalid_tool_calls[0]
        flaws["invalid_action"] = f"arguments of {bad.get('name')!r} are not a JSON object: {bad.get('args')!r}"
    refusal = cast("object", message.additional_kwargs.get("refusal"))
    if refusal:
        flaws["refused"] = str(refusal)
    usage = message.usage_metadata
    return Candidate(
        index=index,
        content=str(message.text),
        tool_calls=[{"name": c["name"], "args": c["args"], "id": c["id"]} for c in message.tool_calls],
        finish_reason=metadata.get("finish_reason") or metadata.get("stop_reason") or metadata.get("done_reason"),
        signals=signals,
        usage=None if usage is None else {k: usage[k] for k in ("input_tokens", "output_tokens", "total_tokens")},
        flaws=flaws,
    )


def sampling_model(
    model: Runnable[LanguageModelInput, AIMessage], tools: Sequence[Any] = (), top_logprobs: int | None = 20
) -> Runnable[LanguageModelInput, AIMessage]:
    """The model with its tools, asked for log-probabilities, neither streaming nor cached, out of sight of all streams.

    What was bound to the model is bound again at the end, because ``bind_tools`` on a binding drops it.

    Args:
        model: A chat model, or one with ``.bind(...)``.
        tools: Tools to bind.
        top_logprobs: Alternatives to ask for at each token; None asks for nothing.

    Raises:
        ConfigError: It is no chat model.
    """
    silent, bound, config = silent_model(model)
    prepared: Any = silent.bind_tools(tools) if tools else silent
    return prepared.bind(**{**logprobs_settings(top_logprobs), **bound}).with_config(config)


def logprobs_settings(top_logprobs: int | None) -> dict[str, Any]:
    """The arguments that ask a model for log-probabilities; None asks for nothing."""
    return {} if top_logprobs is None else {"logprobs": True, "top_logprobs": top_logprobs}


def invalid_action(candidate: Candidate, tools: Mapping[str, BaseTool]) -> str | None:
    """What is wrong with a candidate's tool calls, if anything."""
    for call in candidate.tool_calls:
        tool = tools.get(call["name"])
        if tool is None:
            return f"unknown tool {call['name']!r}; known: {', '.join(tools)}"
        schema = tool.tool_call_schema
        if isinstance(schema, type) and issubclass(schema, BaseModel):
            try:
                schema.model_validate(call["args"])
            except ValidationError as error:
                first = error.errors(include_url=False)[0]
                where = ".".join(map(str, first["loc"])) or "arguments"
                return f"arguments of {call['name']!r} do not fit: {where}: {first['msg']}"
    return None


def bound_action_problem(candidate: Candidate, tools: Sequence[Any]) -> str | None:
    """What is wrong with a candidate's tool calls, by the bound form of the tools: their names, and what they require.

    Tools in another form than OpenAI's are the provider's own, and nothing is checked if there is one.
    """
    functions: list[Any] = [cast("Any", tool).get("function") if isinstance(tool, Mapping) else None for tool in tools]
    known: dict[str, Any] = {function["name"]: function.get("parameters") or {} for function in functions if function}
    if not known or not all(functions):
        return None
    for call in candidate.tool_calls:
        if call["name"] not in known:
            return f"unknown tool {call['name']!r}; known: {', '.join(known)}"
        missing = [name for name in known[call["name"]].get("required", ()) if name not in call["args"]]
        if missing:
            return f"arguments of {call['name']!r} do not fit: {', '.join(missing)} missing"
    return None


def without_logprobs(message: AIMessage) -> AIMessage:
    """The message without its log-probabilities and signals, which are too large to keep."""
    dropped = ("logprobs", SIGNALS_KEY)
    metadata = {key: value for key, value in message.response_metadata.items() if key not in dropped}
    return message.model_copy(update={"response_metadata": metadata})


def decision_record(drawn: CandidateSet, selection: Selection) -> dict[str, Any]:
    """The evidence of a choice as builtins, small enough to stay on the message: ``response_metadata["ec_agents"]``."""
    failures = {str(i): describe_failure(failure) for i, failure in drawn.failures.items()}
    return {**selection.to_builtins(), "failures": failures, "usage": total_usage(drawn)}


def outline(candidate: Candidate) -> dict[str, Any]:
    """What a person wants to see of a candidate, as builtins."""
    return {
        "content": candidate.content,
        "tool_calls": [dict(call) for call in candidate.tool_calls],
        "finish_reason": candidate.finish_reason,
        "flaws": dict(candidate.flaws),
        "n_tokens": None if candidate.signals is None else candidate.signals.n_tokens,
    }


def shortened(found: dict[str, Any]) -> dict[str, Any]:
    """An ``outline`` as checkpoints keep it: of a long text, the beginning and the end."""
    text, half = found["content"], SHOWN_CHARACTERS // 2
    return found if len(text) <= SHOWN_CHARACTERS else {**found, "content": f"{text[:half]} … {text[-half:]}"}


def total_usage(drawn: CandidateSet) -> dict[str, int]:
    """Tokens of all candidates together, and of responses that were thrown away, as far as they are reported."""
    total = dict(drawn.spent)
    for candidate in drawn.candidates:
        for key, count in (candidate.usage or {}).items():
            total[key] = total.get(key, 0) + count
    return total


def describe_failure(failure: BaseException) -> str:
    """A failed call in one line."""
    return str(failure) if isinstance(failure, FailedCall) else f"{type(failure).__name__}: {failure}"
