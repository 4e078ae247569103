import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers import DynamicCache

from quantcli.data import sampling
from quantcli.data.kvcache import preallocated_cache
from quantcli.errors import InputError
from quantcli.progress import Silent

VOCABULARY = 199
LENGTH = 24
SHAPE = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
}
OTHER_SHAPE = {"vocab_size": VOCABULARY, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
SLIDING = ["sliding_attention", "sliding_attention", "full_attention"]
MAMBA = {"mamba_n_heads": 8, "mamba_d_head": 8, "mamba_d_state": 16, "mamba_n_groups": 1, "mamba_expand": 2}
CONFIGS = {
    "llama": lambda: transformers.LlamaConfig(**SHAPE, num_key_value_heads=2),
    "gpt2": lambda: transformers.GPT2Config(vocab_size=VOCABULARY, n_embd=32, n_layer=2, n_head=4, n_positions=64),
    "gemma3": lambda: transformers.Gemma3TextConfig(
        **SHAPE, num_key_value_heads=1, head_dim=8, sliding_window=5, layer_types=SLIDING
    ),
    "mistral": lambda: transformers.MistralConfig(**SHAPE, num_key_value_heads=2, sliding_window=6),
    "gpt_neox": lambda: transformers.GPTNeoXConfig(**SHAPE),
    "opt": lambda: transformers.OPTConfig(
        **OTHER_SHAPE, ffn_dim=48, word_embed_proj_dim=32, max_position_embeddings=64
    ),
    "falcon": lambda: transformers.FalconConfig(**OTHER_SHAPE),
    # state space and attention layers mixed: those layers must keep the cache that transformers gives them
    "bamba": lambda: transformers.BambaConfig(**SHAPE, **MAMBA, num_key_value_heads=2, attn_layer_indices=[1]),
}


def tiny(kind, dtype=torch.float32):
    torch.manual_seed(0)
    config = CONFIGS[kind]()
    config.eos_token_id = config.bos_token_id = config.pad_token_id = None
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=dtype).eval()
    # initial weights are so small that every model would repeat one token
    for parameter in model.parameters():
        if parameter.dim() > 1:
            parameter.data.mul_(3 if kind == "bamba" else 6)  # its scan runs in float32 and amplifies rounding
    return model


def sampler(model, prefix=()):
    return sampling.Sampler(model, torch.arange(VOCABULARY), list(prefix))


@pytest.mark.parametrize("kind", sorted(CONFIGS))
def test_greedy_tokens_equal_generate(kind):
    # float64: random weights put tokens so close that another order of summation would swap them in float32
    model = tiny(kind, torch.float64)
    written = sampler(model).sample(3, LENGTH, 0, Silent(), choose=lambda logits: logits.argmax(-1))
    expected = model.generate(
        written[:, :1],
        attention_mask=torch.ones(3, 1, dtype=torch.int64),
        do_sample=False,
        min_new_tokens=LENGTH - 1,
        max_new_tokens=LENGTH - 1,
        pad_token_id=0,
    )
    assert torch.equal(written, expected)
    assert len(written[:, 1:].unique()) > 3


def test_buffer_is_never_reallocated():
    model = tiny("llama")
    cache = preallocated_cache(model.config, 8)
    model(input_ids=torch.zeros(2, 3, dtype=torch.int64), past_key_values=cache, use_cache=True)
    before = cache.layers[0].key_buffer.data_ptr()
    model(input_ids=torch.ones(2, 2, dtype=torch.int64), past_key_values=cache, use_cache=True)
    assert cache.layers[0].keys.shape[-2] == cache.get_seq_length() == 5
    assert cache.layers[0].keys.data_ptr() == before


@pytest.mark.parametrize("kind", ["llama", "gemma3", "mistral"])
def test_cache_gives_the_logits_of_the_growing_one(kind):
    model = tiny(kind)
    ids = torch.randint(VOCABULARY, (2, 14), generator=torch.Generator().manual_seed(1))
    ours, theirs = preallocated_cache(model.config, 14), DynamicCache(config=model.config)
    for part in ids.split([4, 1, 1, 3, 5], dim=1):  # several tokens at once past a sliding window too
        got = model(input_ids=part, past_key_values=ours, use_cache=True).logits
        assert torch.allclose(got, model(input_ids=part, past_key_values=theirs, use_cache=True).logits, atol=1e-5)


@pytest.mark.parametrize("size", [5, 128, 300, 1000])
def test_draw_follows_softmax(size):
    generator = torch.Generator().manual_seed(2)
    logits = torch.randn(1, size, generator=generator) * 2
    rows = 40_000
    found = sampling.draw(logits.expand(rows, -1), generator).bincount(minlength=size) / rows
    wanted = logits.softmax(-1)[0]
    assert (found - wanted).abs().max() < 4 * (wanted * (1 - wanted) / rows).sqrt().max()
    assert (found - wanted).abs().sum() < 0.02 + (2 * size / rows / torch.pi) ** 0.5


def test_draw_never_takes_an_impossible_token():
    generator = torch.Generator().manual_seed(3)
    logits = torch.full((500, 700), -torch.inf)
    logits[:, 130] = logits[:, 699] = 0.0
    assert sampling.draw(logits, generator).unique().tolist() == [130, 699]


