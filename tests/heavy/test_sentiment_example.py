"""The example of the field: a classifier that is trained in a heavy image and served by a light one, for real."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from pierhead.engines.onnx import Onnx

pytestmark = [pytest.mark.timeout(1800), pytest.mark.docker]
ROOT = Path(__file__).resolve().parents[2]
EXAMPLE = ROOT / "examples" / "sentiment"
SENTENCES = 2000  # enough to be much better than a guess, and learned in about a minute


def docker(*args: str, timeout: float = 1500) -> str:
    env = {**os.environ, "DOCKER_HOST": os.environ["PIERHEAD_TEST_DOCKER"], "DOCKER_BUILDKIT": "0"}
    done = subprocess.run(["docker", *args], env=env, capture_output=True, text=True, timeout=timeout)
    assert done.returncode == 0, (done.stdout + done.stderr)[-3000:]
    return done.stdout


@pytest.fixture(scope="module")
def wheels() -> Path:
    """All wheels of both stages, fetched by pip as the user has set it up: its container has no network."""
    place = ROOT / ".cache" / "models" / "sentiment-wheels"
    mark = place / "whole"
    if not mark.is_file():
        shutil.rmtree(place, ignore_errors=True)
        pip = [shutil.which("pip") or "pip", "download", "--quiet", "--dest", str(place)]
        train, serve = EXAMPLE / "requirements-train.txt", EXAMPLE / "requirements-serve.txt"
        for more in (
            ("-r", str(train)),
            ("--no-deps", "-r", str(serve), "pip", "setuptools", "wheel"),
            ("--no-deps", "--no-binary", ":all:", "vaderSentiment==3.3.2"),
        ):
            subprocess.run([*pip, *more], check=True, timeout=1200)
        mark.touch()
    return place


@pytest.fixture(scope="module")
def images(wheels: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """The heavy and the light image, and what the build said."""
    if not os.environ.get("PIERHEAD_TEST_DOCKER") or shutil.which("docker") is None:
        pytest.skip("no Docker Engine for tests (PIERHEAD_TEST_DOCKER) or no docker command")
    context = tmp_path_factory.mktemp("context")
    shutil.copytree(EXAMPLE, context / "examples" / "sentiment")
    shutil.copytree(
        ROOT / "src" / "pierhead" / "engines" / "programs", context / "src" / "pierhead" / "engines" / "programs"
    )
    for file in wheels.iterdir():
        os.link(file, context / "examples" / "sentiment" / "wheels" / file.name)
    (pip,) = (file.name for file in wheels.glob("pip-*.whl"))
    told = {
        "BASE": os.environ["PIERHEAD_TEST_IMAGE"],
        "PIP": f"python3 /wheels/{pip}/pip",  # the test's base image has no pip
        "PIP_NO_INDEX": "1",
        "TRAIN_ARGS": f"--sentences {SENTENCES}",
    }
    arguments = [word for name, value in told.items() for word in ("--build-arg", f"{name}={value}")]
    run = uuid.uuid4().hex[:8]
    names = {kind: f"pierhead-test/sentiment-{kind}:{run}" for kind in ("heavy", "wheels", "light")}
    build = (
        "build",
        "--force-rm",
        "--network",
        "none",
        *arguments,
        "-f",
        str(context / "examples" / "sentiment" / "Dockerfile"),
    )
    said = docker(*build, "--target", "train", "-t", names["heavy"], str(context))
    docker(*build, "--target", "wheels", "-t", names["wheels"], str(context))  # so that nothing nameless is left
    docker(*build, "-t", names["light"], str(context))
    yield {**names, "said": said}
    for name in names.values():
        docker("rmi", "-f", name)


def test_the_light_list_is_what_the_engine_pins() -> None:
    lines = (EXAMPLE / "requirements-serve.txt").read_text().splitlines()
    assert tuple(line for line in lines if line and not line.startswith("#")) == Onnx.environment().requirements


def test_it_learns_and_the_light_image_serves_what_the_heavy_one_made(images: dict[str, str]) -> None:
    report = json.loads(docker("run", "--rm", "--entrypoint", "cat", images["light"], "/model/accuracy.json"))
    sizes = {kind: int(docker("image", "inspect", "-f", "{{.Size}}", images[kind])) for kind in ("heavy", "light")}
    print(f"accuracy {report['accuracy']:.1%} after {report['learned']} sentences, examined with {report['examined']}")
    print(f"heavy image {sizes['heavy'] / 1e6:.0f} MB, light image {sizes['light'] / 1e6:.0f} MB")
    assert report["learned"] == SENTENCES
    assert report["accuracy"] > 0.65
    assert "accuracy on sentences that it has not seen" in images["said"]
    assert sizes["light"] * 3 < sizes["heavy"]

    container = docker("run", "-d", "--read-only", "--cap-drop", "ALL", "--memory", "1g", images["light"]).strip()
    try:
        answer = ask(container, ["What a wonderful, lovely film! I enjoyed it.", "Terrible, boring, awful. I hate it."])
        assert [one["label"] for one in answer["data"]] == ["POSITIVE", "NEGATIVE"]
        find = "import importlib.util as u; print(u.find_spec('torch'))"
        assert docker("exec", container, "python3", "-c", find) == "None\n"
        docker("stop", container)
        assert docker("inspect", "-f", "{{.State.ExitCode}}", container) == "0\n"
    finally:
        docker("rm", "-f", container)


def ask(container: str, texts: list[str]) -> Any:
    """The server's answer as soon as it listens; asked from inside, as the test's Docker Engine publishes no ports."""
    program = f"""
import time, urllib.request
request = urllib.request.Request("http://127.0.0.1:8080/v1/classify", {json.dumps({"input": texts}).encode()!r})
for _ in range(600):
    try:
        print(urllib.request.urlopen(request, timeout=30).read().decode())
        break
    except OSError:
        time.sleep(0.1)
"""
    return json.loads(docker("exec", container, "python3", "-c", program))
