"""One progress bar for a training run, with its newest figures; silent when nobody watches."""

from __future__ import annotations

import sys
from typing import Any

from tqdm import tqdm
from transformers import TrainerCallback
from transformers.trainer_callback import TrainerControl, TrainerState

SHOWN = ("loss", "reward", "kl", "eval_frechet_distance", "eval_diversity")


class ProgressBarCallback(TrainerCallback):
    """Replaces transformers' own, which prints every log as a line of text."""

    def __init__(self):
        self.bar: tqdm | None = None
        self.figures: dict[str, str] = {}

    def on_train_begin(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if state.is_world_process_zero:
            self.bar = tqdm(
                total=state.max_steps, initial=state.global_step, disable=args.disable_tqdm or not sys.stderr.isatty()
            )

    def on_step_end(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if self.bar is not None:
            self.bar.update(state.global_step - self.bar.n)

    def on_log(self, args: Any, state: TrainerState, control: TrainerControl, logs: dict[str, Any], **_: Any) -> None:
        if self.bar is None:
            return
        new = {name.removeprefix("eval_"): f"{logs[name]:.3g}" for name in SHOWN if logs.get(name) is not None}
        self.figures |= new
        self.bar.set_postfix(self.figures, refresh=False)

    def on_train_end(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if self.bar is not None:
            self.bar.close()
            self.bar = None
