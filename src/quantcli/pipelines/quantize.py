"""`quantcli quantize`: read a block, quantize it, write its shard, forget it; then the next."""

import json
import time
from collections.abc import Sequence
from copy import deepcopy
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from quantcli import __version__
from quantcli.algorithms import find
from quantcli.data.calibration import calibration_rows
from quantcli.errors import InputError
from quantcli.evaluate.speed import peak_memory
from quantcli.folder import Manifest, PartialFolder, create_output, describe_parent, public_options, write_json
from quantcli.formats import CODECS
from quantcli.formats.codec import Codec, Described
from quantcli.models.block import BlockCall, block_stages
from quantcli.models.checkpoint import CheckpointWriter, copy_companions, write_tensors
from quantcli.models.folds import Fold, divide_rows, find_folds, folded_norm
from quantcli.models.layout import is_linear, is_transposed
from quantcli.models.machine import Heap, settled_heap
from quantcli.models.paused import Pause, Shelf, study_pauses
from quantcli.models.rotate import RotatedCheckpoint
from quantcli.models.skeleton import disk_name
from quantcli.models.walk import StageMoments, embed_tokens, run_block
from quantcli.options import CalibrationOptions, QuantizeOptions
from quantcli.pipelines.loading import load_block, outside_loaded
from quantcli.pipelines.mixed import mix_bits
from quantcli.pipelines.plan import DTYPES, HELD_OUT_SHARE, Plan, Target
from quantcli.pipelines.planning import make_plan
from quantcli.pipelines.solve import LayerReport, read_weight, solve_linears
from quantcli.pipelines.train_rotation import RotationReport, see_through, train_rotations
from quantcli.progress import Progress, Silent, Task
from quantcli.tensors import grids
from quantcli.tensors.finite import all_finite
from quantcli.tensors.hessian import Statistics
from quantcli.tensors.quantized import NestedScale, QuantizedTensor

__all__ = ["QuantizeResult", "run"]


@dataclass(frozen=True)
class QuantizeResult:
    """What a run wrote and what it cost."""

    output: Path
    layers: list[LayerReport]
    seconds: float
    """Time of this run and of the interrupted ones that it continued."""
    peak_bytes: int
    """Memory above what the process held when the run began."""
    size_bytes: int
    """Bytes of the written weights."""
    parent_size_bytes: int
    bits_per_weight: float
    """Stored bits per quantized weight, scales and zeros included."""
    plan: dict[str, Any]
    training: RotationReport | None = None
    """How rotations were trained, where they were."""
    evaluation: Any = None

    def to_dict(self) -> dict[str, Any]:
        """For `--json`."""
        values = {k: v for k, v in self.__dict__.items() if k not in ("layers", "evaluation", "output", "training")}
        return {
            "output": str(self.output),
            **values,
            "layers": [asdict(layer) for layer in self.layers],
            "training": asdict(self.training) if self.training is not None else None,
            "evaluation": self.evaluation.to_dict() if self.evaluation is not None else None,
        }


