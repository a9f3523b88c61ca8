"""The options of a command that runs in several processes: how many, on which machines, with which settings.

`marval_rl.cli.processes` starts them.
"""

from __future__ import annotations

import argparse
import os
import shlex
from collections.abc import Sequence
from dataclasses import dataclass, field

from marval_rl.cli.accelerate_config import read_accelerate_config
from marval_rl.errors import RecipeError
from marval_rl.paths import path_or_id

DEFAULT_PORT = 29500  # torchrun's; on one machine any free port


@dataclass(frozen=True)
class Launch:
    """The processes of a run, and which of them this machine starts.

    Attributes:
        num_processes: Over all machines; the same number on each.
        main_process_ip, main_process_port: Where the processes meet, on machine 0. Port 0 is any free one.
        max_restarts: How often the processes are started again after a failure.
        settings: What an accelerate configuration adds to the recipe.
        environment: Variables that it sets for the processes.
    """

    num_processes: int
    num_machines: int = 1
    machine_rank: int = 0
    main_process_ip: str = "127.0.0.1"
    main_process_port: int = 0
    max_restarts: int = 0
    settings: dict[str, str] = field(default_factory=dict)
    environment: dict[str, str] = field(default_factory=dict)

    @property
    def local_processes(self) -> int:
        return self.num_processes // self.num_machines

    @property
    def first_rank(self) -> int:
        return self.machine_rank * self.local_processes

    def with_settings(self, arguments: Sequence[str]) -> list[str]:
        """The arguments of a command, with those settings that they do not name themselves."""
        named = {argument.split("=")[0].replace("-", "_") for argument in arguments}
        added = [(f"--{key}", value) for key, value in self.settings.items() if f"__{key}" not in named]
        return [*arguments, *(word for pair in added for word in pair)]

    def describe(self, arguments: Sequence[str]) -> str:
        """The processes that would be launched, for a dry run."""
        last = self.first_rank + self.local_processes - 1
        return (
            f"would launch {self.local_processes} processes here, ranks {self.first_rank} to {last} of "
            f"{self.num_processes}, machine {self.machine_rank} of {self.num_machines}, the first process at "
            f"{self.main_process_ip}:{self.main_process_port or 'a free port'}\n"
            f"each runs: marval-rl {shlex.join(arguments)}"
        )


def add_launch_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options; all default to None: run in this process alone."""
    group = parser.add_argument_group("several processes")
    group.add_argument("--num_processes", type=int, metavar="N", help="processes in all, over all machines")
    group.add_argument("--num_machines", type=int, metavar="M", help="machines; run the command on each (default 1)")
    group.add_argument("--machine_rank", type=int, metavar="I", help="which machine this is, from 0")
    group.add_argument("--main_process_ip", metavar="HOST", help="address of machine 0")
    group.add_argument("--main_process_port", type=int, metavar="PORT", help=f"its port (default {DEFAULT_PORT})")
    group.add_argument(
        "--max_restarts", type=int, metavar="R", help="restart failed processes R times, from the newest checkpoint"
    )
    group.add_argument(
        "--accelerate_config",
        type=path_or_id,
        metavar="NAME|FILE",
        help="zero1, zero2, zero3, zero2_offload, zero3_offload, or a YAML file of `accelerate config`",
    )


def plan_launch(options: argparse.Namespace) -> Launch | None:
    """The processes that the options ask for; None if no option is given.

    Raises:
        RecipeError: For numbers that do not fit, a missing address, or a process that a launcher has already started.
    """
    if all(value is None for value in vars(options).values()):
        return None
    if "WORLD_SIZE" in os.environ:
        raise RecipeError(
            f"this process was started by a launcher (WORLD_SIZE={os.environ['WORLD_SIZE']} is set): leave out "
            "--num_processes and the other options of the launch, or unset WORLD_SIZE"
        )
    config = read_accelerate_config(options.accelerate_config)
    given = config.launch | {name: value for name, value in vars(options).items() if value is not None}
    num_machines = given.get("num_machines", 1)
    num_processes = given["num_processes"] if "num_processes" in given else num_machines * _devices_here()
    machine_rank = given.get("machine_rank", 0)
    port = given.get("main_process_port", DEFAULT_PORT if num_machines > 1 else 0)
    max_restarts = given.get("max_restarts", 0)
    if num_machines < 1 or num_processes < 1:
        raise RecipeError(f"num_processes {num_processes} and num_machines {num_machines} must be at least 1")
    if num_processes % num_machines:
        raise RecipeError(
            f"num_processes {num_processes} is the number over all machines, and does not divide by num_machines "
            f"{num_machines}"
        )
    if not 0 <= machine_rank < num_machines:
        raise RecipeError(f"machine_rank {machine_rank} is outside 0..{num_machines - 1} (num_machines {num_machines})")
    if num_machines > 1 and "machine_rank" not in given:
        raise RecipeError(f"machine_rank is not set: say which of the {num_machines} machines this is, from 0")
    if num_machines > 1 and "main_process_ip" not in given:
        raise RecipeError("main_process_ip is not set: give the address of machine 0, the same on every machine")
    if not 0 <= port < 2**16:
        raise RecipeError(f"main_process_port {port} is outside 1..65535")
    if max_restarts < 0:
        raise RecipeError(f"max_restarts must not be negative, but is {max_restarts}")
    address = given.get("main_process_ip", "127.0.0.1")
    return Launch(
        num_processes, num_machines, machine_rank, address, port, max_restarts, config.settings, config.environment
    )


def _devices_here() -> int:
    import torch

    return max(1, torch.cuda.device_count())
