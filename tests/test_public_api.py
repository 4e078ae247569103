"""What a module offers is in its `__all__`, in order, real and documented."""

import ast
import importlib
import inspect
import pkgutil
from pathlib import Path

import pytest

import quantcli

# __main__ runs the command, it offers nothing
MODULES = sorted(
    m.name for m in pkgutil.walk_packages(quantcli.__path__, "quantcli.") if not m.name.endswith("__main__")
)


def tree_of(name):
    spec = importlib.util.find_spec(name)
    return ast.parse(Path(spec.origin).read_text()), spec.origin


def declared(tree):
    for node in tree.body:
        if isinstance(node, ast.Assign) and any(isinstance(t, ast.Name) and t.id == "__all__" for t in node.targets):
            return ast.literal_eval(node.value)
    return None


def defined(tree):
    """Public functions and classes that the module itself makes."""
    kinds = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
    return [n for n in tree.body if isinstance(n, kinds) and not n.name.startswith("_")]


@pytest.mark.parametrize("name", MODULES)
def test_all_is_declared_sorted_and_true(name):
    tree, origin = tree_of(name)
    names = declared(tree)
    if names is None:
        assert not defined(tree), f"{origin} has public names and no __all__"
        return
    # constants first, then classes, then functions: the order that ruff's RUF022 keeps
    rank = {n: (0 if n.isupper() else 1 if n.lstrip("_")[:1].isupper() else 2, n) for n in names}
    assert names == sorted(names, key=rank.get), origin
    module = importlib.import_module(name)
    missing = [n for n in names if not hasattr(module, n)]
    assert not missing, f"{origin}: __all__ names {missing}"
    assert len(set(names)) == len(names)


@pytest.mark.parametrize("name", MODULES)
def test_what_others_import_is_public(name):
    tree, origin = tree_of(name)
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("quantcli"):
            private = [a.name for a in node.names if a.name.startswith("_") and not a.name.startswith("__")]
            assert not private, f"{origin}:{node.lineno} imports {private} from {node.module}"


@pytest.mark.parametrize("name", MODULES)
def test_public_names_are_documented(name):
    module = importlib.import_module(name)
    for public in getattr(module, "__all__", []):
        thing = getattr(module, public)
        if inspect.isclass(thing) or inspect.isfunction(thing):
            assert inspect.getdoc(thing), f"{name}.{public}"


def test_the_front_door():
    assert quantcli.__all__ == ["__version__", "load"]
    assert callable(quantcli.load)
    with pytest.raises(AttributeError, match="no attribute 'lode'"):
        _ = quantcli.lode
