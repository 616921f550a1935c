"""``CentroidChatModel`` in an ordinary chain: a prompt, a model, a parser.

Offline, on the embedded model: ``python examples/chat_model.py``
Live: ``python examples/chat_model.py --base-url http://localhost:8000/v1 --model my-model`` (needs langchain-openai)
"""

import argparse
import asyncio
import os

from langchain_core.callbacks import get_usage_metadata_callback
from langchain_core.language_models import BaseChatModel
from langchain_core.output_parsers import StrOutputParser
from langchain_core.prompts import ChatPromptTemplate
from pydantic import SecretStr

from ec_agents import CentroidChatModel
from ec_agents.embedded import EmbeddedChatModel, make_tasks


async def main() -> None:
    """Ask three questions through the chain, then show how one answer was chosen."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--base-url", help="an OpenAI-compatible server; without it, the embedded model answers")
    parser.add_argument("--model", default="default")
    options = parser.parse_args()
    wrapped: BaseChatModel = EmbeddedChatModel(seed=1)
    if options.base_url:
        from langchain_openai import ChatOpenAI  # noqa: PLC0415 - only live

        wrapped = ChatOpenAI(
            base_url=options.base_url, model=options.model, api_key=SecretStr(os.environ.get("OPENAI_API_KEY", "none"))
        )

    model = CentroidChatModel(wrapped, n=8)
    chain = ChatPromptTemplate.from_messages([("user", "{question}")]) | model | StrOutputParser()
    questions = [task.prompt for task in make_tasks("solve", 3)]
    with get_usage_metadata_callback() as usage:
        answers = await chain.abatch([{"question": question} for question in questions])
    for question, answer in zip(questions, answers, strict=True):
        print(f"{question}\n  {answer}")
    print(f"tokens of all candidates: {usage.usage_metadata}")

    message = await model.ainvoke(questions[0])
    record = message.response_metadata["ec_agents"]
    print(f"chosen {record['chosen']} because {record['reason']}; margin {record['margin']}")


if __name__ == "__main__":
    asyncio.run(main())
