"""The recipes of recipes/text at a tiny size: official files -> convert -> cache -> distill -> RL -> sample.

Weights, tokenizer, text tower, images and rewards are made here, in the real formats.
"""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from datasets import Dataset
from PIL import Image
from safetensors.torch import load_file, save_file
from test_official_maskgen import tiny_settings, tiny_tokenizer_settings, write_official
from tiny_recipes import CONFIGS, is_finite, read_lines, training_lines
from tiny_rewards import write_clip
from tiny_text import tiny_clip, tiny_maskgen, tiny_tatitok

from marval_rl.cli.main import main
from marval_rl.models.checkpoints import load_model
from marval_rl.runtime.settings import defaults_of, unmet_needs

RECIPES = Path(__file__).parents[1] / "recipes" / "text"
KINDS = {"grpo_clip.yaml": "grpo", "backprop_pickscore.yaml": "reward_backprop"}
TINY = {
    **{"use_cpu": True, "model_size": "null", "image_size": "null", "max_steps": 2, "per_device_train_batch_size": 4},
    **{"warmup_steps": 1, "auxiliary_warmup_steps": 0, "auxiliary_updates": 2, "logging_steps": 1, "save_steps": 2},
    **{"eval_steps": 2, "eval_num_images": 4, "eval_unmasking_steps": 2, "num_unmasking_steps": 2},
    **{"dataloader_num_workers": 0, "gradient_accumulation_steps": 1, "num_generations": 4, "max_kl": "null"},
}


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> Path:
    """A folder with what someone has on the disk: model, tokenizer, captioned images, prompts."""
    folder = tmp_path_factory.mktemp("text")
    settings, model = tiny_settings(), tiny_maskgen(text_length=77)
    settings["model"]["vq_model"]["text_context_length"] = 77
    write_official(folder / "official", model, settings)
    write_official(folder / "official_tokenizer", tiny_tatitok(text_length=77), tiny_tokenizer_settings())
    assert main(["convert", str(folder / "official_tokenizer"), str(folder / "tatitok")]) == 0
    words = ["convert", str(folder / "official"), str(folder / "maskgen"), "--vae", str(folder / "tatitok")]
    assert main(words) == 0
    tower = {"text_tower": f"local-dir:{tiny_clip(folder / 'clip')}", "text_pretrained": None}
    config = json.loads((folder / "maskgen" / "config.json").read_text())
    (folder / "maskgen" / "config.json").write_text(json.dumps({**config, **tower}))
    write_clip(folder / "reward_clip")
    generator = torch.Generator().manual_seed(0)
    rows: dict[str, list[Any]] = {"image": [], "text": []}
    for number in range(12):
        buffer = io.BytesIO()
        pixels = torch.randint(256, (16, 16, 3), generator=generator, dtype=torch.uint8).numpy()
        Image.fromarray(pixels).save(buffer, "PNG")
        rows["image"].append({"bytes": buffer.getvalue(), "path": None})
        rows["text"].append(("a red fox", "A red fox", "two cats")[number % 3])
    (folder / "captioned").mkdir()
    Dataset.from_dict(rows).to_parquet(folder / "captioned" / "train-0.parquet")
    (folder / "prompts.txt").write_text("a red fox\na dog\n")
    (folder / "held_out.txt").write_text("a bird\na house\n")
    return folder


def command(name: str, recipe: str, folder: Path, **settings: Any) -> list[str]:
    """The arguments of a command, without tiny settings that others switch off."""
    kinds = CONFIGS[KINDS.get(recipe, "distill")]
    names = defaults_of(kinds).keys()
    shared = {"vae": folder / "tatitok", "eval_prompts": folder / "held_out.txt"}
    settings = {key: value for key, value in {**TINY, **shared, **settings}.items() if key in names}
    written = yaml.safe_load((RECIPES / recipe).read_text()) | settings
    unmet = unmet_needs(kinds, defaults_of(kinds) | written)
    words = [name, str(RECIPES / recipe)]
    for key, value in settings.items():
        if key not in unmet:
            words += [f"--{key}", json.dumps(value) if isinstance(value, dict) else str(value)]
    return words


@pytest.fixture(scope="module")
def student(files, tmp_path_factory) -> Path:
    """Distilled by recipes/text/distill.yaml from a cache of moments."""
    run = tmp_path_factory.mktemp("runs") / "distill"
    data = {"teacher": files / "maskgen", "dataset": files / "captioned", "cache_dir": files / "moments"}
    steps = {"max_steps": 3, "save_steps": 3, "eval_steps": 3, "learning_rate": 1e-2}  # the first step's rate is 0
    assert main(command("cache", "distill.yaml", files, **data)) == 0
    assert main(command("distill", "distill.yaml", files, **data, **steps, output_dir=run)) == 0
    return run


