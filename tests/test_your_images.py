"""docs/your_images.md, from its first line to its report, at a size that runs in seconds."""

from __future__ import annotations

import json

from marval_rl.rewards import classifier_networks
from test_documented_commands import ROOT, blocks, calls_of
from tiny_recipes import TINY_RECIPES, is_finite, read_lines

from marval_rl.cli.main import main

PAGE = ROOT / "docs" / "your_images.md"
SMALL = ("max_steps", "per_device_train_batch_size", "logging_steps", "save_steps", "warmup_steps", "lr_scheduler_type")
TINY = {key: TINY_RECIPES["teacher"][key] for key in SMALL} | {"eval_steps": 6, "eval_num_images": 60}
TINY |= {"lr_scheduler_kwargs": '{"num_decay_steps": 3}'}
OWN = {
    "pretrain": {"hidden_size": 32, "head_hidden_size": 32, "eval_diffusion_steps": 4, "eval_unmasking_steps": 2},
    "distill": {"auxiliary_warmup_steps": 2, "auxiliary_updates": 2},
    "train": {"max_frechet_ratio": 100, "min_diversity": 0.01},
    "evaluate": {"num_images": 60, "redraws": 2},
}


def test_the_page_works_from_a_folder_of_images_to_a_report(tmp_path, monkeypatch):
    found = list(blocks(PAGE))
    calls = [call for tag, text in found if tag == "bash" for call in calls_of(text, tmp_path)]
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(classifier_networks, "MIN_STEPS", 100)
    (code,) = (text for tag, text in found if tag == "python")
    exec(compile(code.replace("range(600)", "range(150)"), str(PAGE), "exec"), {})
    assert [call[1] for call in calls] == ["pretrain", "distill", "train", "evaluate", "evaluate", "report"]
    for _, command, *words in calls:
        settings = {**(TINY if "mnist/" in words[0] else {}), **OWN.get(command, {})}
        options = [part for key, value in settings.items() for part in (f"--{key}", str(value))]
        assert main([command, *words, *options]) == 0, command

    for run in ("teacher", "student", "rl"):
        last = [line for line in read_lines(tmp_path / "runs" / "mine" / run) if "eval_diversity" in line][-1]
        for name in ("real_accuracy", "accuracy", "log_probability"):
            assert is_finite(last[f"eval_held_out_classifier/{name}"])
        assert all(is_finite(last[f"eval_{name}"]) for name in ("frechet_floor", "recall", "mode_coverage"))
        assert last["eval_held_out_classifier/real_accuracy"] > 0.6
    results = json.loads((tmp_path / "runs" / "mine" / "rl" / "evaluation.json").read_text())
    assert results["settings"]["dataset"] == "pictures" and results["std"]["diversity"] > 0
    assert (tmp_path / "runs" / "mine" / "report.html").is_file()
