import numpy as np
import onnx_ir as ir
import pytest

from onnx_graphs import N, graph_model
from quantcli.errors import InputError
from quantcli.graphs.model.session import open_session, run_sample


def _graph(op_type="Relu", domain=""):
    nodes = [N(op_type, "x", "h", "first", domain=domain), N("Neg", "h", "y", "second")]
    return ir.to_proto(graph_model(nodes, {}, opset=17, ranks={"x": 1, "y": 1})).SerializeToString()


@pytest.mark.parametrize("settings", [{}, {"optimized": False}, {"prepacked": False, "threads": 1, "spinning": False}])
def test_files_and_bytes_give_the_same(tmp_path, settings):
    (tmp_path / "m.onnx").write_bytes(_graph())
    x = np.array([-1, 2], np.float32)
    for graph in (tmp_path / "m.onnx", _graph()):
        (y,) = run_sample(open_session(graph, **settings), {"x": x}, 0)
        assert (y == [0, -2]).all()


class _OwnError(InputError):
    pass


def test_what_cannot_be_opened_is_one_line_and_nothing_on_stderr(tmp_path, capfd):
    with pytest.raises(_OwnError, match=r"onnxruntime cannot open that one: .*Bent") as caught:
        open_session(_graph("Bent", "nowhere"), what="that one", error=_OwnError, hint="straighten it")
    assert "\n" not in caught.value.message
    assert caught.value.hint == "straighten it"
    with pytest.raises(InputError, match="cannot open the graph"):
        open_session(tmp_path / "none.onnx")
    with pytest.raises(InputError, match="sample 3 does not run"):
        run_sample(open_session(_graph()), {"x": np.zeros((2, 3), np.float32)}, 3)
    assert capfd.readouterr().err == ""
