"""A tokenizer as llama.cpp knows it: its tokens, their kinds, merges or scores, and how text is cut before.

Everything is read from the fast tokenizer's own description. llama.cpp has the regular expressions that cut text built
in, under names: `_CUTS` says which name means which. What it would tokenize otherwise is refused.
"""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from quantcli.errors import InputError

__all__ = ["Vocabulary", "read_vocabulary"]

_CONTRACTIONS = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_WORDS = r"[^\r\n\p{L}\p{N}]?\p{L}+"
_REST = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_CASED = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+{more}|"
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*{more}|"
)
_SLASHED = r" ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_LLAMA3 = rf"{_CONTRACTIONS}|{_WORDS}|\p{{N}}{{1,3}}|{_REST}"
_QWEN2 = rf"{_CONTRACTIONS}|{_WORDS}|\p{{N}}|{_REST}"
_GPT4O = _CASED.replace("{more}", f"{_CONTRACTIONS}?") + r"\p{N}{1,3}|" + _SLASHED
_TEKKEN = _CASED.replace("{more}", "") + r"\p{N}|" + _SLASHED
_BYTE_LEVEL, _DIGITS = "gpt-2's", "single digits"

_CUTS: Mapping[tuple[tuple[str, ...], bool], str] = {
    ((_BYTE_LEVEL,), False): "gpt-2",
    ((_DIGITS, _BYTE_LEVEL), False): "smollm",
    ((_LLAMA3,), True): "llama-bpe",
    ((_LLAMA3,), False): "smaug-bpe",
    ((_QWEN2,), False): "qwen2",
    ((_GPT4O,), False): "gpt-4o",
    ((_TEKKEN,), True): "tekken",
}
"""llama.cpp's name, by how text is cut and whether whole words that are tokens are taken without merging."""

_PHI3 = re.compile("phi-?3", re.IGNORECASE)
_PHI3_TOKENS = {"</s>", "<unk>", "<s>", "<|endoftext|>"}
_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED, _UNUSED, _BYTE = 1, 2, 3, 4, 5, 6
_NO_SCORE = -1000.0


@dataclass(frozen=True)
class Vocabulary:
    """What of a tokenizer stands in a file."""

    model: str
    """gpt2 (byte-level BPE), llama (SentencePiece's BPE), t5 (SentencePiece's unigrams), or none."""
    tokens: list[str] = field(default_factory=list)
    kinds: list[int] = field(default_factory=list)
    """Of each token: normal, control, byte and so on, by llama.cpp's numbers."""
    scores: list[float] | None = None
    merges: list[str] | None = None
    cut: str | None = None
    """llama.cpp's name of the regular expressions that cut text into words."""
    flags: dict[str, Any] = field(default_factory=dict)
    """Further keys of `tokenizer.ggml`, without that prefix."""
    special: dict[str, int] = field(default_factory=dict)
    """Token of each role: bos, eos, unk, pad."""
    chat_template: Any = None
    """Text, or a list of named ones."""
    notes: tuple[str, ...] = ()
    """What may come out otherwise."""
    strips: bool = False
    """Whether control tokens take the spaces behind them in, as Phi-3's do."""

    def named(self, name: str) -> str:
        """A name for the model: llama.cpp tokenizes otherwise where it reads phi-3 in it."""
        if self.strips:
            return name if _PHI3.search(name) else f"phi-3 {name}"
        return _PHI3.sub("phi 3", name)

    def write(self, writer: Any) -> None:
        """Tells a gguf.GGUFWriter."""
        writer.add_tokenizer_model(self.model)
        if self.model == "none":
            return
        writer.add_tokenizer_pre(self.cut or "default")
        writer.add_token_list(self.tokens)
        writer.add_token_types(self.kinds)
        if self.scores is not None:
            writer.add_token_scores(self.scores)
        if self.merges is not None:
            writer.add_token_merges(self.merges)
        for key, value in self.flags.items():
            name = f"tokenizer.ggml.{key}"
            if isinstance(value, bool):
                writer.add_bool(name, value)
            else:
                writer.add_array(name, value)
        for role, number in self.special.items():
            writer.add_uint32(f"tokenizer.ggml.{role}_token_id", number)
        if self.chat_template:
            writer.add_chat_template(self.chat_template)


