"""The process that paints: loads a model with stable-diffusion.cpp and makes one picture after another.

It is a process of its own because a picture cannot be given up half-way by other means, and because the library ends
its process on what it did not expect. What it prints itself goes to the log, never into the pipe.
"""

from __future__ import annotations

import collections
import ctypes
import importlib
import os
import signal
import sys
import threading
from pathlib import Path
from typing import Any, BinaryIO

from . import wire
from .settings import Settings, read

_DIE_WITH_PARENT = 1  # prctl's PR_SET_PDEATHSIG
_WARN = 2
_GPUS = (1, 2)  # ggml's numbers of GPUs with memory of their own and without
_PATHS = {
    "model": "model_path",
    "diffusion": "diffusion_model_path",
    "clip_l": "clip_l_path",
    "clip_g": "clip_g_path",
    "t5xxl": "t5xxl_path",
    "llm": "llm_path",
    "vae": "vae_path",
    "taesd": "taesd_path",
}
TYPES = {"f32": "F32", "f16": "F16", "bf16": "BF16"} | {
    word: word.upper() for word in ("q8_0", "q5_0", "q5_1", "q4_0", "q4_1", "q6_k", "q5_k", "q4_k", "q3_k", "q2_k")
}
SAMPLERS = {
    **{word: word.upper() for word in ("euler", "euler_a", "heun", "dpm2", "ipndm", "ipndm_v", "lcm")},
    **{word: word.upper() for word in ("ddim_trailing", "tcd", "res_multistep", "res_2s", "er_sde")},
    **{"dpm++2s_a": "DPMPP2S_A", "dpm++2m": "DPMPP2M", "dpm++2mv2": "DPMPP2Mv2"},
}
SCHEDULERS = {
    word: word.upper()
    for word in (
        *("discrete", "karras", "exponential", "ays", "gits", "sgm_uniform"),
        *("simple", "smoothstep", "kl_optimal", "lcm", "bong_tangent"),
    )
}


