"""Imports point left, heavy packages stay where they belong, and no module is a drawer for odds and ends."""

import ast
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

SOURCE = Path(__file__).resolve().parents[1] / "src" / "quantcli"
# what stands further right may import what stands further left; names on one line stand side by side
LAYERS = [
    {"errors"},
    {"scheme", "progress", "json_files"},
    {"options", "folder", "tensors"},
    {"formats", "models", "graphs", "data"},
    {"algorithms", "backends", "export", "finetune", "adapters", "evaluate", "report"},
    {"pipelines"},
    {"cli", "onnx"},
]
RANK = {name: rank for rank, names in enumerate(LAYERS) for name in names}
FILES = sorted(SOURCE.rglob("*.py"))


def name_of(path):
    parts = path.relative_to(SOURCE).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports_of(path):
    """(line, module) of every import, deferred and type-checking ones included."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: relative import"
            yield node.lineno, node.module
            if node.module == "quantcli":
                yield from ((node.lineno, f"quantcli.{alias.name}") for alias in node.names)


def package(module):
    return module.split(".")[1] if "." in module else ""


def offenders(allowed, roots):
    """Imports of packages whose name begins with one of `roots`, outside the modules that `allowed` accepts."""
    return [
        f"{path.relative_to(SOURCE)}:{line} imports {module}"
        for path in FILES
        if not allowed(name_of(path))
        for line, module in imports_of(path)
        if module.split(".")[0] in roots
    ]


def under(*packages):
    return lambda name: any(name == p or name.startswith(p + ".") for p in packages)


def test_there_is_something_to_look_at():
    assert len(FILES) > 30


def test_every_package_has_its_layer():
    tops = {path.stem if path.is_file() else path.name for path in SOURCE.iterdir() if path.name != "__pycache__"}
    tops = {t for t in tops if (SOURCE / f"{t}.py").is_file() or (SOURCE / t / "__init__.py").is_file()}
    assert tops - {"__init__", "__main__", "py"} <= set(RANK)


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(SOURCE)))
def test_imports_point_left(path):
    here = name_of(path).split(".")[0]
    if here in ("", "__main__"):  # the front doors
        return
    for line, module in imports_of(path):
        there = package(module) if module.split(".")[0] == "quantcli" else ""
        if there in RANK and there != here:
            beside = there in LAYERS[RANK[here]]
            assert RANK[there] < RANK[here] or beside, f"{path}:{line}: {here} imports {module}"


def test_neighbours_do_not_import_each_other_in_circles():
    edges = {
        (name_of(path).split(".")[0], package(module))
        for path in FILES
        for _, module in imports_of(path)
        if module.startswith("quantcli.") and name_of(path)
    }
    edges = {(a, b) for a, b in edges if a != b and a in RANK and b in RANK}
    circles = {frozenset(e) for e in edges if e[::-1] in edges}
    assert not circles


@pytest.mark.parametrize("top", sorted(set(RANK) - {"cli"}))
def test_modules_of_a_package_do_not_import_each_other_in_circles(top):
    """Deferred and type-checking imports count; in `cli`, commands and their console name each other's types."""
    names = {f"quantcli.{name_of(path)}" for path in FILES}
    graph = {}
    for path in FILES:
        if name_of(path).split(".")[0] == top:
            here = f"quantcli.{name_of(path)}"
            found = {f"{a}.{b}" if f"{a}.{b}" in names else a for a, b in names_in(path)}
            graph[here] = (found & names) - {here}
    TopologicalSorter(graph).prepare()  # raises, and names the circle


def names_in(path):
    """(module, name) of every name that is imported from a module."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom):
            yield from ((node.module, alias.name) for alias in node.names)


def test_terminal_packages_stay_in_cli():
    assert not offenders(under("cli"), {"typer", "rich", "click"})


def test_onnx_stays_with_graphs():
    homes = under(
        "graphs", "export", "evaluate", "adapters", "algorithms.graph", "formats", "pipelines.inspect", "backends",
        "onnx",
    )  # fmt: skip
    assert not offenders(homes, {"onnx", "onnx_ir", "onnxscript", "onnxruntime", "onnxruntime_genai"})


def test_algorithms_know_tensors_not_files():
    for path in FILES:
        if name_of(path).startswith("algorithms"):
            for line, module in imports_of(path):
                assert package(module) not in ("formats", "data", "folder"), f"{path}:{line} imports {module}"
                assert module.split(".")[0] not in ("safetensors", "transformers"), f"{path}:{line} imports {module}"


def test_no_drawers():
    drawers = {"utils", "util", "common", "helpers", "helper", "manager", "misc"}
    assert not [p for p in SOURCE.rglob("*") if p.stem.strip("_") in drawers]


def test_no_print_outside_cli():
    for path in FILES:
        if not name_of(path).startswith("cli"):
            for node in ast.walk(ast.parse(path.read_text())):
                called = isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id
                assert called != "print", f"{path}:{node.lineno}"
