"""A reward's server: what it answers to good, broken, oversized, strange and too many requests."""

from __future__ import annotations

import io
import json
import pickle
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from PIL import Image
from remote_servers import REWARDS, ROOT, ask, body_for, thread_server, wait_until
from safetensors.torch import save

from marval_rl.rewarding.serving import server as server_module
from marval_rl.rewarding.serving.protocol import Limits, MalformedRequest, pack, unpack

LIMITS = Limits(max_images=8, max_bytes=40_000)


def images_of(count: int, height: int = 6, width: int = 5, seed: int = 0) -> torch.Tensor:
    return torch.rand(count, 3, height, width, generator=torch.Generator().manual_seed(seed))


def darkness(*, images, **columns):
    """None for what is darker than 0.4."""
    return [None if value < 0.4 else value for value in images.mean(dim=(1, 2, 3)).tolist()]


@pytest.fixture(scope="module")
def url():
    with thread_server(darkness, limits=LIMITS) as url:
        yield url


# What is said over the wire


@pytest.mark.parametrize("format", ["uint8", "png", "float32"])
def test_a_request_arrives_as_it_was_sent(format):
    images = images_of(3)
    body = pack(images, ["a", "b", "\ud800"], ["x", "y", "z"], [3, -1, 5], {"size": [1, None, [2.5]]}, format)
    request = unpack(body, Limits())
    expected = images if format == "float32" else (images * 255).round() / 255
    assert torch.equal(request.images, expected)
    assert (request.prompts, request.class_names) == (["a", "b", "\ud800"], ["x", "y", "z"])
    assert (request.class_labels, request.columns) == ([3, -1, 5], {"size": [1, None, [2.5]]})


@pytest.mark.parametrize("format", ["uint8", "png", "float32"])
def test_scores_are_the_rewards_own(url, format):
    images = torch.cat([images_of(3), torch.zeros(1, 3, 6, 5), images_of(2, seed=1)])
    if format != "float32":
        images = (images * 255).round() / 255
    assert ask(url, "POST", "/score", body_for(images, format)) == (200, {"scores": darkness(images=images)})


def test_grey_png_files_have_three_equal_channels():
    pixels = torch.arange(30, dtype=torch.uint8)
    buffer = io.BytesIO()
    Image.frombytes("L", (5, 6), bytes(pixels.tolist())).save(buffer, format="PNG")
    request = unpack(with_pngs([buffer.getvalue()]), LIMITS)
    assert torch.equal(request.images, (pixels.float() / 255).view(1, 1, 6, 5).expand(1, 3, 6, 5))


def test_health_and_version(url):
    assert ask(url, "GET", "/health") == (200, {"status": "ok"})
    status, version = ask(url, "GET", "/version")
    assert status == 200 and version["package"] and version["protocol"] == 1
    assert (version["reward"], version["differentiable"]) == ("darkness", False)
    assert (version["max_images"], version["max_bytes"]) == (LIMITS.max_images, LIMITS.max_bytes)


def test_the_reward_is_called_in_portions():
    calls = []

    def counted(*, images, prompts, class_labels, numbers, **columns):
        calls.append((len(images), len(prompts), len(class_labels), numbers))
        return [None if number == 3 else number for number in numbers]

    with thread_server(counted, batch_size=2) as url:
        body = body_for(images_of(5), numbers=[1, 2, 3, 4, 5])
        assert ask(url, "POST", "/score", body) == (200, {"scores": [1, 2, None, 4, 5]})
    assert calls == [(2, 2, 2, [1, 2]), (2, 2, 2, [3, 4]), (1, 1, 1, [5])]


# What is too large


def with_pngs(files: list[bytes]) -> bytes:
    request = {
        "protocol": 1,
        "prompts": ["a"] * len(files),
        "class_names": ["a"] * len(files),
        "class_labels": [0] * len(files),
        "columns": {},
    }
    tensors = {
        f"png/{number}": torch.frombuffer(bytearray(file), dtype=torch.uint8) for number, file in enumerate(files)
    }
    return save(tensors, metadata={"request": json.dumps(request)})


def png(width: int, height: int, mode: str = "RGB") -> bytes:
    buffer = io.BytesIO()
    Image.new(mode, (width, height)).save(buffer, format="PNG")
    return buffer.getvalue()


OVERSIZED = {
    "images": (body_for(images_of(9)), "has 9 images, but at most 8 are allowed"),
    "pngs": (body_for(images_of(9), "png"), "has 9 images, but at most 8 are allowed"),
    "body": (body_for(images_of(8, 60, 60)), "more than 40000 bytes"),
    "much larger body": (bytes(5_000_000), "more than 40000 bytes"),
    "bomb": (with_pngs([png(400, 400)] * 2), "more than 40000 bytes"),  # 3 kB, and 960 kB when decompressed
}


