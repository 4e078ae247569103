"""Published graphs that are scored by how near they stay to the float graph: no right answers are known here."""

from pathlib import Path

import numpy as np

from integer_models import Feed, Subject, draw_words, some_words, write_batches

__all__ = ["ppocr_det", "ppocr_rec", "silero"]

_PAGE = 320
_RATE, _CHUNK, _CONTEXT = 16_000, 512, 64
_VOWELS = ((700, 1200, 2500), (300, 2200, 3000), (400, 800, 2400), (500, 1800, 2500), (600, 1000, 2600))
"""Resonances of a mouth in Hz."""


def ppocr_det(place: Path) -> Subject:
    """PP-OCR's detector on drawn pages: where there is text, of each pixel."""
    import fetch_demo_ocr

    graph = fetch_demo_ocr.main(graph="det") / "det.onnx"
    words = some_words()
    pages = np.stack([_page(words[i : i + 12], i) for i in range(0, 12 * 28, 12)])
    return Subject(
        f"PP-OCR's text detector: 12 drawn pages of {_PAGE} x {_PAGE} pixels, agreement by pixel",
        graph,
        write_batches(place / "samples", [{"x": pages[i : i + 4]} for i in range(0, 16, 4)]),
        [{"x": pages[i : i + 4]} for i in range(16, 28, 4)],
        None,
        {"x": pages[:1]},
        lambda output, _: output.reshape(-1, 1),
        lambda found: (found[:, 0] > 0.3).astype(np.int64),
    )


def _page(words: list[str], seed: int) -> np.ndarray:
    """Words in two columns, [3, _PAGE, _PAGE] float32 from -1 to 1."""
    lines, _ = draw_words(words, seed, turning=False)
    page = np.full((3, _PAGE, _PAGE), 0.8, np.float32)
    for number, line in enumerate(lines[:, :, :, :150]):
        top, left = 5 + 52 * (number // 2), 5 + 160 * (number % 2)
        page[:, top : top + 48, left : left + 150] = line
    return page


def ppocr_rec(place: Path) -> Subject:
    """PP-OCR's reader on drawn words: the likeliest of 6,625 characters at each of 24 places."""
    import fetch_demo_ocr

    graph = fetch_demo_ocr.main(graph="rec") / "rec.onnx"
    words = some_words()
    samples, _ = draw_words(words[:64], 1, turning=False)
    images, _ = draw_words(words[64:160], 2, turning=False)
    return Subject(
        "PP-OCR's text reader: 96 drawn words, agreement by place",
        graph,
        write_batches(place / "samples", [{"x": samples[i : i + 16]} for i in range(0, 64, 16)]),
        [{"x": images[i : i + 16]} for i in range(0, 96, 16)],
        None,
        {"x": images[:1]},
        lambda output, _: output.reshape(-1, output.shape[-1]),
    )


def silero(place: Path) -> Subject:
    """A voice detector on vowels that are made up: speech or not, of each 32 ms, from the float graph's states."""
    import fetch_demo_voice

    graph = fetch_demo_voice.main() / "vad.onnx"
    heard = [_states(graph, _voice(seed)) for seed in range(4)]
    batches = [{name: _joined(name, some[i : i + 32]) for name in some[0]} for some in heard for i in range(0, 256, 32)]
    return Subject(
        "Silero's voice detector: If, convolutions and LSTM; 512 pieces of made-up vowels and silence",
        graph,
        write_batches(place / "samples", batches[:16]),
        batches[16:],
        None,
        {name: _joined(name, heard[0][:1]) for name in heard[0][0]},
        lambda output, _: output.reshape(-1, 1),
        lambda found: (found[:, 0] > 0.5).astype(np.int64),
    )


def _joined(name: str, feeds: list[Feed]) -> np.ndarray:
    arrays = [feed[name] for feed in feeds]
    return np.asarray(arrays[0]) if name == "sr" else np.concatenate(arrays, 1 if name == "state" else 0)


def _states(graph: Path, voice: np.ndarray) -> list[Feed]:
    """What the float graph is fed with at each piece, one after the other."""
    import onnxruntime

    session = onnxruntime.InferenceSession(graph, providers=["CPUExecutionProvider"])
    state, heard, found = np.zeros((2, 1, 128), np.float32), np.zeros(_CONTEXT, np.float32), []
    for start in range(0, len(voice) - _CHUNK + 1, _CHUNK):
        piece = np.concatenate([heard, voice[start : start + _CHUNK]])
        found.append({"input": piece[None], "state": state, "sr": np.array(_RATE, np.int64)})
        _, state = session.run(None, found[-1])
        heard = piece[-_CONTEXT:]
    return found


def _voice(seed: int) -> np.ndarray:
    """256 pieces of vowels with pauses: pulses of a throat through the resonances of a mouth, and some noise."""
    from scipy.signal import lfilter

    random = np.random.default_rng(seed)
    count = 256 * _CHUNK
    times = np.arange(count) / _RATE
    pitch = random.uniform(90, 220) * (1 + 0.15 * np.sin(2 * np.pi * random.uniform(0.4, 1) * times))
    pulses = np.diff(np.floor(np.cumsum(pitch) / _RATE), prepend=0)
    voice = np.zeros(count)
    for start in range(0, count, _RATE // 2):
        part = slice(start, min(start + _RATE // 2, count))
        if random.random() < 0.3:
            continue
        sound = pulses[part]
        for frequency in _VOWELS[random.integers(len(_VOWELS))]:
            radius = np.exp(-np.pi * 90 / _RATE)
            sound = lfilter([1], [1, -2 * radius * np.cos(2 * np.pi * frequency / _RATE), radius**2], sound)
        voice[part] = sound / np.abs(sound).max() * np.hanning(len(sound)) * random.uniform(0.2, 0.7)
    return (voice + random.normal(scale=0.002, size=count)).astype(np.float32)
