"""Starting a run in several processes: how many, where, with which settings, and how they end."""

from __future__ import annotations

import math
import os
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import yaml
from tiny_recipes import RECIPES, command_line, comparable_lines, read_lines
from torch.distributed.elastic.utils.distributed import get_free_port

from marval_rl.cli.accelerate_config import read_accelerate_config
from marval_rl.cli.launch import Launch, add_launch_arguments, plan_launch
from marval_rl.cli.main import CommandParser, main
from marval_rl.cli.processes import run_processes
from marval_rl.errors import MarvalError, RecipeError
from marval_rl.launched import SIZE_VARIABLES
from marval_rl.paths import DEEPSPEED_PRESETS, deepspeed_config
from marval_rl.runtime.resume import find_checkpoint
from marval_rl.trainers import arguments
from marval_rl.trainers.arguments import MARTrainingArguments

HERE = Launch(num_processes=2)
ALONE = "started as one of 2 (WORLD_SIZE), but runs as one of 1"


@pytest.fixture(autouse=True)
def environment(monkeypatch):
    """No launcher's, and in the processes one thread as in the tests: more have other last digits."""
    for name in (*SIZE_VARIABLES, "RANK", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")


def planned(*words: str) -> Launch | None:
    parser = CommandParser(prog="marval-rl train", add_help=False)
    add_launch_arguments(parser)
    return plan_launch(parser.parse_args(words))


# How many, and where


def test_processes_are_counted_over_all_machines():
    assert planned() is None
    words = "--num_processes 8 --num_machines 2 --main_process_ip 10.0.0.1 --machine_rank"
    launch = planned(*words.split(), "1", "--main_process_port", "1234")
    assert (launch.local_processes, launch.first_rank, launch.main_process_port) == (4, 4, 1234)
    assert planned(*words.split(), "0") == Launch(8, 2, 0, "10.0.0.1", 29500)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--num_processes 0", "num_processes 0 and num_machines 1 must be at least 1"),
        ("--num_processes 3 --num_machines 2", "does not divide by num_machines 2"),
        ("--num_processes 4 --num_machines 2 --machine_rank 2", r"machine_rank 2 is outside 0..1"),
        ("--num_processes 4 --num_machines 2 --main_process_ip a", "machine_rank is not set: say which of the 2"),
        ("--num_processes 4 --num_machines 2 --machine_rank 1", "main_process_ip is not set"),
        ("--num_processes 2 --main_process_port 70000", "main_process_port 70000 is outside"),
        ("--num_processes 2 --max_restarts -1", "max_restarts must not be negative"),
        ("--num_processes two", "invalid int value: 'two'"),
        ("--accelerate_config zero4", "'zero4' is neither a file nor one of zero1, zero2, zero3"),
    ],
)
def test_numbers_that_do_not_fit_are_refused(words, message):
    with pytest.raises(ValueError, match=message):
        planned(*words.split())


