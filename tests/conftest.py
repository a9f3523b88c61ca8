"""What all tests share: one thread, one cache for the classifiers, and a tiny teacher with its tiny student."""

from __future__ import annotations

import gc
import os
import signal
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

# Files that take longest, first: where two processes share the files, neither is left with one of them in the end.
LONGEST = ("test_settings", "test_launch", "test_planning", "test_distributed", "test_layouts", "test_kill")
LONGEST += ("test_slurm", "test_evaluate_processes", "test_real_recipes", "test_inception", "test_docs_site")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    places = {name: place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: places.get(item.path.stem, len(LONGEST)))  # stable: the others stay in their order


@pytest.fixture(scope="session", autouse=True)
def classifier_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The folder where the classifiers are kept: trained at most once a session, and never in the user's cache."""
    with pytest.MonkeyPatch.context() as patch:
        if "MARVAL_RL_CACHE" not in os.environ:
            patch.setenv("MARVAL_RL_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield Path(os.environ["MARVAL_RL_CACHE"])


@pytest.fixture(scope="session", autouse=True)
def ctrl_c() -> None:
    """A shell starts what runs in its background with SIGINT ignored; tests that send it must not wait for ever."""
    if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> None:
    """Threads only cost time at these sizes, and sums come out alike in the processes that tests start."""
    import torch

    torch.set_num_threads(1)


@pytest.fixture(scope="session", autouse=True)
def imported_for_good() -> None:
    """What the libraries leave in memory is not searched for garbage again: each training begins with a collection,
    which took a third of a second."""
    import marval_rl.cli.training  # noqa: F401

    gc.collect()
    gc.freeze()


@dataclass(frozen=True)
class TinyRuns:
    """Run folders that nothing may change."""

    teacher: Path
    student: Path

    def models_of(self, recipe: str) -> dict[str, Path]:
        """The settings that tell a recipe which models to begin with."""
        settings = {"teacher": self.teacher, "model": self.student}
        return {name: settings[name] for name in MODELS_OF[recipe]}


MODELS_OF = {
    "teacher": [],
    "distill": ["teacher"],
    "grpo": ["teacher", "model"],
    "reward_backprop": ["teacher", "model"],
}


@pytest.fixture(scope="session")
def tiny_runs(tmp_path_factory: pytest.TempPathFactory, classifier_cache: Path) -> TinyRuns:
    """A teacher of the digits and its student, made by the recipes."""
    from tiny_recipes import run_recipe

    folder = tmp_path_factory.mktemp("tiny")
    runs = TinyRuns(folder / "teacher", folder / "student")
    assert run_recipe("teacher", runs.teacher) == 0
    assert run_recipe("distill", runs.student, teacher=runs.teacher) == 0
    return runs


@pytest.fixture
def fails(capsys):
    """`fails(code, *arguments)` runs `marval-rl convert` and returns its one line on stderr."""

    from marval_rl.cli.main import main

    def run(code: int, *arguments: object) -> str:
        assert main(["convert", *map(str, arguments)]) == code
        lines = capsys.readouterr().err.splitlines()
        assert len(lines) == 1, lines
        return lines[0].removeprefix("marval-rl: error: ")

    return run


@pytest.fixture(scope="module")
def inception_weights(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A random Inception in torch-fidelity's file format; while it is there, its inputs are small."""
    from tiny_evaluation import INPUT_SIZE, random_inception
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(FeatureExtractorInceptionV3, "INPUT_IMAGE_SIZE", INPUT_SIZE)
        yield random_inception(tmp_path_factory.mktemp("inception") / "weights.pth")


@pytest.fixture
def complaint(capsys):
    """`complaint(expected_code, code)` returns the one line that the command left on stderr."""

    def check(expected: int, code: int) -> str:
        captured = capsys.readouterr()
        lines = captured.err.splitlines()
        assert code == expected, captured.err + captured.out
        assert len(lines) == 1 and lines[0].startswith("marval-rl: error: "), captured.err
        return lines[0].removeprefix("marval-rl: error: ")

    return check


@pytest.fixture
def train(tiny_runs, tmp_path):
    """Runs the GRPO recipe in its shortest form, without an anchor; settings win."""
    from tiny_recipes import run_recipe

    def run(*flags: str, recipe: str = "grpo", **settings: Any) -> int:
        shortest = {"max_steps": 2, "gsim_weight": 0, "distribution_weight": 0, "beta": 0}
        shortest |= {"eval_on_start": False, "eval_strategy": "no"}
        models = {"model": tiny_runs.student}
        if settings.get("gsim_weight"):
            models["teacher"] = tiny_runs.teacher
        if recipe != "grpo":
            del shortest["beta"]
        merged = {**shortest, "save_strategy": "no", "lr_scheduler_type": "constant", **models, **settings}
        return run_recipe(recipe, merged.pop("output_dir", tmp_path / "run"), *flags, **merged)

    return run
