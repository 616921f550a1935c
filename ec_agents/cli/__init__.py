"""The command line, ``ec-agents``."""