def test_a_process_that_was_launched_launches_none(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(RecipeError, match="started by a launcher"):
        planned("--num_processes", "2")


# accelerate's configurations


@pytest.mark.parametrize("name", DEEPSPEED_PRESETS)
def test_a_preset_is_a_file_of_the_package(name):
    config = deepspeed_config(name)
    assert config["zero_optimization"]["stage"] == int(name[4])
    assert ("offload_optimizer" in config["zero_optimization"]) == name.endswith("offload")
    assert planned("--num_processes", "1", "--accelerate_config", name).settings == {"deepspeed": name}


def test_mappings_json_and_files_are_read_as_presets_are(tmp_path):
    file = tmp_path / "mine.json"
    file.write_text('\ufeff{"a": 1}', encoding="utf-8")  # as editors of Windows save it
    assert deepspeed_config(None) is None
    for value in ({"a": 1}, '{"a": 1}', str(file)):
        assert deepspeed_config(value) == {"a": 1}
    file.write_text("{")
    for value in ("{", str(file)):
        with pytest.raises(ValueError, match=f"deepspeed {value} cannot be read as JSON"):
            deepspeed_config(value)
    with pytest.raises(ValueError, match="deepspeed 'zero9' is neither a file nor one of zero1"):
        deepspeed_config("zero9")


ZERO = {"distributed_type": "DEEPSPEED"}


def write(path: Path, **config: Any) -> str:
    path.write_text(yaml.safe_dump(config))
    return str(path)


def test_a_configuration_of_accelerate_is_honoured_and_the_command_line_wins(tmp_path):
    (tmp_path / "ds.json").write_text("{}")
    config = {"compute_environment": "LOCAL_MACHINE", "distributed_type": "DEEPSPEED", "mixed_precision": "bf16"}
    config |= {"num_machines": 2, "num_processes": 4, "machine_rank": 0, "gpu_ids": "0,1"}
    config |= {"main_process_ip": "10.0.0.1", "main_process_port": 29501}
    config["deepspeed_config"] = {"deepspeed_config_file": str(tmp_path / "ds.json"), "zero3_init_flag": False}
    file = write(tmp_path / "a.yaml", **config)
    launch = planned("--accelerate_config", file, "--machine_rank", "1")
    assert (launch.num_processes, launch.num_machines, launch.machine_rank) == (4, 2, 1)
    assert (launch.main_process_ip, launch.main_process_port) == ("10.0.0.1", 29501)
    assert launch.settings == {"bf16": "true", "deepspeed": str(tmp_path / "ds.json")}
    assert launch.environment == {"CUDA_VISIBLE_DEVICES": "0,1"}
    words = ["r.yaml", "--bf16", "false", "--deepspeed=zero1"]
    assert launch.with_settings(words) == words


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"distributed_type": "FSDP"}, "distributed_type FSDP is not one of"),
        ({"mixed_precision": "fp8"}, "mixed_precision fp8 is not one of no, bf16, fp16"),
        ({"fsdp_config": {"a": 1}}, "fsdp_config is not understood here: start with `accelerate launch"),
        ({"num_processes": "many"}, "num_processes cannot be 'many'"),
        ({**ZERO, "deepspeed_config": {"deepspeed_config_file": "no.json"}}, "no.json is missing"),
        (ZERO, "no preset fits its deepspeed_config"),
    ],
)
def test_options_that_only_accelerate_supports_are_refused(tmp_path, config, message):
    with pytest.raises(RecipeError, match=message):
        read_accelerate_config(write(tmp_path / "a.yaml", **config))


OFFLOADED = {"zero_stage": 3, "offload_optimizer_device": "cpu", "offload_param_device": "none"}


@pytest.mark.parametrize(
    ("config", "settings"),
    [
        ({"distributed_type": "MULTI_CPU", "mixed_precision": False, "num_processes": 2}, {"use_cpu": "true"}),
        ({**ZERO, "deepspeed_config": OFFLOADED}, {"deepspeed": "zero3_offload"}),
    ],
    ids=["for the CPU", "a stage without a file"],
)
def test_a_configuration_becomes_settings(tmp_path, config, settings):
    assert read_accelerate_config(write(tmp_path / "a.yaml", **config)).settings == settings


@pytest.mark.parametrize("file", sorted((RECIPES.parent / "accelerate").glob("*.yaml")), ids=lambda file: file.name)
def test_the_repositorys_own_configurations_are_understood(file, monkeypatch):
    monkeypatch.chdir(RECIPES.parents[1])
    config = read_accelerate_config(str(file))
    assert config.launch["num_processes"] == {"one_gpu": 1, "two_nodes": 16}.get(file.stem, 8)
    assert ("deepspeed" in config.settings) == file.stem.startswith("zero")


# A dry run


def test_a_dry_run_prints_the_launch_and_plans_with_its_processes(tiny_runs, tmp_path, capsys):
    words = command_line("grpo", tmp_path / "run", "--dry_run", **tiny_runs.models_of("grpo"))
    launch = "--num_processes 4 --num_machines 2 --machine_rank 1 --main_process_ip 10.0.0.1 --accelerate_config zero2"
    assert main([*words, *launch.split()]) == 0
    output = capsys.readouterr().out
    for line in (
        "would launch 2 processes here, ranks 2 to 3 of 4, machine 1 of 2, the first process at 10.0.0.1:29500",
        "--dry_run --deepspeed zero2",
        "images per update: 64 = per_device_train_batch_size 16 x gradient_accumulation_steps 1 x 4 processes",
        "generation batch: 128 images = 32 groups of 4",
        "planned for 4 processes in float32",
    ):
        assert line in output
    assert not (tmp_path / "run").exists()


def test_deepspeed_needs_a_launch(train, complaint):
    assert complaint(2, train(deepspeed="zero2")) == (
        "deepspeed needs processes that are launched: add --num_processes N (1 will do)"
    )


