"""Low-rank adapters (LoRA, arXiv 2106.09685) on a student: where they sit, switching them off, and saving them.

They are transformers' own (`PeftAdapterMixin`), so a student with adapters stays a `MaskedModel`.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from peft import LoraConfig
from peft.tuners.tuners_utils import BaseTunerLayer

from marval_rl.models import MaskedModel

# Regular expressions of module names, as LoraConfig's target_modules takes them. Of the head, the embeddings of token
# and timestep are left out: a token has fewer channels than an adapter has ranks, and a student knows one timestep.
_BACKBONE = (  # the blocks of MAR, and the joint ones of MaskGen
    r"(encoder|decoder)_blocks\.\d+\.(attn\.(qkv|proj)|mlp\.fc[12]"
    r"|attn\.(to_[qkv]|to_out\.0|add_[qkv]_proj|to_add_out)|ff(_context)?\.net\.(0\.proj|2))"
)
_HEAD = (
    r"diffloss\.net\.(cond_embed|res_blocks\.\d+\.(mlp\.[02]|adaLN_modulation\.1)"
    r"|final_layer\.(linear|adaLN_modulation\.1))"
)
LORA_TARGETS = {"backbone": _BACKBONE, "head": _HEAD, "all": f"{_BACKBONE}|{_HEAD}"}
ADAPTER_FOLDER = "adapter"  # inside the folder of the merged student


def add_lora(student: MaskedModel, peft_config: LoraConfig, seed: int) -> None:
    """Gives the student adapters, and freezes all else. They change nothing until they are trained.

    The seed alone makes them, so that they are alike in every process.

    Raises:
        ValueError: If `target_modules` names no layer of the student, or it has adapters already.
    """
    student.requires_grad_(False)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        student.add_adapter(copy.deepcopy(peft_config))  # peft writes into it


@contextmanager
def adapters_off(student: MaskedModel) -> Iterator[None]:
    """Within this context the student is the one that its adapters were added to."""
    student.disable_adapters()
    try:
        yield
    finally:
        student.enable_adapters()


def merged_student(student: MaskedModel) -> MaskedModel:
    """A student without adapters that generates what this one does: W + (alpha / r) B A in place of W."""
    adapted = copy.deepcopy(student)
    for name, layer in list(adapted.named_modules()):
        if isinstance(layer, BaseTunerLayer):
            layer.merge()
            adapted.set_submodule(name, layer.get_base_layer())
    with torch.device("meta"):  # neither memory nor random numbers for weights that are replaced
        merged = type(student)(student.config)
    merged.load_state_dict(adapted.state_dict(), assign=True)
    return merged.eval()


def save_merged(student: MaskedModel, folder: Path) -> None:
    """Writes the merged student to `folder`, and its adapters in peft's format to `folder`/adapter."""
    merged_student(student).save_pretrained(folder)
    student.save_pretrained(folder / ADAPTER_FOLDER)
