"""The memory of a training step, without taking it: the real trainer's step, run on fake tensors.

The networks are built on the meta device, and the trainer around them as a run builds it. Then `FakeTensorMode` gives
them shapes, types and the device "cuda", on any machine, and the trainer computes its loss: autograd keeps what it
would keep on a GPU, and nothing is computed. Stand-ins are used for images (latents: what the VAE keeps is not
counted), for rewards and the distribution anchor's features (a mean of the pixels), and for what takes no gradient:
GRPO's rollouts and the reference model.
"""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, fields, replace
from itertools import count
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.data import Dataset

from marval_rl.models import MaskedConfig, MaskedModel
from marval_rl.models.checkpoints import new_model
from marval_rl.models.diffusion import forget_tensors, make_schedule
from marval_rl.models.sampling import student_mean
from marval_rl.models.unmasking import random_order, unmasking_steps
from marval_rl.recipes.planning.fake_device import FusedAttention, autocast_to
from marval_rl.rewarding import RewardScores
from marval_rl.runtime.limits import LimitArguments
from marval_rl.trainers.arguments import planned_for
from marval_rl.trainers.base import MARTrainer
from marval_rl.trainers.grpo import MARGRPOTrainer
from marval_rl.trainers.reward_backprop import RewardBackpropTrainer
from marval_rl.trainers.reward_trainer import RewardTrainer

FLOAT32 = 4
COLUMNS = ("weights", "gradients", "optimizer", "average", "frozen", "activations", "total")
ALL_MASKED: dict[str, Any] = {"mask_ratio_min": 1.0, "mask_law": "truncated_normal"}  # the most that a step may mask
STAGES = ("DDP", "ZeRO-1", "ZeRO-2", "ZeRO-3")

# Makes a trainer of its arguments, the model it trains, the teacher, if there is one, and rows of data.
MakeTrainer = Callable[[Any, MaskedModel, MaskedModel | None, Dataset], MARTrainer]


@dataclass
class Footprint:
    """Parameters by what training keeps for them, and the activations of a micro-batch.

    Attributes:
        trained: Parameters that are updated.
        averaged: Parameters of the weight average.
        frozen: Name -> parameters of the networks that are only evaluated.
        activations: Bytes that a micro-batch keeps for its backward pass.
        held: Parameters of the trained networks that are not updated: with adapters, the student's own.
        networks: Name -> parameters of what is trained, for display.
    """

    trained: int
    averaged: int
    frozen: dict[str, int]
    activations: int
    held: int = 0
    networks: dict[str, int] = field(default_factory=dict)


def memory_table(footprint: Footprint, half: bool, num_processes: int) -> list[str]:
    """Lines of a table: memory of each process by ZeRO stage (arXiv 1910.02054, section 5 and figure 1).

    DDP keeps weights, gradients and Adam's two moments in float32 (16 bytes per parameter). DeepSpeed with `half`,
    which is bf16 or fp16, keeps 2 + 2 bytes of weights and gradients and 12 of optimizer state (float32 weights and
    moments). Stage 1 shards the optimizer, 2 the gradients too, 3 the weights too; weights that are held have neither
    gradients nor optimizer. Frozen networks and the weight average are float32, in each process.
    """
    average = FLOAT32 * footprint.averaged
    frozen = FLOAT32 * sum(footprint.frozen.values())
    rows = []
    for stage, name in enumerate(STAGES):
        widths = (2, 2, 12) if half and stage > 0 else (4, 4, 8)
        shares = [num_processes if stage >= first else 1 for first in (3, 2, 1)]  # weights, gradients, optimizer
        kept = (footprint.trained + footprint.held, footprint.trained, footprint.trained)
        parts = [count * width / share for count, width, share in zip(kept, widths, shares, strict=True)]
        parts += [average, frozen, footprint.activations]
        rows.append((name, [*parts, sum(parts)]))
    unit, size = ("GiB", 2**30) if rows[0][1][-1] >= 2**30 else ("MiB", 2**20)
    lines = ["".join([f"  {unit:8s}", *(f"{column:>13s}" for column in COLUMNS)])]
    return lines + ["".join([f"  {name:8s}", *(f"{part / size:13.2f}" for part in parts)]) for name, parts in rows]


def footprint_of(
    make_trainer: MakeTrainer, config: Any, model: MaskedConfig, teacher: MaskedConfig | None
) -> Footprint:
    """What a run would keep in memory.

    Args:
        make_trainer: Makes the run's trainer.
        config: The run's training arguments.
        model: Of the model that is trained.
        teacher: Of the teacher, where the run needs one.
    """
    with _meta_trainer(make_trainer, config, model, teacher) as (trainer, frozen):
        parameters = dict(trainer.model.named_parameters())
        adapters = sum(p.numel() for name, p in parameters.items() if "lora_" in name)
        trained = sum(p.numel() for p in parameters.values() if p.requires_grad)
        named = {"student" if model.is_one_step else "teacher": _size(trainer.mar) - adapters, "adapters": adapters}
        named["auxiliary network"] = _size(trainer.model) - _size(trainer.mar)
        return Footprint(
            trained=trained,
            averaged=_size(trainer.ema.module),
            frozen={name: _size(network) for name, network in frozen.items()},
            activations=activations_of(make_trainer, config, model, teacher),
            held=_size(trainer.model) - trained,
            networks={name: size for name, size in named.items() if size},
        )