# Precision and devices


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ("bf16", "asks for bf16 on a GPU; here is none: --use_cpu true --bf16 false to try it slowly"),
        ("fp16", "asks for fp16 on a GPU; here is none: --use_cpu true --fp16 false to try it slowly"),
        ("tf32 bf16", "asks for bf16 and tf32 on a GPU; here is none: --use_cpu true --bf16 false --tf32 false to try"),
        ("fp16 use_cpu", "fp16 needs a GPU, and use_cpu is true: add --fp16 false"),
        ("tf32 use_cpu", "tf32 needs a GPU, and use_cpu is true: add --tf32 false"),
        ("bf16 use_cpu", None),
    ],
)
def test_a_precision_that_needs_a_gpu_says_so_without_one(settings, message, tmp_path, monkeypatch):
    monkeypatch.setattr(arguments, "accelerator_here", lambda: None)
    given = dict.fromkeys(settings.split(), True)
    if message is None:
        assert MARTrainingArguments(str(tmp_path), **given).precision == "bf16"
        return
    with pytest.raises(ValueError, match=message):
        MARTrainingArguments(str(tmp_path), **given)


def test_a_real_run_of_a_bf16_recipe_stops_before_any_work(tmp_path, monkeypatch, complaint):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(arguments, "accelerator_here", lambda: None)
    assert complaint(2, main(["distill", str(RECIPES.parent / "huge.yaml")])) == (
        "this recipe asks for bf16 on a GPU; here is none: --use_cpu true --bf16 false to try it slowly"
    )
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({"WORLD_SIZE": "2"}, re.escape(ALONE)),
        ({"OMPI_COMM_WORLD_SIZE": "4"}, r"started as one of 4 \(OMPI_COMM_WORLD_SIZE\)"),
        ({"PMI_SIZE": "2"}, r"--num_processes 2, torchrun or `accelerate launch`; or unset PMI_SIZE"),
        ({"WORLD_SIZE": "two"}, "WORLD_SIZE in the environment is 'two', not a number of processes"),
        ({"ACCELERATE_MIXED_PRECISION": "fp8"}, "mixed_precision fp8 is not supported"),
        ({"ACCELERATE_MIXED_PRECISION": "fp16", "ACCELERATE_USE_CPU": "true"}, "fp16 needs a GPU.*for accelerate"),
    ],
)
def test_a_process_of_several_that_is_alone_stops(variables, message, tmp_path, monkeypatch):
    monkeypatch.setattr(arguments, "only_cpu_here", lambda num_processes: False)  # a device that accelerate passes over
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match=message):
        MARTrainingArguments(str(tmp_path / "run"))
    assert not (tmp_path / "run").exists()


def test_processes_choose_the_cpu_where_they_cannot_meet_elsewhere(monkeypatch):
    for kind, several, single in ((None, True, True), ("mps", True, False), ("cuda", False, False)):
        monkeypatch.setattr(arguments, "accelerator_here", lambda kind=kind: kind)
        assert (arguments.only_cpu_here(2), arguments.only_cpu_here(1)) == (several, single)


def test_more_processes_than_gpus_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(arguments, "accelerator_here", lambda: "cuda")
    monkeypatch.setattr(arguments.torch.cuda, "device_count", lambda: 1)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    with pytest.raises(ValueError, match=r"2 processes were started on this machine, which has 1 GPU\(s\)"):
        MARTrainingArguments(str(tmp_path))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("report run", ALONE),
        ("sample model", ALONE),
        ("demo", ALONE),
        ("evaluate --images a", "a folder of images is evaluated by one process: leave out --num_processes"),
    ],
)
def test_settings_that_several_processes_cannot_share_are_refused(words, message, tmp_path, monkeypatch, complaint):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert message in complaint(2, main(words.split()))


LAUNCHERS = {
    "ours under ZeRO-2": ("-m marval_rl", "--num_processes 2 --accelerate_config zero2"),
    "torchrun": ("-m torch.distributed.run --standalone --nproc_per_node 2 -m marval_rl", ""),
    "accelerate": ("-m accelerate.commands.launch --config_file {config} -m marval_rl", ""),
}