def run(options: QuantizeOptions, progress: Progress | None = None) -> "QuantizeResult | Plan":
    """Quantizes a checkpoint; with `dry_run`, only the plan.

    Raises:
        QuantcliError: see `errors`; nothing half-written stays behind.
    """
    progress = progress or Silent()
    started = time.perf_counter()
    plan = make_plan(options)
    options = plan.options
    if options.dry_run:
        return plan
    if not plan.layout.known:
        progress.note(f"{plan.skeleton.config.model_type} is not in our table; its blocks were found by looking")
    with (
        create_output(
            options.output, plan=plan.identity(), inputs=[plan.folder], force=options.force, resumable=True
        ) as partial,
        peak_memory() as watched,
        settled_heap(),
        torch.inference_mode(),
    ):
        progress.plan("Plan", plan.rows())
        work = _Run(plan, partial, progress)
        work.train()
        plan = work.mix_bits()
        work.blocks()
        work.outside()
        companions = copy_companions(plan.folder, partial.model)
        if not any(name.startswith("tokenizer") for name in companions):
            progress.warn(f"{plan.folder} has no tokenizer; the output has none either")
        write_json(partial.model / "config.json", work.config())
        work.writer.finish(len(plan.layout.blocks) + 1)
        size = sum(p.stat().st_size for p in partial.model.glob("*.safetensors"))
        if size >= plan.checkpoint.size_bytes and plan.codec.unpack is not None:
            raise InputError(
                f"the result would take {size} bytes, the model takes {plan.checkpoint.size_bytes}",
                hint="use fewer bits or larger groups",
            )
        weights = [*plan.targets.values(), *([plan.embedding] if plan.embedding else [])]
        count = sum(t.rows * t.columns for t in weights)
        bits = 8.0 * plan.dtype.itemsize
        if weights:
            bits = sum(t.rows * t.columns * t.scheme.bits_per_weight(t.columns) for t in weights) / count
        result = QuantizeResult(
            output=options.output,
            layers=work.reports,
            seconds=work.seconds_before + time.perf_counter() - started,
            peak_bytes=watched.above_start_bytes,
            size_bytes=size,
            parent_size_bytes=plan.checkpoint.size_bytes,
            bits_per_weight=bits,
            plan=plan.to_dict(),
            training=work.training,
        )
        write_json(partial.root / "report.json", result.to_dict())
        metrics = {
            "seconds": round(result.seconds, 1),
            "peak_bytes": result.peak_bytes,
            "size_bytes": size,
            "bits_per_weight": round(bits, 4),
            "mean_relative_error": sum(r.relative_error for r in work.reports) / max(len(work.reports), 1),
        }
        parent = describe_parent(plan.folder, plan.model_digest)
        partial.commit(Manifest("checkpoint", "quantize", public_options(asdict(options)), parent, metrics))
    return replace(result, evaluation=_evaluate(options, progress)) if options.evaluate else result


def _evaluate(options: QuantizeOptions, progress: Progress) -> Any:
    from quantcli.options import EvaluateOptions
    from quantcli.pipelines import evaluate

    return evaluate.run(
        EvaluateOptions(
            str(options.output),
            options.model,
            device=options.device,
            trust_remote_code=options.trust_remote_code,
            simulation=options.simulation,
        ),
        progress,
    )


