"""A reward's server: what it answers to good, broken, oversized, strange and too many requests."""

from __future__ import annotations

import json
import pickle
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from PIL import Image
from remote_servers import REWARDS, ROOT, ask, body_for, thread_server, wait_until
from safetensors.torch import save
from tiny_images import png_bytes

from marval_rl.rewarding.serving import server as server_module
from marval_rl.rewarding.serving.protocol import Limits, MalformedRequest, pack, unpack

LIMITS = Limits(max_images=8, max_bytes=40_000)
FORMATS = pytest.mark.parametrize("format", ["uint8", "png", "float32"])


def images_of(count: int, height: int = 6, width: int = 5, seed: int = 0) -> torch.Tensor:
    return torch.rand(count, 3, height, width, generator=torch.Generator().manual_seed(seed))


def darkness(*, images, **columns):
    """None for what is darker than 0.4."""
    return [None if value < 0.4 else value for value in images.mean(dim=(1, 2, 3)).tolist()]


@pytest.fixture(scope="module")
def url():
    with thread_server(darkness, limits=LIMITS) as url:
        yield url


def score(url: str, body: bytes, token: str | None = None) -> tuple[int, Any]:
    return ask(url, "POST", "/score", body, token)


def request(count: int, tensors: dict[str, torch.Tensor], **changes: Any) -> bytes:
    """A request of so many images with some of its fields changed; None deletes one."""
    texts = [f"a {number}" for number in range(count)]
    fields = {"protocol": 1, "prompts": texts, "class_names": texts, "class_labels": [0] * count, "columns": {}}
    fields = {name: value for name, value in {**fields, **changes}.items() if value is not None}
    return save(tensors, metadata={"request": json.dumps(fields)})


def changed(**changes: Any) -> bytes:
    return request(2, {"images": torch.zeros(2, 3, 4, 4, dtype=torch.uint8)}, **changes)


def with_images(**tensors: torch.Tensor) -> bytes:
    return request(1, tensors)


def with_pngs(*files: bytes) -> bytes:
    return request(
        len(files), {f"png/{n}": torch.tensor(list(file), dtype=torch.uint8) for n, file in enumerate(files)}
    )


def png(width: int, height: int, mode: str = "RGB") -> bytes:
    return png_bytes(Image.new(mode, (width, height)))


# What is said over the wire


@FORMATS
def test_a_request_arrives_as_it_was_sent(format):
    images = images_of(3)
    body = pack(images, ["a", "b", "\ud800"], ["x", "y", "z"], [3, -1, 5], {"size": [1, None, [2.5]]}, format)
    request = unpack(body, Limits())
    expected = images if format == "float32" else (images * 255).round() / 255
    assert torch.equal(request.images, expected)
    assert (request.prompts, request.class_names) == (["a", "b", "\ud800"], ["x", "y", "z"])
    assert (request.class_labels, request.columns) == ([3, -1, 5], {"size": [1, None, [2.5]]})


@FORMATS
def test_scores_are_the_rewards_own(url, format):
    images = torch.cat([images_of(3), torch.zeros(1, 3, 6, 5), images_of(2, seed=1)])
    if format != "float32":
        images = (images * 255).round() / 255
    assert score(url, body_for(images, format)) == (200, {"scores": darkness(images=images)})


def test_grey_png_files_have_three_equal_channels():
    grey = with_pngs(png_bytes(Image.frombytes("L", (5, 6), bytes(range(30)))))
    assert torch.equal(unpack(grey, LIMITS).images, (torch.arange(30) / 255).view(1, 1, 6, 5).expand(1, 3, 6, 5))


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
        assert score(url, body) == (200, {"scores": [1, 2, None, 4, 5]})
    assert calls == [(2, 2, 2, [1, 2]), (2, 2, 2, [3, 4]), (1, 1, 1, [5])]


# What is too large


OVERSIZED = {
    "images": (body_for(images_of(9)), "has 9 images, but at most 8 are allowed"),
    "pngs": (body_for(images_of(9), "png"), "has 9 images, but at most 8 are allowed"),
    "body": (body_for(images_of(8, 60, 60)), "more than 40000 bytes"),
    "much larger body": (bytes(5_000_000), "more than 40000 bytes"),
    "bomb": (with_pngs(*[png(400, 400)] * 2), "more than 40000 bytes"),  # 3 kB, and 960 kB when decompressed
}


@pytest.mark.parametrize("kind", OVERSIZED)
def test_requests_that_are_too_large_are_refused_with_the_remedy(url, kind):
    body, message = OVERSIZED[kind]
    status, answer = score(url, body)
    assert status == 413 and message in answer["error"] and "start the server with a larger --max_" in answer["error"]
    assert kind != "bomb" or len(body) < 4000