@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_two_processes_are_one_run_without_a_flag_for_the_cpu(launcher, tiny_runs, tmp_path):
    before, after = LAUNCHERS[launcher]
    config = {"distributed_type": "MULTI_GPU", "num_processes": 2, "num_machines": 1}
    file = write(tmp_path / "config.yaml", **config, main_process_port=get_free_port())
    before = before.format(config=file).split()
    words = [*before, *command_line("distill", tmp_path / "run", **tiny_runs.models_of("distill")), *after.split()]
    done = subprocess.run([sys.executable, *words], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("x 2 processes") == done.stdout.count("done: ") == 1
    if not arguments.torch.cuda.is_available():
        assert "2 processes on the CPU over gloo, in float32 (there is no GPU here)" in done.stdout


# How processes end: any program will do

SCRIPT = """
import os, pathlib, signal, sys, time
from marval_rl.launched import record_error

rank, attempt = int(os.environ["RANK"]), int(os.environ["TORCHELASTIC_RESTART_COUNT"])

def fail(code, text):
    record_error(text)
    sys.exit(code)
"""
KILL_ITSELF = "os.kill(os.getpid(), signal.SIGKILL)"


def start(script: str, launch: Launch = HERE, grace: float = 30.0, words: tuple[str, ...] = ()) -> None:
    run_processes(launch, words, grace, program=[sys.executable, "-c", SCRIPT + script])


def test_every_process_knows_its_place_and_gets_the_arguments_as_they_are(tmp_path):
    names = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR")
    names += ("CUDA_VISIBLE_DEVICES", "MASTER_PORT")
    said = f"' '.join([*(os.environ[n] for n in {names}), *sys.argv[1:]])"
    words = ("$HOME", "$$", "${local_rank}", "a")
    launch = Launch(num_processes=2, environment={"CUDA_VISIBLE_DEVICES": "3,4"})
    start(f"pathlib.Path({str(tmp_path)!r}, str(rank)).write_text({said})", launch, words=words)
    places = [(tmp_path / rank).read_text().split() for rank in ("0", "1")]
    for rank, place in enumerate(places):
        assert place[:6] == [str(rank), str(rank), "2", "2", "127.0.0.1", "3,4"] and place[7:] == list(words)
    assert places[0][6] == places[1][6] != "0"


@pytest.mark.parametrize(
    ("script", "error", "message"),
    [
        ("fail(2, 'the recipe is wrong')", RecipeError, "the recipe is wrong"),
        ("fail(1, 'disk full' if rank else 'process 1 failed: disk full')", MarvalError, "process 1 of 2: disk full"),
        ("sys.exit(3 * rank)", MarvalError, "process 1 of 2: ended with exit code 3"),
        (f"{KILL_ITSELF} if rank else time.sleep(600)", MarvalError, "process 1 of 2: was killed by SIGKILL"),
        ("sys.exit(130)", KeyboardInterrupt, ""),
    ],
)
def test_a_failure_is_reported_once_with_the_message_of_the_process_that_failed(script, error, message, capfd):
    began = time.monotonic()
    with pytest.raises(error) as raised:
        start(script, grace=2)
    assert (type(raised.value), str(raised.value)) == (error, message)
    assert time.monotonic() - began < 30  # the sleeping one is not waited for
    assert capfd.readouterr() == ("", "")


def test_failed_processes_are_restarted_up_to_a_number_but_not_for_wrong_input(capfd):
    start("if attempt < 2 and rank: fail(1, f'broken in attempt {attempt}')", Launch(num_processes=2, max_restarts=2))
    assert capfd.readouterr().err.splitlines() == [
        f"marval-rl: process 1 of 2: broken in attempt {attempt}; restart {attempt + 1} of 2" for attempt in (0, 1)
    ]
    with pytest.raises(RecipeError, match=r"^wrong in attempt 0$"):
        start("fail(2, f'wrong in attempt {attempt}')", Launch(num_processes=2, max_restarts=2))


def test_the_others_can_be_left_to_finish(tmp_path, capfd):
    script = f"""
if rank:
    {KILL_ITSELF}
while not pathlib.Path({str(tmp_path)!r}, "noticed").exists():
    time.sleep(0.01)
pathlib.Path({str(tmp_path)!r}, "finished").touch()
"""

    def notice() -> None:
        time.sleep(3)
        (tmp_path / "noticed").touch()

    threading.Thread(target=notice, daemon=True).start()
    with pytest.raises(MarvalError, match=r"^process 1 of 2: was killed by SIGKILL$"):
        start(script, grace=math.inf)
    assert (tmp_path / "finished").exists()
    assert capfd.readouterr().err == "marval-rl: process 1 of 2 was killed by SIGKILL; the others continue\n"


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=["SIGINT", "SIGTERM"])
def test_a_signal_reaches_every_process_once_as_ctrl_c(tmp_path, number):
    script = f"""
came = []
signal.signal(signal.SIGINT, lambda *_: came.append(1))
pathlib.Path({str(tmp_path)!r}, f"ready-{{rank}}").touch()
while not came:
    time.sleep(0.02)
time.sleep(0.5)  # the checkpoint
pathlib.Path({str(tmp_path)!r}, f"came-{{rank}}").write_text(str(len(came)))
sys.exit(130)
"""

    def interrupt() -> None:
        while len(list(tmp_path.glob("ready-*"))) < 2:
            time.sleep(0.02)
        os.kill(os.getpid(), number)

    threading.Thread(target=interrupt, daemon=True).start()
    with pytest.raises(KeyboardInterrupt):
        start(script)
    assert [(tmp_path / f"came-{rank}").read_text() for rank in (0, 1)] == ["1", "1"]
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


