"""The end of a model, run on its own: its logits are those of the whole model."""

import pytest
import torch

import families
from quantcli.models.layout import find_layout
from quantcli.models.tail import tail_logits


@pytest.mark.parametrize("family", families.FAMILIES)
def test_every_family(family):
    model = families.build(family)
    layout = find_layout(model)
    seen = []
    hook = model.get_submodule(layout.blocks[-1]).register_forward_hook(lambda _module, _args, out: seen.append(out))
    tokens = torch.randint(3, families.VOCABULARY, (2, 24), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected = model(tokens, use_cache=False).logits
        hook.remove()
        tuples = isinstance(seen[0], tuple)
        hidden = seen[0][0] if tuples else seen[0]
        blocks = list(model.get_submodule(layout.blocks[0].rpartition(".")[0]))
        found = tail_logits(model, layout, tokens, hidden, tuples=tuples)
        assert torch.allclose(found, expected, atol=1e-5)
        assert not torch.allclose(tail_logits(model, layout, tokens, hidden * 1.3 + 1, tuples=tuples), expected)
    assert list(model.get_submodule(layout.blocks[0].rpartition(".")[0])) == blocks
