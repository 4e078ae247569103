"""Packed layers: the products and gradients of the dequantized weight, bit by bit or to rounding."""

import threading

import pytest
import torch
from torch.nn import functional

from quantcli.errors import InputError
from quantcli.formats import gptq
from quantcli.formats.bitpack import pack_rows
from quantcli.models import linear
from quantcli.models.linear import PackedEmbedding, PackedLinear
from quantcli.models.packed_matmul import unpack_on_device
from quantcli.scheme import Scheme
from quantcli.tensors.quantized import QuantizedTensor, group_index


def random_tensor(n: int, k: int, scheme: Scheme, shuffled: bool = False) -> QuantizedTensor:
    g = torch.Generator().manual_seed(0)
    group = group_index(k, scheme)
    shape = n, scheme.group_count(k)
    return QuantizedTensor(
        codes=torch.randint(0, scheme.levels, (n, k), dtype=torch.uint8, generator=g),
        scale=(torch.randn(shape, generator=g) / scheme.levels).half(),
        zero=torch.randint(scheme.lowest_zero, scheme.levels, shape, dtype=torch.uint8, generator=g),
        scheme=scheme,
        group=group[torch.randperm(k, generator=g)] if shuffled else group,
    )


@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("shuffled", [False, True])
def test_products_and_weights(bits, shuffled):
    q = random_tensor(300, 84, Scheme(bits, 24, lowest_zero=1), shuffled)
    layer = PackedLinear(gptq.pack(q), q.scheme)
    weight = q.dequantize()
    assert torch.equal(layer.dequantize(), weight)
    assert torch.equal(layer.quantized().codes, q.codes)
    for rows in (1, 3, linear._FEW_ROWS, linear._FEW_ROWS + 1):
        x = torch.randn(rows, 84, generator=torch.Generator().manual_seed(rows))
        torch.testing.assert_close(layer(x), functional.linear(x, weight), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("count", [1, 31, 32, 77])
def test_unpacking_without_kernels(bits, count):
    codes = torch.randint(0, 1 << bits, (count, 5), dtype=torch.uint8)
    assert torch.equal(unpack_on_device(pack_rows(codes, bits), bits, count), codes.int())


def test_the_path_of_other_devices_gives_the_same_weight(monkeypatch):
    q = random_tensor(300, 84, Scheme(3, 24, lowest_zero=1), shuffled=True)
    layer = PackedLinear(gptq.pack(q), q.scheme)
    monkeypatch.setattr(linear, "_runs_kernels", lambda tensor: False)
    assert torch.equal(layer.dequantize(), q.dequantize())
    x = torch.randn(2, 84)
    torch.testing.assert_close(layer(x), x @ q.dequantize().T)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_cuda(dtype):
    q = random_tensor(300, 84, Scheme(4, 24, lowest_zero=1))
    layer = PackedLinear(gptq.pack(q), q.scheme).to("cuda")
    x = torch.randn(3, 84, device="cuda", dtype=dtype)
    expected = x @ q.dequantize(dtype).to("cuda").T
    torch.testing.assert_close(layer(x), expected, rtol=1e-3, atol=1e-2)


@pytest.mark.parametrize("rows", [2, 100])
@pytest.mark.parametrize("cache", [False, True])
@pytest.mark.parametrize("blocks", [1, 3])
def test_gradients(rows, cache, blocks, monkeypatch):
    n, k = 700, 48
    if blocks > 1:
        monkeypatch.setattr(linear, "_BLOCK_ELEMENTS", 256 * k)
    q = random_tensor(n, k, Scheme(4, 16, lowest_zero=1))
    bias = torch.randn(n)
    layer = PackedLinear(gptq.pack(q), q.scheme, bias=bias, cache=cache)
    assert len(layer.blocks()) == blocks
    reference = torch.nn.Linear(k, n)
    reference.weight.data, reference.bias.data = q.dequantize(), bias.clone()
    a = torch.randn(2, rows, k, requires_grad=True)
    b = a.detach().clone().requires_grad_()
    out, expected = layer(a), reference(b)
    torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-4)
    weights = torch.randn_like(out)
    out *= 1  # as models do with what a linear gives them
    (out * weights).sum().backward()
    (expected * weights).sum().backward()
    torch.testing.assert_close(a.grad, b.grad, rtol=1e-4, atol=1e-3)
    torch.testing.assert_close(layer.bias.grad, reference.bias.grad)
    assert (layer._dense is not None) == cache


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_input(dtype):
    q = random_tensor(64, 32, Scheme(4, 16, lowest_zero=1))
    layer = PackedLinear(gptq.pack(q), q.scheme)
    x = torch.randn(5, 32).to(dtype)
    assert layer(x).dtype == dtype
    assert torch.equal(layer(x), layer(x.float()).to(dtype))


