"""The picture engine's settings by name, and what families of models want by themselves: data."""

from __future__ import annotations

from typing import NamedTuple

from pierhead.engines.setting_table import Setting, Table

TYPES = ("f32", "f16", "bf16", "q8_0", "q5_1", "q5_0", "q4_1", "q4_0", "q6_k", "q5_k", "q4_k", "q3_k", "q2_k")
SAMPLERS = (
    *("auto", "euler", "euler_a", "heun", "dpm2", "dpm++2s_a", "dpm++2m", "dpm++2mv2", "ipndm", "ipndm_v"),
    *("lcm", "ddim_trailing", "tcd", "res_multistep", "res_2s", "er_sde"),
)
SCHEDULERS = (
    *("auto", "discrete", "karras", "exponential", "ays", "gits", "sgm_uniform"),
    *("simple", "smoothstep", "kl_optimal", "lcm", "bong_tangent"),
)
PARTS = ("diffusion", "clip_l", "clip_g", "t5xxl", "llm", "vae", "taesd")


class Family(NamedTuple):
    """What a kind of model was trained for: pictures of ``side`` pixels; sizes are multiples of ``unit``."""

    side: int
    steps: int
    cfg_scale: float
    unit: int = 16


FAMILIES = {
    "sd1": Family(512, 20, 7.0, 64),
    "sd2": Family(512, 20, 7.0, 64),
    "sdxl": Family(1024, 20, 7.0, 64),
    "sd3": Family(1024, 28, 4.5),
    "flux": Family(1024, 20, 1.0),
    "flux2": Family(1024, 20, 1.0),
    "chroma": Family(1024, 20, 4.0),
    "chroma_radiance": Family(1024, 20, 4.0),
    "qwen_image": Family(1024, 20, 2.5),
    "z_image": Family(1024, 8, 1.0),
    "ovis_image": Family(1024, 20, 5.0),
    "ernie_image": Family(1024, 20, 4.0),
    "anima": Family(1024, 30, 4.0),
}
SCHNELL = 4  # steps of a FLUX that was made to need few
_SETTINGS = {
    "steps": Setting(int, 0, 0, 1000),
    "cfg_scale": Setting(float, -1.0, -1, 100),
    "guidance": Setting(float, 3.5, 0, 100),
    "clip_skip": Setting(int, -1, -1, 12),
    "sampler": Setting(str, "auto", choices=SAMPLERS),
    "scheduler": Setting(str, "auto", choices=SCHEDULERS),
    "strength": Setting(float, 0.75, 0, 1),
    "edits": Setting(str, "init", choices=("init", "reference")),
    "width": Setting(int, 0, 0, 8192),
    "height": Setting(int, 0, 0, 8192),
    "max_pixels": Setting(int, 0, 0, 1 << 26),
    "max_steps": Setting(int, 100, 1, 1000),
    "max_n": Setting(int, 4, 1, 10),
    "queue": Setting(int, 16, 1, 4096),
    "max_body_mb": Setting(int, 64, 1, 1024),
    "threads": Setting(int, 0, 0, 1024),
    "device": Setting(str, "auto", choices=("auto", "cpu", "vulkan")),
    "gpus": Setting(tuple, ("all",), pattern=r"all|[0-9]{1,4}"),
    "type": Setting(str, "", choices=("", *TYPES)),
    "mmap": Setting(bool, True),
    "flash_attention": Setting(bool, False),
    "vae_tiling": Setting(str, "auto", choices=("auto", "true", "false")),
    **{part: Setting(str, "") for part in PARTS},
}
_ALIASES = {
    "sample_steps": "steps",
    "num_inference_steps": "steps",
    "guidance_scale": "cfg_scale",
    "cfg": "cfg_scale",
    "distilled_guidance": "guidance",
    "sampling_method": "sampler",
    "sample_method": "sampler",
    "schedule": "scheduler",
    "w": "width",
    "h": "height",
    "n": "max_n",
    "batch_count": "max_n",
    "max_queue": "queue",
    "queue_size": "queue",
    "n_threads": "threads",
    "wtype": "type",
    "quantization": "type",
    "diffusion_fa": "flash_attention",
    "flash_attn": "flash_attention",
    "fa": "flash_attention",
    "tiling": "vae_tiling",
    "diffusion_model": "diffusion",
    "tae": "taesd",
}
TABLE = Table("the picture engine", _SETTINGS, _ALIASES)
