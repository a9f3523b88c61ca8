"""What only a GPU can show; `make test-gpu` runs it where there is one, in a few minutes."""

from __future__ import annotations

import math
import subprocess
import sys
from collections.abc import Iterator

import pytest
import torch
from mar_reference import WEIGHTS, golden, reference_model, relative_l2
from tiny_models import tiny_model, tiny_student
from tiny_recipes import command_line
from tiny_trainers import ANCHOR, MATCHED, backprop_trainer, distiller, grpo_trainer, logged, pretrainer

from marval_rl.models import generate
from marval_rl.models.compiling import CapturedGenerations, compile_blocks
from marval_rl.models.noise import IndexedNoise

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]
# bfloat16 has 8 bits: 2^-8 a rounding, and some dozens of them in a row.
BF16_TOLERANCE, FLOAT32_TOLERANCE = 3e-2, 2e-3


@pytest.fixture(autouse=True)
def full_float32() -> Iterator[None]:
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    yield
    torch.set_float32_matmul_precision(before)


@pytest.mark.parametrize(("dtype", "tolerance"), [(None, FLOAT32_TOLERANCE), (torch.bfloat16, BF16_TOLERANCE)])
@pytest.mark.parametrize("weights", WEIGHTS)
@torch.no_grad()
def test_conditions_are_the_official_codes(weights, dtype, tolerance):
    figures, model = golden("transformer"), reference_model(weights).cuda()
    tokens, labels, order = (figures[name].cuda() for name in ("tokens", "labels", "order"))
    with torch.autocast("cuda", dtype, enabled=dtype is not None):
        condition = model(tokens, labels, order, 16).condition
    assert relative_l2(condition.float().cpu(), figures[f"{weights}.dec_all"]) < tolerance


@pytest.mark.parametrize(("dtype", "tolerance"), [(None, FLOAT32_TOLERANCE), (torch.bfloat16, 5 * BF16_TOLERANCE)])
@pytest.mark.parametrize("one_step", [False, True])
def test_images_are_those_of_the_cpu(one_step, dtype, tolerance):
    model = tiny_student() if one_step else tiny_model(clip_sample_range=1.0)
    labels, indices = torch.tensor([0, 1, 2]), torch.arange(3)
    settings = {"num_unmasking_steps": 3} | ({} if one_step else {"guidance_scale": 1.5, "num_diffusion_steps": 4})
    expected = generate(model, labels, generator=IndexedNoise(0, indices), **settings).latents
    noise = IndexedNoise(0, indices.cuda())
    found = generate(model.cuda(), labels.cuda(), generator=noise, autocast_dtype=dtype, **settings).latents
    assert relative_l2(found.cpu(), expected) < tolerance


ANCHORS = {"beta": 0.1, **ANCHOR, **MATCHED}


@pytest.mark.parametrize(
    "make",
    [
        lambda folder, **s: pretrainer(folder, tiny_model(), **s),
        lambda folder, **s: distiller(folder, tiny_model(), **s),
        lambda folder, **s: grpo_trainer(folder, tiny_student(), policy_std=1.0, **ANCHORS, **s),
        lambda folder, **s: backprop_trainer(folder, tiny_student(), **ANCHORS, **s),
    ],
    ids=["pretrain", "distill", "grpo", "reward_backprop"],
)
def test_steps_of_each_trainer_in_bf16(make, tmp_path):
    trainer = make(tmp_path, bf16=True, max_steps=4, gradient_checkpointing=True)
    before = {name: weight.clone() for name, weight in trainer.mar.state_dict().items()}
    trainer.train()
    assert trainer.mar.device.type == "cuda"
    assert all(math.isfinite(loss) for loss in logged(trainer, "loss"))
    assert any(not torch.equal(before[name], weight) for name, weight in trainer.mar.state_dict().items())


def sample(student, steps: int, seed: int = 0) -> torch.Tensor:
    labels, indices = torch.arange(4, device="cuda") % 3, torch.arange(4, device="cuda")
    return generate(student, labels, num_unmasking_steps=steps, generator=IndexedNoise(seed, indices)).latents


def test_compiled_blocks_generate_the_same():
    plain, compiled = tiny_student(image_size=8).cuda(), tiny_student(image_size=8).cuda()
    compile_blocks(compiled)
    for steps in (16, 5):
        torch.testing.assert_close(sample(compiled, steps), sample(plain, steps), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("compiled", [False, True])
def test_captured_generations_are_those_of_the_plain_student(compiled):
    """Which also shows that nothing in a generation waits for the device."""
    plain, captured = tiny_student(image_size=8).cuda(), tiny_student(image_size=8).cuda()
    captured.captured = CapturedGenerations(captured)
    if compiled:
        compile_blocks(captured)
    for seed in range(3):  # captured, then replayed
        torch.testing.assert_close(sample(captured, 16, seed), sample(plain, 16, seed), rtol=1e-3, atol=1e-4)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_two_gpus_train_by_nccl(tmp_path):
    words = command_line("teacher", tmp_path / "run", "--num_processes", "2", max_steps=2)
    subprocess.run([sys.executable, "-m", "marval_rl", *words], check=True, timeout=300)
    assert (tmp_path / "run" / "final").is_dir()
