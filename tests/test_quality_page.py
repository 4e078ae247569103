"""The page of benchmarks/quality.py: made of results alone, and what people wrote around it stays."""

import importlib.util
from pathlib import Path

import pytest

FILE = Path(__file__).resolve().parents[1] / "benchmarks" / "quality_page.py"


@pytest.fixture(scope="module")
def module():
    spec = importlib.util.spec_from_file_location("quality_page", FILE)
    loaded = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(loaded)
    return loaded


def cell(kl, bits=4.3, **more):
    return {
        "reference_perplexity": 18.0, "perplexity": 20.0, "kl_mean": kl, "kl_standard_error": 0.01,
        "size_bytes": 90e6, "bits_per_weight": bits, "float_result": False, "cpu_seconds": 12.0, "peak_bytes": 3e8,
        "date": "2026-11-21", "version": "quantcli 1", "code": "a", "load": 1.0,
    } | more  # fmt: skip


def results(**cells):
    machine = {"cores": 2, "processor": "P", "memory_bytes": 2**34, "python": "3.11"}
    settings = {"model": "m", "rows": 64, "seq_len": 512, "samples": 16, "threads": 1}
    return {"machine": machine, "settings": settings, "cells": {k.replace("__", "/"): v for k, v in cells.items()}}


METHODS, SCHEMES = ["rtn", "gptq", "best"], ["4b g64 asym", "3b g64"]


def written(module, path, found):
    module.write_page(path, found, METHODS, SCHEMES)
    return path.read_text()


def test_methods_are_ordered_with_their_uncertainty(module, tmp_path):
    found = results(
        **{"demo__rtn__3b g64": cell(0.5), "demo__gptq__3b g64": cell(0.205), "demo__best__3b g64": cell(0.2)}
    )
    page = written(module, tmp_path / "docs" / "q.md", found)
    assert "3b g64: best ≈ gptq < rtn" in page
    assert "| rtn |  | 0.5000 ± 0.0100 (20.00) |" in page
    assert "| best |  | 90 MB, 12 s, 0.30 GB |" in page
    assert "(perplexity 18.00)" in page and "folded" not in page


def test_mixed_bits_are_held_against_the_line(module, tmp_path):
    found = results(**{
        "folded__gptq__3b g64": cell(0.6, 3.3), "folded__gptq__4b g64 asym": cell(0.2, 4.3),
        "folded__mixed__3.5 bits": cell(0.3, 3.8),
    })  # fmt: skip
    page = written(module, tmp_path / "q.md", found)
    assert "| 3.5 bits | 3.80 | 0.3000 ± 0.0100 (20.00) | 0.4000 |" in page


def test_failures_and_changed_code_are_said(module, tmp_path):
    failed = {"failed": "exit 3", "date": "2026-11-20", "version": "quantcli 1", "code": "b", "load": 9.0}
    page = written(module, tmp_path / "q.md", results(**{"demo__rtn__3b g64": failed, "demo__gptq__3b g64": cell(0.2)}))
    assert "| rtn |  | failed |" in page
    assert "2026-11-20 to 2026-11-21" in page and "2 versions" in page and "load 1.0 to 9.0" in " ".join(page.split())


def test_what_people_wrote_stays(module, tmp_path):
    path = tmp_path / "q.md"
    first = written(module, path, results(**{"demo__rtn__3b g64": cell(0.5)}))
    path.write_text(first.replace("# Quality", "# Quality\n\nBefore.") + "\nAfter.\n")
    page = written(module, path, results(**{"demo__rtn__3b g64": cell(0.4)}))
    assert "Before." in page and page.endswith("\nAfter.\n") and "0.4000" in page and "0.5000" not in page
    path.write_text("nothing to write between")
    with pytest.raises(SystemExit, match="no lines"):
        module.write_page(path, results(), METHODS, SCHEMES)