END = """
import atexit, sys, threading, time
import torch.distributed
from marval_rl.launched import end_process

def use(store):
    while True:
        store.check(["key"])

atexit.register(lambda: print("exit functions run"))
threading.Thread(target=use, args=(torch.distributed.HashStore(),), daemon=True).start()
threading.Thread(target=lambda: time.sleep(0.2) or print("threads end")).start()
end_process(3)
"""


def test_the_end_of_a_process_waits_for_threads_but_ends_none_that_uses_torch():
    """Python's own end (`sys.exit(3)` in place of the last line) aborts this script: such a thread dies by SIGABRT."""
    ended = subprocess.run([sys.executable, "-c", END], capture_output=True, text=True)
    assert ended.returncode == 3, ended.stderr
    assert ended.stdout.splitlines() == ["threads end", "exit functions run"]


SHORT = {"gsim_weight": 0, "steps_per_generation": 1, "eval_strategy": "no", "eval_on_start": False}
REWARD = '''
import os
import signal

scored = 0


def brightness(images, **columns):
    """Sends a signal when it comes here for that time."""
    global scored
    scored += 1
    if scored == {time} and {condition}:
        os.kill({process}, signal.{signal})
    return images.mean(dim=(1, 2, 3))
'''


def deadly(folder: Path, **signal: Any) -> dict[str, Any]:
    """The settings of a short run by a reward that sends this signal."""
    (folder / "rewards.py").write_text(REWARD.format(**signal))
    return {**SHORT, "reward_funcs": f"{folder / 'rewards.py'}:brightness"}


def test_a_restarted_run_continues_from_its_checkpoint_to_the_end_of_an_undisturbed_one(tiny_runs, tmp_path, capfd):
    first = 'os.environ.get("TORCHELASTIC_RESTART_COUNT") == "0"'
    settings = deadly(tmp_path, time=6, condition=first, process="os.getpid()", signal="SIGKILL")
    settings |= {"max_steps": 8, "save_steps": 3, "model": tiny_runs.student}
    assert main(command_line("grpo", tmp_path / "undisturbed", **settings)) == 0
    crashing = command_line("grpo", tmp_path / "run", "--overwrite_output_dir", "--num_processes", "1", **settings)
    assert main([*crashing, "--max_restarts", "1"]) == 0
    output = capfd.readouterr().err
    assert output.count("marval-rl: process 0 of 1: was killed by SIGKILL; restart 1 of 1") == 1
    assert comparable_lines(tmp_path / "run") == comparable_lines(tmp_path / "undisturbed")
    weights = [(tmp_path / name / "final" / "model.safetensors").read_bytes() for name in ("run", "undisturbed")]
    assert weights[0] == weights[1]


# Two machines, both of them this one


def test_two_machines_train_together_and_stop_together(tiny_runs, tmp_path):
    run = tmp_path / "run"
    # The launcher of the second machine gets the signal.
    settings = deadly(tmp_path, time=3, condition='os.environ["RANK"] == "1"', process="os.getppid()", signal="SIGTERM")
    settings |= {"max_steps": 1000, "save_steps": 1000, "model": tiny_runs.student}
    words = command_line("grpo", run, **settings)
    words += ["--num_processes", "2", "--num_machines", "2", "--main_process_ip", "127.0.0.2"]
    words += ["--main_process_port", str(get_free_port())]
    command = [sys.executable, "-m", "marval_rl", *words, "--machine_rank"]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    machines = [subprocess.Popen([*command, rank], **pipes) for rank in ("0", "1")]
    (output, errors), (silent, others) = (machine.communicate(timeout=240) for machine in machines)
    assert [machine.returncode for machine in machines] == [130, 130], errors + others
    assert [text.splitlines()[-1] for text in (errors, others)] == ["marval-rl: error: interrupted"] * 2
    batch = "images per update: 32 = per_device_train_batch_size 16 x gradient_accumulation_steps 1 x 2 processes"
    assert batch in output
    step = read_lines(run)[-1]["step"]
    assert f"stopped at step {step}: a checkpoint is kept, --resume continues from it" in output
    assert silent == ""
    assert [folder.name for folder in run.glob("checkpoint-*")] == [f"checkpoint-{step}"]
    assert find_checkpoint(run, "latest").name == f"checkpoint-{step}"
