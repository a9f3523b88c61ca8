"""What the trainers share on top of `transformers.Trainer`: exact resumption, weight averages, generated evaluation."""

from __future__ import annotations

import json
import math
from collections import defaultdict
from functools import partial
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import CommitInfo, HfApi
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from transformers import PrinterCallback, ProgressCallback
from transformers.integrations.deepspeed import unset_hf_deepspeed_config

from marval_rl.errors import MarvalError
from marval_rl.evaluation.evaluator import ImageEvaluator, mean_and_std
from marval_rl.evaluation.image_set import GeneratedBatch, ImagePlan, generate_batch, grid_of
from marval_rl.models import MaskedModel, codec_for, patchify, unpatchify
from marval_rl.models.compiling import compile_blocks
from marval_rl.models.generation import MAX_GRID_ROWS, SamplingSettings, save_image_grid
from marval_rl.randomness import derive_seed, kept_random_state
from marval_rl.rewarding import RewardSet
from marval_rl.runtime.callbacks import (
    AverageCallback,
    EpochCallback,
    InterruptCallback,
    MetricsFileCallback,
    RunProgressCallback,
)
from marval_rl.runtime.distributed import (
    failing_together,
    forget_gradients,
    from_first_process,
    gather_objects,
    is_partitioned,
    mean_over_processes,
)
from marval_rl.runtime.guard import GuardCallback, NonFiniteGuard
from marval_rl.runtime.model_card import changed_arguments, write_model_card
from marval_rl.runtime.profiling import EVALUATION, LOSS, STEP, ProfileCallback, phase
from marval_rl.runtime.resumable import ResumableTrainer
from marval_rl.runtime.trackers import SampleGridCallback
from marval_rl.trainers.arguments import MARTrainingArguments
from marval_rl.trainers.batches import EpochBatches, epoch_loader
from marval_rl.trainers.optimization import MODEL, NETWORKS, ExponentialMovingAverage, make_optimizer, pause


