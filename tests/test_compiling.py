"""Compiled blocks: once each kind, whatever the lengths, with the images of the plain model."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tiny_models import tiny_student

from marval_rl.models import MARModel, generate
from marval_rl.models.compiling import compile_blocks


@pytest.fixture
def compiled() -> Any:
    """A compiled student, and the graphs that were compiled so far; the compiler here changes nothing."""
    before = torch._dynamo.config.fail_on_recompile_limit_hit
    torch._dynamo.reset()
    graphs: list[Any] = []

    def compiler(graph: torch.fx.GraphModule, inputs: list[Any]) -> Any:
        graphs.append(graph)
        return graph.forward

    student = tiny_student(image_size=8)
    compile_blocks(student, compiler)
    yield student, graphs
    torch._dynamo.reset()
    torch._dynamo.config.fail_on_recompile_limit_hit = before


def sample(student: MARModel, steps: int, batch: int) -> torch.Tensor:
    noise = torch.Generator().manual_seed(0)
    return generate(student, torch.arange(batch) % 3, num_unmasking_steps=steps, generator=noise).latents


def test_nothing_is_compiled_again_after_the_first_generations(compiled):
    student, graphs = compiled
    for steps in (16, 5):  # a batch of one, and one token in a step, are cases of their own
        sample(student, steps, 3)
        sample(student, steps, 1)
    first = len(graphs)
    assert 0 < first <= 8  # blocks of encoder and decoder, with all rows or some
    for steps, batch in ((16, 5), (7, 3), (4, 2), (9, 1), (6, 8)):
        sample(student, steps, batch)
    assert len(graphs) == first


def test_images_are_those_of_the_plain_model(compiled):
    student, _ = compiled
    torch.testing.assert_close(sample(student, 5, 3), sample(tiny_student(image_size=8), 5, 3))
