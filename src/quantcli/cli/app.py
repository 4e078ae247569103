"""The `quantcli` command: parse, run, show, and end with the right exit code.

Nothing heavy is imported before a command runs: `--help` answers at once.
"""

import logging
import os
import signal
import sys
import threading
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stdout, suppress
from dataclasses import replace
from functools import cache
from io import TextIOWrapper
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any, NoReturn, TextIO

import typer
from typer.core import TyperCommand, TyperGroup, TyperOption
from typer.main import get_command

from quantcli import __version__
from quantcli.cli import (
    algorithms,
    backends,
    capture_onnx_graph,
    compare,
    convert_adapter,
    evaluate,
    finetune,
    generate,
    generate_adapter,
    inspect,
    quantize,
    tune,
)
from quantcli.cli.aliases import rewrite
from quantcli.cli.command import Command, Request
from quantcli.cli.failures import as_usage_error, report, say
from quantcli.cli.flags import typer_function
from quantcli.errors import InterruptedRunError, UsageError
from quantcli.options import QuantizeOptions, TuneOptions

if TYPE_CHECKING:
    from quantcli.cli.configuration.expand import Expanded
    from quantcli.pipelines.tuning.space import Space

__all__ = ["COMMANDS", "build", "help_text", "main", "parse", "run", "search_space"]

COMMANDS: dict[str, Command] = {
    module.COMMAND.name: module.COMMAND
    for module in (
        quantize,
        tune,
        finetune,
        capture_onnx_graph,
        generate_adapter,
        convert_adapter,
        generate,
        evaluate,
        inspect,
        algorithms,
        backends,
        compare,
    )
}
_EXAMPLES = (
    "quantcli quantize -m SmolLM2-135M -o Q",
    "quantcli capture-onnx-graph -m Q -o onnx",
    "quantcli evaluate -m onnx --reference SmolLM2-135M",
)
_CONTEXT = {"help_option_names": ["-h", "--help"], "max_content_width": 100}
_SIGPIPE_EXIT = 141
_COMPLETION_VARIABLE = "_QUANTCLI_COMPLETE"  # set by the shell's completion script, which gives no arguments


def main(argv: Sequence[str] | None = None) -> NoReturn:
    """Runs the command line and exits."""
    sys.exit(run(sys.argv[1:] if argv is None else argv))


