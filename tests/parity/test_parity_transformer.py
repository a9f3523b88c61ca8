"""The MAE encoder and decoder, label dropout and patchify."""

from __future__ import annotations

import pytest
import torch
from mar_reference import WEIGHTS, assert_parity, decode_all, encode, golden, meets_parity, reference_model

from marval_rl.models import patchify, unpatchify
from marval_rl.models.unmasking import revealed_positions

NUM_MASKED = {"half": 8, "all": 16, "one": 1, "most": 13}


@pytest.fixture(scope="module")
def models():
    return {weights: reference_model(weights) for weights in WEIGHTS}


@pytest.mark.parametrize("weights", WEIGHTS)
@pytest.mark.parametrize("mask", NUM_MASKED)
@torch.no_grad()
def test_encoder_and_decoder(models, weights, mask):
    figures, model, num_masked = golden("transformer"), models[weights], NUM_MASKED[mask]
    order = figures["order"]
    classes = model.embed_classes(figures["labels"], 3)
    assert torch.equal(classes, figures[f"{weights}.class_embedding"])
    encoded = encode(model, figures["tokens"], classes, order, num_masked)
    assert_parity(encoded, figures[f"{weights}.enc_{mask}"])
    decoded = decode_all(model, encoded, order, num_masked)
    assert_parity(decoded, figures[f"{weights}.dec_{mask}"])


@pytest.mark.parametrize("weights", WEIGHTS)
@torch.no_grad()
def test_null_class(models, weights):
    figures, model = golden("transformer"), models[weights]
    encoded = encode(model, figures["tokens"], model.embed_classes(None, 3), figures["order"], 8)
    assert_parity(encoded, figures[f"{weights}.uncond_enc_half"])
    assert_parity(decode_all(model, encoded, figures["order"], 8), figures[f"{weights}.uncond_dec_half"])


@torch.no_grad()
def test_label_dropout(models):
    figures, model = golden("transformer"), models["crc"]
    drop_mask = figures["labeldrop_uniform"] < 0.4
    assert 0 < drop_mask.sum() < len(drop_mask)
    classes = model.embed_classes(figures["labels"], 3, drop_mask)
    encoded = encode(model, figures["tokens"], classes, figures["order"], 8)
    assert_parity(encoded, figures["crc.labeldrop_enc_half"])
    assert not meets_parity(encoded, figures["crc.enc_half"])


@pytest.mark.parametrize("weights", WEIGHTS)
@torch.no_grad()
def test_forward_gives_the_conditions_of_the_revealed_tokens(models, weights):
    figures, model = golden("transformer"), models[weights]
    output = model(figures["tokens"], figures["labels"], figures["order"], 13, 8)
    positions = revealed_positions(figures["order"], 13, 8)
    for row in range(3):
        assert_parity(output.condition[row], figures[f"{weights}.dec_most"][row, positions[row]])


@pytest.mark.parametrize("weights", WEIGHTS)
@torch.no_grad()
def test_guidance_pass_holds_the_labels_first_and_the_null_class_second(models, weights):
    figures, model = golden("transformer"), models[weights]
    output = model(figures["tokens"], figures["labels"], figures["order"], 8, guidance_pass=True)
    positions = revealed_positions(figures["order"], 8)
    rows = torch.arange(3).unsqueeze(1)
    labelled, null = output.condition.chunk(2)
    assert_parity(labelled, figures[f"{weights}.dec_half"][rows, positions])
    assert_parity(null, figures[f"{weights}.uncond_dec_half"][rows, positions])
    assert not meets_parity(null, figures[f"{weights}.dec_half"][rows, positions])


@torch.no_grad()
def test_masked_tokens_are_never_read(models):
    figures, model = golden("transformer"), models["crc"]
    hidden = torch.zeros(3, 16, dtype=torch.bool).scatter(1, figures["order"][:, :13], True)
    tokens = figures["tokens"].masked_fill(hidden.unsqueeze(-1), float("nan"))
    output = model(tokens, figures["labels"], figures["order"], 13)
    assert output.condition.isfinite().all()


@torch.no_grad()
def test_control_an_order_read_from_its_other_end_fails(models):
    figures, model = golden("transformer"), models["crc"]
    encoded = encode(model, figures["tokens"], model.embed_classes(figures["labels"], 3), figures["order"].flip(1), 8)
    assert not meets_parity(encoded, figures["crc.enc_half"])


def test_patchify_and_its_inverse():
    figures = golden("transformer")
    assert torch.equal(patchify(figures["latent"], 1), figures["latent_patchified"])
    assert torch.equal(unpatchify(figures["tokens"], 1, 4), figures["tokens_unpatchified"])
