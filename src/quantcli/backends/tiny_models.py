"""Models of a second's work, with weights drawn at random, to try a backend on."""

from pathlib import Path

__all__ = ["write_tiny_checkpoint", "write_tiny_graph"]

_COLUMNS, _INNER, _ROWS, _LENGTH = 256, 384, 10, 32


def write_tiny_checkpoint(folder: Path) -> None:
    """A Llama of two blocks, whose tokenizer takes each byte for a word."""
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {"<s>": 0, "</s>": 1} | {letter: number + 2 for number, letter in enumerate(alphabet)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    random = torch.random.get_rng_state()
    torch.manual_seed(0)
    try:
        model = LlamaForCausalLM(
            LlamaConfig(
                vocab_size=len(vocabulary) + 30,  # never the size of another layer
                hidden_size=256,
                intermediate_size=512,
                num_hidden_layers=2,
                num_attention_heads=4,
                num_key_value_heads=2,
                max_position_embeddings=256,
                bos_token_id=0,
                eos_token_id=1,
            )
        )
    finally:
        torch.random.set_rng_state(random)
    model.save_pretrained(folder)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>").save_pretrained(folder)


def write_tiny_graph(folder: Path) -> tuple[Path, Path]:
    """A graph of three products, and samples for it; the two files."""
    import numpy as np
    import onnx_ir as ir

    from quantcli.graphs.model.files import save_graph

    random = np.random.default_rng(0)

    def weight(name: str, rows: int, columns: int) -> ir.Value:
        array = (random.normal(size=(rows, columns)) / rows**0.5).astype(np.float32)
        value = ir.Value(name=name, const_value=ir.Tensor(array, name=name))
        value.dtype, value.shape = ir.DataType.FLOAT, ir.Shape(array.shape)
        return value

    x = ir.Value(name="x", type=ir.TensorType(ir.DataType.FLOAT), shape=ir.Shape(["n", _LENGTH, _COLUMNS]))
    weights = [weight("w0", _COLUMNS, _INNER), weight("w1", _INNER, _COLUMNS), weight("w2", _COLUMNS, _ROWS)]
    nodes, last = [], x
    for number, found in enumerate(weights):
        nodes.append(ir.node("MatMul", [last, found], name=f"product{number}"))
        last = nodes[-1].outputs[0]
        last.name = f"y{number}"
        if number < 2:
            nodes.append(ir.node("Relu", [last], name=f"relu{number}"))
            last = nodes[-1].outputs[0]
            last.name = f"z{number}"
    last.dtype, last.shape = ir.DataType.FLOAT, ir.Shape(["n", _LENGTH, _ROWS])
    graph = ir.Graph([x], [last], nodes=nodes, initializers=weights, opset_imports={"": 17}, name="tiny")
    save_graph(ir.Model(graph, ir_version=8), folder / "tiny.onnx")
    np.savez(folder / "samples.npz", x=random.normal(size=(16, _LENGTH, _COLUMNS)).astype(np.float32))
    return folder / "tiny.onnx", folder / "samples.npz"