def activations_of(make_trainer: MakeTrainer, config: Any, model: MaskedConfig, teacher: MaskedConfig | None) -> int:
    """Bytes that autograd keeps for the backward pass of a micro-batch; arguments as `footprint_of`'s.

    Blocks of a kind keep equally much, so that networks with one block of each kind, and with one more, suffice.
    """

    def count_bytes(depths: dict[str, int]) -> int:
        shallow_teacher = None if teacher is None else teacher.changed(**depths)
        with _meta_trainer(make_trainer, config, model.changed(**depths), shallow_teacher) as (trainer, frozen):
            return saved_bytes(trainer, config, frozen.values())

    depths = {name: vars(model)[name] for name in model.depths}
    if teacher is not None and depths != {name: vars(teacher)[name] for name in teacher.depths}:
        return count_bytes({})
    one_each = dict.fromkeys(depths, 1)
    least = count_bytes(one_each)
    return least + sum((n - 1) * (count_bytes({**one_each, name: 2}) - least) for name, n in depths.items())


@contextmanager
def _meta_trainer(
    make_trainer: MakeTrainer, config: Any, model: MaskedConfig, teacher: MaskedConfig | None
) -> Iterator[tuple[MARTrainer, dict[str, nn.Module]]]:
    """The run's trainer on the meta device, and the frozen networks by name; arguments as `footprint_of`'s."""
    with planned_for(1), tempfile.TemporaryDirectory() as folder:  # transformers makes the output folder
        args = _arguments_on_meta(config, folder)
        with torch.device("meta"):
            trained = _network(model)
            taught_by = None if teacher is None else _network(teacher)
        trainer = make_trainer(args, trained, taught_by, _Rows(trained.config))
        frozen: dict[str, nn.Module] = {} if taught_by is None else {"teacher": taught_by}
        if isinstance(trainer, RewardTrainer):
            if trainer.anchors.reference is not None:
                frozen["reference model"] = trainer.anchors.reference
            if trainer.anchors.gsim is not None:
                trainer.anchors.gsim.args = replace(trainer.anchors.gsim.args, **ALL_MASKED)
        yield trainer, frozen


def saved_bytes(trainer: MARTrainer, config: Any, frozen: Iterable[nn.Module] = ()) -> int:
    """Bytes that autograd keeps for the backward pass of a micro-batch; nothing is computed.

    Each storage counts once; parameters do not, but the copies of weights that autocast makes do. Buffers that live
    only within one operation come on top. What a checkpointed unmasking step keeps while it is computed again counts,
    for the largest step.

    Args:
        trainer: On the meta device; it can do nothing else afterwards.
        config: The run's training arguments: its precision, and whether it uses the CPU.
        frozen: Networks beside the trainer's own.
    """
    device = torch.device("cpu" if config.use_cpu else "cuda")
    make_schedule(trainer.mar.config.num_train_timesteps)  # cached: it must be made before the fake mode, not in it
    trainer.state.global_step = next(step for step in count() if trainer.args.moves_model(step))
    trainer.model.train()
    if trainer.args.gradient_checkpointing:
        trainer.mar.gradient_checkpointing_enable(
            trainer.args.gradient_checkpointing_kwargs or {"use_reentrant": False}
        )
    kept: dict[int, torch.UntypedStorage] = {}
    try:
        dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(config.precision)
        with (
            FakeTensorMode(allow_non_fake_inputs=True),
            _NoValues(),
            FusedAttention(),
            autocast_to(dtype, device.type),
        ):
            type(trainer.args).device = device
            networks = [trainer.model, *frozen]
            for network in networks:
                state = network.state_dict()
                network.load_state_dict({n: torch.empty_like(t, device=device) for n, t in state.items()}, assign=True)
            parameters = {_key(p) for network in networks for p in network.parameters()}

            def keep(tensor: Tensor) -> Tensor:
                if _key(tensor) not in parameters:
                    kept[_key(tensor)] = tensor.untyped_storage()  # held, so that no key is given to another
                return tensor

            rollout = _rollout(trainer, device, trainer.args.per_device_train_batch_size)
            with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
                # Held while we count: their graphs own the saved tensors.
                results = [trainer.compute_loss(trainer.model, _batch(trainer, config, rollout))]
                if checkpointed := _checkpointed_images(trainer, config):
                    largest = unmasking_steps(trainer.mar.config.num_tokens, trainer.args.num_unmasking_steps)[-1]
                    images = _rollout(trainer, device, checkpointed)
                    results.append(student_mean(trainer.mar, images, images["tokens"], *largest))
                total = sum(storage.nbytes() for storage in kept.values())
            del results
    finally:
        forget_tensors()
    return total


