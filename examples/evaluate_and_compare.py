"""Two models on the same noise, with the deviation over redraws: half a minute on a CPU, after examples/python_api.py.

    python examples/evaluate_and_compare.py

The command `marval-rl evaluate` does this for one model; here are its parts. A difference counts when it is larger than
what other noise alone would make: the last column is the difference in deviations of a redraw.
"""

from __future__ import annotations

import statistics

from marval_rl import load_model
from marval_rl.evaluation.image_set import ImagePlan, generate_batch
from marval_rl.models import codec_for
from marval_rl.models.generation import SamplingSettings
from marval_rl.recipes.data_arguments import DataArguments

BEFORE, AFTER = "runs/examples/student", "runs/examples/rl"
SHOWN = ("frechet_distance", "held_out_classifier/accuracy", "held_out_classifier/log_probability", "diversity")


def main(num_images: int = 200, redraws: int = 3) -> dict[str, tuple[float, float]]:
    """Returns figure -> (before, after), each a mean over the redraws."""
    models = [load_model(path) for path in (BEFORE, AFTER)]
    config = models[0].config
    # What `dataset: digits` in a recipe means: held-out images, feature extractors and judges.
    evaluator = DataArguments(dataset="digits", class_groups="parity").evaluator(config)
    plan = ImagePlan(num_images, config.num_classes, batch_size=num_images)
    found = []
    for model in models:
        codec, sampling = codec_for(config), SamplingSettings(num_unmasking_steps=4)
        draws = [generate_batch(model, codec, plan, 0, sampling, seed) for seed in range(redraws)]
        found.append([evaluator.evaluate(pixels / 255, plan.labels(0)) for pixels in draws])
    table = {}
    for name in SHOWN:
        before, after = ([draw[name] for draw in draws] for draws in found)
        table[name] = (statistics.mean(before), statistics.mean(after))
        deviation = statistics.stdev(before) if redraws > 1 else 0.0  # also where all draws are alike
        change = f"{(table[name][1] - table[name][0]) / deviation:+6.1f} deviations" if deviation else ""
        print(f"{name:36s} {table[name][0]:9.3f} -> {table[name][1]:9.3f}   {change}")
    return table


if __name__ == "__main__":
    main()
