"""Kills training processes at random moments, resumes, and compares the end with that of an undisturbed run.

    python tests/kill_stress.py [--kills 20] [--seed 0] [--stage 2] [--steps 600] [--folder FOLDER]

Two processes distil a tiny model under ZeRO-2 on the CPU and write a checkpoint every third step. From the first step
on one process (either, in turns) or both are killed by SIGKILL after a random time; then the run is resumed and killed
again, until all kills are spent and it may end. The final weights, their average and the last checkpoint's state must
equal those of the undisturbed run bit for bit. A kill costs a few seconds; tests/test_kill.py does the same with two.
"""

from __future__ import annotations

import argparse
import os
import random
import signal
import sys
import tempfile
import time
from pathlib import Path

from forked_processes import Processes, start

RANKS = (0, 1)
SAVE_STEPS = 3
ALONE = 60.0  # seconds within which a process whose peer was killed must have ended by itself


def launch(folder: Path, steps: int, stage: str, timeout: int = 120, hang: int | None = None) -> Processes:
    """Start or resume the training in `folder`; process 1 hangs in step `hang`. timeout: ddp_timeout."""
    (folder / "stepped").unlink(missing_ok=True)
    return start(folder, len(RANKS), work, folder, steps, stage, timeout, hang)


def wait_for_step(run: Processes, timeout: float = 240.0) -> None:
    """Return once the launch has completed a step."""
    deadline = time.monotonic() + timeout
    while not (run.folder / "stepped").exists():
        if time.monotonic() > deadline or not run.alive():
            raise RuntimeError(f"no step was taken:\n{run.output()}")
        time.sleep(0.02)


def finish(folder: Path, steps: int, stage: str) -> None:
    """Train to the end, from the newest checkpoint if there is one."""
    run = launch(folder, steps, stage)
    codes = run.wait(timeout=900)
    if codes != [0, 0]:
        raise RuntimeError(f"exit codes {codes}:\n{run.output()}")


def differences(one: Path, other: Path, steps: int) -> list[str]:
    """The files whose content differs between two ended runs, of all that a last checkpoint holds and `final`."""
    import torch
    from safetensors.torch import load_file

    last = f"checkpoint-{steps}"
    names = [path.relative_to(one) for path in (one / last).rglob("*") if path.suffix in (".safetensors", ".pt")]
    names += [path.relative_to(one) for path in (one / "final").glob("*.safetensors")]
    found = []
    for name in sorted(names):
        if name.suffix == ".safetensors":
            contents = [load_file(folder / name) for folder in (one, other)]
        else:
            contents = [torch.load(folder / name, weights_only=False) for folder in (one, other)]
        if not same(*contents):
            found.append(str(name))
    return found


def same(one: object, other: object) -> bool:
    """Whether two nested structures hold the same numbers; objects of other kinds are passed over."""
    import torch

    if isinstance(one, torch.Tensor):
        return torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(same, one, other))
    if isinstance(one, int | float | str | bool | None):
        return one == other
    return True


def kill_and_resume(folder: Path, steps: int, stage: str, ranks: tuple[int, ...], delay: float) -> list[int | None]:
    """Start or resume, kill these ranks so many seconds after the first step, and return the exit codes."""
    run = launch(folder, steps, stage)
    wait_for_step(run)
    time.sleep(delay)
    if not run.alive():
        raise RuntimeError(f"the training was over before it could be killed: take more --steps\n{run.output()}")
    run.kill(*ranks)
    codes = run.wait(timeout=ALONE)
    survivors = [code for rank, code in enumerate(codes) if rank not in ranks]
    if any(codes[rank] != -signal.SIGKILL for rank in ranks) or any(code != 1 for code in survivors):
        raise RuntimeError(f"exit codes {codes}:\n{run.output()}")
    expected = ("--resume continues from it", "there is no checkpoint yet")
    if survivors and not any(words in run.output() for words in expected):
        raise RuntimeError(f"the survivor does not say what happened:\n{run.output()}")
    return codes


def work(folder: Path, steps: int, stage: str, timeout: int, hang: int | None) -> None:
    """One of the two processes."""
    from distributed_work import deepspeed_config
    from tiny_models import tiny_model
    from tiny_trainers import distiller
    from transformers import TrainerCallback

    from marval_rl.errors import MarvalError
    from marval_rl.runtime.checkpoints import checkpoints_in
    from marval_rl.runtime.resume import find_checkpoint

    class Signals(TrainerCallback):
        """Tells the parent that a step was taken; and hangs in a step, for a test."""

        def on_step_end(self, *_: object, **__: object) -> None:
            (folder / "stepped").touch()

        def on_step_begin(self, _: object, state: object, *__: object, **___: object) -> None:
            if state.global_step == hang and os.environ["RANK"] == "1":
                time.sleep(600)

    trainer = distiller(
        folder,
        tiny_model(),
        max_steps=steps,
        adam_beta1=0.9,
        save_strategy="steps",
        save_steps=SAVE_STEPS,
        logging_steps=50,
        disable_tqdm=True,
        ddp_timeout=timeout,
        **({} if stage == "ddp" else {"deepspeed": deepspeed_config(int(stage))}),
    )
    trainer.add_callback(Signals())
    resume = str(find_checkpoint(folder, "latest")) if checkpoints_in(folder) else None
    try:
        trainer.train(resume_from_checkpoint=resume)
    except MarvalError as error:
        sys.exit(f"marval-rl: error: {error}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--stage", default="2", help="1, 2 or 3 of ZeRO, or ddp")
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--delay", type=float, default=4.0, help="seconds from the first step to a kill, at most")
    parser.add_argument("--folder", type=Path, default=None)
    args = parser.parse_args()
    folder = args.folder or Path(tempfile.mkdtemp())
    chance = random.Random(args.seed)
    print(f"undisturbed run of {args.steps} steps, ZeRO stage {args.stage}, in {folder}", flush=True)
    start = time.monotonic()
    finish(folder / "undisturbed", args.steps, args.stage)
    print(f"  {time.monotonic() - start:.0f} s", flush=True)
    for kill in range(args.kills):
        ranks = RANKS if kill % 2 else (kill // 2 % 2,)
        delay = chance.uniform(0, args.delay)
        codes = kill_and_resume(folder / "killed", args.steps, args.stage, ranks, delay)
        left = sorted(path.name for path in (folder / "killed").glob("[cu]*"))
        print(f"kill {kill + 1}: ranks {ranks} after {delay:.2f} s, exit codes {codes}, there is {left}", flush=True)
    finish(folder / "killed", args.steps, args.stage)
    found = differences(folder / "undisturbed", folder / "killed", args.steps)
    print(f"after {args.kills} kills: {'the same, bit for bit' if not found else f'different: {found}'}")
    sys.exit(bool(found))


if __name__ == "__main__":
    main()
