"""ImageReward against figures of the original implementation, and the mistakes that it must notice."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from marval_rl.rewards import image_reward
from marval_rl.rewards.image_reward import MED_CONFIG, ImageReward, ImageRewardNetwork, network_configs, rename_weights
from marval_rl.rewards.preprocessing import Preprocessing
from safetensors.torch import load_file, save_file
from tiny_rewards import FIGURES, GOLDEN, golden_image, image_reward_arguments, to_tensor, write_image_reward
from torch import Tensor
from torchvision.transforms import CenterCrop, Compose, InterpolationMode, Resize

from marval_rl.errors import CheckpointError

PROMPTS, EXPECTED = FIGURES["prompts"], FIGURES["rules"]["B"]
TOLERANCE = 1e-5
PUBLISHED_HEADS = image_reward.VISION_HEADS


@pytest.fixture(autouse=True)
def tiny_heads(monkeypatch):
    monkeypatch.setattr(image_reward, "VISION_HEADS", 4)


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    return write_image_reward(tmp_path_factory.mktemp("image_reward"))


@pytest.fixture
def arguments(weights):
    return image_reward_arguments(weights)


def bytes_as_the_original_sees_them() -> Tensor:
    """The three golden images, resized and cropped by PIL: [3, 3, 224, 224] in 0..1."""
    transform = Compose([Resize(224, InterpolationMode.BICUBIC), CenterCrop(224)])
    return torch.cat([to_tensor(transform(golden_image(number))) for number in range(3)])


def scores(reward: ImageReward) -> Tensor:
    """[prompt, image], as the figures are."""
    images = bytes_as_the_original_sees_them()
    with torch.no_grad():
        return torch.stack([reward(images=images, prompts=[prompt] * 3) for prompt in PROMPTS])


def distance(reward: ImageReward) -> float:
    """How far the scores are from the original's at worst."""
    return float((scores(reward) - torch.tensor(EXPECTED["score"])).abs().max())


def test_scores_are_those_of_the_original(arguments):
    assert distance(ImageReward(**arguments)) < TOLERANCE


def test_scores_of_unprepared_images_differ_by_pil_rounding_only(arguments):
    reward = ImageReward(**arguments)
    for number in range(3):
        for prompt, expected in zip(PROMPTS, EXPECTED["score"], strict=True):
            found = float(reward(images=to_tensor(golden_image(number)), prompts=[prompt]))
            assert found == pytest.approx(expected[number], abs=5e-3 if number else TOLERANCE)


