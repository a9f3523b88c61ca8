"""The notes at the foot of the page: the traps in reading such curves. Each shows only where it applies."""

from __future__ import annotations

from marval_rl.reporting.findings import FD_LIMIT, KEPT_LIMIT
from marval_rl.reporting.run_folder import Run

_LOSS_ZERO = (
    "Why is the GRPO loss about 0?",
    "At the first update on a rollout the ratio of new to old policy is exactly 1, and the advantages of a group sum "
    "to 0, so the loss starts at 0 (plus the weighted KL). Its gradient is not 0. The loss of a policy gradient does "
    "not measure progress: read the reward and the judges.",
)
_FLOOR = (
    "What is the floor of the Fréchet distance?",
    "The distance of real training images to real test images. No generator can be expected to come below it. The "
    "distance depends on the number of images and on the feature network, and moves a little with every redraw: "
    "compare values from the same settings only, and trust differences that exceed the spread of several seeds.",
)
_JUDGES = (
    "What are the judges?",
    "Rewards that score the evaluation images. One marked “trained on” is the training reward itself: it rises by "
    "construction. A held-out judge has other weights and was never trained on. When only the first rises, the run "
    "exploits its reward.",
)
_DIVERSITY = (
    "Diversity and mode coverage",
    "Diversity is the mean pixel distance between images of one class, relative to real images. Mode coverage is the "
    "entropy of the kinds of image seen within a class, relative to real images; it is what RL tends to lose first. It "
    "is not defined where every class has a single kind.",
)
_DRIFT = (
    "When does this page warn of drift?",
    f"When RL ends with a Fréchet distance above {FD_LIMIT} times what its first evaluation found, or with a diversity "
    f"or mode coverage below {KEPT_LIMIT} times that.",
)
_CURVES = (
    "How the curves are drawn",
    "A strong line is a running mean over about a fifteenth of the steps where values are noisy, and otherwise the "
    "logged values; the faint line behind it is what was logged. Values under the pointer are the logged ones. Axes "
    "need not start at zero. In the table, training measures are means over the first and the last tenth of the steps.",
)


def reading_notes(runs: list[Run], keys: set[str]) -> str:
    """HTML description list of the notes that apply to these runs and metric keys."""
    notes = [_CURVES] if keys else []
    notes += [_LOSS_ZERO] if any(run.kind == "grpo" for run in runs) else []
    notes += [_FLOOR] if "eval_frechet_distance" in keys else []
    notes += [_JUDGES] if any(key.endswith(("/accuracy", "/log_probability", "/confidence")) for key in keys) else []
    notes += [_DIVERSITY] if keys & {"eval_diversity", "eval_mode_coverage"} else []
    notes += [_DRIFT] if any(run.reward_names for run in runs) else []
    entries = "".join(f"<div><dt>{title}</dt><dd>{text}</dd></div>" for title, text in notes)
    return f'<dl class="notes">{entries}</dl>' if notes else ""
