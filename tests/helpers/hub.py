"""A server that speaks as much of the Hugging Face hub's protocol as uploading and fetching a repository take."""

from __future__ import annotations

import base64
import hashlib
import json

from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route


class Hub:
    """Repositories in memory: `files[repository][path]`, and which of them are private. Writing needs `token`."""

    token = "hf_of_the_tests"

    def __init__(self) -> None:
        self.files: dict[str, dict[str, bytes]] = {}
        self.private: dict[str, bool] = {}
        routes = [
            Route("/api/repos/create", self._create, methods=["POST"]),
            Route("/api/validate-yaml", self._validate, methods=["POST"]),
            Route("/api/models/{owner}/{name}/preupload/{revision}", self._preupload, methods=["POST"]),
            Route("/api/models/{owner}/{name}/commit/{revision}", self._commit, methods=["POST"]),
            Route("/api/models/{owner}/{name}/revision/{revision}", self._info),
            Route("/api/models/{owner}/{name}/tree/{revision}", self._tree),
            Route("/api/models/{owner}/{name}", self._info),
            Route("/{owner}/{name}/resolve/{revision}/{path:path}", self._resolve),
        ]
        self.app = Starlette(routes=routes)

    def _name(self, request: Request) -> str:
        return f"{request.path_params['owner']}/{request.path_params['name']}"

    def _is_allowed(self, request: Request) -> bool:
        return request.headers.get("authorization") == f"Bearer {self.token}"

    def _commit_id(self, name: str) -> str:
        digest = hashlib.sha1()
        for path, content in sorted(self.files[name].items()):
            digest.update(path.encode() + content)
        return digest.hexdigest()

    async def _create(self, request: Request) -> Response:
        if not self._is_allowed(request):
            return JSONResponse({"error": "Invalid username or password."}, status_code=401)
        body = await request.json()
        name = f"{body['organization']}/{body['name']}" if body.get("organization") else body["name"]
        if name in self.files:
            return JSONResponse({"error": "You already created this model repo", "url": name}, status_code=409)
        self.files[name] = {}
        self.private[name] = bool(body.get("private") or body.get("visibility") == "private")
        return JSONResponse({"url": f"{request.base_url}{name}", "name": name})

    async def _validate(self, request: Request) -> Response:
        return JSONResponse({"errors": [], "warnings": []})

    async def _preupload(self, request: Request) -> Response:
        body = await request.json()
        files = [{"path": f["path"], "uploadMode": "regular", "shouldIgnore": False} for f in body["files"]]
        return JSONResponse({"files": files})

    async def _commit(self, request: Request) -> Response:
        if not self._is_allowed(request):
            return JSONResponse({"error": "unauthorized"}, status_code=401)
        name = self._name(request)
        for line in (await request.body()).splitlines():
            entry = json.loads(line)
            if entry["key"] == "file":
                self.files[name][entry["value"]["path"]] = base64.b64decode(entry["value"]["content"])
        oid = self._commit_id(name)
        return JSONResponse({"commitUrl": f"{request.base_url}{name}/commit/{oid}", "commitOid": oid, "success": True})

    def _missing(self, request: Request) -> Response | None:
        name = self._name(request)
        if name not in self.files or (self.private[name] and not self._is_allowed(request)):
            return JSONResponse({"error": "not found"}, status_code=404, headers={"X-Error-Code": "RepoNotFound"})
        return None

    async def _info(self, request: Request) -> Response:
        name = self._name(request)
        return self._missing(request) or JSONResponse(
            {
                "id": name,
                "sha": self._commit_id(name),
                "private": self.private[name],
                "siblings": [{"rfilename": path} for path in self.files[name]],
            }
        )

    async def _tree(self, request: Request) -> Response:
        return self._missing(request) or JSONResponse(
            [
                {"type": "file", "path": path, "size": len(content), "oid": hashlib.sha1(content).hexdigest()}
                for path, content in self.files[self._name(request)].items()
            ]
        )

    async def _resolve(self, request: Request) -> Response:
        if (missing := self._missing(request)) is not None:
            return missing
        name, path = self._name(request), request.path_params["path"]
        if path not in self.files[name]:
            return Response(status_code=404, headers={"X-Error-Code": "EntryNotFound"})
        content = self.files[name][path]
        headers = {"ETag": f'"{hashlib.sha1(content).hexdigest()}"', "X-Repo-Commit": self._commit_id(name)}
        return Response(content, headers=headers)
