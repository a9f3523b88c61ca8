"""What the trainers share on top of `transformers.Trainer`: exact resumption, weight averages, generated evaluation."""

from __future__ import annotations

import math
from collections import defaultdict
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from transformers import PrinterCallback, ProgressCallback, Trainer, TrainerState
from transformers.integrations.deepspeed import unset_hf_deepspeed_config

from marval_rl.errors import RewardError
from marval_rl.evaluation.evaluator import ImageEvaluator
from marval_rl.models import MARModel, codec_for, patchify, unpatchify
from marval_rl.rewarding import RewardSet
from marval_rl.training.arguments import MARTrainingArguments
from marval_rl.training.batches import EpochBatches, epoch_loader
from marval_rl.training.callbacks import AverageCallback, EpochCallback, InterruptCallback, MetricsFileCallback
from marval_rl.training.distributed import failing_together, from_first_process, is_partitioned, mean_over_processes
from marval_rl.training.ema import ExponentialMovingAverage
from marval_rl.training.optimizers import MODEL, rest
from marval_rl.training.progress import ProgressBarCallback
from marval_rl.training.randomness import derive_seed
from marval_rl.training.resume import is_complete
from marval_rl.training.sampling import SamplingSettings, generate_images, save_image_grid


class MARTrainer(Trainer):
    """Base of the trainers; not used by itself.

    A subclass computes its loss in `compute_loss` and says with `sampling_settings` how its model is sampled.
    Randomness is seeded anew in each micro-batch from (seed, step, number of the micro-batch among those of the step
    in all processes): a run that was killed and resumed draws the same noise as one that was not, and one process that
    accumulates two micro-batches what two processes draw. A checkpoint holds, besides what `Trainer` saves, the weight
    average and the subclass's `buffer`.

    Args:
        network: What the optimizer trains; `model` or a module that holds it.
        model: The MAR model that is sampled, averaged and saved.
        evaluator: Compares generated with real images at each evaluation; None to leave that out.
        eval_rewards: Judges that are only looked at; None for none.
    """

    def __init__(
        self,
        network: nn.Module,
        model: MARModel,
        args: MARTrainingArguments,
        train_dataset: Dataset,
        evaluator: ImageEvaluator | None = None,
        eval_rewards: RewardSet | None = None,
        **kwargs: Any,
    ):
        if any(map(is_partitioned, network.parameters())):
            raise ValueError(
                "the model's parameters are already partitioned by ZeRO-3: make it outside deepspeed.zero.Init, and "
                "load it after the training arguments were made; the trainer partitions it"
            )
        # transformers asks for an evaluation set although evaluation here generates its own images.
        super().__init__(model=network, args=args, train_dataset=train_dataset, eval_dataset=train_dataset, **kwargs)
        unset_hf_deepspeed_config()  # accelerate has set it again, see MARTrainingArguments
        self.mar = model
        self.codec = codec_for(model.config).to(args.device)
        config = model.config
        self.class_names = config.class_names or [f"class {label}" for label in range(config.num_classes)]
        self.evaluator = evaluator
        self.eval_rewards = eval_rewards
        self.ema = ExponentialMovingAverage(model, args.ema_decay)
        self.buffer: dict[str, Tensor] = {}
        self._metrics: dict[str, list[Tensor]] = defaultdict(list)
        self.micro_batch = 0  # its index within the optimizer step
        self._last_step = -1
        for callback in (PrinterCallback, ProgressCallback):
            self.remove_callback(callback)
        self.add_callback(ProgressBarCallback())
        self.add_callback(MetricsFileCallback(Path(args.output_dir) / "metrics.jsonl"))
        self.interrupt = InterruptCallback()
        self.add_callback(self.interrupt)
        self.add_callback(EpochCallback())
        self.add_callback(AverageCallback(self.update_average))

    # ---- What a subclass says ----

    def sampling_settings(self) -> SamplingSettings:
        """How evaluation samples the model."""
        return SamplingSettings(num_unmasking_steps=self.args.eval_unmasking_steps)

    def record(self, metrics: dict[str, Tensor]) -> None:
        """Remember metrics of this micro-batch; their mean over all processes appears at the next log. NaN is left
        out of it."""
        for name, value in metrics.items():
            self._metrics[name].append(value.detach().float())

    def prompts_for(self, class_names: list[str]) -> list[str]:
        """The prompt of each image, given the names of their classes."""
        return class_names

    def updates_student(self, step: int) -> bool:
        """Whether the optimizer step with this index moves the model that is averaged."""
        return True

    def has_ended(self, state: TrainerState) -> bool:
        """Whether a run in this state is over, so that nothing is left but to write `final`."""
        # By epochs, max_steps is -1 and the number of steps follows from the data; the first start noted it.
        return state.global_step >= (self.args.max_steps if self.args.max_steps > 0 else state.max_steps)

    # ---- Training ----

    def get_train_dataloader(self) -> DataLoader:
        args = self.args
        batches = EpochBatches(
            self.train_dataset,
            args.rows_per_batch,
            args.data_seed,
            args.process_index % args.num_readers,
            args.num_readers,
            args.batch_pattern(),
        )
        return epoch_loader(
            batches,
            self.data_collator,
            num_workers=args.dataloader_num_workers,
            pin_memory=args.dataloader_pin_memory,
            prefetch_factor=args.dataloader_prefetch_factor,
        )

    def update_average(self) -> None:
        """Called after each optimizer step."""
        if self.updates_student(self.state.global_step - 1):
            self.ema.update(self.mar)

    def training_step(self, model: nn.Module, inputs: Any, num_items_in_batch: Any = None) -> Tensor:
        step = self.state.global_step
        self.micro_batch = self.micro_batch + 1 if step == self._last_step else 0
        self._last_step = step
        if self.micro_batch == 0:  # tensors are replaced in a step and not changed, so lists of them are enough
            metrics = {name: list(values) for name, values in self._metrics.items()}
            self._before_step = (dict(self.buffer), metrics, self._tr_loss.clone())
            rest(self.optimizer, () if self.updates_student(step) else (MODEL,))
        place = self.micro_batch * self.args.world_size + self.args.process_index
        torch.manual_seed(derive_seed(self.args.seed, "train", step, place))
        return super().training_step(model, inputs, num_items_in_batch)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" in logs:  # not the line of an evaluation, which may fall between two of training
            logs |= mean_over_processes(self._metrics)  # a reward may have left every sample out: no line then
            self._metrics.clear()
        super().log(logs, start_time)

    def tokens_of(self, rows: dict[str, Tensor]) -> Tensor:
        """Tokens [B, L, C] of a batch of "images" [B, C, H, W] in 0..1 or of cached "moments" [B, 2c, h, w]."""
        if "moments" in rows:
            latents = self.codec.from_moments(rows["moments"].to(self.args.device))
        else:
            latents = self.codec.encode(rows["images"].to(self.args.device))
        return patchify(latents, self.mar.config.patch_size)

    def names_of(self, class_labels: Tensor) -> list[str]:
        """The class name of each label [B]."""
        return [self.class_names[label] for label in class_labels.tolist()]

    def decode_tokens(self, tokens: Tensor) -> Tensor:
        """Tokens [B, L, C] -> images [B, C, H, W] in 0..1."""
        config = self.mar.config
        return self.codec.decode(unpatchify(tokens, config.patch_size, config.grid_size))

    # ---- Evaluation on generated images ----

    def evaluate(self, *_: Any, **__: Any) -> dict[str, float]:
        """Generate `eval_num_images` images from fixed seeds with the averaged weights, and judge them."""
        args = self.args
        images, class_labels = generate_images(
            self.ema.module,
            self.codec,
            args.eval_num_images,
            self.sampling_settings(),
            seed=args.eval_seed,
            batch_size=args.eval_batch_size,
            device=args.device,
        )
        metrics: dict[str, float] = {}
        if self.evaluator is not None:
            metrics |= self.evaluator.evaluate(images, class_labels)
        if self.eval_rewards is not None:
            metrics |= self.judge(images, class_labels)
        # The last digits may differ between processes, but what follows from the figures must not.
        metrics = from_first_process({f"eval_{name}": value for name, value in metrics.items()})
        if self.is_world_process_zero():
            folder = Path(args.output_dir) / "samples"
            folder.mkdir(parents=True, exist_ok=True)
            path = folder / f"step_{self.state.global_step:06d}.png"
            save_image_grid(images, class_labels, path, args.sample_grid_columns)
        self.log(dict(metrics))
        self.control = self.callback_handler.on_evaluate(args, self.state, self.control, metrics)
        return metrics

    def judge(self, images: Tensor, class_labels: Tensor) -> dict[str, float]:
        """The mean of each held-out reward, as `rewards/<name>/mean`; left out where it scored no image."""
        names = self.names_of(class_labels)
        with failing_together(self.args.device):
            scores = self.eval_rewards.score(images, self.prompts_for(names), class_labels, names)
        means = {name: values.nanmean().item() for name, values in scores.components.items()}
        return {f"rewards/{name}/mean": mean for name, mean in means.items() if not math.isnan(mean)}

    # ---- Checkpoints ----

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        # Written before the rest: trainer_state.json comes last, so a checkpoint that has it is whole.
        folder = Path(self._get_output_dir(trial)) / f"checkpoint-{self.state.global_step}"
        folder.mkdir(parents=True, exist_ok=True)
        if self.args.should_save:
            state = {**self.ema.module.state_dict(), "num_updates": torch.tensor(self.ema.num_updates)}
            save_file({name: tensor.contiguous() for name, tensor in state.items()}, folder / "ema.safetensors")
        save_file(self.buffer, folder / f"buffer_{self.args.process_index}.safetensors")
        super()._save_checkpoint(model, trial)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        super()._load_from_checkpoint(resume_from_checkpoint, model)
        folder = Path(resume_from_checkpoint)
        # safetensors knows no "cpu:0", which the device is called where there are several processes.
        device = "cpu" if self.args.device.type == "cpu" else str(self.args.device)
        state = load_file(folder / "ema.safetensors", device=device)
        self.ema.num_updates = int(state.pop("num_updates"))
        self.ema.module.load_state_dict(state)
        buffer = folder / f"buffer_{self.args.process_index}.safetensors"
        self.buffer = load_file(buffer, device=device)

    def train(self, resume_from_checkpoint: str | None = None, **kwargs: Any) -> Any:
        """Train; then save the averaged model to `output_dir/final`."""
        self.ema.module.to(self.args.device)
        if resume_from_checkpoint is not None:
            self.args.eval_on_start = False  # the run began long ago, and that step has been evaluated
            if self._is_finished(resume_from_checkpoint):
                return None
        try:
            result = super().train(resume_from_checkpoint=resume_from_checkpoint, **kwargs)
        except RewardError as error:
            raise RewardError(f"{error}; {self._keep_completed_steps()}") from error
        finally:
            self.interrupt.restore()
        if self.has_ended(self.state):
            self.save_final(Path(self.args.output_dir) / "final")
        return result

    def _keep_completed_steps(self) -> str:
        """Write a checkpoint of the steps that were completed, after a reward has failed in the one that followed.

        A step scores before it moves a weight, so all that it may have changed is what `_before_step` holds; a resumed
        run does it anew. Returns what to tell the user.
        """
        step = self.state.global_step
        if step == 0:
            return "no step was completed, so there is no checkpoint"
        if self._last_step == step:  # in a step, and not in the evaluation after one
            buffer, metrics, self._tr_loss = self._before_step
            self.buffer, self._metrics = buffer, defaultdict(list, metrics)
        folder = Path(self.args.output_dir) / f"checkpoint-{step}"
        whole = is_complete(folder)
        self.accelerator.wait_for_everyone()  # nobody writes before all have looked
        if not whole:
            self.control.should_log = self.control.should_save = True
            self.control.should_evaluate = False
            self._maybe_log_save_evaluate(self._tr_loss, None, self.model, None, self.state.epoch, None, None)
        return f"{folder} is kept, --resume goes on from it"

    def _is_finished(self, checkpoint: str) -> bool:
        """Whether the checkpoint is the run's last one; transformers would train one step more. Writes `final` anew."""
        state = TrainerState.load_from_json(str(Path(checkpoint) / "trainer_state.json"))
        if not self.has_ended(state):
            return False
        self.state = state
        self._load_from_checkpoint(checkpoint)
        self.save_final(Path(self.args.output_dir) / "final")
        return True

    def save_final(self, folder: Path) -> None:
        """Write what the run is for, a folder for `MARModel.from_pretrained`. All processes must call it."""
        if self.args.should_save:
            self.ema.module.save_pretrained(folder)
