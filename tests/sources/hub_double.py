"""A hub that takes models as Hugging Face does: repositories, LFS with parts, commits; it checks what it is sent."""

from __future__ import annotations

import base64
import contextlib
import hashlib
import json
from collections.abc import AsyncGenerator, Callable
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import unquote

from aiohttp import web

from .servers import serving

TOKEN = "hf_write"
LARGE = (".gguf", ".safetensors", ".onnx")
Fault = Callable[[web.Request], web.StreamResponse | None]


def oid_of(data: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


@dataclass
class Stored:
    """One file of a commit."""

    oid: str  # SHA-256 of large ones, git's of others
    size: int
    large: bool


@dataclass
class Repo:
    private: bool = False
    branches: dict[str, str] = field(default_factory=dict)
    trees: dict[str, dict[str, Stored]] = field(default_factory=dict)
    messages: list[str] = field(default_factory=list)

    def head(self, revision: str) -> str:
        return self.branches.get(revision, revision if revision in self.trees else "")

    def commit(self, branch: str, tree: dict[str, Stored], message: str) -> str:
        sha = hashlib.sha1(
            repr((self.branches.get(branch), sorted(tree), message, len(self.trees))).encode()
        ).hexdigest()
        self.trees[sha] = tree
        self.branches[branch] = sha
        self.messages.append(message)
        return sha


@dataclass
class HubDouble:
    """The hub itself; ``storage`` is where large files go, at an address of its own without any token."""

    part: int = 100_000  # bytes above which an upload is in parts
    repos: dict[str, Repo] = field(default_factory=dict)
    objects: dict[str, bytes] = field(default_factory=dict)
    blobs: dict[str, bytes] = field(default_factory=dict)
    parts: dict[str, dict[int, bytes]] = field(default_factory=dict)
    requests: list[web.Request] = field(default_factory=list)
    received: int = 0  # bytes of large files
    problems: list[str] = field(default_factory=list)
    fault: Fault | None = None
    expired: set[str] = field(default_factory=set)  # upload numbers whose addresses are no good any more
    uploads: int = 0
    url: str = ""
    storage: str = ""

    # --- what the hub answers -------------------------------------------------------------------------------------

    async def handle(self, request: web.Request) -> web.StreamResponse:
        self.requests.append(request)
        if self.fault is not None and (said := self.fault(request)) is not None:
            await request.read()
            return said
        path = request.path
        given = request.headers.get("Authorization", "")
        if given and given != f"Bearer {TOKEN}":
            return web.Response(status=401)
        if path == "/api/repos/create":
            return await self._create(request, bool(given))
        if path.startswith("/api/models/"):
            return await self._api(request, path.removeprefix("/api/models/").split("/"), bool(given))
        if path.endswith(".git/info/lfs/objects/batch"):
            return await self._batch(request, bool(given))
        if path.startswith("/complete/"):
            return await self._complete(request)
        if path.startswith("/verify/"):
            found = await request.json()
            good = bool(given) and len(self.objects.get(found["oid"], b"")) == found["size"]
            return web.Response(status=200 if good else 404)
        return self._resolve(request, path.strip("/").split("/"))

    async def _create(self, request: web.Request, allowed: bool) -> web.Response:
        body = await request.json()
        if not allowed:
            return web.Response(status=401)
        name = f"{body['organization']}/{body['name']}"
        if body["organization"] != "me":
            return web.json_response({"error": "You don't have the rights to create a model there"}, status=403)
        if name in self.repos:
            return web.json_response({"error": "You already created this model repo"}, status=409)
        repo = self.repos[name] = Repo(body["private"])
        attributes = b"*.gguf filter=lfs"
        self.blobs[oid_of(attributes)] = attributes
        repo.commit("main", {".gitattributes": Stored(oid_of(attributes), len(attributes), False)}, "initial commit")
        return web.json_response({"url": f"{self.url}/{name}"})

    async def _api(self, request: web.Request, parts: list[str], allowed: bool) -> web.Response:
        repo = self.repos.get("/".join(parts[:2]))
        if repo is None or (repo.private and not allowed):
            return web.Response(status=404 if allowed else 401, headers={"X-Error-Code": "RepoNotFound"})
        verb = parts[2] if len(parts) > 2 else "revision"
        revision = unquote("/".join(parts[3:])) or "main"
        if verb == "branch":
            repo.branches.setdefault(revision, repo.branches["main"])
            return web.json_response({})
        head = repo.head(revision)
        if not head:
            return web.Response(status=404, headers={"X-Error-Code": "RevisionNotFound"})
        if verb == "preupload":
            return self._preupload(repo.trees[head], await request.json(), allowed)
        if verb == "commit":
            return self._commit(repo, revision, await request.read(), allowed)
        if verb == "tree":
            return web.json_response([_entry(path, found) for path, found in sorted(repo.trees[head].items())])
        return self._info("/".join(parts[:2]), head, repo.trees[head])

    def _info(self, name: str, head: str, tree: dict[str, Stored]) -> web.Response:
        rows: list[dict[str, Any]] = []
        for path, found in sorted(tree.items()):
            row: dict[str, Any] = {"rfilename": path, "size": found.size, "blobId": "1" * 40}
            if found.large:
                row["lfs"] = {"sha256": found.oid, "size": found.size, "pointerSize": 130}
            else:
                row["blobId"] = found.oid
            rows.append(row)
        about = {"id": name, "modelId": name, "sha": head, "siblings": rows, "private": False, "tags": [], "_id": "1"}
        return web.json_response({**about, "gated": False, "disabled": False, "downloads": 0, "likes": 0})

    def _preupload(self, tree: dict[str, Stored], body: Any, allowed: bool) -> web.Response:
        if not allowed:
            return web.Response(status=401)
        rows = [
            {
                "path": row["path"],
                "uploadMode": "lfs" if row["path"].endswith(LARGE) else "regular",
                "shouldIgnore": False,
                "oid": tree[row["path"]].oid if row["path"] in tree else None,
            }
            for row in body["files"]
            if len(base64.b64decode(row["sample"])) == min(512, row["size"])
        ]
        return web.json_response({"files": rows})

    async def _batch(self, request: web.Request, allowed: bool) -> web.Response:
        body = await request.json()
        if not allowed or request.headers["Accept"] != "application/vnd.git-lfs+json":
            return web.Response(status=401)
        rows: list[dict[str, Any]] = []
        for wanted in body["objects"]:
            oid, size = wanted["oid"], wanted["size"]
            row: dict[str, Any] = {"oid": oid, "size": size}
            if oid not in self.objects:
                row["actions"] = self._upload(oid, size)
            rows.append(row)
        return web.json_response({"transfer": "multipart", "objects": rows})

    def _upload(self, oid: str, size: int) -> dict[str, Any]:
        self.uploads += 1
        number = str(self.uploads)
        verify = {"href": f"{self.url}/verify/{oid}", "header": {}}
        if size <= self.part:
            href = f"{self.storage}/{number}/{oid}?X-Amz-Signature=secret"
            return {"upload": {"href": href, "header": {}}, "verify": verify}
        count = -(-size // self.part)
        self.parts[number] = {}
        header: dict[str, Any] = {"chunk_size": str(self.part)}
        for n in range(count, 0, -1):  # not in order, as nothing promises one
            header[f"{n:05d}"] = f"{self.storage}/{number}/{oid}/{n}?X-Amz-Signature=secret"
        return {"upload": {"href": f"{self.url}/complete/{number}", "header": header}, "verify": verify}

    async def _complete(self, request: web.Request) -> web.Response:
        parts = self.parts[request.path.rpartition("/")[2]]
        body = await request.json()
        numbers = [p["partNumber"] for p in body["parts"]]
        etags = [p["etag"].strip('"') for p in body["parts"]]
        if numbers != sorted(parts) or etags != [hashlib.md5(parts[n]).hexdigest() for n in numbers]:
            self.problems.append(f"parts {numbers} of {sorted(parts)} with other tags")
            return web.Response(status=400)
        return self._keep(body["oid"], b"".join(parts[n] for n in numbers))

    def _keep(self, oid: str, data: bytes) -> web.Response:
        if hashlib.sha256(data).hexdigest() != oid:
            self.problems.append(f"other bytes than {oid[:12]}")
            return web.Response(status=400)
        self.objects[oid] = data
        return web.Response()

    def _commit(self, repo: Repo, branch: str, body: bytes, allowed: bool) -> web.Response:
        if not allowed:
            return web.Response(status=401)
        lines = [json.loads(line) for line in body.splitlines()]
        header, tree = lines[0]["value"], dict(repo.trees[repo.branches[branch]])
        if header.get("parentCommit", repo.branches[branch]) != repo.branches[branch]:
            return web.json_response(
                {"error": "A commit has happened since. Please refresh and try again."}, status=412
            )
        for line in lines[1:]:
            value = line["value"]
            if line["key"] == "lfsFile":
                if len(self.objects.get(value["oid"], b"")) != value["size"]:
                    return web.json_response({"error": f"LFS pointer to nothing: {value['path']}"}, status=400)
                tree[value["path"]] = Stored(value["oid"], value["size"], True)
            else:
                data = base64.b64decode(value["content"])
                self.blobs[oid_of(data)] = data
                tree[value["path"]] = Stored(oid_of(data), len(data), False)
        sha = repo.commit(branch, tree, header["summary"])
        return web.json_response({"success": True, "commitOid": sha, "commitUrl": f"{self.url}/x/commit/{sha}"})

    def _resolve(self, request: web.Request, parts: list[str]) -> web.Response:
        repo = self.repos.get("/".join(parts[:2]))
        head = repo.head(parts[3]) if repo and len(parts) > 4 and parts[2] == "resolve" else ""
        path = "/".join(parts[4:])
        if repo is None or not head or path not in repo.trees[head]:
            return web.Response(status=404, headers={"X-Error-Code": "EntryNotFound"})
        found = repo.trees[head][path]
        headers = {"X-Repo-Commit": head, "ETag": f'"{found.oid}"'}
        if not found.large:
            return web.Response(body=self.blobs[found.oid], headers=headers)
        headers |= {"X-Linked-Etag": f'"{found.oid}"', "X-Linked-Size": str(found.size)}
        headers["Location"] = f"{self.storage}/get/{found.oid}"
        return web.Response(status=302, headers=headers)

    # --- what the storage answers ---------------------------------------------------------------------------------

    async def store(self, request: web.Request) -> web.StreamResponse:
        self.requests.append(request)
        if "Authorization" in request.headers and request.method == "PUT":
            self.problems.append("a token at the storage")
        parts = request.path.strip("/").split("/")
        if request.method in ("GET", "HEAD"):
            return web.Response(body=self.objects[parts[1]], headers={"ETag": f'"{parts[1]}"'})
        if self.fault is not None and (said := self.fault(request)) is not None:
            with contextlib.suppress(ConnectionError):
                await request.read()
            return said
        if parts[0] in self.expired:
            return web.Response(status=403)
        if "Content-Length" not in request.headers:
            self.problems.append("no length")
            return web.Response(status=411)
        data = await request.read()
        self.received += len(data)
        if len(parts) == 2:
            return self._keep(parts[1], data)
        self.parts[parts[0]][int(parts[2])] = data
        return web.Response(headers={"ETag": f'"{hashlib.md5(data).hexdigest()}"'})


def _entry(path: str, found: Stored) -> dict[str, Any]:
    row: dict[str, Any] = {"type": "file", "path": path, "size": found.size, "oid": found.oid}
    return (
        row | {"oid": "1" * 40, "lfs": {"oid": found.oid, "size": found.size, "pointerSize": 130}}
        if found.large
        else row
    )


@contextlib.asynccontextmanager
async def hub_double() -> AsyncGenerator[HubDouble]:
    double = HubDouble()
    async with serving() as hub, serving() as storage:
        hub.answer, storage.answer = double.handle, double.store
        double.url, double.storage = hub.url, storage.url
        yield double
