"""Whole command lines on a tiny model: what is on stdout, what is on stderr, how they end."""

import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest
import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers

from quantcli.cli import app, capture_onnx_graph
from quantcli.cli.command import Talk
from quantcli.cli.console import Console
from quantcli.folder import read_manifest

WORDS = 94


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A random two-layer Llama with a word-level tokenizer."""
    folder = tmp_path_factory.mktemp("cli") / "tiny"
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=WORDS + 2,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=64,
        tie_word_embeddings=False,
        bos_token_id=0,
        eos_token_id=1,
    )
    transformers.LlamaForCausalLM(config).save_pretrained(folder)
    vocabulary = {"<s>": 0, "</s>": 1} | {f"w{i}": i + 2 for i in range(WORDS)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>").save_pretrained(
        folder
    )
    return folder


@pytest.fixture(scope="module")
def quantized(model):
    target = model.parent / "Q"
    assert app.run(["quantize", "-m", str(model), "-o", str(target), "-a", "rtn", "--group-size", "32", "-q"]) == 0
    return target


@pytest.fixture(scope="module")
def text(model):
    file = model.parent / "text.txt"
    file.write_text(" ".join(f"w{(i * i + i // 7) % WORDS}" for i in range(2000)))
    return file


def test_quantize_prints_a_table_and_one_summary_line(model, capsys):
    target = model.parent / "printed"
    assert app.run(["quantize", "-m", str(model), "-o", str(target), "-a", "rtn", "--group-size", "32"]) == 0
    out, err = capsys.readouterr()
    lines = out.splitlines()
    assert lines[0].split()[:3] == ["layers", "worst", "bits"]
    kinds = [line.split()[0] for line in lines[1:8]]
    assert kinds == ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    assert all("1.00x" in line for line in lines[1:8])  # rtn against rtn
    assert lines[-1].startswith(f"{target}: ")
    assert "14 of 14 matrices, 100.0% of matrix parameters quantized" in lines[-1]
    assert "bits per weight" in lines[-1]
    assert all(line.startswith("left float: ") for line in lines[8:-1])
    assert [line.split(" (")[0] for line in lines[8:-1]] == ["left float: embeddings", "left float: output head"]
    assert err.splitlines()[0] == "Plan"


def test_json_is_all_there_is_on_stdout(model, capsys):
    target = model.parent / "as_json"
    assert app.run(["quantize", "-m", str(model), "-o", str(target), "-a", "rtn", "--group-size", "32", "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["output"] == str(target)
    assert len(result["layers"]) == 14
    assert result["size_bytes"] < result["parent_size_bytes"]


def test_dry_run_prints_the_plan_and_writes_nothing(model, capsys):
    target = model.parent / "never"
    assert (
        app.run(["quantize", "-m", str(model), "-o", str(target), "-a", "rtn", "--group-size", "32", "--dry-run"]) == 0
    )
    out = capsys.readouterr().out
    assert out.splitlines()[0] == "Plan (nothing was done)"
    assert "4 bits, group size 32, sym" in out
    assert not list(model.parent.glob("never*"))


def test_mixed_bits_show_their_distribution(model, text, capsys):
    given = ["quantize", "-m", str(model), "-a", "rtn", "--group-size", "32", "--data", str(text), "--seq-len", "32"]
    assert app.run([*given, "-o", str(model.parent / "mixed"), "--target-bits", "4.5", "--mixed-bits", "3,4,8"]) == 0
    out, err = capsys.readouterr()
    lines = err[err.index("\nBits\n") :].splitlines()[2:]
    shown = [line.split()[0] for line in lines if "linears," in line]
    assert set(shown) <= {"3", "4", "8"} and len(shown) > 1
    assert any(line.split()[0] == "together" for line in lines)
    assert 4.3 < float(out.splitlines()[-1].split(" bits per weight")[0].split()[-1]) <= 4.5
    assert app.run([*given, "-o", str(model.parent / "none"), "--target-bits", "2"]) == 2
    assert "--target-bits 2.000 stored bits per weight is out of reach" in capsys.readouterr().err


def test_the_other_spelling_does_the_same(model, quantized, capsys):
    target = model.parent / "theirs"
    words = (
        f"quantize --model_name_or_path {model} --algorithms rtn --output_path {target} --group_size 32 --log_level 3"
    )
    assert app.run(words.split()) == 0
    ours, theirs = read_manifest(quantized).files, read_manifest(target).files
    weights = [name for name in ours if name.endswith(".safetensors")]
    assert weights
    assert [ours[n] for n in weights] == [theirs[n] for n in weights]


def test_inspect_says_what_and_how(quantized, capsys):
    assert app.run(["inspect", str(quantized)]) == 0
    out = capsys.readouterr().out
    assert "GPTQ checkpoint" in out
    assert "made by quantize from tiny" in out
    assert "algorithm=rtn" in out
    assert app.run(["inspect", str(quantized), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["intact"] is True


def test_inspect_ends_with_3_where_a_file_changed(quantized, tmp_path, capsys):
    moved = tmp_path / "moved"
    subprocess.run(["cp", "-r", str(quantized), str(moved)], check=True)
    assert app.run(["inspect", str(moved)]) == 0
    with (moved / "model" / "config.json").open("a") as file:
        file.write("\n")
    capsys.readouterr()
    assert app.run(["inspect", str(moved)]) == 3
    out, err = capsys.readouterr()
    assert "1 changed" in out
    assert "model/config.json is changed" in err


def test_evaluate_prints_figures_and_holds_gates(model, quantized, text, capsys):
    words = ["evaluate", "-m", str(quantized), "--reference", str(model), "--data", str(text)]
    words += ["--num-samples", "2", "--seq-len", "32", "--no-speed"]
    assert app.run([*words, "--max-kl", "100"]) == 0
    out = capsys.readouterr().out
    for name in ("perplexity", "KL to reference", "top-1 agreement", "bits per weight"):
        assert name in out
    assert app.run([*words, "--max-kl", "0"]) == 5
    out, err = capsys.readouterr()
    assert "KL to reference" in out  # the figures come first, the verdict after
    assert err.splitlines()[-2].startswith("error: KL ")
    assert app.run([*words, "--json", "--max-kl", "0"]) == 5
    assert json.loads(capsys.readouterr().out)["failures"]


def test_algorithms_matrix_and_options(capsys):
    assert app.run(["algorithms"]) == 0
    names = [line.split()[0] for line in capsys.readouterr().out.splitlines()[1:] if line]
    assert {"gptq", "kquant", "rtn"} <= set(names)
    assert app.run(["algorithms", "gptq"]) == 0
    out = capsys.readouterr().out
    assert "damp_percent" in out
    assert "0.01" in out
    assert app.run(["algorithms", "--json"]) == 0
    for algorithm in json.loads(capsys.readouterr().out)["algorithms"]:
        assert algorithm["bits"]
        assert all(option["help"] for option in algorithm["options"]), algorithm["name"]


@pytest.mark.parametrize("runs", [True, False])
def test_capture_shows_what_was_measured_and_nothing_else(runs, capsys):
    from quantcli.pipelines.capture import CaptureResult

    measured = {"accuracy_level": 0, "flip_rate": 0.03, "tokens_per_second": 21.84, "sample": "Paris.\nThe"}
    result = CaptureResult(
        output=Path("onnx"),
        size_bytes=180_000_000,
        nodes={"4": 150, "float": 1},
        seconds=36.0,
        **(measured if runs else dict.fromkeys(measured)),
    )
    capture_onnx_graph.show(result, Console(Talk()))
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split(maxsplit=1) == ["matrices", "150 in 4 bits, 1 float"]
    assert lines[-1] == "onnx: 180 MB, in 36 s"
    shown = [
        "  accuracy level  0 (level 4 changes 3.0% of the top tokens)",
        "  decoding        21.8 tokens/s",
        "  sample          Paris. The",
    ]
    assert lines[1:-1] == (shown if runs else [])


WAITING = textwrap.dedent("""
    import os, sys, time
    from dataclasses import replace
    from quantcli.cli import app

    def run(options, console):
        print("a library talks")
        os.write(1, b"and so does C++\\n")
        console.note("begun")
        {body}
        return app.COMMANDS["evaluate"]

    app.COMMANDS["algorithms"] = replace(
        app.COMMANDS["algorithms"], run=run, show=lambda result, console: console.text("the result")
    )
    app.main(["algorithms", *sys.argv[1:]])
