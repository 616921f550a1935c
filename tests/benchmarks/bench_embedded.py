"""Speed of the embedded model on one thread: ``PYTHONPATH=. python tests/benchmarks/bench_embedded.py``."""

import os

os.environ["OMP_NUM_THREADS"] = os.environ["OPENBLAS_NUM_THREADS"] = "1"

import time

from langchain_core.messages import BaseMessage, HumanMessage

from ec_agents.embedded import EmbeddedChatModel, make_tasks
from ec_agents.embedded.chat_model import _result
from ec_agents.embedded.engine import Completion, Engine, Request, default_engine
from ec_agents.embedded.template import Turn, render
from ec_agents.embedded.transformer import Transformer

TASK = make_tasks("solve", 1)[0]
PROMPT = tuple(render([Turn("user", TASK.prompt)]))


def generate(engine: Engine, batch: int, *, top_k: int) -> tuple[float, list[Completion]]:
    """Seconds and responses of four full batches, so that finished rows are replaced as in real use."""
    request = Request(prompt=PROMPT, seed=0, n=4 * batch, top_k=top_k)
    start = time.perf_counter()
    completions = engine.submit(request).result()
    return time.perf_counter() - start, completions


def chat(n: int) -> tuple[float, float]:
    """Tokens/s of one call of the chat model for n responses, and the share of its time for building the messages."""
    model = EmbeddedChatModel(seed=0, n=n)
    messages: list[BaseMessage] = [HumanMessage(TASK.prompt)]
    start = time.perf_counter()
    model.generate([messages])
    whole = time.perf_counter() - start
    request, logprobs = model._request(messages, (), {})
    completions = default_engine().submit(request).result()
    start = time.perf_counter()
    _result(request, completions, logprobs=logprobs)
    return sum(len(c.tokens) for c in completions) / whole, (time.perf_counter() - start) / whole


def main() -> None:
    """Print the table."""
    transformer = Transformer.load()
    for batch in (1, 8, 32, 64):
        engine = Engine(transformer, max_rows=batch)
        engine.submit(Request(prompt=PROMPT, seed=1, max_tokens=2)).result()
        rates: list[float] = []
        for top_k in (0, 20):
            seconds, completions = generate(engine, batch, top_k=top_k)
            rates.append(sum(len(c.tokens) for c in completions) / seconds)
        print(f"batch {batch:2}: {rates[0]:6.0f} tokens/s, {rates[1]:6.0f} with 20 alternatives each")
    chat(1)  # loads the weights
    for n in (1, 8, 32):
        rate, share = chat(n)
        print(f"chat model, n = {n:2}: {rate:6.0f} tokens/s, {share:.1%} of the time for building the messages")


if __name__ == "__main__":
    main()
