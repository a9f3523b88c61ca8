"""Trains a small CLIP on captioned digits, to be a reward: about a minute on one thread of a CPU.

    python examples/digits_clip.py
    marval-rl train recipes/digits/grpo_clip.yaml

The data are scikit-learn's 8x8 digits with captions such as "a photo of the digit seven" and "a photo of an odd digit",
and the loss is SigLIP's (arXiv 2303.15343): each pair of image and caption is a yes-or-no question of its own, since
several captions are true of one image. A part of the images is spoilt, made of the patches of two digits, and no
caption is true of those: the score then asks for a well-made digit and not only for traces of the right one.

What is written is a folder of open_clip (open_clip_config.json, open_clip_model.safetensors) like any other CLIP's:

    reward_funcs: [clip]
    reward_kwargs: {clip: {model: "local-dir:runs/digits/clip", prompt_template: "a photo of an {name}"}}
"""

from __future__ import annotations

import argparse
import json
import math
import time
from pathlib import Path
from typing import Any

import open_clip
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn

from marval_rl.data import load_image_dataset
from marval_rl.rewarding import load_reward

TEMPLATES = {  # by class_groups; the first of each is what zero-shot accuracy is measured with
    None: ["a photo of the digit {name}", "a handwritten {name}", "the number {name}", "a picture of a {name}"],
    "parity": ["a photo of an {name}", "a handwritten {name}", "a picture of some {name}", "this is an {name}"],
}
MODEL: dict[str, Any] = {
    "embed_dim": 32,
    "vision_cfg": {"image_size": 8, "patch_size": 4, "width": 96, "head_width": 24, "layers": 3},
    "text_cfg": {"context_length": 12, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 2},
    "init_logit_scale": math.log(10),
    "init_logit_bias": -2.0,  # about a fifth of the answers is yes
}
PREPROCESSING = {"size": 8, "mean": [0.3] * 3, "std": [0.4] * 3, "interpolation": "bilinear"}
CONFIG_FILE, WEIGHTS_FILE = "open_clip_config.json", "open_clip_model.safetensors"

BATCH_SIZE = 128
LEARNING_RATE = 2e-3
WARMUP_STEPS = 50
SPOILT_SHARE = 0.25  # of a batch
ROTATION, SCALING, SHIFT, NOISE = 0.2, 0.1, 0.15, 0.15  # radians, share, share of half the side, grey levels


def captions() -> tuple[list[str], Tensor]:
    """All captions (N), and which are true of which digit: float32 [10, N]."""
    texts, truths = [], []
    for groups, templates in TEMPLATES.items():
        data = load_image_dataset("digits", "train", groups)
        class_of_digit = dict(zip(data.modes.tolist(), data.class_labels.tolist(), strict=True))
        for label, name in enumerate(data.class_names):
            truth = torch.tensor([float(class_of_digit[digit] == label) for digit in range(10)])
            texts += [template.format(name=name) for template in templates]
            truths += [truth] * len(templates)
    return texts, torch.stack(truths, dim=1)


