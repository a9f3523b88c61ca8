"""What the trainers share on top of `transformers.Trainer`: exact resumption, weight averages, generated evaluation."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from transformers import PrinterCallback, ProgressCallback, Trainer, TrainerState
from transformers.integrations.deepspeed import unset_hf_deepspeed_config

from marval_rl.errors import CheckpointError, NonFiniteError, ProcessLostError, RewardError
from marval_rl.evaluation.evaluator import ImageEvaluator
from marval_rl.models import MARModel, codec_for, patchify, unpatchify
from marval_rl.rewarding import RewardSet
from marval_rl.training.arguments import MARTrainingArguments
from marval_rl.training.batches import EpochBatches, epoch_loader
from marval_rl.training.callbacks import AverageCallback, EpochCallback, InterruptCallback, MetricsFileCallback
from marval_rl.training.checkpoints import (
    DISK_FULL,
    STATE_FILE,
    CheckpointWriter,
    Layout,
    buffer_file,
    cannot_write,
    damage,
    layout_of,
    remove_unfinished,
    way_on,
)
from marval_rl.training.conversion import load_other_layout
from marval_rl.training.distributed import (
    failing_together,
    forget_gradients,
    from_first_process,
    is_partitioned,
    mean_over_processes,
)
from marval_rl.training.ema import ExponentialMovingAverage
from marval_rl.training.guard import GuardCallback, NonFiniteGuard
from marval_rl.training.optimizers import MODEL, rest
from marval_rl.training.peers import Peers
from marval_rl.training.progress import ProgressBarCallback
from marval_rl.training.randomness import derive_seed
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
        if self.is_deepspeed_enabled and self.layout.zero_stage == 3:
            # Whole weights belong to each checkpoint: a run of another layout, or one that has ended, begins with them.
            zero = self.accelerator.state.deepspeed_plugin.deepspeed_config["zero_optimization"]
            zero["stage3_gather_16bit_weights_on_model_save"] = True
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
        self.guard = NonFiniteGuard(args.max_skipped_steps)
        # A loss is seen where it is made: DeepSpeed steps before transformers' training_step returns it.
        self.compute_loss = self._guarded(self.compute_loss)
        self.peers: Peers | None = None
        self._writer: CheckpointWriter | None = None
        for callback in (PrinterCallback, ProgressCallback):
            self.remove_callback(callback)
        self.add_callback(ProgressBarCallback())
        self.add_callback(MetricsFileCallback(Path(args.output_dir) / "metrics.jsonl"))
        self.interrupt = InterruptCallback()
        self.add_callback(self.interrupt)
        self.add_callback(EpochCallback())
        self.add_callback(GuardCallback(self.guard, self._forget_step))
        self.add_callback(AverageCallback(self.update_average))

    # ---- What a subclass says ----

    def sampling_settings(self) -> SamplingSettings:
        """How evaluation samples the model."""
        return SamplingSettings(num_unmasking_steps=self.args.eval_unmasking_steps)

    def record(self, metrics: dict[str, Tensor]) -> None:
        """Remember metrics of this micro-batch; their mean over all processes appears at the next log. NaN is left
        out of it."""
        for name, value in metrics.items():
            self.guard.blame(name, value)
            self._metrics[name].append(value.detach().float())

    def prompts_for(self, class_names: list[str]) -> list[str]:
        """The prompt of each image, given the names of their classes."""
        return class_names

    def updates_student(self, step: int) -> bool:
        """Whether the optimizer step with this index moves the model that is averaged."""
        return True

    def whole_states(self) -> dict[str, dict[str, Tensor]]:
        """What a checkpoint holds in <name>.safetensors: states that are whole and alike in all processes."""
        return {"ema": {**self.ema.module.state_dict(), "num_updates": torch.tensor(self.ema.num_updates)}}

    def load_whole_states(self, states: dict[str, dict[str, Tensor]]) -> None:
        """Takes over what `whole_states` gave."""
        average = dict(states["ema"])
        self.ema.num_updates = int(average.pop("num_updates"))
        self.ema.module.load_state_dict(average)

    def goes_on_with_buffer(self, step: int) -> bool:
        """Whether the step with this index needs what the one before it left in `buffer`."""
        return False

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
        if self.updates_student(self.state.global_step - 1) and not self.guard.step_is_bad:
            self.ema.update(self.mar)

    def training_step(self, model: nn.Module, inputs: Any, num_items_in_batch: Any = None) -> Tensor:
        step = self.state.global_step
        self.micro_batch = self.micro_batch + 1 if step == self._last_step else 0
        self._last_step = step
        if self.micro_batch == 0:  # tensors are replaced in a step and not changed, so lists of them are enough
            metrics = {name: list(values) for name, values in self._metrics.items()}
            self._before_step = (dict(self.buffer), metrics, self._tr_loss.clone())
            self.guard.begin_step()
            if self.peers is not None:
                self.peers.note_step(step)
            if self.updates_student(step):
                rest(self.optimizer, ())
            else:
                rest(self.optimizer, (MODEL,))
                forget_gradients(self.mar.parameters())
        place = self.micro_batch * self.args.world_size + self.args.process_index
        torch.manual_seed(derive_seed(self.args.seed, "train", step, place))
        return super().training_step(model, inputs, num_items_in_batch)

    def _guarded(self, compute_loss: Callable[..., Tensor]) -> Callable[..., Tensor]:
        return lambda *args, **kwargs: self.guard.watch(compute_loss(*args, **kwargs))

    def _forget_step(self) -> None:
        """Drop the metrics of a step that was skipped."""
        _, metrics, _ = self._before_step
        self._metrics = defaultdict(list, metrics)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" in logs:  # not the line of an evaluation, which may fall between two of training
            logs |= mean_over_processes(self._metrics)  # a reward may have left every sample out: no line then
            self._metrics.clear()
            logs |= self.guard.report()
            if not math.isfinite(logs.get("grad_norm", 0.0)):
                del logs["grad_norm"]  # of a step that was skipped
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

    @property
    def layout(self) -> Layout:
        """How this run's state is spread."""
        plugin = self.accelerator.state.deepspeed_plugin if self.is_deepspeed_enabled else None
        return Layout(self.args.world_size, None if plugin is None else plugin.zero_stage)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        args = self.args
        writer = CheckpointWriter(Path(args.output_dir), self.state.global_step, self.layout, args.save_total_limit)
        writer.begin()
        self._writer = writer
        try:
            if args.should_save:
                for name, state in self.whole_states().items():
                    file = writer.folder / f"{name}.safetensors"
                    with writer.attempt(file):
                        save_file({key: tensor.contiguous() for key, tensor in state.items()}, file)
            file = writer.folder / buffer_file(args.process_index)
            with writer.attempt(file):
                save_file(self.buffer, file)
            with writer.attempt():
                super()._save_checkpoint(model, trial)
        finally:
            self._writer = None
        writer.seal()

    def _get_output_dir(self, trial: Any) -> str:
        return super()._get_output_dir(trial) if self._writer is None else str(self._writer.folder.parent)

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Tensor] | None = None) -> None:
        if self._writer is None:
            super()._save(output_dir, state_dict)
        else:  # in one process only, and all meet in what follows
            with self._writer.attempt():
                super()._save(output_dir, state_dict)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        if self.is_deepspeed_enabled:
            self._save_engine(Path(output_dir))
        else:
            super()._save_optimizer_and_scheduler(output_dir)

    def _save_engine(self, folder: Path) -> None:
        """What transformers does here, but so that a process that cannot write does not leave the others waiting in
        DeepSpeed's barriers."""
        engine, writer = self.model_wrapped, self._writer
        tag = f"global_step{self.state.global_step}"
        with writer.attempt():
            (folder / tag).mkdir(exist_ok=True)
        writer.agree()
        files, write = engine.checkpoint_engine, engine.checkpoint_engine.save
        files.save = writer.attempting(write)
        try:
            engine.save_checkpoint(str(folder), tag=tag, save_latest=False)
        finally:
            files.save = write
        if self.args.should_save:
            with writer.attempt():
                (folder / "latest").write_text(tag)
                torch.save(self.lr_scheduler.state_dict(), folder / "scheduler.pt")

    def _prepare_for_training(self, max_steps: int, train_dataloader: DataLoader, resume_from_checkpoint: str | None):
        written = None if resume_from_checkpoint is None else layout_of(Path(resume_from_checkpoint))
        if not self.is_deepspeed_enabled or written in (None, self.layout):
            return super()._prepare_for_training(max_steps, train_dataloader, resume_from_checkpoint)
        # DeepSpeed's engine begins with the weights and is given the rest, for it would not take these files.
        self._load_from_checkpoint(resume_from_checkpoint)
        prepared = super()._prepare_for_training(max_steps, train_dataloader, None)
        load_other_layout(Path(resume_from_checkpoint), written, self.model_wrapped, Path(self.args.output_dir))
        self._load_optimizer_and_scheduler(resume_from_checkpoint)
        for group, learning_rate in zip(self.optimizer.param_groups, self.lr_scheduler.get_last_lr(), strict=True):
            group["lr"] = learning_rate
        return prepared

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is not None:  # here and not with the weights, which DeepSpeed loads by itself
            self._load_own_state(Path(checkpoint))

    def _load_own_state(self, folder: Path) -> None:
        """The weight average, and what a step left for the next one."""
        # safetensors knows no "cpu:0", which the device is called where there are several processes.
        device = "cpu" if self.args.device.type == "cpu" else str(self.args.device)
        self.load_whole_states(
            {name: load_file(folder / f"{name}.safetensors", device=device) for name in self.whole_states()}
        )
        written = layout_of(folder) or self.layout
        if written.world_size == self.args.world_size:
            self.buffer = load_file(folder / buffer_file(self.args.process_index), device=device)

    def train(self, resume_from_checkpoint: str | None = None, **kwargs: Any) -> Any:
        """Train; then save the averaged model to `output_dir/final`.

        Raises:
            RewardError, NonFiniteError: A reward failed, or too many steps in a row were not finite. A checkpoint is
                kept.
            CheckpointError: A checkpoint could not be written, or the one to go on from does not fit this run.
            ProcessLostError: Another process hangs or is gone.
        """
        output_dir = Path(self.args.output_dir)
        self.ema.module.to(self.args.device)
        self.peers = Peers(self.args.ddp_timeout) if self.args.world_size > 1 else None
        try:
            if self.args.process_index == 0:
                remove_unfinished(output_dir)
            if resume_from_checkpoint is not None:
                self.args.eval_on_start = False  # the run began long ago, and that step has been evaluated
                if self._is_finished(resume_from_checkpoint):
                    return None
                self._check_layout(Path(resume_from_checkpoint))
            result = super().train(resume_from_checkpoint=resume_from_checkpoint, **kwargs)
            if self.has_ended(self.state):
                self.save_final(output_dir / "final")
            return result
        except (RewardError, NonFiniteError) as error:
            raise type(error)(f"{error}; {self._keep_completed_steps()}") from error
        except OSError as error:
            if error.errno not in DISK_FULL:
                raise
            raise cannot_write(output_dir, Path(error.filename or output_dir), error.strerror) from error
        except RuntimeError as error:
            missing = None if self.peers is None else self.peers.explain(error)
            if missing is None:
                raise
            raise ProcessLostError(f"{missing}; {way_on(output_dir)}") from error
        finally:
            self.interrupt.restore()
            if self.peers is not None:
                self.peers.close()

    def _check_layout(self, checkpoint: Path) -> None:
        """Raises CheckpointError if another number of processes, or stage of ZeRO, left what this run cannot use."""
        written, here = layout_of(checkpoint), self.layout
        if written in (None, here):
            return
        told = f"{checkpoint} was written by {written}, and this run has {here}"
        way = f"Go on with {written}, or begin a new run from its weights"
        if written.world_size != here.world_size and self.goes_on_with_buffer(self.state.global_step):
            raise CheckpointError(
                f"{told}: step {self.state.global_step} goes on with what each of those processes has kept, as a "
                f"rollout. {way}; a checkpoint of a step that begins with fresh data fits any number"
            )
        if (written.zero_stage is None) != (here.zero_stage is None):
            raise CheckpointError(f"{told}: DeepSpeed's states and plain ones cannot be exchanged. {way}")
        if self.args.process_index == 0:
            print(f"{told}: its states are dealt out anew")

    def _keep_completed_steps(self) -> str:
        """Write a checkpoint of the steps that were completed, after a reward has failed in the one that followed
        or that was skipped, like others before it.

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
        whole = damage(folder, checksums=False) is None
        self.accelerator.wait_for_everyone()  # nobody writes before all have looked
        if not whole:
            self.control.should_log = self.control.should_save = True
            self.control.should_evaluate = False
            try:
                self._maybe_log_save_evaluate(self._tr_loss, None, self.model, None, self.state.epoch, None, None)
            except CheckpointError as error:
                return str(error)
        return f"{folder} is kept, --resume goes on from it"

    def _is_finished(self, checkpoint: str) -> bool:
        """Whether the checkpoint is the run's last one; transformers would train one step more. Writes `final` anew."""
        self.state = TrainerState.load_from_json(str(Path(checkpoint) / STATE_FILE))
        if not self.has_ended(self.state):
            return False
        self._load_from_checkpoint(checkpoint)
        self._load_own_state(Path(checkpoint))
        self.save_final(Path(self.args.output_dir) / "final")
        return True

    def save_final(self, folder: Path) -> None:
        """Write what the run is for, a folder for `MARModel.from_pretrained`. All processes must call it."""
        if self.args.should_save:
            self.ema.module.save_pretrained(folder)
