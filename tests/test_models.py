"""The model as a Hugging Face model, and its configuration."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from tiny_models import tiny_config, tiny_model, tiny_student

from marval_rl.models import MARConfig, MARModel, PixelCodec, codec_for, patchify, unpatchify
from marval_rl.models.mar import Block
from marval_rl.models.unmasking import random_order
from marval_rl.trainers.pretrain import pretraining_loss


def contexts(batch: int = 3, seed: int = 0):
    """tokens [B, L, C], class labels [B], order [B, L]."""
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randn(batch, 4, 4, generator=generator)
    return tokens, torch.arange(batch) % 3, random_order(batch, 4, generator=generator)


@pytest.mark.parametrize("build", [tiny_model, tiny_student])
def test_saving_and_loading_changes_no_bit(tmp_path, build):
    model = build(class_names=["cat", "dog", "owl"])
    model.save_pretrained(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} >= {"config.json", "model.safetensors"}
    loaded = MARModel.from_pretrained(tmp_path)
    assert not loaded.training
    unequal = {"_name_or_path", "dtype"}  # where it was loaded from, and whether that was said
    before, after = model.config.to_dict(), loaded.config.to_dict()
    assert before.keys() == after.keys()
    assert all(before[key] == after[key] for key in before.keys() - unequal)
    assert loaded.config.is_one_step == model.config.is_one_step
    assert loaded.config.class_names == ["cat", "dog", "owl"]
    state = loaded.state_dict()
    assert list(state) == list(model.state_dict())
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())


def test_loading_a_folder_with_missing_weights_leaves_no_uninitialised_memory(tmp_path):
    """Missing weights get the official initialisation; nothing is left as it was allocated."""
    model = tiny_model()
    state = {name: tensor for name, tensor in model.state_dict().items() if not name.startswith("encoder_blocks")}
    model.save_pretrained(tmp_path, state_dict=state)
    loaded = MARModel.from_pretrained(tmp_path)
    assert torch.equal(loaded.encoder_blocks[0].norm1.weight, torch.ones(16))
    assert loaded.encoder_blocks[0].attn.qkv.bias.abs().max() == 0


def test_official_initialisation():
    """As in the official code: Xavier, tables of deviation 0.02, zero where the head starts as the identity."""
    torch.manual_seed(0)
    model = MARModel(tiny_config(num_classes=300, encoder_hidden_size=64, decoder_hidden_size=64, buffer_size=60))
    tables = ("class_emb.weight", "encoder_pos_embed_learned", "decoder_pos_embed_learned")
    for name in tables:
        assert model.get_parameter(name).std().item() == pytest.approx(0.02, rel=0.05)
    qkv = model.encoder_blocks[0].attn.qkv
    assert qkv.weight.abs().max().item() == pytest.approx((6 / (64 + 192)) ** 0.5, rel=0.01)
    assert qkv.bias.abs().max() == 0
    head = model.diffloss.net
    adaptive = [block.adaLN_modulation[1] for block in (*head.res_blocks, head.final_layer)]
    for layer in (*adaptive, head.final_layer.linear):
        assert layer.weight.abs().max() == layer.bias.abs().max() == 0
    assert head.time_embed.mlp[0].weight.std().item() == pytest.approx(0.02, rel=0.1)
    assert head.time_embed.mlp[2].weight.std().item() == pytest.approx(0.02, rel=0.1)


def test_gradient_checkpointing_gives_the_same_gradients():
    tokens, labels, order = contexts()
    timesteps = torch.randint(1000, (2, 3, 3), generator=torch.Generator().manual_seed(0))
    noise = torch.randn(2, 3, 3, 4, generator=torch.Generator().manual_seed(1))
    gradients, calls = [], []
    for checkpointing in (False, True):
        model = tiny_model().train()
        count = Counter()
        for block in model.modules():
            if isinstance(block, Block):
                block.norm1.register_forward_hook(lambda *_, count=count: count.update(["forward"]))
        if checkpointing:
            model.gradient_checkpointing_enable()
        pretraining_loss(model, tokens, labels, order, 3, timesteps, noise)[0].backward()
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
        calls.append(count["forward"])
    assert calls == [4, 8]  # each of the four blocks runs once more, in the backward pass
    assert gradients[0].keys() == gradients[1].keys()
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, msg=name)


def test_dropout_acts_in_training_only():
    model = tiny_model(attention_dropout=0.5, projection_dropout=0.5)
    tokens, labels, order = contexts()
    with torch.no_grad():
        assert torch.equal(model(tokens, labels, order, 2).condition, model(tokens, labels, order, 2).condition)
        model.train()
        assert not torch.equal(model(tokens, labels, order, 2).condition, model(tokens, labels, order, 2).condition)


@torch.no_grad()
def test_dropped_labels_get_the_null_class():
    model = tiny_model()
    tokens, labels, order = contexts()
    dropped = model(tokens, labels, order, 2, drop_mask=torch.tensor([False, True, False])).condition
    labelled, null = model(tokens, labels, order, 2).condition, model(tokens, None, order, 2).condition
    torch.testing.assert_close(dropped[[0, 2]], labelled[[0, 2]])
    torch.testing.assert_close(dropped[1], null[1])


@torch.no_grad()
def test_the_pretraining_loss_drops_labels():
    model = tiny_model()
    tokens, labels, order = contexts()
    timesteps, noise = torch.full((1, 3, 3), 500), torch.randn(1, 3, 3, 4)

    def loss(class_labels: torch.Tensor | None, dropped: list[bool]) -> torch.Tensor:
        mask = torch.tensor(dropped)
        return pretraining_loss(model, tokens, class_labels, order, 3, timesteps, noise, mask)[0]

    null = loss(None, [False] * 3)
    torch.testing.assert_close(loss(labels, [True] * 3), null)
    assert not torch.allclose(loss(labels, [True, False, True]), null)


@torch.no_grad()
def test_an_image_does_not_depend_on_its_neighbours_in_the_batch():
    model = tiny_model()
    tokens, labels, order = contexts()
    whole = model(tokens, labels, order, 3, 1).condition
    for row in range(3):
        alone = model(tokens[[row]], labels[[row]], order[[row]], 3, 1).condition
        torch.testing.assert_close(whole[[row]], alone)


@torch.no_grad()
def test_one_step_formula_by_hand():
    """x0 = (z - sigma eps(z, t*, c)) / alpha with the cosine schedule's alpha_t*."""
    model = tiny_student(one_step_timestep=600)
    tokens, labels, order = contexts()
    noise = torch.randn(3, 2, 4, generator=torch.Generator().manual_seed(2))
    x_start, condition = model.one_step(tokens, labels, order, 3, 1, noise)

    expected_condition = model(tokens, labels, order, 3, 1).condition
    torch.testing.assert_close(condition, expected_condition)
    eps = model.diffloss(noise, torch.full((3, 2), 600), expected_condition)[..., :4]
    angle = [(((step / 1000) + 0.008) / 1.008) * torch.pi / 2 for step in (0, 601)]
    alpha = (torch.tensor(angle[1]).cos() / torch.tensor(angle[0]).cos()).item()
    torch.testing.assert_close(x_start, (noise - (1 - alpha**2) ** 0.5 * eps) / alpha, rtol=1e-4, atol=1e-4)