def train(steps: int, seed: int) -> nn.Module:
    """A CLIP trained on the digits' train split."""
    torch.manual_seed(seed)
    model = open_clip.CLIP(**MODEL)
    data = load_image_dataset("digits", "train")
    images, digits = data.images, data.class_labels  # [N, 1, 8, 8] and [N]
    texts, truths = captions()
    tokens = open_clip.SimpleTokenizer(context_length=MODEL["text_cfg"]["context_length"])(texts)
    matrices = [parameter for parameter in model.parameters() if parameter.ndim > 1]
    others = [parameter for parameter in model.parameters() if parameter.ndim <= 1]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=LEARNING_RATE, betas=(0.9, 0.98), fused=True)
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = LEARNING_RATE * _schedule(step, steps)
        chosen = torch.randint(len(images), (BATCH_SIZE,))
        pixels, truth = spoil(augment(images[chosen]), truths[digits[chosen]])
        loss = siglip_loss(model, pixels, tokens, truth)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % max(1, steps // 10) == 0:
            print(f"step {step}: loss {float(loss.detach()):.4f}", flush=True)
    return model.eval()


def siglip_loss(model: nn.Module, images: Tensor, tokens: Tensor, truth: Tensor) -> Tensor:
    """SigLIP's loss (arXiv 2303.15343, eq. 1) of grey images [B, 1, 8, 8] in 0..1 and captions [N, T], summed over the
    captions and averaged over the images. truth [B, N]: 1 where the caption is true of the image."""
    pixels = (images.expand(-1, 3, -1, -1) - PREPROCESSING["mean"][0]) / PREPROCESSING["std"][0]
    image_embeddings = model.encode_image(pixels, normalize=True)  # [B, D]
    text_embeddings = model.encode_text(tokens, normalize=True)  # [N, D]
    logits = model.logit_scale.exp() * image_embeddings @ text_embeddings.T + model.logit_bias
    return F.binary_cross_entropy_with_logits(logits, truth, reduction="sum") / len(images)


def save(model: nn.Module, folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    config = {"model_cfg": MODEL, "preprocess_cfg": PREPROCESSING}
    (folder / CONFIG_FILE).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    save_file({name: tensor.contiguous() for name, tensor in model.state_dict().items()}, folder / WEIGHTS_FILE)


def zero_shot_accuracy(folder: Path, class_groups: str | None) -> float:
    """The share of the 500 test digits to whose own class the reward gives the highest score."""
    data = load_image_dataset("digits", "test", class_groups)
    images = data.images
    reward = load_reward("clip", model=f"local-dir:{folder}", prompt_template=TEMPLATES[class_groups][0])
    with torch.no_grad():
        scores = [
            reward(images=images.repeat(1, 3, 1, 1), prompts=[name] * len(images), class_names=[name] * len(images))
            for name in data.class_names
        ]
    best = torch.stack(scores).argmax(dim=0)
    return float((best == data.class_labels).float().mean())


def _schedule(step: int, steps: int) -> float:
    """A linear warm-up, then a half cosine down to 0."""
    return min(1.0, (step + 1) / WARMUP_STEPS) * 0.5 * (1 + math.cos(math.pi * step / steps))


def augment(images: Tensor) -> Tensor:
    """Turn, scale, shift and noise of [B, 1, 8, 8], other ones for each image."""
    angle, scale, x, y, noise = torch.rand(5, len(images)).mul(2).sub(1)
    cos, sin = (ROTATION * angle).cos() * (1 + SCALING * scale), (ROTATION * angle).sin() * (1 + SCALING * scale)
    rows = torch.stack([cos, -sin, SHIFT * x, sin, cos, SHIFT * y], dim=1).view(-1, 2, 3)
    moved = F.grid_sample(images, F.affine_grid(rows, list(images.shape), align_corners=False), align_corners=False)
    return (moved + NOISE * noise.abs().view(-1, 1, 1, 1) * torch.randn_like(moved)).clamp(0, 1)


def spoil(images: Tensor, truth: Tensor) -> tuple[Tensor, Tensor]:
    """The first images get half of their 2x2 patches from the last ones; nothing is true of them any more."""
    count = int(SPOILT_SHARE * len(images))
    patches = torch.rand(count, 1, 4, 4) < 0.5
    mask = patches.repeat_interleave(2, dim=2).repeat_interleave(2, dim=3)
    spoilt = torch.where(mask, images[-count:], images[:count])
    return torch.cat([spoilt, images[count:]]), torch.cat([torch.zeros_like(truth[:count]), truth[count:]])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("runs/digits/clip"), help="folder of the model")
    parser.add_argument("--steps", type=int, default=800)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    start = time.monotonic()
    save(train(args.steps, args.seed), args.output)
    print(f"saved to {args.output} after {time.monotonic() - start:.0f} s")
    for groups in TEMPLATES:
        print(f"zero-shot accuracy, {groups or 'digit'}: {zero_shot_accuracy(args.output, groups):.3f}")


if __name__ == "__main__":
    main()
