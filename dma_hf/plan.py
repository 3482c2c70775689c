"""Everything that is decided before a launch, from the device, the formats and the shape."""

from __future__ import annotations

from dataclasses import dataclass, replace

from torch import Tensor

from .config import DMAConfig
from .kernels.hopper import why_not_hopper
from .policy import OperandKind, device_capability, interpreting, operand_kind
from .tuning import REPAIR_BLOCKS, Blocks, choose_blocks


@dataclass(frozen=True)
class Plan:
    """How the kernels compute one call.

    Attributes:
        low_kind, high_kind: what the tensor core multiplies in low and in high tiles.
        blocks: block sizes and launch options of the attention kernel.
        use_tma: load K and V with the copy engine (sm_90 and later), where their layout allows it.
        via_memory: keep the quantised query in shared memory (sm_90), see
            `kernels.attention._through_memory`.
    """

    low_kind: OperandKind
    high_kind: OperandKind
    blocks: Blocks
    use_tma: bool
    via_memory: bool


def make_plan(
    config: DMAConfig,
    capability: int,
    head_dim: int,
    value_dim: int,
    element_size: int,
    masked: bool = False,
) -> Plan:
    """The plan for a GPU of compute capability `capability` (90 for sm_90).

    Args:
        config: formats and tile.
        head_dim, value_dim: D and Dv.
        element_size: bytes of an element of V.
        masked: whether a mask is loaded tile by tile.
    """
    low_kind, high_kind = operand_kind(config.low, capability), operand_kind(config.high, capability)
    return Plan(
        low_kind,
        high_kind,
        choose_blocks(capability, head_dim, value_dim, element_size, low_kind, config.tile, masked),
        use_tma=capability >= 90 and not interpreting(),
        via_memory=capability == 90,
    )


def hopper_serves(config: DMAConfig, query: Tensor, key: Tensor, value: Tensor, causal: bool) -> bool:
    """Whether the kernel for Hopper serves a call without modifiers; the portable one serves any."""
    if interpreting():
        return False
    return why_not_hopper(device_capability(query.device), config, query, key, value, causal) is None


def plan_repair(query: Tensor, value: Tensor, config: DMAConfig) -> Plan:
    """The plan for the portable kernel where it only repairs what another kernel left out.

    Hardly ever does it do anything, so it is cheap to launch, for the host and for the GPU: no descriptors of
    the copy engine, and programs that are small and few.
    """
    return replace(plan_call(query, value, config), blocks=REPAIR_BLOCKS, use_tma=False)


def plan_call(
    query: Tensor, value: Tensor, config: DMAConfig, *, masked: bool = False, fp8_value: bool = False
) -> Plan:
    """The plan for one call on the device of its tensors.

    Args:
        masked: whether a mask is loaded tile by tile.
        fp8_value: whether V is multiplied as FP8.
    """
    capability = device_capability(query.device)
    # float32 inputs need their room also where V is FP8: K may stay as given
    element_size = 1 if fp8_value and value.element_size() == 2 else value.element_size()
    return make_plan(config, capability, query.shape[-1], value.shape[-1], element_size, masked)
