"""compressed-tensors, the format's own package, opens what we write, and we open what it writes.

Runs where it is installed (`pip install compressed-tensors==0.20.0`).
"""

import json

import pytest
import torch
from transformers import AutoModelForCausalLM, CompressedTensorsConfig

import tiny
from quantcli.formats import compressed_tensors
from quantcli.formats.codec import Described
from quantcli.formats.codecs import CODECS
from quantcli.models.linear import PackedLinear
from quantcli.models.load import load
from quantcli.options import Override, QuantizeOptions
from quantcli.pipelines import quantize
from quantcli.scheme import Scheme
from quantcli.tensors.quantized import QuantizedTensor, group_index

package = pytest.importorskip("compressed_tensors")
IDS = torch.arange(3, 40)[None]


def logits(model):
    with torch.no_grad():
        return model(IDS).logits


def weights_args(scheme):
    from compressed_tensors.quantization import QuantizationArgs

    row = scheme.group_size == -1
    return QuantizationArgs(
        num_bits=scheme.bits,
        type="int",
        symmetric=scheme.symmetric,
        strategy="channel" if row else "group",
        group_size=None if row else scheme.group_size,
    )


@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize(("rows", "columns", "group_size"), [(9, 48, 16), (33, 35, -1), (40, 64, 32)])
def test_it_unpacks_our_tensors_to_our_weights(bits, symmetric, rows, columns, group_size):
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationScheme

    scheme = Scheme(bits, group_size, symmetric)
    g = torch.Generator().manual_seed(bits)
    shape = rows, scheme.group_count(columns)
    tensor = QuantizedTensor(
        codes=torch.randint(0, scheme.levels, (rows, columns), dtype=torch.uint8, generator=g),
        scale=torch.randn(shape, generator=g).half(),
        zero=torch.full(shape, scheme.middle, dtype=torch.uint8)
        if symmetric
        else torch.randint(0, scheme.levels, shape, dtype=torch.uint8, generator=g),
        scheme=scheme,
        group=group_index(columns, scheme),
    )
    stored = compressed_tensors.pack(tensor)
    theirs = BaseCompressor.get_value_from_registry("pack-quantized").decompress(
        stored | {"weight_scale": stored["weight_scale"].float()},
        QuantizationScheme(targets=["Linear"], weights=weights_args(scheme)),
    )
    assert torch.equal(theirs["weight"], tensor.dequantize())


@pytest.mark.filterwarnings("ignore")
def test_our_configuration_is_what_it_would_write():
    from compressed_tensors.quantization import QuantizationConfig

    config = CODECS["compressed-tensors"].config(
        Described(Scheme(4, 64), {"a.b": Scheme(8, -1, True)}, [], False, False, "p", float_linears=["lm_head"])
    )
    theirs = QuantizationConfig.model_validate(config).model_dump()
    assert json.loads(json.dumps(theirs)) == {
        k: v for k, v in config.items() if k not in ("sparsity_config", "transform_config", "version")
    }


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return tiny.checkpoint(tmp_path_factory.mktemp("ct") / "float")


CASES = {
    "4 bits": {"bits": 4},
    "3 bits": {"bits": 3},
    "8 bits per channel": {"bits": 8, "group_size": -1},
    "mixed": {"overrides": (Override("down_proj", bits=8, group_size=16),), "exclude": ("o_proj",)},
    "head": {"quantize_lm_head": True},
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("case", CASES)
def test_transformers_opens_symmetric_folders(source, tmp_path, case):
    options = {"algorithm": "rtn", "group_size": 32, "symmetric": True, "format": "compressed-tensors"} | CASES[case]
    quantize.run(QuantizeOptions(str(source), tmp_path / "q", device="cpu", **options))
    ours = load(tmp_path / "q", device="cpu")
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "q" / "model", dtype=torch.float32)
    assert torch.equal(logits(theirs), logits(ours))
    for name, module in ours.named_modules():
        if isinstance(module, PackedLinear):
            assert torch.equal(theirs.get_submodule(name).weight, module.dequantize()), name


@pytest.mark.filterwarnings("ignore")
def test_transformers_opens_asymmetric_folders_dequantized(source, tmp_path):
    """transformers 5.23 expects unpacked zero points, of folders made by the package too; this way they open."""
    options = {"algorithm": "rtn", "group_size": 32, "format": "compressed-tensors", "device": "cpu"}
    quantize.run(QuantizeOptions(str(source), tmp_path / "q", **options))
    theirs = AutoModelForCausalLM.from_pretrained(
        tmp_path / "q" / "model", dtype=torch.float32, quantization_config=CompressedTensorsConfig(dequantize=True)
    )
    ours = load(tmp_path / "q", device="cpu")
    for name, module in ours.named_modules():
        if isinstance(module, PackedLinear):  # it multiplies in the dtype of the scales, float16
            torch.testing.assert_close(theirs.get_submodule(name).weight, module.dequantize(), rtol=2**-10, atol=0)
    torch.testing.assert_close(logits(theirs), logits(ours), rtol=0, atol=2e-3)


def theirs(source, folder, scheme):
    """A folder that the package makes by itself, as llm-compressor has it do."""
    from compressed_tensors.compressors import ModelCompressor
    from compressed_tensors.quantization import QuantizationConfig, QuantizationScheme, apply_quantization_config
    from compressed_tensors.quantization.utils import calculate_qparams

    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    args = weights_args(scheme)
    groups = {"group_0": QuantizationScheme(targets=["Linear"], weights=args)}
    apply_quantization_config(model, QuantizationConfig(config_groups=groups, ignore=["lm_head"]))
    for module in model.modules():
        if getattr(module, "quantization_scheme", None) is not None:
            weight = module.weight.data
            parts = weight.view(len(weight), -1, scheme.columns_per_group(weight.shape[1]))
            scale, zero = calculate_qparams(parts.amin(2), parts.amax(2), args)
            module.weight_scale.data.copy_(scale)
            module.weight_zero_point.data.copy_(zero)
            module.quantization_status = "frozen"
    compressor = ModelCompressor.from_pretrained_model(model)
    compressor.compress_model(model)
    model.save_pretrained(folder)
    compressor.update_config(folder)
    compressor.decompress_model(model)
    return model


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "scheme", [Scheme(4, 32, True), Scheme(4, 32), Scheme(8, -1, True), Scheme(3, -1), Scheme(2, 16)], ids=str
)
def test_we_open_what_it_writes(source, tmp_path, scheme):
    model = theirs(source, tmp_path / "q", scheme)
    ours = load(tmp_path / "q", device="cpu")
    packed = {n: m for n, m in ours.named_modules() if isinstance(m, PackedLinear)}
    assert len(packed) == 14
    for name, module in packed.items():
        assert torch.equal(model.get_submodule(name).weight, module.dequantize()), name
    torch.testing.assert_close(logits(ours), logits(model), rtol=1e-5, atol=1e-5)
