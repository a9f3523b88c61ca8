"""What a recipe would train, found out without training it: sizes, memory, and what is missing on disk."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

from peft import LoraConfig
from torch.utils.data import Dataset

from marval_rl.data.class_names import shorten
from marval_rl.errors import MarvalError
from marval_rl.models import MaskedConfig, MaskedModel
from marval_rl.models.checkpoints import load_config
from marval_rl.recipes.conditions import find_conditions
from marval_rl.recipes.data_arguments import DataArguments, TrainingData, describe_data
from marval_rl.recipes.network_arguments import PUBLISHED_SIZES, ModelArguments, RewardArguments, TeacherArguments
from marval_rl.recipes.planning.memory import Footprint, MakeTrainer, StandInReward, footprint_of
from marval_rl.rewarding import RewardSet
from marval_rl.trainers.distill import DistillTrainer
from marval_rl.trainers.pretrain import PretrainTrainer
from marval_rl.trainers.reward_trainer import RewardTrainer

GET_TEACHER = (
    "official weights: download checkpoint-last.pth of the size you want (links in LTH14/mar's README) and run "
    "`marval-rl convert checkpoint-last.pth FOLDER`"
)
GET_TEXT_TEACHER = "official weights: `marval-rl convert turkeyju/generator_maskgen_kl_l FOLDER --vae TOKENIZER`"
GET_TOKENIZER = "official tokenizer: `marval-rl convert turkeyju/tokenizer_tatitok_bl32_vae FOLDER`"
GET_STUDENT = "a student comes from `marval-rl distill`"
GET_VAE = "official VAE: download kl16.ckpt (link in LTH14/mar's README) and run `marval-rl convert kl16.ckpt FOLDER`"
GET_REWARD = "docs/rewards.md says where its weights come from; a run downloads what is on the hub, a dry run does not"
GET_PROMPTS = "a text file of one prompt per line will do (--prompts FILE)"
GET_CAPTIONS = "parquet files with an image column and a column of captions (caption_column)"
GET_DATA = "put the images there, a folder for each class (ImageNet: n01440764, ...), or point --dataset at your copy"
GET_CACHE = "caching reads the images once, from a folder for each class at --dataset (ImageNet: n01440764, ...)"


@dataclass
class TrainingPlan:
    """What would be trained.

    Attributes:
        data: What would be trained on, in one line; None if unknown.
        footprint: None where no size is known.
        rows: Rows of data per epoch; None if unknown.
        missing: What does not exist on disk, and how to get it.
    """

    data: str | None = None
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

    def with_step(
        self,
        make_trainer: MakeTrainer,
        config: Any,
        model: MaskedConfig,
        teacher: MaskedConfig | None = None,
        vae: int | None = None,
    ) -> TrainingPlan:
        """This plan with the memory of a step, arguments as `footprint_of`'s; vae: its parameters."""
        self.footprint = footprint_of(make_trainer, config, model, teacher)
        if vae is not None:
            self.footprint.frozen["VAE"] = vae
        return self


def plan_pretraining(data: DataArguments, sizes: ModelArguments, config: Any) -> TrainingPlan:
    plan = TrainingPlan()
    dataset = _data(plan, data, config.seed)
    vae = _vae(plan, data.vae, sizes.backbone == "maskgen")
    if dataset is None or (data.vae is not None and vae is None):
        return plan

    def make(args: Any, model: MaskedModel, teacher: Any, rows: Dataset) -> PretrainTrainer:
        return PretrainTrainer(model, args, train_dataset=rows)

    return plan.with_step(make, config, pretrained_config(data, sizes, dataset), vae=vae)


def pretrained_config(data: DataArguments, sizes: ModelArguments, dataset: TrainingData) -> MaskedConfig:
    """The configuration of the model that pretraining begins with."""
    if sizes.backbone == "maskgen":
        return sizes.config(data.text_latents(dataset, sizes.patch_size))
    return sizes.config(data.latents(dataset))


