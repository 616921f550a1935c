"""A small Llama-style decoder in numpy: RMSNorm, rotary positions, key-value cache, SwiGLU, tied embeddings.

Weights are kept as the matrices that the inner loop multiplies with: float32, ``(in, out)``, norm gains and constant
factors folded into the matrix that follows them.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib.resources import as_file, files
from typing import Any, Self

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ec_agents.embedded import vocabulary
from ec_agents.errors import ConfigError

Floats = NDArray[np.float32]
Ints = NDArray[np.int64]
Attend = Callable[[int, Floats, Floats, Floats], Floats]
"""Layer index, queries, keys, values, each ``(N, heads, size)`` → what the heads mix, ``(N, width)``."""

CONTEXT = 512
"""Most tokens of a prompt and its response together."""
SMALL = 2**18
"""Multiplications of the largest matrix product that OpenBLAS runs on the calling thread.

Above it, its threads wait for one another actively. With another process on the cores, that made steps 30 times slower.
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """Sizes of the network."""

    vocabulary: int
    width: int = 128
    layers: int = 5
    heads: int = 4
    hidden: int = 352

    def frequencies(self) -> Floats:
        """Rotary frequencies of one head, ``(width / heads / 2,)``, radians per position."""
        size = self.width // self.heads
        return (10000.0 ** (-np.arange(0, size, 2) / size)).astype(np.float32)


@dataclass(frozen=True, slots=True, eq=False)
class Prefill:
    """The result of reading a prompt of T tokens."""

    logits: Floats
    """Logits of the first token of the response, ``(V,)``."""
    keys: Floats
    """``(layers, heads, T, size)``, rotated."""
    values: Floats
    """``(layers, heads, T, size)``."""


