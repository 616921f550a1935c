"""Records that other programs keep of responses → candidates.

Read are: OpenAI responses, chat or completions, alone, in a batch result or beside their request; single choices;
results of the reference implementation (``entropy_sequence``); request outputs of vLLM; native responses of OpenAI's
Responses API, Ollama and SGLang; results of its_hub; error bodies.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, cast

import numpy as np

from ec_agents.candidates import Candidate, Selection, TokenSignals
from ec_agents.errors import LogprobsMalformed, ServerError
from ec_agents.logprobs import shown
from ec_agents.responses import choice_candidate, response_candidates, server_error, usage_counts

Json = Mapping[str, Any]

KNOWN = (
    "a step of a TraceWriter, an OpenAI response or choice, a batch result, an item of entropy_results, a vLLM "
    "request output, a native response of the Responses API, Ollama or SGLang, or an its_hub result"
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Found:
    """What one record holds."""

    candidates: Sequence[Candidate] = ()
    """Numbered from 0."""
    failures: Sequence[str] = ()
    """Responses that are errors."""
    selection: Selection | None = None
    """The choice, if the record tells of one."""
    info: Json = field(default_factory=dict[str, Any])
    """Its plain fields: texts and numbers that belong to the whole record."""


def read_record(record: Json) -> Found:
    """The candidates in a record of a known form.

    Raises:
        LogprobsMalformed: The form is not known.
    """
    for names, read in _FORMS.items():
        if record.keys() >= set(names.split()):
            found = read(record)
            return replace(found, info={**_plain_fields(record), **found.info})
    raise LogprobsMalformed(f"{KNOWN} is needed; found an object with keys {sorted(map(str, record))[:12]}")


def _response(record: Json) -> Found:
    """An OpenAI response."""
    try:
        candidates = response_candidates(record)
    except (LogprobsMalformed, ServerError) as error:
        return Found(failures=[str(error)])
    usage = usage_counts(record.get("usage"))
    if usage is not None and len(candidates) == 1:
        return Found(candidates=[replace(candidates[0], usage=usage)])
    return Found(candidates=candidates, info={} if usage is None else {"usage": usage})


def _wrapped(record: Json) -> Found:
    """A response beside its request, or in a batch result."""
    inner: Any = record["response"]
    if isinstance(inner, Mapping) and "body" in inner:
        inner = cast("Json", inner)["body"]
    if not isinstance(inner, Mapping):
        return Found(failures=[f"no response: {record.get('error')!r:.200}"])
    return _response(cast("Json", inner))


def _choice(record: Json) -> Found:
    """One choice of a response, or one output of vLLM that is kept alone."""
    if isinstance(record.get("logprobs"), list) and "text" in record:
        return Found(candidates=[_vllm_output(record, 0)])
    return Found(candidates=[choice_candidate(record, 0)])


def _reference(record: Json) -> Found:
    """An item of the reference's ``entropy_results``: one response to the problem ``original_id``."""
    tokens: Any = record["entropy_sequence"]
    if not isinstance(tokens, list):
        raise LogprobsMalformed(f"entropy_sequence must be a list of tokens; found {tokens!r:.60}")
    rows = [_reference_token(token) for token in cast("list[Any]", tokens)]
    entropies, logprobs, confidences, sizes = np.array(rows, dtype=np.float64).reshape(-1, 4).T
    signals = TokenSignals(
        entropies=entropies.astype(np.float32),
        logprobs=logprobs.astype(np.float32),
        confidences=confidences.astype(np.float32),
        n_alternatives=int(sizes.max(initial=0)),
    )
    text = record.get("generated_text")
    if text is None:
        text = "".join(str(token.get("token", "")) for token in cast("list[Json]", tokens))
    return Found(candidates=[Candidate(index=0, content=str(text), signals=signals if rows else None)])


