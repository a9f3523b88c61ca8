"""Text as the condition: every trainer on a MaskGen, prompts and their cache, the commands."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import open_clip
import pytest
import torch
from datasets import Dataset
from peft import LoraConfig
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tiny_images import png_bytes
from tiny_models import tiny_student
from tiny_text import PROMPTS, text_model, text_student, tiny_clip, tiny_prompts
from tiny_trainers import (
    ANCHOR,
    GRPO,
    backprop_trainer,
    darkness,
    distiller,
    grpo_trainer,
    logged,
    pretrainer,
    snapshot,
)

from marval_rl import MARGRPOConfig, MARGRPOTrainer, load_model
from marval_rl.cli.main import main
from marval_rl.data.prompts import index_prompts, load_prompts
from marval_rl.errors import CheckpointError, DataError, RecipeError
from marval_rl.models import codec_for, generate
from marval_rl.models.maskgen import prompt_cache
from marval_rl.models.maskgen.prompt_cache import cache_key, features_of, read_features, write_features
from marval_rl.models.maskgen.prompts import PromptFeatures
from marval_rl.models.maskgen.tower import load_tower
from marval_rl.models.maskgen.words import WordTower
from marval_rl.models.unmasking import linear_guidance_scale
from marval_rl.recipes.conditions import find_conditions
from marval_rl.rewarding import RewardSet
from marval_rl.trainers.lora import LORA_TARGETS, add_lora, merged_student

# ---- Trainers ----

FREE = {"learning_rate": 1e-3, "max_steps": 4}
KINDS = {
    "pretrain": (pretrainer, lambda: text_model(1), {}),
    "distill": (distiller, lambda: text_model(1), {"guidance_scale": 3.0, "guidance_schedule": "linear"}),
    "grpo": (grpo_trainer, lambda: text_student(1), {"beta": 0.1, **ANCHOR}),
    "reward_backprop": (backprop_trainer, lambda: text_student(1), {"distribution_weight": 1.0, **ANCHOR}),
}


@pytest.mark.parametrize("kind", KINDS)
def test_every_trainer_trains_a_model_of_text(tmp_path, kind):
    make, model, settings = KINDS[kind]
    trainer = make(tmp_path, model(), **FREE, **settings)
    before = snapshot(trainer.mar)
    trainer.train()
    moved = {name for name, value in trainer.mar.state_dict().items() if not torch.equal(value, before[name])}
    untouched = before.keys() - moved
    # The last block's text queries lead nowhere.
    assert untouched <= {f"decoder_blocks.1.attn.add_q_proj.{part}" for part in ("weight", "bias")}
    assert all(torch.isfinite(torch.tensor(loss)) for loss in logged(trainer, "loss"))
    assert trainer.ema.module.prompts is trainer.mar.prompts
    saved = load_model(tmp_path / "final")
    assert saved.config.model_type == "maskgen" and saved.config.is_one_step == (kind != "pretrain")
    assert "class_names" not in json.loads((tmp_path / "final" / "config.json").read_text())


def test_grpo_learns_of_the_prompt(tmp_path):
    """Bright for the first prompt, dark for the last: no image is both, so the text must be read."""
    seen = set()

    def wanted(images, prompts, class_labels, **_):
        seen.update(prompts)
        sign = torch.where(class_labels == 0, 1.0, -1.0)
        return images.mean(dim=(1, 2, 3)) * sign

    settings = {"max_steps": 30, "learning_rate": 5e-3, "num_unmasking_steps": 2, "num_generations": 8}
    trainer = grpo_trainer(tmp_path, text_student(1), wanted, per_device_train_batch_size=24, **settings)
    trainer.train()
    labels = torch.tensor([0, 2]).repeat_interleave(64)
    with torch.no_grad():
        images = trainer.codec.decode(generate(trainer.mar.eval(), labels, num_unmasking_steps=2).latents)
    bright, dark = images.mean(dim=(1, 2, 3)).view(2, 64).mean(dim=1)
    assert seen == set(PROMPTS)
    assert bright > dark + 0.1


def test_a_rollout_holds_indices_and_no_features(tmp_path):
    trainer = grpo_trainer(tmp_path, text_student(1), max_steps=1)
    trainer.train()
    assert trainer.buffer["class_labels"].dtype == torch.int64
    length, width = trainer.mar.prompts.tokens.shape[1:]
    assert not any(value.shape[-2:] == (length, width) for value in trainer.buffer.values())


@pytest.mark.parametrize("target", LORA_TARGETS)
def test_adapters_sit_on_the_joint_blocks(tmp_path, target):
    def sample(model) -> torch.Tensor:
        settings = {"num_unmasking_steps": 2, "generator": torch.Generator().manual_seed(5)}
        return generate(model, torch.tensor([0, 1]), **settings).latents

    student = text_student(1)
    before = sample(student)
    add_lora(student, LoraConfig(r=2, target_modules=LORA_TARGETS[target]), seed=0)
    adapted = {name.split(".lora_A")[0] for name, _ in student.named_parameters() if "lora_A" in name}
    blocks = {name for name in adapted if name.startswith("decoder_blocks")}
    # Of the first block image and text: 3 + 3 projections, 2 outputs, 2 feed-forwards; of the last no text output.
    assert len(blocks) == {"backbone": 12 + 9, "all": 12 + 9, "head": 0}[target]
    with torch.no_grad():
        for name, parameter in student.named_parameters():
            if "lora_B" in name:
                parameter += 0.5
    after = sample(student)
    assert not torch.allclose(before, after)
    merged = merged_student(student.eval())
    merged.share_conditions(student)
    assert torch.allclose(sample(merged), after, atol=1e-4)


def test_checkpointed_blocks_give_the_same_gradients():
    gradients = []
    for checkpointing in (False, True):
        student = text_student(1).train()
        if checkpointing:
            student.gradient_checkpointing_enable({"use_reentrant": False})
        order, noise = torch.arange(4).expand(2, -1), torch.ones(2, 4, 4)
        student.one_step(torch.zeros(2, 4, 4), torch.tensor([0, 1]), order, 4, 0, noise)[0].sum().backward()
        gradients.append({name: p.grad for name, p in student.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    assert all(torch.allclose(gradients[0][name], gradients[1][name], atol=1e-6) for name in gradients[0])


def test_more_steps_than_tokens_leaves_out_the_empty_ones():
    model = text_model(1)
    output = generate(model, torch.tensor([0]), num_unmasking_steps=9, guidance_scale=3.0, return_steps=True)
    assert [len(step.revealed[0]) for step in output.steps] == [1, 1, 1, 1]
    assert output.steps[-1].guidance_scale == linear_guidance_scale(4, 0, 3.0) == 2.5


def test_a_model_without_prompts_says_so():
    model = text_model(1)
    model.prompts = None
    with pytest.raises(ValueError, match="has no prompts"):
        generate(model, torch.tensor([0]), num_unmasking_steps=1)
    with pytest.raises(ValueError, match="are 7 wide, the model reads 16"):
        model.set_prompts(PromptFeatures(["a"], torch.zeros(2, 3, 7), torch.zeros(2, 7)))
    with pytest.raises(ValueError, match=r"outside 0\.\.2"):
        generate(text_model(1), torch.tensor([3]), num_unmasking_steps=1)


def test_a_ratio_that_the_arccos_law_does_not_read_is_refused(tmp_path):
    trainer = pretrainer(tmp_path, text_model(1), max_steps=1, mask_ratio_min=0.5)
    with pytest.raises(ValueError, match=r"mask_ratio_min 0\.5 .* mask_law truncated_normal"):
        trainer.train()
    pretrainer(tmp_path, text_model(1), max_steps=1, mask_ratio_min=0.5, mask_law="truncated_normal").train()


def test_evaluation_generates_held_out_prompts(tmp_path):
    student = text_student(1)
    student.set_prompts(tiny_prompts(("one", "two", "three", "four", "five")))
    seen: list[str] = []

    def judge(images, prompts, **_):
        seen.extend(prompts)
        return images.mean(dim=(1, 2, 3))

    trainer = MARGRPOTrainer(
        student,
        RewardSet([darkness]),
        MARGRPOConfig(str(tmp_path), **{**GRPO, "eval_strategy": "steps", "eval_num_images": 4}),
        train_dataset=Dataset.from_dict({"class_labels": [0, 1, 2] * 4}),
        eval_rewards=RewardSet([judge]),
        eval_classes=range(3, 5),
    )
    trainer.evaluate()
    assert sorted(seen) == ["five", "five", "four", "four"]
    assert json.loads((tmp_path / "samples" / "rows.json").read_text()) == ["four", "five"]


# ---- Prompts ----

FILES = ("txt", "jsonl", "parquet", "saved")


@pytest.fixture
def prompt_files(tmp_path) -> dict[str, Path]:
    rows = Dataset.from_dict({"text": list(PROMPTS), "score": [1, 2, 3]})
    files = {kind: tmp_path / f"prompts.{kind}" for kind in FILES}
    files["txt"].write_text("\n".join(PROMPTS) + "\n\n")
    rows.to_json(files["jsonl"])
    rows.to_parquet(files["parquet"])
    rows.save_to_disk(files["saved"])
    return files


@pytest.mark.parametrize("kind", FILES)
def test_prompts_are_read_with_their_columns(prompt_files, kind):
    rows = load_prompts(prompt_files[kind], "text")
    assert rows["prompt"] == list(PROMPTS)
    assert rows.column_names == (["prompt"] if kind == "txt" else ["prompt", "score"])


def test_prompts_that_cannot_be_read(tmp_path, prompt_files):
    (tmp_path / "empty.txt").write_text("\n")
    Dataset.from_dict({"prompt": ["a", None]}).to_parquet(tmp_path / "gap.parquet")
    Dataset.from_dict({"prompt": ["a"], "class_labels": [0]}).to_parquet(tmp_path / "labels.parquet")
    for name, message in (
        (tmp_path / "nowhere.txt", "cannot read the prompts"),
        (tmp_path / "nowhere.jsonl", "does not exist"),
        ("nonsense", "no prompts at nonsense"),
        (prompt_files["jsonl"], "no column 'prompt', only text, score"),
        (tmp_path / "empty.txt", "holds no prompt"),
        (tmp_path / "gap.parquet", r"row 1 of .* has no prompt but None"),
        (tmp_path / "labels.parquet", "column class_labels, which is made here"),
    ):
        with pytest.raises(DataError, match=message):
            load_prompts(name)


def test_a_prompt_has_one_index():
    assert index_prompts(["b", "a", "b"], ["a", "c"]) == (["a", "c", "b"], [2, 0, 2])


def test_conditions_of_a_run(tmp_path, prompt_files):
    config, others = text_model(1).config, tmp_path / "others.txt"
    others.write_text("four\nfive\nfour\n")
    found = find_conditions(config, "m", ["a caption"], 2, str(prompt_files["jsonl"]), "text", eval_prompts=str(others))
    assert found.names == ["a caption", *PROMPTS, "four", "five"]
    assert found.eval_classes == range(4, 6)
    assert found.rows["class_labels"] == [1, 2, 3] * 2 and found.rows["score"] == [1, 2, 3] * 2
    assert find_conditions(config, "m", ["a", "b"]).rows["class_labels"] == [0, 1]
    known = str(prompt_files["txt"])
    for kind, given, message in (
        (config, {"prompts": known, "eval_prompts": known}, "3 prompts that are trained on, such as 'a red square'"),
        (config, {}, "name the prompts to train on"),
        (tiny_student().config, {"prompts": "x.txt"}, r"prompts x\.txt is for a model of text"),
    ):
        with pytest.raises(RecipeError, match=message):
            find_conditions(kind, "m", None, **given)


# ---- Features ----


def test_features_are_shared_by_copies_and_looked_up_by_row():
    prompts = tiny_prompts()
    assert copy.deepcopy(prompts) is prompts and len(prompts) == 3
    cpu = torch.device("cpu")
    assert torch.equal(prompts.rows("tokens", torch.tensor([2, 3]), 2, cpu), prompts.tokens[[2, 3]])
    assert torch.equal(prompts.rows("pooled", None, 4, cpu), prompts.pooled[3].expand(4, -1))
    with pytest.raises(ValueError, match="holds 3 rows for 3 prompts"):
        PromptFeatures(list(PROMPTS), prompts.tokens[:3], prompts.pooled)


@pytest.mark.parametrize("with_decoder", [True, False])
def test_a_file_of_features(tmp_path, with_decoder):
    prompts = tiny_prompts()
    if not with_decoder:
        prompts.decoder = None
    file = tmp_path / "deeper" / "features.safetensors"
    write_features(prompts, file, "tower")
    found = read_features(file)
    assert found.prompts == prompts.prompts and torch.equal(found.tokens, prompts.tokens)
    assert (found.decoder is None) == (not with_decoder)
    assert [path.name for path in file.parent.iterdir()] == [file.name]
    tensors = load_file(file)
    tensors["tokens"][0, 0, 0] += 1
    with safe_open(file, "pt") as opened:
        metadata = opened.metadata()
    save_file(tensors, file, metadata)
    with pytest.raises(DataError, match="their checksum is another"):
        read_features(file)
    file.write_bytes(b"short")
    with pytest.raises(DataError, match="cannot be read"):
        read_features(file)


def test_the_key_of_a_cache_says_all_it_depends_on():
    keys = {
        cache_key(prompts, tower, dtype)
        for prompts in (["a"], ["a", "b"], ["b", "a"])
        for tower in ("quick", "exact")
        for dtype in (torch.float16, torch.float32)
    }
    assert len(keys) == 12


def test_clips_tower_by_open_clip_and_its_cache(tmp_path, monkeypatch):
    """A tiny CLIP in a folder, as open_clip reads it; the second time no tower is loaded."""
    folder = tiny_clip(tmp_path / "clip")
    name = f"local-dir:{folder}"
    tower = load_tower(name, None)
    assert tower.activation == "quick GELU" and tower.length == 77
    ids = open_clip.get_tokenizer(name)(["a fox", "a cat"])
    with torch.no_grad():
        expected = open_clip.create_model(name).eval().encode_text(ids)
    assert torch.allclose(tower.outputs(ids).pooled, expected, atol=1e-5)
    config = text_model(1, text_tower=name, text_pretrained=None).config
    cached = {"folder": tmp_path / "cache", "dtype": torch.float32}
    features = features_of(["a fox", "a cat"], config, **cached)
    assert torch.allclose(features.pooled[:2], expected, atol=1e-5)
    assert features.tokens.shape == (3, 77, 16) and features.decoder.shape == (3, 77, 16)
    monkeypatch.setattr(prompt_cache, "load_tower", None)
    again = features_of(["a fox", "a cat"], config, **cached)
    assert torch.equal(again.tokens, features.tokens) and torch.equal(again.decoder, features.decoder)
    with pytest.raises(TypeError):
        features_of(["a dog"], config, **cached)
    model = text_model(1)
    model.set_prompts(features)
    assert generate(model, torch.tensor([0, 1]), num_unmasking_steps=2).latents.isfinite().all()


@pytest.mark.parametrize(
    ("tower", "pretrained", "message"),
    [
        ("ViT-L-14-337", "openai", "unknown text tower 'ViT-L-14-337'; did you mean"),
        ("ViT-L-14-336-quickgelu", "nowhere.bin", "neither a file nor a tag"),
        ("local-dir:/nowhere", None, "there is no /nowhere/open_clip_config.json"),
    ],
)
def test_towers_that_cannot_be_loaded(tower, pretrained, message):
    with pytest.raises((ValueError, CheckpointError), match=message):
        load_tower(tower, pretrained)


def test_words_and_their_places():
    tower = WordTower(["a", "left", "of", "three", "two"], 6)
    features = tower.encode(["a two left of a three", "a three left of a two", "Two"])
    assert features.tokens.shape == (4, 6, tower.width) and tower.width == 11
    assert not torch.equal(features.tokens[0], features.tokens[1])
    assert torch.equal(features.pooled[0], features.pooled[1])
    assert features.tokens[3].abs().sum() == 0
    for prompt, message in (("a four", "does not know the word 'four'"), ("a a a a a a a", "has 7 words")):
        with pytest.raises(ValueError, match=message):
            tower.encode([prompt])


# ---- Commands ----


@pytest.fixture(scope="module")
def captioned(tmp_path_factory) -> Path:
    """Images of 8 x 8 grey pixels with captions, in parquet."""
    generator = torch.Generator().manual_seed(0)
    rows: dict[str, list] = {"image": [], "text": []}
    for index in range(48):
        dark = index % 2
        pixels = (torch.rand(8, 8, generator=generator) * 100 + (0 if dark else 150)).byte().numpy()
        rows["image"].append({"bytes": png_bytes(Image.fromarray(pixels)), "path": None})
        rows["text"].append("a dark square" if dark else "a light square")
    file = tmp_path_factory.mktemp("captioned") / "train.parquet"
    Dataset.from_dict(rows).to_parquet(file)
    return file


NETWORK = {
    **{"backbone": "maskgen", "text_tower": "words", "patch_size": 4, "hidden_size": 32, "decoder_num_layers": 2},
    **{"num_heads": 2, "head_hidden_size": 32, "head_num_layers": 1},
}
RUN = {
    **{"max_steps": 2, "per_device_train_batch_size": 8, "eval_num_images": 4, "eval_unmasking_steps": 2},
    **{"logging_steps": 1, "save_steps": 2, "eval_steps": 2},
}


CLOSE = """
def close(images, wanted, **_):
    return [-abs(float(image.mean()) - brightness) for image, brightness in zip(images, wanted)]
