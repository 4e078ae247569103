"""Weight-only configurations in the shape of Intel's `onnx_neural_compressor.config`, and the set that is tried first.

A field may hold a list of values: `expand` makes one configuration of each combination. What is different: None leaves
our own default, which is the better one (actorder and mse of GPTQ).
"""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields, replace
from itertools import product
from typing import Any

from quantcli.errors import UsageError
from quantcli.onnx.quantizer import (
    AWQWeightOnlyQuantConfig,
    CalibrationDataReader,
    GPTQWeightOnlyQuantConfig,
    MatMulNBitsQuantizer,
    RTNWeightOnlyQuantConfig,
    WeightOnlyQuantConfig,
)

__all__ = ["AWQConfig", "BaseConfig", "GPTQConfig", "RTNConfig", "expand", "get_woq_tuning_config"]


@dataclass(kw_only=True)
class BaseConfig(ABC):
    """What all algorithms share; any field may hold a list of values to try."""

    name: str = ""
    """How trials of it are called; empty: by its values."""
    weight_dtype: Any = "int"
    """Only int."""
    weight_bits: Any = 4
    """1 to 8."""
    weight_group_size: Any = 32
    """Columns that share a scale, -1 for one per row."""
    weight_sym: Any = True
    """Whether zero points are fixed in the middle."""
    act_dtype: Any = "fp32"
    """Only fp32: activations stay float."""
    accuracy_level: Any = 0
    """Attribute of MatMulNBits, 0 to 4."""
    quant_last_matmul: Any = True
    """Quantize products with no other product behind them, such as a language model's output head."""
    nodes_to_exclude: Sequence[str] | None = None
    """Names of nodes that stay float."""

    @abstractmethod
    def algorithm(self, reader: CalibrationDataReader | None) -> WeightOnlyQuantConfig:
        """The algorithm as the quantizer takes it."""

    def quantizer(self, model: Any, reader: CalibrationDataReader | None) -> MatMulNBitsQuantizer:
        """A quantizer of the graph by this configuration.

        Args:
            model: ModelProto, or the path of its file.
            reader: Gives calibration inputs.

        Raises:
            UsageError: values that cannot be.
            InputError: the file is no ONNX graph.
        """
        for name, only in (("weight_dtype", "int"), ("act_dtype", "fp32")):
            if getattr(self, name) != only:
                raise UsageError(f"{name} is {only} with weights alone, got {getattr(self, name)!r}")
        algorithm = self.algorithm(reader)
        algorithm.quant_last_matmul = self.quant_last_matmul
        return MatMulNBitsQuantizer(
            model,
            bits=self.weight_bits,
            block_size=self.weight_group_size,
            is_symmetric=self.weight_sym,
            accuracy_level=self.accuracy_level,
            nodes_to_exclude=self.nodes_to_exclude,
            algo_config=algorithm,
        )

    def __str__(self) -> str:
        """Its name, or what is not as it is by default."""
        if self.name:
            return self.name
        changed = [f"{f.name}={v}" for f in fields(self) if (v := getattr(self, f.name)) != f.default]
        return f"{type(self).__name__}({', '.join(changed)})"


@dataclass(kw_only=True)
class RTNConfig(BaseConfig):
    """Round to nearest."""

    ratios: dict[str, float] | None = None
    """Share of the range that the grid spans, by the name of a weight."""

    def algorithm(self, reader: CalibrationDataReader | None) -> WeightOnlyQuantConfig:
        """Without data."""
        return RTNWeightOnlyQuantConfig(ratios=self.ratios)


@dataclass(kw_only=True)
class GPTQConfig(BaseConfig):
    """GPTQ."""

    percdamp: Any = 0.01
    """Share of the Hessian's mean diagonal that is added to it."""
    block_size: Any = 128
    """Columns between two feedbacks; results do not depend on it."""
    actorder: Any = None
    """Columns by falling importance."""
    mse: Any = None
    """Search the range of each block."""
    perchannel: Any = True
    """Only true."""
    layer_wise_quant: Any = False
    """Quantize in the order in which inputs flow."""

    def algorithm(self, reader: CalibrationDataReader | None) -> WeightOnlyQuantConfig:
        """On what the reader gives."""
        return GPTQWeightOnlyQuantConfig(
            calibration_data_reader=reader,
            percdamp=self.percdamp,
            block_size=self.block_size,
            actorder=self.actorder,
            mse=self.mse,
            perchannel=self.perchannel,
            layer_wise=self.layer_wise_quant,
        )


@dataclass(kw_only=True)
class AWQConfig(BaseConfig):
    """AWQ."""

    enable_auto_scale: Any = True
    """Search the scales."""
    enable_mse_search: Any = True
    """Search each block's range."""

    def algorithm(self, reader: CalibrationDataReader | None) -> WeightOnlyQuantConfig:
        """On what the reader gives."""
        return AWQWeightOnlyQuantConfig(
            calibration_data_reader=reader,
            enable_auto_scale=self.enable_auto_scale,
            enable_mse_search=self.enable_mse_search,
        )


def get_woq_tuning_config() -> list[BaseConfig]:
    """The five that are tried first, in this order: 4 bits with zero points."""
    return [
        RTNConfig(name="RTN_G32ASYM", weight_group_size=32, weight_sym=False),
        GPTQConfig(name="GPTQ_G32ASYM", weight_group_size=32, weight_sym=False),
        GPTQConfig(
            name="GPTQ_G32ASYM_DISABLE_LAST_MATMUL", weight_group_size=32, weight_sym=False, quant_last_matmul=False
        ),
        GPTQConfig(name="GPTQ_G128ASYM", weight_group_size=128, weight_sym=False),
        AWQConfig(name="AWQ_G32ASYM", weight_group_size=32, weight_sym=False),
    ]


def expand(configs: BaseConfig | Iterable[BaseConfig]) -> list[BaseConfig]:
    """One configuration for each combination of the values that fields list, in order.

    Raises:
        UsageError: no configuration, or something else.
    """
    listed = [configs] if isinstance(configs, BaseConfig) else list(configs)
    odd = next((c for c in listed if not isinstance(c, BaseConfig)), None)
    if odd is not None or not listed:
        got = "nothing" if odd is None else type(odd).__name__
        raise UsageError(f"config_set is a configuration or a list of them, got {got}", hint="RTNConfig, GPTQConfig, …")
    found: list[BaseConfig] = []
    for config in listed:
        lists = {
            f.name: v
            for f in fields(config)
            if isinstance(v := getattr(config, f.name), list) and f.name != "nodes_to_exclude"
        }
        combined = product(*lists.values())
        found += [replace(config, **dict(zip(lists, values, strict=True))) for values in combined]
    return found
