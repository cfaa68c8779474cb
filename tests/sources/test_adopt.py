"""Models of Ollama and Docker Model Runner are listed and taken over; their folders stay as they are."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tests.package import golden

from pierhead.errors import CorruptData, NotFound, UsageError
from pierhead.events import AnyEvent, Note
from pierhead.sources.adopt import Offer, Taken, Tool, chosen, folders, offers, take
from pierhead.sources.docker_store import DockerStore, our_name
from pierhead.store.layout import Store
from pierhead.trust.gate import Gate

from .golden_docker import DockerModel, write_artifacts, write_docker
from .golden_ollama import OllamaModel, digest
from .servers import make_gguf
from .test_ollama_folder import state

pytestmark = pytest.mark.timeout(60)
SMALL, OTHER = make_gguf(seed=31), make_gguf(seed=32)
TINY = DockerModel(
    [
        ("gguf.v3", "tiny.Q4_1.gguf", SMALL),
        ("license", "LICENSE", b"Apache License"),
        ("mmproj", "mmproj.gguf", make_gguf(size=2000, seed=33, **{"general.architecture": "clip"})),
        ("chat.template.jinja", "template.jinja", b"{{ messages }}"),
    ],
    {"context_size": 4096},
)
PLAIN = DockerModel([("gguf.v3", "", OTHER)], paths=False)


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store.open(tmp_path / "store")


@pytest.fixture
def docker(tmp_path: Path) -> Path:
    root = tmp_path / "docker"
    write_docker(root, [(TINY, ["docker.io/ai/tiny:latest", "ai/tiny:1m-Q4_1"]), (PLAIN, [])])
    return root


@pytest.fixture
def ollama(tmp_path: Path) -> Path:
    root = tmp_path / "ollama"
    OllamaModel([("model", SMALL), ("license", b"x"), ("params", b'{"num_gpu":1}')]).write(root)
    OllamaModel([("model", OTHER)]).write(root, "hf.co/org/Repo-GGUF/Q4_K_M")
    return root


async def listed(tool: Tool, root: Path, store: Store) -> list[Offer]:
    return await offers(tool, folders(tool, root, {}), store)


async def taken(tool: Tool, root: Path, store: Store, *names: str, **options: Any) -> list[Taken]:
    found = await listed(tool, root, store)
    return await take(
        chosen(tool, found, names) if names else found, store=store, gate=Gate(store.root / "none"), **options
    )


async def test_docker_models_enter_with_their_digest_and_all_their_names(docker: Path, store: Store) -> None:
    before = state(docker)
    for one in await taken("docker", docker, store):
        assert one.error is None, one.error
    record = store.get("ai/tiny")
    assert record.digest == TINY.id
    assert set(record.names) == {"ai/tiny", "ai/tiny:1m-Q4_1"}
    assert {f.name: f.role for f in record.files} == {
        "tiny.Q4_1.gguf": "weights",
        "LICENSE": "license",
        "mmproj.gguf": "mmproj",
        "template.jinja": "template",
    }
    assert record.packaged.context == 4096
    assert store.blob_path(record.digest).read_bytes() == TINY.manifest
    assert store.get(PLAIN.id).name == f"docker-model-{PLAIN.id[7:19]}"
    assert store.verify("ai/tiny") == []
    assert state(docker) == before


@pytest.mark.parametrize(
    "make", [golden.docker_split, golden.docker_safetensors, golden.docker_folder, golden.docker_dduf, golden.cncf_raw]
)
async def test_docker_models_of_every_format_are_taken(
    tmp_path: Path, store: Store, make: Callable[[Path], golden.Artifact]
) -> None:
    artifact = make(tmp_path)
    body = artifact.manifest()
    write_artifacts(tmp_path / "docker", [(body, artifact.blobs, ["docker.io/ai/tiny:v1"])])
    (one,) = await taken("docker", tmp_path / "docker", store)
    assert one.error is None, one.error
    record = store.get("ai/tiny:v1")
    assert record.digest == digest(body)
    assert record.metadata["format"]
    assert store.materialize(record).is_dir()
    assert store.verify(record.name) == []


async def test_ollamas_models_are_listed_and_taken(ollama: Path, store: Store) -> None:
    found = await listed("ollama", ollama, store)
    assert [(o.name, o.state, o.weights) for o in found] == [
        ("hf.co/org/Repo-GGUF:Q4_K_M", "new", digest(OTHER)),
        ("tiny", "new", digest(SMALL)),
    ]
    before = state(ollama)
    (one,) = await taken("ollama", ollama, store, "tiny:latest", link=True)
    assert one.record is not None
    assert one.record.name == "tiny"
    assert store.blob_path(digest(SMALL)).stat().st_nlink == 2
    assert state(ollama) == before
    assert [o.state for o in await listed("ollama", ollama, store)] == ["new", "here"]
    (again,) = await taken("ollama", ollama, store, "tiny")
    assert again.record is not None
    assert again.record.digest == one.record.digest


async def test_a_name_that_means_another_model_here_moves_only_by_force(
    docker: Path, ollama: Path, store: Store
) -> None:
    await taken("ollama", ollama, store, "tiny")
    write_docker(docker, [(PLAIN, ["tiny:latest"])])
    (kept,) = await taken("docker", docker, store, "tiny")
    assert kept.error is not None
    assert "--force" in (kept.error.hint or "")
    (moved,) = await taken("docker", docker, store, "tiny", force=True)
    assert moved.record is not None
    assert store.get("tiny").digest == PLAIN.id
    assert store.versions("tiny"), "the other model is an earlier version"


async def test_a_further_name_that_means_another_model_here_stays_with_it(
    docker: Path, ollama: Path, store: Store
) -> None:
    await taken("ollama", ollama, store, "tiny")
    store.tag("tiny", "ai/tiny:1m-Q4_1")
    mine, notes = store.get("tiny").digest, list[AnyEvent]()
    (one,) = await taken("docker", docker, store, "ai/tiny", listener=notes.append)
    assert one.record is not None
    assert store.get("ai/tiny").digest == TINY.id
    assert store.get("ai/tiny:1m-Q4_1").digest == mine
    assert any("--force" in n.message for n in notes if isinstance(n, Note))
    await taken("docker", docker, store, "ai/tiny", force=True)
    assert store.get("ai/tiny:1m-Q4_1").digest == TINY.id


@pytest.mark.parametrize(
    ("tag", "name"),
    [
        ("docker.io/ai/smollm2:latest", "ai/smollm2"),
        ("index.docker.io/ai/smollm2:360M-Q4_K_M", "ai/smollm2:360M-Q4_K_M"),
        ("huggingface.co/org/repo:q4_k_m", "hf.co/org/repo:q4_k_m"),
        ("registry.example:5000/team/m:v1", "registry.example:5000/team/m:v1"),
        ("ai/m@sha256:" + "a" * 64, "ai/m"),
    ],
)
def test_names_lose_what_goes_without_saying(tag: str, name: str) -> None:
    assert our_name(tag) == name


@pytest.mark.parametrize("word", ["tiny", "ai/tiny", "ai/tiny:latest", "docker.io/ai/tiny", "oci://docker.io/ai/tiny"])
async def test_a_docker_model_is_found_by_all_its_spellings(docker: Path, store: Store, word: str) -> None:
    assert chosen("docker", await listed("docker", docker, store), [word])[0].name == "ai/tiny"
    with pytest.raises(NotFound, match="has no model 'none'") as caught:
        chosen("docker", await listed("docker", docker, store), ["none"])
    assert "ai/tiny" in (caught.value.hint or "")


# --- what is damaged, unfinished or a trap ----------------------------------------------------------------------------


def _blob(root: Path) -> Path:
    return root / "blobs/sha256" / digest(SMALL)[7:]


def _unfinished(root: Path) -> None:
    _blob(root).rename(f"{_blob(root)}.incomplete")


def _short(root: Path) -> None:
    _blob(root).write_bytes(SMALL[:-1])


def _spoilt(root: Path) -> None:
    _blob(root).write_bytes(SMALL[:-1] + b"!")


def _linked(root: Path) -> None:
    secret = root.parent / "secret"
    _blob(root).rename(secret)
    _blob(root).symlink_to(secret)


def _pipe(root: Path) -> None:
    _blob(root).unlink()
    os.mkfifo(_blob(root))


def _other_manifest(root: Path) -> None:
    (root / "manifests/sha256" / TINY.id[7:]).write_bytes(TINY.manifest + b" ")


def _no_manifest(root: Path) -> None:
    (root / "manifests/sha256" / TINY.id[7:]).unlink()


def _other_config(root: Path) -> None:
    data = TINY.config_bytes
    (root / "blobs/sha256" / digest(data)[7:]).write_bytes(data[:-1] + b" ")


@pytest.mark.parametrize(
    ("spoil", "state", "words"),
    [
        (_unfinished, "not whole", "still being downloaded"),
        (_short, "not whole", "missing or of another size"),
        (_spoilt, "new", "has digest"),
        (_linked, "unusable", "a link"),
        (_pipe, "unusable", "not a plain file"),
        (_other_manifest, "unusable", "does not match its digest"),
        (_no_manifest, "unusable", "is not there"),
        (_other_config, "unusable", "does not match its digest"),
    ],
)
async def test_one_bad_model_is_said_and_does_not_stop_the_others(
    docker: Path, store: Store, spoil: Callable[[Path], None], state: str, words: str
) -> None:
    spoil(docker)
    found = await listed("docker", docker, store)
    assert [o.state for o in found if o.name == "ai/tiny"] == [state]
    bad, good = await take(found, store=store, gate=Gate(store.root / "none"))
    assert bad.error is not None
    assert words in bad.error.message
    assert bad.error.hint
    assert good.record is not None
    assert [r.digest for r in store.models()] == [PLAIN.id]
    assert not (store.blobs.folder / digest(SMALL)[7:]).exists()


BOMB = '{"models":' + "[" * 100_000


@pytest.mark.parametrize(
    ("file", "content", "words"),
    [
        ("models.json", "{", "cannot be read"),
        ("models.json", BOMB, "cannot be read"),
        ("models.json", '{"models":[{"id":"sha256:../../../etc/passwd","tags":[]}]}', "no digest"),
        ("models.json", '{"models":[{"id":"' + "sha512:" + "a" * 128 + '"}]}', "no digest"),
        ("models.json", '{"models": 3}', "cannot be read"),
        ("layout.json", '{"version":"2.0.0"}', "not known here"),
    ],
)
async def test_an_index_that_is_damaged_or_hostile_is_one_error(
    docker: Path, store: Store, file: str, content: str, words: str
) -> None:
    (docker / file).write_text(content)
    with pytest.raises((CorruptData, UsageError), match=words):
        await listed("docker", docker, store)


async def test_an_index_that_is_a_link_or_endless_is_not_read(docker: Path, store: Store) -> None:
    (docker / "models.json").rename(docker.parent / "models.json")
    (docker / "models.json").symlink_to(docker.parent / "models.json")
    with pytest.raises(CorruptData, match="link"):
        DockerStore(docker).entries()
    (docker / "models.json").unlink()
    with (docker / "models.json").open("wb") as file:
        file.truncate(1 << 40)
    with pytest.raises(CorruptData, match="larger"):
        DockerStore(docker).entries()


async def test_tags_that_cannot_name_a_model_are_passed_over(docker: Path, store: Store) -> None:
    write_docker(docker, [(TINY, ["../../x:y", "a//b", "\x1b[31mred", "good:v1", ""])])
    assert (await listed("docker", docker, store))[0].names == ("good:v1",)


@pytest.mark.parametrize("tool", ["ollama", "docker"])
def test_a_folder_that_is_none_of_theirs_is_said(tmp_path: Path, tool: Tool) -> None:
    with pytest.raises(NotFound, match="is not a folder of"):
        folders(tool, tmp_path, {})
    with pytest.raises(NotFound, match="keeps no models") as caught:
        folders(tool, None, {"HOME": str(tmp_path)})
    assert "--path" in (caught.value.hint or "")


# --- the command ------------------------------------------------------------------------------------------------------


@pytest.fixture
def pier(tmp_path: Path) -> Callable[..., subprocess.CompletedProcess[str]]:
    env = {**os.environ, "PIERHEAD_HOME": str(tmp_path / "home"), "HOME": str(tmp_path), "NO_COLOR": "1"}
    env.pop("OLLAMA_MODELS", None)

    def run(*words: str) -> subprocess.CompletedProcess[str]:
        argv = [str(Path(sys.executable).parent / "pier"), *words]
        return subprocess.run(argv, env=env, capture_output=True, text=True, timeout=60, check=False)

    return run


def test_the_command_lists_tries_and_takes(
    pier: Callable[..., subprocess.CompletedProcess[str]], docker: Path, ollama: Path, tmp_path: Path
) -> None:
    shown = pier("adopt", "ollama", "--path", str(ollama))
    assert shown.returncode == 0, shown.stderr
    assert [line.split()[0] for line in shown.stdout.splitlines()] == ["NAME", "hf.co/org/Repo-GGUF:Q4_K_M", "tiny"]
    tried = pier("adopt", "docker", "--path", str(docker), "--all", "--dry-run", "--json")
    assert [o["state"] for o in json.loads(tried.stdout)] == ["new", "new"]
    assert pier("list", "--json").stdout.strip() == "[]"
    (tmp_path / ".ollama").mkdir()
    ollama.rename(tmp_path / ".ollama" / "models")
    assert pier("adopt", "ollama", "tiny").returncode == 0
    _unfinished(docker)
    part = pier("adopt", "docker", "--path", str(docker), "--all", "--json")
    assert [o["state"] for o in json.loads(part.stdout)] == ["taken"]
    assert "still being downloaded" in part.stderr
    failed = pier("adopt", "docker", "--path", str(docker), "ai/tiny")
    assert failed.returncode == NotFound.exit_code
    assert "docker model pull" in failed.stderr
    names = {name for record in json.loads(pier("list", "--json").stdout) for name in record["names"]}
    assert names == {"tiny", f"docker-model-{PLAIN.id[7:19]}"}


@pytest.mark.parametrize(
    "words", [("adopt",), ("adopt", "other"), ("adopt", "ollama", "x", "--all"), ("adopt", "docker", "--path", "/none")]
)
def test_a_wrong_command_says_what_to_type(
    pier: Callable[..., subprocess.CompletedProcess[str]], words: tuple[str, ...]
) -> None:
    refused = pier(*words)
    assert refused.returncode in (2, 3)
    assert "Traceback" not in refused.stderr
