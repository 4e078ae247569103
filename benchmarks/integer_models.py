"""The models of integers.py: a float graph each, samples to calibrate and to test on, and what its outputs answer."""

import json
import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from running import ROOT

sys.path.insert(0, str(ROOT / "scripts"))

__all__ = ["MODELS", "Feed", "Subject", "draw_words", "some_words", "write_batches"]

Feed = Mapping[str, np.ndarray]
_LINE = (48, 192)
"""Height and width of PP-OCR's lines of text."""
_MAX_TOKENS = 64


@dataclass(frozen=True)
class Subject:
    """A model that is quantized and scored."""

    title: str
    """What it is and what it is tested on, in words."""
    graph: Path
    """The float graph, or its folder."""
    calibration: Path
    """Folder of .npz files, one batch each."""
    tests: Sequence[Feed]
    """Batches to test on."""
    truth: np.ndarray | None
    """The right answers [n], where they are known."""
    timed: Feed
    """What a run is timed on."""
    vectors: Callable[[np.ndarray, Feed], np.ndarray] = lambda output, _: output
    """Of the graph's output for a batch: a vector per row of the batch."""
    answers: Callable[[np.ndarray], np.ndarray] = lambda vectors: vectors.argmax(1)
    """Of vectors [n, d]: an answer each."""


def write_batches(folder: Path, batches: Sequence[Feed]) -> Path:
    folder.mkdir(parents=True)
    for number, batch in enumerate(batches):
        np.savez(folder / f"{number:03}.npz", **batch)
    return folder


def _images(
    title: str, graph: Path, place: Path, samples: np.ndarray, images: np.ndarray, truth: np.ndarray
) -> Subject:
    batches = [{"x": samples[i : i + 32]} for i in range(0, len(samples), 32)]
    tests = [{"x": images[i : i + 100]} for i in range(0, len(images), 100)]
    return Subject(title, graph, write_batches(place / "samples", batches), tests, truth, {"x": images[:8]})


def digits(place: Path, uneven: bool = False) -> Subject:
    """Drawn digits, scripts/train_digits.py; and the same function with channels of very different size."""
    import train_digits

    model = train_digits.train()
    if uneven:
        train_digits.make_uneven(model)
    train_digits.write_onnx(model, place / "cnn.onnx")
    images, truth = train_digits.draw(4000, 1002)
    title = f"Drawn digits{', channels of uneven size' if uneven else ''}: 20 thousand weights, 4,000 images"
    return _images(title, place / "cnn.onnx", place, train_digits.draw(256, 1001)[0], images, truth)


def mnist(place: Path) -> Subject:
    """The same network trained on 7,000 written digits, tested on 3,000 others."""
    import fetch_demo_digits
    import train_digits

    with np.load(fetch_demo_digits.main() / "digits.npz") as found:
        images, truth = found["x"], found["y"]
    train_digits.write_onnx(
        train_digits.fit(images[:7000], truth[:7000], epochs=4), place / "cnn.onnx", images.shape[-1]
    )
    title = "MNIST: the same network trained on 7,000 written digits, 3,000 others"
    return _images(title, place / "cnn.onnx", place, images[:256], images[7000:], truth[7000:])


def ppocr(place: Path) -> Subject:
    """PP-OCR's direction classifier on drawn words, half of them upside down."""
    import fetch_demo_ocr

    graph = fetch_demo_ocr.main() / "cls.onnx"
    words = some_words()
    samples, _ = draw_words(words[:128], 1)
    images, truth = draw_words(words[128:928], 2)
    title = "PP-OCR's text direction classifier: 53 convolutions, 800 drawn words, upright or upside down"
    return _images(title, graph, place, samples, images, truth)


def some_words() -> list[str]:
    """Distinct words of Python's own documentation in random order."""
    from pydoc_data.topics import topics

    found = sorted({word.lower() for text in topics.values() for word in re.findall(r"\b[A-Za-z]{4,12}\b", text)})
    return [found[i] for i in np.random.default_rng(0).permutation(len(found))]


