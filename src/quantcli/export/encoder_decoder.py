"""torch.onnx for models of encoder and decoder: encoder.onnx and decoder.onnx, which remembers.

encoder.onnx reads the whole input once and gives the keys and values that every layer of the decoder attends to,
`cross.0.key` and so on. decoder.onnx takes them, the tokens so far through its own cache, and gives logits: the same
graph for the first token, with a past of no positions, and for all that follow.
"""

import inspect
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import EncoderDecoderCache
from transformers.modeling_outputs import BaseModelOutput

from quantcli.errors import InputError, first_line
from quantcli.export.plain_cache import PlainCache
from quantcli.export.torch_exporter import trace
from quantcli.export.traceable import make_traceable
from quantcli.export.whole_model import LARGEST_ERROR, example_of
from quantcli.graphs.model.files import save_graph
from quantcli.graphs.model.session import open_session, run_sample

__all__ = ["write_pair"]

_NEW, _PAST = 4, 3
_PIECES = (1, 3, 1, 2)  # tokens that are fed one after the other to check the cache


def write_pair(model: Any, folder: Path, target: Path, opset: int | None) -> Iterator[tuple[str, float]]:
    """Writes both graphs, runs them beside the model; gives each name and the largest error of its outputs.

    Raises:
        InputError: it cannot be traced, or computes something else.
    """
    model.set_attn_implementation("eager")
    make_traceable(model)
    main = model.get_encoder().main_input_name
    example, free = example_of(model.get_encoder(), folder, main)
    example.pop("token_type_ids", None)
    takes_mask = "attention_mask" in example and "attention_mask" in inspect.signature(model.forward).parameters
    try:
        with torch.no_grad():
            cache = model(**example, decoder_input_ids=_tokens(model, 2, 2), use_cache=True).past_key_values
    except Exception as error:  # whatever model code raises
        raise InputError(f"{type(model).__name__} does not run: {first_line(error)}") from error
    if not isinstance(cache, EncoderDecoderCache):
        raise InputError(f"{type(model).__name__} keeps no cache of encoder and decoder: it cannot be written as two")
    own, cross = (PlainCache.of(c) for c in (cache.self_attention_cache, cache.cross_attention_cache))
    encoder = _Encoder(model, tuple(example))
    save_graph(
        trace(
            encoder,
            tuple(example.values()),
            inputs=list(example),
            outputs=cross.names("cross"),
            dynamic_shapes=tuple(free[name] for name in example),
            opset=opset,
            what=f"the encoder of {type(model).__name__}",
        ),
        target / "encoder.onnx",
    )
    dynamic = torch.export.Dim.DYNAMIC
    batch, length = {0: dynamic}, {0: dynamic, 1: dynamic}
    mask = {"encoder_attention_mask": example["attention_mask"]} if takes_mask else {}
    with torch.no_grad():
        seen = encoder(*example.values())
    grows = free[main].get(1) is not None  # else the encoder gives one number of positions: Whisper's 30 seconds
    attended = {0: dynamic, 2: dynamic} if grows else batch
    decoder = _Decoder(model, own, cross, bool(mask))
    save_graph(
        trace(
            decoder,
            (_tokens(model, 2, _NEW), *mask.values(), *seen, *own.zeros(2, _PAST)),
            inputs=["input_ids", *mask, *cross.names("cross"), *own.names("past_key_values")],
            outputs=["logits", *own.names("present")],
            dynamic_shapes=(length, *(length for _ in mask), *(attended for _ in seen),
                            *({0: dynamic, 2: dynamic} for _ in own.names(""))),
            opset=opset,
            what=f"the decoder of {type(model).__name__}",
        ),
        target / "decoder.onnx",
    )  # fmt: skip
    yield from _compare(model, example, own, bool(mask), target)


def _tokens(model: Any, rows: int, count: int) -> Tensor:
    vocabulary = model.config.get_text_config(decoder=True).vocab_size
    return torch.randint(2, vocabulary, (rows, count), generator=torch.Generator().manual_seed(1))


class _Encoder(nn.Module):
    """Input to the keys and values that the decoder's layers attend to."""

    def __init__(self, model: Any, names: tuple[str, ...]):
        super().__init__()
        self.model, self.names = model, names

    def forward(self, *tensors: Tensor) -> Any:
        named = dict(zip(self.names, tensors, strict=True))
        start = torch.zeros(tensors[0].shape[0], 1, dtype=torch.long)
        cache = self.model(**named, decoder_input_ids=start, use_cache=True).past_key_values.cross_attention_cache
        return PlainCache.of(cache).flatten(cache)


class _Decoder(nn.Module):
    """Tokens, keys and values of the input, and the past to logits and the past one step on."""

    def __init__(self, model: Any, own: PlainCache, cross: PlainCache, takes_mask: bool):
        super().__init__()
        self.model, self.own, self.cross, self.takes_mask = model, own, cross, takes_mask
        self.width = model.config.get_text_config().hidden_size

    def forward(self, *tensors: Tensor) -> Any:
        tokens, mask, rest = tensors[0], tensors[1] if self.takes_mask else None, tensors[1 + self.takes_mask :]
        seen, past = rest[: 2 * self.cross.layers], rest[2 * self.cross.layers :]
        cache = EncoderDecoderCache(self.own.fill(past), self.cross.fill(seen))
        cache.is_updated = dict.fromkeys(range(self.cross.layers), True)
        # the layers read the cache; of the encoder's output only the sizes count
        unread = torch.zeros(seen[0].shape[0], seen[0].shape[2], self.width)
        out = self.model(
            encoder_outputs=BaseModelOutput(last_hidden_state=unread),
            decoder_input_ids=tokens,
            past_key_values=cache,
            use_cache=True,
            **({"attention_mask": mask} if mask is not None else {}),
        )
        return out.logits, *self.own.flatten(out.past_key_values.self_attention_cache)


def _compare(
    model: Any, example: Mapping[str, Tensor], own: PlainCache, takes_mask: bool, target: Path
) -> Iterator[tuple[str, float]]:
    """Decodes some tokens piece by piece and compares the logits with those of the model's one pass."""
    tokens = _tokens(model, 2, sum(_PIECES))
    with torch.no_grad():
        wanted = model(**example, decoder_input_ids=tokens, use_cache=False).logits.numpy()
    encoder, decoder = open_session(target / "encoder.onnx"), open_session(target / "decoder.onnx")
    feed = {n: v.numpy() for n, v in example.items()}
    seen = dict(zip((o.name for o in encoder.get_outputs()), run_sample(encoder, feed, 0), strict=True))
    if takes_mask:
        seen["encoder_attention_mask"] = feed["attention_mask"]
    past = dict(zip(own.names("past_key_values"), (t.numpy() for t in own.zeros(2, 0)), strict=True))
    found, at = [], 0
    for count in _PIECES:
        piece = {"input_ids": tokens[:, at : at + count].numpy()}
        known = {i.name for i in decoder.get_inputs()}
        logits, *present = run_sample(decoder, {k: v for k, v in (piece | seen | past).items() if k in known}, at)
        past = dict(zip(past, present, strict=True))
        found.append(logits)
        at += count
    error = float(np.linalg.norm(np.concatenate(found, 1) - wanted) / np.linalg.norm(wanted))
    if not error <= LARGEST_ERROR:
        raise InputError(
            f"encoder.onnx and decoder.onnx compute something else than the checkpoint: logits differ by {error:.1%}"
        )
    yield "encoder", error
    yield "decoder", error