""")


def started(body, *argv):
    return subprocess.Popen(
        [sys.executable, "-c", WAITING.format(body=body), *argv],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_with_130_and_one_line(number):
    with started("time.sleep(60)") as process:
        assert process.stderr.readline() == "begun\n"
        os.kill(process.pid, number)
        out, err = process.communicate(timeout=30)
    assert process.returncode == 130
    assert (out, err) == ("", "error: interrupted\n")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_that_comes_while_a_destructor_runs_is_not_lost(number):
    # the first object fails in another way, which is said as ever
    objects = "for act in (lambda self: 1 / 0, lambda self: time.sleep(60)): type('It', (), dict(__del__=act))()"
    with started(f"exec({objects!r}); time.sleep(60)") as process:
        assert process.stderr.readline() == "begun\n"
        while "ZeroDivisionError" not in process.stderr.readline():
            pass
        time.sleep(0.1)
        os.kill(process.pid, number)
        out, err = process.communicate(timeout=30)
    assert process.returncode == 130
    assert (out, err) == ("", "error: interrupted\n")


def test_only_results_are_on_stdout():
    with started("pass") as process:
        assert process.communicate(timeout=30) == ("the result\n", "begun\n")
    with started("pass", "--verbose") as process:
        out, err = process.communicate(timeout=30)
    assert out == "the result\n"
    assert sorted(err.splitlines()) == ["a library talks", "and so does C++", "begun"]


def test_a_bug_of_ours_is_said_to_be_one():
    with started("1 / 0") as process:
        out, err = process.communicate(timeout=30)
    assert (process.returncode, out) == (1, "")
    assert "ZeroDivisionError" in err.splitlines()[-1]
    assert "Traceback" in err


def test_completion_offers_commands_and_flags():
    def complete(line, at):
        env = os.environ | {"_QUANTCLI_COMPLETE": "complete_bash", "COMP_WORDS": line, "COMP_CWORD": str(at)}
        done = subprocess.run(
            [sys.executable, "-c", "from quantcli.cli.app import main; main()"],
            env=env, capture_output=True, text=True, check=False,
        )  # fmt: skip
        return done.stdout.split()

    assert complete("quantcli qu", 1) == ["quantize"]
    assert complete("quantcli quantize --preset b", 3) == ["balanced", "best"]
    assert complete("quantcli quantize --max-m", 2) == ["--max-memory"]
