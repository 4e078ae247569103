"""The table of readers says what readers did (results.json, from `make interop`), and docs/formats.md shows it."""

from pathlib import Path

import pytest

from interop.environments import READERS
from interop.folders import CASES, folder_name, options_of, write_models
from interop.matrix import page_with, read_results, table
from quantcli.formats.readers import READERS as TABLE
from quantcli.pipelines.planning.decide import make_plan

PAGE = Path(__file__).resolve().parents[2] / "docs" / "formats.md"
ANSWERS, VERSIONS, DATE = read_results()
STRICTER = {
    ("transformers", "gptq", "one scale per row"): "right or wrong by the kernel that it picks for the shape",
    ("peft", "gptq", "one scale per row"): "the same",
}
"""What is refused although it opened where it was tried, and why."""


@pytest.fixture(scope="module")
def claims(tmp_path_factory):
    """By case and family, what the table says of each reader."""
    root = tmp_path_factory.mktemp("claims")
    asked = {(a.format, a.case, a.family) for a in ANSWERS}
    models = write_models(root, tuple({family for _, _, family in asked}))
    plans = {
        (case.format, case.name, family): make_plan(options_of(case, models[family], root / "unused"))
        for case in CASES
        for family in case.families
        if (case.format, case.name, family) in asked
    }
    return {key: plan.opens for key, plan in plans.items()}


@pytest.mark.parametrize("reader", VERSIONS)
def test_the_table_agrees_with_what_readers_did(claims, reader):
    wrong = []
    for answer in (a for a in ANSWERS if a.reader == reader):
        obstacle = claims[answer.format, answer.case, answer.family][reader]
        said = "opens" if obstacle is None else "nonsense" if obstacle.silent else "refuses"
        stricter = answer.verdict == "opens" and (reader, answer.format, answer.case) in STRICTER
        fits = {answer.verdict, "opens"} if answer.verdict == "no kernel" else {answer.verdict}
        if said not in fits and not stricter:
            wrong.append(f"{answer.family} {answer.format} {answer.case}: said {said}, {answer.verdict}")
    assert not wrong, "\n".join(wrong)


def test_each_exception_is_one():
    opened = {(a.reader, a.format, a.case) for a in ANSWERS if a.verdict == "opens"}
    assert all(key in opened for key in STRICTER if key[0] in VERSIONS)


def test_the_page_shows_what_is_kept():
    page = PAGE.read_text()
    assert page_with(page, table(ANSWERS, VERSIONS, DATE)) == page


@pytest.mark.parametrize("reader", READERS)
def test_the_table_names_the_versions_that_were_tried(reader):
    if reader not in VERSIONS:
        pytest.skip("it was not tried")
    told = VERSIONS[reader].split(", ")[0].split(" ")[1]
    assert TABLE[reader].version.startswith(told)


def test_cases_have_names_of_their_own():
    names = [folder_name(case, family) for case in CASES for family in case.families]
    assert len(names) == len(set(names))
