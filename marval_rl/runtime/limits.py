"""Limits that end a run which is going wrong, and the best model among those within them.

Both are functions of the run's log history, which a checkpoint holds: a resumed run decides as one that never stopped.
"""

# No `from __future__ import annotations`: the command-line parser reads the field types.

import json
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import TrainerCallback
from transformers.trainer_callback import TrainerControl, TrainerState

from marval_rl.runtime.settings import setting

BEST_FOLDER = "best"
BEST_FILE = "best.json"  # {"step": int, "metric": str, "value": float}
LOWER_IS_BETTER = ("frechet_distance", "kid")  # whatever the features
SHARES = ("min_diversity", "min_mode_coverage", "min_recall")  # of the figure of the first evaluation

History = Sequence[dict[str, Any]]  # TrainerState.log_history: what was logged, in its order, each with its "step"


@dataclass
class LimitArguments:
    """What ends a run early, and what the best model is."""

    max_frechet_ratio: float | None = setting(
        None, "Stop when the Frechet distance exceeds this many times that of the first evaluation."
    )
    min_diversity: float | None = setting(None, "Stop when it falls below this share of the first evaluation's.")
    min_mode_coverage: float | None = setting(None, "Stop when it falls below this share of the first evaluation's.")
    min_recall: float | None = setting(None, "Stop when it falls below this share of the first evaluation's.")
    max_kl: float | None = setting(
        None, "Stop when a logged KL divergence from the reference model exceeds this (needs beta > 0)."
    )
    best_metric: str | None = setting(
        None,
        "Evaluation figure, such as rewards/held_out_classifier/mean, by which output_dir/best is kept: "
        "the best averaged model within the limits.",
    )

    def check_limits(self, beta: float, eval_strategy: str) -> None:
        """Raises ValueError for a limit that the first evaluation itself would break, and for one that is never looked
        at."""
        if self.max_frechet_ratio is not None and self.max_frechet_ratio < 1:
            raise ValueError(
                f"max_frechet_ratio is a ratio to the run's first evaluation, at least 1, not {self.max_frechet_ratio}"
            )
        shares = {name: getattr(self, name) for name in SHARES}
        for name, share in shares.items():
            if share is not None and not 0 < share <= 1:
                raise ValueError(f"{name} is a share of the run's first evaluation, in (0, 1], not {share}")
        if self.max_kl is not None and self.max_kl <= 0:
            raise ValueError(f"max_kl must be positive, not {self.max_kl}")
        if self.max_kl is not None and beta == 0:
            raise ValueError(f"max_kl {self.max_kl} needs a reference model: set beta > 0, however small")
        evaluated = [self.max_frechet_ratio, *shares.values(), self.best_metric]
        if eval_strategy == "no" and any(setting is not None for setting in evaluated):
            raise ValueError(
                f"max_frechet_ratio, {', '.join(SHARES)} and best_metric look at evaluations, but eval_strategy is "
                '"no": set it to steps'
            )


@dataclass(frozen=True)
class Limit:
    """A bound of one logged figure.

    metric: its name in the log. setting, value: as the recipe says. relative: the bound is value times the figure's
    first value, else value itself. upper: the figure must not exceed the bound, else not fall below it.
    """

    metric: str
    setting: str
    value: float
    relative: bool = True
    upper: bool = False

    def broken_by(self, history: History) -> str | None:
        """What to tell the user if the newest value breaks the limit; None if it does not."""
        entries = [entry for entry in history if entry.get(self.metric) is not None]
        if not entries:
            return None
        start, newest = entries[0], entries[-1]
        bound = self.value * start[self.metric] if self.relative else self.value
        excess = newest[self.metric] - bound if self.upper else bound - newest[self.metric]
        if excess <= 0:  # NaN is not
            return None
        side = "above" if self.upper else "below"
        at_start = f" x {start[self.metric]:.4g} at step {start['step']}" if self.relative else ""
        return (
            f"{self.metric} is {newest[self.metric]:.4g} at step {newest['step']}, {side} the limit {bound:.4g} "
            f"({self.setting} {self.value:g}{at_start})"
        )


