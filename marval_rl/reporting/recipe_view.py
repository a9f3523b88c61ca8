"""The recipe of each run: what it was about in a line, where several differ, and every value."""

from __future__ import annotations

from html import escape

from marval_rl.reporting.run_folder import KIND_NAMES, Run
from marval_rl.reporting.scales import format_number, format_seconds
from marval_rl.text import dump_yaml

# Settings worth a line at the top, where the recipe has them: key -> words, with {} for the value.
_HEADLINE = {
    "reward_funcs": "rewards {}",
    "labelling": "classes by {}",
    "learning_rate": "learning rate {}",
    "num_unmasking_steps": "{} unmasking steps",
    "num_generations": "groups of {}",
    "beta": "KL weight {}",
    "anchor_weight": "anchor weight {}",
    "guidance_scale": "guidance {}",
    "seed": "seed {}",
}
_NOT_A_DIFFERENCE = {"output_dir", "logging_dir", "run_name", "hub_model_id"}


def headline(run: Run, runs: list[Run]) -> str:
    """One line of plain text: kind, length, duration, and the main settings; of several runs those that differ."""
    parts = [KIND_NAMES.get(run.kind, run.kind)] if run.kind else []
    parts += [f"{run.last_step:,} training steps"] if run.lines else ["nothing logged yet"]
    parts += [format_seconds(run.seconds)] if run.seconds else []
    for key, words in _HEADLINE.items():
        is_common = len(runs) > 1 and all(other.recipe.get(key) == run.recipe.get(key) for other in runs)
        if _is_set(run.recipe.get(key)) and not is_common:
            parts.append(words.format(_rounded(run.recipe[key])))
    return " · ".join(parts)


def _rounded(value: object) -> str:
    return format_number(value) if isinstance(value, float) else _short(value)


def _is_set(value: object) -> bool:
    return value is not None and value != []


def recipe_section(runs: list[Run]) -> str:
    """HTML: a table of the settings in which several runs differ, then each recipe; "" where no run has one."""
    with_recipe = [(index, run) for index, run in enumerate(runs) if run.recipe]
    parts = [_differences(with_recipe)] if len(with_recipe) > 1 else []
    for index, run in with_recipe:
        settings = {escape(key): escape(_short(value)) for key, value in run.recipe.items()}
        entries = "".join(f"<div><dt>{key}</dt><dd>{value}</dd></div>" for key, value in settings.items())
        name = f'<span class="s{index}"><i></i>{escape(run.name)}</span>' if len(runs) > 1 else "All settings"
        is_open = " open" if len(runs) == 1 and len(run.recipe) <= 40 else ""
        parts.append(f'<details{is_open}><summary>{name}</summary><dl class="recipe">{entries}</dl></details>')
    return "".join(parts)


def _differences(runs: list[tuple[int, Run]]) -> str:
    keys = dict.fromkeys(key for _, run in runs for key in run.recipe if key not in _NOT_A_DIFFERENCE)
    rows = []
    for key in keys:
        values = [_short(run.recipe[key]) if key in run.recipe else "absent" for _, run in runs]
        if len(set(values)) > 1:
            cells = "".join(f"<td>{escape(value)}</td>" for value in values)
            rows.append(f'<tr><th scope="row"><code>{escape(key)}</code></th>{cells}</tr>')
    if not rows:
        return "<p>The recipes differ in nothing but where they write.</p>"
    heads = "".join(f'<th scope="col" class="s{index}"><i></i>{escape(run.name)}</th>' for index, run in runs)
    return (
        '<div class="scroll"><table class="settings"><thead><tr><th scope="col">where they differ</th>'
        f"{heads}</tr></thead><tbody>{''.join(rows)}</tbody></table></div>"
    )


def _short(value: object) -> str:
    """A setting on one line: lists and mappings as YAML writes them in flow style."""
    if isinstance(value, list) and all(isinstance(item, str) for item in value):
        return ", ".join(value)
    if isinstance(value, list | dict):
        return dump_yaml(value, default_flow_style=True, width=10_000).strip()
    return "none" if value is None else str(value).lower() if isinstance(value, bool) else str(value)
