"""Names, shapes and counts of parameters: the tiny model and the three published sizes."""

from __future__ import annotations

import pytest
import torch
from mar_reference import golden_facts, reference_model, tiny_config

from marval_rl.models import MARConfig, MARModel
from marval_rl.models.official.shapes import key_hash

PUBLISHED = {"mar_base": MARConfig.base, "mar_large": MARConfig.large, "mar_huge": MARConfig.huge}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_sizes_have_the_official_parameters(name):
    expected = golden_facts()["published_sizes"][name]
    with torch.device("meta"):
        model = MARModel(PUBLISHED[name]())
    assert len(model.state_dict()) == expected["tensors"]
    assert sum(p.numel() for p in model.parameters()) == expected["parameters"]
    assert sum(p.numel() for p in model.diffloss.parameters()) == expected["head_parameters"]
    assert key_hash(model.state_dict()) == expected["key_hash"]


def test_tiny_model_has_the_official_parameters():
    expected = golden_facts()["tiny_sizes"]
    model = MARModel(tiny_config())
    assert sum(p.numel() for p in model.parameters()) == expected["parameters"]
    assert sum(p.numel() for p in model.diffloss.parameters()) == expected["head_parameters"]
    assert key_hash(model.state_dict()) == expected["key_hash"]


def test_weights_by_rule_are_those_of_the_figures():
    total = sum(tensor.double().abs().sum().item() for tensor in reference_model("crc").state_dict().values())
    assert total == pytest.approx(golden_facts()["tiny_sizes"]["rule_weights_abs_sum"], rel=1e-6)
