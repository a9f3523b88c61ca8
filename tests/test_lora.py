"""Low-rank adapters: where they sit, that only they are trained, and that what is saved generates what was trained."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel
from safetensors.torch import load_file
from tiny_models import tiny_student
from tiny_recipes import comparable_lines, run_recipe
from tiny_trainers import ANCHOR, GRPO, QUIET, anchor_of, darkness, logged, power_cut_in_step, same, snapshot
from torch import Tensor

from marval_rl.data import class_rows
from marval_rl.models import MARModel, generate
from marval_rl.models.checkpoints import load_model
from marval_rl.recipes.network_arguments import LoraArguments
from marval_rl.rewarding import RewardSet
from marval_rl.trainers.grpo import MARGRPOConfig, MARGRPOTrainer
from marval_rl.trainers.lora import LORA_TARGETS, adapters_off, add_lora, merged_student
from marval_rl.trainers.reward_backprop import RewardBackpropConfig, RewardBackpropTrainer

EVERYWHERE = LoraConfig(r=2, lora_alpha=4, target_modules=LORA_TARGETS["all"])


def adapted(seed: int = 0, **changes: Any) -> MARModel:
    """A student whose adapters do something."""
    student = tiny_student(seed, **changes)
    add_lora(student, EVERYWHERE, seed=0)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in student.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.3, generator=generator)
    return student


def sample(model: MARModel) -> Tensor:
    labels, generator = torch.tensor([0, 1, 2]), torch.Generator().manual_seed(0)
    return generate(model, labels, num_unmasking_steps=2, generator=generator).latents


def lora_trainer(folder: Path, student: MARModel, **settings: Any) -> MARGRPOTrainer:
    args = MARGRPOConfig(str(folder), **{**GRPO, **settings})
    rewards, rows = RewardSet([darkness]), class_rows(3)
    return MARGRPOTrainer(
        student, rewards, args, train_dataset=rows, peft_config=EVERYWHERE, **anchor_of(args, student)
    )


def trained_layers(student: MARModel) -> set[str]:
    return {name.split(".lora_")[0] for name, p in student.named_parameters() if p.requires_grad}


def test_adapters_sit_in_the_layers_that_the_target_names():
    layers = {}
    for target, modules in LORA_TARGETS.items():
        student = tiny_student()
        add_lora(student, LoraConfig(r=2, target_modules=modules), seed=0)
        layers[target] = trained_layers(student)
        assert all(p.requires_grad == ("lora_" in name) for name, p in student.named_parameters())
    blocks = [f"{half}_blocks.{i}" for half in ("encoder", "decoder") for i in (0, 1)]
    inside = ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")
    assert layers["backbone"] == {f"{block}.{layer}" for block in blocks for layer in inside}
    head = [f"res_blocks.{i}.{layer}" for i in (0, 1) for layer in ("mlp.0", "mlp.2", "adaLN_modulation.1")]
    head += ["cond_embed", "final_layer.linear", "final_layer.adaLN_modulation.1"]
    assert layers["head"] == {f"diffloss.net.{layer}" for layer in head}
    assert layers["all"] == layers["backbone"] | layers["head"]


def test_new_adapters_change_nothing_and_depend_on_the_seed_alone():
    plain, one, other = tiny_student(), tiny_student(), tiny_student()
    add_lora(one, EVERYWHERE, seed=3)
    state = torch.random.get_rng_state()
    torch.manual_seed(99)
    add_lora(other, EVERYWHERE, seed=3)
    torch.random.set_rng_state(state)
    assert torch.equal(sample(one), sample(plain))
    assert same(one.state_dict(), other.state_dict())


def test_a_student_with_its_adapters_off_is_the_one_before():
    student, plain = adapted(), tiny_student()
    trained = trained_layers(student)
    assert not torch.allclose(sample(student), sample(plain), atol=1e-2)
    with adapters_off(student):
        assert torch.equal(sample(student), sample(plain))
    assert not torch.allclose(sample(student), sample(plain), atol=1e-2)
    assert trained_layers(student) == trained


def test_a_merged_student_generates_the_same_and_disturbs_nothing():
    student = adapted()
    before, images, state = snapshot(student), sample(student), torch.random.get_rng_state()
    merged = merged_student(student)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert torch.allclose(sample(merged), images, atol=1e-4)
    assert merged.state_dict().keys() == tiny_student().state_dict().keys()
    assert same(before, student.state_dict())


def test_gradients_reach_the_adapters_through_checkpointed_blocks():
    gradients = []
    for checkpointed in (False, True):
        student = adapted().train()
        if checkpointed:
            student.gradient_checkpointing_enable({"use_reentrant": False})
        noise = torch.randn(3, 4, 4, generator=torch.Generator().manual_seed(2))
        order = torch.arange(4).expand(3, -1)
        student.one_step(torch.zeros(3, 4, 4), torch.arange(3), order, 4, 0, noise)[0].square().mean().backward()
        gradients.append({name: p.grad for name, p in student.named_parameters() if p.requires_grad})
    assert all(gradient is not None for gradient in gradients[0].values())
    assert gradients[0].keys() == gradients[1].keys()
    assert all(torch.allclose(gradients[0][name], gradients[1][name], atol=1e-6) for name in gradients[0])


@pytest.mark.parametrize("anchor", [{}, ANCHOR], ids=["alone", "anchored"])
def test_grpo_trains_the_adapters_alone(tmp_path, anchor):
    settings = {"max_steps": 7, "learning_rate": 1e-2, "beta": 0.1, **anchor}
    trainer = lora_trainer(tmp_path, tiny_student(1), **settings)
    before = {name: value.clone() for name, value in trainer.model.named_parameters()}
    trainer.train()
    moved = {name for name, value in trainer.model.named_parameters() if not torch.equal(value, before[name])}
    assert moved and all(".lora_" in name or name.startswith("auxiliary.") for name in moved)
    assert any(name.startswith("auxiliary.") for name in moved) == bool(anchor)
    kl = logged(trainer, "kl")
    assert kl[0] == 0 and kl[-1] > 0, "the reference is the student without its adapters"


def test_back_propagation_with_adapters_raises_the_reward(tmp_path):
    args = RewardBackpropConfig(
        str(tmp_path), **{**QUIET, "num_unmasking_steps": 2, "max_steps": 15, "learning_rate": 2e-2}
    )
    student = tiny_student(1, one_step_timestep=400)
    rewards, rows = RewardSet([darkness]), class_rows(3)
    trainer = RewardBackpropTrainer(
        student, rewards, args, train_dataset=rows, peft_config=EVERYWHERE, **anchor_of(args, student)
    )
    trainer.train()
    reward = logged(trainer, "reward")
    assert sum(reward[-5:]) > sum(reward[:5]) + 0.25


def test_the_final_folder_holds_the_merged_student_and_peft_loads_the_adapter(tmp_path):
    tiny_student(1).save_pretrained(tmp_path / "base")
    student = load_model(tmp_path / "base")
    trainer = lora_trainer(tmp_path / "run", student, max_steps=3, learning_rate=1e-2)
    trainer.train()
    trained, final = sample(trainer.ema.module), load_model(tmp_path / "run" / "final", one_step=True)
    assert not torch.allclose(trained, sample(load_model(tmp_path / "base")), atol=1e-3)
    assert torch.allclose(sample(final), trained, atol=1e-4)
    base = MARModel.from_pretrained(tmp_path / "base").eval()
    with_peft = PeftModel.from_pretrained(base, tmp_path / "run" / "final" / "adapter")
    assert torch.allclose(sample(with_peft), trained, atol=1e-5)
    assert with_peft.peft_config["default"].base_model_name_or_path == str(tmp_path / "base")


def test_an_interrupted_run_with_adapters_ends_as_an_undisturbed_one(tiny_runs, tmp_path):
    settings = {**tiny_runs.models_of("grpo"), "use_peft": True, "lora_r": 4, "learning_rate": 1e-3}
    assert run_recipe("grpo", tmp_path / "whole", **settings) == 0
    with power_cut_in_step(4):
        assert run_recipe("grpo", tmp_path / "broken", **settings) == 1
    torch.manual_seed(99)
    assert run_recipe("grpo", tmp_path / "broken", "--resume", **settings) == 0
    for file in ("model.safetensors", "adapter/adapter_model.safetensors", "auxiliary.safetensors"):
        whole, resumed = (load_file(tmp_path / run / "final" / file) for run in ("whole", "broken"))
        assert same(whole, resumed), file
    assert comparable_lines(tmp_path / "whole") == comparable_lines(tmp_path / "broken")
    before, after = (load_model(run).state_dict() for run in (tiny_runs.student, tmp_path / "whole"))
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed and all(name.endswith(".weight") for name in changed)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"lora_r": 0}, "lora_r must be at least 1, not 0"),
        ({"lora_dropout": 1.0}, r"lora_dropout must lie in \[0, 1\), not 1.0"),
    ],
)
def test_settings_out_of_range_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        LoraArguments(use_peft=True, **settings).config()


def test_the_settings_make_pefts_configuration():
    assert LoraArguments().config() is None
    config = LoraArguments(use_peft=True, lora_r=3, lora_alpha=5, lora_target="head").config()
    assert (config.r, config.lora_alpha, config.target_modules) == (3, 5, LORA_TARGETS["head"])
    assert LoraArguments(use_peft=True, lora_target_modules=["qkv"]).config().target_modules == {"qkv"}


def test_modules_that_the_student_does_not_have_are_refused():
    with pytest.raises(ValueError, match="q_proj"):
        add_lora(tiny_student(), LoraConfig(target_modules=["q_proj"]), seed=0)


def test_grpo_refuses_dropout_in_the_adapters(train, tmp_path: Path, complaint):
    message = complaint(2, train(use_peft=True, lora_dropout=0.1))
    assert message == "grpo needs lora_dropout 0, not 0.1: its ratios must begin at 1"


def test_a_dry_run_counts_the_adapters_and_no_copy_for_the_reference(train, capsys):
    counted = []
    for adapters in ({}, {"use_peft": True}):
        assert train("--dry_run", beta=0.1, **adapters) == 0
        counted.append(next(line for line in capsys.readouterr().out.splitlines() if line.startswith("parameters:")))
    assert "reference model" in counted[0] and "adapters" not in counted[0]
    assert "reference model" not in counted[1] and "adapters" in counted[1]
