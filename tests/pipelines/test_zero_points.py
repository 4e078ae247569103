"""Float zero points through `quantize`: where the format holds them, by choice, and refused where it does not."""

import pytest
import torch

import families
import quantcli
from quantcli.algorithms.rounders.hqq import ALGORITHM, HqqOptions
from quantcli.algorithms.rounders.hqq import quantize as quantize_weight
from quantcli.errors import UsageError
from quantcli.formats.codecs import CODECS as EVERY_CODEC
from quantcli.models.checkpoint import Checkpoint
from quantcli.options import Override, QuantizeOptions
from quantcli.pipelines import quantize
from quantcli.scheme import Scheme

CODECS = {name: EVERY_CODEC[name] for name in ALGORITHM.formats}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models") / "llama"
    families.save(families.build("llama"), folder)
    return folder


def run(model, output, **values):
    values = {"algorithm": "hqq", "group_size": 32} | values
    return quantize.run(QuantizeOptions(str(model), output, **values))


def words(plan, label):
    return dict(plan.rows())[label]


@pytest.mark.parametrize(("format", "zero"), [(n, "float" if c.float_zeros else "integer") for n, c in CODECS.items()])
def test_the_format_chooses_and_the_plan_says_so(model, tmp_path, format, zero):
    plan = run(model, tmp_path / "q", format=format, dry_run=True)
    assert f"zero={zero}" in words(plan, "algorithm")
    assert plan.to_dict()["settings"]["zero"] == zero


def test_a_symmetric_grid_has_no_fractions(model, tmp_path):
    plan = run(model, tmp_path / "q", format="float", symmetric=True, dry_run=True)
    assert "zero=integer" in words(plan, "algorithm")
    with pytest.raises(UsageError, match="--sym fixes the zero points"):
        run(model, tmp_path / "q", format="float", symmetric=True, settings={"zero": "float"})
    mixed = (Override("q_proj", symmetric=False),)
    plan = run(model, tmp_path / "q", format="float", symmetric=True, overrides=mixed, dry_run=True)
    assert "zero=float" in words(plan, "algorithm")


@pytest.mark.parametrize("format", [n for n, c in CODECS.items() if not c.float_zeros])
def test_fractions_asked_for_are_refused_with_the_formats_that_hold_them(model, tmp_path, format):
    with pytest.raises(UsageError, match=f"format {format} cannot hold .*: it holds whole zero points only") as caught:
        run(model, tmp_path / "q", format=format, settings={"zero": "float"})
    assert "--format float" in caught.value.hint
    assert not (tmp_path / "q").exists()


def test_one_bit(model, tmp_path):
    with pytest.raises(UsageError, match="it holds 2 to 8 bits, not 1") as caught:
        run(model, tmp_path / "q", bits=1, format="gptq")
    assert caught.value.hint.endswith("float") and "awq" not in caught.value.hint
    with pytest.raises(UsageError, match="rtn makes 2, 3, 4, 5, 6, 7, 8 bits, not 1"):
        run(model, tmp_path / "q", bits=1, algorithm="rtn", format="float")
    result = run(model, tmp_path / "q", bits=1, format="float")
    assert all(layer.relative_error < layer.rtn_relative_error for layer in result.layers)
    weight = quantcli.load(tmp_path / "q").get_submodule(result.layers[0].name).weight
    assert all(len(torch.unique(group)) <= 2 for row in weight for group in row.split(32))


@pytest.mark.parametrize("format", CODECS)
def test_every_format_reads_back(model, tmp_path, format):
    """`quantize` itself compares what it wrote with what was computed; the float weights tell where zeros lie."""
    result = run(model, tmp_path / "q", format=format)
    assert all(0 < layer.relative_error < 0.02 for layer in result.layers)
    assert torch.isfinite(quantcli.load(tmp_path / "q")(torch.arange(3, 40)[None]).logits).all()
    if format == "float":
        name = f"{result.layers[0].name}.weight"
        computed = quantize_weight(Checkpoint.open(model).read(name), Scheme(4, 32), HqqOptions(), None)
        assert (computed.zero.float().frac() != 0).any()
        assert torch.equal(Checkpoint.open(tmp_path / "q" / "model").read(name), computed.dequantize())


def test_overrides_of_one_bit_meet_the_format(model, tmp_path):
    with pytest.raises(UsageError, match=r"cannot hold .*q_proj: it holds 2 to 8 bits, not 1"):
        run(model, tmp_path / "q", overrides=(Override("q_proj", bits=1),), format="gptq")
