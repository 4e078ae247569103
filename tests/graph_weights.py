"""Weights as exporters leave them: of any range, behind casts, views, products of constants, shared."""

import ml_dtypes
import numpy as np

from graph_scope import Scope, Tensor, UnfitError

RANGES = ("normal", "normal", "normal", "uneven", "wide", "tiny", "huge", "dead", "outlier", "constant", "positive")
ORIGINS = (
    *("plain",) * 8,
    "constant",
    "listed",
    "identity",
    "cast16",
    "cast64",
    "bfloat16",
    "transposed",
    "reshaped",
    "unsqueezed",
    "dequantized",
    "computed",
    "shared",
)


def values(g: Scope, shape: tuple[int, ...], fan_in: int, axis: int) -> np.ndarray:
    """Weights of a drawn range; `axis` holds the output channels."""
    kind, random = g.one_of(*RANGES), g.random()
    array = np.asarray(random.standard_normal(shape) / np.sqrt(max(fan_in, 1)))
    channels = [1] * len(shape)
    if shape:
        channels[axis] = shape[axis]
    if kind == "uneven":
        array = array * 10 ** random.uniform(-1, 1, channels)
    elif kind == "wide":
        array = array * 10 ** random.uniform(-6, 4, channels)
    elif kind in ("tiny", "huge"):
        array = array * (1e-6 if kind == "tiny" else 1e4)
    elif kind == "dead":
        array = array * (random.random(channels) < 0.7)
    elif kind == "outlier" and shape and array.size:
        array.flat[random.integers(array.size)] *= 1000
    elif kind == "constant":
        array = np.full(shape, 0.5)
    elif kind == "positive":
        array = np.abs(array)
    return array.astype(np.float32)


def weight(g: Scope, shape: tuple[int, ...], like: Tensor, fan_in: int = 1, axis: int = -1) -> Tensor:
    """A weight of the type of `like`."""
    made = _stored(g, values(g, shape, fan_in, axis).astype(like.array.dtype))
    g.weights.append(made)
    return made


def _stored(g: Scope, array: np.ndarray) -> Tensor:
    origin, dtype, shape = g.one_of(*ORIGINS), array.dtype, array.shape
    if origin == "plain":
        return g.constant(array, "w", as_node=False)
    if origin == "constant":
        return g.constant(array, "w", as_node=True)
    if origin == "shared":
        scopes = [g, *g.outers()]
        same = [t for scope in scopes for t in scope.weights if t.shape == shape and t.array.dtype == dtype]
        return same[0] if same else g.constant(array, "w")
    try:
        return _computed(g, array, origin)
    except UnfitError:
        return g.constant(array, "w")


def _computed(g: Scope, array: np.ndarray, origin: str) -> Tensor:
    shape, code = array.shape, {"float32": 1, "float16": 10, "float64": 11}[array.dtype.name]
    narrow = {"cast16": np.float16, "cast64": np.float64, "bfloat16": ml_dtypes.bfloat16}
    if origin in narrow:
        return g.add("Cast", [g.constant(array.astype(narrow[origin]), "w")], to=code)
    if origin == "identity":
        return g.add("Identity", [g.constant(array, "w")])
    if origin == "transposed":
        return g.add("Transpose", [g.constant(np.ascontiguousarray(array.T), "w")])
    if origin == "reshaped":
        return g.add("Reshape", [g.constant(array.reshape(-1), "w"), g.ints(*shape)])
    if origin == "unsqueezed":
        inputs, attributes = g.axes(13, "axes", 0)
        return g.add("Squeeze", [g.constant(array[None], "w"), *inputs], **attributes)
    if origin == "computed":
        return g.add("Mul", [g.constant(array, "w"), g.constant(np.array(1.5, array.dtype))])
    if origin == "dequantized" and array.dtype == np.float32 and array.size:
        scale = np.float32(max(np.abs(array).max(), 1e-30) / 127)
        codes = np.clip(np.round(array / scale), -127, 127).astype(np.int8)
        return g.add("DequantizeLinear", [g.constant(codes, "w"), g.constant(scale), g.constant(np.int8(0))])
    if origin == "listed" and g.outer is None:
        made = g.constant(array, "w", as_node=False)
        g.inputs.append(made)
        return made
    raise UnfitError
