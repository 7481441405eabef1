"""Cross-entropy in blocks against the plain one: numbers, gradients, memory, filtering."""

from __future__ import annotations

import itertools
import sys
import types
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from steersman.backends.torch import linear_cross_entropy as entropy  # noqa: E402
from steersman.backends.torch.linear_cross_entropy import linear_cross_entropy  # noqa: E402
from steersman.core.errors import MissingDependency, UsageError  # noqa: E402


def plain(
    e: Any, c: Any, x: Any, *, bias: Any = None, softcap: Any = None, shift: int = 0, **options: Any
) -> Any:
    length = x.shape[-1] - shift
    a = e[..., :length, :] @ c.T
    a = a if bias is None else a + bias
    a = a if softcap is None else softcap * torch.tanh(a / softcap)
    y = x[..., shift:]
    loss = torch.nn.functional.cross_entropy(a.reshape(-1, len(c)), y.reshape(-1), **options)
    kept = (y != -100).reshape(-1)
    lse = torch.logsumexp(a.reshape(-1, len(c)), dim=1)[kept]
    return (loss.reshape(y.shape) if loss.ndim else loss), lse


def test_worked_example() -> None:
    e = torch.tensor([[1.0, 0.0], [0.5, -1.0]], requires_grad=True)
    c = torch.tensor([[1.0, 1.0], [0.0, 2.0], [-1.0, 0.5], [2.0, -1.0]], requires_grad=True)
    x = torch.tensor([0, 3])
    nll, lse = linear_cross_entropy(e, c, x, reduction="none", vocab_block=2, return_lse=True)
    np.testing.assert_allclose(nll.detach(), [1.440190, 0.139925], atol=1e-6)
    np.testing.assert_allclose(lse.detach(), [2.440190, 2.139925], atol=1e-6)
    loss = linear_cross_entropy(e, c, x, sort_vocab=True, vocab_block=3)
    assert float(loss.detach()) == pytest.approx(0.790057, abs=1e-6)
    loss.backward()
    np.testing.assert_allclose(e.grad, [[0.246326, -0.608357], [-0.116536, 0.127717]], atol=1e-6)
    np.testing.assert_allclose(
        c.grad,
        [[-0.363717, -0.035683], [0.047553, -0.007962], [0.026851, -0.021643],
         [0.289313, 0.065288]], atol=1e-6,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("softcap", "shift", "reduction", "with_bias"),
    list(itertools.product([None, 3.0], [0, 1, 2], ["mean", "sum", "none"], [False, True])),
)
def test_equals_the_plain_loss(softcap: Any, shift: int, reduction: Any, with_bias: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    shape = {"dtype": torch.float64, "generator": generator}
    e, c, b = (torch.randn(*s, **shape) for s in ((2, 5, 4), (11, 4), (11,)))
    x = torch.randint(0, 11, (2, 5), generator=generator)
    x[0, 2] = x[1, 4] = -100
    results = []
    for loss_of, options in (
        (plain, {}),
        (linear_cross_entropy, {"return_lse": True, "vocab_block": 7, "token_block": 3}),
        (linear_cross_entropy, {"return_lse": True, "vocab_block": 1, "sort_vocab": True}),
    ):
        leaves = [t.clone().requires_grad_() for t in (e, c, b)]
        bias = leaves[2] if with_bias else None
        loss, lse = loss_of(
            leaves[0], leaves[1], x, bias=bias, softcap=softcap, shift=shift, reduction=reduction,
            **options,
        )  # fmt: skip
        (loss.sum() + 0.1 * (lse**2).mean()).backward()
        results.append([loss.detach(), *(t.grad for t in leaves[: 2 + with_bias])])
    for other in results[1:]:
        for a, b_ in zip(results[0], other):
            np.testing.assert_allclose(a, b_, atol=1e-12)


def test_nothing_to_predict_and_bad_targets() -> None:
    e, c = torch.ones(2, 3, requires_grad=True), torch.ones(4, 3)
    loss = linear_cross_entropy(e, c, torch.tensor([-100, -100]))
    loss.backward()
    assert float(loss.detach()) == 0 and float(e.grad.abs().sum()) == 0
    with pytest.raises(UsageError, match=r"ids must be in 0\.\.3"):
        linear_cross_entropy(e, c, torch.tensor([0, 4]))
    with pytest.raises(UsageError, match="do not fit"):
        linear_cross_entropy(e, c, torch.tensor([0]))


def test_no_tensor_of_the_vocabulary_times_the_tokens() -> None:
    """The largest array made is a block, however large the vocabulary is."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Largest(TorchDispatchMode):
        size = 0

        def __torch_dispatch__(
            self, func: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            out = func(*args, **(kwargs or {}))
            for made in out if isinstance(out, (tuple, list)) else (out,):
                if isinstance(made, torch.Tensor):
                    Largest.size = max(Largest.size, made.numel())
            return out

    for vocab in (512, 4096):
        e = torch.randn(64, 8, requires_grad=True)
        c = torch.randn(vocab, 8, requires_grad=True)
        Largest.size = 0
        with Largest():
            linear_cross_entropy(
                e, c, torch.randint(0, vocab, (64,)), vocab_block=128, token_block=32
            ).backward()
        assert Largest.size <= max(128 * 32, vocab * 8)


def test_filtering_errs_within_its_bound() -> None:
    generator = torch.Generator().manual_seed(1)
    e = torch.randn(64, 16, generator=generator)
    c = torch.randn(512, 16, generator=generator) * torch.linspace(0.02, 2.0, 512)[:, None]
    x = torch.randint(400, 512, (64,), generator=generator)
    eps = 2.0**-12

    def gradient(**options: Any) -> Any:
        leaf = e.clone().requires_grad_()
        linear_cross_entropy(
            leaf, c, x, vocab_block=64, token_block=16, sort_vocab=True, **options
        ).backward()
        return leaf.grad

    error = (gradient(filter_eps=eps) - gradient()).abs().max()
    assert float(error) <= 512 * eps * float(c.abs().max()) / 64


# -- other implementations -------------------------------------------------------------------------


@pytest.fixture
def kernels(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Stand-in for cut-cross-entropy, with the signature of its release 25.1.1."""
    calls: list[dict[str, Any]] = []

    def linear_cross_entropy(
        e: Any, c: Any, targets: Any, ignore_index: int = -100, softcap: Any = None,
        reduction: str = "mean", shift: bool = False, filter_eps: Any = "high", impl: str = "cce",
    ) -> Any:  # fmt: skip
        calls.append({"filter_eps": filter_eps, "shift": shift, "reduction": reduction})
        return plain(e, c, targets, softcap=softcap, reduction=reduction)[0]

    module = types.ModuleType("cut_cross_entropy")
    module.linear_cross_entropy = linear_cross_entropy  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "cut_cross_entropy", module)
    entropy._cce.cache_clear()
    yield calls
    entropy._cce.cache_clear()


