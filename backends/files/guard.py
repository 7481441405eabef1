"""Checks of model files from outside, before an engine opens them."""

from __future__ import annotations

from steersman.core.locate import ModelSource

from .gguf import read_header
from .hf_folder import check_hf_folder


def check_file(source: ModelSource) -> None:
    """Refuse a model file that is damaged or hostile.

    Raises
    ------
    InvalidInput
        What is wrong with the file, in one line.
    """
    if source.kind == "hf":
        check_hf_folder(source.path)
    elif not source.trusted:
        read_header(source.path)
