"""A folder of images as samples of a graph: resized, scaled and laid out as the network was trained."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np

from quantcli.data.graph_inputs import Samples, Specs
from quantcli.errors import InputError, UsageError, nearest
from quantcli.graphs.model.inputs import Feed

__all__ = ["ImageSpec", "image_samples", "parse_image_spec"]

Layout = Literal["nchw", "nhwc"]
Order = Literal["rgb", "bgr", "gray"]
_SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".webp", ".gif", ".tif", ".tiff")


@dataclass(frozen=True)
class ImageSpec:
    """How an image becomes an array: (pixel * scale - mean) / std per channel."""

    height: int
    """Rows after resizing."""
    width: int
    """Columns after resizing."""
    mean: tuple[float, ...] = (0.0,)
    """Per channel, or one for all, after `scale`."""
    std: tuple[float, ...] = (1.0,)
    """Per channel, or one for all."""
    scale: float = 1 / 255
    """Factor on the pixels 0 to 255."""
    layout: Layout = "nchw"
    """Order of the axes."""
    order: Order = "rgb"
    """Order of the channels."""

    def __post_init__(self) -> None:
        channels = 1 if self.order == "gray" else 3
        if self.height < 1 or self.width < 1:
            raise UsageError(f"an image has at least one pixel, got size {self.height}x{self.width}")
        for name, values in (("mean", self.mean), ("std", self.std)):
            if len(values) not in (1, channels):
                raise UsageError(f"{name} has one value or {channels}, got {len(values)}")
        if not all(value > 0 for value in self.std):
            raise UsageError(f"std is above 0, got {self.std}")


def parse_image_spec(text: str) -> ImageSpec:
    """`size=224x224,mean=0.485/0.456/0.406,std=0.229/0.224/0.225,layout=nchw,order=rgb,scale=0.00392`.

    Raises:
        UsageError: an unknown key or a value that cannot be.
    """
    keys = ("size", "mean", "std", "layout", "order", "scale")
    values: dict[str, Any] = {}
    for part in text.split(","):
        key, _, value = (word.strip() for word in part.partition("="))
        if key not in keys:
            raise UsageError(f"unknown key {key!r} of the image specification, {nearest(key, keys)}")
        try:
            if key == "size":
                height, _, width = value.partition("x")
                values["height"], values["width"] = int(height), int(width or height)
            elif key in ("mean", "std"):
                values[key] = tuple(float(number) for number in value.split("/"))
            elif key == "scale":
                values[key] = float(value)
            else:
                allowed = get_args(Layout if key == "layout" else Order)
                if value.lower() not in allowed:
                    raise UsageError(f"{key} of images is one of {', '.join(allowed)}, got {value!r}")
                values[key] = value.lower()
        except ValueError as error:
            raise UsageError(f"{key} of images has the value {value!r}, which is no number") from error
    if "height" not in values:
        raise UsageError("the image specification has no size", hint="begin with size=HEIGHTxWIDTH")
    return ImageSpec(**values)


def image_samples(
    folder: Path, specs: Specs, image: ImageSpec, *, batch_size: int = 1, limit: int | None = None
) -> Samples:
    """Images of a folder and of those below it, in the order of their names, for a graph with one input.

    Raises:
        InputError: no images, one that cannot be read, Pillow is missing, or a graph with several inputs.
    """
    if len(specs) != 1:
        names = ", ".join(s.name for s in specs)
        raise InputError(f"images feed graphs with one input, this one takes {names}", hint="give .npz files")
    files = sorted(p for p in folder.rglob("*") if p.suffix.lower() in _SUFFIXES and p.is_file())[:limit]
    if not files:
        raise InputError(f"{folder} has no images ({', '.join(_SUFFIXES)})")
    first = specs[0].shape[0] if specs[0].shape else batch_size
    rows = first if isinstance(first, int) else batch_size
    # a batch of fixed size cannot be fed in part
    whole = len(files) - len(files) % rows if isinstance(first, int) else len(files)
    if whole == 0:
        raise InputError(f"{folder} has {len(files)} images, the graph takes {rows} at a time")

    def read() -> Iterator[tuple[Feed, str]]:
        for start in range(0, whole, rows):
            some = files[start : min(start + rows, whole)]
            yield {specs[0].name: np.stack([load_image(f, image) for f in some])}, f"{some[0]} and {len(some) - 1} more"

    return Samples(specs, read)


def load_image(file: Path, image: ImageSpec) -> np.ndarray:
    """One image, [C, height, width] or [height, width, C] float32."""
    try:
        from PIL import Image
    except ImportError as error:
        raise InputError("images need the package pillow", hint="pip install 'quantcli[images]'") from error
    try:
        with Image.open(file) as opened:
            picture = opened.convert("L" if image.order == "gray" else "RGB")
    except Exception as error:  # the decoders raise a dozen types for damaged files
        raise InputError(f"{file} cannot be read as an image: {error}") from error
    resized = picture.resize((image.width, image.height), Image.Resampling.BILINEAR)
    pixels = np.asarray(resized, np.float32).reshape(image.height, image.width, -1)
    if image.order == "bgr":
        pixels = pixels[..., ::-1]
    mean, std = np.asarray(image.mean, np.float32), np.asarray(image.std, np.float32)
    pixels = (pixels * np.float32(image.scale) - mean) / std
    return np.ascontiguousarray(pixels.transpose(2, 0, 1) if image.layout == "nchw" else pixels, np.float32)