def test_gradients_are_those_of_the_original(arguments):
    reward = ImageReward(**arguments)
    pixels = Preprocessing(224)(bytes_as_the_original_sees_them())
    first_patch = load_file(GOLDEN / "tensors_tiny.safetensors")["B.pixel_grad_first_patch"]
    for number, prompt in enumerate(PROMPTS):
        reward.preprocessing = lambda images: images  # the figures are gradients of normalised pixels
        images = pixels.clone().requires_grad_()
        reward(images=images, prompts=[prompt] * 3).sum().backward()
        norms = images.grad.flatten(1).norm(dim=1)
        sums = images.grad.flatten(1).sum(dim=1)
        torch.testing.assert_close(norms, torch.tensor(EXPECTED["pixel_grad_norm"][number]), rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(sums, torch.tensor(EXPECTED["pixel_grad_sum"][number]), rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(images.grad[..., :16, :16], first_patch[number], rtol=1e-4, atol=1e-7)


def test_states_inside_the_network_are_those_of_the_original(arguments):
    reward = ImageReward(**arguments)
    expected = load_file(GOLDEN / "tensors_tiny.safetensors")
    with torch.no_grad():
        states = reward.network.vision(Preprocessing(224)(bytes_as_the_original_sees_them())).last_hidden_state
    torch.testing.assert_close(states[:, :4], expected["B.image_embeds_first"], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(states.mean(dim=2), expected["B.image_embeds_token_mean"], rtol=1e-4, atol=1e-5)


def test_prompts_become_the_same_tokens(arguments, tmp_path):
    shutil.copy(GOLDEN / "vocab.txt", tmp_path)
    for tokenizer in (arguments["tokenizer"], str(tmp_path)):
        reward = ImageReward(**{**arguments, "tokenizer": tokenizer})
        input_ids, attention_mask = reward.tokenize(PROMPTS)
        assert input_ids.tolist() == FIGURES["input_ids"]
        assert attention_mask.tolist() == FIGURES["attention_mask"]
        assert reward.tokenize([PROMPTS[0].upper()])[0].tolist() == FIGURES["input_ids"][:1]
        assert reward.tokenize(["cat " * 60])[0][0].tolist() == FIGURES["truncated_ids_for_60x_cat"]


def test_the_network_at_full_size_has_the_reference_names(monkeypatch):
    monkeypatch.setattr(image_reward, "VISION_HEADS", PUBLISHED_HEADS)
    expected = json.loads((GOLDEN / "key_map.json").read_text())
    found = {name: None for name in expected}
    found |= {old: new for new, old in rename_weights({name: name for name in expected}).items()}
    assert found == expected
    vision = {
        "vision.embeddings.patch_embedding.weight": torch.empty(1024, 3, 16, 16, device="meta"),
        "vision.embeddings.position_embedding": torch.empty(1, 197, 1024, device="meta"),
        **{
            f"vision.encoder.layers.{layer}.mlp.fc1.weight": torch.empty(4096, 1024, device="meta")
            for layer in range(24)
        },
    }
    with torch.device("meta"):
        network = ImageRewardNetwork(*network_configs(vision, MED_CONFIG, "the published weights"))
    assert set(network.state_dict()) == set(filter(None, expected.values()))
    image, text = network.vision.config, network.text.config
    assert (image.hidden_size, image.num_attention_heads, image.image_size) == (1024, 16, 224)
    assert (text.hidden_size, text.num_attention_heads, text.encoder_hidden_size) == (768, 12, 1024)
    assert (image.layer_norm_eps, text.layer_norm_eps) == (1e-6, 1e-12)  # too small to show in the figures


def test_the_built_in_settings_are_the_published_ones():
    published = json.loads((GOLDEN / "med_config.json").read_text())
    assert published.items() >= MED_CONFIG.items()


@pytest.mark.parametrize("heads", [2, 8])
def test_another_number_of_image_heads_is_noticed(arguments, monkeypatch, heads):
    monkeypatch.setattr(image_reward, "VISION_HEADS", heads)
    assert distance(ImageReward(**arguments)) > 100 * TOLERANCE


def test_another_number_of_text_heads_is_noticed(arguments, tmp_path):
    settings = json.loads((GOLDEN / "med_config_tiny.json").read_text())
    (tmp_path / "med_config.json").write_text(json.dumps({**settings, "num_attention_heads": 8}))
    changed = {**arguments, "med_config": tmp_path / "med_config.json"}
    assert distance(ImageReward(**changed)) > 100 * TOLERANCE


def test_enc_in_place_of_cls_is_noticed(arguments, monkeypatch):
    reward = ImageReward(**arguments)
    tokenize = reward.tokenize

    def with_enc(prompts):
        input_ids, attention_mask = tokenize(prompts)
        input_ids[:, 0] = FIGURES["special"]["enc_token_id"]
        return input_ids, attention_mask

    monkeypatch.setattr(reward, "tokenize", with_enc)
    assert distance(reward) > 100 * TOLERANCE


def test_bfloat16_is_noticed(arguments):
    assert distance(ImageReward(**arguments, dtype="bfloat16")) > 10 * TOLERANCE


def test_safetensors_do_as_well(arguments, weights, tmp_path):
    save_file(torch.load(weights, weights_only=True), tmp_path / "ImageReward.safetensors")
    assert distance(ImageReward(**{**arguments, "weights": tmp_path / "ImageReward.safetensors"})) < TOLERANCE


class Hostile:
    def __reduce__(self):
        return exec, ("raise SystemExit('executed')",)


def broken_files(tensors: dict[str, Tensor], weights) -> dict[str, object]:
    """Name -> (what is written in place of the weights, what the error says)."""
    first = "blip.visual_encoder.cls_token"
    without = {name: value for name, value in tensors.items() if name != "mlp.layers.7.bias"}
    return {
        "hostile": (Hostile(), "cannot be read as weights"),
        "truncated": (weights.read_bytes()[:5000], "cannot be read as weights"),
        "empty": (b"", "cannot be read as weights"),
        "list": ([1, 2], "holds a list that does not map names to weights"),
        "another network": ({"weight": torch.zeros(3)}, "does not hold ImageReward's weights"),
        "missing": (without, r"1 missing \(head.7.bias\)"),
        "too many": ({**tensors, "more": torch.zeros(3)}, r"1 unknown \(more\)"),
        "shape": (
            {**tensors, first: torch.zeros(1, 1, 3)},
            r"1 of another shape \(vision.embeddings.class_embedding\)",
        ),
        "nan": ({**tensors, first: tensors[first] * torch.nan}, "holds NaN or infinity"),
    }


BROKEN = ("hostile", "truncated", "empty", "list", "another network", "missing", "too many", "shape", "nan")


@pytest.mark.parametrize("kind", BROKEN)
def test_a_broken_file_is_refused_in_one_line(arguments, weights, tmp_path, kind):
    content, message = broken_files(torch.load(weights, weights_only=True), weights)[kind]
    path = tmp_path / "ImageReward.pt"
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        torch.save(content, path)
    with pytest.raises(CheckpointError, match=message) as error:
        ImageReward(**{**arguments, "weights": path})
    assert "\n" not in str(error.value)


def test_wrong_arguments_name_the_remedy(arguments, tmp_path):
    (tmp_path / "short.txt").write_text("[PAD]\n[UNK]\n[CLS]\n[SEP]\n[MASK]\na\n")
    (tmp_path / "other.json").write_text('{"hidden_size": 48}')
    for argument, value, message in (
        ("weights", tmp_path / "no.pt", "do not exist; download ImageReward.pt"),
        ("tokenizer", str(tmp_path / "no.txt"), "the tokenizer .*no.txt' does not exist"),
        ("tokenizer", str(tmp_path / "short.txt"), "has 6 tokens, but the network's vocabulary of 173 needs 171"),
        ("med_config", tmp_path / "no.json", "no.json' cannot be read"),
        ("med_config", tmp_path / "other.json", "other.json' is not a med_config.json: hidden_act, "),
    ):
        with pytest.raises(CheckpointError, match=message):
            ImageReward(**{**arguments, argument: value})
