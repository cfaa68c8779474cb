"""Pictures of clients in, pictures for clients out, by Pillow; sizes are looked at before anything is unpacked."""

from __future__ import annotations

import importlib
import io
from typing import Any, NamedTuple

from .faults import Refused
from .worker import Made

Image: Any = importlib.import_module("PIL.Image")
ImageOps: Any = importlib.import_module("PIL.ImageOps")
FORMATS = ("PNG", "JPEG", "WEBP")
MOST = 16 << 20  # pixels of a picture that a client sends


class Given(NamedTuple):
    """A client's picture, unpacked: its colours, and where it is seen through (255: painted anew) if anywhere."""

    colours: Any
    through: Any


def opened(data: bytes, param: str) -> Given:
    """Unpack a picture; Refused 400 for what is none, or too large to be unpacked."""
    try:
        found = Image.open(io.BytesIO(data), formats=FORMATS)
        if found.width * found.height > MOST or not found.width or not found.height:
            raise Refused(f"the picture has {found.width}x{found.height} pixels; {MOST} are accepted", param)
        found.load()
        whole = ImageOps.exif_transpose(found).convert("RGBA")
    except Refused:
        raise
    except Exception as exc:  # Pillow's decoders raise all sorts of errors on hostile files
        raise Refused(f"the picture cannot be read; send PNG, JPEG or WebP ({str(exc)[:100]})", param) from exc
    alpha = whole.getchannel("A")
    through = alpha.point([255 if value == 0 else 0 for value in range(256)]) if alpha.getextrema()[0] == 0 else None
    return Given(whole.convert("RGB"), through)


def mask(data: bytes, size: tuple[int, int]) -> Any:
    """Where to paint anew: what is transparent, or white in a picture without transparency."""
    given = opened(data, "mask")
    if given.colours.size != size:
        wide, high = given.colours.size
        raise Refused(f"the mask has {wide}x{high} pixels, the picture {size[0]}x{size[1]}", "mask")
    return given.through if given.through is not None else given.colours.convert("L")


def fitted(picture: Any, width: int, height: int) -> bytes:
    """A picture brought to a size, cut at its edges where it has other proportions."""
    return ImageOps.fit(picture, (width, height)).tobytes()


def written(made: Made, kind: str, compression: int, size: tuple[int, int]) -> bytes:
    """A file: ``compression`` is the quality of JPEG and WebP from 0 to 100. A rough picture is brought to ``size``."""
    picture = Image.frombytes("RGB", (made.width, made.height), made.pixels)
    if picture.size != size:
        picture = picture.resize(size)
    out = io.BytesIO()
    if kind == "png":
        picture.save(out, "PNG", compress_level=4)
    else:
        picture.save(out, kind.upper(), quality=max(1, compression))
    return out.getvalue()