def read_vocabulary(folder: Path, size: int) -> Vocabulary:
    """The vocabulary of a checkpoint folder.

    Args:
        folder: With the tokenizer's files.
        size: Rows of the embedding; tokens beyond those of the tokenizer are unused.

    Raises:
        InputError: llama.cpp would tokenize otherwise.
    """
    if not any(folder.glob("tokenizer*")) and not (folder / "vocab.json").is_file():
        return Vocabulary("none")
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise InputError(f"{folder} has a tokenizer of Python code alone, which llama.cpp cannot run")
    facts = json.loads(backend.to_str())
    model, kind = facts["model"], facts["model"]["type"]
    if kind == "BPE" and _is_byte_level(facts):
        found = _byte_level(facts, size)
    elif kind == "BPE" and model.get("byte_fallback"):
        found = _sentencepiece_bpe(facts, size)
    elif kind == "Unigram":
        found = _unigram(facts, size)
    else:
        raise _refused(f"its tokenizer is a {kind}, without bytes to fall back on")
    probe = tokenizer("a").input_ids
    ends = {"bos": tokenizer.bos_token_id, "eos": tokenizer.eos_token_id}
    flags = {
        "add_bos_token": bool(probe) and probe[0] == ends["bos"],
        "add_eos_token": bool(probe) and probe[-1] == ends["eos"],
    }
    roles = ends | {"unknown": tokenizer.unk_token_id, "padding": tokenizer.pad_token_id}
    template = tokenizer.chat_template
    if isinstance(template, dict):
        template = [{"name": name, "template": text} for name, text in template.items()]
    return Vocabulary(
        found.model,
        found.tokens,
        found.kinds,
        found.scores,
        found.merges,
        found.cut,
        found.flags | flags,
        {role: number for role, number in roles.items() if number is not None and number < size},
        template,
        found.notes,
        _strips(facts, found.tokens),
    )


def _strips(facts: Mapping[str, Any], tokens: list[str]) -> bool:
    """Whether control tokens take spaces in, the one way in which llama.cpp can do that.

    Raises:
        InputError: in another way.
    """
    control = [token for token in facts["added_tokens"] if token["special"]]
    if not any(token["rstrip"] or token["lstrip"] for token in control):
        return False
    if any(token["lstrip"] for token in control) or not set(tokens) >= _PHI3_TOKENS:
        raise _refused("some of its control tokens take the spaces around them in")
    return True


def _refused(why: str) -> InputError:
    return InputError(f"llama.cpp would tokenize otherwise: {why}", hint="use --format gptq, awq or compressed-tensors")


def _parts(facts: Mapping[str, Any], name: str, inside: str) -> list[dict[str, Any]]:
    """The steps of a part of the pipeline, sequences taken apart."""
    part = facts.get(name)
    if part is None:
        return []
    if part["type"] == "Sequence":
        return [step for steps in part[inside] for step in _parts({name: steps}, name, inside)]
    return [part]


def _is_byte_level(facts: Mapping[str, Any]) -> bool:
    return any(step["type"] == "ByteLevel" for step in _parts(facts, "pre_tokenizer", "pretokenizers"))


def _listed(facts: Mapping[str, Any], size: int, vocabulary: Mapping[str, int]) -> tuple[list[str], list[int]]:
    """Tokens in order and their kinds; numbers without a token are unused."""
    added = {token["content"]: token for token in facts["added_tokens"]}
    numbers = {**vocabulary, **{content: token["id"] for content, token in added.items()}}
    if numbers and max(numbers.values()) >= size:
        raise InputError(
            f"the tokenizer has {max(numbers.values()) + 1} tokens, the embedding {size} rows",
            hint="llama.cpp wants a row for each; drop the tokens that the model does not know",
        )
    tokens, kinds = [f"[PAD{i}]" for i in range(size)], [_UNUSED] * size
    for content, number in numbers.items():
        if (
            content in added
            and (added[content]["lstrip"] or added[content]["rstrip"])
            and not added[content]["special"]
        ):
            raise _refused(f"the added token {content!r} takes spaces around it in")
        tokens[number] = content
        kinds[number] = (_CONTROL if added[content]["special"] else _USER_DEFINED) if content in added else _NORMAL
    return tokens, kinds


def _byte_level(facts: Mapping[str, Any], size: int) -> Vocabulary:
    model = facts["model"]
    normalizers = [step["type"] for step in _parts(facts, "normalizer", "normalizers")]
    notes = []
    if set(normalizers) - {"NFC"}:
        raise _refused(f"its text is normalized by {', '.join(normalizers)}")
    if normalizers:
        notes.append("llama.cpp does not compose characters (NFC): text that is not composed is tokenized otherwise")
    whole = bool(model.get("ignore_merges"))
    steps = _cuts(facts)
    cut = _CUTS.get((steps, whole)) or _CUTS.get((steps, not whole))
    if cut is None:
        raise _refused(f"it cuts text by {' and '.join(steps) or 'nothing'}, which none of its names means")
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"]]
    if not merges:
        raise _refused("it merges nothing, and llama.cpp opens no such tokenizer")
    if (steps, whole) not in _CUTS and not _all_merge(model["vocab"], merges):
        raise _refused("some of its tokens are never merged, and whole words are looked up first or not")
    tokens, kinds = _listed(facts, size, model["vocab"])
    return Vocabulary("gpt2", tokens, kinds, merges=merges, cut=cut, notes=tuple(notes))


def _cuts(facts: Mapping[str, Any]) -> tuple[str, ...]:
    """How text is cut, one entry for each step."""
    found = []
    for step in _parts(facts, "pre_tokenizer", "pretokenizers"):
        kind = step["type"]
        if kind == "ByteLevel":
            if step.get("add_prefix_space"):
                raise _refused("a space is put in front of each text")
            found += [_BYTE_LEVEL] * bool(step.get("use_regex", True))
        elif kind == "Digits" and step.get("individual_digits"):
            found.append(_DIGITS)
        elif kind == "Split" and "Regex" in step["pattern"] and _isolates(step):
            found.append(step["pattern"]["Regex"])
        else:
            found.append(kind)
    return tuple(found)


