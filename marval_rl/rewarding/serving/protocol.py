"""What is sent: one safetensors file per request with JSON in its metadata, and JSON back. Nothing is ever unpickled.

A request to score B images of one size, the body of POST /score:

    tensors    "images"                 uint8 [B, 3, H, W], or float32 in 0..1
               or "png/0".."png/{B-1}"  uint8 [bytes]: PNG files, 8 bits per channel, RGB or grey
    metadata   "request": JSON {"protocol": 1, "prompts": [...], "class_names": [...], "class_labels": [...],
                                "columns": {name: [...]}}, each list of length B

The answer is {"scores": [number or null, ...]} or, with another status than 200, {"error": text}.
"""

from __future__ import annotations

import io
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image
from safetensors import SafetensorError, deserialize
from safetensors.torch import save
from torch import Tensor

PROTOCOL = 1
FORMATS = ("uint8", "png", "float32")
DTYPES = {"U8": torch.uint8, "F32": torch.float32}  # by safetensors' names
PNG_MODES = {"RGB": 3, "L": 1}  # channels


class MalformedRequest(ValueError):
    """The body is not a valid request (status 400)."""


class RequestTooLarge(ValueError):
    """The body is a request for more than the server takes (status 413)."""


@dataclass(frozen=True)
class Limits:
    """max_images: of a request. max_bytes: of a request's body, and of its images when they are unpacked."""

    max_images: int = 256
    max_bytes: int = 64 * 2**20


@dataclass(frozen=True)
class ScoreRequest:
    """images: float32 [B, 3, H, W] in 0..1; the lists have length B."""

    images: Tensor
    prompts: list[str]
    class_names: list[str]
    class_labels: list[int]
    columns: dict[str, list[Any]]


def pack(
    images: Tensor,
    prompts: Sequence[str],
    class_names: Sequence[str],
    class_labels: Sequence[int],
    columns: Mapping[str, Sequence[Any]],
    format: str,
) -> bytes:
    """The body for images [B, 3, H, W] in 0..1 on any device.

    Args:
        format: "uint8" rounds to whole bytes, "png" does too and compresses them, "float32" keeps every bit. Images
            that come from files are whole bytes.

    Raises:
        ValueError: For a column that JSON cannot carry.
    """
    request = {
        "protocol": PROTOCOL,
        "prompts": list(prompts),
        "class_names": list(class_names),
        "class_labels": [int(label) for label in class_labels],
        "columns": {name: _checked_column(name, list(values)) for name, values in columns.items()},
    }
    return save(_pack_images(images.detach(), format), metadata={"request": json.dumps(request)})


def unpack(body: bytes, limits: Limits) -> ScoreRequest:
    """The request in a body, which may hold anything.

    Raises:
        MalformedRequest: For a body that is not a valid request.
        RequestTooLarge: For one that exceeds the limits; sizes are checked before memory is allocated.
    """
    if len(body) > limits.max_bytes:
        raise too_many_bytes(limits)
    try:
        entries = dict(deserialize(body))
    except SafetensorError as error:
        raise MalformedRequest(f"the body is not a complete safetensors file ({error}); was it cut off?") from error
    request = _read_metadata(body)
    images = _unpack_images(entries, limits)
    return ScoreRequest(images, **_checked_lists(request, len(images)))


def too_many_bytes(limits: Limits) -> RequestTooLarge:
    return RequestTooLarge(
        f"the request has more than {limits.max_bytes} bytes, as sent or unpacked; send fewer images per request, "
        "or start the server with a larger --max_bytes"
    )


def _checked_column(name: str, values: list[Any]) -> list[Any]:
    try:
        json.dumps(values, allow_nan=False)
    except (TypeError, ValueError, RecursionError) as error:
        raise ValueError(
            f"the column {name!r} cannot be sent to a remote reward, which takes text, finite numbers, true, false, "
            f"null, and lists and dicts of these: {error}"
        ) from error
    return values


def _pack_images(images: Tensor, format: str) -> dict[str, Tensor]:
    if format == "float32":
        return {"images": images.float().cpu().contiguous()}
    pixels = (images * 255).round().to(torch.uint8).cpu()
    if format == "uint8":
        return {"images": pixels.contiguous()}
    return {f"png/{number}": _to_png(image) for number, image in enumerate(pixels)}


def _to_png(image: Tensor) -> Tensor:
    """uint8 [3, H, W] -> the bytes of a PNG file, uint8 [bytes]."""
    buffer = io.BytesIO()
    Image.fromarray(image.permute(1, 2, 0).contiguous().numpy()).save(buffer, format="PNG")
    return torch.frombuffer(bytearray(buffer.getvalue()), dtype=torch.uint8)


