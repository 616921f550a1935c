"""LangChain's standard suites for ``OpenAIChatModel``, against a local server whose model is obliging."""

import json
from collections.abc import Iterator
from typing import Any

import pytest
from langchain_tests.integration_tests import ChatModelIntegrationTests
from langchain_tests.unit_tests import ChatModelUnitTests

from ec_agents.servers.openai_chat_model import OpenAIChatModel
from ec_agents.testing import FaultServer, Reply
from ec_agents.testing.server import completion

VALUES = {"integer": 3, "number": 3.0, "boolean": True, "array": [], "object": {}}


def fitting(schema: dict[str, Any], text: str) -> Any:
    """A value that fits a JSON schema; texts are the question."""
    if "enum" in schema:
        return schema["enum"][0]
    if "properties" in schema:
        return {name: fitting(part, text) for name, part in schema["properties"].items()}
    return VALUES.get(schema.get("type", "string"), text)


def respond(request: dict[str, Any]) -> Any:
    """Calls the first tool that it may call, keeps to a schema, or talks."""
    last = request["messages"][-1]
    text = last["content"] if isinstance(last["content"], str) else last["content"][0]["text"]
    form = request.get("response_format")
    choice = request.get("tool_choice")
    named = choice["function"]["name"] if isinstance(choice, dict) else None
    tools = [tool["function"] for tool in request.get("tools") or ()]
    if form is not None:
        schema = form.get("json_schema", {}).get("schema", {"properties": {}})
        reply = Reply(content=json.dumps(fitting(schema, text)))
    elif tools and last["role"] != "tool":
        function = next((tool for tool in tools if tool["name"] == named), tools[0])
        reply = Reply(tool_calls=[(function["name"], fitting(function["parameters"], text))])
    else:
        reply = Reply(content="It is as you say.")
    return completion([reply.message()], request)


@pytest.fixture(scope="module")
def server() -> Iterator[FaultServer]:
    with FaultServer(respond) as running:
        yield running


class Standard:
    @pytest.fixture(autouse=True)
    def _served(self, server: FaultServer) -> None:
        self.server = server

    @property
    def chat_model_class(self) -> type[OpenAIChatModel]:
        return OpenAIChatModel

    @property
    def chat_model_params(self) -> dict[str, Any]:
        return {"model": "obliging", "base_url": self.server.base_url, "api_key": "none", "max_retries": 0}

    @property
    def supports_model_override(self) -> bool:
        return True

    @property
    def model_override_value(self) -> str:
        return "another"


class TestUnit(Standard, ChatModelUnitTests):
    @property
    def init_from_env_params(self) -> tuple[dict[str, str], dict[str, Any], dict[str, Any]]:
        base_url = "http://127.0.0.1:9/v1"
        return {"OPENAI_BASE_URL": base_url}, {"model": "m"}, {"base_url": base_url}


class TestIntegration(Standard, ChatModelIntegrationTests): ...
