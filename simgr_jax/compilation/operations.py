"""Floating-point operations of one instruction: matrix products, in any form that the compiler gives them."""

from __future__ import annotations

import json
import math
import re

import numpy as np

from simgr_jax.compilation.hlo import Computation, Instruction, Module

# Custom calls of the TPU compiler that compute nothing.
BOOKKEEPING = frozenset(
    (
        "AllocateBuffer",
        "AssumeGatherIndicesInBound",
        "AsyncCollectiveDone",
        "AsyncCollectiveStart",
        "ConcatBitcast",
        "GatherScatterIndicesBitpacked",
    )
)


def flops(module: Module, computation: Computation, instruction: Instruction) -> tuple[float, frozenset[str]]:
    """The operations of a matrix product, a convolution or a kernel, or of those fused into the instruction.

    A multiply-add counts as two operations; elementwise operations are not counted.

    Returns:
      The number of operations, and the names of kernels of unknown cost.
    """
    if instruction.opcode in ("dot", "convolution"):
        count = {"dot": _dot, "convolution": _convolution}[instruction.opcode]
        return count(computation, instruction), frozenset()
    if instruction.opcode == "custom-call" and instruction.call_target not in BOOKKEEPING:
        known = _kernel(computation, instruction)
        return (known or 0.0), frozenset([_kernel_name(instruction)] if known is None else [])
    if instruction.opcode == "fusion":
        fused = module.computations[instruction.called("calls")[0]]
        counts = [flops(module, fused, inner) for inner in fused.instructions.values()]
        return sum(count for count, _ in counts), frozenset().union(*(unknown for _, unknown in counts))
    return 0.0, frozenset()


def _dot(computation: Computation, dot: Instruction) -> float:
    left = computation.operands(dot)[0].type
    contracted = re.findall(r"\d+", dot.attribute("lhs_contracting_dims") or "")
    return 2.0 * dot.type.elements * math.prod(left.dims[int(axis)] for axis in contracted)


def _convolution(computation: Computation, convolution: Instruction) -> float:
    """Counts only window positions that meet an input.

    The TPU compiler turns batched matrix products into convolutions. Batch axes become spatial axes, padded or dilated
    so that most window positions meet no input.
    """
    left, kernel = (operand.type for operand in computation.operands(convolution)[:2])
    labels = re.split(r"_|->", convolution.attribute("dim_labels"))
    size = lambda shape, part, label: shape.dims[labels[part].index(label)]  # noqa: E731
    products = size(kernel, 1, "i") * size(convolution.type, 2, "b") * size(convolution.type, 2, "f")
    spatial = sorted(label for label in labels[0] if label.isdigit())
    window = _window(convolution.attribute("window") or "", len(spatial))
    for axis, label in enumerate(spatial):
        sizes = size(left, 0, label), size(kernel, 1, label), size(convolution.type, 2, label)
        products *= _meetings(*sizes, **{name: values[axis] for name, values in window.items()})
    return 2.0 * products


def _window(text: str, axes: int) -> dict[str, list[int]]:
    """Parses `{size=2x1 stride=2x1 pad=1_1x0_0}` into each option's values, one per axis, with defaults filled in."""
    said = dict(re.findall(r"(\w+)=([\d_x\-]+)", text))
    values = lambda name: said[name].split("x") if name in said else ["1"] * axes  # noqa: E731
    numbers = lambda name: [int(value) for value in values(name)]  # noqa: E731
    return {
        "stride": numbers("stride"),
        "padding": [int(pad.split("_")[0]) for pad in values("pad")] if "pad" in said else [0] * axes,
        "dilation": numbers("lhs_dilate"),
        "kernel_dilation": numbers("rhs_dilate"),
    }


def _meetings(
    inputs: int, kernel: int, outputs: int, *, stride: int, padding: int, dilation: int, kernel_dilation: int
) -> int:
    """The number of pairs (output, window position) that meet an input."""
    places = np.arange(outputs)[:, None] * stride - padding + np.arange(kernel) * kernel_dilation
    return int(np.count_nonzero((places >= 0) & (places % dilation == 0) & (places < inputs * dilation)))


def _kernel_name(call: Instruction) -> str:
    return call.name.rstrip("0123456789").rstrip(".") if call.call_target == "tpu_custom_call" else call.call_target


def _kernel(computation: Computation, call: Instruction) -> float | None:
    """A kernel's own estimate, or ours for a kernel without one; None if there is neither."""
    if found := re.search(r'"cost_estimate":(\{[^{}]*\})', call.attributes):
        return float(json.loads(found[1])["flops"])
    if found := re.match(r"splash_m[hq]a_(fwd|dq|dkv)", call.name):
        return _splash_attention(computation, call, found[1])
    return None


def _splash_attention(computation: Computation, call: Instruction, part: str) -> float:
    """The products of splash attention over the blocks of queries and keys that its mask keeps.

    The forward pass computes scores and outputs. The scores are computed again for the gradients of the queries, and
    once more for those of the keys and values. The kernel's first operand lists the blocks of keys that each block of
    queries sees: [1, blocks, most blocks seen] or with the last two axes swapped. The mask is causal.
    """
    mask, *operands = [operand.type for operand in computation.operands(call)]
    queries = next(array for array in operands if array.dtype in ("bf16", "f32"))
    length, width = queries.dims[-2:]
    blocks, seen = max(mask.dims[1:]), min(mask.dims[1:])
    pairs = sum(min(block + 1, seen) for block in range(blocks)) * (length / blocks) ** 2
    products = {"fwd": 2, "dq": 3, "dkv": 4}[part]
    if part == "dkv" and re.search(r"use_fused_bwd_kernel\W+true", call.attributes):
        products = 5  # It also computes the queries' gradient.
    return 2.0 * products * math.prod(queries.dims[:-2]) * pairs * width