@pytest.mark.parametrize("kind", OVERSIZED)
def test_requests_that_are_too_large_are_refused_with_the_remedy(url, kind):
    body, message = OVERSIZED[kind]
    status, answer = ask(url, "POST", "/score", body)
    assert status == 413 and message in answer["error"] and "start the server with a larger --max_" in answer["error"]


def test_the_bomb_is_small_as_long_as_it_is_packed():
    assert len(OVERSIZED["bomb"][0]) < 4000


def test_the_largest_that_is_allowed_is_scored(url):
    body = body_for(images_of(8, 40, 40))
    assert LIMITS.max_bytes - 2000 < len(body) <= LIMITS.max_bytes
    status, answer = ask(url, "POST", "/score", body)
    assert status == 200 and len(answer["scores"]) == 8


# What is broken


class Hostile:
    def __reduce__(self):
        return exec, ("raise SystemExit('executed')",)


def changed(**changes) -> bytes:
    """A request of two images with some of its fields changed; None deletes one."""
    fields = {"protocol": 1, "prompts": ["a", "b"], "class_names": ["a", "b"], "class_labels": [0, 1], "columns": {}}
    fields = {name: value for name, value in {**fields, **changes}.items() if value is not None}
    return save({"images": torch.zeros(2, 3, 4, 4, dtype=torch.uint8)}, metadata={"request": json.dumps(fields)})


def with_images(**tensors: torch.Tensor) -> bytes:
    metadata = json.dumps({"protocol": 1, "prompts": ["a"], "class_names": ["a"], "class_labels": [0], "columns": {}})
    return save(tensors, metadata={"request": metadata})


WHOLE = body_for(images_of(2))
NAN = torch.full((1, 3, 4, 4), torch.nan)
BROKEN = {
    "empty": (b"", "not a complete safetensors file"),
    "cut in the length": (WHOLE[:5], "not a complete safetensors file"),
    "cut in the header": (WHOLE[:60], "not a complete safetensors file"),
    "cut in the pixels": (WHOLE[:-1], "not a complete safetensors file"),
    "too long": (WHOLE + b"\0", "not a complete safetensors file"),
    "pickle": (pickle.dumps(Hostile()), "not a complete safetensors file"),
    "no metadata": (save({"images": torch.zeros(1, 3, 4, 4)}), "the metadata 'request' is missing"),
    "other metadata": (save({"images": torch.zeros(1, 3, 4, 4)}, {"a": "b"}), "the metadata 'request' is missing"),
    "no json": (save({"images": torch.zeros(1, 3, 4, 4)}, {"request": "{"}), "is not valid JSON"),
    "deep json": (save({"images": torch.zeros(1, 3, 4, 4)}, {"request": "[" * 9000}), "is not valid JSON"),
    "a list": (save({"images": torch.zeros(1, 3, 4, 4)}, {"request": "[]"}), "must be a JSON object"),
    "protocol": (changed(protocol=2), "protocol 2, this server 1"),
    "no protocol": (changed(protocol=None), "protocol None, this server 1"),
    "no prompts": (changed(prompts=None), "prompts must be a list of 2 values"),
    "too few names": (changed(class_names=["a"]), "class_names must be a list of 2 values"),
    "a prompt of another type": (changed(prompts=["a", 3]), "prompts[1] must be of type str, not int"),
    "a label of another type": (changed(class_labels=[0, True]), "class_labels[1] must be of type int, not bool"),
    "a huge label": (changed(class_labels=[0, 2**63]), "class_labels[1] does not fit into 64 bits"),
    "no columns": (changed(columns=None), "columns must be a JSON object"),
    "a short column": (changed(columns={"size": [1]}), "the column 'size' must be a list of 2 values"),
    "a reserved column": (changed(columns={"images": [1, 2]}), "must not be called images"),
    "no images": (with_images(pixels=torch.zeros(1)), 'must be "images", or "png/0"'),
    "both": (with_images(images=torch.zeros(1, 3, 4, 4), **{"png/0": torch.zeros(9)}), 'must be "images", or "png/0"'),
    "grey": (with_images(images=torch.zeros(1, 1, 4, 4)), "must be U8 or F32 [B, 3, H, W], not F32 [1, 1, 4, 4]"),
    "no pixels": (with_images(images=torch.zeros(1, 3, 0, 4)), "must be U8 or F32 [B, 3, H, W], not F32 [1, 3, 0, 4]"),
    "integers": (with_images(images=torch.zeros(1, 3, 4, 4).long()), "must be U8 or F32 [B, 3, H, W], not I64"),
    "out of range": (with_images(images=torch.full((1, 3, 4, 4), 1.5)), "pixels must lie in 0..1"),
    "nan": (with_images(images=NAN), "pixels must lie in 0..1"),
    "no png": (with_pngs([b"GIF89a"]), "png/0 is not a PNG"),
    "cut png": (with_pngs([png(40, 40)[:60]]), "png/0 is a damaged PNG"),
    "sizes": (with_pngs([png(4, 4), png(4, 5)]), "png/1 has (4, 5) pixels and png/0 (4, 4)"),
    "transparent png": (with_pngs([png(4, 4, "RGBA")]), "png/0 has the mode RGBA"),
    "deep png": (with_pngs([png(4, 4, "I;16")]), "send RGB or grey with 8 bits per channel"),
}


