"""The walk runs blocks as transformers does, one stage after another, and sees each linear's true input."""

import copy
from functools import partial

import pytest
import torch

import families
from quantcli.models.block import BlockCall, block_stages, forward
from quantcli.models.checkpoint import Checkpoint
from quantcli.models.conversion import as_in_model
from quantcli.models.layout import find_layout
from quantcli.models.paused import BLOCK_INPUT, Shelf, study_pauses
from quantcli.models.skeleton import build_skeleton, disk_name, materialize
from quantcli.models.walk import embed_tokens, run_block


@pytest.fixture(autouse=True)
def _inference():
    with torch.inference_mode():
        yield


class Opened:
    """A model on disk with its skeleton, outside tensors in place."""

    def __init__(self, family, folder):
        self.model = families.build(family)
        families.save(self.model, folder)
        self.skeleton = build_skeleton(folder)
        self.checkpoint = as_in_model(Checkpoint.open(folder), self.skeleton)
        self.layout = find_layout(self.skeleton)
        inside = tuple(b + "." for b in self.layout.blocks)
        outside = [n for n in self.skeleton.state_dict() if not n.startswith(inside)]
        tensors = {n: self.read(n) for n in outside if self.disk(n)}
        materialize(self.skeleton, tensors)

    def disk(self, name):
        return disk_name(name, self.skeleton, self.checkpoint.entries)

    def read(self, name):
        return self.checkpoint.read(self.disk(name))

    def block(self, number):
        path = self.layout.blocks[number]
        block = copy.deepcopy(self.skeleton.get_submodule(path))
        materialize(block, {n: self.read(f"{path}.{n}") for n in block.state_dict()})
        linears = [n.removeprefix(path + ".") for n in self.layout.linears if n.startswith(path + ".")]
        return block, linears


@pytest.fixture
def opened(request, tmp_path):
    return Opened(request.param, tmp_path)


@pytest.mark.parametrize("opened", families.FAMILIES, indirect=True)
def test_blocks_in_a_row_give_what_the_model_gives(opened):
    tokens = torch.randint(3, 200, (5, 96), generator=torch.Generator().manual_seed(0))
    shelf = Shelf(3)
    expected = opened.model(tokens, output_hidden_states=True).hidden_states
    hidden, calls = embed_tokens(opened.skeleton, opened.layout, tokens, 2)
    assert [len(h) for h in hidden] == [2, 2, 1]
    assert torch.equal(torch.cat(hidden), expected[0])
    for number in range(len(opened.layout.blocks)):
        block, linears = opened.block(number)
        call = [c[number] for c in calls]
        stages = block_stages(block, linears, hidden[0], call[0])
        assert sorted(n for names in stages for n in names) == sorted(linears)
        solved, reference = [], [h.clone() for h in hidden]
        run_block(
            block,
            hidden,
            call,
            stages,
            lambda names, _, solved=solved: solved.append(names),
            held_out={1},
            keep=number == 0,
            pauses=study_pauses(block, stages, hidden[0], call[0]),
            shelf=shelf,
            reference=copy.deepcopy(block),
            reference_inputs=reference,
        )
        assert sorted(map(tuple, solved)) == sorted(map(tuple, stages))
        assert torch.allclose(torch.cat(reference), torch.cat(hidden), atol=1e-6)
        if number + 1 < len(opened.layout.blocks):  # the last hidden state of transformers is behind the final norm
            assert torch.allclose(torch.cat(hidden), expected[number + 1], atol=1e-5)


@pytest.mark.parametrize("family", families.KNOWN)
def test_known_families_are_in_the_table(family, tmp_path):
    opened = Opened(family, tmp_path)
    assert opened.layout.known
    assert opened.layout.final_norm is not None
    assert opened.skeleton.get_submodule(opened.layout.final_norm) is not None
    assert not any(name.endswith(("gate", "router")) for name in opened.layout.linears)