def gradients(implementation: str, **options: Any) -> list[Any]:
    generator = torch.Generator().manual_seed(3)
    e, c = (torch.randn(n, 6, generator=generator, dtype=torch.float64) for n in (14, 9))
    x = torch.randint(0, 9, (2, 7), generator=generator)
    x[0, 3] = -100
    e, c = e.view(2, 7, 6).requires_grad_(), c.requires_grad_()
    loss = linear_cross_entropy(e, c, x, implementation=implementation, **options)
    loss.sum().backward()
    return [loss.detach(), e.grad, c.grad]


@pytest.mark.parametrize("implementation", ["cce", "plain"])
@pytest.mark.parametrize(
    "options", [{}, {"shift": 2}, {"softcap": 3.0}, {"reduction": "none", "shift": 1}]
)
def test_implementations_agree(kernels: Any, implementation: str, options: Any) -> None:
    for ours, theirs in zip(gradients("blocks", **options), gradients(implementation, **options)):
        torch.testing.assert_close(theirs, ours, rtol=1e-12, atol=1e-12)
    if implementation == "cce":  # what counts, shifted here; and nothing is filtered unasked
        assert kernels == [{"filter_eps": None, "shift": False, "reduction": "none"}]


def test_kernels_are_refused_what_they_cannot_do(
    kernels: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    e, c, x = torch.randn(3, 4), torch.randn(5, 4), torch.tensor([0, 1, 2])
    for options in ({"bias": torch.zeros(5)}, {"return_lse": True}):
        with pytest.raises(UsageError, match="'cce'"):
            linear_cross_entropy(e, c, x, implementation="cce", **options)
    with pytest.raises(UsageError, match="got 'liger'"):
        linear_cross_entropy(e, c, x, implementation="liger")
    linear_cross_entropy(e, c, x)
    assert not kernels  # "auto" uses them on CUDA only
    monkeypatch.setitem(sys.modules, "cut_cross_entropy", None)
    entropy._cce.cache_clear()
    with pytest.raises(MissingDependency, match="train-cuda"):
        linear_cross_entropy(e, c, x, implementation="cce")


@pytest.mark.gpu
def test_kernels_on_cuda() -> None:
    pytest.importorskip("cut_cross_entropy", exc_type=ImportError)
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    e = torch.randn(64, 64, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    c = torch.randn(1000, 64, device="cuda", dtype=torch.bfloat16)
    x = torch.randint(0, 1000, (64,), device="cuda")
    losses, slopes = [], []
    for implementation in ("blocks", "cce"):
        e.grad = None
        loss = linear_cross_entropy(e, c, x, implementation=implementation)
        loss.backward()
        losses.append(float(loss))
        slopes.append(e.grad.float())
    assert losses[1] == pytest.approx(losses[0], rel=2e-2)
    torch.testing.assert_close(slopes[1], slopes[0], rtol=0.1, atol=1e-2)