def limits_of(args: LimitArguments) -> list[Limit]:
    """The limits that are set."""
    limits = []
    if args.max_frechet_ratio is not None:
        limits.append(Limit("eval_frechet_distance", "max_frechet_ratio", args.max_frechet_ratio, upper=True))
    for name in SHARES:
        if (share := getattr(args, name)) is not None:
            limits.append(Limit(f"eval_{name.removeprefix('min_')}", name, share))
    if args.max_kl is not None:
        limits.append(Limit("kl", "max_kl", args.max_kl, relative=False, upper=True))
    return limits


def broken_limit(limits: Sequence[Limit], history: History) -> str | None:
    """What to tell the user of the first limit that the newest figures break; None if they break none."""
    return next((text for limit in limits if (text := limit.broken_by(history)) is not None), None)


def is_new_best(metric: str, history: History) -> bool:
    """Whether the newest value of an evaluation's figure is better than all before it."""
    values = [entry[metric] for entry in history if entry.get(metric) is not None]
    sign = -1 if metric.removeprefix("eval_").split("/")[0] in LOWER_IS_BETTER else 1
    return all(sign * values[-1] > sign * value for value in values[:-1])


class LimitsCallback(TrainerCallback):
    """Ends training after the step in which a limit is broken, with a checkpoint, and keeps the best model.

    All processes see the same figures, so all decide alike.

    Args:
        args: The settings.
        output_dir: Of the run; the best model is kept in its folder `best`.
        save: Writes the averaged model to a folder as it is now; all processes call it.
        measured: The figures of an evaluation, without "eval_".

    Raises:
        ValueError: If evaluation does not measure a figure that a setting names; at the first evaluation, if it has no
            value there.
    """

    def __init__(self, args: LimitArguments, output_dir: Path, save: Callable[[Path], None], measured: Sequence[str]):
        self.limits = limits_of(args)
        self.best_metric = None if args.best_metric is None else f"eval_{args.best_metric}"
        self.folder = output_dir / BEST_FOLDER
        self.save = save
        self._check_measured([dict.fromkeys((f"eval_{name}" for name in measured), 0.0)])

    def on_log(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if broken_limit(self.limits, state.log_history) is not None:
            control.should_save = control.should_training_stop = True

    def on_evaluate(
        self, args: Any, state: TrainerState, control: TrainerControl, metrics: dict[str, float], **kwargs: Any
    ) -> None:
        self._check_measured([*state.log_history, metrics])
        if self.best_metric is None or metrics.get(self.best_metric) is None:
            return
        if broken_limit(self.limits, state.log_history) is None and is_new_best(self.best_metric, state.log_history):
            self._keep(state, metrics[self.best_metric])

    def on_train_end(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        broken = broken_limit(self.limits, state.log_history)
        if broken is not None and state.is_world_process_zero:
            print(f"stopped at step {state.global_step}: {broken}")

    def _check_measured(self, history: History) -> None:
        """Raises ValueError for a figure that is looked at and has no value in any of the entries."""
        wanted = {limit.metric: limit.setting for limit in self.limits if limit.metric.startswith("eval_")}
        if self.best_metric is not None:
            wanted[self.best_metric] = "best_metric"
        for metric, asked_by in wanted.items():
            if all(entry.get(metric) is None for entry in history):
                known = sorted(name.removeprefix("eval_") for name, value in history[-1].items() if value is not None)
                raise ValueError(
                    f"{asked_by} needs {metric.removeprefix('eval_')}, which evaluation does not measure here; it "
                    f"measures {', '.join(known) or 'nothing'}"
                )

    def _keep(self, state: TrainerState, value: float) -> None:
        """Replace `best` by the current model. A reader finds the old or the new one, or for a moment neither."""
        unfinished = self.folder.with_name(f"{BEST_FOLDER}.unfinished")
        if state.is_world_process_zero and unfinished.exists():
            shutil.rmtree(unfinished)  # of a run that was killed while it wrote
        self.save(unfinished)
        if state.is_world_process_zero and self.best_metric is not None:
            best = {"step": state.global_step, "metric": self.best_metric.removeprefix("eval_"), "value": value}
            (unfinished / BEST_FILE).write_text(json.dumps(best) + "\n")
            if self.folder.exists():
                shutil.rmtree(self.folder)
            unfinished.rename(self.folder)