class MARTrainer(ResumableTrainer):
    """Base of the trainers; not used by itself.

    A subclass computes its loss in `training_loss`, and says with `parameter_groups` what is optimized and with
    `sampling_settings` how its model is sampled.

    Randomness is seeded again in each micro-batch from (seed, step, number of the micro-batch among those of the step
    in all processes): a run that was killed and resumed draws the same noise as one that was not, and one process that
    accumulates two micro-batches what two processes draw. A checkpoint holds, besides what `Trainer` saves, the weight
    average and the subclass's `buffer`.

    Args:
        network: What the optimizer trains; `model` or a module that holds it.
        model: The MAR model that is sampled, averaged and saved.
        evaluator: Measures generated images at each evaluation; None looks at the images alone.
        eval_rewards: Rewards that are only looked at; None for none.
        eval_classes: The classes or prompts that evaluation generates; None for all.
    """

    method = "mar"  # as recipes name it; of a trainer that is not one of the four, what the model card calls it
    recipe: dict[str, Any] | None = None  # which a command follows, for the model card

    def __init__(
        self,
        network: nn.Module,
        model: MaskedModel,
        args: MARTrainingArguments,
        train_dataset: Dataset,
        evaluator: ImageEvaluator | None = None,
        eval_rewards: RewardSet | None = None,
        eval_classes: range | None = None,
        **kwargs: Any,
    ):
        if any(map(is_partitioned, network.parameters())):
            raise ValueError(
                "the model's parameters are already partitioned by ZeRO-3: make it outside deepspeed.zero.Init, and "
                "load it after the training arguments were made; the trainer partitions it"
            )
        # transformers asks for an evaluation set although evaluation here generates its own images.
        # It would also compile the network as one, which meets too many shapes; `train` compiles the blocks.
        compiler, args.torch_compile_backend = args.torch_compile_backend, None
        super().__init__(model=network, args=args, train_dataset=train_dataset, eval_dataset=train_dataset, **kwargs)
        args.torch_compile_backend = compiler
        unset_hf_deepspeed_config()  # accelerate has set it again, see MARTrainingArguments
        self._read_order()  # raises if the rows are too few, before any work
        if self.is_deepspeed_enabled and self.layout.zero_stage == 3:
            # Each checkpoint holds complete weights: a run of another layout, or one that has ended, begins with them.
            zero = self.accelerator.state.deepspeed_plugin.deepspeed_config["zero_optimization"]
            zero["stage3_gather_16bit_weights_on_model_save"] = True
        self.mar = model
        self.codec = codec_for(model.config).to(args.device)
        config = model.config
        self.class_names = config.class_names or [f"class {label}" for label in range(config.num_classes)]
        self.evaluator = ImageEvaluator() if evaluator is None else evaluator
        self.evaluator.device = args.device
        if eval_rewards is not None:
            self.evaluator.add_rewards(eval_rewards, self.prompts_for, self.class_names)
        shown = range(config.num_classes) if eval_classes is None else eval_classes
        self.eval_plan = ImagePlan(args.eval_num_images, len(shown), args.eval_batch_size, shown.start)
        self.ema = ExponentialMovingAverage(model, args.ema_decay)
        self.buffer: dict[str, Tensor] = {}
        self.recorded: defaultdict[str, list[Tensor]] = defaultdict(list)
        self.micro_batch = 0  # its index within the optimizer step
        self.last_step = -1
        self.guard = NonFiniteGuard(args.max_skipped_steps)
        for callback in (PrinterCallback, ProgressCallback):
            self.remove_callback(callback)
        self.add_callback(RunProgressCallback())
        self.add_callback(MetricsFileCallback(Path(args.output_dir) / "metrics.jsonl"))
        if args.report_to:
            self.add_callback(SampleGridCallback(self.sample_file().parent, lambda: self.callback_handler.callbacks))
        self.interrupt = InterruptCallback()
        self.add_callback(self.interrupt)
        self.add_callback(EpochCallback())
        skip_step = partial(pause, networks=NETWORKS)
        self.add_callback(GuardCallback(self.guard, skip_step, self._forget_step))
        self.add_callback(AverageCallback(self.update_average))
        if args.profile < 0:
            raise ValueError(f"profile must not be negative, but is {args.profile}")
        if args.profile > 0:
            self.add_callback(ProfileCallback(args.profile, Path(args.output_dir)))

    # ---- What a subclass says ----

    def training_loss(self, model: nn.Module, inputs: Any) -> Tensor:
        """The loss of a micro-batch.

        Args:
            model: The network, in the wrapper of the distributed engine if there is one.
            inputs: What the data loader read.
        """
        raise NotImplementedError

    def parameter_groups(self) -> list[dict[str, Any]]:
        """The optimizer's parameter groups, each with the "network" it belongs to."""
        raise NotImplementedError

    def frozen_models(self) -> list[MaskedModel]:
        """Models that training runs beside the one it trains."""
        return []

    def sampling_settings(self) -> SamplingSettings:
        """How evaluation samples the model."""
        return SamplingSettings(num_unmasking_steps=self.args.eval_unmasking_steps)

    def record(self, metrics: dict[str, Tensor]) -> None:
        """Remember metrics of this micro-batch; their mean over all processes appears at the next log. NaN is left
        out of it."""
        for name, value in metrics.items():
            self.guard.blame(name, value)
            self.recorded[name].append(value.detach().float())

    def create_model_card(
        self, model_name: str | None = None, dataset_name: str | None = None, tags: str | list[str] | None = None
    ) -> None:
        """Write the card of the model in `final`; done when a run ends, and again to change it, as in TRL.

        Args:
            model_name: The title; None takes the name of the run folder.
            dataset_name: The data set; None takes the recipe's, if a command trains.
            tags: Tags of the hub beside those of the method.
        """
        settings = changed_arguments(self.args) if self.recipe is None else dict(self.recipe)
        if dataset_name is not None:
            settings["dataset"] = dataset_name
        more = [tags] if isinstance(tags, str) else tags or []
        history, rows = self.state.log_history, len(self.train_dataset)  # type: ignore[arg-type]
        folder = Path(self.args.output_dir)
        write_model_card(folder, self.method, settings, self.mar.config, history, rows, model_name, more)

    def push_to_hub(  # type: ignore[override]
        self, repo_id: str, private: bool = True, commit_message: str = "End of training", token: str | None = None
    ) -> CommitInfo:
        """Upload the folder `final`, model and card, to a repository of the hub, which is made if it is missing.

        Args:
            repo_id: OWNER/NAME.
            private: Whether a new repository is private.
            commit_message: Of the commit.
            token: Of the hub; None takes the one of `hf auth login`.

        Raises:
            FileNotFoundError: The run has not ended.
        """
        folder = Path(self.args.output_dir) / "final"
        if not (folder / "README.md").is_file():
            raise FileNotFoundError(f"{folder} does not exist: train to the end before push_to_hub")
        hub = HfApi(token=token)
        hub.create_repo(repo_id, private=private, exist_ok=True)
        return hub.upload_folder(repo_id=repo_id, folder_path=folder, commit_message=commit_message)

    def prompts_for(self, class_names: list[str]) -> list[str]:
        """The prompt of each image, given the names of their classes."""
        return class_names

    # ---- Training ----

    def train(self, *args: Any, **kwargs: Any) -> Any:
        if self.args.torch_compile:
            models = self.mar, self.ema.module, *self.frozen_models()
            compile_blocks(*models, compiler=self.args.torch_compile_backend or "inductor")
        return super().train(*args, **kwargs)

    def compute_loss(self, model: nn.Module, inputs: Any, *_: Any, **__: Any) -> Tensor:
        # Watched here and not in training_step: DeepSpeed steps before transformers' training_step returns the loss.
        with phase(LOSS):
            return self.guard.watch(self.training_loss(model, inputs))

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        if self.optimizer is None:  # type: ignore[has-type]
            self.optimizer = make_optimizer(self.parameter_groups(), self.args)
        return self.optimizer

    def needs_buffer(self, step: int) -> bool:
        return not self.args.starts_cycle(step)

    def get_train_dataloader(self) -> DataLoader:
        args = self.args
        return epoch_loader(
            self._read_order(),
            self.data_collator,
            num_workers=args.dataloader_num_workers,
            pin_memory=args.dataloader_pin_memory,
            prefetch_factor=args.dataloader_prefetch_factor,
        )

    def _read_order(self) -> EpochBatches:
        args = self.args
        return EpochBatches(
            self.train_dataset,
            args.rows_per_batch,
            args.data_seed,
            args.process_index % args.num_readers,
            args.num_readers,
            args.batch_pattern(),
        )

    def update_average(self) -> None:
        """Called after each optimizer step."""
        if self.args.moves_model(self.state.global_step - 1) and not self.guard.step_is_bad:
            self.ema.update(self.mar)

    def training_step(self, model: nn.Module, inputs: Any, num_items_in_batch: Any = None) -> Tensor:
        step = self.state.global_step
        self.micro_batch = self.micro_batch + 1 if step == self.last_step else 0
        self.last_step = step
        if self.micro_batch == 0:
            self.remember_before_step()
            self.guard.begin_step()
            if self.peers is not None:
                self.peers.note_step(step)
            if self.args.moves_model(step):
                pause(self.optimizer, ())
            else:
                pause(self.optimizer, (MODEL,))
                forget_gradients(self.mar.parameters())
        place = self.micro_batch * self.args.world_size + self.args.process_index
        torch.manual_seed(derive_seed(self.args.seed, "train", step, place))
        with phase(STEP), self.mar.products(self.args.per_device_train_batch_size):
            return super().training_step(model, inputs, num_items_in_batch)

    def _forget_step(self) -> None:
        """Drop the metrics of a step that was skipped."""
        self.recorded = defaultdict(list, self.before_step.metrics)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" in logs:  # not the line of an evaluation, which may fall between two of training
            logs |= mean_over_processes(self.recorded)  # a reward may have left every sample out: no line then
            self.recorded.clear()
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

    def images_of(self, rows: dict[str, Tensor]) -> Tensor:
        """Images [B, C, H, W] in 0..1 of such a batch; moments are decoded."""
        if "moments" in rows:
            latents = self.codec.from_moments(rows["moments"].to(self.args.device))
            return self.codec.decode(latents, self.mar.decoder_text(rows["class_labels"].to(self.args.device)))
        return rows["images"].to(self.args.device)

    def names_of(self, class_labels: Tensor) -> list[str]:
        """The class name of each label [B]; waits for the device."""
        return [self.class_names[label] for label in class_labels.tolist()]

    def decode_tokens(self, tokens: Tensor, class_labels: Tensor) -> Tensor:
        """Tokens [B, L, C] of images of these classes or prompts [B] -> images [B, C, H, W] in 0..1."""
        config = self.mar.config
        latents = unpatchify(tokens, config.patch_size, config.grid)
        return self.codec.decode(latents, self.mar.decoder_text(class_labels))

    # ---- Evaluation on generated images ----

    @property
    def evaluation_names(self) -> list[str]:
        """The figures that an evaluation measures, without "eval_"."""
        return self.evaluator.names(self.eval_plan.num_images, self.eval_plan.num_classes)

    @phase(EVALUATION)
    def evaluate(self, *_: Any, **__: Any) -> dict[str, float]:
        """Generate `eval_num_images` images from fixed seeds with the averaged weights, and measure them.

        The processes share the work; figures and images are the same for any number of them.
        """
        args, plan = self.args, self.eval_plan
        draws: list[dict[str, Any]] = []
        grid: list[GeneratedBatch] = []
        first_rows: dict[str, Tensor] = {}
        for seed in range(args.eval_seed, args.eval_seed + args.eval_redraws):
            with failing_together(args.device, MarvalError), kept_random_state(args.device):
                batches = [
                    self._measure_batch(batch, seed) for batch in plan.share(args.process_index, args.world_size)
                ]
            batches = sorted((batch for share in gather_objects(batches) for batch in share), key=lambda b: b.number)
            with failing_together(args.device, MarvalError):
                if self.is_world_process_zero():
                    rows = {name: torch.cat([batch.rows[name] for batch in batches]) for name in batches[0].rows}
                    draws.append(self.evaluator.figures(rows))
                    if not grid:
                        grid, first_rows = batches, rows
        metrics: dict[str, Any] = {}
        if self.is_world_process_zero():
            means, deviations = mean_and_std(draws)
            metrics = {f"eval_{name}": value for name, value in means.items()}
            metrics |= {f"eval_{name}/std": value for name, value in deviations.items()}
            (Path(args.output_dir) / "samples").mkdir(parents=True, exist_ok=True)
            classes = self.evaluator.per_class(first_rows, self.class_names)
            self.sample_file("per_class.json").write_text(json.dumps(classes), encoding="utf-8")
        with failing_together(args.device, MarvalError), kept_random_state(args.device):
            if self.is_world_process_zero():
                self.write_samples(*grid_of(grid))
        metrics = from_first_process(metrics)
        self.log(dict(metrics))
        control = self.control  # type: ignore[has-type]  # transformers counts as untyped
        self.control = self.callback_handler.on_evaluate(args, self.state, control, metrics)
        return metrics

    def write_samples(self, images: Tensor, class_labels: Tensor) -> None:
        """Write the sample grid of an evaluation; subclasses add others. The first process alone calls it.

        images [n, 3, H, W] in 0..1, class_labels [n].
        """
        save_image_grid(images, class_labels, self.sample_file(), self.args.sample_grid_columns)
        if len(shown := class_labels.unique()) <= MAX_GRID_ROWS:
            self.sample_file("rows.json").write_text(json.dumps(self.names_of(shown)), encoding="utf-8")

    def sample_file(self, name: str = "") -> Path:
        """A file among the samples: of that name, or the grid `name` of this step."""
        if not name.endswith(".json"):
            name += f"step_{self.state.global_step:06d}.png"
        return Path(self.args.output_dir) / "samples" / name

    def _measure_batch(self, batch: int, seed: int) -> GeneratedBatch:
        model, plan = self.ema.module, self.eval_plan
        was_training = model.training
        model.eval()
        pixels = generate_batch(model, self.codec, plan, batch, self.sampling_settings(), seed)
        model.train(was_training)
        shown = torch.isin(plan.indices(batch), plan.shown(self.args.sample_grid_columns))
        labels = plan.labels(batch)
        return GeneratedBatch(batch, self.evaluator.measure(pixels, labels), pixels.cpu()[shown], labels[shown])
