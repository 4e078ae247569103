"""ONNX graphs: model (files and inputs), walk, rewrite, calibration, weights, activations, checking.

onnx_ir imports sympy, half a second, for arithmetic on symbolic axes, which hardly a graph needs. Here both wait until
somebody does.
"""

import sys
from collections.abc import Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from importlib.util import LazyLoader
from types import ModuleType

_LATE = ("sympy", "onnx_ir._symbolic_shapes")


class _Late(MetaPathFinder):
    """Finds modules that are executed when the first of their names is read."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        spec = PathFinder.find_spec(fullname, path) if fullname in _LATE else None
        if spec is not None and spec.loader is not None:
            spec.loader = LazyLoader(spec.loader)
        return spec


_finder = _Late()
sys.meta_path.insert(0, _finder)
try:
    import onnx_ir  # noqa: F401
finally:
    sys.meta_path.remove(_finder)
