"""Operations of a traced function before compilation: what the model needs by its definition."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

from jax.extend import core


def matmul_flops(jaxpr: core.ClosedJaxpr | core.Jaxpr) -> int:
    """The operations of the matrix products in `jax.make_jaxpr(function)(...)`; a multiply-add counts as two.

    A scan's body counts once per iteration, and a conditional counts as its most expensive branch.

    Raises:
      ValueError: the jaxpr contains a kernel or a per-device computation, whose operations cannot be counted.
    """
    if isinstance(jaxpr, core.ClosedJaxpr):
        jaxpr = jaxpr.jaxpr
    return sum(_equation(equation) for equation in jaxpr.eqns)


def _equation(equation) -> int:
    name = equation.primitive.name
    if name in ("pallas_call", "shard_map"):
        raise ValueError(f"jaxpr: contains {name}; trace the function without kernels and without a mesh")
    if name in ("dot_general", "ragged_dot_general"):
        return _dot(name, equation)
    inner = [matmul_flops(jaxpr) for jaxpr in _jaxprs(equation.params)]
    if name == "cond":
        return max(inner)
    return sum(inner) * equation.params["length"] if name == "scan" else sum(inner)


def _dot(name: str, equation) -> int:
    """Each element of the left array takes part in one multiply-add for each free index of the right array."""
    left, right = (variable.aval.shape for variable in equation.invars[:2])
    if name == "dot_general":
        (_, contracted), (_, batch) = equation.params["dimension_numbers"]
        shared = (*contracted, *batch)
    else:
        numbers = equation.params["ragged_dot_dimension_numbers"]
        (_, contracted), (_, batch) = numbers.dot_dimension_numbers
        shared = (*contracted, *batch, *numbers.rhs_group_dimensions)
    free = [size for axis, size in enumerate(right) if axis not in shared]
    return 2 * math.prod(left) * math.prod(free)


def _jaxprs(parameters: dict[str, Any]) -> Iterator[core.ClosedJaxpr | core.Jaxpr]:
    for value in parameters.values():
        for one in value if isinstance(value, (tuple, list)) else [value]:
            if isinstance(one, (core.ClosedJaxpr, core.Jaxpr)):
                yield one