class Painter:
    """The model in memory. ``out`` is where messages to the server go."""

    def __init__(self, library: Any, out: BinaryIO) -> None:
        self._library = library
        self._out = out
        self._lock = threading.Lock()
        self._numpy: Any = importlib.import_module("numpy")
        self._said: collections.deque[str] = collections.deque(maxlen=8)
        self._context: Any = None
        self._painting = False
        library.set_log_callback(self._log)
        library.set_progress_callback(self._progress)

    def load(self, folder: Path, settings: Settings) -> None:
        """Read the weights; ValueError with the library's own reason."""
        wanted = self._library.SDContextParams()
        for part, name in settings.files.items():
            setattr(wanted, _PATHS[part], str(folder / name))
        wanted.n_threads = settings.threads
        wanted.enable_mmap = settings.mmap
        wanted.diffusion_flash_attn = settings.flash_attention
        wanted.vae_decode_only = False
        wanted.free_params_immediately = False  # or the second picture is made without its text encoder
        if settings.type:
            wanted.wtype = self._library.SDType[TYPES[settings.type]]
        try:
            self._context = self._library.SDContext(wanted)
        except (RuntimeError, OSError, ValueError) as exc:
            raise ValueError(self._reason(exc)) from exc
        if not self._context.supports_image_generation:
            raise ValueError("the model does not make pictures")

    def paint(self, job: dict[str, Any], blobs: list[bytes]) -> None:
        """One picture, or why there is none."""
        self._said.clear()
        self._painting = True
        self._show(job["partials"], job["steps"])
        try:
            (made,) = self._context.generate_with_params(self._wanted(job, blobs))
            pixels = made.to_numpy()
        except (RuntimeError, ValueError, TypeError, MemoryError) as exc:
            self._tell({"failed": self._reason(exc)})
            return
        finally:
            self._painting = False
        height, width = pixels.shape[:2]
        self._tell({"picture": [width, height]}, pixels[:, :, :3].tobytes())

    def _show(self, partials: int, steps: int) -> None:
        """Have so many rough pictures told on the way."""
        mode = self._library.PreviewMode
        if partials:
            self._library.set_preview_callback(self._preview, mode.PROJ, max(1, steps // (partials + 1)))
        else:
            self._library.set_preview_callback(None)

    def _preview(self, step: int, frames: list[Any], noisy: bool) -> None:
        pixels = frames[0].to_numpy()
        self._tell({"partial": [pixels.shape[1], pixels.shape[0]]}, pixels[:, :, :3].tobytes())

    def _wanted(self, job: dict[str, Any], blobs: list[bytes]) -> Any:
        library = self._library
        same = ("prompt", "negative_prompt", "width", "height", "seed", "cfg_scale", "strength", "clip_skip")
        wanted = library.SDImageGenParams(
            **{name: job[name] for name in same},
            batch_count=1,
            sample_steps=job["steps"],
            sample_method=library.SampleMethod[SAMPLERS.get(job["sampler"], "COUNT")],
            scheduler=library.Scheduler[SCHEDULERS.get(job["scheduler"], "COUNT")],
        )
        wanted.sample_params.distilled_guidance = job["guidance"]
        wanted.vae_tiling_enabled = job["tiling"]
        self._give(wanted, job, blobs)
        return wanted

    def _give(self, wanted: Any, job: dict[str, Any], blobs: list[bytes]) -> None:
        """The pictures that it starts from."""
        images: list[Any] = []
        for (kind, width, height), blob in zip(job["images"], blobs, strict=True):
            depth = 1 if kind == "mask" else 3
            pixels = self._numpy.frombuffer(blob, self._numpy.uint8).reshape(height, width, depth)
            image = self._library.SDImage.from_numpy(self._numpy.array(pixels))
            if kind == "mask":
                wanted.set_mask_image(image)
            elif kind == "init":
                wanted.set_init_image(image)
            else:
                images.append(image)
        if images:
            wanted.set_ref_images(images)

    def _tell(self, head: dict[str, Any], *blobs: bytes) -> None:
        with self._lock:
            self._out.write(wire.packed(head, *blobs))
            self._out.flush()

    def _progress(self, step: int, steps: int, seconds: float) -> None:
        if self._painting:
            self._tell({"step": [step, steps, seconds]})

    def _log(self, level: Any, text: str) -> None:
        if level.value >= _WARN and (line := text.strip()):
            self._said.append(line)
            print(line, file=sys.stderr, flush=True)  # noqa: T201

    def _reason(self, exc: BaseException) -> str:
        """What the library said last of its own accord; its exceptions tell no more than that it failed."""
        said = [line.rpartition(" - ")[2] for line in self._said]
        told = str(exc) if isinstance(exc, OSError) else " ".join(said[-2:]) or str(exc)
        return " ".join(told.split())[:400]


def gpus(libraries: Path) -> list[str]:
    """The names of the GPUs that the library's own parts have found; those parts are loaded already."""
    found: list[str] = []
    for place in sorted(libraries.glob("libggml-*.so*")):
        ggml = ctypes.CDLL(str(place))
        if not hasattr(ggml, "ggml_backend_dev_count"):
            continue
        ggml.ggml_backend_dev_count.restype = ctypes.c_size_t
        ggml.ggml_backend_dev_get.restype = ggml.ggml_backend_dev_description.restype = ctypes.c_void_p
        for number in range(ggml.ggml_backend_dev_count()):
            device = ctypes.c_void_p(ggml.ggml_backend_dev_get(ctypes.c_size_t(number)))
            if ggml.ggml_backend_dev_type(device) in _GPUS:
                told = ctypes.c_char_p(ggml.ggml_backend_dev_description(device)).value or b""
                found.append(told.decode("utf-8", "replace"))
    return found


def check(library: Any) -> None:
    """ValueError where Vulkan has no GPU: the library would go on with the processor and say nothing."""
    found = gpus(Path(library.__file__).parent.parent.with_name("cyllama_vulkan.libs"))
    if not found:
        raise ValueError("Vulkan finds no GPU here: its loader or the GPU's driver for it is missing")
    print(f"painting on {', '.join(found)}", file=sys.stderr, flush=True)  # noqa: T201


def main(folder: str, settings: str) -> int:
    """Read jobs from the pipe until it closes."""
    ctypes.CDLL(None).prctl(_DIE_WITH_PARENT, signal.SIGKILL)
    out = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    try:
        library, told = importlib.import_module("cyllama.sd"), read(settings)
        if told.device == "vulkan":
            check(library)
        painter = Painter(library, out)
        painter.load(Path(folder), told)
    except (ValueError, ImportError) as exc:
        out.write(wire.packed({"failed": str(exc)}))
        out.flush()
        return 1
    out.write(wire.packed({"ready": True}))
    out.flush()
    while True:
        try:
            head, blobs = wire.read(sys.stdin.buffer)
        except EOFError:
            return 0
        painter.paint(head["job"], blobs)
