"""The httpx library that the installed OpenAI SDK is built on: ``httpx2`` from version 3 on, ``httpx`` before."""

from importlib import import_module
from typing import Any

import openai

httpx: Any = import_module(openai.DefaultAsyncHttpxClient.__mro__[1].__module__.partition(".")[0])
"""Objects that are handed to the SDK have to come from the same library."""
