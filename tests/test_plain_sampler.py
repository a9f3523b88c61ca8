"""The benchmark's baseline generates what ours does: it differs in its time alone."""

from __future__ import annotations

import pytest
import torch
from tiny_models import tiny_model

from marval_rl.benchmarks.plain_sampler import sample_plainly
from marval_rl.models import generate


@pytest.mark.parametrize("guidance_scale", [1.0, 2.5])
@pytest.mark.parametrize("changes", [{}, {"clip_sample_range": 1.0, "decoder_num_layers": 1}])
def test_the_baseline_generates_the_same_images(changes, guidance_scale):
    teacher, labels = tiny_model(**changes), torch.tensor([0, 2, 1])
    settings = {"num_unmasking_steps": 3, "guidance_scale": guidance_scale, "num_diffusion_steps": 20}
    plain = sample_plainly(teacher, labels, generator=torch.Generator().manual_seed(1), **settings)
    ours = generate(teacher, labels, generator=torch.Generator().manual_seed(1), **settings).latents
    assert (plain - ours).norm() < 1e-3 * ours.norm()
    other = generate(teacher, labels, generator=torch.Generator().manual_seed(2), **settings).latents
    assert (plain - other).norm() > 0.1 * ours.norm()
