"""Shows readers what `quantize` writes, each in an environment of its own, and keeps what they made of it.

    python -m interop.run [READER ...] [--families NAME ...] [--formats NAME ...] [--folder DIR]

Folders, answers and logs stay in DIR; what has an answer there is not asked again. What results.json says of folders
that are not asked about stays there.
"""

import argparse
import datetime
import json
import shutil
from pathlib import Path

import numpy as np
import torch

import quantcli
from interop.environments import READERS, answers, make, versions
from interop.folders import CASES, FAMILIES, TOKENS, folder_name, write_folder, write_models
from interop.matrix import Answer, page_with, read_results, table, write_results
from quantcli.errors import QuantcliError
from quantcli.options import CaptureOptions
from quantcli.pipelines import capture

PAGE = Path(__file__).resolve().parents[2] / "docs" / "formats.md"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("readers", nargs="*", metavar="READER", help=", ".join(READERS))
    parser.add_argument("--families", nargs="*", choices=FAMILIES, default=list(FAMILIES))
    parser.add_argument("--formats", nargs="*", choices=sorted({c.format for c in CASES}))
    parser.add_argument("--folder", type=Path, default=Path("build/interop"), help="where environments and folders are")
    options = parser.parse_args()
    root = options.folder.absolute()
    models = write_models(root / "models", tuple(options.families))
    wanted = [
        (case, family)
        for case in CASES
        for family in case.families
        if family in options.families and (not options.formats or case.format in options.formats)
    ]
    written, ours = {}, {}
    for case, family in wanted:
        name = folder_name(case, family)
        written[name] = write_folder(case, family, models, root / "folders")
        ours[name] = our_log_probabilities(written[name], root / "ours" / f"{name}.npy")
    kept, told, _ = read_results()
    for reader in options.readers or READERS:
        process = READERS[reader]
        asked = {folder_name(c, f): (c, f) for c, f in wanted if c.format in process.formats}
        python = make(process.environment, root)
        told[reader] = ", ".join(f"{name} {version}" for name, version in versions(reader, python).items())
        results = root / "answers" / reader
        results.mkdir(parents=True, exist_ok=True)
        folders = {name: shown(written[name], root, name, results, process.through_graph) for name in asked}
        job = {"ids": TOKENS, "folders": {n: str(f) for n, f in folders.items() if f}, "results": str(results)}
        (results / "job.json").write_text(json.dumps(job))
        print(f"{reader}: {len(asked)} folders", flush=True)
        answers(reader, python, results / "job.json", root / f"{reader}.log")
        for name, (case, family) in asked.items():
            answer = Answer(reader, family, case.format, case.name, *judged(results, name, ours[name], root))
            print(f"  {name}: {answer.verdict} {answer.error or answer.refusal}", flush=True)
            same = (reader, family, case.format, case.name)
            kept = [a for a in kept if (a.reader, a.family, a.format, a.case) != same] + [answer]
        date = datetime.datetime.now(datetime.UTC).date().isoformat()
        told = {name: told[name] for name in READERS if name in told}
        write_results(kept, told, date)
        PAGE.write_text(page_with(PAGE.read_text(), table(*read_results())))


def our_log_probabilities(folder: Path, file: Path) -> np.ndarray:
    """What `quantcli.load` answers, kept in a file."""
    if not file.is_file():
        file.parent.mkdir(parents=True, exist_ok=True)
        with torch.no_grad():
            logits = quantcli.load(folder, device="cpu")(torch.tensor([TOKENS])).logits[0, :-1]
        np.save(file, logits.double().log_softmax(-1).numpy())
    return np.load(file)


def shown(folder: Path, root: Path, name: str, results: Path, through_graph: bool) -> Path | None:
    """What a reader is shown of a folder; None where there is no graph of it, which is the answer."""
    if not through_graph:
        return folder
    output = root / "graphs" / name
    if not output.is_dir():
        try:
            capture.run(CaptureOptions(str(folder), output))
        except QuantcliError as error:
            (results / f"{name}.error").write_text(f"capture-onnx-graph: {error.message}\n")
            shutil.rmtree(output, ignore_errors=True)
            return None
    return output / "model"


def judged(results: Path, name: str, ours: np.ndarray, root: Path) -> tuple[float | None, str | None]:
    """Relative error and refusal, in which nothing says where `root` is; one of them is None."""
    if (results / f"{name}.error").is_file():
        said = (results / f"{name}.error").read_text().partition("\n\nTraceback")[0]
        return None, " ".join(said.replace(f"{root}/", "").split())[:240]
    theirs = np.load(results / f"{name}.npy")
    width = min(theirs.shape[1], ours.shape[1])
    a, b = (x[:, :width] - x[:, :width].mean(-1, keepdims=True) for x in (theirs, ours))
    error = float(np.linalg.norm(a - b) / np.linalg.norm(b))
    return (round(error, 7) if np.isfinite(error) else 1e9), None


if __name__ == "__main__":
    main()
