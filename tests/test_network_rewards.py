"""What holds for every reward by a pretrained network: frozen, differentiable, batch-invariant, float32."""

from __future__ import annotations

import copy
import warnings

import open_clip
import pytest
import torch
from marval_rl.rewards import image_reward
from marval_rl.rewards.aesthetic import Aesthetic
from marval_rl.rewards.clip import Clip
from marval_rl.rewards.hps import MODEL, Hps
from marval_rl.rewards.image_classifier import ImageClassifier
from marval_rl.rewards.image_reward import ImageReward
from marval_rl.rewards.pick_score import PickScore
from tiny_rewards import (
    CLIP_CONFIG,
    TIMM_NAME,
    image_reward_arguments,
    noise_images,
    write_aesthetic,
    write_classifier,
    write_clip,
    write_hps,
    write_image_reward,
    write_pick_score,
    write_timm_classifier,
)

from marval_rl.rewarding import RewardSet

PROMPTS = ["two red cats", "an umbrella", "two red cats"]
LABELS = {"two red cats": 0, "an umbrella": 4}
PROMPTED = ["clip", "hps", "pick_score", "image_reward"]  # their scores depend on the prompt
LABELLED = ["classifier", "timm"]  # on the class label
REWARDS = [*PROMPTED, *LABELLED, "aesthetic"]

one_of_each_library = pytest.mark.parametrize("name", ["clip", "pick_score", "image_reward"])


