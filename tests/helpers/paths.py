"""Where the tests find what they read."""

from pathlib import Path

ROOT = Path(__file__).parent.parent.parent
DATA = ROOT / "tests" / "data"
DOCS = ROOT / "docs"
