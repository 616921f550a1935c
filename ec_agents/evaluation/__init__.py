"""Evaluations: tasks, runs, outcomes, replay under every selector, tables and reports."""

from ec_agents._lazy import lazy_names

__getattr__, __dir__, __all__ = lazy_names(__name__, __file__)