def test_patches_of_two_by_two():
    """Tokens in reading order; inside a token the channel is slowest, then row, then column."""
    latents = torch.arange(32).view(1, 2, 4, 4)
    tokens = patchify(latents, 2)
    assert tokens.shape == (1, 4, 8)
    assert tokens[0, 1].tolist() == [2, 3, 6, 7, 18, 19, 22, 23]
    assert torch.equal(unpatchify(tokens, 2, 2), latents)


def test_pixel_codec_is_its_own_inverse():
    images = torch.rand(2, 1, 4, 4)
    codec = codec_for(tiny_config())
    assert isinstance(codec, PixelCodec)
    assert codec.encode(images).min() >= -1
    torch.testing.assert_close(codec.decode(codec.encode(images)), images)
    assert codec.decode(torch.tensor([-3.0, 3.0])).tolist() == [0.0, 1.0]
    with pytest.raises(ValueError, match="need a VAE"):
        codec_for(MARConfig())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_classes": -4}, "num_classes must be a whole number of at least 1, not -4"),
        ({"patch_size": 2.0}, "patch_size must be a whole number of at least 1, not 2.0"),
        ({"head_num_layers": -1}, "head_num_layers must be a whole number of at least 0, not -1"),
        ({"image_size": 5}, "image_size 5 is not a multiple"),
        ({"encoder_num_heads": 3}, "encoder_hidden_size 16 is not a multiple of encoder_num_heads 3"),
        ({"decoder_num_heads": 3}, "decoder_hidden_size 16 is not a multiple of decoder_num_heads 3"),
        ({"class_names": ["cat"]}, "1 class_names were given for num_classes = 3"),
        ({"one_step_timestep": 1000}, "one_step_timestep 1000 is outside 0..999"),
        ({"one_step_timestep": -1}, "one_step_timestep -1 is outside 0..999"),
    ],
)
def test_configurations_that_do_not_fit_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        tiny_config(**changes)


def test_sizes_that_follow_from_a_configuration():
    config = tiny_config()
    assert (config.grid, config.num_tokens, config.token_channels) == ((2, 2), 4, 4)
    assert (MARConfig().grid, MARConfig().num_tokens, MARConfig().token_channels) == ((16, 16), 256, 16)
    assert not config.is_one_step
    assert tiny_config(one_step_timestep=0).is_one_step
