"""Operations of a traced function, before any compiler: what the model needs, by its own definition."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

from jax.extend import core


def matmul_flops(jaxpr: core.ClosedJaxpr | core.Jaxpr) -> int:
    """Of the matrix products in `jax.make_jaxpr(function)(...)`, a multiplication and an addition each.

    A scan counts as often as it turns, a condition as the branch that has the most.

    Raises:
      ValueError: there is a kernel, or a computation for one device of many, of which this can't be told.
    """
    if isinstance(jaxpr, core.ClosedJaxpr):
        jaxpr = jaxpr.jaxpr
    return sum(_equation(equation) for equation in jaxpr.eqns)


def _equation(equation) -> int:
    name = equation.primitive.name
    if name in ("pallas_call", "shard_map"):
        raise ValueError(f"{name} in the jaxpr: trace the function without kernels and without a mesh")
    if name in ("dot_general", "ragged_dot_general"):
        return _dot(name, equation)
    inner = [matmul_flops(jaxpr) for jaxpr in _jaxprs(equation.params)]
    if name == "cond":
        return max(inner)
    return sum(inner) * equation.params["length"] if name == "scan" else sum(inner)


def _dot(name: str, equation) -> int:
    """Every element of the left is multiplied with all that the right has for its place in the product."""
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
