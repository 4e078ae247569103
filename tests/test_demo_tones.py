"""The demo's sentences: none to train on tells of one held out."""

import fetch_demo_tones as tones


def sentences():
    """Reviews of three sentences; every tenth review says again what the one before said, one word apart."""
    found = []
    for review in range(600):
        about = review - 1 if review % 10 == 9 else review
        for i in range(3):
            words = f"w{about} a{about * i} b{about + i} c{about} the film is d{i} e{about}"
            found.append(tones.Sentence(str(review), words + f" f{review}", tones.TONES[(about + i) % 2]))
    return found


def test_train_and_held_out_share_neither_reviews_nor_runs_of_words():
    train, held_out = tones.split(sentences())
    assert not {s.review for s in train} & {s.review for s in held_out}
    assert not set().union(*(s.runs for s in train)) & set().union(*(s.runs for s in held_out))
    assert len(train) > 300
    for part, count in ((held_out, tones.HELD_OUT), (train, len(train) // 2)):
        assert [sum(s.tone == tone for s in part) for tone in tones.TONES] == [count, count]
    assert tones.split(sentences()) == (train, held_out)


def test_sentences_without_a_clear_tone_are_left_out():
    table = "1_1\t0.4\tneither good nor bad\n1_2\t-2.0\ta  dull film\n2_1\t3\tgreat fun indeed\n2_2\t3\tgreat\n"
    assert tones.read(table) == [
        tones.Sentence("1", "a dull film", "negative"),
        tones.Sentence("2", "great fun indeed", "positive"),
    ]
