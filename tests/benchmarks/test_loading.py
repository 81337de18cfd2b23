"""Loading a sharded checkpoint takes little more memory than it has bytes."""

import argparse
from pathlib import Path

import pytest

from benchmarks import startup
from configuration_medsight.presets_medsight import PRESETS


MOST = 1.1  # peak memory by the size of the files


@pytest.mark.slow
def test_a_sharded_checkpoint_is_loaded_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """At a size beside which what Python itself takes is small."""
    try:
        startup.process_memory("RssAnon")
    except (OSError, StopIteration):
        pytest.skip("this system does not tell a process' memory")
    small = PRESETS["small"]
    middle = {
        "text_config": {**small["text_config"], "vocab_size": 8192, "num_hidden_layers": 8},
        "vision_config": {**small["vision_config"], "num_hidden_layers": 4},
        "image_token_id": 7000,
        "region_code_start_id": 7168,
    }
    monkeypatch.setitem(PRESETS, "middle", middle)
    row = startup.load_row(argparse.Namespace(preset="middle", folder=tmp_path, repeats=1))
    assert row["file_bytes"] > 3e8 and int(row["what"].split()[2]) > 3
    assert 0.9 < row["ratio"]["median"] <= MOST
    assert row["private_ratio"]["median"] < 0.2, "weights are copied instead of mapped"