def draw_words(words: Sequence[str], seed: int, turning: bool = True) -> tuple[np.ndarray, np.ndarray]:
    """Images as PP-OCR prepares them, [n, 3, 48, 192] float32 from -1 to 1, and whether they are turned, [n] int64.

    A word is drawn in Pillow's own font on a background of some brightness, blurred, covered with noise, scaled to the
    height of a line, and what is left of its width is 0. Half of them are upside down, none without `turning`.
    """
    from PIL import Image, ImageDraw, ImageFilter, ImageFont

    random = np.random.default_rng(seed)
    height, width = _LINE
    lines = np.zeros((len(words), 3, height, width), np.float32)
    turned = random.integers(0, 2 if turning else 1, len(words))
    for line, word, turn in zip(lines, words, turned, strict=True):
        text = (word, word.title(), word.upper())[random.integers(3)]
        font = ImageFont.load_default(size=int(random.integers(20, 44)))
        left, top, right, bottom = font.getbbox(text)
        margin = random.integers(2, 9, 4)
        shape = (int(right - left + margin[0] + margin[1]), int(bottom - top + margin[2] + margin[3]))
        paper, ink = random.integers(150, 256, 3), random.integers(0, 110, 3)
        if random.random() < 0.3:
            paper, ink = ink, paper
        image = Image.new("RGB", shape, tuple(paper.tolist()))
        ImageDraw.Draw(image).text((margin[0] - left, margin[2] - top), text, tuple(ink.tolist()), font)
        image = image.filter(ImageFilter.GaussianBlur(random.uniform(0, 1.2)))
        wide = min(width, -(-height * shape[0] // shape[1]))
        image = image.resize((wide, height), Image.Resampling.BILINEAR)
        if turn:
            image = image.transpose(Image.Transpose.ROTATE_180)
        pixels = np.asarray(image, np.float32) + random.normal(scale=random.uniform(0, 20), size=(height, wide, 3))
        line[:, :, :wide] = pixels.clip(0, 255).transpose(2, 0, 1)[::-1] / 127.5 - 1
    return lines, turned


def minilm(place: Path) -> Subject:
    """all-MiniLM-L6-v2 and a logistic probe for the tone of sentences, fitted to the float graph's vectors."""
    import onnxruntime
    from transformers import AutoTokenizer

    import fetch_demo_encoder
    import fetch_demo_tones

    folder, tones = fetch_demo_encoder.main(), fetch_demo_tones.main()
    tokenizer = AutoTokenizer.from_pretrained(folder)

    def rows(name: str) -> tuple[list[str], np.ndarray]:
        found = [json.loads(line) for line in (tones / f"{name}.jsonl").read_text().splitlines()]
        return [r["phrase"] for r in found], np.array([r["tone"] == "positive" for r in found], np.int64)

    def batches(sentences: Sequence[str], size: int) -> Iterator[dict[str, np.ndarray]]:
        for start in range(0, len(sentences), size):
            some = list(sentences[start : start + size])
            found = tokenizer(some, padding=True, truncation=True, max_length=_MAX_TOKENS, return_tensors="np")
            yield {name: found[name].astype(np.int64) for name in ("input_ids", "attention_mask")}

    sentences, tone = rows("movie-train")  # 9,388; what is calibrated on is the end, which no other part reaches
    held_out, truth = rows("movie-held-out")
    fit, rest = slice(0, 1200), slice(1200, 1280)
    session = onnxruntime.InferenceSession(folder / "model.onnx", providers=["CPUExecutionProvider"])
    order = sorted(range(len(sentences))[fit], key=lambda row: len(sentences[row]))  # little padding
    vectors = [
        _sentence_vectors(session.run(None, feed)[0], feed) for feed in batches([sentences[i] for i in order], 20)
    ]
    probe = _fit_probe(np.concatenate(vectors), tone[order])
    test, right = [*held_out, *sentences[rest]], np.concatenate([truth, tone[rest]])
    order = sorted(range(len(test)), key=lambda row: len(test[row]))
    return Subject(
        "all-MiniLM-L6-v2: 22.7 million weights, a probe for the tone of film reviews on 400 sentences",
        folder,
        write_batches(place / "samples", list(batches(sentences[-64:], 8))),
        list(batches([test[i] for i in order], 20)),
        right[order],
        {name: array[:, :32] for name, array in next(batches([" ".join(sentences[-4:])], 1)).items()},
        _sentence_vectors,
        lambda found: (found @ probe[:-1] + probe[-1] > 0).astype(np.int64),
    )


def _sentence_vectors(output: np.ndarray, feed: Feed) -> np.ndarray:
    """Mean over the tokens of each sentence, of length 1: [n, t, d] to [n, d]."""
    mask = feed["attention_mask"][..., None].astype(np.float32)
    mean = (output * mask).sum(1) / mask.sum(1)
    return np.asarray(mean / np.linalg.norm(mean, axis=1, keepdims=True))


def _fit_probe(vectors: np.ndarray, truth: np.ndarray) -> np.ndarray:
    """Logistic regression with a little decay: weights [d] and bias, [d + 1] float32."""
    import torch

    x, y = torch.from_numpy(vectors), torch.from_numpy(truth).float()
    weights = torch.zeros(x.shape[1] + 1, requires_grad=True)
    optimizer = torch.optim.LBFGS([weights], max_iter=200, line_search_fn="strong_wolfe")

    def loss() -> torch.Tensor:
        optimizer.zero_grad()
        said = x @ weights[:-1] + weights[-1]
        found = torch.nn.functional.binary_cross_entropy_with_logits(said, y) + 3e-4 * weights[:-1].square().sum()
        found.backward()
        return found

    optimizer.step(loss)  # type: ignore[no-untyped-call]
    return weights.detach().numpy()


MODELS: Mapping[str, Callable[[Path], Subject]] = {
    "digits": digits,
    "uneven": lambda place: digits(place, uneven=True),
    "mnist": mnist,
    "ppocr": ppocr,
    "minilm": minilm,
}
