"""The part of a trainer that writes checkpoints, resumes from them, and saves the completed steps of a run that fails.

All private methods of `transformers.Trainer` that this library overrides or calls are in this file. Tested with
transformers 5.17 to 5.23; pyproject.toml excludes version 6, which may change them.
"""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import Trainer, TrainerState

from marval_rl.errors import CheckpointError, NonFiniteError, ProcessLostError, RewardError
from marval_rl.runtime.checkpoints import (
    DISK_FULL,
    STATE_FILE,
    CheckpointWriter,
    Layout,
    buffer_file,
    find_problem,
    layout_of,
    remove_unfinished,
    resume_hint,
    write_error,
)
from marval_rl.runtime.peers import Peers
from marval_rl.runtime.resharding import load_resharded


class BeforeStep(NamedTuple):
    """What a step may change before it moves a weight, as it was before."""

    buffer: dict[str, Tensor]
    metrics: dict[str, list[Tensor]]
    summed_loss: Tensor


class ResumableTrainer(Trainer):
    """Base of `MARTrainer`; not used by itself.

    Expects of it: `mar` (the model), `ema` (its average), `buffer` (what a step keeps for the next), `interrupt` (the
    callback of Ctrl-C), `recorded` (the metrics since the last log), and `last_step` (the one that runs, or ran last).
    """

    before_step: BeforeStep
    peers: Peers | None = None
    _writer: CheckpointWriter | None = None

    # ---- What a checkpoint holds ----

    def full_states(self) -> dict[str, dict[str, Tensor]]:
        """What a checkpoint holds in <name>.safetensors: states that are complete and equal in all processes."""
        return {"ema": {**self.ema.module.state_dict(), "num_updates": torch.tensor(self.ema.num_updates)}}

    def load_full_states(self, states: dict[str, dict[str, Tensor]]) -> None:
        """Load what `full_states` returned."""
        average = dict(states["ema"])
        self.ema.num_updates = int(average.pop("num_updates"))
        self.ema.module.load_state_dict(average)

    def needs_buffer(self, step: int) -> bool:
        """Whether the step with this index needs what the previous one left in `buffer`."""
        return False

    def has_ended(self, state: TrainerState) -> bool:
        """Whether a run in this state is over, so that only `final` remains to be written."""
        # With num_train_epochs, max_steps is -1; the state has the number of steps that follows from the data.
        return state.global_step >= (self.args.max_steps if self.args.max_steps > 0 else state.max_steps)

    def remember_before_step(self) -> None:
        """Called when a step begins, for `_keep_completed_steps`."""
        # Tensors are replaced in a step and not changed, so lists of them are enough.
        metrics = {name: list(values) for name, values in self.recorded.items()}
        self.before_step = BeforeStep(dict(self.buffer), metrics, self._tr_loss.clone())

    # ---- Writing ----

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
                for name, state in self.full_states().items():
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
        else:  # only the first process is here; all of them meet in `seal`
            with self._writer.attempt():
                super()._save(output_dir, state_dict)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        if self.is_deepspeed_enabled:
            self._save_engine(Path(output_dir))
        else:
            super()._save_optimizer_and_scheduler(output_dir)

    def _save_engine(self, folder: Path) -> None:
        """As transformers does, but a process that cannot write does not leave the others waiting in DeepSpeed's
        barriers."""
        engine, writer = self.model_wrapped, self._writer
        assert writer is not None
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

    # ---- Resuming ----

    def _prepare_for_training(self, max_steps: int, train_dataloader: DataLoader, resume_from_checkpoint: str | None):
        written = self.layout if resume_from_checkpoint is None else layout_of(Path(resume_from_checkpoint))
        if resume_from_checkpoint is None or not self.is_deepspeed_enabled or written == self.layout:
            return super()._prepare_for_training(max_steps, train_dataloader, resume_from_checkpoint)
        # DeepSpeed's engine cannot read these files: it starts with their weights, and then gets the other states.
        self._load_from_checkpoint(resume_from_checkpoint)
        prepared = super()._prepare_for_training(max_steps, train_dataloader, None)
        load_resharded(Path(resume_from_checkpoint), written, self.model_wrapped, Path(self.args.output_dir))
        self._load_optimizer_and_scheduler(resume_from_checkpoint)
        for group, learning_rate in zip(self.optimizer.param_groups, self.lr_scheduler.get_last_lr(), strict=True):
            group["lr"] = learning_rate
        return prepared

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is not None and not self.is_deepspeed_enabled:
            # The optimizer's state has the learning rate of the next step, but another max_steps changes the schedule.
            schedule = self.lr_scheduler
            rates = zip(self.optimizer.param_groups, schedule.base_lrs, schedule.lr_lambdas, strict=True)
            for group, base, factor in rates:
                group["lr"] = base * factor(schedule.last_epoch)
        if checkpoint is not None:  # not with the weights, which DeepSpeed loads by itself
            self._load_trainer_state(Path(checkpoint))

    def _load_trainer_state(self, folder: Path) -> None:
        """Load the weight average, and what a step left for the next one."""
        # safetensors does not know "cpu:0", the device's name where there are several processes.
        device = "cpu" if self.args.device.type == "cpu" else str(self.args.device)
        self.load_full_states(
            {name: load_file(folder / f"{name}.safetensors", device=device) for name in self.full_states()}
        )
        if layout_of(folder).world_size == self.args.world_size:
            self.buffer = load_file(folder / buffer_file(self.args.process_index), device=device)

    # ---- Training, and how it ends ----

    def train(self, resume_from_checkpoint: str | None = None, **kwargs: Any) -> Any:
        """Train; then save the averaged model to `output_dir/final`.

        Raises:
            RewardError, NonFiniteError: A reward failed, or too many steps in a row were not finite. A checkpoint is
                kept.
            CheckpointError: A checkpoint could not be written, or the one to resume from does not fit this run.
            ProcessLostError: Another process hangs or is dead.
        """
        output_dir = Path(self.args.output_dir)
        self.ema.module.to(self.args.device)
        self.peers = Peers(self.args.ddp_timeout) if self.args.world_size > 1 else None
        try:
            if self.args.process_index == 0:
                remove_unfinished(output_dir)
            if resume_from_checkpoint is not None:
                self.args.eval_on_start = False  # that step was evaluated when the run began
                if self._is_finished(resume_from_checkpoint):
                    return None
                self._check_layout(Path(resume_from_checkpoint))
            result = super().train(resume_from_checkpoint=resume_from_checkpoint, **kwargs)
            if self.has_ended(self.state):
                self._finish()
            return result
        except (RewardError, NonFiniteError) as error:
            raise type(error)(f"{error}; {self._keep_completed_steps()}") from error
        except OSError as error:
            if error.errno not in DISK_FULL:
                raise
            raise write_error(output_dir, Path(error.filename or output_dir), str(error.strerror)) from error
        except RuntimeError as error:
            missing = None if self.peers is None else self.peers.explain(error)
            if missing is None:
                raise
            raise ProcessLostError(f"{missing}; {resume_hint(output_dir)}") from error
        finally:
            self.interrupt.restore()
            if self.peers is not None:
                self.peers.close()

    def _check_layout(self, checkpoint: Path) -> None:
        """Raises CheckpointError if this run cannot use what another number of processes, or stage of ZeRO, wrote."""
        written, here = layout_of(checkpoint), self.layout
        if written == here:
            return
        difference = f"{checkpoint} was written by {written}, and this run has {here}"
        remedy = f"Continue with {written}, or start a new run from its weights"
        if written.world_size != here.world_size and self.needs_buffer(self.state.global_step):
            raise CheckpointError(
                f"{difference}: step {self.state.global_step} continues with what each of those processes kept, "
                f"such as a rollout. {remedy}; a checkpoint before a step that begins with fresh data fits any number"
            )
        if (written.zero_stage is None) != (here.zero_stage is None):
            raise CheckpointError(f"{difference}: DeepSpeed's states and plain ones cannot be exchanged. {remedy}")
        if self.args.process_index == 0:
            print(f"{difference}: its state is resharded")

    def _keep_completed_steps(self) -> str:
        """Write a checkpoint of the completed steps, after one that failed or was skipped too often.

        A step computes its rewards before it changes a weight. So `before_step` has everything that the failed step may
        have changed, and a resumed run repeats that step.

        Returns:
            A hint for the user.
        """
        step = self.state.global_step
        if step == 0:
            return "no step was completed, so there is no checkpoint: correct it and start the run again"
        if self.last_step == step:  # in a step, and not in the evaluation after one
            self.buffer, metrics, self._tr_loss = self.before_step
            self.recorded = defaultdict(list, metrics)
        folder = Path(self.args.output_dir) / f"checkpoint-{step}"
        complete = find_problem(folder, checksums=False) is None
        self.accelerator.wait_for_everyone()  # none writes before all have looked
        if not complete:
            self.control.should_log = self.control.should_save = True
            self.control.should_evaluate = False
            try:
                self._maybe_log_save_evaluate(self._tr_loss, None, self.model, None, self.state.epoch, None, None)
            except CheckpointError as error:
                return str(error)
        return f"{folder} is kept, --resume continues from it"

    def _is_finished(self, checkpoint: str) -> bool:
        """Whether the checkpoint is the run's last one: transformers would train one more step. Then writes `final`."""
        self.state = TrainerState.load_from_json(str(Path(checkpoint) / STATE_FILE))
        if not self.has_ended(self.state):
            return False
        self._load_from_checkpoint(checkpoint)
        self._load_trainer_state(Path(checkpoint))
        self._finish()
        return True

    def _finish(self) -> None:
        """Write the folder `final`. All processes must call it."""
        self.save_final(Path(self.args.output_dir) / "final")
        if self.args.process_index == 0:
            self.create_model_card()

    def save_final(self, folder: Path) -> None:
        """Write the model to a folder for `MARModel.from_pretrained`. All processes must call it."""
        if self.args.should_save:
            self.ema.module.save_pretrained(folder)
