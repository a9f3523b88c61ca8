"""Generating images: one function for teacher and student."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from tiny_models import tiny_model, tiny_student
from torch.utils._python_dispatch import TorchDispatchMode

from marval_rl.models import MARModel, chain, generate, patchify
from marval_rl.models.noise import IndexedNoise
from marval_rl.models.sampling import student_mean, unmask
from marval_rl.models.unmasking import gather_tokens, random_order, revealed_positions, unmasking_steps

LABELS = torch.tensor([0, 1, 2, 1])
BUILDS = {"teacher": tiny_model, "student": tiny_student}


@pytest.fixture(params=BUILDS)
def model(request) -> MARModel:
    return BUILDS[request.param]()


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def sample(model: MARModel, seed: int = 0, **settings):
    return generate(model, LABELS, **{"num_unmasking_steps": 3, "generator": seeded(seed), **settings})


def test_the_generator_decides_everything(model):
    first = sample(model).latents
    torch.manual_seed(123)
    state = torch.get_rng_state()
    assert torch.equal(sample(model).latents, first)
    assert torch.equal(torch.get_rng_state(), state)
    assert not torch.equal(sample(model, seed=1).latents, first)


def test_without_a_generator_the_global_one_decides(model):
    latents = []
    for seed in (7, 7, 8):
        torch.manual_seed(seed)
        latents.append(sample(model, generator=None).latents)
    assert torch.equal(latents[0], latents[1])
    assert not torch.equal(latents[0], latents[2])


@pytest.mark.parametrize("num_unmasking_steps", [1, 2, 4, 9])
def test_any_number_of_unmasking_steps_fills_every_token(model, num_unmasking_steps):
    output = sample(model, num_unmasking_steps=num_unmasking_steps, return_steps=True)
    assert output.latents.shape == (4, 1, 4, 4)
    assert output.latents.isfinite().all()
    assert len(output.steps) == min(4, num_unmasking_steps)
    assert not torch.equal(output.latents[0], output.latents[2])


def test_steps_are_consistent_with_the_order_and_the_result(model):
    order = random_order(4, 4, generator=seeded(5))
    output = sample(model, order=order, return_steps=True)
    rows = torch.arange(4).unsqueeze(1)
    before = torch.zeros(4, 4, 4)
    for step, (masked, kept) in zip(output.steps, unmasking_steps(4, 3), strict=True):
        positions = order[:, kept:masked].sort(dim=1).values
        torch.testing.assert_close(step.tokens[rows, positions], step.revealed)
        untouched = torch.ones(4, 4, dtype=torch.bool).scatter(1, positions, False)
        assert torch.equal(step.tokens[untouched], before[untouched])
        assert step.condition.shape == (4, masked - kept, 16)
        before = step.tokens
    assert torch.equal(before, patchify(output.latents, 2))
    assert not generate(model, LABELS, num_unmasking_steps=3).steps


def test_a_student_needs_one_pass_per_step():
    """x0 of the revealed tokens from noise that belongs to the position, scaled by the temperature."""
    student, order = tiny_student(), random_order(4, 4, generator=seeded(5))
    output = sample(student, order=order, temperature=0.7, return_steps=True)
    noise = 0.7 * torch.randn(4, 4, 4, generator=seeded())
    tokens, rows = torch.zeros(4, 4, 4), torch.arange(4).unsqueeze(1)
    for masked, kept in unmasking_steps(4, 3):
        positions = order[:, kept:masked].sort(dim=1).values
        with torch.no_grad():
            revealed, _ = student.one_step(tokens, LABELS, order, masked, kept, noise[rows, positions])
        tokens = tokens.clone()
        tokens[rows, positions] = revealed
    torch.testing.assert_close(output.steps[-1].tokens, tokens)


def test_a_teacher_denoises_and_a_student_does_not():
    """The same weights under either configuration: the head runs once per token, or once per diffusion step."""
    for build, calls in ((tiny_model, 3 * 5), (tiny_student, 3)):
        model, count = build(), []
        model.diffloss.net.input_proj.register_forward_hook(lambda *_, count=count: count.append(1))
        sample(model, **({} if model.config.is_one_step else {"num_diffusion_steps": 5}))
        assert len(count) == calls


def test_autocast_changes_the_precision_of_the_networks_only(model):
    """The noise and the chain stay in float32; None leaves an autocast around the call as it is."""
    exact, rough = sample(model).latents, sample(model, autocast_dtype=torch.bfloat16).latents
    assert rough.dtype == torch.float32
    assert not torch.equal(rough, exact)
    assert (rough - exact).norm() < 0.1 * exact.norm()
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(sample(model).latents, rough)


def test_temperature_and_diffusion_steps_matter():
    teacher = tiny_model()
    latents = sample(teacher).latents
    assert not torch.equal(latents, sample(teacher, temperature=0.5).latents)
    assert torch.equal(latents, sample(teacher, num_diffusion_steps=4).latents)  # the configuration's
    assert not torch.equal(latents, sample(teacher, num_diffusion_steps=3).latents)


def test_a_student_has_no_diffusion_steps():
    with pytest.raises(ValueError, match="num_diffusion_steps 5 was given to a one-step student, which runs no chain"):
        sample(tiny_student(), num_diffusion_steps=5)


@pytest.mark.parametrize("rows_at_once", [1, 24, 10_000])
def test_timesteps_whose_modulations_are_computed_together_change_nothing(monkeypatch, rows_at_once):
    settings = {"num_diffusion_steps": 7, "guidance_scale": 2.0}
    expected = sample(tiny_model(), **settings).latents
    monkeypatch.setattr(chain, "ROWS_AT_ONCE", rows_at_once)
    torch.testing.assert_close(sample(tiny_model(), **settings).latents, expected)


def test_a_clipped_teacher_stays_in_the_range_of_pixels():
    """At the last reverse step the sample is the predicted start itself."""
    free = sample(tiny_model()).latents
    clipped = sample(tiny_model(clip_sample_range=0.5)).latents
    assert free.abs().max() > 0.5
    assert clipped.abs().max() == 0.5
    assert (clipped.abs() < 0.5).float().mean() > 0


def test_guidance_of_a_teacher():
    teacher = tiny_model()
    plain = sample(teacher, return_steps=True)
    assert [step.guidance_scale for step in plain.steps] == [1.0] * 3
    guided = sample(teacher, guidance_scale=2.0, guidance_schedule="constant", return_steps=True)
    assert [step.guidance_scale for step in guided.steps] == [2.0] * 3
    assert guided.steps[0].condition.shape[0] == 8
    torch.testing.assert_close(guided.steps[0].condition[:4], plain.steps[0].condition)
    assert not torch.allclose(guided.latents, plain.latents)


def test_guidance_is_refused_for_a_student():
    with pytest.raises(ValueError, match=r"guidance_scale 1\.5 was given to a one-step student"):
        sample(tiny_student(), guidance_scale=1.5)


def test_the_null_class_needs_a_batch_size(model):
    output = generate(model, None, batch_size=2, num_unmasking_steps=2, generator=seeded())
    assert output.latents.shape == (2, 1, 4, 4)
    with pytest.raises(ValueError, match="give class_labels, or batch_size"):
        generate(model, None, num_unmasking_steps=2)


@pytest.mark.parametrize("label", [3, -1])
def test_unknown_class_labels_are_named(model, label):
    with pytest.raises(ValueError, match=rf"class label {label} is outside 0\.\.2"):
        generate(model, torch.tensor([0, label]), num_unmasking_steps=2)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_unmasking_steps": 0}, "num_unmasking_steps must be at least 1, not 0"),
        ({"guidance_schedule": "cosine"}, 'guidance_schedule must be "linear" or "constant"'),
    ],
)
def test_wrong_settings_are_named(model, settings, message):
    with pytest.raises(ValueError, match=message):
        sample(model, **settings)


def test_nothing_takes_a_gradient(model):
    assert all(p.requires_grad for p in model.parameters())
    assert not sample(model).latents.requires_grad


def test_sampling_under_inference_mode_does_not_spoil_later_training():
    """The arrays of a process are cached; made under inference mode they could not be saved for a backward pass."""
    student = tiny_student(num_train_timesteps=997)  # a process that no other test has used
    with torch.inference_mode():
        sample(student)
    tokens, order, noise = torch.randn(2, 4, 4), random_order(2, 4), torch.randn(2, 1, 4)
    x_start, _ = student.one_step(tokens, LABELS[:2], order, 1, 0, noise)
    x_start.sum().backward()
    assert student.diffloss.net.final_layer.linear.weight.grad.abs().max() > 0


def test_a_rollout_without_exploration_equals_generate():
    student, order = tiny_student(), random_order(4, 4, generator=seeded(5))
    generated = generate(student, LABELS, num_unmasking_steps=3, order=order, generator=seeded()).latents
    noise = torch.randn(16, 4, generator=seeded()).view(4, 4, 4)
    predict = partial(student_mean, student, {"class_labels": LABELS, "order": order, "noise": noise})
    exploration = torch.randn(4, 4, 4, generator=seeded(1))
    for steps, same in (
        (unmask(predict, order, 4, 3), True),
        (unmask(predict, order, 4, 3, exploration=exploration), True),  # policy_std 0
        (unmask(predict, order, 4, 3, exploration=exploration, policy_std=0.1), False),
    ):
        *earlier, last = steps
        assert torch.equal(last.tokens, patchify(generated, 2)) == same
        assert [step.number for step in (*earlier, last)] == [0, 1, 2]


def test_only_what_the_policy_explored_differs_from_its_mean():
    student, order = tiny_student(), random_order(4, 4, generator=seeded(5))
    inputs = {"class_labels": LABELS, "order": order, "noise": torch.randn(4, 4, 4, generator=seeded())}
    exploration = torch.randn(4, 4, 4, generator=seeded(1))
    for step in unmask(partial(student_mean, student, inputs), order, 4, 3, exploration=exploration, policy_std=0.1):
        positions = revealed_positions(order, step.num_masked, step.num_kept)
        torch.testing.assert_close(step.revealed - step.mean, 0.1 * gather_tokens(exploration, positions))
        assert torch.equal(gather_tokens(step.tokens, positions), step.revealed)
        assert gather_tokens(step.before, positions).abs().max() == 0
        # Finished images serve for all steps: only tokens that were unmasked before are read.
        again = student_mean(student, inputs, step.tokens + 9 * step.tokens.eq(0), step.num_masked, step.num_kept)
        torch.testing.assert_close(again, step.mean)


class HostSyncs(TorchDispatchMode):
    """Counts operations that make the host wait for a device: reading a number, or selecting by a mask."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.name()
        self.count += any(word in name for word in ("_local_scalar_dense", "nonzero", "unique", "masked_select"))
        if name.startswith("aten::index.") or name.startswith("aten::index_put"):
            self.count += any(index is not None and index.dtype == torch.bool for index in args[1])
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("source", [seeded, lambda: IndexedNoise(0, torch.arange(4))], ids=["generator", "indices"])
def test_no_step_waits_for_the_device(model, source):
    """Only the check of the class labels reads anything back, however many steps follow."""
    counts = []
    for num_unmasking_steps, num_diffusion_steps in ((1, 2), (4, 6)):
        settings = {"num_unmasking_steps": num_unmasking_steps}
        if not model.config.is_one_step:
            settings["num_diffusion_steps"] = num_diffusion_steps
        noise = source()
        with HostSyncs() as syncs:
            sample(model, generator=noise, **settings)
        counts.append(syncs.count)
    assert counts[0] == counts[1] <= 4


def test_host_syncs_are_seen():
    """The counter of the test above would notice one."""
    with HostSyncs() as syncs:
        torch.ones(3).sum().item()
        torch.ones(3)[torch.tensor([True, False, True])]
    assert syncs.count == 2