@pytest.mark.parametrize("kind", BROKEN)
def test_broken_requests_are_refused_with_the_reason(url, kind):
    body, message = BROKEN[kind]
    status, answer = ask(url, "POST", "/score", body)
    assert status == 400 and message in answer["error"]


def test_no_truncated_request_is_taken_for_a_complete_one():
    for length in range(len(WHOLE)):
        with pytest.raises(MalformedRequest):
            unpack(WHOLE[:length], LIMITS)


def test_a_body_that_stops_coming_frees_its_place(url, monkeypatch):
    monkeypatch.setattr("marval_rl.rewarding.serving.app.BODY_SECONDS", 0.3)
    with thread_server(darkness, max_waiting=0) as url:
        host, port = url.removeprefix("http://").split(":")
        with socket.create_connection((host, int(port))) as half:
            half.sendall(b"POST /score HTTP/1.1\r\nHost: here\r\nContent-Length: 100\r\n\r\nhalf")
            assert b" 408 " in half.recv(1000)
        assert ask(url, "POST", "/score", body_for(images_of(1)))[0] == 200


# Who is let in


def test_a_token_is_asked_of_everything_but_health():
    body = body_for(images_of(2))
    with thread_server(darkness, token="sesame") as url:
        assert ask(url, "GET", "/health")[0] == 200
        for token in (None, "", "sesam", "sesame2", "Sesame", "öffne"):
            for arguments in (("POST", "/score", body), ("GET", "/version", None)):
                header = token if token is None else token.encode("utf-8").decode("latin-1")
                assert ask(url, *arguments, header) == (401, {"error": "missing or wrong token"})
        assert ask(url, "POST", "/score", body, "sesame")[0] == 200
        assert ask(url, "GET", "/version", None, "sesame")[0] == 200


def test_a_large_request_without_the_token_sees_the_answer():
    with thread_server(darkness, token="sesame") as url:
        assert ask(url, "POST", "/score", bytes(20_000_000))[0] == 401


def serve(monkeypatch, capsys, *flags: str) -> str:
    """The line on stderr of a server that does not start."""
    monkeypatch.setattr(sys, "argv", ["server", f"{REWARDS}:brightness", "--port", "0", *flags])
    assert server_module.main() == 1
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1, lines
    return lines[0]


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.0.2.7", "example.org"])
def test_an_address_that_others_can_reach_needs_a_token(monkeypatch, capsys, host):
    monkeypatch.delenv("MARVAL_RL_REWARD_TOKEN", raising=False)
    assert f"--host {host} can be reached from other machines, which needs a token" in serve(
        monkeypatch, capsys, "--host", host
    )


def test_with_a_token_it_may_listen_to_others(monkeypatch):
    """As far as the port, which is taken: nothing is really opened."""
    monkeypatch.setenv("MARVAL_RL_REWARD_TOKEN", "sesame")
    reached = []

    def bind(host, port):
        reached.append(host)
        raise OSError("far enough")

    monkeypatch.setattr(server_module, "_bind", bind)
    monkeypatch.setattr(sys, "argv", ["server", "a:b", "--port", "0", "--host", "0.0.0.0"])
    assert server_module.main() == 1
    assert reached == ["0.0.0.0"]


@pytest.mark.parametrize(("host", "expected"), [("127.0.0.1", True), ("127.1.2.3", True), ("::1", True)])
def test_loopback_addresses(host, expected):
    assert server_module.is_loopback(host) is expected
    assert server_module.is_loopback("localhost")
    assert not server_module.is_loopback("10.0.0.1") and not server_module.is_loopback("")


