"""Outputs that appear whole or not at all."""

import errno
import json

import pytest

import tiny
from quantcli.errors import InputError, InterruptedRunError, QuantcliError, ResourceError, UsageError
from quantcli.folder import (
    MANIFEST,
    Manifest,
    create_output,
    fingerprint,
    folder_size_bytes,
    read_manifest,
    require_free_bytes,
    resolve_model_folder,
    write_json,
)

PLAN = {"bits": 4, "seed": 0}


def manifest():
    return Manifest("checkpoint", "quantize", {"bits": 4}, {"name": "m"})


def make(target, text="weights", **options):
    with create_output(target, plan=PLAN, **options) as partial:
        (partial.model / "weights").write_text(text)
        partial.commit(manifest())


def names(folder):
    return sorted(p.name for p in folder.iterdir())


def test_a_finished_output_stands_alone_with_its_digests(tmp_path):
    make(tmp_path / "deep" / "Q")
    assert names(tmp_path / "deep") == ["Q"]
    assert names(tmp_path / "deep" / "Q") == ["model", MANIFEST]
    found = read_manifest(tmp_path / "deep" / "Q")
    assert found.files["model/weights"]["sha256"] == tiny.digests(tmp_path / "deep" / "Q")["model/weights"]
    assert found.files["model/weights"]["size_bytes"] == 7
    assert found.versions["quantcli"]
    assert read_manifest(tmp_path / "deep" / "Q" / "model") == found


def test_nothing_stands_at_the_target_before_the_commit(tmp_path):
    with create_output(tmp_path / "Q", plan=PLAN) as partial:
        (partial.model / "weights").write_text("half")
        assert not (tmp_path / "Q").exists()
        partial.commit(manifest())
        assert (tmp_path / "Q" / MANIFEST).is_file()


@pytest.mark.parametrize("resumable", [True, False])
def test_an_error_leaves_nothing(tmp_path, resumable):
    with pytest.raises(InputError), create_output(tmp_path / "Q", plan=PLAN, resumable=resumable) as partial:
        (partial.model / "weights").write_text("half")
        raise InputError("damaged")
    assert names(tmp_path) == []


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (KeyboardInterrupt(), InterruptedRunError),
        (OSError(errno.ENOSPC, "full"), ResourceError),
        (OSError(errno.EDQUOT, "full"), ResourceError),
        (ResourceError("memory"), ResourceError),
        (InterruptedRunError("a command within"), InterruptedRunError),
    ],
)
def test_what_can_be_continued_is_kept(tmp_path, error, expected):
    def attempt():
        with create_output(tmp_path / "Q", plan=PLAN, resumable=True) as partial:
            if partial.resumed:
                assert (partial.model / "weights").read_text() == "half"
                partial.commit(manifest())
            else:
                (partial.model / "weights").write_text("half")
                raise error

    with pytest.raises(expected):
        attempt()
    assert names(tmp_path) == ["Q.partial-work"]
    attempt()
    assert names(tmp_path) == ["Q"]


def test_what_cannot_be_continued_is_not_kept(tmp_path):
    with pytest.raises(InterruptedRunError) as caught, create_output(tmp_path / "Q", plan=PLAN):
        raise KeyboardInterrupt
    assert caught.value.hint is None and caught.value.exit_code == 130
    assert names(tmp_path) == []


def test_other_os_errors_stay_what_they_are(tmp_path):
    with pytest.raises(FileNotFoundError), create_output(tmp_path / "Q", plan=PLAN, resumable=True):
        (tmp_path / "none").read_text()
    assert names(tmp_path) == []


def interrupted(target, plan=PLAN):
    with (
        pytest.raises(InterruptedRunError) as caught,
        create_output(target, plan=plan, resumable=True) as partial,
    ):
        (partial.model / "weights").write_text("half")
        raise KeyboardInterrupt
    assert "same command" in caught.value.hint


def test_changed_options_are_named_and_refused(tmp_path):
    interrupted(tmp_path / "Q")
    with (
        pytest.raises(UsageError, match="bits was 4, is 3") as caught,
        create_output(tmp_path / "Q", plan=PLAN | {"bits": 3}, resumable=True),
    ):
        raise AssertionError("the run began")
    assert "--force" in caught.value.hint
    assert (tmp_path / "Q.partial-work" / "model" / "weights").read_text() == "half"
    with create_output(tmp_path / "Q", plan=PLAN | {"bits": 3}, force=True) as partial:
        assert not partial.resumed and not (partial.model / "weights").exists()
        partial.commit(manifest())
    assert names(tmp_path) == ["Q"]


@pytest.mark.parametrize("content", ["", "{", "[]", "3"])
def test_an_unreadable_plan_of_an_interrupted_run_starts_anew(tmp_path, content):
    interrupted(tmp_path / "Q")
    (tmp_path / "Q.partial-work" / "plan.json").write_text(content)
    with create_output(tmp_path / "Q", plan=PLAN) as partial:
        assert not partial.resumed
        partial.commit(manifest())
    assert names(tmp_path) == ["Q"]


def test_a_second_run_into_the_same_output_is_refused(tmp_path):
    with create_output(tmp_path / "Q", plan=PLAN) as partial:
        with (
            pytest.raises(UsageError, match="another run is writing"),
            create_output(tmp_path / "Q", plan=PLAN, force=True),
        ):
            raise AssertionError("the second run began")
        assert partial.state.is_dir()
        partial.commit(manifest())
    assert names(tmp_path) == ["Q"]


