"""Starts the processes of a command and waits for them: torch's elastic agent, as under torchrun, with our own ends.

The agent places, watches and restarts the processes. What differs from torchrun: Ctrl-C and SIGTERM reach every process
as one Ctrl-C, with all the time that its checkpoint takes; the other processes may end by themselves after one has
failed; and a failure is reported in one line, the message of the process that failed.
"""

from __future__ import annotations

import logging
import math
import os
import signal
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import suppress
from typing import Any

from accelerate.utils import patch_environment
from torch.distributed import DistError
from torch.distributed.elastic.agent.server.api import RunResult, WorkerGroup, WorkerSpec, WorkerState
from torch.distributed.elastic.agent.server.local_elastic_agent import LocalElasticAgent
from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, SignalException
from torch.distributed.elastic.multiprocessing.errors import ProcessFailure
from torch.distributed.elastic.rendezvous import RendezvousParameters, registry
from torch.distributed.elastic.utils.distributed import get_free_port

from marval_rl.cli.launch import Launch
from marval_rl.errors import MarvalError, RecipeError, first_line
from marval_rl.launched import LAUNCHER

PROGRAM = (sys.executable, "-m", "marval_rl")
GRACE_SECONDS = 30.0  # for the others to end by themselves once one has failed; then SIGTERM, and 30 s later SIGKILL
MEETING_SECONDS = 900  # that a machine waits for the others to begin
PASSED_ON = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
INTERRUPTED = (130, -signal.SIGINT)  # exit codes of a process that Ctrl-C ended


