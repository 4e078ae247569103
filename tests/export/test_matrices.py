import torch
from transformers import AutoConfig, AutoModelForCausalLM

from quantcli.export.matrices import load_matrices
from quantcli.scheme import Scheme
from quantcli.tensors.quantized import QuantizedTensor

SIZES = {"vocab_size": 90, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2}


def load(folder, dtype, tie):
    config = AutoConfig.for_model("llama", **SIZES, num_key_value_heads=2, tie_word_embeddings=tie)
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).to(dtype).save_pretrained(folder)
    return load_matrices(folder, False)


def test_float_matrices_keep_their_stored_dtype(tmp_path):
    _, found = load(tmp_path, torch.bfloat16, tie=False)
    assert {m.dtype for m in found.stored.values()} == {torch.bfloat16}
    assert (found.embedding, found.head) == ("model.embed_tokens", "lm_head")
    assert found.quantized == {}


def test_a_tied_head_is_the_embedding_until_it_is_rounded(tmp_path):
    model, found = load(tmp_path, torch.float32, tie=True)
    assert found.head == found.embedding == "model.embed_tokens"
    found.round_head(model, Scheme(8, 16, lowest_zero=1))
    assert found.quantized == {"lm_head": 90}
    head = found("lm_head")
    assert isinstance(head, QuantizedTensor)
    embedding = found("model.embed_tokens")
    assert 0 < float((head.dequantize() - embedding).abs().max()) < 0.01 * float(embedding.abs().max())


def test_rounding_leaves_embedding_and_head(tmp_path):
    model, found = load(tmp_path, torch.float32, tie=False)
    found.round_linears(model, Scheme(4, 16, lowest_zero=1))
    assert len(found.quantized) == 7 and not {"lm_head", "model.embed_tokens"} & set(found.quantized)
