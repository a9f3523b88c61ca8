"""Which conditions a run knows, trains on and evaluates: the classes of its data, or prompts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from accelerate import PartialState
from datasets import Dataset

from marval_rl.data import class_rows
from marval_rl.data.prompts import index_prompts, load_prompts
from marval_rl.errors import RecipeError
from marval_rl.models import MaskedConfig, MaskedModel


@dataclass(frozen=True)
class Conditions:
    """The conditions of a run.

    Attributes:
        names: Those that a model must know, in the order of their labels: those of the data's images first, then the
            prompts that are trained on, then those that evaluation alone asks for. None for a model's own classes.
        rows: A `datasets.Dataset` of {"class_labels": int, ...} to roll out, with the further columns of the prompts.
        eval_classes: The labels that evaluation generates; None for all.
    """

    names: list[str] | None
    rows: Any
    eval_classes: range | None = None

    def give(self, *models: MaskedModel | None) -> None:
        """Tells the models of a run their prompts; the first process of each machine encodes them for the others."""
        if self.names is None:
            return
        with PartialState().local_main_process_first():
            for model in models:
                if model is not None:
                    model.condition_on(self.names)


def find_conditions(
    config: MaskedConfig,
    name: str,
    image_names: Sequence[str] | None,
    repeats: int = 1,
    prompts: str | None = None,
    prompt_column: str = "prompt",
    prompt_split: str = "train",
    eval_prompts: str | None = None,
) -> Conditions:
    """The conditions of a run with this model.

    Args:
        config: Of the model, called `name`.
        name: What it is called in messages.
        image_names: The classes, or captions, of the images that the run reads; None if it reads none.
        repeats: How often an epoch asks for each.
        prompts, prompt_column, prompt_split: The prompts to roll out, as `load_prompts` takes them; None for the
            captions.
        eval_prompts: Held-out prompts, likewise.

    Raises:
        RecipeError: For prompts where the model knows classes only, and where a model of prompts gets none.
        DataError: For prompts that cannot be read.
    """
    if not config.takes_prompts:
        for setting, value in (("prompts", prompts), ("eval_prompts", eval_prompts)):
            if value is not None:
                raise RecipeError(f"{setting} {value} is for a model of text, and {name} knows classes: leave it out")
        return Conditions(None, class_rows(config.num_classes, repeats))
    if prompts is None and not image_names:
        raise RecipeError(f"{name} is conditioned on text: name the prompts to train on (--prompts FILE)")
    table, labels, columns = list(image_names or ()), list(range(len(image_names or ()))), {}
    if prompts is not None:
        read = load_prompts(prompts, prompt_column, prompt_split)
        table, labels = index_prompts(read["prompt"], table)
        columns = {column: list(read[column]) for column in read.column_names if column != "prompt"}
    eval_classes = None
    if eval_prompts is not None:
        held_out = list(dict.fromkeys(load_prompts(eval_prompts, prompt_column)["prompt"]))
        if known := [prompt for prompt in held_out if prompt in set(table)]:
            raise RecipeError(
                f"eval_prompts {eval_prompts} holds {len(known)} prompts that are trained on, such as {known[0]!r}: "
                "held-out ones must be others"
            )
        eval_classes = range(len(table), len(table) + len(held_out))
        table += held_out
    rows = {name: values * repeats for name, values in {"class_labels": labels, **columns}.items()}
    return Conditions(table, Dataset.from_dict(rows), eval_classes)
