"""Reading a file that torch.save wrote, without running any code that it names.

Such a file is a pickle, and unpickling may call any function the file names. So `torch.load` gets `weights_only=True`:
it knows tensors and plain values, and refuses every other name. The official checkpoints hold one more thing, their
command line as an `argparse.Namespace`, and that class alone is allowed beside them.
"""

from __future__ import annotations

import argparse
import pickletools
import re
import warnings
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from marval_rl.errors import CheckpointError

ZIP_START = b"PK\x03\x04"
PICKLE_START = b"\x80"
LEGACY_START = b"\x80\x02\x8a\x0al\xfc\x9cF\xf9 j\xa8P\x19."  # torch.save before 1.6: a magic number, pickled first


def read_checkpoint(path: str | Path) -> dict[str, Any]:
    """What an official file holds, on the CPU; the tensors of a zip file stay on disk until they are read.

    Raises:
        CheckpointError: If there is no such file, if it is not a checkpoint, or damaged, or if it names anything that
            is neither a tensor nor a plain value.
    """
    path = Path(path)
    if path.is_dir():
        raise CheckpointError(f"{path} is a folder: give the checkpoint file in it ({path / 'checkpoint-last.pth'})")
    if not path.is_file():
        raise CheckpointError(f"no checkpoint at {path}: the file does not exist")
    is_zip = _check_format(path)
    try:
        with warnings.catch_warnings(), torch.serialization.safe_globals([argparse.Namespace]):
            warnings.simplefilter("ignore")  # about pickles that are refused anyway
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=is_zip)
    except Exception as error:  # a damaged or hostile pickle fails anywhere inside the unpickler, in any way
        raise CheckpointError(_explain(path, error)) from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} is not a checkpoint: it holds a {type(content).__name__}, not a dict")
    # Here and below `dict.items`: an OrderedDict in the file may bring an attribute `items` of its own.
    return dict(dict.items(content))


def weights_of(content: Mapping[str, Any], key: str, path: Path) -> dict[str, Tensor]:
    """The state dict under `key`: names and float32 tensors that hold data. Their values are not looked at.

    Raises:
        CheckpointError: If there is no such key, or if it holds anything else.
    """
    if key not in content:
        raise CheckpointError(f"{path} has no {key!r} weights; it holds {_some(content)}")
    state = content[key]
    if not isinstance(state, dict) or not state:
        raise CheckpointError(f"{key!r} of {path} holds no weights: it is a {type(state).__name__}")
    return {name: _plain_tensor(name, value, path) for name, value in dict.items(state)}


def arguments_of(content: Mapping[str, Any], path: Path) -> dict[str, Any]:
    """The official command line that the file keeps as `args`; empty where it keeps none. Raises CheckpointError."""
    args = content.get("args", argparse.Namespace())
    if type(args) is not argparse.Namespace:
        raise CheckpointError(f"'args' of {path} is a {type(args).__name__}, not an argparse.Namespace")
    return dict(vars(args))


def check_finite(weights: Mapping[str, Tensor], path: Path) -> None:
    """Raises CheckpointError for the first weight that holds NaN or infinity."""
    for name, tensor in weights.items():
        if not tensor.isfinite().all():
            raise CheckpointError(f"the weight {name} of {path} holds NaN or infinity")


def _check_format(path: Path) -> bool:
    """Whether the file is a zip (else a legacy file of torch.save). Raises CheckpointError for everything else."""
    with path.open("rb") as file:
        start = file.read(64)
    if not start:
        raise CheckpointError(f"{path} is empty: its writing or download was cut off")
    if path.suffix == ".safetensors" or start[8:10] == b'{"':
        raise CheckpointError(
            f"{path} is a safetensors file, not an official checkpoint: give the model folder it lies in"
        )
    if start.startswith(ZIP_START):
        _check_zip(path)
        return True
    if start.startswith(LEGACY_START):
        return False
    if start.startswith(PICKLE_START):
        raise CheckpointError(f"{path} is a bare pickle, not a file of torch.save, and was not opened{_code_in(path)}")
    if start.lstrip().startswith(b"<"):
        raise CheckpointError(f"{path} is a web page, not a checkpoint: the download failed")
    raise CheckpointError(f"{path} is not a checkpoint: it begins with {start[:8]!r}")