def test_the_largest_that_is_allowed_is_scored(url):
    body = body_for(images_of(8, 40, 40))
    assert LIMITS.max_bytes - 2000 < len(body) <= LIMITS.max_bytes
    status, answer = score(url, body)
    assert status == 200 and len(answer["scores"]) == 8


# What is broken


class Hostile:
    def __reduce__(self):
        return exec, ("raise SystemExit('executed')",)


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
    "no png": (with_pngs(b"GIF89a"), "png/0 is not a PNG"),
    "cut png": (with_pngs(png(40, 40)[:60]), "png/0 is a damaged PNG"),
    "sizes": (with_pngs(png(4, 4), png(4, 5)), "png/1 has (4, 5) pixels and png/0 (4, 4)"),
    "transparent png": (with_pngs(png(4, 4, "RGBA")), "png/0 has the mode RGBA"),
    "deep png": (with_pngs(png(4, 4, "I;16")), "send RGB or grey with 8 bits per channel"),
}


@pytest.mark.parametrize("kind", BROKEN)
def test_broken_requests_are_refused_with_the_reason(url, kind):
    body, message = BROKEN[kind]
    status, answer = score(url, body)
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
        assert score(url, body_for(images_of(1)))[0] == 200


# Who is let in


def test_a_token_is_asked_of_everything_but_health():
    body = body_for(images_of(2))
    with thread_server(darkness, token="sesame") as url:
        assert ask(url, "GET", "/health")[0] == 200
        for token in (None, "", "sesam", "sesame2", "Sesame", "öffne"):
            header = token if token is None else token.encode("utf-8").decode("latin-1")
            for answer in (score(url, body, header), ask(url, "GET", "/version", token=header)):
                assert answer == (401, {"error": "missing or wrong token"})
        assert score(url, body, "sesame")[0] == 200
        assert ask(url, "GET", "/version", token="sesame")[0] == 200


def test_a_large_request_without_the_token_sees_the_answer():
    with thread_server(darkness, token="sesame") as url:
        assert score(url, bytes(20_000_000))[0] == 401


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
    refusal = serve(monkeypatch, capsys, "--host", host)
    assert f"--host {host} can be reached from other machines, which needs a token" in refusal


def test_with_a_token_it_may_listen_to_others(monkeypatch, capsys):
    """As far as the port: nothing is really opened."""

    def bind(host: str, port: int) -> None:
        raise OSError(f"far enough with {host}")

    monkeypatch.setenv("MARVAL_RL_REWARD_TOKEN", "sesame")
    monkeypatch.setattr(server_module, "_bind", bind)
    assert "far enough with 0.0.0.0" in serve(monkeypatch, capsys, "--host", "0.0.0.0")


def test_loopback_addresses():
    assert all(map(server_module.is_loopback, ("127.0.0.1", "127.1.2.3", "::1", "localhost")))
    assert not any(map(server_module.is_loopback, ("10.0.0.1", "")))


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


def test_a_reward_that_breaks_the_contract_is_named():
    """How else it may break it: tests/test_contract_violations.py."""
    with thread_server(raises) as url:
        status, answer = score(url, body_for(images_of(3)))
        assert status == 422 and "reward 'raises' raised RuntimeError: out of colours" in answer["error"]
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
            return clients.submit(score, url, body_for(images_of(2), numbers=[number, -number]))

        waiting = [send(1)]
        wait_until(lambda: gate.called == [1])
        for number in (2, 3):
            waiting.append(send(number))
            time.sleep(0.1)
        status, answer = score(url, body_for(images_of(2), numbers=[4, -4]))
        assert status == 503 and "busy: 2 requests wait already" in answer["error"]
        assert gate.called == [1]  # one at a time
        gate.open.set()
        assert [one.result() for one in waiting] == [(200, {"scores": [n, -n]}) for n in (1, 2, 3)]
        assert gate.called == [1, 2, 3]
        assert score(url, body_for(images_of(1), numbers=[5]))[0] == 200


def test_a_request_whose_client_went_away_is_not_scored():
    gate = Gate()
    with thread_server(gate, max_waiting=1) as url, ThreadPoolExecutor(1) as clients:
        first = clients.submit(score, url, body_for(images_of(1), numbers=[1]))
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
        assert score(url, body_for(images_of(1), numbers=[3]))[0] == 200
        assert gate.called == [1, 3]


def test_help_does_not_wait_for_torch():
    code = "import sys, marval_rl.cli.rewards; assert not {'torch', 'fastapi', 'uvicorn'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT, timeout=60)