def _read_metadata(body: bytes) -> dict[str, Any]:
    length = int.from_bytes(body[:8], "little")  # `deserialize` has checked the header
    header = json.loads(body[8 : 8 + length])
    try:
        request = json.loads(header["__metadata__"]["request"])
    except KeyError as error:
        raise MalformedRequest("the metadata 'request' is missing") from error
    except (ValueError, RecursionError) as error:
        raise MalformedRequest(f"the metadata 'request' is not valid JSON: {error}") from error
    if not isinstance(request, dict):
        raise MalformedRequest("the metadata 'request' must be a JSON object")
    if request.get("protocol") != PROTOCOL:
        raise MalformedRequest(
            f"the request has protocol {request.get('protocol')!r}, this server {PROTOCOL}; "
            "install one version of marval-rl on both sides"
        )
    return request


def _checked_lists(request: dict[str, Any], count: int) -> dict[str, Any]:
    lists = {}
    for name, kind in (("prompts", str), ("class_names", str), ("class_labels", int)):
        values = request.get(name)
        if not isinstance(values, list) or len(values) != count:
            raise MalformedRequest(f"{name} must be a list of {count} values, one per image")
        for index, value in enumerate(values):
            if type(value) is not kind:  # JSON's true is not a number here, though Python's is
                raise MalformedRequest(f"{name}[{index}] must be of type {kind.__name__}, not {type(value).__name__}")
            if isinstance(value, int) and not -(2**63) <= value < 2**63:
                raise MalformedRequest(f"{name}[{index}] does not fit into 64 bits")
        lists[name] = values
    columns = request.get("columns")
    if not isinstance(columns, dict):
        raise MalformedRequest("columns must be a JSON object of lists")
    for name, values in columns.items():
        if not isinstance(values, list) or len(values) != count:
            raise MalformedRequest(f"the column {name!r} must be a list of {count} values, one per image")
    return {**lists, "columns": columns}


def _unpack_images(entries: dict[str, dict[str, Any]], limits: Limits) -> Tensor:
    """float32 [B, 3, H, W]; their values are checked where they are scored."""
    if set(entries) == {"images"}:
        return _raw_images(entries["images"], limits)
    names = [f"png/{number}" for number in range(len(entries))]
    if not entries or set(entries) != set(names):
        raise MalformedRequest('the tensors must be "images", or "png/0", "png/1" and so on')
    _check_count(len(names), limits)
    pictures = [_open_png(name, entries[name]) for name in names]
    width, height = pictures[0].size
    if 3 * width * height * len(pictures) > limits.max_bytes:  # before anything is decompressed
        raise too_many_bytes(limits)
    for name, picture in zip(names, pictures, strict=True):
        if picture.size != (width, height):
            raise MalformedRequest(f"{name} has {picture.size} pixels and png/0 {(width, height)}; send one size")
    return torch.stack([_decode(name, picture) for name, picture in zip(names, pictures, strict=True)]).float() / 255


def _raw_images(entry: dict[str, Any], limits: Limits) -> Tensor:
    shape, dtype = entry["shape"], entry["dtype"]
    if dtype not in DTYPES or len(shape) != 4 or shape[1] != 3 or math.prod(shape) == 0:
        raise MalformedRequest(f"images must be U8 or F32 [B, 3, H, W], not {dtype} {shape}")
    _check_count(shape[0], limits)
    images = torch.frombuffer(entry["data"], dtype=DTYPES[dtype]).view(shape)
    return images.float() / 255 if images.dtype == torch.uint8 else images


def _check_count(count: int, limits: Limits) -> None:
    if count > limits.max_images:
        raise RequestTooLarge(
            f"the request has {count} images, but at most {limits.max_images} are allowed; send fewer per request, "
            "or start the server with a larger --max_images"
        )


def _open_png(name: str, entry: dict[str, Any]) -> Image.Image:
    """Reads the size and the mode only."""
    try:
        picture = Image.open(io.BytesIO(entry["data"]), formats=["PNG"])
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:  # what Pillow raises on bad data
        raise MalformedRequest(f"{name} is not a PNG: {error}") from error
    if picture.mode not in PNG_MODES:
        raise MalformedRequest(f"{name} has the mode {picture.mode}; send RGB or grey with 8 bits per channel")
    return picture


def _decode(name: str, picture: Image.Image) -> Tensor:
    """uint8 [3, H, W]."""
    try:
        pixels = bytearray(picture.tobytes())
    except (OSError, SyntaxError, ValueError) as error:
        raise MalformedRequest(f"{name} is a damaged PNG: {error}") from error
    image = torch.frombuffer(pixels, dtype=torch.uint8).view(picture.height, picture.width, PNG_MODES[picture.mode])
    return image.permute(2, 0, 1).expand(3, -1, -1)
