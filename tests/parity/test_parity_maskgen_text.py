"""The text tower, TA-TiTok, and the way from captions to images."""

from __future__ import annotations

import numpy as np
import open_clip
import pytest
import torch
from maskgen_reference import (
    GENERATION,
    LATENT_SCALE,
    ONE_PASS,
    assert_close,
    facts,
    golden,
    load_by_rule,
    reference_model,
    reference_tokenizer,
    relative_l2,
)
from open_clip.transformer import QuickGELU, TextTransformer

from marval_rl.models import generate
from marval_rl.models.maskgen.codec import TATiTokCodec
from marval_rl.models.maskgen.tower import TextTower

ACTIVATIONS = {"gelu": torch.nn.GELU, "quickgelu": QuickGELU}
CONTEXTS = {"77": 77, "_short": 10}


def tower(activation: str = "quickgelu", length: int = 10) -> TextTower:
    sizes = {"width": 48, "heads": 4, "layers": 3, "output_dim": 48}
    network = TextTransformer(context_length=length, act_layer=ACTIVATIONS[activation], **sizes)
    tokenize = open_clip.get_tokenizer("ViT-L-14-336")
    load_by_rule(network)
    return TextTower(network, lambda texts, count: tokenize(list(texts), count), "tiny")


@pytest.fixture(scope="module")
def captions() -> list[str]:
    return facts()["text_tower"]["captions"]


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("context", CONTEXTS)
def test_text_tower(captions, activation, context):
    figures, ours = golden("text_tower"), tower(activation, CONTEXTS[context])
    ids = ours.tokenizer([*captions, ""], CONTEXTS[context])
    assert torch.equal(ids, figures[f"ids{context}"])
    assert ours.activation == {"gelu": "exact GELU", "quickgelu": "quick GELU"}[activation]
    outputs = ours.outputs(ids)
    assert_close(outputs.penultimate, figures[f"{activation}.penultimate{context}"])
    assert_close(outputs.pooled, figures[f"{activation}.pooled{context}"].squeeze(1))
    assert_close(outputs.final, figures[f"{activation}.final{context}"])
    if activation == "gelu" and context == "77":  # made apart: a batch of two
        assert_close(ours.outputs(ids[[0, 3]]).final, figures[f"{activation}.clip_text.final"])
        assert_close(ours.outputs(ids[[0, 3]]).pooled, figures[f"{activation}.clip_text.pooled"].squeeze(1))


def test_control_the_other_activation_fails(captions):
    ids = golden("text_tower")["ids77"]
    quick, exact = (tower(name, 77).outputs(ids).pooled for name in ("quickgelu", "gelu"))
    assert relative_l2(exact, quick) > 100 * ONE_PASS
    assert relative_l2(quick, golden("text_tower")["gelu.pooled77"].squeeze(1)) > 100 * ONE_PASS


def test_names_of_the_towers_weights():
    names = {name: list(t.shape) for name, t in tower(length=77).network.state_dict().items()}
    assert {**names, "logit_scale": []} == facts()["text_tower_names"]


@torch.no_grad()
def test_text_dropout(captions):
    figures, model = golden("text_tower"), reference_model("crc")
    model.set_prompts(tower().encode(captions, dtype=torch.float32))
    torch.manual_seed(0)
    uniform = torch.rand(3)
    assert torch.equal(uniform, figures["drop.uniform"])
    drop = uniform < facts()["text_drop"]["prob"]
    assert drop.any() and not drop.all()
    model.prompts.scores = golden("transformer")["aesthetic"]
    text, _ = model.embed_text(torch.arange(3), 3, drop)
    # The figures hold features and pooled vectors before the projections.
    kept = model.prompts.rows("tokens", torch.arange(3).masked_fill(drop, 3), 3, text.device)
    assert_close(kept, figures["drop.condition"])
    pooled = model.prompts.rows("pooled", torch.arange(3).masked_fill(drop, 3), 3, text.device)
    assert_close(pooled, figures["drop.condition_pooled"].squeeze(1))
    assert_close(text, model.text_emb(kept))


