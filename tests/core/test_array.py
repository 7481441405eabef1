"""The mlx shim and the helpers around namespaces, each against NumPy."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest

from steersman.core.array import (
    array_namespace,
    asarray_like,
    device_of,
    is_mlx,
    is_on_host,
    library_of,
    to_numpy,
    wide_dtype,
)

FLOATS = np.array([[1.5, -2.0, 1.5, 0.0], [3.0, 3.0, -np.inf, 7.25]], np.float32)
INTS = np.array([[3, -1, 3, 0], [-(2**31), 2**31 - 1, 5, 5]], np.int32)


def same(got, want, **tolerance):
    got = to_numpy(got)
    assert got.shape == np.shape(want)
    np.testing.assert_allclose(got, want, **tolerance)


@pytest.mark.parametrize("name", ["argmax", "argmin"])
@pytest.mark.parametrize("keepdims", [False, True])
@pytest.mark.parametrize("axis", [None, -1, 0])
def test_index_of_extremes_is_signed_and_the_first(lib, name, axis, keepdims):
    if axis is None and keepdims:
        pytest.skip("the standard leaves the shape to the library")
    got = getattr(lib.xp, name)(lib(FLOATS), axis=axis, keepdims=keepdims)
    same(got, getattr(np, name)(FLOATS, axis=axis, keepdims=keepdims))
    assert to_numpy(got - 10).min() < 0


@pytest.mark.parametrize("values", [FLOATS, INTS, INTS > 0], ids=["float", "int", "bool"])
@pytest.mark.parametrize("descending", [False, True])
def test_sorts_both_ways_and_keeps_ties_in_order(lib, values, descending):
    if lib.name == "strict" and values.dtype == np.bool_:
        pytest.skip("the standard sorts numbers only")
    x = lib(values, values.dtype)
    order = lib.xp.argsort(x, axis=-1, descending=descending, stable=True)
    key = values.astype(np.float64)
    want = np.argsort(-key if descending else key, axis=-1, kind="stable")
    same(order, want)
    assert to_numpy(order - 10).min() < 0
    got = lib.xp.sort(x, axis=-1, descending=descending)
    same(got, np.take_along_axis(values, want, axis=-1))


def test_sorts_unsigned_integers_downwards(lib):
    values = np.array([0, 5, 255, 5], np.uint8)
    same(lib.xp.sort(lib(values, np.uint8), descending=True), [255, 5, 5, 0])
    same(lib.xp.argsort(lib(values, np.uint8), descending=True, stable=True), [2, 1, 3, 0])


@pytest.mark.parametrize("side", ["left", "right"])
def test_searchsorted(lib, side):
    sorted_values = np.array([0.0, 1.0, 1.0, 4.0], np.float32)
    wanted = np.array([-1.0, 0.0, 1.0, 2.0, 4.0, 9.0], np.float32)
    got = lib.xp.searchsorted(lib(sorted_values), lib(wanted), side=side)
    same(got, np.searchsorted(sorted_values, wanted, side=side))


@pytest.mark.parametrize("axis", [0, 1, -1])
@pytest.mark.parametrize("include_initial", [False, True])
def test_cumulative_sum(lib, axis, include_initial):
    values = np.arange(6, dtype=np.float32).reshape(2, 3)
    got = lib.xp.cumulative_sum(lib(values), axis=axis, include_initial=include_initial)
    same(got, np.cumulative_sum(values, axis=axis, include_initial=include_initial))


@pytest.mark.parametrize("correction", [0, 1])
@pytest.mark.parametrize("name", ["var", "std"])
def test_spread(lib, name, correction):
    values = np.array([[1.0, 2.0, 4.0], [0.0, 0.0, 9.0]], np.float32)
    got = getattr(lib.xp, name)(lib(values), axis=-1, correction=correction)
    same(got, getattr(np, name)(values, axis=-1, correction=correction), rtol=1e-6)


def test_sum_takes_a_dtype(lib):
    got = lib.xp.sum(lib([[1, 0], [1, 1]], np.int32), axis=-1, dtype=lib.xp.float32)
    same(got, [1.0, 2.0])
    assert "float32" in str(got.dtype)


def test_creation_beside_an_array(lib):
    xp, x = lib.xp, lib(FLOATS)
    device = device_of(x)
    same(xp.zeros((2, 3), dtype=xp.float32, device=device), np.zeros((2, 3)))
    same(xp.ones((2,), dtype=xp.int32, device=device), np.ones(2))
    same(xp.full((2, 2), 2.5, device=device), np.full((2, 2), 2.5))
    same(xp.arange(4, device=device), np.arange(4))
    same(xp.arange(2, 8, 3, device=device), np.arange(2, 8, 3))
    same(xp.zeros_like(x, device=device), np.zeros_like(FLOATS))
    same(xp.ones_like(x, device=device), np.ones_like(FLOATS))
    same(xp.full_like(x, 3.0, device=device), np.full_like(FLOATS, 3))
    same(xp.eye(3, device=device), np.eye(3))
    same(xp.linspace(0.0, 1.0, 5, device=device), np.linspace(0, 1, 5))


def test_shapes_and_selection(lib):
    xp, x = lib.xp, lib(FLOATS)
    indices = np.array([[3, 0], [1, 1]])
    same(xp.permute_dims(x, (1, 0)), FLOATS.T)
    same(xp.reshape(x, (4, 2)), FLOATS.reshape(4, 2))
    same(xp.squeeze(x[None, ...], axis=0), FLOATS)
    same(xp.expand_dims(x, axis=1), FLOATS[:, None])
    same(xp.concat([x, x], axis=-1), np.concatenate([FLOATS, FLOATS], axis=-1))
    same(xp.stack([x, x]), np.stack([FLOATS, FLOATS]))
    same(xp.broadcast_to(x[:, None, :], (2, 3, 4)), np.broadcast_to(FLOATS[:, None], (2, 3, 4)))
    same(xp.take(x, asarray_like([1, 0, 1], x), axis=0), FLOATS[[1, 0, 1]])
    got = xp.take_along_axis(x, asarray_like(indices, x), axis=-1)
    same(got, np.take_along_axis(FLOATS, indices, axis=-1))


def test_elementwise(lib):
    xp = lib.xp
    values = np.array([0.5, 2.0, 1.0], np.float32)
    x = lib(values)
    for name in ("exp", "log", "sqrt", "abs", "isfinite", "log1p", "expm1", "floor"):
        same(getattr(xp, name)(x), getattr(np, name)(values), rtol=1e-6)
    same(xp.logaddexp(x, x), values + np.log(2), rtol=1e-6)
    same(xp.maximum(x, xp.ones_like(x)), [1, 2, 1])
    same(xp.clip(x, 0.75, 1.5), [0.75, 1.5, 1.0])
    same(xp.where(x > 0.9, x, -xp.inf), [-np.inf, 2.0, 1.0])
    same(xp.all(x > 0), True)
    same(xp.any(x > 5), False)
    same(xp.astype(x, xp.int32, copy=True), [0, 2, 1])


@pytest.mark.parametrize(
    ("kind", "want"),
    [
        ("bool", {"bool"}),
        ("integral", {"int32", "uint8"}),
        ("signed integer", {"int32"}),
        ("real floating", {"float32"}),
        ("numeric", {"int32", "uint8", "float32"}),
        (("bool", "real floating"), {"bool", "float32"}),
    ],
    ids=str,
)
def test_isdtype(lib, kind, want):
    xp = lib.xp
    names = ("bool", "int32", "uint8", "float32")
    assert {name for name in names if xp.isdtype(getattr(xp, name), kind)} == want


@pytest.mark.parametrize("dtype", [np.float32, np.int32, np.int64, np.bool_, np.uint8])
def test_to_numpy_round_trip(lib, dtype):
    values = np.array([[1, 0], [3, 1]], dtype)
    back = to_numpy(lib.xp.asarray(values.copy()))
    assert back.dtype == dtype
    np.testing.assert_array_equal(back, values)


def test_to_numpy_reads_half_precision(lib):
    if not hasattr(lib.xp, "bfloat16"):
        pytest.skip("no bfloat16 here")
    same(to_numpy(lib.xp.astype(lib([1.5, -2.0]), lib.xp.bfloat16)), [1.5, -2.0])
    same(to_numpy(lib.xp.astype(lib([1.5, -2.0]), lib.xp.float16)), [1.5, -2.0])


def test_to_numpy_reads_views(lib):
    x = lib(np.arange(12, dtype=np.float32).reshape(3, 4))
    same(lib.xp.permute_dims(x, (1, 0))[1:3, :], np.arange(12).reshape(3, 4).T[1:3])


def test_to_numpy_reads_tensors_with_gradient():
    torch = pytest.importorskip("torch")
    same(torch.ones(2, requires_grad=True) * 2, [2, 2])


def test_asarray_like(lib):
    x = lib(FLOATS)
    for values in ([1, 2], np.array([1, 2]), asarray_like([1, 2], x)):
        got = asarray_like(values, x, dtype=lib.xp.float32)
        assert type(got) is type(x)
        assert got.dtype == x.dtype
        same(got, [1, 2])
    copy = lib.xp.asarray(x, copy=True)
    assert copy is not x


def test_namespace_is_found_from_arrays(lib):
    x = lib(FLOATS)
    xp = array_namespace(x)
    assert xp is array_namespace(x, x)
    assert is_mlx(x) == (lib.name == "mlx")
    names = {"numpy": "numpy", "strict": "array_api_strict", "torch": "torch", "mlx": "mlx"}
    assert library_of(x) == names[lib.name]
    assert is_on_host(x)
    wide = xp.astype(x, wide_dtype(x))
    assert ("float32" if lib.name == "mlx" else "float64") in str(wide.dtype)


def test_unknown_arrays_are_refused():
    with pytest.raises(TypeError):
        array_namespace([1.0, 2.0])


def test_no_framework_is_imported():
    code = (
        "import sys, steersman.core.array, steersman.core.ops, steersman.core.logits;"
        "print([m for m in ('torch', 'mlx', 'llama_cpp', 'transformers') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
