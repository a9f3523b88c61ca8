"""Names, shapes and counts of parameters: the tiny model and the three published sizes."""

from __future__ import annotations

import pytest
import torch
from mar_reference import golden_facts, key_hash, reference_model, tiny_config

from marval_rl.models import MARConfig, MARModel

PUBLISHED = {
    "mar_base": {"width": 768, "layers": 12, "heads": 12, "head_hidden_size": 1024, "head_num_layers": 6},
    "mar_large": {"width": 1024, "layers": 16, "heads": 16, "head_hidden_size": 1280, "head_num_layers": 8},
    "mar_huge": {"width": 1280, "layers": 20, "heads": 16, "head_hidden_size": 1536, "head_num_layers": 12},
}


def published_config(name: str) -> MARConfig:
    size = PUBLISHED[name]
    return MARConfig(
        encoder_hidden_size=size["width"],
        decoder_hidden_size=size["width"],
        encoder_num_layers=size["layers"],
        decoder_num_layers=size["layers"],
        encoder_num_heads=size["heads"],
        decoder_num_heads=size["heads"],
        head_hidden_size=size["head_hidden_size"],
        head_num_layers=size["head_num_layers"],
    )


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_sizes_have_the_official_parameters(name):
    expected = golden_facts()["published_sizes"][name]
    with torch.device("meta"):
        model = MARModel(published_config(name))
    assert len(model.state_dict()) == expected["tensors"]
    assert sum(p.numel() for p in model.parameters()) == expected["parameters"]
    assert sum(p.numel() for p in model.diffloss.parameters()) == expected["head_parameters"]
    assert key_hash(model) == expected["key_hash"]


def test_tiny_model_has_the_official_parameters():
    expected = golden_facts()["tiny_sizes"]
    model = MARModel(tiny_config())
    assert sum(p.numel() for p in model.parameters()) == expected["parameters"]
    assert sum(p.numel() for p in model.diffloss.parameters()) == expected["head_parameters"]
    assert key_hash(model) == expected["key_hash"]


def test_weights_by_rule_are_those_of_the_figures():
    total = sum(tensor.double().abs().sum().item() for tensor in reference_model("crc").state_dict().values())
    assert total == pytest.approx(golden_facts()["tiny_sizes"]["rule_weights_abs_sum"], rel=1e-6)
