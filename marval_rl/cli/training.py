"""From a parsed recipe to a finished run: what `pretrain`, `distill` and `train` share."""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from accelerate import PartialState

from marval_rl.cli.arguments import quiet_libraries
from marval_rl.environment import environment
from marval_rl.errors import RecipeError, check_folder
from marval_rl.launched import RESTARTS
from marval_rl.recipes.planning.dry_run import batch_arithmetic, devices, print_dry_run
from marval_rl.recipes.planning.plan import Planner
from marval_rl.recipes.reading import build_configs, default_output_dir, read_settings, resolved_recipe, save_recipe
from marval_rl.runtime.resume import (
    AUTO,
    changed_settings,
    check_output_dir,
    find_checkpoint,
    remove_earlier_run,
    set_aside_newer,
)
from marval_rl.runtime.settings import check_written, defaults_of, unmet_needs
from marval_rl.trainers.base import MARTrainer


def read_recipe(
    args: argparse.Namespace, extra: list[str], config_types: Sequence[type]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The recipe's dataclasses, and its settings as they are written to the run folder."""
    quiet_libraries()
    settings = read_settings(args.recipe, extra, config_types)
    try:
        settings, left_out = check_written(config_types, settings, read_settings(None, extra, config_types))
    except ValueError as error:
        raise RecipeError(str(error)) from error
    if left_out and os.environ.get("RANK", "0") == "0":
        print("\n".join(left_out))
    settings.setdefault("output_dir", default_output_dir(args.recipe))
    if not args.dry_run and settings.get("deepspeed") is not None and "WORLD_SIZE" not in os.environ:
        raise RecipeError("deepspeed needs processes that are launched: add --num_processes N (1 will do)")
    configs = build_configs(settings, config_types)
    unmet = unmet_needs(config_types, {**defaults_of(config_types), **settings})
    resolved = resolved_recipe(configs, settings)
    return configs, {key: value for key, value in resolved.items() if key in settings or key not in unmet}


def run_training(
    args: argparse.Namespace,
    settings: dict[str, Any],
    configs: Sequence[Any],
    make_trainer: Callable[[], MARTrainer],
    make_plan: Planner,
) -> None:
    """Train, or only say what would be trained.

    Args:
        args: The command line, with `dry_run` and `resume`.
        settings: The resolved recipe.
        configs: The recipe's dataclasses; the last are the trainer's arguments.
        make_trainer: Builds the trainer; called once, and not for a dry run.
        make_plan: Finds out what would be trained, for a dry run.
    """
    config = configs[-1]
    if args.dry_run:
        print_dry_run(settings, config, make_plan)
        return
    output_dir = Path(config.output_dir)
    checkpoint = None
    changed = []
    if RESTARTS in os.environ and int(os.environ[RESTARTS]) > 0:
        args.resume, config.overwrite_output_dir = AUTO, False  # the run that failed is continued
    if args.resume is not None:
        if config.overwrite_output_dir:
            raise RecipeError("--resume keeps the run that overwrite_output_dir deletes: leave out one of them")
        checkpoint = find_checkpoint(output_dir, args.resume)
    if checkpoint is not None:
        defaults = defaults_of([type(part) for part in configs])
        changed = changed_settings(checkpoint, settings, defaults, config.world_size)
    else:
        check_output_dir(output_dir, overwrite=config.overwrite_output_dir or args.resume == AUTO)
    check_folder(output_dir, "output_dir")
    trainer = make_trainer()
    speaks = config.process_index == 0
    if speaks:
        print("\n".join([*changed, *devices(config), *batch_arithmetic(config)]))
        if checkpoint is None:
            remove_earlier_run(output_dir)
        else:
            set_aside_newer(output_dir, checkpoint)
        trainer.recipe = {key: value for key, value in settings.items() if key != "overwrite_output_dir"}
        save_recipe(output_dir / "recipe.yaml", trainer.recipe)
        (output_dir / "environment.json").write_text(json.dumps(environment(), indent=1), encoding="utf-8")
    trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
    finished = trainer.has_ended(trainer.state)
    if speaks and finished:
        print(f"done: {output_dir / 'final'} holds the model; `marval-rl report {output_dir}` draws its curves")
        if (note := nothing_learned(trainer.state.log_history)) is not None:
            print(note)
    elif speaks:
        print(f"stopped at step {trainer.state.global_step}: a checkpoint is kept, --resume continues from it")
    state = PartialState()
    state.wait_for_everyone()  # none leaves while another one still needs it
    state.destroy_process_group()
    if not finished:
        raise KeyboardInterrupt


def nothing_learned(history: list[dict[str, float]]) -> str | None:
    """A note if no logged step of a run can have taught the model anything; None if one did."""
    equal = [entry["frac_reward_zero_std"] for entry in history if "frac_reward_zero_std" in entry]
    norms = [entry["grad_norm"] for entry in history if "grad_norm" in entry]
    if equal and min(equal) == 1:
        return (
            "note: the rewards taught nothing: all images of a group had equal rewards in every logged step; "
            "`marval-rl rewards check SPEC` tests a reward"
        )
    return "note: nothing was learned: the gradient was 0 in every logged step" if norms and max(norms) == 0 else None