def run(argv: Sequence[str]) -> int:
    """Runs a command line; returns the exit code after saying on stderr what went wrong, if anything did."""
    verbose = "-v" in argv or "--verbose" in argv or os.environ.get("QUANTCLI_DEBUG") == "1"
    try:
        if not argv and _COMPLETION_VARIABLE not in os.environ:
            typer.echo(help_text(), err=True)
            return 2
        request = parse(argv)
        if isinstance(request, int):
            return request
        return _execute(request)
    except BrokenPipeError:
        # the reader went away (`| head`): nobody is left to tell, and Python must not complain while it exits
        with suppress(OSError, ValueError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return _SIGPIPE_EXIT
    except (Exception, KeyboardInterrupt) as error:
        return report(error, verbose=verbose)


def parse(argv: Sequence[str]) -> Request | int:
    """A command line as a request; an exit code where it only asked for help, the version or shell completion.

    Raises:
        UsageError: for what the parser or an options dataclass refuses, or an alias that we cannot serve.
    """
    args = list(argv)
    if not args or args[0] not in COMMANDS:
        return _parse_words(args)
    rewritten = rewrite(args[0], args[1:], _flags(args[0]))
    words, notes = rewritten.args, list(rewritten.notes)
    if args[0] == tune.COMMAND.name:
        words = _with_search(words, notes)
    expanded = _expand(args[0], words)
    if expanded is not None:
        words, notes = expanded.args, [*notes, *expanded.notes]
    try:
        request = _parse_words([args[0], *words])
    except UsageError as error:
        if expanded is None or error.hint:
            raise
        hint = f"correct it in {expanded.file.name}, or give the flag, which wins"
        raise UsageError(error.message, hint=hint) from error
    if isinstance(request, int):
        return request
    for note in notes if not request.talk.quiet else ():
        say("note", note)
    if expanded is None:
        return request
    return replace(request, options=replace(request.options, config=expanded.file))


def _parse_words(args: list[str]) -> Request | int:
    """A command line in our own words."""
    try:
        request: Request | int = build().main(
            args, prog_name="quantcli", complete_var=_COMPLETION_VARIABLE, standalone_mode=False
        )
    except typer.TyperException as error:
        raise as_usage_error(error, " ".join(["quantcli", *(a for a in args[:1] if a in COMMANDS)])) from error
    if request == InterruptedRunError.exit_code:  # the parser's word for Ctrl-C
        raise InterruptedRunError("interrupted")
    return request if isinstance(request, Request) else int(request or 0)


def _expand(command: str, args: list[str]) -> "Expanded | None":
    """The words with what the configuration file among them says; None where there is none."""
    names = _names(command)
    spellings = tuple(word for word, sets in names.items() if sets == "config")
    if not any(word.startswith(spellings) for word in args):
        return None
    from quantcli.cli.configuration.expand import expand  # its tables are read only where they are used

    return expand(args, _flags(command), names)


def _with_search(words: list[str], notes: list[str]) -> list[str]:
    """The words of `tune` behind what a workflow among them says of the search."""
    spellings = ("-c", "--space", "--config")
    at = next((i for i, word in enumerate(words) if word.partition("=")[0] in spellings), None)
    if at is None or any(word in ("-h", "--help") for word in words):
        return words
    _, equals, inline = words[at].partition("=")
    file = inline if equals else words[at + 1] if at + 1 < len(words) else ""
    from quantcli.cli.configuration.evaluators import search_words
    from quantcli.cli.configuration.read import read_json
    from quantcli.cli.configuration.search import is_configuration

    path = Path(file)
    if not path.is_file():
        raise UsageError(f"space {file or 'of no name'} does not exist", hint="give a JSON file, or --set woq")
    values = read_json(path, lists=True).values
    if not is_configuration(values):
        return words
    said, typed = search_words(values, path, notes), _flags(tune.COMMAND.name)
    return [*_not_typed(said, words, typed), *words]


def _not_typed(said: list[str], words: list[str], flags: Mapping[str, bool]) -> list[str]:
    """Without the flags that were typed: those win."""
    names = _names(tune.COMMAND.name)
    typed = {names.get(word.partition("=")[0]) for word in words}
    kept, at = [], 0
    while at < len(said):
        width = 1 + flags[said[at]]
        if names[said[at]] not in typed:
            kept += said[at : at + width]
        at += width
    return kept


def search_space(options: TuneOptions) -> "Space | None":
    """The space of a configuration of Olive's that --space names; None where it names another, or none."""
    if options.space is None:
        return None
    from quantcli.cli.configuration import search
    from quantcli.cli.configuration.read import read_json
    from quantcli.pipelines.graph.source import is_graph
    from quantcli.pipelines.tuning.choices import without_idle_data

    values = read_json(options.space, lists=True).values
    if not search.is_configuration(values):
        return None
    name = quantize.COMMAND.name

    def parse_options(words: list[str]) -> QuantizeOptions:
        request = _parse_words([name, *rewrite(name, words, _flags(name)).args])
        assert isinstance(request, Request) and isinstance(request.options, QuantizeOptions)
        return without_idle_data(request.options, "onnx" if is_graph(options.model) else "checkpoint")

    typed = tune.shared_words(options)
    return search.search_space(values, options.space, typed, _flags(name), _names(name), parse_options)


@cache
def build() -> TyperGroup:
    """The parser, made once."""
    app = typer.Typer(
        cls=_Group,
        help="Make language models small and fast, and prove with numbers that they are still good.",
        epilog=_examples(_EXAMPLES),
        context_settings=_CONTEXT,
        rich_markup_mode=None,
        pretty_exceptions_enable=False,
    )

    @app.callback()
    def version(
        version: bool = typer.Option(
            False, "--version", help="Print the version.", callback=_print_version, is_eager=True, show_default=False
        ),
    ) -> None:
        pass

    for command in COMMANDS.values():
        app.command(
            command.name,
            cls=_Leaf,
            help=command.summary,
            epilog=_examples(command.examples),
            context_settings=_CONTEXT,
        )(typer_function(command))
    group = get_command(app)
    assert isinstance(group, TyperGroup)
    for param in group.params:
        _default_to_no(param)
    return group


def help_text(name: str | None = None, width: int | None = None) -> str:
    """The help of a command, or of quantcli itself; `width` in characters, else that of the terminal."""
    group = build()
    with group.make_context("quantcli", [], resilient_parsing=True, terminal_width=width) as context:
        if name is None:
            return group.get_help(context)
        command = group.commands[name]
        with command.make_context(name, [], parent=context, resilient_parsing=True) as inner:
            return command.get_help(inner)


class _Leaf(TyperCommand):
    """Help with the flags grouped under headings, and the examples as they were written."""

    def format_options(self, ctx: Any, formatter: Any) -> None:
        panels: dict[str, list[tuple[str, str]]] = {}
        for param in self.get_params(ctx):
            record = param.get_help_record(ctx)
            if record is not None:
                heading = (getattr(param, "rich_help_panel", None) or "Output") if record else ""
                panels.setdefault(heading if isinstance(param, TyperOption) else "Arguments", []).append(record)
        for heading, records in panels.items():
            with formatter.section(heading):
                formatter.write_dl(records)

    def format_epilog(self, ctx: Any, formatter: Any) -> None:
        formatter.write(f"\n{self.epilog}\n")


class _Group(TyperGroup):
    """Help with whole summaries, and the examples as they were written."""

    def get_help_option(self, ctx: Any) -> Any:
        return _default_to_no(super().get_help_option(ctx))

    def format_commands(self, ctx: Any, formatter: Any) -> None:
        with formatter.section("Commands"):
            formatter.write_dl([(name, command.help) for name, command in self.commands.items()])

    def format_epilog(self, ctx: Any, formatter: Any) -> None:
        formatter.write(f"\n{self.epilog}\n")


def _default_to_no(param: Any) -> Any:
    """Flags of typer itself are None where not given, for which it imports pydantic: half of the time of `--help`."""
    if param.default is None:
        param.default = False
    return param


def _execute(request: Request) -> int:
    from quantcli.cli.console import Console

    command, talk = request.command, request.talk
    console = Console(talk)
    _keep_libraries_quiet(talk.verbose)
    with _interruptible(), _stdout_for_results(talk.verbose) as console.live:
        result = command.run(request.options, console)
    if talk.json:
        console.json(result.to_dict())
    else:
        command.show(result, console)
    sys.stdout.flush()
    command.check(result)
    return 0


def _keep_libraries_quiet(verbose: bool) -> None:
    # nothing is sent anywhere, and no bar of a library breaks ours
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    os.environ.setdefault("DO_NOT_TRACK", "1")
    if not verbose:
        logging.getLogger("onnx_ir").setLevel(logging.WARNING)
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
        os.environ.setdefault("TQDM_DISABLE", "1")
        os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
        if not sys.warnoptions:
            warnings.simplefilter("ignore")


@contextmanager
def _stdout_for_results(verbose: bool) -> Iterator[TextIO]:
    """Keeps what libraries print, from Python or C++, out of stdout; shown on stderr with --verbose.

    Gives what still reaches stdout meanwhile.
    """
    sys.stdout.flush()
    try:
        kept = os.dup(1)
    except OSError:  # stdout is closed
        yield sys.stdout
        return
    elsewhere = os.dup(2) if verbose else os.open(os.devnull, os.O_WRONLY)
    live = _stdout_through(kept)
    os.dup2(elsewhere, 1)
    try:
        with os.fdopen(elsewhere, "w", closefd=True) as chatter, redirect_stdout(chatter):
            yield live
    finally:
        os.dup2(kept, 1)
        os.close(kept)


def _stdout_through(descriptor: int) -> TextIO:
    """Python's stdout by another descriptor of the same file; itself where it does not write to descriptor 1."""
    try:
        replaced = sys.stdout.fileno() != 1
    except (OSError, ValueError):
        replaced = True
    if replaced:
        return sys.stdout
    # nothing is held back: what could not be written to a closed pipe must not come up again when Python ends
    raw = open(descriptor, "wb", buffering=0, closefd=False)  # noqa: SIM115
    return TextIOWrapper(raw, encoding=sys.stdout.encoding, errors=sys.stdout.errors, write_through=True)


@contextmanager
def _interruptible() -> Iterator[None]:
    """Lets SIGTERM end a run as Ctrl-C does, what is finished being kept, and lets neither get lost.

    An exception that a signal raises while a destructor happens to run is printed and dropped by Python. Garbage of a
    large library takes a tenth of a second to collect, so that this is not rare: the signal is then given again.
    """
    timers: list[threading.Timer] = []

    def interrupt(number: int, frame: FrameType | None) -> NoReturn:
        raise KeyboardInterrupt

    def again(dropped: "sys.UnraisableHookArgs") -> None:
        if issubclass(dropped.exc_type, KeyboardInterrupt):
            # from another thread, a moment later: what is raised inside of this hook would be dropped as well
            timers.append(threading.Timer(0.01, os.kill, [os.getpid(), signal.SIGTERM]))
            timers[-1].start()
        else:
            unraisable(dropped)

    try:
        before = signal.signal(signal.SIGTERM, interrupt)
    except ValueError:  # not the main thread: whoever runs us there handles signals
        yield
        return
    unraisable, sys.unraisablehook = sys.unraisablehook, again
    try:
        yield
    finally:
        for timer in timers:
            timer.cancel()
            timer.join()
        sys.unraisablehook = unraisable
        signal.signal(signal.SIGTERM, before)


def _flags(name: str) -> dict[str, bool]:
    """Spelling of each flag of a command to whether it takes a value."""
    command = build().commands[name]
    return {
        spelling: not param.is_flag
        for param in command.params
        if isinstance(param, TyperOption)
        for spelling in (*param.opts, *param.secondary_opts)
    } | {"-h": False, "--help": False}


def _names(name: str) -> dict[str, str]:
    """Spelling of each flag of a command to the option that it sets, `set KEY` for one of an algorithm."""
    settings = {flag: f"set {key}" for flag, (key, _) in COMMANDS[name].settings.items()}
    return {
        spelling: settings.get(str(param.name), str(param.name))
        for param in build().commands[name].params
        if isinstance(param, TyperOption)
        for spelling in (*param.opts, *param.secondary_opts)
    }


def _examples(lines: Sequence[str]) -> str:
    return "\n".join(["Examples:", *(f"  {line}" for line in lines)])


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"quantcli {__version__}")
        raise typer.Exit
