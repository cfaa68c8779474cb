"""What engines compile for a GPU outlives them, is a model's own, and goes with the model."""

from __future__ import annotations

from pathlib import Path

from pierhead.engines.base import LaunchSpec, Mount
from pierhead.errors import NotFound
from pierhead.fleet import compiled
from pierhead.runtimes import sandbox
from pierhead.runtimes.base import expand

SPEC = LaunchSpec(
    replica="r1",
    model="m",
    engine="toy",
    argv=(),
    model_dir="/models/m",
    mounts=(Mount("/elsewhere", "/beside/0"),),
    env={"TRITON_CACHE_DIR": "/tmp/triton"},
    devices=("nvidia.com/gpu=0",),
)


def test_a_place_for_each_model_and_engine_is_told_to_the_engine(tmp_path: Path) -> None:
    first, second = (compiled.keeping(SPEC, tmp_path, f"sha256:{letter * 64}") for letter in "ab")
    assert first.mounts[-1].source != second.mounts[-1].source
    assert not first.mounts[-1].read_only
    _, inside = expand(first, sandbox.inside())
    assert inside["CUDA_CACHE_PATH"] == "/compiled/cuda"
    assert inside["TRITON_CACHE_DIR"] == "/compiled/triton"
    compiled.prepare(first)
    assert Path(first.mounts[-1].source).is_dir()
    assert tmp_path.stat().st_mode & 0o777 == 0o700


def test_who_uses_no_gpu_keeps_nothing(tmp_path: Path) -> None:
    import msgspec

    plain = msgspec.structs.replace(SPEC, devices=())
    assert compiled.keeping(plain, tmp_path, "sha256:a") is plain


def test_it_goes_with_the_model(tmp_path: Path) -> None:
    for letter in "ab":
        compiled.prepare(compiled.keeping(SPEC, tmp_path, f"sha256:{letter * 64}"))

    def find(name: str) -> object:
        if name != f"sha256:{'a' * 64}":
            raise NotFound("gone")
        return name

    compiled.tidy(tmp_path, find)
    assert [p.name for p in tmp_path.iterdir()] == [f"{'a' * 64}-toy"]
    compiled.tidy(tmp_path / "nowhere", find)
