"""Memory of reward back-propagation against the number of unmasking steps K, measured; run by hand:

python tests/rollout_memory.py                       # one process a K, prints a table
python tests/rollout_memory.py --no_checkpointing    # as it would be if all steps' activations were kept
"""

from __future__ import annotations

import resource
import subprocess
import sys
from functools import partial

import torch

from marval_rl.models import MARConfig, MARModel, sampling
from marval_rl.models.unmasking import random_order

STEPS = (4, 8, 16, 64)
BATCH = 16


def measure(num_unmasking_steps: int, keep_all: bool) -> None:
    """Prints the growth of the resident memory at its peak in MB, through one rollout and its gradient."""
    torch.manual_seed(0)
    config = MARConfig(
        image_size=16,
        image_channels=1,
        latent_stride=1,
        latent_channels=1,
        patch_size=2,
        num_classes=10,
        buffer_size=8,
        encoder_hidden_size=256,
        encoder_num_layers=2,
        encoder_num_heads=4,
        decoder_hidden_size=256,
        decoder_num_layers=2,
        decoder_num_heads=4,
        head_hidden_size=256,
        head_num_layers=3,
        one_step_timestep=700,
    )
    student = MARModel(config).train()
    for parameter in student.parameters():
        parameter.grad = torch.zeros_like(parameter)  # there beforehand: they are not what is asked about
    if keep_all:
        sampling.checkpoint = lambda function, *args, use_reentrant: function(*args)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    labels = torch.arange(BATCH) % 10
    noise = torch.randn(BATCH, config.num_tokens, config.token_channels)
    inputs = {"class_labels": labels, "order": random_order(BATCH, config.num_tokens), "noise": noise}
    predict = partial(sampling.student_mean, student, inputs)
    *_, last = sampling.unmask(
        predict,
        inputs["order"],
        config.token_channels,
        num_unmasking_steps,
        gradient_steps=range(num_unmasking_steps),
    )
    last.tokens.square().mean().backward()
    print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024)


def main() -> None:
    keep_all = "--no_checkpointing" in sys.argv
    chosen = [int(word) for word in sys.argv[1:] if word.isdecimal()]
    if chosen:
        measure(chosen[0], keep_all)
        return
    for steps in STEPS:
        command = [sys.executable, __file__, str(steps), *sys.argv[1:]]
        peak = float(subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()[-1])
        print(f"K = {steps:2d}: {peak:7.0f} MB at the peak")


if __name__ == "__main__":
    main()
