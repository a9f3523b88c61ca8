"""Serves a reward by HTTP, to whoever scores with the reward `remote`.

`marval-rl rewards serve SPEC`, or `python -m marval_rl.rewarding.serving.server SPEC` in an environment that has a
reward's own dependencies and not this package's: torch, safetensors, Pillow, PyYAML, FastAPI and uvicorn are enough.
"""

from __future__ import annotations

import argparse
import ipaddress
import os
import socket
import sys
from typing import Any

from marval_rl.errors import MarvalError
from marval_rl.rewarding.arguments import add_reward_arguments, parse_kwargs

TOKEN_VARIABLE = "MARVAL_RL_REWARD_TOKEN"
SHUTDOWN_SECONDS = 10  # given to running requests when the server is asked to end


def add_serve_arguments(parser: argparse.ArgumentParser) -> None:
    add_reward_arguments(parser)
    parser.add_argument("--port", type=int, required=True, metavar="N", help="0 picks a free one")
    parser.add_argument(
        "--host", default="127.0.0.1", help="address to listen on; any but this machine's needs a token"
    )
    parser.add_argument(
        "--token", help=f"what clients must know; better given by ${TOKEN_VARIABLE}, which no process list shows"
    )
    parser.add_argument("--max_images", type=int, default=256, metavar="N", help="images of a request (256)")
    parser.add_argument(
        "--max_bytes", type=int, default=64 * 2**20, metavar="N", help="bytes of a request, sent or unpacked (64 MiB)"
    )
    parser.add_argument(
        "--max_waiting", type=int, default=16, metavar="N", help="requests that may wait; more are asked to retry (16)"
    )
    parser.add_argument("--batch_size", type=int, metavar="N", help="images a call of the reward (all of a request)")
    parser.add_argument("--device", help="such as cuda:1; the default is cuda if there is one, else cpu")


def serve(args: argparse.Namespace) -> None:
    """Load the reward and serve it until interrupted.

    Raises:
        ValueError: For invalid arguments, for an address that is not this machine's own without a token, and
            for a reward that cannot be loaded.
        OSError: For a port that is taken.
    """
    kwargs = parse_kwargs(args.reward_kwargs)
    token = read_token(args.token)
    for name in ("max_images", "max_bytes", "batch_size"):
        value = vars(args)[name]
        if value is not None and value < 1:
            raise ValueError(f"--{name} must be at least 1, not {value}")
    if args.max_waiting < 0:
        raise ValueError(f"--max_waiting must not be negative, but is {args.max_waiting}")
    if token is None and not is_loopback(args.host):
        raise ValueError(
            f"--host {args.host} can be reached from other machines, which needs a token: set {TOKEN_VARIABLE} here "
            "and for the clients (or stay with --host 127.0.0.1)"
        )
    try:
        import uvicorn

        from marval_rl.rewarding.serving.app import Scorer, make_app
    except ImportError as error:
        raise ValueError(f"a server needs FastAPI and uvicorn ({error}): pip install 'marval-rl[serve]'") from error
    from marval_rl.rewarding.serving.protocol import Limits

    with _bind(args.host, args.port) as listener:  # first, so that a port that is taken is known before a long loading
        scorer = Scorer(
            _load(args.spec, kwargs), _device(args.device), Limits(args.max_images, args.max_bytes), args.batch_size
        )
        config = uvicorn.Config(
            make_app(scorer, args.max_waiting, token),
            log_level="warning",
            access_log=False,
            timeout_graceful_shutdown=SHUTDOWN_SECONDS,
        )
        host, port = listener.getsockname()[:2]
        address = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
        print(f"reward {scorer.name!r} on {scorer.device} is served at http://{address}", flush=True)
        uvicorn.Server(config).run(sockets=[listener])


def read_token(given: str | None) -> str | None:
    """The token that was given, else the one in the environment, else None. Raises ValueError for one that no header
    can carry."""
    token = os.environ.get(TOKEN_VARIABLE) if given is None else given
    if token is not None and not (token.isascii() and token.isprintable() and token and " " not in token):
        raise ValueError(
            f"the reward token (${TOKEN_VARIABLE} or token) must be printable ASCII without spaces, not empty"
        )
    return token


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach what listens on host."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:  # a name
        return host == "localhost"


def _load(spec: str, kwargs: dict[str, Any]) -> Any:
    from marval_rl.rewarding import RewardSet
    from marval_rl.rewarding.loading import reward_name

    return RewardSet([spec], reward_kwargs={reward_name(spec): kwargs})


def _device(name: str | None) -> str:
    import torch

    if name is None:
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError) as error:  # torch without CUDA asserts
        raise ValueError(f"--device {name} cannot be used: {error}") from error
    return name


def _bind(host: str, port: int) -> socket.socket:
    """A socket that holds the port and does not listen yet: whoever connects is refused until the reward is there."""
    if not 0 <= port <= 65535:
        raise ValueError(f"--port must lie in 0..65535, not {port}")
    family, kind, protocol, _, address = socket.getaddrinfo(
        host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
    )[0]
    listener = socket.socket(family, kind, protocol)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # a server may start again where one has just ended
    try:
        listener.bind(address)
    except OSError as error:
        listener.close()
        raise OSError(error.errno, f"{error.strerror} (--host {host} --port {port})") from error
    return listener


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m marval_rl.rewarding.serving.server", description=__doc__)
    add_serve_arguments(parser)
    try:
        serve(parser.parse_args())
    except KeyboardInterrupt:
        return 130
    except (MarvalError, ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