class _Run:
    """The loops of one run; its state is what a resumed run needs."""

    def __init__(self, plan: Plan, partial: PartialFolder, progress: Progress):
        self.plan = plan
        self.partial = partial
        self.progress = progress
        self.writer = CheckpointWriter(partial.model)
        self.reports: list[LayerReport] = []
        self.training: RotationReport | None = None
        self.hidden: list[Tensor] = []
        self.float_hidden: list[Tensor] | None = None
        self.done = 0
        self.seconds_before = 0.0
        self._started = time.perf_counter()
        self._held: set[int] = set()
        self._pauses: dict[tuple[Any, ...], dict[int, Pause]] = {}
        self._folds: dict[tuple[Any, ...], dict[str, Fold]] = {}
        self._edited: dict[str, Tensor] = {}
        """Tensors that stay float, as folds have changed them, by name on disk; until their block is written."""
        self._shelf: Shelf | None = None
        self._heap = Heap()
        self._norm: torch.nn.Module | None = None
        self._names = self._assign()
        self._log = partial.state / "progress.json"
        if partial.resumed and self._log.is_file():
            values = json.loads(self._log.read_text())
            self.done = values["done"]
            self.seconds_before = values["seconds"]
            self.reports = [LayerReport(**layer) for layer in values["layers"]]
            if self.done:
                progress.note(f"continuing after {self.done} finished blocks")

    def _assign(self) -> list[list[str]]:
        """Names on disk of the tensors of each block, and last of all the others."""
        plan, entries = self.plan, self.plan.checkpoint.entries
        state = plan.skeleton.state_dict(keep_vars=True)
        taken: set[str] = set()
        units: list[list[str]] = []
        for path in plan.layout.blocks:
            found = []
            for name in state:
                if name.startswith(path + "."):
                    disk = disk_name(name, plan.skeleton, entries)
                    if disk is None:
                        raise InputError(f"tensor {name} is missing from {plan.folder}")
                    found.append(disk)
            units.append(found)
            taken.update(found)
        units.append([name for name in entries if name not in taken])
        return units

    def config(self) -> dict[str, Any]:
        """config.json of the result."""
        plan = self.plan
        config = dict(plan.checkpoint.config)
        targets = plan.targets
        damp = getattr(plan.settings, "damp_percent", None)
        quantization = plan.codec.config(
            Described(
                plan.default,
                {t.stem: t.scheme for t in targets.values() if t.scheme != plan.default},
                [n for n in plan.layout.linears if n not in targets],
                desc_act=getattr(plan.settings, "order", "") == "desc_act",
                lm_head=plan.layout.head in targets,
                producer=f"quantcli:{__version__}",
                damp_percent=damp,
                quantized=list(targets),
                float_linears=[n for n, m in plan.skeleton.named_modules() if is_linear(m) and n not in targets],
                dtype=self._float_dtype(next(iter(targets.values()))) if targets else plan.dtype,
            )
        )
        if plan.embedding is not None and quantization is not None:
            scheme = plan.embedding.scheme
            quantization["quantcli"] = {
                "embedding": {
                    "name": plan.embedding.name,
                    "bits": scheme.bits,
                    "group_size": scheme.group_size,
                    "sym": scheme.symmetric,
                }
            }
        if quantization is not None:
            config["quantization_config"] = quantization
        if plan.untie_head:
            config["tie_word_embeddings"] = False
        if plan.options.dtype != "keep":
            config.pop("torch_dtype", None)
            config["dtype"] = plan.options.dtype
        return config if plan.online is None else plan.online.mark(config)

    def mix_bits(self) -> Plan:
        """Chooses the bits of each linear where a target asks for it; the plan as it is then."""
        if self.plan.budget is not None:
            self.plan = mix_bits(self.plan, self.partial.state, self._measured_tokens, self.progress)
            self._heap.settle()
        return self.plan

    def _measured_tokens(self) -> Tensor:
        """A few rows of calibration text, or, where the algorithm reads none, of text for this alone."""
        plan = self.plan
        if plan.source is not None:
            return self._saved_tokens()["rows"][: plan.measured_rows]
        return self._read_rows(plan.measured_text)

    # -- rotations ----------------------------------------------------------------------------------------------------

    def train(self) -> None:
        """Trains rotations where the plan has some to train, or takes those that an interrupted run has trained."""
        plan, checkpoint = self.plan, self.plan.checkpoint
        if plan.trained is None:
            return
        assert isinstance(checkpoint, RotatedCheckpoint)
        file, log = (self.partial.state / f"rotations.{suffix}" for suffix in ("safetensors", "json"))
        if file.is_file():
            saved = load_file(file)
            matrices = [saved[str(i)] for i in range(len(saved))]
            self.training = RotationReport(**json.loads(log.read_text()))
            if not self.done:
                self.progress.note("continuing with the rotations that the interrupted run has trained")
                self.seconds_before = self.training.seconds
        else:
            rows = self._saved_tokens()["rows"]
            matrices, self.training = train_rotations(
                checkpoint, plan.skeleton, plan.layout, rows, plan.trained, plan.device, self.progress
            )
            write_json(log, asdict(self.training))
            write_tensors({str(i): m.cpu().clone() for i, m in enumerate(matrices)}, file.with_suffix(".tmp"))
            file.with_suffix(".tmp").replace(file)
        self.plan = replace(plan, checkpoint=see_through(checkpoint, matrices))
        self._heap.settle()

    # -- blocks -------------------------------------------------------------------------------------------------------

    def blocks(self) -> None:
        """Quantizes and writes every block that an earlier run has not finished."""
        plan, count = self.plan, len(self.plan.layout.blocks)
        calls = self._begin_streams() if plan.calibrates and (self.done < count or self._head_needs_stream()) else {}
        self._heap.settle()  # tokenizer and embedding
        with self.progress.track("quantizing", count, start=self.done) as task:
            for number in range(self.done, count):
                begun = len(self.reports)
                if plan.calibrates:
                    results = self._calibrated_block(number, {size: c[number] for size, c in calls.items()}, task)
                else:
                    results = self._data_free([t for t in plan.targets.values() if self._in_block(t, number)])
                self._write(number, results)
                self._remember(number + 1)
                del results
                self._heap.settle()
                worst = max((r.relative_error for r in self.reports[begun:]), default=0.0)
                task.advance(1, f"worst error {worst:.2%}")
        self._shelf = None
        if not self._head_needs_stream():
            self.hidden, self.float_hidden = [], None
        self._heap.settle()

    def _in_block(self, target: Target, number: int) -> bool:
        return target.name.startswith(self.plan.layout.blocks[number] + ".")

    def _head_needs_stream(self) -> bool:
        return self.plan.layout.head in self.plan.targets

    def _begin_streams(self) -> dict[int, list[BlockCall]]:
        """Tokens through the embedding: the hidden states, or those that the interrupted run left."""
        plan, state = self.plan, self.partial.state
        saved = self._saved_tokens()
        tokens, batch = torch.cat([saved["rows"], saved["judges"]]), plan.options.calibration.batch_size
        self._held = self._held_out(len(saved["rows"]), len(tokens), batch)
        with outside_loaded(plan):
            norm = plan.layout.final_norm
            self._norm = deepcopy(plan.skeleton.get_submodule(norm)) if norm else None
            hidden, calls = embed_tokens(plan.skeleton, plan.layout, tokens.to(plan.device), batch)
        if self.done:
            kept = load_file(state / f"hidden-{self.done}.safetensors")
            hidden = [kept[f"hidden.{i}"].to(plan.device) for i in range(len(hidden))]
            if plan.options.correct_earlier:
                self.float_hidden = [kept[f"float.{i}"].to(plan.device) for i in range(len(hidden))]
        elif plan.options.correct_earlier:
            self.float_hidden = [h.clone() for h in hidden]
        self.hidden = hidden
        return calls

    def _saved_tokens(self) -> dict[str, Tensor]:
        """What `_tokens` gave this run or the interrupted one."""
        state = self.partial.state
        tokens_file = state / "tokens.safetensors"
        if tokens_file.is_file():
            saved: dict[str, Tensor] = load_file(tokens_file)
            return saved
        saved = self._tokens()
        write_tensors(saved, state / "tokens.tmp")
        (state / "tokens.tmp").replace(tokens_file)
        return saved

    def _tokens(self) -> dict[str, Tensor]:
        """Calibration rows, and rows that only judge: with `best` on other text, a little of the model's own."""
        plan, calibration = self.plan, self.plan.options.calibration
        rows = self._read_rows(calibration)
        judges = rows[:0]
        if plan.judges:
            judges = self._read_rows(plan.judge_text).reshape(plan.judges, calibration.seq_len)
        return {"rows": rows, "judges": judges}

    def _read_rows(self, text: CalibrationOptions) -> Tensor:
        plan = self.plan
        return calibration_rows(
            text,
            plan.folder,
            source=plan.source,
            model_digest=plan.model_digest,
            progress=self.progress,
            device=plan.device,
            trust_remote_code=plan.options.trust_remote_code,
        ).tokens

    def _held_out(self, rows: int, total: int, batch: int) -> set[int]:
        """Micro-batches that only judge: one in `HELD_OUT_SHARE` of the rows, and all text of the model's own."""
        batches, whole = -(-total // batch), rows // batch
        if not self.plan.holds_out or batches < 2:
            return set()
        step = max(2, min(HELD_OUT_SHARE, whole))
        return set(range(step - 1, whole, step)) | set(range(-(-rows // batch), batches))

    def _calibrated_block(self, number: int, calls: dict[int, BlockCall], task: Task) -> dict[str, QuantizedTensor]:
        plan = self.plan
        path = plan.layout.blocks[number]
        block = load_block(plan, number)
        reference = deepcopy(block) if plan.options.correct_earlier else None
        linears = [t.name.removeprefix(path + ".") for t in plan.targets.values() if self._in_block(t, number)]
        if self._shelf is None:
            self._shelf = Shelf(len(self.hidden) * (1 if reference is None else 2))
        first = self.hidden[0]
        stages = block_stages(block, linears, first, calls[len(first)])
        kind = (type(block), *map(tuple, stages))
        if kind not in self._pauses:
            self._pauses[kind] = study_pauses(block, stages, first, calls[len(first)])
            if plan.scaling is not None:
                config = plan.skeleton.config.get_text_config()
                head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
                self._folds[kind] = find_folds(block, stages, first, calls[len(first)], head_dim)
        folds = self._folds.get(kind, {})
        results: dict[str, QuantizedTensor] = {}

        def solve(names: list[str], moments: StageMoments | None) -> None:
            targets = [plan.targets[f"{path}.{name}"] for name in names]
            fold = folds.get(names[0])
            solved, scale = self._solve(targets, moments, (path, fold, results) if fold is not None else None)
            for target, tensor in solved.items():
                results[target] = tensor
                module = block.get_submodule(target.removeprefix(path + "."))
                weight = tensor.dequantize().to(module.weight.device)
                weight = (weight if scale is None else weight / scale).to(module.weight.dtype)
                module.weight.data.copy_(weight.T if plan.targets[target].transposed else weight)

        run_block(
            block,
            self.hidden,
            calls,
            stages,
            solve,
            held_out=self._held,
            keep=plan.keep_paused,
            pauses=self._pauses[kind],
            shelf=self._shelf,
            between=self._heap.watch,
            reference=reference,
            reference_inputs=self.float_hidden,
            path=path,
        )
        return results

    def _solve(
        self,
        targets: Sequence[Target],
        moments: StageMoments | None,
        place: tuple[str, Fold, dict[str, QuantizedTensor]] | None = None,
    ) -> tuple[dict[str, QuantizedTensor], Tensor | None]:
        """Quantizes linears that share an input.

        Args:
            targets: The linears.
            moments: Of their input, where tokens reached it.
            place: Path of their block, the fold of their input and what the block has of results, where an input may be
                scaled.

        Returns:
            What was computed, and [K] by which their columns were scaled beforehand, if they were.
        """
        plan = self.plan
        weights = {t.name: read_weight(plan.checkpoint, t, self._source_of(t)).to(plan.device) for t in targets}
        algorithm, settings, statistics = plan.algorithm, plan.settings, None
        if moments is not None and moments.train.tokens:
            held = moments.held_out if moments.held_out is not None and moments.held_out.tokens else None
            statistics = Statistics(
                moments.train.matrix(),
                moments.train.tokens,
                held_out=held.matrix() if held else None,
                held_out_tokens=held.tokens if held else 0,
                cross=moments.train.cross(),
                held_out_cross=held.cross() if held else None,
            )
        elif algorithm.calibration == "required":
            self.progress.warn(
                f"no calibration token reached {targets[0].name}; it is quantized by kquant, without data"
            )
            algorithm = find("kquant")
            settings = algorithm.options()
        scale = None
        if place is not None and statistics is not None:
            scale = self._scale(targets, list(weights.values()), statistics, *place)
        results, reports = solve_linears(targets, weights, algorithm, settings, statistics, scale)
        self.reports += reports
        return results, scale

    def _scale(
        self,
        targets: Sequence[Target],
        weights: Sequence[Tensor],
        statistics: Statistics,
        path: str,
        fold: Fold,
        results: dict[str, QuantizedTensor],
    ) -> Tensor | None:
        """The scale [K] of an input, if one helps; what makes the input is divided by it."""
        step = self.plan.scaling
        assert step is not None
        given = torch.arange(targets[0].columns) if fold.rows is None else fold.rows
        rows, shared = torch.unique(given.to(self.plan.device), return_inverse=True)
        found: Tensor | None = step.algorithm.run(
            weights, [t.scheme for t in targets], step.settings, statistics, shared
        )
        if found is None:
            return None
        producer = f"{path}.{fold.producer}"
        if fold.is_norm:
            gain, found = folded_norm(self._stored(f"{producer}.weight").to(found.device), found, fold.offset)
            self._edited[self._disk(f"{producer}.weight")] = gain.cpu()
        elif producer in results:
            results[producer] = grids.divide_rows(results[producer], rows, found)
        else:
            target = self._stored(f"{producer}.weight")
            transposed = is_transposed(self.plan.skeleton.get_submodule(producer))
            self._edited[self._disk(f"{producer}.weight")] = divide_rows(target, rows.cpu(), found.cpu(), transposed)
        if getattr(self.plan.skeleton.get_submodule(producer), "bias", None) is not None:
            bias = self._stored(f"{producer}.bias")
            self._edited[self._disk(f"{producer}.bias")] = divide_rows(bias, rows.cpu(), found.cpu())
        columns: Tensor = found[shared]
        return columns

    def _disk(self, name: str) -> str:
        disk = disk_name(name, self.plan.skeleton, self.plan.checkpoint.entries)
        assert disk is not None
        return disk

    def _stored(self, name: str) -> Tensor:
        """A tensor that stays float, as it will be written but for folds."""
        disk = self._disk(name)
        if disk in self._edited:
            return self._edited[disk]
        tensor = self.plan.checkpoint.read(disk)
        return tensor.to(self.plan.float_dtype(tensor.dtype))

    def _source_of(self, target: Target) -> str:
        """The tensor that a target is read from: a tied head is the embedding's."""
        if target.disk in self.plan.checkpoint.entries:
            return target.disk
        disk = disk_name(f"{self.plan.layout.embedding}.weight", self.plan.skeleton, self.plan.checkpoint.entries)
        assert disk is not None
        return disk

    def _data_free(self, targets: Sequence[Target]) -> dict[str, QuantizedTensor]:
        results: dict[str, QuantizedTensor] = {}
        for target in targets:
            results |= self._solve([target], None)[0]
        return results

    # -- the rest of the model ----------------------------------------------------------------------------------------

    def outside(self) -> None:
        """Writes embedding, norms and head, quantized where asked."""
        plan = self.plan
        results: dict[str, QuantizedTensor] = {}
        head = plan.targets.get(plan.layout.head or "")
        if head is not None:
            results |= self._solve_head(head)
        if plan.embedding is not None:
            target = plan.embedding
            weight = {target.name: read_weight(plan.checkpoint, target, target.disk).to(plan.device)}
            rtn = find("rtn")
            found, reports = solve_linears([target], weight, rtn, rtn.options(), None)
            self.reports += reports
            results |= found
        self._write(len(plan.layout.blocks), results)

    def _solve_head(self, head: Target) -> dict[str, QuantizedTensor]:
        if not self.plan.calibrates or self._norm is None:
            if self.plan.calibrates:
                self.progress.warn(
                    "the norm before the head is not known; the head is quantized by kquant, without data"
                )
            return self._data_free([head])
        from quantcli.tensors.hessian import Moments

        train, held = Moments(head.columns, self.plan.device), Moments(head.columns, self.plan.device)
        for index, hidden in enumerate(self.hidden):
            chosen = held if index in self._held else train
            other = self._norm(self.float_hidden[index]) if self.float_hidden is not None else None
            chosen.add(self._norm(hidden), other)
        return self._solve([head], StageMoments(train, held))[0]

    # -- writing ------------------------------------------------------------------------------------------------------

    def _write(self, number: int, results: dict[str, QuantizedTensor]) -> None:
        """Writes a shard, reads it back and compares: what is exported is what was computed."""
        plan = self.plan
        quantized = {t.disk: t for t in plan.targets.values() if t.name in results}
        if plan.embedding is not None and plan.embedding.name in results:
            quantized[plan.embedding.disk] = plan.embedding
        keep = DTYPES.get(plan.options.dtype)
        tensors: dict[str, Tensor] = {}
        for target in quantized.values():
            for part, tensor in self._packed(target, results[target.name]).items():
                tensors[f"{target.stem}.{part}"] = tensor
        for disk in self._names[number]:
            if disk in quantized:
                continue
            tensor = self._edited.pop(disk) if disk in self._edited else plan.checkpoint.read(disk)
            if tensor.is_floating_point():
                if not all_finite(tensor):
                    raise InputError(f"tensor {disk} holds NaN or infinite values", hint="download the model again")
                tensor = tensor.to(keep) if keep is not None else tensor
            tensors[disk] = tensor
        path = self.writer.write(number, tensors)
        del tensors
        written = load_file(path)
        for target in quantized.values():
            computed = results[target.name].to("cpu")
            packed = self._packed(target, computed)
            parts = {part: written[f"{target.stem}.{part}"] for part in packed}
            codec = self._codec(target)
            same = (
                torch.equal(parts["weight"], packed["weight"])
                if codec.unpack is None
                else _same(codec.unpack(parts, target.scheme), computed)
            )
            if not same:
                raise AssertionError(f"{path.name}: {target.stem} reads back other than it was computed")

    def _codec(self, target: Target) -> Codec:
        """Embeddings are stored as gptq stores linears."""
        return CODECS["gptq"] if target is self.plan.embedding else self.plan.codec

    def _packed(self, target: Target, result: QuantizedTensor) -> dict[str, Tensor]:
        """What is stored of one linear, by the last part of the name."""
        codec = self._codec(target)
        packed = codec.pack(result.to("cpu"), *([self._float_dtype(target)] if codec.takes_dtype else []))
        if codec.unpack is None and target.transposed:
            packed["weight"] = packed["weight"].T.contiguous()
        return packed

    def _float_dtype(self, target: Target) -> torch.dtype:
        """What a target would be written in if it stayed float."""
        return self.plan.float_dtype(self.plan.checkpoint.entries[self._source_of(target)].dtype)

    def _remember(self, done: int) -> None:
        """Notes that blocks up to `done` are finished, in an order that a kill at any instant leaves usable."""
        state = self.partial.state
        if self.hidden:
            tensors = {f"hidden.{i}": h.cpu() for i, h in enumerate(self.hidden)}
            if self.float_hidden is not None:
                tensors |= {f"float.{i}": h.cpu() for i, h in enumerate(self.float_hidden)}
            write_tensors(tensors, state / "hidden.tmp")
            (state / "hidden.tmp").replace(state / f"hidden-{done}.safetensors")
        seconds = self.seconds_before + time.perf_counter() - self._started
        layers = [asdict(layer) for layer in self.reports]
        write_json(self._log, {"done": done, "seconds": seconds, "layers": layers})
        (state / f"hidden-{done - 1}.safetensors").unlink(missing_ok=True)
        self.done = done


def _same(read: QuantizedTensor, computed: QuantizedTensor) -> bool:
    parts = ("codes", "zero", "scale", "group", "codebook", "nested")
    return all(_equal(getattr(read, p), getattr(computed, p)) for p in parts) and all_finite(read.scale)


def _equal(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor):
        return isinstance(b, Tensor) and torch.equal(a, b)
    if isinstance(a, NestedScale) and isinstance(b, NestedScale):
        return all(_equal(getattr(a, f.name), getattr(b, f.name)) for f in fields(a))
    return bool(a == b)
