import numpy as np
import pytest

from quantcli.errors import InputError
from quantcli.export.accuracy import Probe, compare_levels, probe, refuse_other_function


def made(top, pace):
    return Probe(np.array(top), np.zeros((1, 4)), (1, 2), pace)


@pytest.mark.parametrize(
    ("flips", "pace", "worth_it"), [(0, 20.0, True), (2, 20.0, True), (3, 20.0, False), (0, 10.2, False)]
)
def test_level_4_must_keep_the_tokens_and_be_faster(flips, pace, worth_it):
    top = np.arange(400)
    changed = top.copy()
    changed[:flips] += 1
    check = compare_levels(made(top, 10.0), made(changed, pace))
    assert check.flip_rate == flips / 400 and check.positions == 400 and check.worth_it is worth_it


def test_a_folder_that_does_not_open_is_one_line(tmp_path):
    (tmp_path / "genai_config.json").write_text("{}")
    with pytest.raises(InputError, match="does not run") as raised:
        probe(tmp_path, [1, 2, 3], [1], 16)
    assert "\n" not in raised.value.message


def test_another_function_is_refused():
    wanted = np.random.default_rng(0).standard_normal((12, 50)).astype(np.float32)
    refuse_other_function(wanted * 1.005, wanted, "float32", "olmo", "genai")
    refuse_other_function(wanted * 1.04, wanted, "bfloat16", "olmo", "genai")
    for other in (wanted * 1.02, wanted[::-1], wanted * np.nan):
        with pytest.raises(InputError, match="'olmo' computes something else") as raised:
            refuse_other_function(other, wanted, "float32", "olmo", "genai")
        assert raised.value.hint == "add --exporter torch"