def _reference_token(token: Any) -> tuple[float, float, float, int]:
    """Entropy, log-probability and confidence of a token, and the number of its alternatives; NaN = missing.

    The probabilities in the file are renormalised, and an entropy of 0 without any of them is what the reference writes
    for masked log-probabilities.
    """
    if not isinstance(token, Mapping):
        raise LogprobsMalformed(f"a token of entropy_sequence must be an object; found {token!r:.60}")
    fields = cast("Json", token)
    probs = np.array(fields.get("top_k_probs") or (), dtype=np.float64)
    logs = np.log(probs[probs > 0])
    entropy = fields.get("entropy")
    if entropy is None or (entropy == 0 and "top_k_probs" in fields and not len(logs)):
        return np.nan, np.nan, np.nan, 0
    ids: Sequence[Any] = fields.get("top_k_token_ids") or ()
    drawn = probs[list(ids).index(fields["token_id"])] if fields.get("token_id") in ids else np.nan
    confidence = -logs.mean() if len(logs) else np.nan
    return float(entropy), float(np.log(drawn)) if drawn > 0 else np.nan, float(confidence), len(probs)


def _vllm(record: Json) -> Found:
    """A request output of vLLM, as ``dataclasses.asdict`` or ``vars`` write it."""
    outputs: Any = record["outputs"]
    if not isinstance(outputs, list) or not all(isinstance(output, Mapping) for output in cast("list[Any]", outputs)):
        raise LogprobsMalformed(f"outputs must be a list of objects; found {outputs!r:.60}")
    return Found(candidates=[_vllm_output(output, i) for i, output in enumerate(cast("list[Json]", outputs))])


def _vllm_output(output: Json, index: int) -> Candidate:
    """One completion of vLLM: ``logprobs`` is a list of {token id: {"logprob", …}} or {token id: logprob}."""
    given: Any = output.get("logprobs") or []
    try:
        rows = _flat_rows(cast("Json", given)) if isinstance(given, Mapping) else _rows(given)
    except (TypeError, AttributeError, LookupError) as error:
        raise LogprobsMalformed(f"the log-probabilities of output {index} are not in vLLM's form: {error}") from error
    ids: Sequence[Any] = output.get("token_ids") or [None] * len(rows)
    drawn = [None if row is None else row.get(str(token)) for row, token in zip(rows, ids, strict=False)]
    fields: dict[str, Any] = {
        "text": output.get("text") or "",
        "finish_reason": output.get("finish_reason"),
        "logprobs": {"token_logprobs": drawn, "top_logprobs": rows[: len(drawn)]} if rows else None,
    }
    return choice_candidate(fields, index)


def _rows(given: Any) -> list[Json | None]:
    return [None if row is None else {str(token): _logprob(value) for token, value in row.items()} for row in given]


def _flat_rows(flat: Json) -> list[Json | None]:
    """The rows of ``FlatLogprobs``: one list of all tokens, and where each row begins and ends."""
    bounds = zip(flat["start_indices"], flat["end_indices"], strict=True)
    ids, logprobs = flat["token_ids"], flat["logprobs"]
    return [{str(ids[i]): logprobs[i] for i in range(start, end)} for start, end in bounds]


def _logprob(value: Any) -> Any:
    return cast("Json", value).get("logprob") if isinstance(value, Mapping) else value


def _its_hub(record: Json) -> Found:
    """A result of its_hub: messages, each with its raw choice or log-probabilities; scores; the choice."""
    responses: Any = record["responses"]
    if not isinstance(responses, list):
        raise LogprobsMalformed(f"responses must be a list of messages; found {responses!r:.60}")
    candidates = [_its_hub_message(message, i) for i, message in enumerate(cast("list[Any]", responses))]
    usage = usage_counts(record.get("usage"))
    info = {} if usage is None else {"usage": usage}
    chosen: Any = record.get("selected_index")
    if not isinstance(chosen, int) or not 0 <= chosen < len(candidates):
        return Found(candidates=candidates, info=info)
    scores = dict(enumerate(cast("Sequence[float | None]", record.get("scores") or [])))
    others = [candidate.index for candidate in candidates if candidate.index != chosen]
    selection = Selection(
        chosen=chosen, order=[chosen, *others], scores=scores, margin=None, reason="ranked", selector="its_hub"
    )
    return Found(candidates=candidates, selection=selection, info=info)


