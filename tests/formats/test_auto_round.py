"""AutoRound's own headings over tensors of GPTQ v1 and AWQ."""

import pytest
import torch
from safetensors.torch import load_file, save_file

import tiny
from quantcli.errors import InputError
from quantcli.models.load import load
from quantcli.options import QuantizeOptions
from quantcli.pipelines import inspect, quantize

TOKENS = torch.arange(3, 20)[None]


@pytest.fixture(scope="module", params=[("gptq", "auto_round:auto_gptq"), ("awq", "auto_round:auto_awq")])
def pair(request, tmp_path_factory):
    """A folder of ours, and the same tensors under AutoRound's headings."""
    folder, (format, packing) = tmp_path_factory.mktemp("ar"), request.param
    source = tiny.checkpoint(folder / "float")
    exclude = ("o_proj",)
    quantize.run(QuantizeOptions(str(source), folder / "q", "rtn", group_size=32, format=format, exclude=exclude))
    extra = {r".*\.o_proj": {"bits": 16, "data_type": "float"}}
    tiny.edit_json(
        folder / "q/model/config.json",
        quantization_config={
            "quant_method": "auto-round", "packing_format": packing, "bits": 4, "group_size": 32,
            "sym": format == "gptq", "data_type": "int", "extra_config": extra,
        },
    )  # fmt: skip
    quantize.run(QuantizeOptions(str(source), folder / "ours", "rtn", group_size=32, format=format, exclude=exclude))
    return folder


def test_logits_are_those_of_the_format_below(pair):
    with torch.no_grad():
        assert torch.equal(load(pair / "q/model")(TOKENS).logits, load(pair / "ours")(TOKENS).logits)


def test_inspect_counts_codes(pair):
    found, ours = inspect.run(pair / "q/model"), inspect.run(pair / "ours")
    assert (found.parameters, found.histogram) == (ours.parameters, ours.histogram)
    assert "auto_round:auto_" in found.format


def test_bits_of_single_linears(tmp_path):
    source = tiny.checkpoint(tmp_path / "float")
    options = QuantizeOptions(str(source), tmp_path / "q", "rtn", group_size=32, bits=8, readers=("quantcli",))
    quantize.run(options)
    config = {"quant_method": "auto-round", "packing_format": "auto_round:auto_gptq", "bits": 4, "group_size": 128}
    extra = {".*proj": {"bits": 8, "group_size": 32, "sym": True}}
    before = load(tmp_path / "q")(TOKENS).logits
    tiny.edit_json(tmp_path / "q/model/config.json", quantization_config=config | {"extra_config": extra})
    assert torch.equal(load(tmp_path / "q/model")(TOKENS).logits, before)


def test_other_layouts_are_named(pair):
    folder = pair / "other"
    folder.mkdir(exist_ok=True)
    save_file(load_file(pair / "q/model/model.safetensors"), folder / "model.safetensors")
    (folder / "config.json").write_bytes((pair / "q/model/config.json").read_bytes())
    tiny.edit_json(
        folder / "config.json", quantization_config={"quant_method": "auto-round", "packing_format": "auto_round:llm_x"}
    )
    with pytest.raises(InputError, match="auto-round checkpoint of layout 'auto_round:llm_x'"):
        load(folder)
