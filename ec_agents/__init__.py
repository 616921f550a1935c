"""Sample N responses at every agent step, rank them by entropy centroid, let only the best one act.

Public names are loaded on first use, so that ``import ec_agents`` stays light.
"""

from ec_agents._lazy import lazy_names

__version__ = "0.1.0"

__getattr__, __dir__, _names = lazy_names(__name__, __file__)

# A star import loads every name, so it leaves out the one that needs an extra.
__all__ = [name for name in _names if name != "EntropyCentroidMiddleware"]  # pyright: ignore[reportUnsupportedDunderAll]