def test_distillation_from_a_cache_of_tokens(files, student):
    manifest = json.loads((files / "moments" / "manifest.json").read_text())
    assert manifest["images"] == 12
    teacher, distilled = load_model(files / "maskgen"), load_model(student)
    assert distilled.config.is_one_step and distilled.config.vae == str(files / "tatitok")
    moved = [
        name for name, value in distilled.state_dict().items() if not torch.equal(value, teacher.state_dict()[name])
    ]
    assert len(moved) > 60
    assert json.loads((student / "samples" / "rows.json").read_text()) == ["a bird", "a house"]


@pytest.mark.parametrize("recipe", KINDS)
def test_the_rl_recipes_run_on_that_student(files, student, tmp_path, recipe):
    clip = {"clip": {"model": f"local-dir:{files / 'reward_clip'}"}}
    settings = {"model": student, "prompts": files / "prompts.txt", "output_dir": tmp_path / "run"}
    settings["prompts_per_class"] = 2
    rewards = {"reward_funcs": "clip", "reward_kwargs": clip, "eval_reward_funcs": "jpeg", "eval_reward_kwargs": "null"}
    assert main(command("train", recipe, files, **settings, **rewards)) == 0
    lines = training_lines(tmp_path / "run")
    assert len(lines) == 2 and all(is_finite(line["loss"]) and is_finite(line["kl"]) for line in lines)
    assert any("eval_rewards/jpeg/mean" in line for line in read_lines(tmp_path / "run"))
    before, after = (
        load_file(student / "final" / "model.safetensors"),
        load_file(tmp_path / "run/final/model.safetensors"),
    )
    assert any(not torch.equal(before[name], after[name]) for name in before)


def test_sampling_reads_the_decoders_text(files, student, tmp_path):
    picture = tmp_path / "picture.png"
    words = ["sample", str(student), "--prompt", "a red fox", "--prompt", "a dog", "--steps", "2", "--per_class", "1"]
    assert main([*words, "--plain", "--output", str(picture)]) == 0
    # The same latents are another picture under another decoder text.
    model = load_model(student)
    model.condition_on(["a red fox", "a dog"])
    from marval_rl.models import codec_for

    codec = codec_for(model.config)
    latents = torch.randn(1, 4, 1, 8)
    one, other = (codec.decode(latents, model.decoder_text(torch.tensor([label]))) for label in (0, 1))
    assert not torch.allclose(one, other)
    with pytest.raises(ValueError, match="decoder reads the prompt"):
        codec.decode(latents)


def test_a_tokenizer_of_other_latents_is_refused(files, tmp_path):
    from marval_rl.errors import CheckpointError
    from marval_rl.models.maskgen.codec import TATiTokCodec, load_tokenizer

    config = tiny_maskgen(num_tokens=9).config
    with pytest.raises(CheckpointError, match="num_tokens 8 instead of 9"):
        TATiTokCodec.from_pretrained(files / "tatitok", config)
    with pytest.raises(CheckpointError, match=r"is not a TA-TiTok: its config\.json says model_type 'maskgen'"):
        load_tokenizer(files / "maskgen")
    with pytest.raises(CheckpointError, match="path does not exist"):
        load_tokenizer("./nowhere")
    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / "config.json").write_text((files / "tatitok" / "config.json").read_text())
    weights = load_file(files / "tatitok" / "model.safetensors")
    weights.pop("decoder.mask_token")
    save_file(weights, broken / "model.safetensors", {"format": "pt"})
    with pytest.raises(CheckpointError, match=r"1 missing keys: decoder\.mask_token"):
        load_tokenizer(broken)


def test_a_gradient_flows_through_the_decoder_in_parts(monkeypatch):
    from marval_rl.models.maskgen import codec as module

    codec = module.TATiTokCodec(tiny_tatitok(), 0.7525)
    text = torch.randn(5, 6, 16)
    gradients = []
    for at_once in (16, 2):
        monkeypatch.setattr(module, "IMAGES_AT_ONCE", at_once)
        latents = torch.ones(5, 4, 1, 8, requires_grad=True)
        codec.decode(latents, text).sum().backward()
        gradients.append(latents.grad)
    assert gradients[0].abs().sum() > 0
    assert torch.allclose(*gradients, atol=1e-6)
