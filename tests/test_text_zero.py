"""A model of text under ZeRO-2 in two real processes ends with the weights of one process that accumulates."""

from __future__ import annotations

import pytest
from forked_processes import start
from safetensors.torch import load_file
from text_zero_work import run, work
from torch.testing import assert_close


@pytest.mark.timeout(600)
def test_two_processes_under_zero2_end_as_one_that_accumulates(tmp_path):
    launched = start(tmp_path, 2, work, tmp_path)
    run(tmp_path / "one", gradient_accumulation_steps=2)
    assert launched.wait(timeout=500) == [0, 0], launched.output()
    expected, found = (load_file(tmp_path / f"{name}.safetensors") for name in ("one", "zero2"))
    assert expected.keys() == found.keys()
    for name, value in expected.items():
        assert_close(found[name], value, rtol=0, atol=1e-6, msg=lambda text, name=name: f"{name}: {text}")
