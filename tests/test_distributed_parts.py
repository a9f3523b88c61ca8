"""The parts that training in several processes is made of, in one process."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from tiny_models import tiny_model
from tiny_trainers import pretrainer
from torch import nn
from transformers import TrainingArguments
from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled

from marval_rl.runtime.distributed import gathered_in_chunks, gathered_weights, mean_over_processes
from marval_rl.trainers.arguments import MARTrainingArguments
from marval_rl.trainers.optimization import AUXILIARY, MODEL, NETWORKS, make_optimizer, pause


@pytest.fixture
def networks() -> dict[str, nn.Parameter]:
    return {network: nn.Parameter(torch.ones(3)) for network in NETWORKS}


@pytest.fixture
def optimizer(networks: dict[str, nn.Parameter], tmp_path: Path) -> torch.optim.Optimizer:
    groups = [{"params": [parameter], "network": network} for network, parameter in networks.items()]
    return make_optimizer(groups, TrainingArguments(str(tmp_path), weight_decay=0.1))


def step_with(optimizer: torch.optim.Optimizer, networks: dict[str, nn.Parameter], gradient: float) -> None:
    for parameter in networks.values():
        parameter.grad = torch.full_like(parameter, gradient)
    optimizer.step()


@pytest.mark.parametrize("paused", [(), (MODEL,), (AUXILIARY,), NETWORKS])
def test_a_paused_network_keeps_its_weights_and_its_momentum(networks, optimizer, paused):
    step_with(optimizer, networks, 1.0)  # from here on momentum alone would move the weights
    weights = {network: parameter.detach().clone() for network, parameter in networks.items()}
    moments = {network: optimizer.state[parameter]["exp_avg"].clone() for network, parameter in networks.items()}
    pause(optimizer, paused)
    step_with(optimizer, networks, 0.0)
    for network, parameter in networks.items():
        was_paused = network in paused
        assert torch.equal(parameter, weights[network]) == was_paused
        assert torch.equal(optimizer.state[parameter]["exp_avg"], moments[network]) == was_paused
        assert optimizer.state[parameter]["step"] == (1 if was_paused else 2)


def test_the_gradients_of_a_paused_network_are_there_again_after_a_step(networks, optimizer):
    pause(optimizer, NETWORKS)
    step_with(optimizer, networks, 2.0)
    for parameter in networks.values():
        assert torch.equal(parameter.grad, torch.full_like(parameter, 2.0))


def test_a_pause_is_over_when_it_is_not_asked_for_again(networks, optimizer):
    pause(optimizer, NETWORKS)
    pause(optimizer, (AUXILIARY,))
    step_with(optimizer, networks, 1.0)
    assert not torch.equal(networks[MODEL], torch.ones(3))
    assert torch.equal(networks[AUXILIARY], torch.ones(3))


def test_means_leave_out_nan():
    nan = torch.tensor(float("nan"))
    assert mean_over_processes({"some": [nan, torch.tensor(2.0), torch.tensor(3.0)], "none": [nan]}) == {"some": 2.5}


def test_without_zero_3_all_weights_are_complete_already():
    model = tiny_model()
    assert [list(map(id, chunk)) for chunk in gathered_in_chunks(model.parameters())] == [
        list(map(id, model.parameters()))
    ]
    with gathered_weights(model):
        pass


def test_parameters_that_are_partitioned_already_are_refused(tmp_path):
    model = tiny_model()
    model.mask_token.ds_id = 0  # as deepspeed.zero.Init numbers what it takes apart
    with pytest.raises(ValueError, match=r"already partitioned by ZeRO-3: make it outside deepspeed\.zero\.Init"):
        pretrainer(tmp_path, model)


def test_under_zero_3_other_models_are_not_loaded_in_parts(tmp_path):
    config = {"zero_optimization": {"stage": 3}, "train_micro_batch_size_per_gpu": "auto"}
    file = tmp_path / "zero3.json"
    file.write_text(json.dumps(config))
    arguments = TrainingArguments(str(tmp_path), use_cpu=True, deepspeed=str(file))
    assert is_deepspeed_zero3_enabled()  # so transformers would
    del arguments
    arguments = MARTrainingArguments(str(tmp_path), deepspeed=str(file))
    assert arguments.hf_deepspeed_config.is_zero3()
    assert not is_deepspeed_zero3_enabled()
