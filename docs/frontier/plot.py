"""Draws frontier.svg from results.json: how far the judge rose in each run, and what it cost.

python docs/frontier/plot.py
"""

from __future__ import annotations

import json
import math
from html import escape
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).parent
WIDTH, HEIGHT = 460, 380  # of a panel
LEFT, RIGHT, TOP, BOTTOM = 52, 14, 34, 46
COLOURS = {"grpo": "#1f6fb4", "reward_backprop": "#c8561b"}
NAMES = {"grpo": "GRPO", "reward_backprop": "back-propagation"}
LABELLINGS = {"parity": "parity, K = 4", "digit": "digit, K = 2"}
UNMASKING_STEPS = {"parity": 4, "digit": 2}
VARIANTS = {"distribution_kernel", "distribution_features", "distribution_queue", "backprop_steps"}
TARGET_GAIN, TARGET_FD = 6.0, 0.8
LOWEST_FD = 0.4


def main() -> None:
    runs = json.loads((FOLDER / "results.json").read_text())["runs"]
    runs = [run for run in runs if is_shown(run)]
    top = max(run["fd_ratio"] for run in runs) * 1.08
    panels = [panel(name, [run for run in runs if run["labelling"] == name], top) for name in LABELLINGS]
    body = "".join(f'<g transform="translate({index * WIDTH} 0)">{text}</g>' for index, text in enumerate(panels))
    (FOLDER / "frontier.svg").write_text(
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {2 * WIDTH} {HEIGHT + 28}" '
        f'font-family="Helvetica, Arial, sans-serif" font-size="11" fill="#333">'
        f'<rect width="100%" height="100%" fill="white"/>{body}{legend()}</svg>\n'
    )


def is_shown(run: dict[str, Any]) -> bool:
    """Runs with a reward, at the K of the start, and without the variants that docs/rl.md tries one by one. On `parity`
    those of one student; on `digit` those of the earlier one beside them."""
    if run["hold"] == "distribution alone" or run["unmasking_steps"] != UNMASKING_STEPS[run["labelling"]]:
        return False
    return VARIANTS.isdisjoint(run["settings"]) and (run["labelling"] == "digit" or run["student"] == "full")


def panel(labelling: str, runs: list[dict[str, Any]], top: float) -> str:
    """One labelling: the judge's gain to the right, the Frechet distance upwards (on a log scale)."""
    low, least, most = LOWEST_FD, -0.5, max(run["gain"] for run in runs) + 0.6

    def x(gain: float) -> float:
        return LEFT + (gain - least) / (most - least) * (WIDTH - LEFT - RIGHT)

    def y(ratio: float) -> float:
        share = math.log(ratio / low) / math.log(top / low)
        return HEIGHT - BOTTOM - share * (HEIGHT - TOP - BOTTOM)

    parts = [f'<text x="{LEFT}" y="18" font-size="13" font-weight="bold">{LABELLINGS[labelling]}</text>']
    corner = f"{x(TARGET_GAIN):.1f}", f"{y(TARGET_FD):.1f}"
    parts.append(
        f'<rect x="{corner[0]}" y="{corner[1]}" width="{WIDTH - RIGHT - x(TARGET_GAIN):.1f}" '
        f'height="{HEIGHT - BOTTOM - y(TARGET_FD):.1f}" fill="#e7f3e4"/>'
    )
    for ratio in [tick for tick in (0.5, 0.6, 0.8, 1.0, 1.2, 1.5, 2.0, 3.0) if tick <= top]:
        parts.append(f'<path d="M{LEFT} {y(ratio):.1f}H{WIDTH - RIGHT}" stroke="#e3e3e3"/>')
        parts.append(f'<text x="{LEFT - 6}" y="{y(ratio) + 4:.1f}" text-anchor="end">{ratio:g}</text>')
    for gain in range(0, int(most) + 1, 2):
        parts.append(f'<text x="{x(gain):.1f}" y="{HEIGHT - BOTTOM + 16}" text-anchor="middle">{gain}</text>')
    middle = (LEFT + WIDTH - RIGHT) / 2
    parts.append(
        f'<text x="{middle}" y="{HEIGHT - 8}" text-anchor="middle">gain of the held-out judge, in deviations of a '
        "redraw</text>"
    )
    parts.append(f'<text transform="translate(14 {HEIGHT / 2}) rotate(-90)" text-anchor="middle">FD / start</text>')
    parts.append(f'<path d="M{LEFT} {HEIGHT - BOTTOM}H{WIDTH - RIGHT}" stroke="#888"/>')
    parts.append(f'<circle cx="{x(0):.1f}" cy="{y(1):.1f}" r="4" fill="#333"/>')
    parts.append(f'<text x="{x(0):.1f}" y="{y(1) - 8:.1f}" text-anchor="middle">start</text>')
    parts += [mark(run, x(run["gain"]), y(run["fd_ratio"])) for run in runs]
    return "".join(parts)


def mark(run: dict[str, Any], x: float, y: float) -> str:
    """A run: hollow without an anchor, a triangle with the KL divergence, a square with the distribution anchor (large
    after 240 updates or more), a filled circle with the GSIM anchor and its weight."""
    colour = COLOURS[run["method"]]
    title = f"<title>{escape(run['name'])}: gain {run['gain']:.1f}, FD {run['fd_ratio']:.2f}</title>"
    if run["hold"] == "kl":
        return (
            f'<path d="M{x:.1f} {y - 5:.1f}l5 9h-10z" fill="white" stroke="{colour}" stroke-width="1.6">{title}</path>'
        )
    if run["hold"].startswith("distribution"):
        side = 12 if run["settings"].get("max_steps") in ("240", "960") else 7
        square = f'<rect x="{x - side / 2:.1f}" y="{y - side / 2:.1f}" width="{side}" height="{side}" fill="{colour}">'
        return f"{square}{title}</rect>"
    fill = colour if run["hold"] == "anchor" else "white"
    point = (
        f'<circle cx="{x:.1f}" cy="{y:.1f}" r="4.5" fill="{fill}" stroke="{colour}" stroke-width="1.6">{title}</circle>'
    )
    other = {"guidance_scale", "reward_funcs"} & run["settings"].keys() or float(run["settings"].get("beta", 0)) > 0
    if run["hold"] != "anchor" or run["seed"] != 0 or other:
        return point
    return point + f'<text x="{x + 7:.1f}" y="{y - 4:.1f}" fill="{colour}">{run["strength"]:g}</text>'


def legend() -> str:
    parts, x, y = [], 20, HEIGHT + 14
    for method, colour in COLOURS.items():
        parts.append(f'<rect x="{x}" y="{y - 8}" width="10" height="10" fill="{colour}"/>')
        parts.append(f'<text x="{x + 15}" y="{y + 1}">{NAMES[method]}</text>')
        x += 120
    texts = (
        "hollow: nothing holds it",
        "triangle: KL",
        "circle: GSIM and its weight",
        "square: distribution (large: 240 updates or more)",
        "green: the target",
    )
    parts.append(f'<text x="{x}" y="{y + 1}">{" · ".join(texts)}</text>')
    return "".join(parts)


if __name__ == "__main__":
    main()
