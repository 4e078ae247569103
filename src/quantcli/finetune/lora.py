"""LoRA (Hu et al., https://arxiv.org/abs/2106.09685) beside the linears of a model, float or packed, by peft.

peft picks the layer that it injects by the class of the linear it finds. It knows nothing of our packed linears, so
they are registered with a layer that runs them as they are: x W^T from the codes, plus the two small products. What
is saved is an ordinary adapter, which plain peft opens on the float model of the same shape.
"""

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from copy import copy
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from peft.tuners.lora.layer import Linear as LoraLinear
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn
from transformers.pytorch_utils import Conv1D

from quantcli.errors import InputError, UsageError, first_line, nearest
from quantcli.models.linear import QuantizedLinear

__all__ = ["PackedLoraLinear", "add_lora", "find_targets", "open_lora", "quiet_peft", "save_lora"]

_ROUTERS = ("router", "gate", "shared_expert_gate")


class PackedLoraLinear(LoraLinear):  # type: ignore[misc]
    """A packed linear with adapters beside it: y = x W^T + scaling (dropout(x) A^T) B^T, W frozen in its codes."""

    def __init__(self, base_layer: nn.Module, adapter_name: str, config: LoraConfig, **kwargs: Any):
        """As peft makes one; codes stand by outputs, also where the model's float linears stand the other way."""
        config = copy(config)
        config.fan_in_fan_out = False
        super().__init__(base_layer, adapter_name, config, **kwargs)

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Refused: codes cannot take up a float update.

        Raises:
            UsageError: always.
        """
        raise UsageError(
            "an adapter cannot be merged into quantized weights", hint="merge it into the float model, then quantize"
        )


def find_targets(model: nn.Module, wanted: Sequence[str] = ()) -> list[str]:
    """The names that peft matches linears by: the ends of their paths.

    Args:
        model: A transformers model, as `models.load` opens it.
        wanted: Ends of paths, as q_proj or mlp.up_proj; none: every linear in the blocks but routers and experts,
            which stand apart in a packed model and together in a float one.

    Raises:
        UsageError: a name that no linear has.
        InputError: the model has no linears in repeated blocks.
    """
    linears = [
        name for name, module in model.named_modules() if isinstance(module, nn.Linear | Conv1D | QuantizedLinear)
    ]
    inside = [name for name in linears if any(part.isdigit() for part in name.split("."))]
    if wanted:
        for word in wanted:
            if not any(name == word or name.endswith("." + word) for name in inside):
                leaves = {name.rpartition(".")[2] for name in inside}
                raise UsageError(
                    f"--target-modules {word!r}: no linear in a block has that name, {nearest(word, leaves)}"
                )
        return list(dict.fromkeys(wanted))
    chosen = [n for n in inside if ".experts." not in n and n.rpartition(".")[2] not in _ROUTERS]
    if not chosen:
        raise InputError(f"{type(model).__name__} has no linear layers in repeated blocks to adapt")
    left_out = {n.rpartition(".")[2] for n in set(linears) - set(chosen)}
    return list(dict.fromkeys(_short(name, left_out) for name in chosen))


def add_lora(
    model: Any,
    *,
    r: int,
    alpha: float,
    dropout: float = 0.0,
    target_modules: Sequence[str] = (),
    use_dora: bool = False,
    seed: int = 0,
) -> PeftModel:
    """Freezes a model and puts fresh adapters beside its linears; its outputs are what they were until trained.

    Args:
        model: A transformers model, as `models.load` opens it; it is changed in place.
        r: Rank.
        alpha: The update is scaled by alpha / r.
        dropout: Share of the adapters' inputs that training leaves out.
        target_modules: As in `find_targets`.
        use_dora: Learn the length of each row of the weight beside its direction.
        seed: Of the adapters' A, which starts random; B starts as zero.

    Raises:
        UsageError: a target that the model does not have.
        InputError: nothing to adapt.
    """
    targets = find_targets(model, target_modules)
    config = LoraConfig(
        r=r,
        lora_alpha=alpha,
        lora_dropout=dropout,
        use_dora=use_dora,
        target_modules=targets,
        task_type="CAUSAL_LM",
        bias="none",
        fan_in_fan_out=any(isinstance(m, Conv1D) for m in model.modules()),
    )
    config._register_custom_module({QuantizedLinear: PackedLoraLinear})
    with torch.random.fork_rng(), quiet_peft():
        torch.manual_seed(seed)
        return get_peft_model(model, config)


def open_lora(model: Any, folder: Path) -> PeftModel:
    """Puts a saved adapter beside the linears of a model, float or packed, for inference.

    Args:
        model: A transformers model, as `models.load` opens it; it is changed in place.
        folder: A peft adapter folder, ours or others'.

    Raises:
        InputError: it is no LoRA adapter, is damaged, or belongs to another model.
    """
    hint = "give a folder with adapter_config.json and adapter_model.safetensors"
    # peft would look for what is missing on the hub, and would open pickles
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        if not (folder / name).is_file():
            raise InputError(f"{folder} has no {name}", hint=hint)
    device = next(model.parameters()).device
    try:
        config = LoraConfig.from_pretrained(str(folder))
        if not isinstance(config, LoraConfig):
            raise InputError(f"{folder} holds a {config.peft_type} adapter, expected LoRA")
        config._register_custom_module({QuantizedLinear: PackedLoraLinear})
        with quiet_peft():
            adapted = PeftModel.from_pretrained(model, str(folder), config=config, torch_device=str(device))
    except (ValueError, RuntimeError, TypeError, KeyError, OSError, SafetensorError) as error:
        reason = first_line(error)
        raise InputError(f"adapter {folder} does not fit the model or is damaged: {reason}") from error
    _refuse_other_tensors(adapted, folder)
    return adapted.eval()


def _refuse_other_tensors(adapted: PeftModel, folder: Path) -> None:
    """Peft leaves out what it finds no place for, in silence, and starts afresh what is not there, with a warning."""
    wanted = get_peft_model_state_dict(adapted, save_embedding_layers=False).keys()
    found = load_file(folder / "adapter_model.safetensors").keys()
    for names, what in ((found - wanted, "is for {}, which the model does not have"), (wanted - found, "lacks {}")):
        if names:
            raise InputError(
                f"adapter {folder} {what.format(sorted(names)[0])}",
                hint="give the model that the adapter was trained on",
            )


def save_lora(model: PeftModel, folder: Path, base: Path) -> None:
    """Writes adapter_config.json and adapter_model.safetensors as peft does.

    What was written is read back: it is what was trained, and finite.

    Args:
        model: With the adapter.
        folder: To write.
        base: Where the base will stand, named as an absolute path: peft takes others as seen from where it runs.
    """
    model.peft_config["default"].base_model_name_or_path = str(base.absolute())
    model.save_pretrained(str(folder), save_embedding_layers=False)
    (folder / "README.md").unlink(missing_ok=True)  # an empty form
    _verify(model, folder)


@contextmanager
def quiet_peft() -> Iterator[None]:
    """Silences peft on a class that it does not know, whose sizes it reads rightly, and on a name of transformers 6."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)
        warnings.filterwarnings("ignore", "Unsupported layer type .*quantcli.*", UserWarning)
        yield


def _verify(adapted: PeftModel, folder: Path) -> None:
    """What was written reads back as what was trained."""
    # peft stores the lengths of DoRA without the end of their name
    names = {n: n.replace(".default.", ".").replace("magnitude_vector.weight", "magnitude_vector")
             for n, p in adapted.named_parameters() if p.requires_grad}  # fmt: skip
    trained = {names[n]: p for n, p in adapted.named_parameters() if n in names}
    written = load_file(folder / "adapter_model.safetensors")
    if written.keys() != trained.keys():
        raise AssertionError("the adapter that was written has other tensors than the one that was trained")
    for name, tensor in written.items():
        if not torch.equal(tensor, trained[name].detach().cpu()) or not bool(torch.isfinite(tensor).all()):
            raise AssertionError(f"adapter tensor {name} is not what was trained, or not finite")


def _short(name: str, left_out: set[str]) -> str:
    """The last part of a path, or all after the block's number where a linear that is left out ends the same."""
    parts = name.split(".")
    last_number = max(i for i, part in enumerate(parts) if part.isdigit())
    return parts[-1] if parts[-1] not in left_out else ".".join(parts[last_number + 1 :])