@torch.no_grad()
def test_captions_longer_than_the_tower_reads_are_named():
    ours = tower()
    with pytest.warns(UserWarning, match="the end of 1 of 2 counts for nothing, the first of them 'fox fox "):
        ours.encode(["a fox", "fox " * 100])


def test_tokenizer():
    figures, more, tokenizer = golden("tatitok"), golden("tatitok_more"), reference_tokenizer()
    moments = tokenizer.encode(figures["image_in"])
    assert_close(moments, figures["moments"])
    mean, log_variance = moments.chunk(2, dim=1)
    assert_close(mean, more["mean"])
    assert_close(log_variance, more["logvar"])
    sample = mean + (0.5 * log_variance).exp() * figures["sample_noise"]
    assert_close(sample, figures["sample"])
    kl = 0.5 * (mean**2 + log_variance.exp() - 1 - log_variance).sum(dim=(1, 2))
    assert_close(kl, more["kl"])
    image = tokenizer.decode(figures["latents"], figures["text"])
    assert_close(image, figures["image_out"])
    assert_close(tokenizer.decode(mean, figures["text"]), more["image_mean_decode"])
    assert_close(tokenizer(figures["image_in"], figures["text"]), more["image_mean_decode"])
    assert_close(tokenizer.decode(figures["latents"], figures["text"].roll(1, 0)), more["image_text_rolled"])
    assert torch.equal(to_bytes(image), more["image_u8_hwc"])
    torch.manual_seed(583)
    latents = mean + (0.5 * log_variance).exp() * torch.randn(mean.shape)
    assert_close(latents, more["forward.latent"])
    assert_close(tokenizer.decode(latents, figures["text"]), more["forward.image"])


def to_bytes(images: torch.Tensor) -> torch.Tensor:
    """As the official code writes pictures: clipped, and truncated."""
    return (images.clamp(0, 1) * 255).permute(0, 2, 3, 1).to(torch.uint8)


@torch.no_grad()
def test_inside_the_tokenizer():
    figures, more, tokenizer = golden("tatitok"), golden("tatitok_more"), reference_tokenizer()
    enc = inside(tokenizer.encoder, lambda: tokenizer.encode(figures["image_in"]))
    dec = inside(tokenizer.decoder, lambda: tokenizer.decode(more["forward.latent"], figures["text"]))
    for name in ("in", "pre", "block0", "post"):
        assert_close(enc[name], more[f"enc_{name}"])
        assert_close(dec[name], more[f"dec_{name}"])
    assert_close(dec["pixels"], more["dec_pixels"])


def inside(part, run) -> dict[str, torch.Tensor]:
    """What the layers of the encoder or decoder give: in, pre, block0, post, pixels."""
    seen: dict[str, torch.Tensor] = {}
    hooks = [
        part.ln_pre.register_forward_pre_hook(lambda _m, i: seen.update({"in": i[0]})),
        part.ln_pre.register_forward_hook(lambda _m, _i, o: seen.update(pre=o)),
        part.transformer[0].register_forward_hook(lambda _m, _i, o: seen.update(block0=o)),
        part.ln_post.register_forward_hook(lambda _m, _i, o: seen.update(post=o)),
        part.conv_out.register_forward_pre_hook(lambda _m, i: seen.update(pixels=i[0])),
    ]
    run()
    for hook in hooks:
        hook.remove()
    return seen


