"""The docstrings of dataclass fields, read from the source: the one place for each fact that help texts state."""

import ast
import inspect
from functools import cache
from pathlib import Path
from typing import Any

__all__ = ["field_docs"]


@cache
def field_docs(owner: Any) -> dict[str, str]:
    """Field name to the string literal below it, in one line; fields without one are left out.

    Args:
        owner: A dataclass; docstrings of fields that it inherits are found too.
    """
    found: dict[str, str] = {}
    classes: list[type] = [cls for cls in reversed(owner.__mro__) if "__dataclass_fields__" in vars(cls)]
    for cls in classes:
        found |= _docs_of_file(inspect.getfile(cls)).get(cls.__name__, {})
    return found


@cache
def _docs_of_file(path: str) -> dict[str, dict[str, str]]:
    """Class name to field name to docstring, for every class at the top of a file."""
    tree = ast.parse(Path(path).read_text(encoding="utf-8"))
    return {node.name: _docs_of_class(node) for node in tree.body if isinstance(node, ast.ClassDef)}


def _docs_of_class(node: ast.ClassDef) -> dict[str, str]:
    found = {}
    for statement, following in zip(node.body, node.body[1:], strict=False):
        if (
            isinstance(statement, ast.AnnAssign)
            and isinstance(statement.target, ast.Name)
            and isinstance(following, ast.Expr)
            and isinstance(following.value, ast.Constant)
            and isinstance(following.value.value, str)
        ):
            found[statement.target.id] = " ".join(following.value.value.split())
    return found
