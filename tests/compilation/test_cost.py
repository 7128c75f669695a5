"""Costs of modules compiled for 8 devices, compared with costs computed by hand."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from simgr_jax.compilation.cost import cost
from simgr_jax.compilation.jaxpr import matmul_flops
from tests.compilation.modules import B, D, F, L

pytestmark = pytest.mark.usefixtures("optimized_programs")

needs_libtpu = pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed")

FLOAT = 4
# All layers on one device: 64 rows over 4 devices, two products per layer.
FORWARD = L * 2 * (2 * B // 4 * D * F)


@pytest.fixture(scope="module", params=["cpu:8", pytest.param("v5e:2x4", marks=needs_libtpu)])
def costs(request, root):
    """The costs printed by `tests.compilation.modules`."""
    command = [sys.executable, "-m", "tests.compilation.modules", request.param]
    result = subprocess.run(command, cwd=root, capture_output=True, text=True, env=os.environ)
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout) | {"topology": request.param}


def test_a_loop_counts_once_per_iteration(costs):
    assert costs["forward"]["flops"] == FORWARD
    assert costs["forward"]["collectives"] == {}


def test_a_product_has_two_gradients_and_remat_repeats_the_first_products(costs):
    assert costs["gradient"]["flops"] == 3 * FORWARD
    assert costs["recomputed"]["flops"] == 3.5 * FORWARD


def test_data_parallel_gradients_are_summed_once_per_layer(costs):
    weights = 2 * D * F * FLOAT
    assert costs["gradient"]["collectives"] == {"all-reduce": [L, L * 2 * weights * 3 / 4]}


def test_tensor_parallel_layers_share_the_work_and_sum_their_outputs(costs):
    assert costs["tensor_parallel"]["flops"] == FORWARD / 2
    assert costs["tensor_parallel"]["collectives"] == {"all-reduce": [L, L * 2 * (B // 4 * D * FLOAT) / 2]}


def test_every_kind_of_collective_is_counted_in_loops(costs):
    own = 8 * 128 * FLOAT  # A device's rows.
    counted = costs["collectives"]["collectives"]
    assert counted["all-gather"] == [5, 5 * own * 3]
    assert counted["collective-permute"] == [5, 5 * own]
    assert counted["all-to-all"] == [5, 5 * own * 3 / 4]
    over_all = 5 * 2 * own * 7 / 8
    if costs["topology"].startswith("cpu"):
        assert counted["reduce-scatter"] == [5, 5 * 4 * own * 3 / 4]
        assert counted["all-reduce"] == [5, over_all]
    else:  # For so little data, the TPU compiler uses an all-reduce and slices the result.
        assert counted["all-reduce"] == [10, over_all + 5 * 2 * 4 * own * 3 / 4]


def test_memory_traffic_is_at_least_the_weights_and_not_much_more(costs):
    read = L * 2 * D * F * FLOAT
    # Weights are read once, possibly after rounding to bfloat16; on CPUs, activations are in memory as well.
    assert read <= costs["forward"]["memory_bytes"] <= 4 * read
    half = costs["tensor_parallel"]["memory_bytes"] / costs["forward"]["memory_bytes"]
    assert half == pytest.approx(0.5, abs=0.05)


def test_nothing_is_uncounted(costs):
    assert all(one["uncounted"] == {} for name, one in costs.items() if name != "topology")


@settings(max_examples=10, deadline=None)
@given(
    sizes=st.lists(st.integers(2, 5), min_size=5, max_size=5),
    turns=st.integers(2, 4),
    product=st.sampled_from(["abc,acd->abd", "abc,adc->abd", "abc,bcd->acd", "abcd,abde->abce", "ab,bc->ac"]),
)
def test_compiled_and_traced_operations_agree(sizes, turns, product):
    axes = dict(zip("abcde", sizes, strict=True))
    left, right = ([axes[axis] for axis in part] for part in product.split("->")[0].split(","))
    arguments = jnp.ones([turns, *left]), jnp.ones(right)

    def repeated(lefts, right):
        return jax.lax.scan(lambda carry, left: (carry, jnp.tanh(jnp.einsum(product, left, right))), 0.0, lefts)[1]

    by_hand = turns * 2 * np.prod([axes[axis] for axis in set(product) - set(",->")])
    assert matmul_flops(jax.make_jaxpr(repeated)(*arguments)) == by_hand
    assert cost(jax.jit(repeated).lower(*arguments).compile().as_text()).flops == by_hand


@settings(max_examples=10, deadline=None)
@given(
    size=st.integers(3, 7),
    kernel=st.integers(1, 3),
    stride=st.integers(1, 2),
    padding=st.tuples(st.integers(0, 2), st.integers(0, 2)),
    dilation=st.integers(1, 3),
    kernel_dilation=st.integers(1, 2),
    layouts=st.sampled_from([("NHWC", "HWIO", "NHWC"), ("WNHC", "IWHO", "HCNW")]),
)
def test_a_convolution_counts_window_positions_that_meet_an_input(
    size, kernel, stride, padding, dilation, kernel_dilation, layouts
):
    def convolve(x, window):
        return jax.lax.conv_general_dilated(
            x,
            window,
            (stride, 1),
            (padding, (0, 0)),
            (dilation, 1),
            (kernel_dilation, 1),
            dimension_numbers=layouts,
        )

    sizes = {"N": 2, "H": size + 2, "W": 5, "C": 3}, {"H": kernel, "W": 2, "I": 3, "O": 4}
    arguments = [jnp.ones([of[axis] for axis in layout]) for of, layout in zip(sizes, layouts, strict=False)]
    # With all ones, each product adds one.
    products = float(convolve(*arguments).sum())
    assert cost(jax.jit(convolve).lower(*arguments).compile().as_text()).flops == 2 * products


def test_a_slice_and_an_update_count_only_the_rows_they_move():
    table, rows = jnp.ones((1000, 8)), jnp.ones((3, 8))

    def update(table, rows, index):
        return jax.lax.dynamic_update_slice(table, rows * 2, (index, 0))

    def cut(table, index):
        return jax.lax.dynamic_slice(table, (index, 0), (3, 8)) * 2

    def traffic(function, *arguments, **options):
        return cost(jax.jit(function, **options).lower(*arguments).compile().as_text()).memory_bytes

    own = 3 * 8 * FLOAT
    assert traffic(cut, table, jnp.int32(4)) == pytest.approx(2 * own, abs=16)
    assert traffic(update, table, rows, jnp.int32(4), donate_argnums=0) == pytest.approx(2 * own, abs=16)
    assert traffic(lambda table, rows: table[rows], table, jnp.arange(5)) == pytest.approx(2 * 5 * 8 * FLOAT, abs=200)
