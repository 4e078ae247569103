"""Simulated activations and caches: nothing changes where nothing is rounded, and what is rounded is as written out."""

import numpy as np
import pytest
import torch

import families
import literal
from quantcli.errors import InputError, UsageError
from quantcli.models.layout import find_layout
from quantcli.models.load import load
from quantcli.models.online import OnlineRotations, down_linears, rotate_inputs
from quantcli.models.simulate import rotate_and_round_cache, simulate
from quantcli.options import SimulationOptions

TOKENS = torch.arange(3, 40)[None]
OWN_ATTENTION = ["falcon", "falcon-alibi"]
INTERFACE = [f for f in families.FAMILIES if f not in OWN_ATTENTION]
EIGHT = SimulationOptions(a_bits=8, k_bits=8, v_bits=8)
FOUR = SimulationOptions(a_bits=4, k_bits=4, v_bits=4)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("models")

    def get(family):
        folder = root / family
        return folder if folder.exists() else families.save(families.build(family), folder)

    return get


def logits(model):
    with torch.no_grad():
        return model(TOKENS).logits


def distance(found, wanted):
    return float((found - wanted).square().mean() / wanted.square().mean())


@pytest.mark.parametrize("family", INTERFACE)
def test_attention_through_our_function_is_the_models_own(family):
    model = families.build(family)
    wanted, blocks = logits(model), len(find_layout(model).blocks)
    rotate_and_round_cache(model, blocks, SimulationOptions(), None)
    assert torch.equal(logits(model), wanted)
    padded = torch.ones_like(TOKENS)
    padded[:, :5] = 0
    with torch.no_grad():
        found = model(TOKENS, attention_mask=padded).logits
        wanted = families.build(family)(TOKENS, attention_mask=padded).logits
    assert torch.equal(found, wanted)


@pytest.mark.parametrize("family", INTERFACE)
def test_r3_leaves_scores_as_they_are(family):
    for dtype in (torch.float32, torch.float64):
        model = families.build(family).to(dtype)
        # written out in Python, attention takes its softmax in float32, whatever it is given
        exact = dtype == torch.float64 and model.config._attn_implementation == "sdpa"
        if exact:
            families.exact(model)
        wanted = logits(model)
        rotate_and_round_cache(model, 2, SimulationOptions(), OnlineRotations("random", 1))
        change = (logits(model) - wanted).abs().max() / wanted.abs().max()
        assert change < (1e-10 if exact else 1e-5)
        assert change > 0 or dtype == torch.float64  # it was there


@pytest.mark.parametrize("family", families.FAMILIES)
def test_eight_bits_are_close_and_four_are_worse(family, folders):
    eight, four = EIGHT, FOUR
    if family in OWN_ATTENTION:
        eight, four = (SimulationOptions(a_bits=bits) for bits in (8, 4))
    wanted = logits(load(folders(family)))
    near, far = (distance(logits(load(folders(family), simulation=o)), wanted) for o in (eight, four))
    assert 0 < near < 5e-3
    assert 5 * near < far


def test_sixteen_bits_are_none(folders):
    assert torch.equal(logits(load(folders("llama"), simulation=SimulationOptions())), logits(load(folders("llama"))))


@pytest.mark.parametrize("part", ["a_bits", "k_bits", "v_bits"])
def test_each_part_rounds_what_it_names(part, folders):
    model = load(folders("llama"), simulation=SimulationOptions(**{part: 3}))
    seen = {}
    for name in ("q_proj", "down_proj"):
        linear = model.get_submodule(f"model.layers.1.{'mlp' if name == 'down_proj' else 'self_attn'}.{name}")
        linear.register_forward_hook(lambda _module, args, _out, name=name: seen.update({name: args[0]}))
    model.lm_head.register_forward_hook(lambda _module, args, _out: seen.update(head=args[0]))
    logits(model)
    levels = {name: max(len(row.unique()) for row in x[0]) for name, x in seen.items()}
    few = part == "a_bits"
    assert (levels["q_proj"] <= 8) == (levels["down_proj"] <= 8) == few
    assert levels["head"] > 8


def test_a_cache_that_grows_gives_what_the_whole_text_gives(folders):
    online = OnlineRotations("hadamard", 0)
    model = families.build("llama")
    rotate_and_round_cache(model, 2, FOUR, online)
    with torch.no_grad():
        whole, past, steps = model(TOKENS).logits, None, []
        for token in TOKENS[0]:
            out = model(token.view(1, 1), past_key_values=past, use_cache=True)
            past = out.past_key_values
            steps.append(out.logits)
    assert torch.allclose(torch.cat(steps, 1), whole, atol=1e-4)


def test_two_models_with_other_settings_stay_apart(folders):
    four = load(folders("llama"), simulation=FOUR)
    before = logits(four)
    eight = logits(load(folders("llama"), simulation=EIGHT))
    again = logits(load(folders("llama"), simulation=FOUR))
    assert torch.equal(logits(four), before) and torch.equal(again, before) and not torch.equal(eight, before)


# -- the whole forward, written out -----------------------------------------------------------------------------------


def rounded(x, bits, symmetric, group, clip):
    return literal.per_token(x, bits, symmetric, group, clip).astype(np.float64)