@torch.no_grad()
def test_a_tokenizer_whose_encoder_and_decoder_differ():
    figures, tokenizer = golden("tatitok_uneven"), reference_tokenizer(uneven=True)
    enc = inside(tokenizer.encoder, lambda: tokenizer.encode(figures["image_in"]))
    dec = inside(tokenizer.decoder, lambda: tokenizer.decode(figures["latents"], figures["text"]))
    for found, prefix in ((enc, "enc"), (dec, "dec")):
        for name, key in (("pre", "ln_pre"), ("block0", "block0"), ("post", "ln_post")):
            assert_close(found[name], figures[f"{prefix}.{key}"])
    assert_close(dec["pixels"], figures["dec.patches"])
    moments = tokenizer.encode(figures["image_in"])
    assert_close(moments, figures["moments"])
    mean, log_variance = moments.chunk(2, dim=1)
    assert_close(mean, figures["mode"])
    sample = mean + (0.5 * log_variance).exp() * figures["sample_noise"]
    assert_close(sample, figures["sample"])
    assert_close(0.5 * (mean**2 + log_variance.exp() - 1 - log_variance).sum(dim=(1, 2)), figures["kl"])
    assert_close(tokenizer.decode(figures["latents"], figures["text"]), figures["image_out"])
    nothing = torch.zeros_like(figures["text"])
    assert_close(tokenizer.decode(figures["latents"], nothing), figures["image_out_null"])
    assert_close(tokenizer.decode(sample, figures["text"]), figures["reconstruction"])
    assert_close(tokenizer.decode(mean, figures["text"]), figures["reconstruction_mode"])
    assert torch.equal(to_bytes(figures["u8_input"]), figures["u8_rgb_hwc"])


def colours_slowest(patches: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.pixel_shuffle(patches, 8)


@pytest.mark.parametrize(
    ("changes", "moved"),
    [
        ({"decoder_num_heads": 4}, 2.4e-1),
        ({"encoder_num_heads": 8}, 1.9e-1),
        ({"text": "rolled"}, 1.3e-1),
        ({"colours": "slowest"}, 1.4),
    ],
)
@torch.no_grad()
def test_control_a_mistake_in_the_tokenizer_fails(monkeypatch, changes, moved):
    figures, text = golden("tatitok_uneven"), golden("tatitok_uneven")["text"]
    heads = {name: value for name, value in changes.items() if name.endswith("heads")}
    tokenizer = reference_tokenizer(uneven=True, **heads)
    if "text" in changes:
        text = text.roll(1, 1)
    if "colours" in changes:
        monkeypatch.setattr(tokenizer.decoder, "pixels", colours_slowest)
    if "encoder_num_heads" in changes:
        error = relative_l2(tokenizer.encode(figures["image_in"]), figures["moments"])
    else:
        error = relative_l2(tokenizer.decode(figures["latents"], text), figures["image_out"])
    assert error == pytest.approx(moved, rel=0.05)


@torch.no_grad()
def test_captions_to_images(captions):
    figures, model = golden("end_to_end"), reference_model("stable")
    features = tower().encode(captions, dtype=torch.float32)
    assert torch.equal(tower().tokenizer(captions, 10), figures["ids"])
    model.set_prompts(features)
    labels = torch.arange(3)
    assert_close(model.decoder_text(labels), figures["decoder_text"])
    np.random.seed(590)
    orders = []
    for _ in range(3):
        order = np.arange(12)
        np.random.shuffle(order)
        orders.append(torch.from_numpy(order))
    assert torch.equal(torch.stack(orders), figures["order"])
    latents = generate(
        model,
        labels,
        num_unmasking_steps=6,
        guidance_scale=3.0,
        order=figures["order"],
        generator=torch.Generator().manual_seed(591),
    ).latents
    assert_close(latents / LATENT_SCALE, figures["latents"], GENERATION)
    tokenizer = reference_tokenizer()
    images = tokenizer.decode(latents / LATENT_SCALE, model.decoder_text(labels))
    assert_close(images, figures["image"], GENERATION)
    assert (to_bytes(images).int() - figures["image_u8_hwc"].int()).abs().max() <= 1
    codec = TATiTokCodec(tokenizer, model.config.latent_scale)
    assert_close(codec.decode(latents, model.decoder_text(labels)), images.clamp(0, 1), 1e-6)

    mistaken = tokenizer.decode(latents / LATENT_SCALE, features.tokens[:3])
    assert_close(mistaken, figures["image_if_penultimate_text"], GENERATION)
    expected = facts()["controls"]["end to end: penultimate instead of final text in the decoder"]
    assert relative_l2(mistaken, images) == pytest.approx(expected, rel=0.02)
