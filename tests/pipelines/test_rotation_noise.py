"""The expected cost of rounding: its parts as they are defined, and what it says about a real divergence."""

from functools import partial

import pytest
import torch

import families
from quantcli.algorithms.transforms.spinquant import fake_quantize
from quantcli.models.checkpoint import Checkpoint
from quantcli.models.conversion import as_in_model
from quantcli.models.layout import find_layout
from quantcli.models.rotate import rotate
from quantcli.models.rotated_forward import RotatedForward
from quantcli.models.skeleton import build_skeleton, disk_name, load_config, materialize
from quantcli.pipelines.rotation.noise import RoundingNoise
from quantcli.tensors.activations import quantize_per_token
from quantcli.tensors.hadamard import Rotation, make_rotation

TOKENS = torch.randint(3, 250, (4, 24), generator=torch.Generator().manual_seed(0))


class Scene:
    def __init__(self, family, folder):
        families.save(families.build(family), folder)
        config = load_config(folder)
        config.tie_word_embeddings = False
        model = build_skeleton(folder, config)
        layout = find_layout(model)
        sizes = map(Rotation.identity, (64, 16))
        stream, head = sizes
        checkpoint = rotate(as_in_model(Checkpoint.open(folder), model), model, layout, stream, [head] * 2)
        names = {name: disk_name(name, model, checkpoint.entries) for name in model.state_dict()}
        materialize(model, {name: checkpoint.read(disk) for name, disk in names.items()})
        self.quantize = partial(fake_quantize, bits=4, symmetric=False)
        self.forward = RotatedForward(model, layout, checkpoint, self.quantize)
        self.model = model
        self.start = [make_rotation(n, "random", i).matrix() for i, n in enumerate((64, 16, 16))]

    def logs(self, tokens):
        return self.model(tokens, use_cache=False).logits.log_softmax(-1)

    def noise(self, draws=512):
        torch.manual_seed(0)
        return RoundingNoise(self.forward, self.logs, self.quantize, TOKENS, self.start, draws)


@pytest.fixture(scope="module", params=["llama", "phi3", "mixtral"])
def scene(request, tmp_path_factory):
    return Scene(request.param, tmp_path_factory.mktemp("scene") / "model")


def test_the_start_costs_one_per_matrix(scene):
    assert abs(float(scene.noise()(scene.start, 0)) - 3) < 1e-4


def test_it_is_the_weighted_error_in_expectation(scene):
    noise = scene.noise(draws=60_000)
    other = [make_rotation(len(m), "random", 9).matrix() for m in scene.start]
    wanted = 0.0
    for number, pool in noise._pools.items():
        costs = []
        for matrix in (scene.start[number], other[number]):
            turned = (pool.x.unflatten(-1, (-1, len(matrix))) @ matrix.float()).flatten(-2)
            error = (quantize_per_token(turned, 4, symmetric=False) - turned).square().sum(-1)
            costs.append(float((error * pool.cost / pool.error).sum()))
        wanted += costs[1] / costs[0]
    assert abs(float(noise(other, 0)) - wanted) < 0.02 * wanted


def test_gradients_shrink_it(scene):
    noise = scene.noise()
    leaves = [m.clone().requires_grad_() for m in scene.start]
    gradients = torch.autograd.grad(noise(leaves, 0), leaves)
    assert all(float(g.norm()) > 0 for g in gradients)


def test_it_foretells_the_divergence_of_small_noise(tmp_path):
    """Independent noise of one size at every input: the mean divergence is half the sum of |noise|^2 |g|^2 / K."""
    scene = Scene("llama", tmp_path / "model")
    weights = []
    rows = TOKENS.repeat(8, 1)
    torch.manual_seed(1)
    for row in torch.split(rows, 1):
        with scene.forward.probed() as readings:
            logs = scene.logs(row)[0]
            drawn = torch.multinomial(logs.detach().exp(), 1)
            gradients = torch.autograd.grad(logs.gather(-1, drawn).sum(), [r.probe for r in readings])
        weights.append(sum(float(g.square().sum()) for g in gradients))
    size = 1e-2
    foretold = 0.5 * size**2 * sum(weights) / rows.numel()
    found = []
    with torch.no_grad():
        for row in torch.split(rows, 1):
            wanted = scene.logs(row)
            with scene.forward.rotated(torch.eye(64), [torch.eye(16)] * 2):
                scene.forward._inputs = lambda x: x + size * torch.randn_like(x) * (x.shape[-1] == 64)
                logs = scene.logs(row)
            found.append(float((wanted.exp() * (wanted - logs)).sum()) / row.numel())
    assert abs(sum(found) / len(found) - foretold) < 0.1 * foretold
