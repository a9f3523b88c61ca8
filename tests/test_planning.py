"""What a dry run says: memory, steps, and what is missing."""

from __future__ import annotations

import json
from itertools import count
from pathlib import Path

import pytest
import torch
import yaml
from accelerate.commands.config.config_args import load_config_from_file
from tiny_models import tiny_config, tiny_student
from torch.utils.data import default_collate

from marval_rl.cli.main import main
from marval_rl.models import MARConfig, MARModel
from marval_rl.recipes.network_arguments import LoraArguments
from marval_rl.recipes.planning import memory
from marval_rl.recipes.planning.dry_run import length
from marval_rl.recipes.planning.memory import Footprint, StandInReward, activations_of, footprint_of, memory_table
from marval_rl.recipes.planning.plan import TrainingPlan
from marval_rl.rewarding import RewardSet
from marval_rl.trainers import arguments
from marval_rl.trainers.distill import DistillConfig, DistillTrainer
from marval_rl.trainers.grpo import MARGRPOConfig, MARGRPOTrainer
from marval_rl.trainers.lora import add_lora
from marval_rl.trainers.pretrain import PretrainConfig, PretrainTrainer
from marval_rl.trainers.reward_backprop import RewardBackpropConfig, RewardBackpropTrainer

RECIPES = Path(__file__).parents[1] / "recipes"
REAL_SIZE = {file.name: file for file in sorted(RECIPES.glob("*.yaml"))}
TEXT = sorted((RECIPES / "text").glob("*.yaml"))
PAIRS = sorted((RECIPES / "mnist_pairs").glob("*.yaml"))
ALL = [*REAL_SIZE.values(), *TEXT, *PAIRS, *sorted((RECIPES / "digits").glob("*.yaml"))]


# Parameters and bytes


def pretraining(args, model, teacher, rows) -> PretrainTrainer:
    return PretrainTrainer(model, args, train_dataset=rows)


def distilling(args, student, teacher, rows) -> DistillTrainer:
    return DistillTrainer(teacher, args, student, train_dataset=rows)


def rewarding(trainer_class, peft_config=None, reward=None):
    def make(args, student, teacher, rows):
        options = {"teacher": teacher, "anchor_dataset": rows, "peft_config": peft_config}
        return trainer_class(student, RewardSet([reward or StandInReward()]), args, train_dataset=rows, **options)

    return make


def test_the_published_sizes_are_counted_without_memory(tmp_path, monkeypatch):
    monkeypatch.setattr(memory, "activations_of", lambda *_: 0)
    for make, student, auxiliary in (
        (MARConfig.base, 207_924_768, 35_749_920),
        (MARConfig.huge, 942_403_104, 151_206_944),
    ):
        footprint = footprint_of(distilling, DistillConfig(str(tmp_path)), make(one_step_timestep=700), make())
        assert footprint.networks == {"student": student, "auxiliary network": auxiliary}
        assert (footprint.frozen, footprint.averaged) == ({"teacher": student}, student)
        # The null class's embedding is not trained: students are never asked for it.
        assert footprint.trained == student + auxiliary - footprint.held and footprint.held in (768, 1280)


