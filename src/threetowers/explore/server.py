"""The web application: the page's files, and what it asks in JSON.

Every answer is made of what was read at the start. No part of a request is used as a path or an address: files go by
a table of names, images by their row, uploads by a name that the server gave.
"""

import asyncio
import json
import math
from collections.abc import Awaitable, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property, partial
from importlib.resources import files
from pathlib import Path
from typing import Any, TypeVar

from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from threetowers.data.decode import decode
from threetowers.errors import BadSample, ThreeTowersError
from threetowers.explore.curves import colours, curves
from threetowers.explore.explorer import Explorer, Query, Search, UnknownError
from threetowers.explore.guard import Guard, refused
from threetowers.settings import read_config

T = TypeVar("T")
TEXT_CHARS = 1_000
CLASSES = 200
MATRIX = 24
"""Images, and texts, of a matrix at most."""
ANSWERS = 100
_TYPES = {
    ".html": "text/html; charset=utf-8", ".css": "text/css; charset=utf-8",
    ".js": "text/javascript; charset=utf-8", ".svg": "image/svg+xml",
}  # fmt: skip


class WrongError(Exception):
    """A request that cannot be meant; the message says what was expected."""


def application(
    explorer: Explorer | None, folders: Sequence[Path], *, host: str = "127.0.0.1", token: str | None = None
) -> Guard:
    """The ASGI application of the page.

    explorer: None where no run is finished, so that curves are all there is. folders: of the runs whose curves are
    shown. host, token: as `Guard` takes them.
    """
    page = Page(explorer, folders)
    routes = [
        Route("/", page.file),
        Route("/page/{name}", page.file),
        Route("/image/{row}", page.image),
        Route("/api/about", page.about),
        Route("/api/curves", page.curves),
        Route("/api/search", page.search, methods=["POST"]),
        Route("/api/zero-shot", page.zero_shot, methods=["POST"]),
        Route("/api/matrix", page.matrix, methods=["POST"]),
        Route("/api/map", page.map, methods=["POST"]),
        Route("/api/item", page.item, methods=["POST"]),
        Route("/api/upload", page.upload, methods=["POST"]),
    ]
    handlers: dict[Any, Callable[[Request, Exception], Awaitable[Response]]] = {
        WrongError: partial(_says, 400),
        UnknownError: partial(_says, 404),
        ThreeTowersError: partial(_says, 400),
        BadSample: partial(_says, 422),
        404: _no_such_page,
    }
    return Guard(Starlette(routes=routes, exception_handlers=handlers), host, token)


async def _says(status: int, request: Request, error: Exception) -> Response:
    return refused(status, str(error))


async def _no_such_page(request: Request, error: Exception) -> Response:
    return refused(404, "there is no such page")


