"""Work shared by several new processes of one machine."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection, wait
from typing import Any

import torch

from marval_rl.errors import MarvalError


def run_processes(function: Callable[..., None], num_processes: int, *arguments: Any) -> None:
    """Calls function(rank, num_processes, *arguments) once in each of several new processes and waits for all.

    As soon as one fails the others are ended. They also end when this process does, however it ends.

    Args:
        function: At the top level of a module; it and the arguments are pickled.

    Raises:
        MarvalError, ValueError: What a process raised.
        RuntimeError: If a process raised anything else or was killed.
    """
    context = multiprocessing.get_context("spawn")  # a GPU cannot be used after a fork
    threads = max(1, torch.get_num_threads() // num_processes)
    processes, receivers = [], {}
    try:
        for rank in range(num_processes):
            receiver, sender = context.Pipe(duplex=False)
            process = context.Process(target=_work, args=(sender, function, threads, rank, num_processes, arguments))
            process.start()
            sender.close()  # so that the receiver sees the end when the process is gone
            processes.append(process)
            receivers[process.sentinel] = (rank, process, receiver)
        while receivers:
            for sentinel in wait(receivers):
                rank, process, receiver = receivers.pop(sentinel)
                process.join()
                if process.exitcode != 0:
                    raise _failure(rank, process.exitcode, receiver)
    finally:
        for process in processes:
            process.terminate()
        for process in processes:
            process.join()


def _failure(rank: int, exit_code: int, receiver: Connection) -> Exception:
    try:
        return receiver.recv()
    except EOFError:  # it had no time to say
        how = f"was killed by {signal.Signals(-exit_code).name}" if exit_code < 0 else f"ended with {exit_code}"
        return RuntimeError(f"process {rank} {how}; finished batches are kept, the same command goes on")


def _work(
    sender: Connection,
    function: Callable[..., None],
    threads: int,
    rank: int,
    num_processes: int,
    arguments: tuple[Any, ...],
) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the parent, which ends this process
    threading.Thread(target=_end_with_the_parent, daemon=True).start()
    torch.set_num_threads(threads)
    try:
        function(rank, num_processes, *arguments)
    except Exception as error:  # whatever it is, the parent is told
        sender.send(_portable(error, rank))
        raise SystemExit(1) from error


def _end_with_the_parent() -> None:
    multiprocessing.parent_process().join()
    os._exit(1)


def _portable(error: Exception, rank: int) -> Exception:
    """The error as something that is certain to be pickled, with the traceback as a note."""
    if isinstance(error, MarvalError):
        portable = type(error)(str(error))
    elif isinstance(error, ValueError):
        portable = ValueError(str(error))
    else:
        portable = RuntimeError(f"process {rank}: {type(error).__name__}: {error}")
    # A pipe holds 64 KiB, and nobody reads from it before this process has ended.
    portable.add_note("".join(traceback.format_exception(error))[-10_000:])
    return portable