def test_from_quantized_holds_zero_points_of_zero():
    q = random_tensor(40, 50, Scheme(4, 16))
    assert int(q.zero.min()) == 0
    layer = PackedLinear.from_quantized(q)
    assert torch.equal(layer.dequantize(), q.dequantize())


def test_changing_the_dtype_leaves_what_is_stored():
    q = random_tensor(64, 32, Scheme(4, 16, lowest_zero=1))
    layer = PackedLinear(gptq.pack(q), q.scheme, bias=torch.zeros(64))
    layer.to(torch.bfloat16)
    assert layer.scales.dtype == torch.float16
    assert layer.qweight.dtype == layer.g_idx.dtype == torch.int32
    assert layer.bias.dtype == torch.bfloat16
    assert torch.equal(layer.dequantize(), q.dequantize())
    assert set(layer.state_dict()) == {"qweight", "qzeros", "scales", "g_idx", "bias"}


def test_threads_may_share_a_model():
    q = random_tensor(512, 256, Scheme(4, 16, lowest_zero=1))
    layer = PackedLinear(gptq.pack(q), q.scheme)
    x = torch.randn(1, 256)
    expected, wrong = layer(x), []

    def work():
        wrong.extend(1 for _ in range(50) if not torch.equal(layer(x), expected))

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


@pytest.mark.parametrize("bits", [3, 4, 8])
def test_embedding_rows(bits):
    q = random_tensor(100, 40, Scheme(bits, 16, lowest_zero=1))
    layer = PackedEmbedding(PackedLinear(gptq.pack(q), q.scheme), dtype=torch.float32)
    ids = torch.tensor([[0, 99, 5], [5, 7, 1]])
    assert torch.equal(layer(ids), q.dequantize()[ids])
    assert torch.equal(layer.to(torch.bfloat16)(ids), q.dequantize(torch.bfloat16)[ids])
    scaled = PackedEmbedding(layer.packed, dtype=torch.float32, embed_scale=torch.tensor(3.0))
    assert torch.equal(scaled(ids), q.dequantize()[ids] * 3)


def test_an_embedding_does_not_take_part_in_gradients():
    q = random_tensor(100, 40, Scheme(8, 16, lowest_zero=1))
    layer = PackedEmbedding(PackedLinear(gptq.pack(q), q.scheme), dtype=torch.float32)
    assert not layer(torch.tensor([1])).requires_grad
    assert not list(layer.parameters())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.update(qweight=t["qweight"][:-1]), "qweight has shape"),
        (lambda t: t.update(qzeros=t["qzeros"][:, :-1]), "qzeros has shape"),
        (lambda t: t.update(scales=t["scales"][:-1]), "scales has shape"),
        (lambda t: t.update(scales=t["scales"] / 0), "not finite"),
        (lambda t: t.update(scales=t["scales"].int()), "expected a float"),
        (lambda t: t.update(qweight=t["qweight"].long()), "expected torch.int32"),
        (lambda t: t.update(g_idx=t["g_idx"] - 1), "g_idx names groups -1 to"),
        (lambda t: t.pop("qzeros"), "qzeros is missing"),
        (lambda t: t.update(qweight=t["qweight"][0]), r"qweight has shape \[64\], expected 2 axes"),
    ],
)
def test_tensors_that_do_not_fit(change, message):
    q = random_tensor(64, 32, Scheme(4, 16, lowest_zero=1))
    tensors = gptq.pack(q)
    change(tensors)
    with pytest.raises(InputError, match=message):
        PackedLinear(tensors, q.scheme)
