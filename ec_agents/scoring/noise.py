"""How large a margin is by chance alone."""

import math
from functools import cache

import numpy as np
from numpy.typing import ArrayLike, NDArray

Floats = NDArray[np.float64]

_REACH = 8.0
"""Beyond so many standard deviations nothing is left of a normal distribution."""
_POINTS_PER_SD = 4
_MOST_POINTS = 4000


def chance_of_margin(margin: float, deviations: ArrayLike) -> float:
    """How often the best of N scores that carry no signal leads the second by ``margin`` or more.

    Source:
        Σ_i ∫ f_i(x) Π_{j≠i} P(X_j > x + margin) dx for independent normal X_i of one mean, by the trapezoidal rule.

    Args:
        margin: Distance between the best two scores, 0 or more.
        deviations: ``(N,)``: standard deviation of each score without any signal, all above 0.

    Returns:
        0 to 1; 1 for a single score, which leads whatever it is.
    """
    sds = np.asarray(deviations, dtype=np.float64)
    if len(sds) < 2 or margin <= 0:
        return 1.0
    n_points = min(_MOST_POINTS, math.ceil(2 * _REACH * _POINTS_PER_SD * float(sds.max() / sds.min())))
    x = np.linspace(-_REACH, _REACH, n_points) * sds.max()
    density = np.exp(-0.5 * (x / sds[:, None]) ** 2) / (sds[:, None] * math.sqrt(2 * math.pi))
    above = np.log(np.maximum(_upper_tail((x + margin) / sds[:, None]), 1e-300))
    others = np.exp(above.sum(axis=0) - above)
    return min(1.0, float((density * others).sum() * (x[1] - x[0])))


def _upper_tail(z: Floats) -> Floats:
    """P(Z > z) of a standard normal variable."""
    grid, values = _table()
    return np.interp(z, grid, values)


@cache
def _table() -> tuple[Floats, Floats]:
    grid = np.linspace(-9.0, 9.0, 4501)
    return grid, np.array([0.5 * math.erfc(z / math.sqrt(2)) for z in grid.tolist()])