def test_what_is_not_ours_is_never_replaced(tmp_path):
    (tmp_path / "Q").mkdir()
    (tmp_path / "Q" / "precious").write_text("x")
    for force in (False, True):
        with pytest.raises(UsageError):
            make(tmp_path / "Q", force=force)
    assert names(tmp_path / "Q") == ["precious"] and names(tmp_path) == ["Q"]


def test_an_empty_folder_is_taken(tmp_path):
    (tmp_path / "Q").mkdir()
    make(tmp_path / "Q")
    assert names(tmp_path / "Q") == ["model", MANIFEST]


def test_force_replaces_at_the_last_moment(tmp_path):
    make(tmp_path / "Q", "old")
    with pytest.raises(InputError), create_output(tmp_path / "Q", plan=PLAN, force=True):
        raise InputError("damaged")
    assert (tmp_path / "Q" / "model" / "weights").read_text() == "old"
    make(tmp_path / "Q", "new", force=True)
    assert (tmp_path / "Q" / "model" / "weights").read_text() == "new"
    assert names(tmp_path) == ["Q"]


def test_the_output_is_neither_inside_nor_around_an_input(tmp_path):
    (tmp_path / "in").mkdir()
    for target in (tmp_path / "in", tmp_path / "in" / "a" / "b", tmp_path, tmp_path / "in" / ".." / "in" / "x"):
        with pytest.raises(UsageError, match="input"):
            make(target, inputs=[tmp_path / "in"], force=True)
    make(tmp_path / "inner", inputs=[tmp_path / "in"])  # a name that begins alike is another folder


def test_a_read_only_place_is_a_resource_error(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises((ResourceError, UsageError, NotADirectoryError)) as caught:
        make(tmp_path / "file" / "Q")
    assert isinstance(caught.value, QuantcliError)


def test_free_space_is_asked_of_the_nearest_folder_that_exists(tmp_path):
    require_free_bytes(tmp_path / "a" / "b", 1)
    with pytest.raises(ResourceError, match="MB free"):
        require_free_bytes(tmp_path / "a" / "b", 1 << 60)


def test_fingerprints_tell_models_apart(tmp_path):
    folder = tiny.checkpoint(tmp_path / "m")
    first = fingerprint(folder)
    assert fingerprint(folder) == first
    (folder / "notes.txt").write_text("not part of the model")
    assert fingerprint(folder) == first
    data = bytearray((folder / "model.safetensors").read_bytes())
    data[-1] ^= 1
    (folder / "model.safetensors").write_bytes(data)
    assert fingerprint(folder) != first


def test_resolving_takes_the_model_out_of_an_output(tmp_path):
    make(tmp_path / "Q")
    assert resolve_model_folder(tmp_path / "Q") == tmp_path / "Q" / "model"
    assert resolve_model_folder(tmp_path) == tmp_path
    with pytest.raises(InputError, match="does not exist"):
        resolve_model_folder(tmp_path / "none")


def test_a_manifest_that_is_none_is_named(tmp_path):
    assert read_manifest(tmp_path) is None
    for content in ("", "[]", '{"unknown": 1}', "\x00"):
        (tmp_path / MANIFEST).write_text(content)
        with pytest.raises(InputError, match="not a manifest of ours"):
            read_manifest(tmp_path)


def test_json_is_replaced_in_one_step(tmp_path):
    write_json(tmp_path / "a.json", {"a": 1})
    with pytest.raises(ValueError, match="Circular"):
        loop = []
        loop.append(loop)
        write_json(tmp_path / "a.json", loop)
    assert json.loads((tmp_path / "a.json").read_text()) == {"a": 1}
    assert folder_size_bytes(tmp_path) == (tmp_path / "a.json").stat().st_size


def test_a_kill_while_digests_are_taken_loses_nothing(tmp_path, monkeypatch):
    def kill(_path):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched, pytest.raises(InterruptedRunError):
        patched.setattr("quantcli.folder.file_digest", kill)
        make(tmp_path / "Q", resumable=True)
    with create_output(tmp_path / "Q", plan=PLAN, resumable=True) as partial:
        assert partial.resumed and (partial.model / "weights").read_text() == "weights"
        partial.commit(manifest())
    assert names(tmp_path) == ["Q"] and names(tmp_path / "Q") == ["model", MANIFEST]
    assert set(read_manifest(tmp_path / "Q").files) == {"model/weights"}


def test_a_kill_between_the_two_renames_of_a_replacement_brings_the_old_output_back(tmp_path):
    make(tmp_path / "Q", "old")
    (tmp_path / "Q").rename(tmp_path / "Q.partial-old")  # as a kill there leaves it
    with pytest.raises(UsageError, match="exists and is not empty"):
        make(tmp_path / "Q", "new")
    assert names(tmp_path) == ["Q"] and (tmp_path / "Q" / "model" / "weights").read_text() == "old"
    (tmp_path / "Q.partial-old").mkdir()  # as a kill after both leaves it
    make(tmp_path / "Q", "new", force=True)
    assert names(tmp_path) == ["Q"] and (tmp_path / "Q" / "model" / "weights").read_text() == "new"