@pytest.mark.parametrize("family", families.FOUND)
def test_other_families_are_found_by_looking(family, tmp_path):
    opened = Opened(family, tmp_path)
    assert not opened.layout.known
    assert opened.layout.blocks == ("model.layers.0", "model.layers.1")


@pytest.mark.parametrize("opened", ["llama"], indirect=True)
@pytest.mark.parametrize("keep", [True, False])
def test_each_stage_sees_the_quantized_weights_of_those_before(opened, keep):
    """True sequential order: the Hessian of a stage is that of a model whose earlier linears are already changed."""
    tokens = torch.randint(3, 200, (6, 24), generator=torch.Generator().manual_seed(1))
    hidden, calls = embed_tokens(opened.skeleton, opened.layout, tokens, 4)
    block, linears = opened.block(0)
    call = [c[0] for c in calls]
    expected_block = copy.deepcopy(block)
    stages = block_stages(block, linears, hidden[0], call[0])
    assert stages == [
        ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"],
        ["self_attn.o_proj"],
        ["mlp.gate_proj", "mlp.up_proj"],
        ["mlp.down_proj"],
    ]
    before = [h.clone() for h in hidden]
    seen = {}

    def solve(names, moments):
        seen[names[0]] = moments.train.matrix(), moments.train.tokens
        for name in names:
            block.get_submodule(name).weight.data.mul_(0.5)

    run_block(block, hidden, call, stages, solve, keep=keep)

    changed = set()
    for names in stages:
        inputs = []
        hook = expected_block.get_submodule(names[0]).register_forward_pre_hook(
            lambda _m, args, inputs=inputs: inputs.append(args[0].reshape(-1, args[0].shape[-1]))
        )
        for h in before:
            expected_block(h, *call[0].args, **call[0].kwargs)
        hook.remove()
        x = torch.cat(inputs)
        matrix, count = seen[names[0]]
        assert count == len(x) == 6 * 24
        assert torch.allclose(matrix, x.T @ x / len(x), rtol=1e-4, atol=1e-6)
        for name in names:
            expected_block.get_submodule(name).weight.data.mul_(0.5)
            changed.add(name)
    out = [expected_block(h, *call[0].args, **call[0].kwargs) for h in before]
    out = [o[0] if isinstance(o, tuple) else o for o in out]
    assert torch.allclose(torch.cat(hidden), torch.cat(out), atol=1e-5)


