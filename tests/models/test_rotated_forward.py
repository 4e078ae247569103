"""Seeing activations and weights in a rotated basis: the same as a model that is rotated for good."""

from copy import deepcopy
from types import MethodType

import pytest
import torch
from torch.nn.functional import linear

import families
from quantcli.models.checkpoint import Checkpoint
from quantcli.models.conversion import as_in_model
from quantcli.models.layout import find_layout
from quantcli.models.rotate import rotate
from quantcli.models.rotated_forward import RotatedForward
from quantcli.models.skeleton import build_skeleton, disk_name, load_config, materialize
from quantcli.tensors.hadamard import Rotation, make_rotation

FAMILIES = ["llama", "llama-tied", "qwen2", "qwen3", "phi3", "gemma", "mixtral", "qwen2_moe"]
TOKENS = torch.arange(3, 40)[None]


class Scene:
    """A checkpoint in float64, and models made of it under rotations."""

    def __init__(self, family, folder):
        model = families.build(family)
        torch.manual_seed(1)
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.data += 0.3 * torch.randn_like(parameter)
        families.save(model.double(), folder)
        config = load_config(folder)
        config.tie_word_embeddings = False
        self.skeleton = build_skeleton(folder, config).double()
        self.layout = find_layout(self.skeleton)
        self.blocks, checkpoint = len(self.layout.blocks), as_in_model(Checkpoint.open(folder), self.skeleton)
        config = self.skeleton.config
        self.sizes = config.hidden_size, getattr(config, "head_dim", None) or config.hidden_size // 4
        size, head = map(Rotation.identity, self.sizes)
        self.checkpoint = rotate(checkpoint, self.skeleton, self.layout, size, [head] * self.blocks)

    def model(self, checkpoint):
        names = {name: disk_name(name, self.skeleton, checkpoint.entries) for name in self.skeleton.state_dict()}
        model = deepcopy(self.skeleton)
        materialize(model, {name: checkpoint.read(disk) for name, disk in names.items()})
        families.norms_in_float64(model)
        return model

    def rotations(self):
        return [make_rotation(self.sizes[0], "random", 0), *(
            make_rotation(self.sizes[1], "random", 1 + i) for i in range(self.blocks)
        )]  # fmt: skip


@pytest.fixture(scope="module")
def scenes(tmp_path_factory):
    root, made = tmp_path_factory.mktemp("scenes"), {}

    def get(family):
        if family not in made:
            made[family] = Scene(family, root / family)
        return made[family]

    return get


def literally(model, layout, inputs, weights):
    """The model with every linear's input and weight rounded."""
    for name in layout.linears:
        module = model.get_submodule(name)
        module.forward = MethodType(lambda m, x: linear(inputs(x), weights(m.weight), m.bias), module)


@pytest.mark.parametrize("weights", [None, torch.sin], ids=["inputs", "weights"])
@pytest.mark.parametrize("family", FAMILIES)
def test_it_is_the_rotated_model(family, weights, scenes):
    """Each block has a rotation of value heads of its own; tanh and sine stand for rounding, and have no ties."""
    scene = scenes(family)
    stream, *heads = scene.rotations()
    rotated = scene.model(scene.checkpoint.turned(stream, heads))
    ours = scene.model(scene.checkpoint)
    with torch.no_grad():
        plain = ours(TOKENS).logits
        assert (rotated(TOKENS).logits - plain).abs().max() < 1e-10 * plain.abs().max()
        literally(rotated, scene.layout, torch.tanh, weights or (lambda w: w))
        wanted = rotated(TOKENS).logits
        forward = RotatedForward(ours, scene.layout, scene.checkpoint, torch.tanh, weights)
        assert torch.equal(ours(TOKENS).logits, plain)
        with forward.rotated(stream.matrix(), [head.matrix() for head in heads]):
            found = ours(TOKENS).logits
        assert torch.equal(ours(TOKENS).logits, plain)
    assert (wanted - plain).abs().max() > 0.01 * plain.abs().max()
    assert (found - wanted).abs().max() < 1e-10 * wanted.abs().max()


@pytest.mark.parametrize("weights", [None, torch.sin], ids=["inputs", "weights"])
def test_gradients_reach_every_rotation(weights, scenes):
    """The derivative along a turn is that of a small turn."""
    scene = scenes("llama")
    model = scene.model(scene.checkpoint)
    forward = RotatedForward(model, scene.layout, scene.checkpoint, torch.tanh, weights)
    matrices = [r.matrix() for r in scene.rotations()]

    def loss(values):
        with forward.rotated(values[0], values[1:]):
            return model(TOKENS).logits.square().mean()

    leaves = [m.clone().requires_grad_() for m in matrices]
    gradients = torch.autograd.grad(loss(leaves), leaves)
    for i, gradient in enumerate(gradients):
        turn = torch.randn(gradient.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(i))
        turn = matrices[i] @ (turn - turn.T)
        values = []
        for sign in (1, -1):
            moved = [m + sign * 1e-5 * turn if i == j else m for j, m in enumerate(matrices)]
            with torch.no_grad():
                values.append(float(loss(moved)))
        slope = (values[0] - values[1]) / 2e-5
        assert abs(slope) > 1e-8
        assert abs(float((gradient * turn).sum()) - slope) < 1e-4 * abs(slope)
