"""Fetches 106 Wikipedia articles from PyPI as plain prose: `fetch_demo_text.py [FOLDER]`.

The wheel of gensim carries an extract of an English Wikipedia dump. Every fourth article goes to `evaluation.jsonl`,
the others to `calibration.jsonl`, so that no model is judged on text that it was calibrated on; `articles.jsonl` holds
them all. One article a row, in the fields `title` and `text`.
"""

import bz2
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from xml.etree import ElementTree

import mwparserfromhell

from wheel_member import demo_folder, fetched, made_from

REQUIREMENT = "gensim==4.4.0"
MEMBER = "gensim/test/test_data/enwiki-latest-pages-articles1.xml-p000000010p000030302-shortened.bz2"
SHA256 = "a53f4648dec40467ebdcbc7a1307eddb51fe6e28e9309f6ebde81ba0d04bea2d"
MIN_LINE = 60  # shorter lines are captions, headings and remains of lists
EVALUATION_EVERY = 4


def articles(dump: Path) -> Iterator[tuple[str, str]]:
    """Title and wiki markup of every article of a dump; redirects are left out."""
    with bz2.open(dump) as stream:
        for _, element in ElementTree.iterparse(stream):
            if not element.tag.endswith("}page"):
                continue
            space = element.tag.removesuffix("page")
            markup = element.findtext(f"{space}revision/{space}text") or ""
            if element.findtext(f"{space}ns") == "0" and not markup.upper().startswith("#REDIRECT"):
                yield element.findtext(f"{space}title") or "", markup
            element.clear()


def prose(markup: str) -> str:
    """The sentences of an article: no templates, tables, references, lists, headings or captions."""
    code = mwparserfromhell.parse(markup, skip_style_tags=True)
    unwanted = (
        "ref",
        "table",
        "gallery",
        "math",
        "chem",
        "timeline",
        "source",
        "syntaxhighlight",
        "pre",
        "li",
        "dt",
        "dd",
    )
    nodes = [
        *code.filter_templates(recursive=False),
        *code.filter_tags(recursive=False, matches=lambda tag: str(tag.tag).strip().lower() in unwanted),
        *code.filter_wikilinks(recursive=False, matches=lambda link: ":" in str(link.title)),
        *code.filter_headings(recursive=False),
        *code.filter_comments(recursive=False),
    ]
    for node in nodes:
        code.remove(node)
    lines = (line.replace("'''", "").replace("''", "").strip() for line in code.strip_code().splitlines())
    return "\n".join(line for line in lines if len(line) >= MIN_LINE and line[0] not in "*#:;|!{}")


def write_texts(dump: Path, folder: Path) -> None:
    """Writes the three files."""
    rows = [json.dumps({"title": t, "text": prose(m)}, ensure_ascii=False) + "\n" for t, m in articles(dump)]
    folder.joinpath("articles.jsonl").write_text("".join(rows), encoding="utf-8")
    held_out = range(0, len(rows), EVALUATION_EVERY)
    folder.joinpath("evaluation.jsonl").write_text("".join(rows[i] for i in held_out), encoding="utf-8")
    calibration = (row for i, row in enumerate(rows) if i not in held_out)
    folder.joinpath("calibration.jsonl").write_text("".join(calibration), encoding="utf-8")


def main(folder: Path | None = None) -> Path:
    """Fetches and writes unless the folder holds the verified text."""
    folder = folder or demo_folder("wikipedia")

    def make(made: Path) -> None:
        with fetched(REQUIREMENT, MEMBER, SHA256) as dump:
            write_texts(dump, made)

    made_from(folder, SHA256, Path(__file__).read_text(), make=make)
    return folder


if __name__ == "__main__":
    print(main(*map(Path, sys.argv[1:2])))
