"""Fetches sentences with a positive or negative tone from PyPI: `fetch_demo_tones.py [FOLDER]`.

The source archive of vaderSentiment carries sentences of movie and Amazon reviews that people scored from -4 to 4
(Hutto and Gilbert, ICWSM 2014). Rows are `{"phrase": ..., "tone": "positive" or "negative"}`, as many of each tone:
`movie-held-out.jsonl` and `amazon-held-out.jsonl` to judge a model by, `movie-train.jsonl` and `amazon-train.jsonl` to
train it on. No Amazon review gives to both (the other table names none), and no sentence to train on shares a run of
words with one held out.
"""

import json
import random
import re
import sys
import tarfile
from dataclasses import dataclass
from pathlib import Path

from wheel_member import demo_folder, fetched, made_from

REQUIREMENT = "vaderSentiment==3.3.2"
SOURCE_SHA256 = "5d7c06e027fc8b99238edb0d53d970cf97066ef97654009890b83703849632f9"
MEMBER = "vaderSentiment-3.3.2/additional_resources/hutto_ICWSM_2014.tar.gz"
SHA256 = "d5bb07d87474b3eb8d30b4deccbc23f19d742a6c5718fbacc65485b70b95c5fa"
TABLES = {"movie": "movieReviewSnippets_GroundTruth.txt", "amazon": "amazonReviewSnippets_GroundTruth.txt"}
TONES = ("negative", "positive")
HELD_OUT = 160  # of each tone
MIN_SCORE = 0.5  # sentences nearer to 0 have no clear tone
MIN_WORDS, MAX_WORDS = 3, 40
SHARED_WORDS = 5  # a run of so many words in common makes two sentences near copies
SEED = 0


@dataclass(frozen=True)
class Sentence:
    """One row."""

    review: str
    """What it was taken from."""
    phrase: str
    """Its text."""
    tone: str
    """What people heard in it."""

    @property
    def words(self) -> list[str]:
        """Without case and punctuation."""
        return re.findall(r"[a-z0-9']+", self.phrase.lower())

    @property
    def runs(self) -> set[tuple[str, ...]]:
        """Every few words in a row; all of a sentence that is shorter."""
        words = self.words
        return {tuple(words[i : i + SHARED_WORDS]) for i in range(max(len(words) - SHARED_WORDS, 0) + 1)}


def read(table: str) -> list[Sentence]:
    """The sentences of a table `number, score, text` that have a clear tone."""
    found = []
    for line in table.splitlines():
        number, score, text = line.split("\t", 2)
        sentence = Sentence(number.partition("_")[0], " ".join(text.split()), TONES[float(score) > 0])
        if abs(float(score)) >= MIN_SCORE and MIN_WORDS <= len(sentence.words) <= MAX_WORDS:
            found.append(sentence)
    return found


def split(sentences: list[Sentence]) -> tuple[list[Sentence], list[Sentence]]:
    """Those to train on and those held out, in random order, whole reviews at a time."""
    reviews: dict[str, list[Sentence]] = {}
    for sentence in distinct(sentences):
        reviews.setdefault(sentence.review, []).append(sentence)
    order = sorted(reviews)
    dice = random.Random(SEED)
    dice.shuffle(order)
    held: dict[str, list[Sentence]] = {tone: [] for tone in TONES}
    while order and min(map(len, held.values())) < HELD_OUT:
        for sentence in reviews[order.pop()]:
            held[sentence.tone].append(sentence)
    held_out = balanced([s for tone in TONES for s in held[tone]], HELD_OUT, dice)
    seen = set().union(*(s.runs for s in held_out))
    rest = [s for review in order for s in reviews[review] if seen.isdisjoint(s.runs)]
    return balanced(rest, None, dice), held_out


def distinct(sentences: list[Sentence]) -> list[Sentence]:
    """One of those with the same words."""
    return list({tuple(s.words): s for s in sentences}.values())


def balanced(sentences: list[Sentence], count: int | None, dice: random.Random) -> list[Sentence]:
    """As many of each tone, `count` or all that there are, shuffled."""
    by_tone = [[s for s in sentences if s.tone == tone] for tone in TONES]
    count = min(map(len, by_tone)) if count is None else count
    chosen = [s for group in by_tone for s in dice.sample(group, count)]
    dice.shuffle(chosen)
    return chosen


def write_tones(archive: Path, folder: Path) -> None:
    """Writes the files."""
    with tarfile.open(archive) as inner:
        for name, table in TABLES.items():
            stream = inner.extractfile(f"hutto_ICWSM_2014/{table}")
            assert stream is not None
            train, held_out = split(read(stream.read().decode("utf-8")))
            for part, rows in (("train", train), ("held-out", held_out)):
                lines = [json.dumps({"phrase": s.phrase, "tone": s.tone}, ensure_ascii=False) + "\n" for s in rows]
                folder.joinpath(f"{name}-{part}.jsonl").write_text("".join(lines), encoding="utf-8")


def main(folder: Path | None = None) -> Path:
    """Fetches and writes unless the folder holds the verified sentences."""
    folder = folder or demo_folder("tones")

    def make(made: Path) -> None:
        with fetched(REQUIREMENT, MEMBER, SHA256, SOURCE_SHA256) as archive:
            write_tones(archive, made)

    made_from(folder, SHA256, Path(__file__).read_text(), make=make)
    return folder


if __name__ == "__main__":
    print(main(*map(Path, sys.argv[1:2])))
