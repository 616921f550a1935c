"""LangGraph and LangChain agents whose steps sample N candidates and act on one."""

from ec_agents._lazy import lazy_names

__getattr__, __dir__, __all__ = lazy_names(__name__, __file__)