class Page:
    """The handlers. Models compute in one thread, and images are made small in another."""

    def __init__(self, explorer: Explorer | None, folders: Sequence[Path]) -> None:
        self.explorer, self.folders = explorer, list(folders)
        self._models, self._images = ThreadPoolExecutor(1), ThreadPoolExecutor(1)
        self._waiting: list[tuple[Search, asyncio.Future[list[list[dict[str, Any]]]]]] = []
        self._task: asyncio.Task[None] | None = None
        self._files = {
            each.name: (each.read_bytes(), _TYPES[Path(each.name).suffix])
            for each in files("threetowers.explore").joinpath("page").iterdir()
            if Path(each.name).suffix in _TYPES
        }

    @cached_property
    def colours(self) -> list[int]:
        return colours([read_config(folder / "config.toml").method for folder in self.folders])

    async def _compute(self, function: Callable[[], T]) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._models, function)

    def _explorer(self) -> Explorer:
        if self.explorer is None:
            raise UnknownError(
                "none of the runs is finished, so there is no model to ask; start again when one is"
            )
        return self.explorer

    async def file(self, request: Request) -> Response:
        found = self._files.get(request.path_params.get("name", "index.html"))
        if found is None:
            return refused(404, "there is no such page")
        return Response(found[0], media_type=found[1], headers={"cache-control": "no-cache"})

    async def about(self, request: Request) -> Response:
        if self.explorer is None:
            return JSONResponse({"columns": [], "gallery": None})
        values = await self._compute(self.explorer.about)
        for described, column in zip(values["columns"], self.explorer.columns, strict=True):
            described["colour"] = self.colours[self.folders.index(column.model.folder)]
        return JSONResponse(values)

    async def curves(self, request: Request) -> Response:
        loop = asyncio.get_running_loop()
        found = [await loop.run_in_executor(self._images, curves, folder) for folder in self.folders]
        return JSONResponse([
            {**run, "colour": colour} for run, colour in zip(found, self.colours, strict=True)
        ])  # fmt: skip

    async def image(self, request: Request) -> Response:
        gallery = self._explorer().gallery
        row = _row(request.path_params["row"])
        self._explorer().check_row(row)
        make = partial(gallery.thumbnail, row)
        data, kind = await asyncio.get_running_loop().run_in_executor(self._images, make)
        return Response(data, media_type=kind, headers={"cache-control": "private, max-age=86400, immutable"})

    async def search(self, request: Request) -> Response:
        body = await _body(request)
        want = body.get("want", "images")
        if want not in ("images", "captions"):
            raise WrongError("want: images or captions")
        k = _whole(body.get("k", 12), "k", 1, ANSWERS)
        return JSONResponse({"columns": await self._searched(Search(_query(body), want, _alpha(body), k))})

    async def _searched(self, search: Search) -> list[list[dict[str, Any]]]:
        """The answers to a search, found together with those of all searches that wait."""
        answers: asyncio.Future[list[list[dict[str, Any]]]] = asyncio.get_running_loop().create_future()
        self._waiting.append((search, answers))
        if len(self._waiting) == 1:  # a task of its own, which ends even when who asked first has left
            self._task = asyncio.create_task(self._answer_waiting())
        return await answers

    async def _answer_waiting(self) -> None:
        await self._compute(lambda: None)  # whoever comes before the models are free is taken along
        waiting, self._waiting = self._waiting, []
        try:
            found: Sequence[Any] = await self._compute(
                partial(self._explorer().search, [each for each, _ in waiting])
            )
        except Exception as error:
            found = [error] * len(waiting)
        for (_, answers), result in zip(waiting, found, strict=True):
            if answers.done():
                continue
            if isinstance(result, Exception):
                answers.set_exception(result)
            else:
                answers.set_result(result)

    async def zero_shot(self, request: Request) -> Response:
        body = await _body(request)
        names = _texts(body.get("classes"), "classes", CLASSES)
        template = _text(body.get("template") or "a photo of a {}.", "template")
        query = _query(body["query"]) if body.get("query") is not None else None
        ask = partial(self._explorer().zero_shot, names, template, _alpha(body), query)
        return JSONResponse({"columns": await self._compute(ask)})

    async def matrix(self, request: Request) -> Response:
        body = await _body(request)
        given = body.get("images")
        if not isinstance(given, list) or not 1 <= len(given) <= MATRIX:
            raise WrongError(f"images: a list of 1 to {MATRIX} is needed")
        images = [_query(each) for each in given]
        texts = _texts(body.get("texts"), "texts", MATRIX)
        ask = partial(self._explorer().matrix, images, texts, _alpha(body))
        return JSONResponse({"columns": await self._compute(ask)})

    async def map(self, request: Request) -> Response:
        body = await _body(request)
        explorer = self._explorer()
        number = _whole(body.get("column", 0), "column", 0, len(explorer.columns) - 1)
        system, kind = body.get("system", "main"), body.get("kind", "both")
        if system not in ("main", "third") or kind not in ("images", "captions", "both"):
            raise WrongError("system: main or third; kind: images, captions or both")
        return JSONResponse(await self._compute(partial(explorer.map, number, system, kind)))

    async def item(self, request: Request) -> Response:
        body = await _body(request)
        if "caption" in body:
            return JSONResponse(self._explorer().caption(_row(body["caption"])))
        return JSONResponse(self._explorer().picture(_row(body.get("image"))))

    async def upload(self, request: Request) -> Response:
        explorer = self._explorer()
        data = await request.body()

        def encode() -> str:
            return explorer.upload(decode(data, "the image"))

        return JSONResponse({"upload": await self._compute(encode)})


async def _body(request: Request) -> dict[str, Any]:
    """The JSON object of a request. Another content type is refused, since a form of a foreign page could send it."""
    if request.headers.get("content-type", "").partition(";")[0].strip() != "application/json":
        raise WrongError("content-type: application/json is needed")
    try:
        values = json.loads(await request.body())
    except (ValueError, RecursionError):
        raise WrongError("the body is not JSON") from None
    if not isinstance(values, dict):
        raise WrongError("the body is no JSON object")
    return values


def _query(values: Any) -> Query:
    if not isinstance(values, dict):
        raise WrongError("a query is an object with text, image or upload")
    given = [name for name in ("text", "image", "upload") if values.get(name) is not None]
    if len(given) != 1:
        raise WrongError("a query has one of text, image and upload")
    value = values[given[0]]
    if given[0] == "image":
        return Query(row=_row(value))
    text = _text(value, given[0])
    return Query(text=text) if given[0] == "text" else Query(upload=text)


def _row(value: Any) -> int:
    if isinstance(value, str) and value.isascii() and value.isdecimal() and len(value) < 12:
        value = int(value)
    if not isinstance(value, int) or isinstance(value, bool):
        raise WrongError("images and captions go by their numbers")
    return value


def _text(value: Any, name: str) -> str:
    """A text without what UTF-8 cannot carry."""
    if not isinstance(value, str) or not value.strip() or len(value) > TEXT_CHARS:
        raise WrongError(f"{name}: a text of 1 to {TEXT_CHARS:,} characters is needed")
    return value.encode("utf-8", "replace").decode()


def _texts(values: Any, name: str, most: int) -> list[str]:
    if not isinstance(values, list) or not 1 <= len(values) <= most:
        raise WrongError(f"{name}: a list of 1 to {most} texts is needed")
    return [_text(value, name) for value in values]


def _alpha(body: dict[str, Any]) -> float:
    value = body.get("alpha", 0.0)
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise WrongError("alpha: a number from 0 to 1 is needed")
    if not 0 <= value <= 1:
        raise WrongError("alpha: a number from 0 to 1 is needed")
    return float(value)


def _whole(value: Any, name: str, least: int, most: int) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= most:
        raise WrongError(f"{name}: a whole number from {least} to {most} is needed")
    return value
