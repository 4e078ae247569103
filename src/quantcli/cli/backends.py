"""`quantcli backends`: other packages as workers: list, install, remove, check."""

from typing import TYPE_CHECKING, Any

from quantcli.cli.command import Command, FlagStyle
from quantcli.errors import QualityError
from quantcli.options import BACKEND_ACTIONS, BACKEND_INSTALLERS, BackendsOptions

if TYPE_CHECKING:
    from quantcli.cli.console import Console

__all__ = ["COMMAND", "check", "run", "show"]

_HEADS = ("backend", "package", "takes", "methods", "runs on", "state", "size")


def run(options: BackendsOptions, console: "Console") -> Any:
    """Lists, installs, removes or checks."""
    from quantcli.pipelines import backends

    return backends.run(options, console)


def show(result: Any, console: "Console") -> None:
    """The table, one backend with its methods, or what was done."""
    from quantcli.cli.console import human_duration, human_size

    if result.action == "remove":
        console.text(f"{result.backends[0]['name']} removed, {human_size(result.freed_bytes)} freed")
        return
    if result.action == "check":
        checked = [
            (name, c.method, {True: "works", False: "fails", None: "-"}[c.works], human_duration(c.seconds),
             human_size(c.peak_bytes), c.said)
            for name, checks in result.checks.items()
            for c in checks
        ]  # fmt: skip
        console.table(("backend", "method", "", "time", "peak memory", "what its result lost"), checked, left=6)
        return
    if result.action == "install":
        found = result.backends[0]
        console.text(
            f"{found['name']} installed: {found['package']} {found['version']}, {found['pins']} packages, "
            f"{human_size(found['size_bytes'])} in {human_duration(found['install_seconds'])}"
        )
        return
    if len(result.backends) == 1:
        _show_one(result.backends[0], console)
        return
    rows = [
        (
            b["name"],
            f"{b['package']} {b['version']}",
            {"onnx": "graphs", "checkpoint": "checkpoints"}[b["input"]],
            ", ".join(b["methods"]),
            ", ".join(b["processors"]),
            b["state"],
            _size(b),
        )
        for b in result.backends
    ]
    console.table(_HEADS, rows, left=len(_HEADS))
    console.text("\nquantcli backends list NAME shows the methods of one, quantcli backends install NAME installs it.")


def _show_one(found: dict[str, Any], console: "Console") -> None:
    console.pairs(
        f"{found['name']}: {found['summary']}",
        [
            ("package", f"{found['package']} {found['version']}"),
            ("runs on", ", ".join(found["processors"])),
            ("state", found["state"]),
            ("size", _size(found)),
            *((f"-a {name}", what) for name, what in found["methods"].items()),
            *(("note", text) for text in found["warnings"].values()),
        ],
    )
    options = [
        (name, key, str(o["default"]).lower(), o["help"] + (f": {', '.join(o['choices'])}" if o["choices"] else ""))
        for name, settings in found["options"].items()
        for key, o in settings.items()
    ]
    if options:
        console.text("\nOptions, given as --set NAME=VALUE:")
        console.table(("method", "name", "default", "what"), options, left=4)


def _size(found: dict[str, Any]) -> str:
    from quantcli.cli.console import human_size

    if found["size_bytes"] is not None:
        return human_size(found["size_bytes"])
    return f"about {human_size(found['needed_bytes'])}" if found["needed_bytes"] else "-"


def check(result: Any) -> None:
    """Exit code 5 where a method that was tried does not work.

    Raises:
        QualityError: naming them.
    """
    if result.failures:
        raise QualityError(f"not working: {', '.join(result.failures)}", hint="the table says why")


COMMAND = Command(
    name="backends",
    summary="Other packages that quantize instead of our own code: list, install, remove or check them.",
    options=BackendsOptions,
    run=run,
    show=show,
    check=check,
    styles={
        "action": FlagStyle(("action",), metavar="[list|install|remove|check]", choices=BACKEND_ACTIONS),
        "name": FlagStyle(("name",), metavar="[NAME]"),
        "installer": FlagStyle(choices=BACKEND_INSTALLERS, metavar="|".join(BACKEND_INSTALLERS)),
        "torch_index": FlagStyle(metavar="URL"),
    },
    examples=(
        "quantcli backends",
        "quantcli backends list gptqmodel",
        "quantcli backends install autoawq --torch-index https://download.pytorch.org/whl/cpu",
        "quantcli backends check autoawq",
        "quantcli quantize -m SmolLM2-135M -o Q --backend autoawq",
    ),
)