class Cache:
    """Keys and values of up to ``rows`` responses, each with its own length.

    The rows in use are always the first ``count`` ones. Memory is taken as positions are first written, at most
    2.5 MiB a row.
    """

    keys: Floats
    """``(layers, rows, heads, CONTEXT, size)``."""
    values: Floats
    """As ``keys``."""
    lengths: Ints
    """Positions filled in each row, ``(rows,)``."""
    count: int
    """Rows in use."""

    def __init__(self, shape: Shape, rows: int) -> None:
        # Zeros rather than np.empty: a masked position has weight 0, and 0 times garbage may be NaN.
        self.keys = np.zeros((shape.layers, rows, shape.heads, CONTEXT, shape.width // shape.heads), np.float32)
        self.values = np.zeros_like(self.keys)
        self.lengths = np.zeros(rows, np.int64)
        self.count = 0

    def add(self, prompt: Prefill) -> None:
        """Start the next row with a prompt."""
        length = prompt.keys.shape[2]
        self.keys[:, self.count, :, :length] = prompt.keys
        self.values[:, self.count, :, :length] = prompt.values
        self.lengths[self.count] = length
        self.count += 1

    def remove(self, row: int) -> None:
        """Free a row; the last one takes its place."""
        self.count -= 1
        if row < self.count:
            length = self.lengths[row] = self.lengths[self.count]
            self.keys[:, row, :, :length] = self.keys[:, self.count, :, :length]
            self.values[:, row, :, :length] = self.values[:, self.count, :, :length]


@dataclass(frozen=True, slots=True, eq=False)
class _Layer:
    """Matrices of one block, ``(in, out)``."""

    qkv: Floats
    out: Floats
    gate_up: Floats
    down: Floats


class Transformer:
    """The network with its weights; immutable, so threads may share it.

    Args:
        arrays: Weights by the names that training saves, linear ones ``(out, in)``; any float type.
        shape: Sizes of the network.

    Raises:
        ConfigError: An array is missing or has another shape.
    """

    def __init__(self, arrays: Mapping[str, NDArray[Any]], shape: Shape) -> None:
        weights = _checked(arrays, shape)
        self.shape = shape
        self._embed = weights["embed"]
        self._unembed = _columns(self._embed * weights["norm"])
        self._layers = [_fold(weights, f"layers.{i}.", shape) for i in range(shape.layers)]
        angles = np.arange(CONTEXT, dtype=np.float32)[:, None] * shape.frequencies()
        self._cos = np.concatenate((np.cos(angles), np.cos(angles)), axis=1)[:, None]
        self._sin = np.concatenate((-np.sin(angles), np.sin(angles)), axis=1)[:, None]

    @classmethod
    def load(cls) -> Self:
        """Load the model that ships with the package.

        Raises:
            ConfigError: The weights file does not hold this network.
            FileNotFoundError: The package was installed without its weights.
        """
        with (
            as_file(files("ec_agents.embedded") / "weights.npz") as path,
            np.load(path, allow_pickle=False) as arrays,
        ):
            return cls(arrays, Shape(vocabulary=vocabulary.SIZE))

    def prefill(self, ids: ArrayLike) -> Prefill:
        """Read a prompt.

        Args:
            ids: Token ids, ``(T,)``, 1 to ``CONTEXT`` of them.
        """
        tokens = np.asarray(ids, np.int64)
        size = self.shape.width // self.shape.heads
        keys = np.empty((self.shape.layers, self.shape.heads, len(tokens), size), np.float32)
        values = np.empty_like(keys)
        chunk = SMALL // (size * len(tokens))
        parts = [slice(start, start + chunk) for start in range(0, len(tokens), chunk)]
        hidden = [self._read(tokens, part, keys, values) for part in parts][-1]
        return Prefill(_product(hidden[-1:], self._unembed)[0], keys, values)

    def _read(self, tokens: Ints, part: slice, keys: Floats, values: Floats) -> Floats:
        """Hidden states of a part of a prompt; its keys and values are appended to those of the parts before."""
        positions = np.arange(len(tokens))[part]
        seen = int(positions[-1]) + 1
        future = np.where(np.arange(seen) > positions[:, None], np.float32(-np.inf), np.float32(0))

        def attend(layer: int, q: Floats, k: Floats, v: Floats) -> Floats:
            keys[layer, :, part], values[layer, :, part] = k.swapaxes(0, 1), v.swapaxes(0, 1)
            mixed = _mix(q.swapaxes(0, 1), keys[layer, :, :seen], values[layer, :, :seen], future)
            return mixed.swapaxes(0, 1).reshape(len(positions), -1)

        return self._blocks(tokens[part], positions, attend)

    def step(self, tokens: ArrayLike, cache: Cache) -> Floats:
        """Append one token to each row of the cache.

        Args:
            tokens: Token ids, ``(B,)``, with B the rows in use, each shorter than ``CONTEXT``.
            cache: Keys and values of what came before; the new ones are added.

        Returns:
            Logits of the tokens to come, ``(B, V)``.
        """
        count = cache.count
        rows, at = np.arange(count), cache.lengths[:count].copy()
        length = int(at.max()) + 1
        unused = np.where(np.arange(length) > at[:, None], np.float32(-np.inf), np.float32(0))[:, None, None]

        def attend(layer: int, q: Floats, k: Floats, v: Floats) -> Floats:
            keys, values = cache.keys[layer], cache.values[layer]
            keys[rows, :, at], values[rows, :, at] = k, v
            return _mix(q[:, :, None], keys[:count, :, :length], values[:count, :, :length], unused).reshape(count, -1)

        hidden = self._blocks(np.asarray(tokens, np.int64), at, attend)
        cache.lengths[:count] += 1
        return _product(hidden, self._unembed)

    def _blocks(self, tokens: Ints, positions: Ints, attend: Attend) -> Floats:
        """Normalised hidden states of ``(N,)`` tokens, ``(N, width)``."""
        x = self._embed[tokens]
        cos, sin = self._cos[positions], self._sin[positions]
        heads, hidden = self.shape.heads, self.shape.hidden
        for i, layer in enumerate(self._layers):
            qkv = _product(_normalised(x), layer.qkv).reshape(len(x), 3 * heads, -1)
            turned = _rotated(qkv[:, : 2 * heads], cos, sin)
            mixed = attend(i, turned[:, :heads], turned[:, heads:], qkv[:, 2 * heads :])
            x += _product(mixed, layer.out)
            gate_up = _product(_normalised(x), layer.gate_up)
            gate, up = gate_up[:, :hidden], gate_up[:, hidden:]
            # The matrix gives half the gate g, and silu(g) = h + h·tanh(h) with h = g/2, which cannot overflow.
            gated = np.tanh(gate)
            gated += 1
            gated *= gate
            gated *= up
            x += _product(gated, layer.down)
        return _normalised(x)


def _product(x: Floats, matrix: Floats) -> Floats:
    """``x @ matrix`` in pieces that are ``SMALL``."""
    rows, (inner, columns) = len(x), matrix.shape
    width = max(SMALL // (rows * inner), 1)
    if width >= columns:
        return x @ matrix
    product = np.empty((rows, columns), np.float32)
    for start in range(0, columns, width):
        piece = slice(start, start + width)
        np.matmul(x, matrix[:, piece], out=product[:, piece])
    return product


def _normalised(x: Floats) -> Floats:
    """RMSNorm without its gains."""
    scale = np.einsum("nw,nw->n", x, x)[:, None]
    scale /= x.shape[1]
    scale += 1e-5
    return x / np.sqrt(scale, out=scale)


def _rotated(x: Floats, cos: Floats, sin: Floats) -> Floats:
    """Rotary positions; the two halves of each head are the coordinates that turn together."""
    half = x.shape[-1] // 2
    turned = x * cos
    turned[..., :half] += x[..., half:] * sin[..., :half]
    turned[..., half:] += x[..., :half] * sin[..., half:]
    return turned


def _mix(queries: Floats, keys: Floats, values: Floats, mask: Floats) -> Floats:
    """Attention of ``(…, Q, size)`` queries over ``(…, T, size)`` keys and values; the mask is added to the scores."""
    scores = queries @ keys.swapaxes(-1, -2)
    scores += mask
    scores -= scores.max(-1, keepdims=True)
    np.exp(scores, out=scores)
    mixed = scores @ values
    mixed /= scores.sum(-1, keepdims=True)
    return mixed


def _fold(weights: Mapping[str, Floats], prefix: str, shape: Shape) -> _Layer:
    qkv = weights[prefix + "qkv"] * weights[prefix + "attn_norm"]
    qkv[: shape.width] *= (shape.width // shape.heads) ** -0.5
    gate_up = weights[prefix + "gate_up"] * weights[prefix + "mlp_norm"]
    gate_up[: shape.hidden] *= 0.5
    return _Layer(*map(_columns, (qkv, weights[prefix + "out"], gate_up, weights[prefix + "down"])))


def _columns(matrix: Floats) -> Floats:
    """An ``(out, in)`` matrix as ``(in, out)``, contiguous."""
    return np.ascontiguousarray(matrix.T)


def _checked(arrays: Mapping[str, NDArray[Any]], shape: Shape) -> dict[str, Floats]:
    """The arrays of the network as float32."""
    width, hidden = shape.width, shape.hidden
    sizes: dict[str, tuple[int, ...]] = {"embed": (shape.vocabulary, width), "norm": (width,)}
    for i in range(shape.layers):
        layer = {"attn_norm": (width,), "qkv": (3 * width, width), "out": (width, width), "mlp_norm": (width,)}
        layer |= {"gate_up": (2 * hidden, width), "down": (width, hidden)}
        sizes |= {f"layers.{i}.{name}": size for name, size in layer.items()}
    missing = sizes.keys() - set(arrays)
    if missing:
        raise ConfigError(f"the weights lack {', '.join(sorted(missing))}; train and save this network again")
    weights = {name: np.asarray(arrays[name], np.float32) for name in sizes}
    for name, size in sizes.items():
        if weights[name].shape != size:
            raise ConfigError(f"weight {name} has shape {weights[name].shape}, and {size} is needed")
    return weights