def run_processes(
    launch: Launch, arguments: Sequence[str], grace: float = GRACE_SECONDS, program: Sequence[str] = PROGRAM
) -> None:
    """Run `marval-rl` with these arguments in the processes of this machine, and wait for all of them.

    Args:
        launch: How many processes, and where they meet.
        arguments: Of the command line.
        grace: Seconds for the other processes to end by themselves once one has failed; `math.inf` lets them finish.
        program: What is started.

    Raises:
        KeyboardInterrupt: They were interrupted, here or on another machine.
        RecipeError: A process found the input wrong. The message is its own.
        MarvalError: A process failed otherwise or was killed, or the machines did not meet.
    """
    handlers: dict[int, Any] = {number: signal.getsignal(number) for number in (*PASSED_ON, signal.SIGQUIT)}
    threads = os.environ.get("OMP_NUM_THREADS", max(1, (os.cpu_count() or 1) // launch.local_processes))
    variables = {"OMP_NUM_THREADS": threads, **launch.environment, LAUNCHER: os.getpid()}
    logging.disable(logging.CRITICAL)  # the agent's log says in many lines what is said here in one
    try:
        with tempfile.TemporaryDirectory(prefix="marval-rl-") as folder, patch_environment(**variables):
            agent = Agent(_worker_spec(launch, arguments, program), DefaultLogsSpecs(folder), launch, grace, handlers)
            failures = agent.causes(agent.run())
    except SignalException as stop:  # one that came while the processes were being started
        raise KeyboardInterrupt from stop
    except DistError as error:
        where = f"{launch.main_process_ip}:{launch.main_process_port}"
        raise MarvalError(f"the machines did not meet at {where}: {first_line(error)}") from error
    finally:
        logging.disable(logging.NOTSET)
        for number, handler in handlers.items():
            signal.signal(number, handler)
    if not failures:
        return
    if all(failure.exitcode in INTERRUPTED for failure in failures):
        raise KeyboardInterrupt
    raise (RecipeError if failures[0].exitcode == 2 else MarvalError)(_summary(launch, failures))


def _worker_spec(launch: Launch, arguments: Sequence[str], program: Sequence[str]) -> WorkerSpec:
    address, port = launch.main_process_ip, launch.main_process_port or get_free_port()
    meeting = RendezvousParameters(
        backend="static",
        endpoint=f"{address}:{port}",
        run_id="marval-rl",
        min_nodes=launch.num_machines,
        max_nodes=launch.num_machines,
        rank=launch.machine_rank,
        timeout=MEETING_SECONDS,
    )
    return WorkerSpec(
        role="marval-rl",
        local_world_size=launch.local_processes,
        rdzv_handler=registry.get_rendezvous_handler(meeting),
        entrypoint=program[0],
        args=tuple(word.replace("$", "$$") for word in (*program[1:], *arguments)),  # torch substitutes ${local_rank}
        max_restarts=launch.max_restarts,
        monitor_interval=0.2,
        master_addr=address,
        master_port=port,
    )


class Agent(LocalElasticAgent):
    """torch's agent of one machine, which passes signals on and lets the others end by themselves after a failure.

    It overrides two of the methods that torch documents for this ("Extending the Agent").
    """

    def __init__(
        self, spec: WorkerSpec, logs: DefaultLogsSpecs, launch: Launch, grace: float, handlers: dict[int, Any]
    ):
        super().__init__(spec, logs)
        self.launch = launch
        self.grace = grace
        self.handlers = handlers
        self.failed: dict[int, float] = {}  # local rank -> when that was seen
        self.interrupted = False

    def _start_workers(self, worker_group: WorkerGroup) -> dict[int, Any]:
        self.failed.clear()
        started = super()._start_workers(worker_group)
        for number, handler in self.handlers.items():  # in place of torch's, which give the processes 30 s to end
            passed_on = number in PASSED_ON and handler != signal.SIG_IGN  # nohup ignores SIGHUP
            signal.signal(number, self._pass_on if passed_on else handler)
        return started

    def _pass_on(self, number: int, frame: Any) -> None:
        """As SIGINT: a batch system may send SIGTERM to the processes itself, and a second signal of one kind would end
        them without a checkpoint."""
        self.interrupted = True
        for worker in self.get_worker_group().workers:
            with suppress(ChildProcessError, ProcessLookupError):  # between two attempts
                if _exit_code(worker.id) is None:
                    os.kill(worker.id, signal.SIGINT)

    def _monitor_workers(self, worker_group: WorkerGroup) -> RunResult:
        codes = {worker.local_rank: _exit_code(worker.id) for worker in worker_group.workers}
        running = None in codes.values()
        for rank, code in codes.items():
            if code and rank not in self.failed:
                self.failed[rank] = time.monotonic()
                if running and math.isinf(self.grace):
                    _say(f"{_name(self.launch, rank)} {_ending(code)}; the others continue")
        if running and (not self.failed or time.monotonic() < min(self.failed.values()) + self.grace):
            return RunResult(state=WorkerState.HEALTHY)
        if self.interrupted or any(code in (2, *INTERRUPTED) for code in codes.values()):
            self._remaining_restarts = 0  # wrong input stays wrong
        result = super()._monitor_workers(worker_group)  # ends those that still run
        if result.is_failed() and self._remaining_restarts > 0:
            attempt = self.launch.max_restarts - self._remaining_restarts + 1
            _say(f"{_summary(self.launch, self.causes(result))}; restart {attempt} of {self.launch.max_restarts}")
        return result

    def causes(self, result: RunResult) -> list[ProcessFailure]:
        """Of the processes that failed by themselves, in that order."""
        by_rank = {failure.local_rank: failure for failure in result.failures.values()}
        return [by_rank[rank] for rank in self.failed if rank in by_rank]


def _exit_code(pid: int) -> int | None:
    """Of a child process, which the agent has yet to wait for; negative for a signal, None while it runs."""
    ended = os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT)
    if ended is None:
        return None
    return ended.si_status if ended.si_code == os.CLD_EXITED else -ended.si_status


def _name(launch: Launch, local_rank: int) -> str:
    return f"process {launch.first_rank + local_rank} of {launch.num_processes}"


def _ending(code: int) -> str:
    return f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"


def _say(text: str) -> None:
    print(f"marval-rl: {text}", file=sys.stderr, flush=True)


def _summary(launch: Launch, failures: Sequence[ProcessFailure]) -> str:
    """One message from those of several processes: each cause once, without those that only repeat another one's."""
    distinct: dict[str, int] = {}
    for failure in failures:
        message = failure.message  # a dictionary is what `marval_rl.launched.record_error` wrote
        text = message["message"] if isinstance(message, dict) else _ending(failure.exitcode)
        distinct.setdefault(text, failure.local_rank)
    if len(distinct) == 1 and len(failures) == launch.local_processes and isinstance(failures[0].message, dict):
        return next(iter(distinct))
    causes = {text: rank for text, rank in distinct.items() if not any(t in text for t in distinct if t != text)}
    return "; ".join(f"{_name(launch, rank)}: {text}" for text, rank in causes.items())
