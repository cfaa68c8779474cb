"""``pier run`` for models that make pictures: the answer is a file, or several."""

from __future__ import annotations

import base64
import re
import secrets
import sys
from pathlib import Path
from typing import Any

from pierhead.cli.output import print_json, say
from pierhead.cli.work import ask, send
from pierhead.errors import UsageError
from pierhead.paths import Paths
from pierhead.store.model import ModelRecord

_KINDS = {".png": "png", ".jpg": "jpeg", ".jpeg": "jpeg", ".webp": "webp"}
_MOST_IMAGE = 64 << 20


def paints(record: ModelRecord) -> bool:
    """Whether the model makes pictures."""
    return record.metadata.get("type") == "diffusion"


def paint(paths: Paths, record: ModelRecord, prompt: str, given: dict[str, Any], *, as_json: bool) -> None:
    """One picture, written into a file that is named on stdout; of an ``--image`` it makes another."""
    if not prompt:
        raise UsageError(
            f"'{record.name}' makes pictures: say of what",
            hint=f'Type `pier run {record.name} "a lighthouse at dusk"`.',
        )
    output = str(given["output"] or "")
    kind = _KINDS.get(Path(output).suffix.lower(), "") if output not in ("", "-") else "png"
    if not kind:
        raise UsageError(f"{output} has no ending of a picture", hint="Write .png, .jpg or .webp.")
    fields: dict[str, Any] = {"model": record.name, "prompt": prompt, "output_format": kind}
    if given["seed"] is not None:
        fields["seed"] = given["seed"]
    answer = _ask(paths, fields, [Path(image) for image in given["images"]])
    (made,) = answer["data"]
    data = base64.b64decode(made["b64_json"])
    if output == "-":
        sys.stdout.buffer.write(data)
        return
    path = _written(data, Path(output)) if output else _beside(data, record.name)
    if as_json:
        print_json({"model": record.name, "files": [str(path)], "seed": made.get("seed"), "size": answer.get("size")})
        return
    print(path)  # noqa: T201
    say(f"{answer.get('size', '')} pixels, seed {made.get('seed')}: the same seed gives the same picture.")


def _written(data: bytes, path: Path) -> Path:
    try:
        path.write_bytes(data)
    except OSError as exc:
        raise UsageError(f"cannot write {path}: {exc.strerror}", hint="Name another --output.") from exc
    return path


def _beside(data: bytes, model: str) -> Path:
    """A new file in the current folder, named like the model; nothing is written over."""
    stem = re.sub(r"[^A-Za-z0-9._-]+", "-", model.rpartition("/")[2]).strip(".-") or "picture"
    number = 1
    while True:
        path = Path(f"{stem}.png" if number == 1 else f"{stem}-{number}.png")
        try:
            with path.open("xb") as file:
                file.write(data)
        except FileExistsError:
            number += 1
        except OSError as exc:
            raise UsageError(f"cannot write {path}: {exc.strerror}", hint="Name a file with --output.") from exc
        else:
            return path


def _ask(paths: Paths, fields: dict[str, Any], images: list[Path]) -> Any:
    """The gateway's answer; its refusal as the error that it means."""
    if images:
        kind, body = _form(fields, images)
        return send(paths, "POST", "/v1/images/edits", body, kind)
    return ask(paths, "/v1/images/generations", fields)


def _form(fields: dict[str, Any], images: list[Path]) -> tuple[str, bytes]:
    """A multipart form and its type."""
    mark = secrets.token_hex(16)
    parts: list[bytes] = []
    for name, value in fields.items():
        parts.append(f'--{mark}\r\nContent-Disposition: form-data; name="{name}"\r\n\r\n{value}\r\n'.encode())
    for path in images:
        head = f'--{mark}\r\nContent-Disposition: form-data; name="image"; filename="picture"\r\n\r\n'.encode()
        parts.append(head + _read(path) + b"\r\n")
    return f"multipart/form-data; boundary={mark}", b"".join(parts) + f"--{mark}--\r\n".encode()


def _read(path: Path) -> bytes:
    try:
        if path.stat().st_size > _MOST_IMAGE:
            raise UsageError(f"{path} is larger than {_MOST_IMAGE >> 20} MiB", hint="Make it smaller.")
        return path.read_bytes()
    except OSError as exc:
        raise UsageError(f"cannot read {path}: {exc.strerror}", hint="Check the path.") from exc