def plan_distillation(data: DataArguments, source: TeacherArguments, config: Any) -> TrainingPlan:
    plan = TrainingPlan()
    dataset = _data(plan, data, config.seed)
    teacher = _model_config(plan, source.teacher, GET_TEACHER, source, data, dataset)
    if teacher is None:
        return plan

    def make(args: Any, student: MaskedModel, teacher: Any, rows: Dataset) -> DistillTrainer:
        return DistillTrainer(teacher, args, student, train_dataset=rows)

    student = teacher.as_student(config.student_timestep)
    return plan.with_step(make, config, student, teacher, _vae(plan, teacher.vae, teacher.takes_prompts))


def plan_reward_training(
    data: DataArguments,
    rewarded: RewardArguments,
    source: TeacherArguments,
    peft_config: LoraConfig | None,
    config: Any,
    trainer_class: type[RewardTrainer],
) -> TrainingPlan:
    plan = TrainingPlan()
    anchored = config.has_auxiliary
    dataset = _data(plan, data, config.seed) if config.reads_images or data.is_bundled else None
    plan.rows = None  # an epoch is of classes or prompts, which the student knows
    student = _model_config(plan, rewarded.model, GET_STUDENT, source, data, dataset)
    teacher = _model_config(plan, source.teacher, GET_TEACHER, source, data, dataset) if anchored else None
    for specs, kwargs in (
        (rewarded.reward_funcs, rewarded.reward_kwargs),
        (rewarded.eval_reward_funcs, rewarded.eval_reward_kwargs),
    ):
        if specs:
            with plan.needing(GET_REWARD):
                RewardSet(specs, None, kwargs, data.offers(lambda: student))
    if student is None or (anchored and teacher is None):
        return plan
    names = None if dataset is None else dataset.class_names
    with plan.needing(GET_PROMPTS) if student.takes_prompts else nullcontext():
        asked = {**rewarded.rolled_out(), "eval_prompts": data.eval_prompts}
        conditions = find_conditions(student, str(rewarded.model), names, **asked)
        plan.rows = len(conditions.rows)
        if conditions.names is not None:
            plan.data = f"{len(conditions.names)} prompts: {shorten(conditions.names)}"

    def make(args: Any, student: MaskedModel, teacher: MaskedModel | None, rows: Dataset) -> RewardTrainer:
        anchor: dict[str, Any] = {"teacher": teacher, "anchor_dataset": rows if anchored else None}
        reward = RewardSet([StandInReward()])
        return trainer_class(student, reward, args, train_dataset=rows, peft_config=peft_config, **anchor)

    student = student.as_student(student.one_step_timestep or 0)
    return plan.with_step(make, config, student, teacher, _vae(plan, student.vae, student.takes_prompts))


def _data(plan: TrainingPlan, data: DataArguments, seed: int) -> TrainingData | None:
    remedy = GET_CACHE if data.cache_dir is not None else GET_DATA
    with plan.needing(GET_CAPTIONS if data.caption_column is not None else remedy):
        dataset = data.load_training(None if data.is_bundled else 256, seed)
        plan.rows = len(dataset)
        plan.data = describe_data(dataset)
        return dataset
    return None


def _model_config(
    plan: TrainingPlan,
    name: str | None,
    remedy: str,
    source: TeacherArguments,
    data: DataArguments,
    dataset: TrainingData | None,
) -> MaskedConfig | None:
    """The configuration on disk; else that of the published size which the recipe is for."""
    config = PUBLISHED_SIZES[source.model_size]() if source.model_size is not None else None
    assert name is not None  # the commands refuse it
    if remedy == GET_TEACHER and config is not None and config.takes_prompts:
        remedy = GET_TEXT_TEACHER
    with plan.needing(remedy):
        found = load_config(name)
        source.check_size(found, name)
        data.fit(found, name, dataset)
        config = found
    if config is not None and data.vae is not None:
        config.vae = data.vae
    return config


def _vae(plan: TrainingPlan, name: str | None, is_text: bool = False) -> int | None:
    """Parameters of the VAE, or of a model of text's tokenizer; None without one, or where it is missing."""
    if name is None:
        return None
    from marval_rl.models.maskgen.codec import load_tokenizer
    from marval_rl.models.vae import load_autoencoder

    with plan.needing(GET_TOKENIZER if is_text else GET_VAE):
        network = load_tokenizer(name) if is_text else load_autoencoder(name)
        return sum(parameter.numel() for parameter in network.parameters())
    return None


Planner = Callable[[], TrainingPlan]
