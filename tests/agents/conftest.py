"""Fixtures of the tests of agents."""

from helpers.databases import postgres

__all__ = ["postgres"]