@pytest.fixture(scope="module")
def makers(tmp_path_factory):
    """Name -> (class, keyword arguments) of a tiny reward."""
    folder = tmp_path_factory.mktemp("weights")
    pick_score = str(write_pick_score(folder / "pick_score"))
    clip = f"local-dir:{write_clip(folder / 'clip')}"
    timm_weights = str(write_timm_classifier(folder / "timm"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(image_reward, "VISION_HEADS", 4)
        patch.setitem(open_clip.factory._MODEL_CONFIGS, MODEL, CLIP_CONFIG)
        yield {
            "clip": (Clip, {"model": clip}),
            "hps": (Hps, {"weights": str(write_hps(folder / "hps"))}),
            "aesthetic": (Aesthetic, {"weights": str(write_aesthetic(folder / "aesthetic")), "model": clip}),
            "pick_score": (PickScore, {"model": pick_score, "processor": pick_score}),
            "image_reward": (ImageReward, image_reward_arguments(write_image_reward(folder / "image_reward"))),
            "classifier": (ImageClassifier, {"model": str(write_classifier(folder / "classifier"))}),
            "timm": (ImageClassifier, {"model": f"timm:{TIMM_NAME}", "weights": timm_weights}),
        }


@pytest.fixture(params=REWARDS)
def name(request) -> str:
    return request.param


@pytest.fixture
def make(name, makers):
    """Makes a tiny reward, with further arguments."""
    reward_class, arguments = makers[name]
    return lambda **more: reward_class(**arguments, **more)


@pytest.fixture(scope="module")
def made() -> dict:
    return {}


@pytest.fixture
def plain(name, make, made):
    """The reward with its default settings, the same one for all tests: nothing may change it."""
    if name not in made:
        made[name] = make()
    return made[name]


def score(reward, images, prompts=PROMPTS):
    labels = torch.tensor([LABELS.get(prompt, 0) for prompt in prompts])
    return reward(images=images, prompts=prompts, class_names=prompts, class_labels=labels)


def gradient(reward, images, prompts=PROMPTS):
    images = images.clone().requires_grad_()
    score(reward, images, prompts).sum().backward()
    return images.grad


def test_scores_of_any_size_tell_images_and_prompts_apart(plain, name):
    far = {"hps": 1e-4, "timm": 1e-4}.get(name, 0.01)  # HPS's scores are cosines
    for shape in ((40, 56), (32, 32), (20, 18)):
        images = noise_images(3, *shape)
        images[2] = images[0]
        scores = score(plain, images)
        assert scores.shape == (3,) and scores.dtype == torch.float32
        torch.testing.assert_close(scores[0], scores[2])
        assert abs(scores[0] - scores[1]) > far
        assert bool(abs(scores[0] - score(plain, images[:1], ["an umbrella"])) > far) is (name != "aesthetic")


@pytest.mark.parametrize("name", PROMPTED)
def test_a_prompt_that_is_longer_than_the_network_reads_is_named_once(make):
    reward, images = make(), noise_images(1, 32, 32)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        score(reward, images, ["two cats"])
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for long in ("cat " * 100, "dog " * 100):
            score(reward, images, [long])
    said = [str(warning.message) for warning in caught if "counts for nothing" in str(warning.message)]
    assert len(said) == 1 and repr("cat " * 100) in said[0]


@pytest.mark.parametrize("shape", [(36, 40), (40, 20)])
def test_the_gradient_is_the_one_of_finite_differences(make, name, shape):
    reward = make(score="margin") if name in LABELLED and shape == (40, 20) else make()
    reward.network = copy.deepcopy(reward.network).double()
    if name == "aesthetic":
        reward.head.double()
    reward.dtype = torch.float64
    targets = torch.eye(5).bool()[[0, 4]] if name in LABELLED else PROMPTS[:2]
    images = noise_images(2, *shape).double().requires_grad_()
    assert torch.autograd.gradcheck(lambda images: reward.score(images, targets), images, fast_mode=True)


def test_batches_and_micro_batches_change_neither_scores_nor_gradients(make, plain):
    images, portions = noise_images(3, 40, 50), make(micro_batch_size=2)
    together = score(plain, images)
    torch.testing.assert_close(score(portions, images), together, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(gradient(portions, images), gradient(plain, images), rtol=1e-4, atol=1e-6)
    for number, prompt in enumerate(PROMPTS):
        alone = score(plain, images[number : number + 1], [prompt])
        torch.testing.assert_close(alone[0], together[number], rtol=1e-5, atol=1e-5)


@one_of_each_library
def test_micro_batches_keep_the_activations_of_one_portion_only(make):
    def bytes_kept(reward) -> int:
        kept = 0

        def count(tensor):
            nonlocal kept
            kept += tensor.nbytes
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
            score(reward, noise_images(3, 40, 40).requires_grad_())
        return kept

    assert bytes_kept(make(micro_batch_size=1)) < 0.2 * bytes_kept(make())


def test_the_networks_are_frozen_and_without_dropout(plain, name):
    gradient(plain, noise_images(3, 32, 32))
    for network in (plain.network, plain.head) if name == "aesthetic" else (plain.network,):
        assert not any(module.training for module in network.modules())
        assert all(not parameter.requires_grad and parameter.grad is None for parameter in network.parameters())


@one_of_each_library
def test_an_evaluation_in_inference_mode_does_not_spoil_later_gradients(make, plain):
    reward, images = make(), noise_images(3, 40, 40)
    with torch.inference_mode():
        score(reward, images)
    torch.testing.assert_close(gradient(reward, images), gradient(plain, images))


@one_of_each_library
def test_autocast_changes_nothing(make, plain):
    images = noise_images(3, 40, 40)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = score(make(), images)
    assert torch.equal(found, score(plain, images))


def test_bfloat16_weights_give_float32_scores_near_those_of_float32(make, plain, name):
    images, reward = noise_images(3, 40, 40), make(dtype="bfloat16")
    low, full = score(reward, images), score(plain, images)
    assert low.dtype == torch.float32 and not torch.equal(low, full)
    torch.testing.assert_close(low, full, rtol=0.05, atol={"hps": 0.003}.get(name, 0.3 if name in PROMPTED else 0.1))
    assert gradient(reward, images).dtype == torch.float32


@one_of_each_library
def test_making_one_leaves_the_random_numbers_alone(make):
    before = torch.get_rng_state()
    make()
    assert torch.equal(torch.get_rng_state(), before)


@one_of_each_library
def test_wrong_settings_are_refused(make):
    with pytest.raises(ValueError, match="unknown dtype 'float8'; known: float32, bfloat16"):
        make(dtype="float8")
    with pytest.raises(ValueError, match="micro_batch_size must be at least 1"):
        make(micro_batch_size=0)


def test_used_by_a_recipe_with_and_without_gradient(makers, name):
    reward_class, arguments = makers[name]
    kwargs = {reward_class.__name__: arguments}
    rewards = RewardSet([f"{reward_class.__module__}:{reward_class.__name__}"], None, kwargs)
    images = noise_images(3, 40, 40).requires_grad_()
    batch = {"prompts": PROMPTS, "class_labels": torch.zeros(3, dtype=torch.int64), "class_names": PROMPTS}
    assert rewards.differentiable
    without_grad = rewards.score(images, **batch)
    with_grad = rewards.score(images, **batch, with_grad=True)
    with_grad.total.sum().backward()
    assert not without_grad.total.requires_grad and images.grad.abs().sum() > 0
    torch.testing.assert_close(without_grad.total, with_grad.total.detach())


@one_of_each_library
def test_a_compiled_network_scores_alike_and_is_compiled_once(make, monkeypatch):
    images = noise_images(3, 40, 56).requires_grad_()

    def score_and_gradient(reward):
        scores = score(reward, images)
        return scores, torch.autograd.grad(scores.sum(), images)[0]

    expected, compiled = score_and_gradient(make()), []

    def compile_without_a_compiler(module):  # tracing is what may go wrong; generating code takes half a minute
        compiled.append(module)
        return original(module, backend="eager")

    original = torch.nn.Module.compile
    monkeypatch.setattr(torch.nn.Module, "compile", compile_without_a_compiler)
    reward = make(compile=True)
    for _ in range(2):
        torch.testing.assert_close(score_and_gradient(reward), expected)
    assert compiled == [reward.compiled_part()]
