"""Adapters that begin with the rounding error: the best of their rank, and the float model where rank is enough."""

import pytest
import torch

import tiny
from quantcli.errors import InputError
from quantcli.finetune.loftq import begin_with_residuals, require_same_model
from quantcli.finetune.lora import PackedLoraLinear, add_lora
from quantcli.models.checkpoint import Checkpoint
from quantcli.models.load import load
from quantcli.options import CalibrationOptions, QuantizeOptions
from quantcli.pipelines import quantize
from quantcli.progress import Silent

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
TOKENS = torch.tensor([[3, 50, 7, 99, 12, 1, 45]])


@pytest.fixture(scope="module", params=["llama", "gpt2"])
def pair(request, tmp_path_factory):
    """A float model, and the same in 2 bits."""
    root = tmp_path_factory.mktemp("loftq")
    tiny.checkpoint(root / "float", request.param)
    quantize.run(QuantizeOptions(str(root / "float"), root / "q", "rtn", bits=2, group_size=32, dtype="keep"))
    return root


def begun(pair, r, alpha):
    adapted = add_lora(load(pair / "q"), r=r, alpha=alpha)
    share = begin_with_residuals(adapted, Checkpoint.open(pair / "float"), 0, Silent())
    return adapted, share


def test_each_is_the_best_of_its_rank(pair):
    adapted, share = begun(pair, 4, 6)
    source = load(pair / "float")
    left = whole = 0.0
    for name, layer in adapted.get_base_model().named_modules():
        if isinstance(layer, PackedLoraLinear):
            weight = source.get_submodule(name).weight
            residual = (weight.T if type(source.get_submodule(name)).__name__ == "Conv1D" else weight).detach()
            residual = residual - layer.get_base_layer().dequantize()
            u, s, v = torch.linalg.svd(residual, full_matrices=False)
            best = u[:, :4] * s[:4] @ v[:4]
            found = layer.scaling["default"] * layer.lora_B["default"].weight @ layer.lora_A["default"].weight
            assert (residual - found).norm() <= 1.001 * (residual - best).norm()
            left, whole = left + float(s[4:].square().sum()), whole + float(s.square().sum())
    assert 0.1 < share < 0.9
    assert share == pytest.approx(1 - left / whole, abs=1e-3)


def test_with_rank_enough_it_is_the_float_model(pair):
    adapted, share = begun(pair, 64, 16)
    source, rounded = load(pair / "float"), load(pair / "q")
    assert share == pytest.approx(1, abs=1e-6)
    with torch.no_grad():
        wanted = source(TOKENS).logits
        assert (rounded(TOKENS).logits - wanted).abs().max() > 0.05
        assert (adapted(TOKENS).logits - wanted).abs().max() < 1e-3


def test_a_base_that_was_changed_before_rounding(pair, tmp_path):
    text = tmp_path / "text.txt"
    text.write_text(tiny.words(300))
    calibration = CalibrationOptions(str(text), num_samples=2, seq_len=32)
    quantize.run(QuantizeOptions(str(pair / "float"), tmp_path / "q", "awq", group_size=32, calibration=calibration))
    with pytest.raises(InputError, match=r"is not what the base holds: .* differs"):
        require_same_model(Checkpoint.open(tmp_path / "q" / "model"), Checkpoint.open(pair / "float"))


def test_other_models(pair, tmp_path):
    base = Checkpoint.open(pair / "q" / "model")
    with pytest.raises(InputError, match="is quantized itself"):
        require_same_model(base, base)
    other = tiny.checkpoint(tmp_path / "other", "qwen2")
    with pytest.raises(InputError, match="is a qwen2, the base a"):
        require_same_model(base, Checkpoint.open(other))


def test_a_linear_that_is_another(tmp_path):
    tiny.checkpoint(tmp_path / "float")
    quantize.run(QuantizeOptions(str(tmp_path / "float"), tmp_path / "q", "rtn", group_size=32))
    tiny.edit_weights(tmp_path / "float", lambda t: t["model.layers.1.mlp.up_proj.weight"].mul_(-1))
    with pytest.raises(InputError, match=r"layers\.1\.mlp\.up_proj is nowhere near"):
        begun(tmp_path, 4, 8)
