"""What users get wrong, each with its exit code and its one line on stderr."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from safetensors.torch import load_file, save_file
from tiny_recipes import RECIPES, run_recipe

from marval_rl.cli.main import main

# The recipe


def test_an_unknown_key_is_answered_with_the_nearest(tmp_path, complaint):
    recipe = yaml.safe_load((RECIPES / "teacher.yaml").read_text()) | {"lerning_rate": 1e-3}
    path = tmp_path / "teacher.yaml"
    path.write_text(yaml.safe_dump(recipe))
    code = main(["pretrain", str(path)])
    assert complaint(2, code).startswith(f"{path}: unknown key 'lerning_rate'; did you mean learning_rate")


@pytest.mark.parametrize(
    ("setting", "answer"),
    [
        ("sigma", "it is now called policy_std"),
        ("anchor_weight", "it is now called gsim_weight"),
        ("guidance_scale", "it is now called gsim_guidance_scale"),  # a setting of distillation still
        ("gsim-mask-ratio-std", "it was removed: it changed nothing where it was measured (docs/rl.md)"),
        ("labelling", "it was removed: class_groups: parity merges classes; without it each stays"),
        ("num_trained_steps", "it was removed: all unmasking steps explore and are trained"),
        ("advantage_clip", "it was removed: advantages are scaled by scale_rewards alone"),
    ],
)
def test_a_former_setting_is_refused_with_its_successor(train, tmp_path, complaint, setting, answer):
    assert complaint(2, train(f"--{setting}", "1")) == f"unknown option --{setting}; {answer}"
    path = tmp_path / "recipe.yaml"
    path.write_text((RECIPES / "grpo.yaml").read_text() + f"{setting}: 1\n")
    assert complaint(2, train(path=path)) == f"{path}: unknown key '{setting}'; {answer}"


def test_a_missing_recipe_names_those_that_are_there(complaint):
    code = main(["pretrain", str(RECIPES / "teachers.yaml")])
    line = complaint(2, code)
    assert line.startswith(f"no recipe at {RECIPES / 'teachers.yaml'}; did you mean {RECIPES / 'teacher.yaml'}")


@pytest.mark.parametrize(
    ("settings", "parts"),
    [
        ({"num_generations": 5}, ("32 images", "groups of num_generations = 5", "per_device_train_batch_size 16")),
        ({"num_generations": 1}, ("num_generations must be at least 2, not 1",)),
        ({"policy_std": 0}, ("policy_std must be positive, not 0",)),
        ({"gsim_weight": -1}, ("gsim_weight must not be negative",)),
        ({"distribution_weight": 1, "distribution_queue": -1}, ("distribution_queue must not be negative",)),
        ({"distribution_weight": 1, "distribution_real_images": 5}, ("fewer than 2 images among the 5",)),
        (
            {"distribution_weight": 1, "distribution_batch_size": 3, "distribution_queue": 0},
            ("3 images at once of 8 classes are too few", "distribution_queue to at least 13"),
        ),
        ({"reward_funcs": "[]"}, ("reward_funcs is empty", "reward_backprop on distribution_weight alone")),
        ({"prompt_template": "a digit"}, ("prompt_template", "does not contain {name}")),
        ({"scale_rewards": "groups"}, ("--scale_rewards: expected one of group, batch, none, got 'groups'",)),
        ({"max_steps": 0}, ("max_steps must be at least 1, not 0",)),
        ({"eval_strategy": "steps", "eval_steps": 0}, ("eval_steps must be positive, not 0", 'eval_strategy "no"')),
        ({"save_strategy": "steps", "save_steps": 0}, ("save_steps must be positive, not 0", 'save_strategy "no"')),
        ({"method": "ppo"}, ("unknown method 'ppo'; there are grpo, reward_backprop",)),
        ({"gsim_weight": 1, "gsim_max_timestep": 1000}, ("20..1000", "0..999", "max_timestep")),
        (
            {"teacher": None, "gsim_weight": 10},
            ("gsim_weight 10.0 needs the teacher the student came from (--teacher",),
        ),
        ({"reward_weights": [1, 2]}, ("2 reward_weights for 1 reward_funcs (classifier)",)),
        ({"reward_funcs": "clasifier"}, ("clasifier", "classifier")),
    ],
)
def test_settings_that_do_not_fit(train, complaint, settings, parts):
    line = complaint(2, train(**settings))
    assert all(part in line for part in parts), line


def test_a_distillation_without_a_teacher(tmp_path, complaint):
    path = tmp_path / "distill.yaml"
    path.write_text("max_steps: 2\n")
    assert complaint(2, main(["distill", str(path)])).startswith("teacher is not set")


# The models


def test_a_model_that_is_not_there(train, tmp_path, complaint):
    line = complaint(1, train(model=tmp_path / "nowhere"))
    assert line == f"no model at {tmp_path / 'nowhere'}: the path does not exist"


def test_a_run_that_has_not_finished(train, tmp_path, complaint):
    (tmp_path / "unfinished").mkdir()
    line = complaint(1, train(model=tmp_path / "unfinished"))
    assert line.startswith(f"{tmp_path / 'unfinished'} holds no model") and "--resume" in line


def test_a_teacher_where_a_student_is_needed(train, tiny_runs, complaint):
    line = complaint(1, train(model=tiny_runs.teacher))
    assert line == f"{tiny_runs.teacher / 'final'} is a many-step teacher, but a one-step student is needed here"


def test_a_student_where_a_teacher_is_needed(tiny_runs, tmp_path, complaint):
    code = run_recipe("distill", tmp_path / "run", teacher=tiny_runs.student)
    line = complaint(1, code)
    assert line == f"{tiny_runs.student / 'final'} is a one-step student, but a many-step teacher is needed here"


def test_a_student_as_the_teacher_of_an_anchor(train, tiny_runs, complaint):
    line = complaint(1, train(teacher=tiny_runs.student, gsim_weight=1))
    assert "is a one-step student, but a many-step teacher is needed here" in line


@pytest.mark.parametrize("command", ["distill", "train"])
def test_a_model_of_other_classes(train, tiny_runs, tmp_path, complaint, command):
    if command == "train":
        code = train(class_groups="parity")
    else:
        code = run_recipe("distill", tmp_path / "run", teacher=tiny_runs.teacher, class_groups="parity")
    line = complaint(2, code)
    assert (
        "10 classes (zero, one, two, ...)" in line and "2 (even digit, odd digit" in line and "--class_groups" in line
    )


def configured(**changes: Any) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        path = folder / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))

    return edit


def cut_off(name: str) -> Callable[[Path], object]:
    return lambda folder: (folder / name).write_bytes((folder / name).read_bytes()[:-1000])


def with_weight(value: float) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        weights = load_file(folder / "model.safetensors")
        weights["decoder_norm.weight"][3] = value
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})

    return change


UNLOADABLE = "the weights of {student} cannot be loaded"
NOT_FINITE = "the weight decoder_norm.weight of {student} holds NaN or infinity"
DAMAGE: dict[str, tuple[Callable[[Path], object], int, str]] = {  # what was done to it -> the exit code, the message
    "other sizes": (configured(head_hidden_size=48), 1, "{student}.*(sizes|mismatched)"),
    "fewer blocks": (configured(encoder_num_layers=2), 1, r"{student}.*missing keys: encoder_blocks\.1\."),
    "more blocks": (configured(head_num_layers=0), 1, r"{student}.*unexpected keys: diffloss\.net\.res_blocks\.0\."),
    "a contradiction": (
        configured(patch_size=3),
        2,
        "image_size 8 is not a multiple of latent_stride x patch_size = 1",
    ),
    "another kind": (configured(model_type="bert"), 1, '^{student} is not a MAR model: .*model_type "bert"$'),
    "cut-off settings": (cut_off("config.json"), 1, "cannot read the configuration of {student}"),
    "cut-off weights": (cut_off("model.safetensors"), 1, rf"^{UNLOADABLE} \(a damaged file"),
    "no weights": (lambda folder: (folder / "model.safetensors").unlink(), 1, rf"^{UNLOADABLE}.*model\.safetensors"),
    "a NaN": (with_weight(float("nan")), 1, f"^{NOT_FINITE}$"),
    "an infinity": (with_weight(float("inf")), 1, f"^{NOT_FINITE}$"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_student_is_named_with_what_is_wrong(train, tiny_runs, tmp_path, complaint, damage):
    student = Path(shutil.copytree(tiny_runs.student / "final", tmp_path / "student"))
    spoil, code, message = DAMAGE[damage]
    spoil(student)
    line = complaint(code, train(model=student))
    assert re.search(message.replace("{student}", re.escape(str(student))), line), line


def test_a_damaged_auxiliary_network(train, tiny_runs, tmp_path, complaint):
    student = Path(shutil.copytree(tiny_runs.student / "final", tmp_path / "student"))
    cut_off("auxiliary.safetensors")(student)
    line = complaint(1, train(model=student, gsim_weight=1))
    assert "auxiliary.safetensors" in line and "unexpected error" not in line


# Sampling and evaluation


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--classes", "10"), "--classes: the model has no class '10'; it knows 0..9 or zero, one, two"),
        (("--classes", "0,-1"), "--classes: the model has no class '-1'"),
        (("--classes", "0,cat"), "--classes: the model has no class 'cat'"),
        (("--per_class", "0"), "--per_class must be at least 1, not 0"),
        (("--steps", "0"), "num_unmasking_steps must be at least 1, not 0"),
        (("--guidance_scale", "1.5"), "guidance_scale 1.5 was given to a one-step student"),
        (("--batch_size", "0"), "batch_size"),
    ],
)
def test_samples_that_cannot_be_painted(tiny_runs, tmp_path, complaint, arguments, message):
    code = main(["sample", str(tiny_runs.student), "--output", str(tmp_path / "a.png"), *arguments])
    assert message in complaint(2, code)
    assert not (tmp_path / "a.png").exists()


def test_a_sample_of_a_model_that_is_not_there(tmp_path, complaint):
    line = complaint(1, main(["sample", str(tmp_path / "nowhere")]))
    assert line == f"no model at {tmp_path / 'nowhere'}: the path does not exist"


def test_too_few_images_to_evaluate_are_noticed_before_training(train, tmp_path, complaint):
    settings = {"eval_on_start": True, "eval_strategy": "steps", "eval_num_images": 12, "min_diversity": 0.9}
    line = complaint(2, train(**settings))  # a class needs two images
    assert line.startswith("min_diversity needs diversity, which evaluation does not measure here; it measures classi")
    assert not list((tmp_path / "run").iterdir())
    line = complaint(2, train(eval_strategy="steps", eval_num_images=0))
    assert line == "eval_num_images must be at least 1, not 0"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"model": "nowhere", "reward_funcs": "clasifier"}, "unknown reward 'clasifier'; did you mean classifier"),
        ({"model": "nowhere", "reward_weights": "1,2"}, "2 reward_weights for 1 reward_funcs (classifier)"),
        (
            {"eval_strategy": "steps", "eval_reward_funcs": "mine.py:it"},
            "reward 'mine.py:it': the file 'mine.py' does not",
        ),
        (
            {"eval_strategy": "steps", "best_metric": "rewards/judge/mean"},
            "best_metric needs rewards/judge/mean, which evaluation does not measure here; it measures classif",
        ),
        ({"prompts_per_class": 0}, "train_dataset has no rows"),
        ({"gsim_weight": 1.0, "gsim_batch_size": 9000}, "gsim_batch_size 9000 takes 4500 rows of data at once"),
        (
            {"prompts_per_class": 1, "per_device_train_batch_size": 32, "num_generations": 2},
            "train_dataset has 10 rows, but 32 are needed: 32 a batch x 1 processes x 1 batches read before one is",
        ),
    ],
)
def test_invalid_settings_are_refused_before_an_earlier_run_is_deleted(train, tmp_path, complaint, settings, message):
    (tmp_path / "run" / "checkpoint-900").mkdir(parents=True)
    assert complaint(2, train(overwrite_output_dir=True, **settings)).startswith(message)
    assert (tmp_path / "run" / "checkpoint-900").exists()


def test_a_run_whose_groups_all_had_equal_rewards_says_so_at_its_end(train, tmp_path, monkeypatch, capsys):
    (tmp_path / "mine.py").write_text("def flat(images, **columns):\n    return [0.5] * len(images)\n")
    monkeypatch.chdir(tmp_path)
    assert train(reward_funcs="mine.py:flat") == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[-2].startswith("done: ")
    assert lines[-1].startswith(
        "note: the rewards taught nothing: all images of a group had equal rewards in every logged step"
    )
    assert train(overwrite_output_dir=True) == 0
    assert "taught nothing" not in capsys.readouterr().out


# The output folder


def test_an_output_folder_that_cannot_be_made(train, tmp_path, complaint):
    (tmp_path / "file").write_text("")
    line = complaint(2, train(output_dir=tmp_path / "file" / "run"))
    assert line.startswith(f"output_dir {tmp_path / 'file' / 'run'} cannot be written: ")


@pytest.mark.parametrize(
    "command",
    [
        "sample {run}",
        "evaluate {run} --num_images 20",
        "report {run}",
        "bench --model_size base",
        "rewards score classifier --images {folder} --prompts {folder}/prompts.txt",
    ],
)
def test_an_output_in_a_folder_that_cannot_be_made(tiny_runs, tmp_path, capsys, command):
    (tmp_path / "file").write_text("")
    words = command.format(run=tiny_runs.student, folder=tmp_path).split()
    output = tmp_path / "file" / "a.csv"
    code = main([*words, "--output", str(output)])
    out, err = capsys.readouterr()
    assert (code, out) == (2, "") and f"--output {output} cannot be written: " in err


def test_a_folder_that_already_holds_a_run_is_kept(train, tmp_path, complaint):
    (tmp_path / "run" / "final").mkdir(parents=True)
    (tmp_path / "run" / "metrics.jsonl").write_text('{"step": 1, "time": 0.1}\n')
    line = complaint(2, train())
    assert line.startswith(f"{tmp_path / 'run'} already holds a run (final), but no complete checkpoint to resume from")
    assert "(--resume)" not in line and "--overwrite_output_dir" in line
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == ["final", "metrics.jsonl"]


def test_overwriting_takes_the_earlier_run_away(train, tmp_path):
    (tmp_path / "run" / "checkpoint-900").mkdir(parents=True)
    (tmp_path / "run" / "notes.txt").write_text("mine")
    assert train(overwrite_output_dir=True) == 0
    assert not (tmp_path / "run" / "checkpoint-900").exists()
    assert (tmp_path / "run" / "notes.txt").read_text() == "mine"


def test_an_earlier_run_outlives_a_new_one_that_cannot_begin(train, tmp_path, complaint):
    (tmp_path / "run" / "checkpoint-900").mkdir(parents=True)
    line = complaint(1, train(overwrite_output_dir=True, model=tmp_path / "nowhere"))
    assert line.startswith("no model at")
    assert (tmp_path / "run" / "checkpoint-900").exists()


def test_nothing_to_resume(train, tmp_path, complaint):
    line = complaint(1, train("--resume"))
    assert line == f"{tmp_path / 'run'} holds no complete checkpoint to --resume from; start without it"
