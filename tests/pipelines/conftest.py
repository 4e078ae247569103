"""What several tests of pipelines start from, a view into a run, and a way to stop one."""

from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch

import families
from quantcli.errors import InterruptedRunError
from quantcli.pipelines.blockwise import tokens
from quantcli.pipelines.blockwise.journal import Journal


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    return families.write_text(tmp_path_factory.mktemp("text") / "words.txt")


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    root = tmp_path_factory.mktemp("models")

    def get(family):
        folder = root / family
        if not folder.exists():
            families.save(families.build(family), folder)
        return folder

    return get


@pytest.fixture
def ran(monkeypatch):
    """Of the last run: its calibration tokens, and the hidden states behind its last block, float ones too if any."""
    seen = SimpleNamespace()
    remember, read = Journal.remember, tokens.read_tokens

    def note_streams(self, done, streams):
        seen.hidden = torch.cat(streams.hidden).clone()  # the last block's stay
        seen.float_hidden = None if streams.float_hidden is None else torch.cat(streams.float_hidden).clone()
        return remember(self, done, streams)

    def note_tokens(*given):
        found = read(*given)
        seen.tokens = found["rows"]
        return found

    monkeypatch.setattr(Journal, "remember", note_streams)
    monkeypatch.setattr(tokens, "read_tokens", note_tokens)
    return seen


@pytest.fixture
def stopped(monkeypatch):
    """Within it, a run is interrupted once a block is done and remembered."""

    @contextmanager
    def stop():
        remember = Journal.remember

        def interrupted(self, done, streams):
            remember(self, done, streams)
            raise KeyboardInterrupt

        with monkeypatch.context() as patched, pytest.raises(InterruptedRunError):
            patched.setattr(Journal, "remember", interrupted)
            yield

    return stop