def test_wrong_arguments_are_refused_in_one_line(monkeypatch, capsys):
    for flags, message in (
        (("--token", ""), "must be printable ASCII without spaces, not empty"),
        (("--token", "two words"), "must be printable ASCII without spaces, not empty"),
        (("--max_images", "0"), "--max_images must be at least 1, not 0"),
        (("--batch_size", "0"), "--batch_size must be at least 1, not 0"),
        (("--max_waiting", "-1"), "--max_waiting must not be negative"),
        (("--reward_kwargs", "{"), "--reward_kwargs must be a mapping"),
        (("--reward_kwargs", "[]"), "--reward_kwargs must be a mapping"),
        (("--reward_kwargs", '{"a": 1}'), "reward 'brightness' is not a class"),
        (("--device", "nowhere"), "--device nowhere cannot be used"),
        (("--port", "70000"), "--port must lie in 0..65535, not 70000"),
    ):
        assert message in serve(monkeypatch, capsys, *flags)
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        assert f"(--host 127.0.0.1 --port {port})" in serve(monkeypatch, capsys, "--port", port)


# Rewards that break the contract


def raises(*, images, **columns):
    raise RuntimeError("out of colours")


def too_few(*, images, **columns):
    return [0.0] * (len(images) - 1)


def not_a_number(*, images, **columns):
    return [0.0, float("nan"), 0.0][: len(images)]


@pytest.mark.parametrize(
    ("reward", "message"),
    [
        (raises, "reward 'raises' raised RuntimeError: out of colours"),
        (too_few, "reward 'too_few' returned 2 scores for 3 images"),
        (not_a_number, "reward 'not_a_number': the score of sample 1 is nan"),
    ],
)
def test_a_reward_that_breaks_the_contract_is_named(reward, message):
    with thread_server(reward) as url:
        status, answer = ask(url, "POST", "/score", body_for(images_of(3)))
        assert status == 422 and message in answer["error"]
        assert ask(url, "GET", "/health")[0] == 200


# Too many at a time


class Gate:
    """A reward that says when it is called and waits to be let through; it scores an image by its column."""

    name = "gate"

    def __init__(self) -> None:
        self.called: list[int] = []
        self.open = threading.Event()

    def __call__(self, *, images, numbers, **columns):
        self.called.append(numbers[0])
        assert self.open.wait(20)
        return numbers


def test_too_many_requests_are_asked_to_retry_and_the_others_are_scored_in_order():
    gate = Gate()
    with thread_server(gate, max_waiting=2) as url, ThreadPoolExecutor(3) as clients:

        def send(number: int):
            return clients.submit(ask, url, "POST", "/score", body_for(images_of(2), numbers=[number, -number]))

        waiting = [send(1)]
        wait_until(lambda: gate.called == [1])
        for number in (2, 3):
            waiting.append(send(number))
            time.sleep(0.1)
        status, answer = ask(url, "POST", "/score", body_for(images_of(2), numbers=[4, -4]))
        assert status == 503 and "busy: 2 requests wait already" in answer["error"]
        assert gate.called == [1]  # one at a time
        gate.open.set()
        assert [one.result() for one in waiting] == [(200, {"scores": [n, -n]}) for n in (1, 2, 3)]
        assert gate.called == [1, 2, 3]
        assert ask(url, "POST", "/score", body_for(images_of(1), numbers=[5]))[0] == 200


def test_a_request_whose_client_went_away_is_not_scored():
    gate = Gate()
    with thread_server(gate, max_waiting=1) as url, ThreadPoolExecutor(1) as clients:
        first = clients.submit(ask, url, "POST", "/score", body_for(images_of(1), numbers=[1]))
        wait_until(lambda: gate.called == [1])
        body = body_for(images_of(1), numbers=[2])
        host, port = url.removeprefix("http://").split(":")
        with socket.create_connection((host, int(port))) as impatient:
            head = f"POST /score HTTP/1.1\r\nHost: here\r\nContent-Length: {len(body)}\r\n\r\n"
            impatient.sendall(head.encode() + body)
            time.sleep(0.2)
        time.sleep(0.2)
        gate.open.set()
        assert first.result()[0] == 200
        assert ask(url, "POST", "/score", body_for(images_of(1), numbers=[3]))[0] == 200
        assert gate.called == [1, 3]


def test_help_does_not_wait_for_torch():
    code = "import sys, marval_rl.cli.rewards; assert not {'torch', 'fastapi', 'uvicorn'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT, timeout=60)
