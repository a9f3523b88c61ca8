"""Several processes of one training run: `--num_processes`, `--num_machines`, `--accelerate_config`.

What torchrun does with a static rendezvous, and no more: each process is told its rank and where the first one listens,
in the variables that torch.distributed, accelerate and DeepSpeed read. Started here rather than by torchrun so that
Ctrl-C leaves every process the time to write its checkpoint, and so that a failure ends with the failing process's own
words. `accelerate launch` and torchrun work as well.
"""

from __future__ import annotations

import argparse
import os
import shlex
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from marval_rl.cli.accelerate_config import read_accelerate_config
from marval_rl.errors import MarvalError, RecipeError
from marval_rl.launched import ERROR_FILE
from marval_rl.paths import path_or_id

PROGRAM = (sys.executable, "-m", "marval_rl")
DEFAULT_PORT = 29500  # as torchrun's; on one machine any free port
POLL_SECONDS = 0.2
GRACE_SECONDS = 60.0  # for the others to end by themselves once one process has failed


@dataclass(frozen=True)
class Launch:
    """The processes of a run, and those of them that this machine starts.

    num_processes: over all machines; as many on each. settings: what an accelerate configuration adds to the recipe.
    environment: variables beyond those of the rendezvous.
    """

    num_processes: int
    num_machines: int
    machine_rank: int
    main_process_ip: str
    main_process_port: int
    settings: dict[str, str] = field(default_factory=dict)
    environment: dict[str, str] = field(default_factory=dict)

    @property
    def local_processes(self) -> int:
        return self.num_processes // self.num_machines

    @property
    def first_rank(self) -> int:
        return self.machine_rank * self.local_processes

    def with_settings(self, arguments: Sequence[str]) -> list[str]:
        """The arguments of a command, with the settings that they do not name themselves."""
        named = {argument.split("=")[0].replace("-", "_") for argument in arguments}
        added = [(f"--{key}", value) for key, value in self.settings.items() if f"__{key}" not in named]
        return [*arguments, *(word for pair in added for word in pair)]

    def environment_of(self, local_rank: int) -> dict[str, str]:
        """What tells a process its place."""
        threads = str(max(1, (os.cpu_count() or 1) // self.local_processes))
        return {
            "OMP_NUM_THREADS": threads,
            **os.environ,
            **self.environment,
            "RANK": str(self.first_rank + local_rank),
            "LOCAL_RANK": str(local_rank),
            "WORLD_SIZE": str(self.num_processes),
            "LOCAL_WORLD_SIZE": str(self.local_processes),
            "MASTER_ADDR": self.main_process_ip,
            "MASTER_PORT": str(self.main_process_port),
        }

    def describe(self, arguments: Sequence[str]) -> str:
        """What would be launched, for a dry run."""
        last = self.first_rank + self.local_processes - 1
        return (
            f"would launch {self.local_processes} processes here, ranks {self.first_rank} to {last} of "
            f"{self.num_processes}, machine {self.machine_rank} of {self.num_machines}, the first process at "
            f"{self.main_process_ip}:{self.main_process_port or 'a free port'}\n"
            f"each runs: marval-rl {shlex.join(arguments)}"
        )


def add_launch_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options; all default to None, which is to run in this process alone."""
    group = parser.add_argument_group("several processes")
    group.add_argument("--num_processes", type=int, metavar="N", help="processes in all, over all machines")
    group.add_argument("--num_machines", type=int, metavar="M", help="machines; run the command on each (default 1)")
    group.add_argument("--machine_rank", type=int, metavar="I", help="which machine this is, from 0")
    group.add_argument("--main_process_ip", metavar="HOST", help="address of machine 0")
    group.add_argument("--main_process_port", type=int, metavar="PORT", help=f"its port (default {DEFAULT_PORT})")
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
    address = given.get("main_process_ip", "127.0.0.1")
    return Launch(num_processes, num_machines, machine_rank, address, port, config.settings, config.environment)


def _devices_here() -> int:
    import torch

    return max(1, torch.cuda.device_count())


def run_processes(launch: Launch, arguments: Sequence[str], program: Sequence[str] = PROGRAM) -> None:
    """Run `marval-rl` with these arguments in the processes of this machine, and wait for all.

    Ctrl-C, SIGTERM and SIGHUP reach each process as one Ctrl-C: it ends after its step with a checkpoint. When a
    process fails, the others have GRACE_SECONDS to end by themselves.

    Raises:
        KeyboardInterrupt: If they were interrupted, here or on another machine.
        RecipeError: If a process found the input wrong; MarvalError if it failed otherwise. The message is its own.
    """
    if launch.main_process_port == 0:
        launch = _with_free_port(launch)
    with tempfile.TemporaryDirectory(prefix="marval-rl-") as folder:
        errors = [Path(folder) / str(rank) for rank in range(launch.local_processes)]
        workers = [
            subprocess.Popen(
                [*program, *arguments],
                env={**launch.environment_of(rank), ERROR_FILE: str(error)},
                start_new_session=True,  # a signal of the terminal reaches this process alone, which passes it on
            )
            for rank, error in enumerate(errors)
        ]
        with _passing_signals_on(workers):
            failed = _wait(workers)
        if not failed:
            return
        messages = {rank: _message(errors[rank], workers[rank].returncode) for rank in failed}
    if all(workers[rank].returncode in (130, -signal.SIGINT) for rank in failed):
        raise KeyboardInterrupt
    raise (RecipeError if workers[failed[0]].returncode == 2 else MarvalError)(_summary(launch, messages))


def _with_free_port(launch: Launch) -> Launch:
    with socket.socket() as found:
        found.bind((launch.main_process_ip, 0))
        return Launch(**{**vars(launch), "main_process_port": found.getsockname()[1]})


@contextmanager
def _passing_signals_on(workers: Sequence[subprocess.Popen]) -> Iterator[None]:
    """Within this context SIGINT, SIGTERM and SIGHUP go to the workers, as SIGINT: a batch system may send SIGTERM to
    the workers itself, and a second signal of one kind would end a run without a checkpoint."""

    def pass_on(number: int, frame: Any) -> None:
        for worker in workers:
            if worker.poll() is None:
                worker.send_signal(signal.SIGINT)

    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    before = {number: signal.getsignal(number) for number in numbers}
    heeded = [number for number in numbers if before[number] != signal.SIG_IGN]  # nohup ignores SIGHUP
    for number in heeded:
        signal.signal(number, pass_on)
    try:
        yield
    finally:
        for number in heeded:
            signal.signal(number, before[number])


def _wait(workers: Sequence[subprocess.Popen]) -> list[int]:
    """Waits until all workers have ended; returns the local ranks of those that failed, in the order of their ends."""
    running, failed, deadline = list(range(len(workers))), [], None
    while running:
        for rank in list(running):
            code = workers[rank].poll()
            if code is not None:
                running.remove(rank)
                if code != 0:
                    failed.append(rank)
                    deadline = deadline or time.monotonic() + GRACE_SECONDS
        if running and deadline is not None and time.monotonic() > deadline:
            for rank in running:
                workers[rank].kill()
                workers[rank].wait()
            return failed
        time.sleep(POLL_SECONDS)
    return failed


def _message(error: Path, code: int) -> str:
    if error.exists():
        return error.read_text()
    return f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"


def _summary(launch: Launch, messages: dict[int, str]) -> str:
    """One message of those of several processes, by local rank: each thing said once, without those that only repeat
    what another process said."""
    distinct: dict[str, int] = {}
    for rank, message in messages.items():
        distinct.setdefault(message, rank)
    if len(distinct) == 1 and len(messages) == launch.local_processes:
        return next(iter(distinct))
    own = {text: rank for text, rank in distinct.items() if not any(o in text for o in distinct if o != text)}
    return "; ".join(
        f"process {launch.first_rank + rank} of {launch.num_processes}: {text}" for text, rank in own.items()
    )