class StandInReward:
    """Stands where a reward would; the trainer's scores are replaced, see `_batch`."""

    differentiable = True

    def __call__(self, images: Tensor, **_: Any) -> Tensor:
        raise AssertionError("a dry run scores nothing")


class _Rows(Dataset):
    """Rows of images, enough for any batch."""

    def __init__(self, config: MaskedConfig):
        self.shape = config.image_shape

    def __len__(self) -> int:
        return 10**9

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {"images": torch.zeros(self.shape), "class_labels": 0}


def _network(config: MaskedConfig) -> MaskedModel:
    """A model of these networks whose images are its latents."""
    model = new_model(config.on_latents())
    model.set_blank_conditions()
    return model


def _arguments_on_meta(config: Any, folder: str) -> Any:
    """The run's arguments in one process on the meta device, all tokens masked, without what needs data or a GPU."""
    args = copy.copy(config)
    args.__class__ = type("PlannedArguments", (type(config),), {"device": torch.device("meta")})
    changed = {f.name: f.default for f in fields(LimitArguments)}
    changed |= {**ALL_MASKED, "reward_weights": None}
    changed |= {"steps_per_generation": 1, "num_generations": 1}  # one micro-batch of it is what counts
    changed |= {"distribution_weight": 0.0}  # it would look at real images at once; see `_batch`
    if vars(config).get("backprop_steps") == "random":
        changed["backprop_steps"] = "last"  # as many
    for name in changed.keys() & vars(config).keys():
        setattr(args, name, changed[name])
    args.output_dir, args.bf16, args.fp16, args.tf32, args.deepspeed = folder, False, False, None, None
    return args


def _checkpointed_images(trainer: MARTrainer, config: Any) -> int:
    """The most images whose unmasking step is computed again at once, where steps are checkpointed."""
    own = config.per_device_train_batch_size
    if isinstance(trainer, RewardBackpropTrainer):
        return own
    matched = config.distribution_batch_size if _matches_distribution(config) else 0
    return max(matched, own if isinstance(trainer, MARGRPOTrainer) and config.gradient_checkpointing else 0)


def _matches_distribution(config: Any) -> bool:
    return vars(config).get("distribution_weight", 0) > 0


def _rollout(trainer: MARTrainer, device: torch.device, batch: int) -> dict[str, Tensor]:
    """Finished images, as a rollout leaves them."""
    config = trainer.mar.config
    tokens = torch.randn(batch, config.num_tokens, config.token_channels, device=device)
    labels = torch.zeros(batch, dtype=torch.long, device=device)
    order = random_order(batch, config.num_tokens, device)
    return {"class_labels": labels, "order": order, "noise": torch.randn_like(tokens), "tokens": tokens}


class StandInMatching:
    """Stands where the distribution anchor would."""

    def loss(self, images: Tensor, *_: Any) -> Tensor:
        return images.mean()


def _batch(trainer: MARTrainer, config: Any, rollout: dict[str, Tensor]) -> Any:
    """What the trainer's loss is computed of; the stand-ins for rewards, features and rollouts are set."""
    row, labels = trainer.train_dataset[0], rollout["class_labels"]
    if not isinstance(trainer, RewardTrainer):
        return {"images": torch.zeros(len(labels), *row["images"].shape, device=labels.device), "class_labels": labels}

    def score(images: Tensor, *_: Any, **__: Any) -> RewardScores:
        assert trainer.rewards is not None
        values = images.flatten(1).mean(dim=1)
        return RewardScores(values, dict.fromkeys(trainer.rewards.names, values))

    def generate_rollouts(rows: list[dict[str, Any]]) -> None:
        log_prob = torch.zeros(len(labels), len(trainer.pairs), device=labels.device)
        trainer.buffer = {**rollout, "log_prob": log_prob, "advantages": log_prob[:, 0], "weights": log_prob[:, 0]}

    def one_step(*args: Any) -> tuple[Tensor, None]:
        return torch.zeros_like(args[5]), None  # of the noise's shape

    # On this one trainer, which is thrown away.
    trainer.score = score  # type: ignore[method-assign]
    if _matches_distribution(config):
        trainer.args.distribution_weight = config.distribution_weight
        trainer.anchors.distribution = StandInMatching()  # type: ignore[assignment]
    if trainer.anchors.reference is not None:
        trainer.anchors.reference.one_step = one_step  # type: ignore[method-assign, assignment]
    if isinstance(trainer, MARGRPOTrainer):
        trainer.generate_rollouts = generate_rollouts  # type: ignore[method-assign]
    return [row] * len(labels)


class _NoValues(TorchDispatchMode):
    """Where the step asks a fake tensor for its value, it is True or 0."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten._local_scalar_dense.default:
            return True if args[0].dtype == torch.bool else 0  # True: checks such as isfinite().all() pass
        return func(*args, **(kwargs or {}))


def _size(network: nn.Module) -> int:
    return sum(parameter.numel() for parameter in network.parameters())


def _key(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata
