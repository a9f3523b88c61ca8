"""What holds for every reward by a pretrained network: frozen, differentiable, batch-invariant, float32."""

from __future__ import annotations

import pytest
import torch
from marval_rl.rewards import blip
from marval_rl.rewards.clip import Clip
from marval_rl.rewards.image_reward import ImageReward
from marval_rl.rewards.pick_score import PickScore
from tiny_rewards import image_reward_arguments, noise_images, write_clip, write_image_reward, write_pick_score

from marval_rl.rewarding import RewardSet

PROMPTS = ["two red cats", "an umbrella", "two red cats"]


@pytest.fixture(scope="module")
def makers(tmp_path_factory):
    """Name -> (class, keyword arguments) of a tiny reward."""
    folder = tmp_path_factory.mktemp("weights")
    pick_score = str(write_pick_score(folder / "pick_score"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(blip, "VISION_HEADS", 4)
        yield {
            "clip": (Clip, {"model": f"local-dir:{write_clip(folder / 'clip')}"}),
            "pick_score": (PickScore, {"model": pick_score, "processor": pick_score}),
            "image_reward": (ImageReward, image_reward_arguments(write_image_reward(folder / "image_reward"))),
        }


@pytest.fixture(params=["clip", "pick_score", "image_reward"])
def make(request, makers):
    """Makes a tiny reward, with further arguments."""
    reward_class, arguments = makers[request.param]
    return lambda **more: reward_class(**arguments, **more)


def score(reward, images, prompts=PROMPTS):
    return reward(images=images, prompts=prompts, class_names=prompts, class_labels=torch.zeros(len(prompts)))


def gradient(reward, images, prompts=PROMPTS):
    images = images.clone().requires_grad_()
    score(reward, images, prompts).sum().backward()
    return images.grad


def test_scores_of_any_size_tell_images_and_prompts_apart(make):
    reward = make()
    for shape in ((40, 56), (32, 32), (20, 18)):
        images = noise_images(3, *shape)
        images[2] = images[0]
        scores = score(reward, images)
        assert scores.shape == (3,) and scores.dtype == torch.float32
        torch.testing.assert_close(scores[0], scores[2])
        assert abs(scores[0] - scores[1]) > 0.01
        assert abs(scores[0] - score(reward, images[:1], ["an umbrella"])) > 0.01


def test_the_gradient_is_the_one_of_finite_differences(make):
    reward = make()
    reward.network.double()
    reward.dtype = torch.float64
    images = noise_images(2, 36, 40).double().requires_grad_()
    assert torch.autograd.gradcheck(lambda images: reward.score(images, PROMPTS[:2]), images, fast_mode=True)


def test_scores_do_not_depend_on_the_batch(make):
    reward, images = make(), noise_images(3, 40, 40)
    together = score(reward, images)
    for number, prompt in enumerate(PROMPTS):
        alone = score(reward, images[number : number + 1], [prompt])
        torch.testing.assert_close(alone[0], together[number], rtol=1e-5, atol=1e-5)


def test_micro_batches_change_neither_scores_nor_gradients(make):
    images = noise_images(3, 40, 40)
    whole, portions = make(), make(micro_batch_size=2)
    torch.testing.assert_close(score(portions, images), score(whole, images), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(gradient(portions, images), gradient(whole, images), rtol=1e-4, atol=1e-6)


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


def test_the_network_is_frozen_and_without_dropout(make):
    reward = make()
    gradient(reward, noise_images(3, 32, 32))
    assert not any(module.training for module in reward.network.modules())
    assert all(not parameter.requires_grad and parameter.grad is None for parameter in reward.network.parameters())


def test_an_evaluation_in_inference_mode_does_not_spoil_later_gradients(make):
    reward, images = make(), noise_images(3, 40, 40)
    with torch.inference_mode():
        score(reward, images)
    torch.testing.assert_close(gradient(reward, images), gradient(make(), images))


def test_autocast_changes_nothing(make):
    reward, images = make(), noise_images(3, 40, 40)
    expected = score(reward, images)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(score(make(), images), expected)


def test_bfloat16_weights_give_float32_scores_near_those_of_float32(make):
    images = noise_images(3, 40, 40)
    low, full = score(make(dtype="bfloat16"), images), score(make(), images)
    assert low.dtype == torch.float32 and not torch.equal(low, full)
    torch.testing.assert_close(low, full, rtol=0.05, atol=0.3)
    assert gradient(make(dtype="bfloat16"), images).dtype == torch.float32


def test_making_one_leaves_the_random_numbers_alone(make):
    before = torch.get_rng_state()
    make()
    assert torch.equal(torch.get_rng_state(), before)


def test_wrong_settings_are_refused(make):
    with pytest.raises(ValueError, match="unknown dtype 'float8'; known: float32, bfloat16"):
        make(dtype="float8")
    with pytest.raises(ValueError, match="micro_batch_size must be at least 1"):
        make(micro_batch_size=0)


@pytest.mark.parametrize("name", ["clip", "pick_score", "image_reward"])
def test_used_by_a_recipe_with_and_without_gradient(makers, name):
    reward_class, arguments = makers[name]
    rewards = RewardSet(
        [f"{reward_class.__module__}:{reward_class.__name__}"], None, {reward_class.__name__: arguments}
    )
    images = noise_images(3, 40, 40).requires_grad_()
    batch = {"prompts": PROMPTS, "class_labels": torch.zeros(3, dtype=torch.int64), "class_names": PROMPTS}
    assert rewards.differentiable
    plain = rewards.score(images, **batch)
    with_grad = rewards.score(images, **batch, with_grad=True)
    with_grad.total.sum().backward()
    assert not plain.total.requires_grad and images.grad.abs().sum() > 0
    torch.testing.assert_close(plain.total, with_grad.total.detach())


def test_a_compiled_network_scores_alike_and_is_compiled_once(make, monkeypatch):
    images = noise_images(3, 40, 56)
    expected, slope = score(make(), images), gradient(make(), images)
    compiled = []

    def compile_without_a_compiler(module):  # tracing is what may go wrong; generating code takes half a minute
        compiled.append(module)
        return original(module, backend="eager")

    original = torch.nn.Module.compile
    monkeypatch.setattr(torch.nn.Module, "compile", compile_without_a_compiler)
    reward = make(compile=True)
    for _ in range(2):
        torch.testing.assert_close(score(reward, images), expected)
    torch.testing.assert_close(gradient(reward, images), slope)
    assert compiled == [reward.compiled_part()]