def _its_hub_message(message: Any, index: int) -> Candidate:
    if not isinstance(message, Mapping):
        raise LogprobsMalformed(f"response {index} must be a message; found {message!r:.60}")
    fields = cast("Json", message)
    raw = cast("Json", fields.get("_raw_choice") or {})
    choice = {"finish_reason": fields.get("finish_reason"), "logprobs": fields.get("logprobs"), **raw}
    return choice_candidate({**choice, "message": fields}, index)


def _error(record: Json) -> Found:
    """An error in place of a response."""
    return Found(failures=[str(server_error(record) or f"error: {shown(record.get('detail'), 200)}")])


def _responses_api(record: Json) -> Found:
    """A response of OpenAI's Responses API: items of messages, whose parts have a list of tokens, and of calls."""
    items: Any = record["output"]
    if not isinstance(items, list) or not all(isinstance(item, Mapping) for item in cast("list[Any]", items)):
        raise LogprobsMalformed(f"output must be a list of items; found {shown(items, 60)}")
    parts: list[Any] = [p for item in cast("list[Json]", items) for p in item.get("content") or () if "text" in p]
    calls = [
        {"id": item.get("call_id"), "function": {"name": item.get("name"), "arguments": item.get("arguments")}}
        for item in cast("list[Json]", items)
        if item.get("type") == "function_call"
    ]
    details: Any = record.get("incomplete_details") or {}
    choice = {
        "message": {"content": [{"text": part["text"]} for part in parts], "tool_calls": calls},
        "finish_reason": details.get("reason") or record.get("status"),
        "logprobs": [token for part in parts for token in part.get("logprobs") or ()] or None,
        "error": record.get("error"),
    }
    return _alone(choice, record.get("usage"))


def _ollama(record: Json) -> Found:
    """A response of Ollama: ``/api/chat`` has a message, ``/api/generate`` a text."""
    message = record.get("message", {"content": record.get("response")})
    choice = {"message": message, "finish_reason": record.get("done_reason"), "logprobs": record.get("logprobs")}
    counts = {"prompt_tokens": record.get("prompt_eval_count"), "completion_tokens": record.get("eval_count")}
    return _alone(choice, counts)


def _sglang(record: Json) -> Found:
    """A response of SGLang's ``/generate``: tokens are [log-probability, id, text]."""
    meta: Any = record["meta_info"]
    if not isinstance(meta, Mapping):
        raise LogprobsMalformed(f"meta_info must be an object; found {shown(meta, 60)}")
    fields = cast("Json", meta)
    reason: Any = fields.get("finish_reason")
    drawn: list[Any] = fields.get("output_token_logprobs") or []
    rows: list[Any] = fields.get("output_top_logprobs") or [None] * len(drawn)
    try:
        tops = [None if row is None else {str(token[1]): token[0] for token in row} for row in rows]
        logprobs = {"token_logprobs": [token[0] for token in drawn], "top_logprobs": tops} if drawn else None
    except (TypeError, LookupError) as error:
        raise LogprobsMalformed(f"tokens must be lists of log-probability, id and text: {error}") from error
    choice = {
        "text": record["text"],
        "finish_reason": cast("Json", reason).get("type") if isinstance(reason, Mapping) else reason,
        "logprobs": logprobs,
    }
    return _alone(choice, fields)


def _alone(choice: Json, usage: Any) -> Found:
    return Found(candidates=[replace(choice_candidate(choice, 0), usage=usage_counts(usage))])


_FORMS: Mapping[str, Callable[[Json], Found]] = {
    "entropy_sequence": _reference,
    "choices": _response,
    "done": _ollama,
    "text meta_info": _sglang,
    "output": _responses_api,
    "response": _wrapped,
    "outputs": _vllm,
    "responses": _its_hub,
    "message object": _error,
    "message": _choice,
    "text": _choice,
    "error": _error,
    "detail": _error,
}
"""The forms by the fields that tell them apart; the first that are there decide."""


def _plain_fields(record: Json) -> dict[str, Any]:
    return {name: value for name, value in record.items() if isinstance(value, str | int | float) and name != "text"}