def test_draw_refuses_nan():
    with pytest.raises(InputError, match="not finite"):
        sampling.draw(torch.full((2, 10), torch.nan), torch.Generator())


def test_same_seed_same_text_and_other_seed_other_text():
    writer = sampler(tiny("llama"))
    first = writer.sample(4, LENGTH, 5, Silent())
    assert torch.equal(first, writer.sample(4, LENGTH, 5, Silent()))
    assert not torch.equal(first, writer.sample(4, LENGTH, 6, Silent()))
    assert first.shape == (4, LENGTH) and first.dtype == torch.int64


def test_prefix_stands_first_and_a_new_document_begins_after_an_end():
    model = tiny("llama")
    model.generation_config.eos_token_id = list(range(100))  # ends come often
    writer = sampling.Sampler(model, torch.tensor([150, 151]), [7])
    tokens = writer.sample(8, LENGTH, 0, Silent())
    assert set(tokens[:, 0].tolist()) == {7}
    assert set(tokens[:, 1].tolist()) <= {150, 151}
    followers = tokens[:, 2:][tokens[:, 1:-1] < 100]
    assert followers.numel() > 10 and set(followers.tolist()) <= {150, 151}


def test_head_is_restored():
    model = tiny("llama")
    ids = torch.arange(6)[None]
    before = model(input_ids=ids).logits
    sampler(model).sample(1, 3, 0, Silent())
    assert "forward" not in vars(model.get_output_embeddings())
    assert torch.equal(model(input_ids=ids).logits, before)


class _Counted:
    """A sampler that says how often it was asked for."""

    def __init__(self):
        self.count = 0

    def __call__(self):
        self.count += 1
        return sampler(tiny("llama"))


class _Notes(Silent):
    def __init__(self):
        self.said = []

    def note(self, message):
        self.said.append(message)

    def warn(self, message):
        self.said.append(message)


@pytest.fixture
def key(tmp_path, monkeypatch):
    monkeypatch.setenv("QUANTCLI_CACHE", str(tmp_path / "cache"))
    return sampling.SamplingKey("digest", 2, 6, 0)


def test_text_is_written_once(key):
    opened = _Counted()
    first = sampling.cached_sample(key, opened, Silent())
    assert torch.equal(sampling.cached_sample(key, opened, Silent()), first)
    assert opened.count == 1
    sampling.cached_sample(sampling.SamplingKey("other model", 2, 6, 0), opened, Silent())
    assert opened.count == 2
    assert not [p for p in key.file.parent.iterdir() if p.suffix != ".safetensors"]


@pytest.mark.parametrize("damage", ["truncate", "garble", "swap", "shape"])
def test_damaged_cache_is_written_anew(key, damage):
    opened, notes = _Counted(), _Notes()
    first = sampling.cached_sample(key, opened, Silent())
    data = key.file.read_bytes()
    if damage == "truncate":
        key.file.write_bytes(data[:-3])
    elif damage == "garble":
        key.file.write_bytes(b"\xff" * len(data))
    elif damage == "swap":  # a valid file whose tokens are not those that were written
        key.file.write_bytes(data[:-4] + bytes([data[-4] ^ 1]) + data[-3:])
    else:
        save_file({"tokens": torch.zeros(1, 6, dtype=torch.int32)}, key.file)
    assert torch.equal(sampling.cached_sample(key, opened, notes), first)
    assert opened.count == 2 and "damaged" in notes.said[0]
    assert torch.equal(load_file(key.file)["tokens"].long(), first)


def test_unwritable_cache_is_only_a_warning(key, tmp_path):
    (tmp_path / "cache").write_text("a file where the folder should be")
    notes = _Notes()
    assert sampling.cached_sample(key, _Counted(), notes).shape == (2, 6)
    assert "could not be kept" in notes.said[0]


def test_estimate_grows_with_the_work():
    config = CONFIGS["llama"]()
    seconds, size_bytes = sampling.estimate_sampling(config, 10_000, 4, 16, 1e9, 1e9)
    # 3 layers x 2 key-value heads x 8 numbers x keys and values x 4 bytes for 64 tokens, weights, three logit buffers
    assert size_bytes == 4 * 10_000 + 64 * 3 * 2 * 8 * 2 * 4 + 3 * 4 * 4 * VOCABULARY
    assert sampling.estimate_sampling(config, 10_000, 8, 16, 1e9, 1e9)[0] > 1.4 * seconds
    assert sampling.estimate_sampling(config, 10_000, 4, 16, 1e8, 1e9)[0] > 2 * seconds


def test_first_tokens_leave_out_special_ones(tmp_path):
    from tokenizers import Tokenizer, models

    words = {w: i for i, w in enumerate(["<s>", "a", "b", "<end>", "c"])}
    plain = Tokenizer(models.WordLevel(words, unk_token="a"))
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=plain, bos_token="<s>", eos_token="<end>")
    assert sampling.first_tokens(tokenizer, 100).tolist() == [1, 2, 4]
    assert sampling.first_tokens(tokenizer, 3).tolist() == [1, 2]
    with pytest.raises(InputError, match="no ordinary tokens"):
        sampling.first_tokens(tokenizer, 1)
