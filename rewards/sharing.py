"""Rewards of one process that use the same network share one copy of it in memory."""

from __future__ import annotations

import copy
from collections.abc import Callable, Hashable
from pathlib import Path
from weakref import WeakKeyDictionary, WeakValueDictionary

import torch
from torch import nn

CPU = torch.device("cpu")

# Weak references: a network lives as long as a reward uses it.
_networks: WeakValueDictionary[tuple[Hashable, torch.device], nn.Module] = WeakValueDictionary()
_sources: WeakKeyDictionary[nn.Module, Hashable] = WeakKeyDictionary()


def shared_network(source: Hashable, load: Callable[[], nn.Module]) -> nn.Module:
    """The network on the CPU that a reward has from this source, or else what load() returns.

    Args:
        source: Everything that tells the network from others: architecture, weights (`weights_identity`), dtype.
        load: Makes the network on the CPU; its weights must not be changed afterwards.
    """
    return _shared(source, CPU, load)


def network_on(network: nn.Module, device: torch.device) -> nn.Module:
    """The network on a device: itself if it is there, else the one that its other users have there, else a copy.

    One that is not shared is moved. A shared one stays where it is for those who still want it there, and is freed
    once the last of them has moved on.
    """
    if next(network.parameters()).device == device:
        return network
    with torch.inference_mode(False):  # weights made in inference mode could not be used with gradients
        source = _sources.get(network)
        if source is None:
            return network.to(device)
        return _shared(source, device, lambda: _copy_to(network, device))


def weights_identity(name_or_path: str) -> Hashable:
    """What identifies the weights of a file, or of the files of a folder: path, time of change and size.

    A name of the hub or of a library, which is not a path, is returned as it is.
    """
    path = Path(name_or_path).resolve()
    if path.is_dir():
        return tuple(weights_identity(str(file)) for file in sorted(path.iterdir()) if file.is_file())
    if path.is_file():
        status = path.stat()
        return str(path), status.st_mtime_ns, status.st_size
    return name_or_path


def _shared(source: Hashable, device: torch.device, make: Callable[[], nn.Module]) -> nn.Module:
    network = _networks.get((source, device))
    if network is None:
        network = make()
        _networks[source, device] = network
        _sources[network] = source
    return network


def _copy_to(network: nn.Module, device: torch.device) -> nn.Module:
    """A copy whose weights are on the device; on the way there they are not doubled where they were."""
    moved = {id(weight): nn.Parameter(weight.to(device), weight.requires_grad) for weight in network.parameters()}
    moved |= {id(buffer): buffer.to(device) for buffer in network.buffers()}
    return copy.deepcopy(network, moved)