"""


def command(name: str, recipe: Path, output: Path, **settings) -> int:
    recipe.write_text("seed: 0\n")
    words = [f for key, value in {**settings, "output_dir": output}.items() for f in (f"--{key}", str(value))]
    return main([name, str(recipe), *words])


@pytest.fixture(scope="module")
def runs(captioned, tmp_path_factory) -> dict[str, Path]:
    """A teacher of captions and its student, by the commands."""
    folder = tmp_path_factory.mktemp("runs")
    data = {"dataset": captioned, "caption_column": "text", "flip": "false"}
    recipe = folder / "recipe.yaml"
    teacher, student = folder / "teacher", folder / "student"
    assert command("pretrain", recipe, teacher, image_size=8, **data, **NETWORK, **RUN, eval_diffusion_steps=4) == 0
    more = {"auxiliary_warmup_steps": 0, "auxiliary_updates": 2, "teacher": teacher}
    assert command("distill", recipe, student, **data, **RUN, **more) == 0
    return {"teacher": teacher, "student": student, "data": captioned}


def test_pretrain_and_distill_show_captions(runs):
    for name in ("teacher", "student"):
        card = (runs[name] / "final" / "README.md").read_text()
        assert "MaskGen" in card and "\n- maskgen\n" in card and "\n- mar\n" not in card
        assert "2 prompts (a dark square, a light square)" in card and 'model.condition_on(["a dark square"])' in card
        rows = json.loads((runs[name] / "samples" / "rows.json").read_text())
        assert rows == ["a dark square", "a light square"]
    config = load_model(runs["teacher"]).config
    assert config.vocabulary == ["a", "dark", "light", "square"]
    assert (config.num_tokens, config.token_channels) == (4, 16)


def test_the_models_card_runs(runs):
    card, names = (runs["student"] / "final" / "README.md").read_text(), {}
    exec(card.split("```python\n")[1].split("```")[0], names)
    assert names["images"].shape == (2, 1, 8, 8)


def test_grpo_and_evaluation_by_the_commands(runs, tmp_path, capsys):
    prompts, others = tmp_path / "prompts.jsonl", tmp_path / "others.txt"
    prompts.write_text('{"prompt": "a dark square", "wanted": 0.0}\n{"prompt": "a light square", "wanted": 1.0}\n')
    others.write_text("dark square\nlight square\n")
    reward = tmp_path / "reward.py"
    reward.write_text(CLOSE)
    settings = {**RUN, "num_generations": 4, "num_unmasking_steps": 2, "reward_funcs": f"{reward}:close"}
    settings |= {"model": runs["student"], "prompts": prompts, "eval_prompts": others}
    out = tmp_path / "out"
    assert command("train", tmp_path / "r.yaml", out, **settings) == 0
    assert json.loads((out / "samples" / "rows.json").read_text()) == ["dark square", "light square"]
    capsys.readouterr()
    assert main(["evaluate", str(out), "--num_images", "4", "--steps", "2", "--eval_reference", "none"]) == 0
    result = json.loads((out / "evaluation.json").read_text())
    assert result["settings"]["eval_prompts"] == str(others)
    assert main(["report", str(out)]) == 0


def test_sampling_by_prompts(runs, tmp_path, complaint):
    (tmp_path / "prompts.txt").write_text("a dark square\nlight\n")
    picture, folder = tmp_path / "picture.png", tmp_path / "folder"
    shared = ["sample", str(runs["student"]), "--per_class", "2", "--steps", "2"]
    assert main([*shared, "--prompts", str(tmp_path / "prompts.txt"), "--output", str(picture)]) == 0
    assert picture.is_file()
    assert main([*shared, "--prompt", "a light", "--prompt", "dark", "--output", str(folder)]) == 0
    assert sorted(path.name for path in folder.iterdir()) == ["a light", "dark"]
    for words, message in (
        (["--output", str(picture)], "is conditioned on text: give prompts"),
        (["--prompt", "a fox", "--output", str(picture)], "does not know the word 'fox'"),
        (["--prompt", "dark", "--output", str(tmp_path / "x.gif")], "have no place in the image"),
    ):
        assert message in complaint(2, main([*shared, *words]))


def test_prompts_for_a_model_of_classes_are_refused(tmp_path, complaint, capsys):
    tiny_student().save_pretrained(tmp_path / "mar")
    capsys.readouterr()  # a progress bar, unless a command ran before
    line = ["sample", str(tmp_path / "mar"), "--prompt", "a fox", "--output", str(tmp_path / "x.png")]
    assert "knows classes, and prompts were given" in complaint(2, main(line))


def test_a_codec_of_patches_is_exact():
    images = torch.rand(2, 1, 4, 4)
    codec = codec_for(text_model().config)
    assert torch.allclose(codec.decode(codec.encode(images)), images, atol=1e-6)
    with pytest.raises(ValueError, match="5 tokens of 4 channels need TA-TiTok"):
        codec_for(text_model(num_tokens=5).config)
