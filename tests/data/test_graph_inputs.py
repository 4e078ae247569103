import numpy as np
import pytest

from quantcli.data.graph_inputs import npz_samples, script_samples
from quantcli.data.images import ImageSpec, image_samples, parse_image_spec
from quantcli.errors import InputError, UsageError
from quantcli.graphs.model.inputs import InputSpec, input_specs
from small_graphs import Builder, cnn

F, I = np.dtype(np.float32), np.dtype(np.int64)  # noqa: E741
PAIR = (InputSpec("a", ("n", 3), F), InputSpec("b", ("n", "t"), I))


def arrays(rows):
    return {"a": np.arange(rows * 3, dtype=np.float32).reshape(rows, 3), "b": np.arange(rows)[:, None]}


def test_specs_say_what_the_graph_takes(tmp_path):
    assert input_specs(cnn(tmp_path / "m.onnx")) == (InputSpec("x", ("n", 3, 12, 12), F),)


def test_axes_of_any_length_in_the_words_of_older_exporters(tmp_path):
    b = Builder(-1, 3, "?", "?")
    path = b.save(tmp_path / "m.onnx", b.node("Relu", [b.x], "y"))
    specs = input_specs(path)
    assert specs == (InputSpec("x", ("x.0", 3, "x.2", "x.3"), F),)
    np.savez(tmp_path / "1.npz", x=np.zeros((4, 3, 5, 7), np.float32))
    assert [s["x"].shape for s in npz_samples(tmp_path / "1.npz", specs, batch_size=2)] == [(2, 3, 5, 7)] * 2


def test_rows_of_npz_files_come_in_batches_and_again(tmp_path):
    np.savez(tmp_path / "1.npz", **arrays(5))
    np.savez(tmp_path / "2.npz", a=np.ones(3, np.float64), b=np.array([7], np.int32))
    samples = npz_samples(tmp_path, PAIR, batch_size=2)
    assert [s["b"].ravel().tolist() for s in samples] == [[0, 1], [2, 3], [4], [7]]
    assert all(s["a"].dtype == F and s["b"].dtype == I for s in samples)
    assert samples.get_next() is None
    samples.rewind()
    assert samples.get_next()["a"].shape == (2, 3)
    assert len(list(npz_samples(tmp_path, PAIR, batch_size=2, limit=3))) == 3


def test_a_fixed_batch_is_kept(tmp_path):
    np.savez(tmp_path / "1.npz", x=np.zeros((4, 3), np.float32))
    assert [s["x"].shape for s in npz_samples(tmp_path / "1.npz", (InputSpec("x", (2, 3), F),))] == [(2, 3), (2, 3)]


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"b": None}, "lacks b"),
        ({"c": np.zeros(5)}, "has no use for c"),
        ({"a": np.zeros((5, 4), np.float32)}, "a has shape 5x4, the graph takes nx3"),
        ({"b": np.zeros((5, 1), np.float32)}, "b is float32, the graph takes int64"),
        ({"a": np.full((5, 3), np.nan, np.float32)}, "not finite"),
    ],
)
def test_arrays_that_do_not_fit_are_errors(changed, message, tmp_path):
    np.savez(tmp_path / "1.npz", **{k: v for k, v in (arrays(5) | changed).items() if v is not None})
    with pytest.raises(InputError, match=message):
        list(npz_samples(tmp_path, PAIR, batch_size=5))


def test_files_that_are_no_npz_are_errors(tmp_path):
    with pytest.raises(InputError, match=r"has no \.npz files"):
        npz_samples(tmp_path, PAIR)
    (tmp_path / "1.npz").write_bytes(b"PK not an archive")
    with pytest.raises(InputError, match=r"is not an \.npz file"):
        npz_samples(tmp_path, PAIR).get_next()
    np.savez(tmp_path / "1.npz", a=np.array([{}], dtype=object))
    with pytest.raises(InputError, match="plain arrays"):
        npz_samples(tmp_path, PAIR).get_next()


SCRIPT = """
import numpy as np

class Reader:
    def __init__(self, batch_size): self.left = [{"x": np.ones((batch_size, 3), np.float32)}] * 2
    def get_next(self): return self.left.pop() if self.left else None

def reader(data_dir, batch_size, **others): return Reader(batch_size)
def pairs(): yield {"x": np.ones((1, 3), np.float32)}, 4
def number(): return 3
def broken(): raise KeyError("no such column")
"""


def test_functions_of_a_script(tmp_path):
    script = tmp_path / "user_script.py"
    script.write_text(SCRIPT)
    specs = (InputSpec("x", ("n", 3), F),)
    samples = script_samples(script, "reader", specs, batch_size=4)
    assert [s["x"].shape for s in samples] == [(4, 3), (4, 3)] == [s["x"].shape for s in samples]
    assert len(list(script_samples(script, "pairs", specs))) == 1
    with pytest.raises(InputError, match="returned int"):
        script_samples(script, "number", specs).get_next()
    with pytest.raises(InputError, match="broken failed: KeyError: 'no such column'"):
        script_samples(script, "broken", specs).get_next()
    with pytest.raises(UsageError, match="did you mean 'reader'"):
        script_samples(script, "readers", specs)
    with pytest.raises(UsageError, match="does not exist"):
        script_samples(tmp_path / "none.py", "reader", specs)


def test_images_are_resized_scaled_and_laid_out(tmp_path):
    image = pytest.importorskip("PIL.Image")
    (tmp_path / "a").mkdir()
    image.new("RGB", (8, 6), (255, 0, 51)).save(tmp_path / "a" / "1.png")
    image.new("L", (3, 3), 255).save(tmp_path / "2.png")
    specs = (InputSpec("x", ("n", 3, 4, 5), F),)
    spec = parse_image_spec("size=4x5,mean=0.5/0.5/0.5,std=0.5,layout=nchw,order=bgr")
    white, red = (s["x"] for s in image_samples(tmp_path, specs, spec))
    assert white.shape == (1, 3, 4, 5) and np.allclose(white, 1)
    assert np.allclose(red[0, :, 1, 1], [-0.6, -1, 1], atol=1e-6)
    (both,) = image_samples(tmp_path, (InputSpec("x", (2, 4, 5, 3), F),), ImageSpec(4, 5, layout="nhwc"))
    assert np.allclose(both["x"][1, 1, 1], [1, 0, 0.2])
    (tmp_path / "3.png").write_bytes(b"no image")
    with pytest.raises(InputError, match="cannot be read as an image"):
        list(image_samples(tmp_path, specs, spec))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("mean=0.5", "has no size"),
        ("size=4,meen=1", "did you mean 'mean'"),
        ("size=four", "no number"),
        ("size=4,layout=hwcn", "layout of images is one of nchw, nhwc"),
        ("size=4,mean=1/2", "mean has one value or 3"),
        ("size=4,std=0", "std is above 0"),
    ],
)
def test_image_specifications_that_cannot_be(text, message):
    with pytest.raises(UsageError, match=message):
        parse_image_spec(text)
