"""What an adapter's folder says about reranking."""

import json

import pytest

from steersman.core.adapters import (
    RerankSettings,
    read_rerank_settings,
    rerank_options,
    write_note,
)
from steersman.core.errors import InvalidInput


def test_settings_are_written_and_read_and_reach_the_reranker(tmp_path):
    (tmp_path / "adapter_config.json").write_text("{}")
    said = RerankSettings(window_size=4, max_words=28, first_stage_weight=0.5)
    write_note(tmp_path, said, {"base": {"name": "m"}})
    assert read_rerank_settings(tmp_path) == (said, None)
    assert rerank_options(tmp_path) == {"window": 4, "max_words": 28, "first_stage_weight": 0.5}


@pytest.mark.parametrize(
    "rerank",
    [
        {"window_size": 0},
        {"stride": 1.5},
        {"max_words": True},
        {"first_stage_weight": -1},
        {"first_stage_weight": "1"},
        {"first_stage_weight": 1e9},
        {"windows": 4},
        [],
    ],
)
def test_bad_settings_are_one_clear_line(tmp_path, rerank):
    (tmp_path / "steersman.json").write_text(json.dumps({"format": 1, "rerank": rerank}))
    with pytest.raises(InvalidInput, match="steersman.json: not usable") as caught:
        read_rerank_settings(tmp_path)
    assert "\n" not in str(caught.value)