def test_the_table_shards_the_same_states_as_each_stage():
    gib = 2**30
    frozen = {"teacher": gib // 4, "VAE": gib // 4}
    footprint = Footprint(trained=gib, averaged=gib // 2, frozen=frozen, activations=gib)
    head, *rows = memory_table(footprint, half=True, num_processes=4)
    assert head.split() == ["GiB", "weights", "gradients", "optimizer", "average", "frozen", "activations", "total"]
    figures = {line.split()[0]: [float(word) for word in line.split()[1:]] for line in rows}
    assert figures == {
        "DDP": [4, 4, 8, 2, 2, 1, 21],
        "ZeRO-1": [2, 2, 3, 2, 2, 1, 12],
        "ZeRO-2": [2, 0.5, 3, 2, 2, 1, 10.5],
        "ZeRO-3": [0.5, 0.5, 3, 2, 2, 1, 9],
    }
    assert memory_table(footprint, half=False, num_processes=4)[2].split()[1:4] == ["4.00", "4.00", "2.00"]


def test_weights_that_are_held_have_neither_gradients_nor_optimizer():
    gib = 2**30
    footprint = Footprint(trained=gib // 4, averaged=0, frozen={}, activations=0, held=gib)
    rows = memory_table(footprint, half=True, num_processes=4)[1:]
    figures = {line.split()[0]: [float(word) for word in line.split()[1:4]] for line in rows}
    assert figures["DDP"] == [5, 1, 2]
    assert figures["ZeRO-2"] == [2.5, 0.12, 0.75]
    assert figures["ZeRO-3"] == [0.62, 0.12, 0.75]


def test_adapters_are_counted_without_memory_and_keep_fewer_activations_in_the_head_alone(tmp_path):
    config = tiny_config(one_step_timestep=700)
    args = MARGRPOConfig(str(tmp_path), num_generations=4, per_device_train_batch_size=8, num_unmasking_steps=2)
    adapted = {
        target: footprint_of(
            rewarding(MARGRPOTrainer, LoraArguments(use_peft=True, lora_r=4, lora_target=target).config()),
            args,
            config,
            None,
        )
        for target in ("all", "head")
    }
    complete = footprint_of(rewarding(MARGRPOTrainer), args, config, None)
    student = tiny_student()
    add_lora(student, LoraArguments(use_peft=True, lora_r=4, lora_target="head").config(), seed=0)
    real = sum(parameter.numel() for parameter in student.parameters() if parameter.requires_grad)
    assert adapted["head"].trained == adapted["head"].networks["adapters"] == real < adapted["all"].trained
    assert adapted["head"].held == adapted["head"].networks["student"] == complete.networks["student"]
    assert adapted["head"].activations < 0.5 * complete.activations < adapted["all"].activations


class Brightness:
    differentiable = True

    def __call__(self, images, **_):
        return images.mean(dim=(1, 2, 3))


SMALL = {"per_device_train_batch_size": 6, "use_cpu": True}
GSIM = {"gsim_weight": 1.0, "gsim_batch_size": 6, "auxiliary_warmup_steps": 0}
STEPS = {
    "pretrain": (pretraining, PretrainConfig, {}),
    "distill": (distilling, DistillConfig, {}),
    "grpo": (MARGRPOTrainer, MARGRPOConfig, {"num_generations": 3, "num_unmasking_steps": 3}),
    "grpo with anchors": (MARGRPOTrainer, MARGRPOConfig, {"num_generations": 3, "beta": 0.1, **GSIM}),
}


@pytest.mark.parametrize("name", STEPS)
def test_activations_counted_on_fake_tensors_are_those_of_a_real_step(name, tmp_path):
    make, config_class, settings = STEPS[name]
    counted, real = make, make
    if isinstance(make, type):
        counted, real = rewarding(make), rewarding(make, reward=Brightness())
    config = config_class(str(tmp_path), **SMALL, **settings)
    sizes = tiny_config(one_step_timestep=None if name == "pretrain" else 700)
    teacher = None if name == "pretrain" else tiny_config()
    planned = activations_of(counted, config, sizes, teacher)

    args = config_class(str(tmp_path), **SMALL, **settings)
    args.mask_ratio_min = 1.0  # the most that is ever masked
    rows = [{"images": torch.rand(sizes.image_channels, sizes.image_size, sizes.image_size), "class_labels": 0}] * 200
    trainer = real(args, MARModel(sizes), None if teacher is None else MARModel(teacher), rows)
    trainer.state.global_step = next(step for step in count() if args.moves_model(step))
    trainer.model.train()
    inputs = rows[:6] if isinstance(make, type) else default_collate(rows[:6])
    if config_class is MARGRPOConfig:
        inputs = inputs[: args.rows_per_batch]
    kept = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage()
        return tensor

    networks = [
        trainer.model,
        *([] if teacher is None else [trainer.matching.teacher if name == "distill" else trainer.mar]),
    ]
    if name == "grpo with anchors":
        networks.append(trainer.anchors.gsim.teacher)
        trainer.anchors.gsim.args.mask_ratio_min = 1.0
    own = {parameter.untyped_storage().data_ptr() for network in networks for parameter in network.parameters()}
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = trainer.compute_loss(trainer.model, inputs)
    measured = sum(storage.nbytes() for pointer, storage in kept.items() if pointer not in own)
    del loss
    assert planned == pytest.approx(measured, rel=0.02)


@pytest.mark.parametrize("trainer_class", [MARGRPOTrainer, RewardBackpropTrainer])
@pytest.mark.parametrize("gradient_checkpointing", [False, True])
def test_activations_of_deep_networks_follow_from_those_of_shallow_ones(
    trainer_class, gradient_checkpointing, tmp_path, monkeypatch
):
    config_class = MARGRPOConfig if trainer_class is MARGRPOTrainer else RewardBackpropConfig
    settings = {"num_generations": 3} if trainer_class is MARGRPOTrainer else {}
    config = config_class(str(tmp_path), **SMALL, **settings, gradient_checkpointing=gradient_checkpointing, **GSIM)
    config.use_cpu = False  # as on a GPU
    depths = {"encoder_num_layers": 3, "decoder_num_layers": 4, "head_num_layers": 3}
    sizes = [tiny_config(one_step_timestep=700, **depths), tiny_config(**depths)]
    extrapolated = activations_of(rewarding(trainer_class), config, *sizes)
    monkeypatch.setattr(MARConfig, "depths", ())
    assert extrapolated == activations_of(rewarding(trainer_class), config, *sizes) > 0


def test_activations_grow_with_the_batch_and_shrink_with_checkpointing(tmp_path):
    sizes = [tiny_config(one_step_timestep=700, encoder_num_layers=6), tiny_config(encoder_num_layers=6)]

    def kept(**settings) -> int:
        return activations_of(distilling, DistillConfig(str(tmp_path), **settings), *sizes)

    large = kept(per_device_train_batch_size=8)
    assert large == pytest.approx(2 * kept(per_device_train_batch_size=4), rel=0.1)
    assert kept(per_device_train_batch_size=8, gradient_checkpointing=True) < 0.7 * large


@pytest.mark.parametrize("gradient_checkpointing", [False, True])
def test_activations_of_grpo_grow_with_its_unmasking_steps_unless_they_are_checkpointed(
    gradient_checkpointing, tmp_path
):
    sizes = tiny_config(one_step_timestep=700, image_size=16)

    def kept(num_steps: int) -> int:
        settings = {**SMALL, "num_generations": 3, "gradient_checkpointing": gradient_checkpointing}
        config = MARGRPOConfig(str(tmp_path), num_unmasking_steps=num_steps, **settings)
        return activations_of(rewarding(MARGRPOTrainer), config, sizes, None)

    growth = kept(16) / kept(8)
    assert growth < 1.1 if gradient_checkpointing else growth > 1.5


# Steps


def test_steps_of_an_epoch_and_of_the_run(tmp_path):
    settings = {"max_steps": -1, "num_train_epochs": 3, "per_device_train_batch_size": 10}
    config = DistillConfig(str(tmp_path), auxiliary_updates=4, gradient_accumulation_steps=2, **settings)
    # 105 rows: 10 batches of 10, 2 a step; each step is followed by 3 of the auxiliary network.
    lines = length(config, TrainingPlan(rows=105))
    assert lines == ["an epoch: 105 rows, 20 optimizer steps", "optimizer steps: 60 = 3 epochs"]
    unknown = "an epoch: unknown while data or model are missing"
    assert length(config, TrainingPlan()) == [unknown, "optimizer steps: 3 epochs"]
    config.max_steps = 7
    assert length(config, TrainingPlan()) == [unknown, "optimizer steps: 7"]


# The recipes


def command_for(recipe: Path) -> str:
    settings = yaml.safe_load(recipe.read_text())
    if "method" in settings:
        return "train"
    return "distill" if "teacher" in settings else "pretrain"


def planned(capsys, *words: str) -> str:
    assert main([*words, "--dry_run"]) == 0, capsys.readouterr().err
    return capsys.readouterr().out


@pytest.mark.parametrize("num_processes", [None, 2, 8])
@pytest.mark.parametrize("recipe", ALL, ids=lambda recipe: recipe.stem)
def test_every_recipe_is_planned_without_a_gpu_for_one_number_of_processes(
    recipe, num_processes, tmp_path, monkeypatch, capsys
):
    # No teacher, no student, no data but the digits, no judge; the pairs' rewards are in examples/.
    monkeypatch.chdir(RECIPES.parent if recipe in PAIRS else tmp_path)
    monkeypatch.setenv("MARVAL_RL_CACHE", str(tmp_path))
    monkeypatch.setattr(arguments, "accelerator_here", lambda: None)
    monkeypatch.setattr(memory, "activations_of", lambda *_: 0)  # takes seconds, and is counted below
    words = [] if num_processes is None else ["--num_processes", str(num_processes)]
    output = planned(capsys, command_for(recipe), str(recipe), *words)
    settings = yaml.safe_load(recipe.read_text())
    precision = "bf16" if settings.get("bf16") else "float32"
    number = num_processes or 1
    assert f"planned for {number} process{'es' if number > 1 else ''} in {precision}" in output
    batch = settings["per_device_train_batch_size"] * settings.get("gradient_accumulation_steps", 1) * number
    assert f"images per update: {batch} = " in output and f"x {number} processes" in output
    asks = "this recipe asks for bf16 on a GPU; here is none: --use_cpu true --bf16 false to try it slowly"
    assert (f"missing: {asks}" in output) == (precision == "bf16")
    rows = {line.split()[0]: line.split() for line in output.splitlines() if line.startswith(("  DDP", "  ZeRO"))}
    if "parameters: unknown" not in output:
        # Optimizer state: 8 bytes a parameter under DDP, sharded under ZeRO (12 bytes in bf16).
        width = 12 if precision == "bf16" else 8
        assert float(rows["ZeRO-1"][3]) == pytest.approx(float(rows["DDP"][3]) * width / 8 / number, abs=0.02)
    assert not list(tmp_path.iterdir())  # nothing was trained, no judge either


@pytest.mark.parametrize(
    ("settings", "planned_precision"),
    [("--fp16 true --bf16 false", "fp16"), ("--tf32 true", "bf16"), ("--bf16 false --use_cpu true", "float32")],
)
def test_every_precision_is_planned_without_a_gpu(settings, planned_precision, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(memory, "activations_of", lambda *_: 0)
    output = planned(capsys, "distill", str(RECIPES / "base.yaml"), *settings.split())
    assert f"planned for 1 process in {planned_precision}" in output


def test_an_accelerate_configuration_names_processes_and_precision(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(memory, "activations_of", lambda *_: 0)
    words = ["--accelerate_config", str(RECIPES / "accelerate" / "eight_gpus.yaml")]
    output = planned(capsys, "pretrain", str(RECIPES / "digits" / "teacher.yaml"), *words)
    assert "planned for 8 processes in bf16" in output and "x 8 processes" in output


def test_of_processes_that_a_launcher_started_the_first_prints_the_plan_for_all(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(memory, "activations_of", lambda *_: 0)
    for name, value in {"WORLD_SIZE": "4", "LOCAL_RANK": "0", "RANK": "0"}.items():
        monkeypatch.setenv(name, value)
    teacher = str(RECIPES / "digits" / "teacher.yaml")
    assert "planned for 4 processes in float32" in planned(capsys, "pretrain", teacher)
    monkeypatch.setenv("RANK", "1")
    assert planned(capsys, "pretrain", teacher) == ""


@pytest.mark.parametrize("name", REAL_SIZE)
def test_the_dry_run_of_a_recipe_of_real_size_prints_its_plan_and_what_is_missing(name, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    command = command_for(REAL_SIZE[name])
    output = planned(capsys, command, str(REAL_SIZE[name]))
    settings = yaml.safe_load(output[: output.index("\n\n")])
    counts = {"base": "207,924,768", "large": "478,326,304", "huge": "942,403,104"}
    assert f"student {counts[settings['model_size']]}" in output
    for stage in ("DDP", "ZeRO-1", "ZeRO-2", "ZeRO-3"):
        total = float(next(line for line in output.splitlines() if stage in line).split()[-1])
        assert 1 < total < 75, "a GPU of 80 GB must hold it, with room for buffers"
    assert "marval-rl convert" in output if command == "distill" else "marval-rl distill" in output
    assert "missing: no VAE at models/kl16" in output
    # Rows are the images of the missing cache, or the classes, which the size of the student says.
    epoch = "unknown" if command == "distill" else f"{1000 * settings['prompts_per_class']:,} rows"
    assert f"an epoch: {epoch}" in output
    assert not list(tmp_path.iterdir())


def test_images_are_not_the_rows_of_an_epoch_of_rl(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)  # which holds no student
    output = planned(capsys, "train", str(RECIPES / "digits" / "grpo.yaml"))
    assert "an epoch: unknown while data or model are missing\noptimizer steps: 240\n" in output


@pytest.mark.parametrize("name", REAL_SIZE)
def test_a_recipe_states_the_published_figure_and_that_it_was_not_measured(name):
    head = "".join(line for line in REAL_SIZE[name].read_text().splitlines(keepends=True) if line.startswith("#"))
    assert "2511.15190" in head and "Published" in head and "Not measured here" in head


# Presets


@pytest.mark.parametrize("file", sorted((RECIPES / "accelerate").glob("*.yaml")), ids=lambda file: file.name)
def test_a_preset_of_accelerate_is_read_by_it(file, monkeypatch):
    monkeypatch.chdir(RECIPES.parent)
    preset = load_config_from_file(str(file))
    assert preset.num_processes == {"one_gpu": 1, "two_nodes": 16}.get(file.stem, 8)
    if file.stem.startswith("zero"):
        path = Path(preset.deepspeed_config["deepspeed_config_file"])
        assert json.loads(path.read_text())["zero_optimization"]["stage"] == int(file.stem[-1])
