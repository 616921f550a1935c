"""OpenAI-compatible servers: what they can return, the chat model that talks to them, actions as JSON."""

from ec_agents._lazy import lazy_names

__getattr__, __dir__, __all__ = lazy_names(__name__, __file__)
