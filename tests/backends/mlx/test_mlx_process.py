"""The mlx adapter across threads and processes, and the BLAS it is given."""

from __future__ import annotations

import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("mlx")
pytest.importorskip("mlx_lm")


from steersman.backends.mlx import blas, open_model, versions
from steersman.core.array import to_numpy
from steersman.core.errors import UsageError
from steersman.core.model import Forward

from ..tiny_torch import hf_source, tokens
from .mlx_support import EVERYTHING, Opener, close, fresh

# -- threads and processes -------------------------------------------------------------------------


def in_thread(work: Callable[[], Any]) -> Any:
    result: list[Any] = []
    errors: list[BaseException] = []

    def run() -> None:
        try:
            result.append(work())
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    if errors:
        raise errors[0]
    return result[0]


@pytest.mark.parametrize("name", ["llama3-rope", "gemma3"])
def test_everything_crosses_threads(name: str, tiny_folder: Callable[[str], Path]) -> None:
    """Opened in one thread, prefilled in a second, continued in a third, read in the first."""
    model = in_thread(lambda: open_model(hf_source(tiny_folder(name)), threads=1))
    ids = tokens(12)
    session = in_thread(lambda: model.session(max_rows=2, needs=EVERYTHING))
    in_thread(lambda: session.forward(Forward(keep=0, tokens=[ids[:8]], logits="none")))
    in_thread(
        lambda: session.forward(Forward(keep=[8, 6], rows=[0, 0], tokens=None, logits="none"))
    )
    ask = Forward(keep=[8, 6], tokens=[ids[8:], ids[6:10]], logits="all", hidden=(1,))
    out = in_thread(lambda: session.forward(ask))
    close(out.logits[0], fresh(model, ids)[8:])
    head = in_thread(lambda: model.head(out.hidden[1]))
    soft = in_thread(lambda: model.embed(ids))
    table = in_thread(lambda: model.embedding)
    np.testing.assert_array_equal(to_numpy(soft), to_numpy(table)[ids])
    assert np.isfinite(to_numpy(head)).all()
    model.close()


def test_records_belong_to_their_thread(opened: Opener) -> None:
    """One thread asks for hidden states and attention while another just decodes."""
    model = opened("llama")
    ids = tokens(30)
    want = fresh(model, ids)
    stop = threading.Event()

    def watch() -> int:
        calls = 0
        with model.session(needs=EVERYTHING) as session:
            while not stop.is_set() or not calls:
                ask = Forward(keep=0, tokens=[ids], hidden=(0, 3), attentions=(1,))
                out = session.forward(ask)
                assert set(out.hidden) == {0, 3} and set(out.attentions) == {1}
                assert out.attentions[1].shape == (1, 4, 30, 30)
                calls += 1
        return calls

    thread = threading.Thread(target=lambda: results.append(watch()))
    results: list[int] = []
    thread.start()
    for _ in range(20):
        close(fresh(model, ids), want, 0)
    stop.set()
    thread.join()
    assert results and results[0] > 0


def test_a_forked_child_is_refused(opened: Opener, monkeypatch: pytest.MonkeyPatch) -> None:
    model = opened("llama")
    with model.session() as session:
        monkeypatch.setattr("os.getpid", lambda: 1)
        with pytest.raises(UsageError, match="spawn"):
            session.forward(Forward(keep=0, tokens=[[3]]))
        with pytest.raises(UsageError, match="spawn"):
            model.embed([3])


# -- the process around it -------------------------------------------------------------------------


def python(code: str, **environment: str) -> str:
    import os

    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_opening_imports_no_transformers(tiny_folder: Callable[[str], Path]) -> None:
    """Seconds saved; and whoever imports mlx_lm afterwards gets all of it."""
    code = f"""
import sys, pathlib
from steersman.backends.mlx import open_model
from steersman.core.locate import ModelSource
open_model(ModelSource(name="x", kind="hf", path=pathlib.Path({str(tiny_folder("llama"))!r})))
assert not {{"torch", "transformers", "mlx_lm.generate"}} & set(sys.modules)
import mlx_lm, mlx_lm.models.llama
from mlx_lm import stream_generate
assert mlx_lm.load and mlx_lm.models.llama is sys.modules["mlx_lm.models.llama"]
assert mlx_lm.__version__ and not hasattr(mlx_lm, "__wrapped__")
print("ok")
"""
    assert python(code) == "ok"


_BLAS = "from steersman.backends.mlx import blas; {before}; print(blas.prepare().name)"


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="Linux alone needs it")
def test_the_blas_can_be_chosen() -> None:
    code = _BLAS.format(before="pass")
    assert python(code, STEERSMAN_MLX_BLAS="off") == "mlx's own (STEERSMAN_MLX_BLAS=off)"
    late = python(_BLAS.format(before="import mlx.core"), STEERSMAN_MLX_BLAS="")
    assert "imported before" in late
    wrong = """
from steersman.backends.mlx import blas
from steersman.core.errors import InvalidInput
try:
    blas.prepare()
except InvalidInput as error:
    print(error)
"""
    assert "nowhere.so does not serve" in python(wrong, STEERSMAN_MLX_BLAS="/nowhere.so")
    assert "does not serve" in python(wrong, STEERSMAN_MLX_BLAS="libc.so.6")


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="Linux alone needs it")
def test_no_compiler_is_no_error(tmp_path: Path) -> None:
    code = """
import ctypes, pathlib
from steersman.backends.mlx import blas
blas._SYSTEM = ()
print(blas.prepare().name)
"""
    told = python(code, PATH=str(tmp_path), STEERSMAN_HOME=str(tmp_path), STEERSMAN_MLX_BLAS="")
    assert "mlx's own" in told


def test_a_wrong_blas_is_noticed() -> None:
    assert not blas._multiplies(lambda *arguments: None)


def test_versions() -> None:
    told = versions()
    assert told["mlx"][0].isdigit() and told["mlx-lm"][0].isdigit() and told["blas"]
