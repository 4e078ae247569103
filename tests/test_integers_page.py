"""The section of benchmarks/integers.py: a table for each model, and what people wrote around it stays."""

from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"
STAMP = {"date": "2026-11-22", "version": "quantcli 1", "code": "a", "load": 1.0}
METHODS = {"cnn": ("float32", "static", "ort static"), "minilm": ("float32", "dynamic")}


@pytest.fixture
def write(monkeypatch):
    monkeypatch.syspath_prepend(BENCHMARKS)
    from integers_page import write_section

    return write_section


def results():
    plain = {"title": "A network", "rows": 400, "accuracy": 0.9, "size_bytes": 1_000_000} | STAMP
    cell = {
        "accuracy": 0.8,
        "agreement": 0.85,
        "cosine": 0.97,
        "sqnr_db": 20.0,
        "size_bytes": 250_000,
        "latency_ratio": 0.5,
    }
    cell |= {"latency_quartiles": [0.4, 0.6]} | STAMP
    cells = {"cnn/float32": plain, "cnn/static": cell, "cnn/ort static": {"failed": "why"} | STAMP}
    machine = {"cores": 2, "processor": "P", "memory_bytes": 2**34, "python": "3.11"}
    return {"machine": machine, "settings": {}, "cells": cells | {"minilm/float32": plain, "minilm/dynamic": cell}}


def test_rows_of_both_kinds_of_models(write, tmp_path):
    write(tmp_path / "page.md", results(), METHODS)
    lines = (tmp_path / "page.md").read_text().splitlines()
    assert "| float32 | 90.0% ± 1.5% |  |  | 1.00 MB | 1 |" in lines
    assert "| static | 80.0% ± 2.0% | 85.0% | 20.0 dB | 25% | 0.50 (0.40 to 0.60) |" in lines
    assert "| ort static | failed | | | | |" in lines
    assert "| dynamic | 80.0% ± 2.0% | 85.0% | 20.0 dB | 0.970 | 25% | 0.50 (0.40 to 0.60) |" in lines


def test_what_people_wrote_stays_and_a_page_without_marks_is_refused(write, tmp_path):
    page = tmp_path / "page.md"
    write(page, results(), METHODS)
    page.write_text(page.read_text().replace("## Integers\n", "## Integers\n\nOurs.\n") + "\nThe end.\n")
    before = page.read_text()
    write(page, results(), METHODS)
    assert page.read_text() == before
    page.write_text("Nothing.\n")
    with pytest.raises(SystemExit, match="has no lines"):
        write(page, results(), METHODS)
