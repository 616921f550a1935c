"""Spans of a step, named after OpenTelemetry's GenAI semantic conventions; nothing at all without opentelemetry.

A step is one ``chat`` span for the N calls, with the usage of all of them, and one ``select`` span for the choice, with
a ``gen_ai.evaluation.result`` event for each candidate. Neither holds text of the conversation.
"""

from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager
from typing import Any, cast

from langchain_core.language_models import BaseChatModel
from langchain_core.runnables import Runnable, RunnableBinding

from ec_agents.candidates import CandidateSet, Selection

try:
    from opentelemetry import trace
except ImportError:  # the extra is not installed
    trace = None

_REQUEST = {
    "ls_provider": "gen_ai.provider.name",
    "ls_model_name": "gen_ai.request.model",
    "ls_temperature": "gen_ai.request.temperature",
    "ls_max_tokens": "gen_ai.request.max_tokens",
}


@contextmanager
def sampling_span(model: Runnable[Any, Any], n: int) -> Generator[Callable[[CandidateSet], None]]:
    """The span of the N calls of a step; what it yields takes the candidates.

    Attributes: ``gen_ai.operation.name``, ``gen_ai.provider.name``, ``gen_ai.request.model``,
    ``gen_ai.request.choice.count``, ``gen_ai.response.finish_reasons``, ``gen_ai.usage.input_tokens`` and
    ``.output_tokens`` over all candidates, ``ec_agents.failures``; ``error.type`` if the step failed.
    """
    if trace is None:
        yield _nothing
        return
    request = _request_attributes(model)
    attributes = {"gen_ai.operation.name": "chat", "gen_ai.request.choice.count": n, **request}
    name = f"chat {request.get('gen_ai.request.model', '')}".rstrip()
    with _tracer().start_as_current_span(name, kind=trace.SpanKind.CLIENT, attributes=attributes) as span:
        try:
            yield lambda drawn: span.set_attributes(_response_attributes(drawn))
        except BaseException as error:
            span.set_attribute("error.type", type(error).__qualname__)
            raise


@contextmanager
def choice_span() -> Generator[Callable[[Selection], None]]:
    """The span of the choice; what it yields takes the selection.

    Attributes: ``ec_agents.chosen``, ``.reason``, ``.selector``, ``.margin``. One event a candidate, best first, has
    ``gen_ai.evaluation.name``, ``.score.value``, ``.score.label`` (chosen, passed or flawed) and ``.explanation``.
    """
    if trace is None:
        yield _nothing
        return
    with _tracer().start_as_current_span("select") as span:

        def report(selection: Selection) -> None:
            span.set_attributes(_choice_attributes(selection))
            for index in selection.order:
                span.add_event("gen_ai.evaluation.result", _evaluation(selection, index))

        yield report


def _nothing(_: object) -> None: ...


def _tracer() -> Any:
    return cast("Any", trace).get_tracer("ec_agents")


def _request_attributes(model: Runnable[Any, Any]) -> dict[str, Any]:
    """What LangChain's tracers are told of the model, under the names of the conventions."""
    bound: dict[str, Any] = {}
    found: Any = model
    while isinstance(found, RunnableBinding):
        binding = cast("RunnableBinding[Any, Any]", found)
        bound, found = {**binding.kwargs, **bound}, binding.bound
    if not isinstance(found, BaseChatModel):
        return {}
    params: Mapping[str, Any] = found._get_ls_params(**bound)  # noqa: SLF001 - made for tracers
    return {name: params[key] for key, name in _REQUEST.items() if params.get(key) is not None}


def _response_attributes(drawn: CandidateSet) -> dict[str, Any]:
    usages = [candidate.usage for candidate in drawn.candidates if candidate.usage]
    tokens = {
        f"gen_ai.usage.{kind}": sum(usage.get(kind, 0) for usage in usages)
        for kind in ("input_tokens", "output_tokens")
        if usages
    }
    reasons = [candidate.finish_reason or "unknown" for candidate in drawn.candidates]
    return {**tokens, "gen_ai.response.finish_reasons": reasons, "ec_agents.failures": len(drawn.failures)}


def _choice_attributes(selection: Selection) -> dict[str, Any]:
    found = {
        "chosen": selection.chosen,
        "reason": selection.reason,
        "selector": selection.selector,
        "margin": selection.margin,
    }
    return {f"ec_agents.{name}": value for name, value in found.items() if value is not None}


def _evaluation(selection: Selection, index: int) -> dict[str, Any]:
    flaws = selection.flaws.get(index, {})
    label = "chosen" if index == selection.chosen else "flawed" if flaws else "passed"
    found = {
        "gen_ai.evaluation.name": selection.selector,
        "gen_ai.evaluation.score.value": selection.scores[index],
        "gen_ai.evaluation.score.label": label,
        "gen_ai.evaluation.explanation": "; ".join(f"{name}: {text}" for name, text in flaws.items()) or None,
        "ec_agents.candidate": index,
    }
    return {name: value for name, value in found.items() if value is not None}