@pytest.mark.parametrize("opened", ["llama"], indirect=True)
def test_held_out_batches_stay_out_of_training(opened):
    tokens = torch.randint(3, 200, (6, 24), generator=torch.Generator().manual_seed(2))
    hidden, calls = embed_tokens(opened.skeleton, opened.layout, tokens, 2)
    block, linears = opened.block(0)
    call = [c[0] for c in calls]
    first = torch.cat([hidden[0], hidden[2]])
    normed = block.input_layernorm(first).reshape(-1, 64)
    held = block.input_layernorm(hidden[1]).reshape(-1, 64)
    seen = {}
    stages = block_stages(block, linears, hidden[0], call[0])
    run_block(block, hidden, call, stages, lambda n, m: seen.setdefault(n[0], m), held_out={1})
    moments = seen["self_attn.q_proj"]
    assert torch.allclose(moments.train.matrix(), normed.T @ normed / len(normed), rtol=1e-4, atol=1e-6)
    assert torch.allclose(moments.held_out.matrix(), held.T @ held / len(held), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("opened", ["llama"], indirect=True)
def test_cross_moments_pair_the_two_streams(opened):
    tokens = torch.randint(3, 200, (4, 24), generator=torch.Generator().manual_seed(3))
    hidden, calls = embed_tokens(opened.skeleton, opened.layout, tokens, 2)
    block, linears = opened.block(0)
    reference = [h.clone() for h in hidden]
    noisy = [h + 0.1 * torch.randn(h.shape, generator=torch.Generator().manual_seed(4)) for h in hidden]
    x, f = (block.input_layernorm(torch.cat(s)).reshape(-1, 64) for s in (noisy, reference))
    call = [c[0] for c in calls]
    seen = {}
    run_block(
        block, noisy, call, block_stages(block, linears, hidden[0], call[0]),
        lambda n, m: seen.setdefault(n[0], m), reference=copy.deepcopy(block), reference_inputs=reference,
    )  # fmt: skip
    cross = seen["self_attn.q_proj"].train.cross()
    assert torch.allclose(cross, f.T @ x / len(x), rtol=1e-4, atol=1e-6)
    assert set(seen) == {"self_attn.q_proj", "self_attn.o_proj", "mlp.gate_proj", "mlp.down_proj"}


@pytest.mark.parametrize("opened", ["llama"], indirect=True)
def test_what_a_paused_forward_no_longer_reads_is_emptied(opened):
    tokens = torch.randint(3, 200, (4, 96), generator=torch.Generator().manual_seed(0))
    hidden, calls = embed_tokens(opened.skeleton, opened.layout, tokens, 1)
    block, linears = opened.block(0)
    call = [c[0] for c in calls]
    shared = {id(t): t.clone() for t in call[0].kwargs["position_embeddings"]}
    stages = block_stages(block, linears, hidden[0], call[0])
    pauses = study_pauses(block, stages, hidden[0], call[0])
    # q, k, v; o; gate, up; down: the residual needs the block's input until attention is added to it
    assert {0, ("LlamaAttention.forward", "query_states")} <= set(pauses[1].idle)
    assert {BLOCK_INPUT, 1} <= set(pauses[2].idle)
    assert 2 in pauses[3].idle
    assert ("LlamaDecoderLayer.forward", "residual") in pauses[3].kept
    assert not any(name in ("cos", "sin") for pause in pauses.values() for _, name in map(tuple_of, pause.idle))
    plain = [h.clone() for h in hidden]
    run_block(block, plain, call, stages, lambda *_: None)
    sizes = []
    mine = list(hidden)
    run_block(block, mine, call, stages, lambda *_: sizes.append(sum(h.numel() for h in hidden)), pauses=pauses)
    full = sum(h.numel() for h in plain)
    assert sizes == [full, full, 0, 0]
    assert all(torch.equal(a, b) for a, b in zip(plain, mine, strict=True))
    assert all(torch.equal(t, shared[id(t)]) for t in call[0].kwargs["position_embeddings"])


def tuple_of(held):
    return held if isinstance(held, tuple) else ("", str(held))


class Views(torch.nn.Module):
    """Reads, late, a view of what looks done with, and writes in place."""

    def __init__(self):
        super().__init__()
        self.first, self.second, self.third = (torch.nn.Linear(64, 64) for _ in range(3))

    def forward(self, hidden):
        a = self.first(hidden)
        flat = a.view(-1, 64)
        b = self.second(a.relu())
        total = torch.zeros_like(b)
        part = total[:, 48:]
        total += b
        part *= 2
        c = self.third(b)
        total.add_(c)
        return hidden + total + flat.view_as(total) + part.mean()


def test_views_and_writing_in_place_keep_their_meaning():
    torch.manual_seed(0)
    block, call, shelf = Views(), [BlockCall((), {})] * 5, Shelf(5)
    hidden = [torch.randn(1, 96, 64) for _ in range(5)]
    expected = [block(block(h)) for h in hidden]
    stages = block_stages(block, ["first", "second", "third"], hidden[0], call[0])
    pauses = study_pauses(block, stages, hidden[0], call[0])
    assert any(pause.idle for pause in pauses.values())
    for _ in range(2):
        run_block(block, hidden, call, stages, lambda *_: None, pauses=pauses, shelf=shelf)
    assert all(torch.equal(a, b) for a, b in zip(hidden, expected, strict=True))


def test_a_shelf_uses_its_places_again():
    shelf = Shelf(2)
    tensors = [torch.randn(3, 2000) for _ in range(3)]
    copies = [t.clone() for t in tensors]
    for tensor in tensors:
        shelf.move(tensor)
        shelf.move(tensor)  # nothing to do
    assert all(torch.equal(t, c) for t, c in zip(tensors, copies, strict=True))
    place = tensors[1].data_ptr()
    shelf.clear(tensors[1].view(-1))  # another tensor's wish is not the owner's
    other, later = torch.randn(3, 2000), torch.randn(3, 2000)
    shelf.move(other)
    assert other.data_ptr() != place
    shelf.clear(tensors[1])
    shelf.move(later)
    assert later.data_ptr() == place
    wide, narrow, expert = torch.randn(8000), torch.randn(2000), torch.randn(900)
    for tensor in (wide, narrow, expert):
        shelf.move(tensor, wide=True)
    places = [t.untyped_storage().data_ptr() for t in (wide, narrow, expert)]
    assert places[0] == places[1] != places[2]


def count_tokens(counts, name, _module, args):
    counts[name] += args[0][..., 0].numel()


@pytest.mark.parametrize("keep", [True, False])
@pytest.mark.parametrize("opened", ["mixtral", "qwen2_moe", "qwen3_moe"], indirect=True)
def test_every_expert_sees_all_of_its_tokens(opened, keep):
    """Although the row that the stages are found with is too short to reach every expert."""
    rows = torch.randint(3, 200, (6, 40), generator=torch.Generator().manual_seed(1))
    for seed in range(4):
        first = torch.full((1, 40), 3 + seed)  # one token over and over reaches two experts of four
        hidden, calls = embed_tokens(opened.skeleton, opened.layout, torch.cat([first, rows]), 1)
        block, linears = opened.block(0)
        call = [c[0] for c in calls]
        stages = block_stages(block, linears, hidden[0], call[0])
        assert sorted(n for names in stages for n in names) == sorted(linears)
        pairs = {frozenset(n.rpartition(".")[2] for n in names) for names in stages if "experts" in names[0]}
        assert len(pairs) == 2  # gate and up share a stage in experts that were not reached, too
        wanted = dict.fromkeys(linears, 0)
        hooks = [
            block.get_submodule(name).register_forward_pre_hook(partial(count_tokens, wanted, name)) for name in linears
        ]
        for h in hidden:
            forward(block, h, call[0])
        for hook in hooks:
            hook.remove()
        seen = {}
        run_block(
            block,
            hidden,
            call,
            stages,
            lambda names, moments, seen=seen: seen.update(dict.fromkeys(names, moments.train.tokens if moments else 0)),
            keep=keep,
            pauses=study_pauses(block, stages, hidden[0], call[0]),
        )
        assert seen == wanted


def test_arguments_that_depend_on_the_text_go_along_with_it(tmp_path):
    opened = Opened("llama", tmp_path)
    tokens = torch.randint(3, 200, (3, 24), generator=torch.Generator().manual_seed(0))
    for holder in (opened.model.model, opened.skeleton.model):
        original = holder.rotary_emb.forward

        def moved(x, position_ids, original=original):
            cos, sin = original(x, position_ids)
            return cos + x.mean(), sin

        holder.rotary_emb.forward = moved
    expected = torch.cat([opened.model(row[None], output_hidden_states=True).hidden_states[1] for row in tokens])
    hidden, calls = embed_tokens(opened.skeleton, opened.layout, tokens, 1)
    (cos, sin), (other, same) = (calls[i][0].kwargs["position_embeddings"] for i in (0, 1))
    assert not torch.equal(cos, other) and sin is same
    block, linears = opened.block(0)
    call = [c[0] for c in calls]
    run_block(block, hidden, call, block_stages(block, linears, hidden[0], call[0]), lambda *_: None)
    assert torch.equal(torch.cat(hidden), expected)
