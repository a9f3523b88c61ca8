"""Compiled blocks: once each kind, whatever the lengths, with the images of the plain model."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from tiny_models import tiny_model, tiny_student
from tiny_trainers import grey_student, grpo_trainer, pretrainer
from torch._dynamo.utils import counters
from transformers import TrainerCallback

from marval_rl.cli.main import main
from marval_rl.models import MARModel, compiling, generate
from marval_rl.models.compiling import CapturedGenerations, compile_blocks


@pytest.fixture
def forgetting() -> Any:
    """Nothing is compiled before the test, and nothing of it stays."""
    before = torch._dynamo.config.fail_on_recompile_limit_hit, torch._dynamo.config.recompile_limit
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()
    torch._dynamo.config.fail_on_recompile_limit_hit, torch._dynamo.config.recompile_limit = before


@pytest.fixture
def compiled(forgetting) -> Any:
    """A compiled student, and the graphs that were compiled so far; the compiler here changes nothing."""
    graphs: list[Any] = []

    def compiler(graph: torch.fx.GraphModule, inputs: list[Any]) -> Any:
        graphs.append(graph)
        return graph.forward

    student = tiny_student(image_size=8)
    compile_blocks(student, compiler=compiler)
    return student, graphs


def sample(student: MARModel, steps: int, batch: int) -> torch.Tensor:
    noise = torch.Generator().manual_seed(0)
    return generate(student, torch.arange(batch) % 3, num_unmasking_steps=steps, generator=noise).latents


def test_nothing_is_compiled_again_after_the_first_generations(compiled):
    student, graphs = compiled
    for steps in (16, 5):  # a batch of one, and one token in a step, are cases of their own
        sample(student, steps, 3)
        sample(student, steps, 1)
    first = len(graphs)
    assert 0 < first <= 8  # blocks of encoder and decoder, with all rows or some
    for steps, batch in ((16, 5), (7, 3), (4, 2), (9, 1), (6, 8)):
        sample(student, steps, batch)
    assert len(graphs) == first


def test_images_are_those_of_the_plain_model(compiled):
    student, _ = compiled
    torch.testing.assert_close(sample(student, 5, 3), sample(tiny_student(image_size=8), 5, 3))


TRAINERS: dict[str, Any] = {
    "pretrain": lambda folder, **settings: pretrainer(folder, tiny_model(), **settings),
    "grpo": lambda folder, **settings: grpo_trainer(folder, grey_student(), beta=0.1, **settings),
}


@pytest.mark.parametrize("name", TRAINERS)
def test_a_compiled_run_ends_with_the_weights_of_a_plain_one(name, tmp_path, forgetting):
    settings = {"max_steps": 4, "eval_strategy": "steps", "eval_steps": 2, "eval_num_images": 6, "eval_batch_size": 3}
    plain = TRAINERS[name](tmp_path / "plain", **settings)
    plain.train()
    assert graphs_so_far() == 0
    at_step: list[int] = []

    class Count(TrainerCallback):
        def on_step_end(self, *_: Any, **__: Any) -> None:
            at_step.append(graphs_so_far())

    compiled = TRAINERS[name](tmp_path / "compiled", torch_compile=True, torch_compile_backend="eager", **settings)
    compiled.add_callback(Count())
    compiled.train()
    assert 0 < at_step[0] <= at_step[2] == at_step[3] <= 8  # the evaluation after two steps is another case
    for key, value in plain.ema.module.state_dict().items():
        torch.testing.assert_close(compiled.ema.module.state_dict()[key], value, msg=key)


def graphs_so_far() -> int:
    return counters["stats"]["unique_graphs"]


@pytest.mark.parametrize("options", [[], ["--compile"]])
def test_the_command_compiles_where_it_is_asked_to(options, tmp_path, monkeypatch, forgetting):
    monkeypatch.setattr(compiling, "compile_blocks", partial(compile_blocks, compiler="eager"))
    tiny_student().save_pretrained(tmp_path / "student")
    arguments = ["--steps", "2", "--per_class", "1", "--output", str(tmp_path / "images.png")]
    assert main(["sample", str(tmp_path / "student"), *arguments, *options]) == 0
    assert (graphs_so_far() > 0) == bool(options)


def test_what_cannot_be_compiled_is_refused(tmp_path):
    with pytest.raises(ValueError, match="torch_compile_mode is not supported by these trainers: blocks are compiled"):
        pretrainer(tmp_path, tiny_model(), torch_compile=True, torch_compile_mode="reduce-overhead")
    with pytest.raises(ValueError, match="torch_compile_backend eager counts only with torch_compile true"):
        pretrainer(tmp_path, tiny_model(), torch_compile_backend="eager")


def test_zero_3_is_refused_before_any_work_and_in_a_dry_run(tmp_path, monkeypatch, capsys):
    with pytest.raises(ValueError, match="torch_compile does not work under ZeRO-3"):
        pretrainer(tmp_path, tiny_model(), torch_compile=True, deepspeed="zero3")
    monkeypatch.chdir(tmp_path)
    planned = ["train", "digits/grpo.yaml", "--dry_run", "--torch_compile", "true"]
    assert main([*planned, "--accelerate_config", "zero3_offload"]) == 2
    assert "torch_compile does not work under ZeRO-3" in capsys.readouterr().err
    assert main([*planned, "--accelerate_config", "zero2"]) == 0
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")  # as accelerate launch says it
    monkeypatch.setenv("ACCELERATE_DEEPSPEED_ZERO_STAGE", "3")
    assert main(planned) == 2


# Generations captured as CUDA graphs. Here the capture is restated: a graph reads and writes memory of its own.


@pytest.fixture
def captures(monkeypatch) -> list[torch.Size]:
    """The batches that were captured."""
    made = []

    def make_graphed_callables(function: Any, own: tuple[torch.Tensor, ...], pool: Any) -> Any:
        made.append(own[0].shape)
        output = function(*own)

        def replay(*given: torch.Tensor) -> torch.Tensor:
            for mine, theirs in zip(own, given, strict=True):
                mine.copy_(theirs)
            return output.copy_(function(*own)).detach()

        return replay

    monkeypatch.setattr(torch.cuda, "make_graphed_callables", make_graphed_callables)
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: (0, 1))
    return made


@pytest.mark.parametrize("labels", [torch.tensor([0, 2, 1]), None])
@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_captured_generations_are_those_of_the_plain_model(captures, labels, dtype):
    plain, student = tiny_student(), tiny_student()
    student.captured = CapturedGenerations(student)
    settings = {"num_unmasking_steps": 3, "batch_size": 3, "autocast_dtype": dtype}
    found, expected = (
        [
            generate(model, labels, generator=torch.Generator().manual_seed(seed), **settings).latents
            for seed in range(4)
        ]
        for model in (student, plain)
    )
    assert captures == [torch.Size([3, 4])]  # the first batch; the others are replays
    for one, other in zip(found, expected, strict=True):
        assert torch.equal(one, other)


def test_each_batch_size_and_number_of_steps_is_captured_once(captures):
    student = tiny_student()
    student.captured = CapturedGenerations(student)
    for batch, steps in ((3, 2), (2, 2), (3, 4), (3, 2), (2, 2), (3, 4)):
        generate(student, None, batch_size=batch, num_unmasking_steps=steps)
    assert captures == [torch.Size([batch, 4]) for batch in (3, 2, 3)]
    kept = generate(student, None, batch_size=3, num_unmasking_steps=2, return_steps=True)
    assert len(kept.steps) == 2


def test_captured_generations_follow_the_weights(captures):
    student = tiny_student()
    student.captured = CapturedGenerations(student)

    def sample_of_seed() -> torch.Tensor:
        noise = torch.Generator().manual_seed(0)
        return generate(student, None, batch_size=2, num_unmasking_steps=2, generator=noise).latents

    first = [sample_of_seed() for _ in range(3)][-1]
    with torch.no_grad():
        for parameter in student.parameters():
            parameter.mul_(1.1)
    assert not torch.equal(sample_of_seed(), first)