def _isolates(step: Mapping[str, Any]) -> bool:
    """Whether each match, and what lies between matches, is a word; the expressions match everything."""
    return (step["behavior"], step["invert"]) in (("Isolated", False), ("Removed", True))


def _all_merge(vocabulary: Mapping[str, int], merges: list[str]) -> bool:
    made = {merge.replace(" ", "") for merge in merges}
    return all(len(token) == 1 or token in made for token in vocabulary)


def _sentencepiece_bpe(facts: Mapping[str, Any], size: int) -> Vocabulary:
    """SentencePiece's BPE in the tokenizers package: a score is the rank of the merge that makes a token."""
    model = facts["model"]
    prefix = _space_prefix(facts)
    tokens, kinds = _listed(facts, size, model["vocab"])
    pairs = [tuple(merge.split(" ", 1)) if isinstance(merge, str) else tuple(merge) for merge in model["merges"]]
    ranks: dict[str, int] = {}
    for rank, (left, right) in enumerate(pairs):
        ranks.setdefault(left + right, rank)
    scores = [_NO_SCORE] * size
    for number, (token, kind) in enumerate(zip(tokens, kinds, strict=True)):
        if kind == _NORMAL:
            if len(token) == 6 and token.startswith("<0x") and token.endswith(">"):
                kinds[number] = _BYTE
            scores[number] = -float(ranks.get(token, len(pairs)))
        elif kind == _USER_DEFINED:
            tokens[number] = token.replace("▁", " ")
        if token == model.get("unk_token"):
            kinds[number] = _UNKNOWN
    notes = []
    if not _merges_all_ways(model["vocab"], set(pairs)):
        notes.append("llama.cpp merges any two tokens whose sum is one; this tokenizer does not: rare words may differ")
    return Vocabulary("llama", tokens, kinds, scores, flags={"add_space_prefix": prefix}, notes=tuple(notes))


def _merges_all_ways(vocabulary: Mapping[str, int], pairs: set[tuple[str, ...]]) -> bool:
    """Whether every two tokens whose sum is a token that is merged at all may be merged."""
    made = {left + right for left, right in pairs}
    for token in made:
        for i in range(1, len(token)):
            left, right = token[:i], token[i:]
            if left in vocabulary and right in vocabulary and (left, right) not in pairs:
                return False
    return True


def _space_prefix(facts: Mapping[str, Any]) -> bool:
    """Whether a space is put in front of text; spaces become ▁, and nothing else may happen to it."""
    prefix, replaces = False, False
    for step in _parts(facts, "normalizer", "normalizers"):
        if step["type"] == "Prepend" and step["prepend"] == "▁":
            prefix = True
        elif step["type"] == "Replace" and step["pattern"] == {"String": " "} and step["content"] == "▁":
            replaces = True
        else:
            raise _refused(f"its text is normalized by {step['type']}")
    for step in _parts(facts, "pre_tokenizer", "pretokenizers"):
        if step["type"] == "Metaspace" and step["replacement"] == "▁" and not step.get("split", True):
            prefix, replaces = step.get("prepend_scheme", "always") != "never", True
        elif not (step["type"] == "Split" and step["pattern"] == {"String": " "} and replaces):
            raise _refused(f"it cuts text by {step['type']}")
    if not replaces:
        raise _refused("its spaces are no ▁")
    return prefix


def _unigram(facts: Mapping[str, Any], size: int) -> Vocabulary:
    import base64

    model = facts["model"]
    if model.get("byte_fallback"):
        raise _refused("it falls back on bytes beside unigrams")
    flags: dict[str, Any] = {"remove_extra_whitespaces": False, "add_space_prefix": False}
    for step in _parts(facts, "normalizer", "normalizers"):
        if step["type"] == "Precompiled":
            if step["precompiled_charsmap"]:
                flags["precompiled_charsmap"] = list(base64.b64decode(step["precompiled_charsmap"]))
        elif step["type"] == "Replace" and step["pattern"] == {"Regex": " {2,}"}:
            flags["remove_extra_whitespaces"] = True
        elif step["type"] != "Strip":
            raise _refused(f"its text is normalized by {step['type']}")
    for step in _parts(facts, "pre_tokenizer", "pretokenizers"):
        if step["type"] == "Metaspace" and step["replacement"] == "▁":
            flags["add_space_prefix"] = step.get("prepend_scheme", "always") != "never"
        elif step["type"] != "WhitespaceSplit":
            raise _refused(f"it cuts text by {step['type']}")
    tokens, kinds = _listed(facts, size, {token: number for number, (token, _) in enumerate(model["vocab"])})
    scores = [score for _, score in model["vocab"]] + [_NO_SCORE] * (size - len(model["vocab"]))
    if model.get("unk_id") is not None:
        kinds[model["unk_id"]] = _UNKNOWN
    return Vocabulary("t5", tokens, kinds, scores, flags=flags)
