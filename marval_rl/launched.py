"""What a launcher says in the environment: how many processes it started, and which of them this one is."""

from __future__ import annotations

import atexit
import json
import os
import signal
import sys
import threading
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

from marval_rl.errors import RecipeError

# In the order in which accelerate reads them: torchrun and `accelerate launch`, then MPI (also `srun --mpi=pmi2`).
SIZE_VARIABLES = ("WORLD_SIZE", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE")

# Names the file in which torch's launcher looks for the error of a process; empty if it keeps none.
ERROR_FILE = "TORCHELASTIC_ERROR_FILE"
LAUNCHER = "MARVAL_RL_LAUNCHER"  # id of the process that started this one, for `--num_processes`
RESTARTS = "TORCHELASTIC_RESTART_COUNT"  # how often torch's launcher has started the processes again
POLL_SECONDS = 1.0


@dataclass(frozen=True)
class Place:
    """This process among those that a launcher started."""

    rank: int = 0
    local_rank: int = 0
    world_size: int = 1


def find_place() -> Place | None:
    """Returns the place that a launcher has given to this process; None without a launcher.

    Raises:
        RecipeError: If the environment variables are not whole numbers, or do not fit each other.
    """
    if "WORLD_SIZE" not in os.environ:
        check_company(1)
        return None
    defaults = {"RANK": "0" if os.environ["WORLD_SIZE"] == "1" else "", "LOCAL_RANK": "0", "WORLD_SIZE": ""}
    values = {name: os.environ.get(name, default) for name, default in defaults.items()}
    if not all(value.isdecimal() for value in values.values()) or int(values["RANK"]) >= int(values["WORLD_SIZE"]):
        raise RecipeError(f"the environment gives this process no place: {values}")
    return Place(int(values["RANK"]), int(values["LOCAL_RANK"]), int(values["WORLD_SIZE"]))


def is_started_here() -> bool:
    """Whether `--num_processes` started this process, and the one that did so still waits for it."""
    return os.environ.get(LAUNCHER) == str(os.getppid())


def end_with_launcher() -> None:
    """Interrupts this process, as Ctrl-C does, once the one that `--num_processes` started it from is gone."""

    def watch() -> None:
        while is_started_here():
            time.sleep(POLL_SECONDS)
        os.kill(os.getpid(), signal.SIGINT)

    if is_started_here():
        threading.Thread(target=watch, daemon=True).start()


def end_process(code: int) -> NoReturn:
    """End a process of several: after its threads and exit functions, but without the interpreter's finalization.

    One of gloo's threads may still hold a tensor of the last collective operation when the main thread is done. To
    release a tensor takes the GIL, and Python before 3.14 ends a thread that asks for it during finalization by
    pthread_exit, which C++ answers with std::terminate: SIGABRT at the end of a run that succeeded. Destroying the
    process groups does not join these threads, as DistributedDataParallel and DeepSpeed keep references to the groups.
    See https://github.com/pytorch/pytorch/pull/179291. `multiprocessing` ends its children in the same way.
    """
    for thread in threading.enumerate():
        if thread is not threading.current_thread() and not thread.daemon:
            thread.join()
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError, ValueError):  # nobody reads it any more, or it is closed
            stream.flush()
    os._exit(code)


def record_error(message: str) -> None:
    """Leave the message of an error for torch's launcher, in the format of `torch.distributed.elastic`."""
    if os.environ.get(ERROR_FILE):
        details = {"py_callstack": message, "timestamp": str(int(time.time()))}
        with suppress(OSError):  # the folder is deleted when the launcher ends
            Path(os.environ[ERROR_FILE]).write_text(json.dumps({"message": {"message": message, "extraInfo": details}}))


def launched_processes() -> int:
    """Returns the number of processes that a launcher started, this one among them; 1 without a launcher.

    Raises:
        RecipeError: If the environment variable that says so is not a positive whole number.
    """
    variable = _size_variable()
    if variable is None:
        return 1
    value = os.environ[variable]
    if not value.isdecimal() or int(value) < 1:
        raise RecipeError(f"{variable} in the environment is {value!r}, not a number of processes: unset it")
    return int(value)


def check_company(num_processes: int) -> None:
    """Check that all processes that a launcher started have met, before anything is written.

    Args:
        num_processes: How many met, this one among them.

    Raises:
        RecipeError: If that is another number than was started.
    """
    launched = launched_processes()
    if num_processes != launched:
        variable = _size_variable()
        raise RecipeError(
            f"this process was started as one of {launched} ({variable}), but runs as one of {num_processes}: all "
            f"would do the same work and write the same files. Start them with --num_processes {launched}, torchrun or "
            f"`accelerate launch`; or unset {variable} to run one process"
        )


def _size_variable() -> str | None:
    return next((name for name in SIZE_VARIABLES if name in os.environ), None)
