"""What a recipe would train, found out without training it: sizes, memory, and what is missing on disk."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from peft import LoraConfig
from torch.utils.data import Dataset

from marval_rl.errors import MarvalError
from marval_rl.models import MARConfig
from marval_rl.models.checkpoints import load_config
from marval_rl.recipes.data_arguments import DataArguments, describe_data
from marval_rl.recipes.network_arguments import PUBLISHED_SIZES, ModelArguments, RewardArguments, TeacherArguments
from marval_rl.recipes.planning.activations import grpo_bytes, gsim_bytes, pretrain_bytes, reward_backprop_bytes
from marval_rl.recipes.planning.memory import Footprint, adapter_parameters, head_parameters, mar_parameters
from marval_rl.rewarding import RewardSet
from marval_rl.trainers.distill import student_config

GET_TEACHER = (
    "official weights: download checkpoint-last.pth of the size you want (links in LTH14/mar's README) and run "
    "`marval-rl convert checkpoint-last.pth FOLDER`"
)
GET_STUDENT = "a student comes from `marval-rl distill`"
GET_VAE = "official VAE: download kl16.ckpt (link in LTH14/mar's README) and run `marval-rl convert kl16.ckpt FOLDER`"
GET_REWARD = "docs/rewards.md says where its weights come from; a run downloads what is on the hub, a dry run does not"
GET_DATA = "ImageNet: put its class folders (n01440764, ...) there, or point --dataset at your copy"
GET_CACHE = "caching reads the images once: ImageNet's class folders (n01440764, ...) at --dataset"


@dataclass
class TrainingPlan:
    """What would be trained.

    data: what would be trained on, in one line; None if unknown. networks: name -> parameters. footprint: None where no
    size is known. rows: rows of data an epoch; None if unknown. missing: what is not there, and how to get it.
    """

    data: str | None = None
    networks: dict[str, int] = field(default_factory=dict)
    footprint: Footprint | None = None
    rows: int | None = None
    missing: list[str] = field(default_factory=list)

    @contextmanager
    def needing(self, remedy: str) -> Iterator[None]:
        """What goes wrong inside is missing, and the remedy says how to get it."""
        try:
            yield
        except MarvalError as error:
            self.missing.append(f"{error}\n           -> {remedy}")


def plan_pretraining(data: DataArguments, sizes: ModelArguments, config: Any) -> TrainingPlan:
    plan = TrainingPlan()
    dataset = _data(plan, data, config.seed)
    vae = _vae(plan, data.vae)
    if dataset is None or (data.vae is not None and vae is None):
        return plan
    model = sizes.config(data.latents(dataset))
    trained = mar_parameters(model)
    plan.networks = {"teacher": trained, **_named("VAE", vae)}
    plan.footprint = Footprint(trained, trained, _named("VAE", vae), pretrain_bytes(model, config))
    return plan


def plan_distillation(data: DataArguments, source: TeacherArguments, config: Any) -> TrainingPlan:
    plan = TrainingPlan()
    dataset = _data(plan, data, config.seed)
    teacher = _model_config(plan, source.teacher, GET_TEACHER, source, data, dataset)
    if teacher is None:
        return plan
    student = student_config(teacher, config.student_timestep)
    counts = {"student": mar_parameters(student), "auxiliary network": head_parameters(student)}
    frozen = {"teacher": mar_parameters(teacher), **_named("VAE", _vae(plan, teacher.vae))}
    plan.networks = counts | frozen
    activations = gsim_bytes(student, teacher, config, config, config.per_device_train_batch_size)
    plan.footprint = Footprint(sum(counts.values()), counts["student"], frozen, activations)
    return plan


def plan_reward_training(
    data: DataArguments,
    rewarded: RewardArguments,
    source: TeacherArguments,
    peft_config: LoraConfig | None,
    config: Any,
) -> TrainingPlan:
    plan = TrainingPlan()
    anchored = config.gsim_weight > 0
    dataset = _data(plan, data, config.seed) if config.reads_images or data.is_bundled else None
    student = _model_config(plan, rewarded.model, GET_STUDENT, source, data, dataset)
    teacher = _model_config(plan, source.teacher, GET_TEACHER, source, data, dataset) if anchored else None
    for specs, kwargs in (
        (rewarded.reward_funcs, rewarded.reward_kwargs),
        (rewarded.eval_reward_funcs, rewarded.eval_reward_kwargs),
    ):
        if specs:
            with plan.needing(GET_REWARD):
                RewardSet(specs, None, kwargs, data.offers(student))
    if student is None or (anchored and teacher is None):
        return plan
    plan.rows = student.num_classes * rewarded.prompts_per_class
    student = student_config(student, student.one_step_timestep or 0)
    engine = {"student": mar_parameters(student)}
    trained = averaged = engine["student"]
    if peft_config is not None:
        engine["adapters"] = trained = adapter_parameters(student, peft_config)
        averaged += trained
    frozen = _named("VAE", _vae(plan, student.vae))
    if anchored:
        engine["auxiliary network"] = head_parameters(student)
        trained += engine["auxiliary network"]
        frozen["teacher"] = mar_parameters(teacher)
    if config.beta > 0 and peft_config is None:  # with adapters it is the student without them
        frozen["reference model"] = engine["student"]
    plan.networks = engine | frozen
    count = grpo_bytes if rewarded.method == "grpo" else reward_backprop_bytes
    activations = count(student, config, peft_config)
    if anchored:
        gsim = config.gsim_arguments()
        activations += gsim_bytes(student, teacher, config, gsim, config.gsim_batch_size, peft_config)
    if config.distribution_weight > 0 and rewarded.method == "grpo":  # it generates images of its own
        activations += reward_backprop_bytes(student, config, peft_config, config.distribution_batch_size)
    plan.footprint = Footprint(trained, averaged, frozen, activations, held=sum(engine.values()) - trained)
    return plan


def _data(plan: TrainingPlan, data: DataArguments, seed: int) -> Dataset | None:
    with plan.needing(GET_CACHE if data.cache_dir is not None else GET_DATA):
        dataset = data.load_training(None if data.is_bundled else 256, seed)
        plan.rows = len(dataset)
        plan.data = describe_data(dataset)
        return dataset
    return None


def _model_config(
    plan: TrainingPlan, name: str, remedy: str, source: TeacherArguments, data: DataArguments, dataset: Dataset | None
) -> MARConfig | None:
    """The configuration on disk; else that of the published size which the recipe is for."""
    config = PUBLISHED_SIZES[source.model_size]() if source.model_size is not None else None
    with plan.needing(remedy):
        found = load_config(name)
        source.check_size(found, name)
        data.fit(found, name, dataset)
        config = found
    if config is not None and data.vae is not None:
        config.vae = data.vae
    return config


def _vae(plan: TrainingPlan, name: str | None) -> int | None:
    """Parameters of the VAE; None without one, or where it is missing."""
    if name is None:
        return None
    from marval_rl.models.vae import load_autoencoder

    with plan.needing(GET_VAE):
        return sum(parameter.numel() for parameter in load_autoencoder(name).parameters())
    return None


def _named(name: str, count: int | None) -> dict[str, int]:
    return {} if count is None else {name: count}


Planner = Callable[[], TrainingPlan]
