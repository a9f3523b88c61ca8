"""What a launcher says in the environment: how many processes it started."""

from __future__ import annotations

import os

from marval_rl.errors import RecipeError

# In the order in which accelerate reads them: torchrun and `accelerate launch`, then MPI (also `srun --mpi=pmi2`).
SIZE_VARIABLES = ("WORLD_SIZE", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE")

ERROR_FILE = "MARVAL_RL_ERROR_FILE"  # names the file in which a launched process leaves its error message


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