def _check_zip(path: Path) -> None:
    try:
        with zipfile.ZipFile(path) as archive:
            members = archive.infolist()
    # Of these, zipfile raises NotImplementedError for a version of zip that it does not know.
    except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError) as error:
        raise CheckpointError(f"{path} is truncated or damaged: {error} (download or copy it again)") from error
    names = {member.filename.split("/", 1)[-1] for member in members}
    if "constants.pkl" in names:
        raise CheckpointError(f"{path} is a TorchScript program, not a checkpoint")
    if "data.pkl" not in names:
        raise CheckpointError(f"{path} is a zip file, but torch.save did not write it (it has no data.pkl)")
    if any(member.compress_type != zipfile.ZIP_STORED for member in members):
        # Compressed tensors cannot be mapped from disk, and a small file could unpack to any size.
        raise CheckpointError(f"{path} is compressed, which torch.save never does: it was packed again by something")


def _plain_tensor(name: Any, value: Any, path: Path) -> Tensor:
    """A contiguous float32 tensor without gradient. Raises CheckpointError for anything else."""
    if type(name) is not str or not name.isprintable():  # it will appear in messages, on a terminal
        raise CheckpointError(f"{path} has a weight without a proper name: {name!r:.40}")
    if type(value) not in (Tensor, nn.Parameter):
        raise CheckpointError(f"{name} of {path} is not a tensor but a {type(value).__name__}")
    tensor = value.detach()
    if tensor.layout is not torch.strided or tensor.is_quantized or tensor.is_meta:
        raise CheckpointError(
            f"{name} of {path} is a sparse or quantised tensor, or one without data, not plain numbers"
        )
    if tensor.dtype != torch.float32:
        raise CheckpointError(f"{name} of {path} holds {tensor.dtype}; official weights are torch.float32")
    if tensor.numel() == 0:
        raise CheckpointError(f"{name} of {path} is empty: its shape is {list(tensor.shape)}")
    if tensor.numel() * tensor.element_size() > tensor.untyped_storage().nbytes():
        raise CheckpointError(f"{name} of {path} claims {tensor.numel():,} numbers, but the file has fewer")
    return tensor.contiguous()


def _explain(path: Path, error: Exception) -> str:
    """One line about a file that torch.load refused; its own messages suggest switching the safety off."""
    forbidden = re.search(r"GLOBAL (\S+)", str(error))
    if forbidden is not None:
        name = forbidden[1] if forbidden[1].isprintable() else ascii(forbidden[1])
        return f"{path} names {name}, which does not belong to weights: loading it could run code, so it was refused"
    if isinstance(error, EOFError | RuntimeError):
        return f"{path} is truncated or damaged (download or copy it again)"
    return f"{path} is damaged, or was not pickled by torch.save: it was not opened further{_code_in(path)}"


def _code_in(path: Path) -> str:
    """ " (it names os.system)": the first functions or classes that a file's pickle names besides weights, if any.

    Only its opcodes are read; nothing is unpickled.
    """
    names, strings = [], [""]
    try:
        for opcode, argument, _ in pickletools.genops(_pickle_in(path)):
            if argument is not None and opcode.name in ("GLOBAL", "INST"):
                names.append(argument.replace(" ", "."))
            elif opcode.name == "STACK_GLOBAL":
                names.append(".".join(strings[-2:]))
            elif isinstance(argument, str):
                strings.append(argument)
    except (ValueError, zipfile.BadZipFile):  # damaged: nothing more to tell
        pass
    known = ("torch.", "collections.", "argparse.")
    names = [name for name in dict.fromkeys(names) if name.isprintable() and not name.startswith(known)]
    return f" (it names {', '.join(names[:3])})" if names else ""


def _pickle_in(path: Path) -> bytes:
    if not zipfile.is_zipfile(path):
        with path.open("rb") as file:
            return file.read(2**20)
    with zipfile.ZipFile(path) as archive:
        return archive.read(next(name for name in archive.namelist() if name.endswith("data.pkl")))


def _some(content: Mapping[Any, Any]) -> str:
    """The first keys of a dict, for a message."""
    return ", ".join(f"{key!r:.40}" for key in list(content)[:5]) + (", ..." if len(content) > 5 else "") or "nothing"