def written_out(model, options, online):
    """Llama in float64 numpy, token by token where that is clearer; R4 is taken as still missing from the weights."""
    w = {name: p.detach().double().numpy() for name, p in model.state_dict().items()}
    c = model.config
    heads, shared, size = c.num_attention_heads, c.num_key_value_heads, c.hidden_size // c.num_attention_heads
    r3, r4 = online.keys(size).matrix().numpy(), online.down(c.intermediate_size).matrix().numpy()

    clip, cache_clip = 0.9, {3: 0.95, 4: 0.95, 8: 1.0}

    def norm(x, name):
        return w[name] * x / np.sqrt((x * x).mean(-1, keepdims=True) + c.rms_norm_eps)

    def linear(x, name):
        return rounded(x, options.a_bits, options.a_symmetric, -1, clip) @ w[name].T

    def turned(x, position):  # rotary positions: pairs of entries half a head apart
        out = np.empty_like(x)
        for i in range(size // 2):
            # transformers keeps sines and cosines in float32
            angle = np.float32(position) * np.float32(1 / 10000 ** np.float32(2 * i / size))
            cos, sin = float(np.cos(angle)), float(np.sin(angle))
            a, b = x[i], x[i + size // 2]
            out[i], out[i + size // 2] = a * cos - b * sin, b * cos + a * sin
        return out

    def cached(x, bits):
        return rounded(x, bits, options.kv_symmetric, options.kv_group_size, cache_clip[bits])

    h = w["model.embed_tokens.weight"][TOKENS[0].numpy()]
    for layer in range(c.num_hidden_layers):
        at = f"model.layers.{layer}."
        x = norm(h, at + "input_layernorm.weight")
        q, k, v = (linear(x, f"{at}self_attn.{n}_proj.weight").reshape(len(x), -1, size) for n in "qkv")
        mixed = np.zeros((len(x), heads, size))
        for head in range(heads):
            own = head // (heads // shared)
            keys = [cached(turned(k[t, own], t) @ r3, options.k_bits) for t in range(len(x))]
            values = [cached(v[t, own], options.v_bits) for t in range(len(x))]
            for t in range(len(x)):
                query = turned(q[t, head], t) @ r3
                scores = np.array([query @ keys[s] / np.sqrt(size) for s in range(t + 1)])
                weights = np.exp(scores - scores.max())
                mixed[t, head] = (weights / weights.sum()) @ np.stack(values[: t + 1])
        h = h + linear(mixed.reshape(len(x), -1), at + "self_attn.o_proj.weight")
        x = norm(h, at + "post_attention_layernorm.weight")
        gate, up = (linear(x, f"{at}mlp.{n}_proj.weight") for n in ("gate", "up"))
        inner = gate / (1 + np.exp(-gate)) * up @ r4
        inner = rounded(inner, options.a_bits, options.a_symmetric, -1, clip)
        h = h + inner @ (w[at + "mlp.down_proj.weight"] @ r4).T
    return norm(h, "model.norm.weight") @ w["lm_head.weight"].T


@pytest.mark.parametrize(
    "options",
    [
        SimulationOptions(a_bits=4, k_bits=4, v_bits=4),
        SimulationOptions(a_bits=6, k_bits=3, v_bits=8, a_symmetric=False, kv_symmetric=True, kv_group_size=8),
    ],
)
def test_equals_llama_written_out(options):
    online, model = OnlineRotations("hadamard", 0), families.build("llama")
    torch.manual_seed(1)
    for parameter in model.parameters():
        if parameter.ndim == 1:
            parameter.data += 0.3 * torch.randn_like(parameter)
    wanted = written_out(model, options, online)
    families.exact(model.double())
    layout = find_layout(model)
    for name in down_linears(layout.linears):
        weight = model.get_submodule(name).weight
        weight.data = online.down(weight.shape[1]).rows(weight.data)
    rotate_inputs(model, layout.linears, online)
    simulate(model, layout, options, online)
    found = logits(model)[0].numpy()
    # a value on the edge between two codes may fall to either side
    assert np.abs(found - wanted).max() < 1e-4 * np.abs(wanted).max()


# -- refusals ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", OWN_ATTENTION)
def test_models_with_attention_of_their_own(family, folders):
    with pytest.raises(InputError, match="computes attention in a way of its own") as caught:
        load(folders(family), simulation=SimulationOptions(v_bits=4))
    assert "--a-bits works" in caught.value.hint


def test_groups_wider_than_a_head(folders):
    with pytest.raises(UsageError, match="more than the 16 entries of a head"):
        load(folders("llama"), simulation=SimulationOptions(k_bits=4, kv_group_size=32))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"a_bits": 1}, "--a-bits must be 2 to 8, or 16 for none, got 1"),
        ({"k_bits": 12}, "--k-bits must be"),
        ({"a_bits": 4, "a_clip_ratio": 0.0}, "--a-clip-ratio must be above 0"),
        ({"v_bits": 4, "kv_clip_ratio": 1.1}, "--kv-clip-ratio"),
        ({"v_bits": 4, "kv_group_size": 0}, "--kv-group-size must be"),
        ({"a_symmetric": False}, "--a-asym would have no effect without --a-bits"),
        ({"a_clip_ratio": 1.0, "k_bits": 4}, "--a-clip-ratio would have no effect"),
        ({"kv_symmetric": True, "a_bits": 4}, "--kv-sym would have no effect without --k-bits or --v-bits"),
        ({"kv_group_size": 8}, "--kv-group-size would have no effect"),
    ],
)
def test_options_that_cannot_be(values, message):
    with pytest.raises(UsageError, match=message):
        SimulationOptions(**values)
