"""What a step of each trainer spends its time on, and how fast images are measured and encoded."""

from __future__ import annotations

import copy
import io
import tempfile
import time
from collections.abc import Callable
from contextlib import redirect_stdout
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers.trainer_callback import TrainerControl, TrainerState

from marval_rl.benchmarks.timing import in_turn
from marval_rl.data import class_rows
from marval_rl.evaluation import ImageEvaluator
from marval_rl.evaluation.features import Pixels
from marval_rl.models import MARModel, MaskedModel
from marval_rl.rewarding import RewardSet
from marval_rl.runtime.profiling import OptimizerPhase, shares, timed_phases
from marval_rl.trainers.base import MARTrainer
from marval_rl.trainers.distill import DistillConfig, DistillTrainer
from marval_rl.trainers.grpo import MARGRPOConfig, MARGRPOTrainer
from marval_rl.trainers.pretrain import PretrainConfig, PretrainTrainer
from marval_rl.trainers.reward_backprop import RewardBackpropConfig, RewardBackpropTrainer

Row = dict[str, Any]
MOST_GENERATIONS = 16  # images of a group
KL16 = {  # the autoencoder of the official MAR models
    "block_out_channels": [128, 128, 256, 256, 512],
    "down_block_types": [*["DownEncoderBlock2D"] * 4, "AttnDownEncoderBlock2D"],
    "up_block_types": ["AttnUpDecoderBlock2D", *["UpDecoderBlock2D"] * 4],
    "layers_per_block": 2,
    "latent_channels": 16,
}


@dataclass
class StepTimes(OptimizerPhase):
    """Seconds of the steps after the first `warmup`, and of their phases.

    Attributes:
        warmup: Steps that are not counted.
        phases: The running `timed_phases`.
    """

    warmup: int
    phases: dict[str, float]
    seconds: float = 0.0
    before: dict[str, float] = field(default_factory=dict)

    def on_step_begin(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if state.global_step == self.warmup:
            self.before, self.seconds = dict(self.phases), -time.perf_counter()

    def on_train_end(self, *_: Any, **__: Any) -> None:
        self.seconds += time.perf_counter()

    @property
    def counted(self) -> dict[str, float]:
        """Label -> seconds of the phases."""
        return {label: seconds - self.before.get(label, 0.0) for label, seconds in self.phases.items()}


def brightness(images: Tensor, **_: Any) -> Tensor:
    """A reward that costs nothing."""
    return images.mean(dim=(1, 2, 3))


brightness.differentiable = True  # type: ignore[attr-defined]


def trainer_steps(
    teacher: MaskedModel, student: MaskedModel, num_unmasking_steps: int, batch_size: int, repeats: int, bf16: bool
) -> list[Row]:
    """Seconds of an update of the model by each trainer, and the shares of its phases; the reward is `brightness`.

    With an auxiliary network an update is a cycle of its steps. Images are random, and of the size of the latents: an
    autoencoder's time is not counted.

    Args:
        teacher: A MAR teacher.
        student: Its one-step student.
        num_unmasking_steps: K of the rollouts.
        batch_size: Images of an update.
        repeats: Updates that are timed, after one that warms up.
        bf16: Train in bfloat16.

    Raises:
        ValueError: If the batch has no groups to compare in.
    """
    group = max((n for n in range(2, MOST_GENERATIONS + 1) if batch_size % n == 0), default=None)
    if group is None:
        raise ValueError(
            f"--trainers compares images in groups, and a batch of {batch_size} has none: take an even one"
        )
    shape, classes = student.config.on_latents().image_shape, student.config.num_classes
    generator = torch.Generator().manual_seed(0)
    images = [
        {"images": torch.rand(shape, generator=generator), "class_labels": n % classes} for n in range(batch_size)
    ]
    rewards, rows = RewardSet([brightness]), class_rows(classes, batch_size)
    sampled: dict[str, Any] = {"num_unmasking_steps": num_unmasking_steps}
    cases: dict[str, Callable[[dict[str, Any]], MARTrainer]] = {
        "pretrain": lambda common: PretrainTrainer(on_latents(teacher), PretrainConfig(**common), train_dataset=images),
        "distill": lambda common: DistillTrainer(
            on_latents(teacher), DistillConfig(**common, auxiliary_warmup_steps=0), train_dataset=images
        ),
        "grpo": lambda common: MARGRPOTrainer(
            on_latents(student),
            rewards,
            MARGRPOConfig(**common, **sampled, num_generations=group),
            train_dataset=rows,
        ),
        "reward_backprop": lambda common: RewardBackpropTrainer(
            on_latents(student), rewards, RewardBackpropConfig(**common, **sampled), train_dataset=rows
        ),
    }
    return [
        {"trainer": name, "batch_size": batch_size, **_time_updates(make, batch_size, repeats, bf16, student.device)}
        for name, make in cases.items()
    ]


def on_latents(model: MaskedModel) -> MaskedModel:
    """A copy to train whose images are its latents."""
    model = copy.deepcopy(model).requires_grad_(True)
    model.config = model.config.on_latents()
    return model


def _time_updates(
    make: Callable[[dict[str, Any]], MARTrainer], batch_size: int, repeats: int, bf16: bool, device: torch.device
) -> Row:
    """Seconds of an update, and the share of each phase, after one update that warms up."""
    with tempfile.TemporaryDirectory() as folder, redirect_stdout(io.StringIO()), timed_phases() as phases:
        common: dict[str, Any] = {"output_dir": folder, "per_device_train_batch_size": batch_size, "bf16": bf16}
        common |= {"eval_strategy": "no", "eval_on_start": False, "save_strategy": "no", "logging_strategy": "no"}
        trainer = make({**common, "use_cpu": device.type == "cpu"})
        steps = trainer.args.cycle
        trainer.args.max_steps = steps * (1 + repeats)
        times = StepTimes(steps, phases)
        trainer.add_callback(times)
        trainer.train()
    return {"seconds": times.seconds / repeats, "shares": shares(times.counted, times.seconds)}


def throughput(student: MaskedModel, batch_size: int, repeats: int) -> list[Row]:
    """Images per second that are measured (image statistics and features `pixels`), and, of a model with latents,
    encoded by KL-16 with random weights, as `marval-rl cache` does."""
    device, generator = student.device, torch.Generator().manual_seed(0)
    _, height, width = student.config.image_shape
    images = torch.rand(batch_size, 3, height, width, generator=generator).to(device)
    evaluator = ImageEvaluator({"pixels": Pixels()})
    functions: dict[str, Callable[[], object]] = {"measure": partial(evaluator.measure, (images * 255).byte())}
    if isinstance(student, MARModel) and student.config.latent_stride > 1:
        from diffusers import AutoencoderKL  # slow to import

        from marval_rl.models.vae import VAECodec

        codec = VAECodec(AutoencoderKL(**KL16)).to(device)
        functions["encode"] = partial(codec.moments, images)
    times = in_turn(functions, repeats, device)
    return [
        {"what": name, "batch_size": batch_size, "images_per_second": batch_size / taken.median}
        for name, taken in times.items()
    ]
