"""Writes docs/configurations.md from the tables of pass types and keys; with --check says whether it is up to date."""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path

from quantcli.cli.aliases import describe
from quantcli.cli.configuration.keys import Key, Keys, Nested, Pass, Variants, describe_key
from quantcli.cli.configuration.passes import OTHER_TYPES, PASSES
from quantcli.cli.configuration.searchable import SEARCHABLE
from quantcli.cli.configuration.workflows import BESIDE, DATA, INPUT_MODEL, SYSTEM, WORKFLOW
from written_page import write_or_check

TARGET = Path(__file__).resolve().parents[1] / "docs" / "configurations.md"
INTRODUCTION = """\
# Pass configurations

Written by `scripts/make_configuration_docs.py` from the table that reads them; a test compares.

`quantcli quantize -m MODEL -o OUT --config FILE` (or `-c FILE`) takes the JSON that Olive's users have:

```json
{
    "type": "GptqQuantizer", // comments are fine
    "bits": 4,
    "desc_act": true,
    "data_config": "wikitext2_train"
}
```

- one pass, as above; or named passes, `"gptq": {"type": "GptqQuantizer", …}`, with or without braces around them;
- or a workflow with `"passes"`. Passes in a row become one command where it can say them: QuaRot, then GptqQuantizer is
  `-a quarot,gptq`. Conversions, adapters and the like are refused, each with the command that does it.

What the file says is turned into flags, which a run shows, and the flags on the command line win. `quantcli.json` keeps
the options as resolved, the file's name and its digest.

- A key that is not given, `null`, empty or `"DEFAULT_VALUE"` leaves the default of quantcli, which may be another than
  Olive's: a group has 64 columns here.
- `"SEARCHABLE_VALUES"` and lists of values ask for a search: `quantcli tune -m MODEL -o OUT --config FILE` runs it, and
  quantize refuses them. What is searched stands [below](#what-is-searched), the evaluators of a workflow in
  [tuning.md](tuning.md).
- With `--backend NAME` the pass is run by that package: `IncQuantization` by `inc`, `NVModelOptQuantization` by
  `nvmo`, `AimetQuantization` with its techniques by `aimet`. Without it, by quantcli's own code. See
  [backends.md](backends.md).
- An unknown key is an error that names the nearest one. A key that asks for what cannot be changed here is taken with
  the value that holds anyway, and said; every other value is an error.
- `"data_config"` is an object, or a name under the workflow's `"data_configs"`. A name that is not defined needs a
  flag: `--data FILE`, `--data-name`, `--calibration-inputs` or `--user-script`, which also wins over what is defined.
- QuaRot with `a_bits`, `k_bits` or `v_bits` below 16 rotates online and evaluates: a checkpoint holds weights alone,
  numbers of few bits are simulated when it is scored.
"""


def rows(keys: Keys) -> Iterator[str]:
    yield from ("| key | value | here |", "|---|---|---|")
    for name, key in keys.items():
        yield f"| `{name}` | {key.kind} | {describe_key(key)} |"


def inner_tables(name: str, keys: Keys) -> Iterator[str]:
    """The tables of the objects inside."""
    for key, found in keys.items():
        if isinstance(found.to, Nested):
            inner = {k: v for k, v in found.to.keys.items() if k not in ("params", "config")}
            if key in ("config", "engine"):  # the same keys one level down
                continue
            yield f"`{key}` of {name}:"
            yield "\n".join(rows(inner))
            yield from inner_tables(f"`{key}`", inner)


def section(name: str, spec: Pass) -> Iterator[str]:
    means = f"Means `{' '.join(spec.words)}`"
    if spec.simulating:
        means += f", and `{' '.join(spec.simulating)}` where activations or the cache are rounded"
    yield f"{means}."
    yield "\n".join(rows(spec.keys))
    yield from inner_tables(name, spec.keys)


def around() -> Iterator[str]:
    tables: Mapping[str, Mapping[str, Key]] = {
        "the workflow": WORKFLOW,
        "`input_model`": INPUT_MODEL,
        "a system": SYSTEM,
        "a data configuration": DATA,
    }
    yield "## Around the passes"
    yield "Beside its own keys, and those under `config`, a pass may have:"
    yield "\n".join(rows(BESIDE))
    for name, keys in tables.items():
        yield f"Keys of {name}" + (", which may stand under `engine`, too:" if name == "the workflow" else ":")
        yield "\n".join(rows(keys))
        yield from inner_tables(name, keys)


def searched() -> Iterator[str]:
    yield "## What is searched"
    yield (
        'By `quantcli tune`: keys that say `"SEARCHABLE_VALUES"`, by these values; keys with a list of values, by the '
        "list; and, where a pass of one of these types chooses nothing, all of its keys here. With "
        '`"disable_search": true`, none.'
    )
    lines = ["| type | key | values | only with |", "|---|---|---|---|"]
    for kind, keys in SEARCHABLE.items():
        for key, found in keys.items():
            values = ", ".join(f"`{json.dumps(v)}`" for v in found.values)
            when = "; ".join(f"`{k}` {' or '.join(map(str, v))}" for k, v in found.when.items())
            lines.append(f"| `{kind}` | `{key}` | {values} | {when} |")
    yield "\n".join(lines)


def page() -> str:
    parts = [INTRODUCTION.rstrip(), "## Types"]
    parts.append("The case of a type does not matter.")
    for name, spec in PASSES.items():
        parts.append(f"### {name}")
        if isinstance(spec, Variants):
            for chosen, variant in spec.passes.items():
                default = ", the default" if chosen == spec.default else ""
                parts.append(f'With `"{spec.key}": "{chosen}"`{default}:')
                parts += section(name, variant)
        else:
            parts += section(name, spec)
    parts += around()
    parts += searched()
    parts += ["## Types that are refused", "| type | why |\n|---|---|"]
    parts[-1] += "".join(f"\n| `{name}` | {describe(refused)} |" for name, refused in OTHER_TYPES.items())
    return "\n\n".join(parts) + "\n"


def main() -> None:
    write_or_check(TARGET, page())


if __name__ == "__main__":
    main()
