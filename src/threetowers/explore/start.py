"""`threetowers explore`: reads its arguments, opens the runs, and serves the page until it is interrupted."""

import contextlib
import importlib.util
import json
import secrets
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import tyro

from threetowers.commands.words import parse
from threetowers.errors import DataError, UsageError
from threetowers.progress import warn

if TYPE_CHECKING:
    from threetowers.explore.explorer import Explorer
    from threetowers.explore.guard import Guard

NEEDED = ("starlette", "uvicorn")
TOKEN_CHARS = 16
"""Of a token at least."""


@dataclass(frozen=True, kw_only=True)
class ExploreArguments:
    """Open a page on this machine: search, zero-shot classes, similarities, a map, and curves of a run that goes on."""

    runs: Annotated[
        tyro.conf.Positional[tuple[Path, ...]],
        tyro.conf.arg(help="Run folders to see side by side, or the folder of a comparison."),
    ]
    data: Annotated[
        str | None, tyro.conf.arg(help="Images to search; none is the test data of the first finished run.")
    ] = None
    host: Annotated[str, tyro.conf.arg(help="Address to bind to; another than loopback needs a token.")] = (
        "127.0.0.1"
    )
    port: Annotated[int, tyro.conf.arg(help="0 takes a free one.")] = 8423
    token: Annotated[
        str | None, tyro.conf.arg(help="A secret of 16 characters or more that every request must show.")
    ] = None
    device: Annotated[str, tyro.conf.arg(help="auto, cpu, cuda or cuda:1.")] = "auto"


def explore(words: list[str]) -> int:
    """see what runs have learned, on a local page: threetowers explore RUN [RUN …] [--data PATH] [--port 8423]"""
    arguments = parse(ExploreArguments, words, "explore")
    check(arguments)

    from threetowers.explore.server import application

    folders = run_folders(arguments.runs)
    explorer = open_runs(folders, arguments.data, arguments.device)
    serve(application(explorer, folders, host=arguments.host, token=arguments.token), arguments)
    return 0


def check(arguments: ExploreArguments) -> None:
    """Raises UsageError for arguments that cannot be meant, and for libraries that are not installed."""
    missing = [name for name in NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        raise UsageError(
            f"explore: {' and '.join(missing)} not installed; pip install 'threetowers[explore]'"
        )

    from threetowers.explore.guard import is_loopback

    if not arguments.runs:
        raise UsageError("explore: name a run folder, or several: threetowers explore RUN [RUN …]")
    if not 0 <= arguments.port < 2**16:
        raise UsageError(
            f"--port: {arguments.port} is no port; give one from 1024 to 65535, or 0 for a free one"
        )
    token = arguments.token
    if token is not None and (len(token) < TOKEN_CHARS or not token.isascii() or not token.isprintable()):
        raise UsageError(
            f"--token: {TOKEN_CHARS} printable ASCII characters or more are needed, such as {secrets.token_urlsafe(18)}"
        )
    if token is None and not is_loopback(arguments.host):
        raise UsageError(
            f"--host {arguments.host}: other machines could read your images; give a secret as well, such as --token "
            f"{secrets.token_urlsafe(18)}"
        )


def run_folders(given: tuple[Path, ...]) -> list[Path]:
    """The run folders that are meant: each as given, and of a comparison its runs of the first seed.

    Raises CheckpointError for a folder without a run, DataError for a comparison that cannot be read.
    """
    from threetowers.explore.curves import check_run

    folders: list[Path] = []
    for folder in given:
        comparison = folder / "compare.json"
        if comparison.is_file():
            try:
                runs = json.loads(comparison.read_bytes())["runs"]
                first = min(run["seed"] for run in runs)
                folders += [folder / run["path"] for run in runs if run["seed"] == first]
            except (ValueError, KeyError, TypeError) as error:
                raise DataError(
                    f"{comparison}: cannot be read ({error!r}); run the comparison again, or name its runs"
                ) from None
        else:
            folders.append(folder)
    folders = list(dict.fromkeys(folders))
    for folder in folders:
        check_run(folder)
    return folders


def open_runs(folders: list[Path], data: str | None, device: str) -> "Explorer | None":
    """The finished ones of the runs on common images; None where none is finished, which is said.

    data: a source, or None for the test data of the first finished run. Raises CheckpointError, DataError, UsageError.
    """
    from threetowers.data.open import open_source
    from threetowers.explore.curves import is_finished
    from threetowers.explore.explorer import Explorer
    from threetowers.explore.gallery import open_gallery
    from threetowers.explore.models import open_model
    from threetowers.explore.trained import trained_on
    from threetowers.run.setup import open_data
    from threetowers.settings import read_config

    for folder in folders:
        if not is_finished(folder):
            warn(
                f"{folder}: not finished, so only its curves are shown; run its train command again, and then explore"
            )
    finished = [folder for folder in folders if is_finished(folder)]
    if not finished:
        return None
    configs = [read_config(folder / "config.toml") for folder in finished]
    if data is None:
        source, name = open_data(configs[0])[2], Path(configs[0].data or "").name
    else:
        source, name = open_source(data), Path(data).name
    if not len(source):
        raise DataError(f"{finished[0]}: it has no test data; name images to search with --data SOURCE")
    models = [open_model(folder, device) for folder in finished]
    parts = [model.run.described.get("data", {}) for model in models]
    fingerprints = [str(part.get("train", {}).get("fingerprint")) for part in parts]
    trained = trained_on(source, data, list(zip(configs, fingerprints, strict=True)))
    return Explorer(models, *open_gallery(models, source, name, is_test=data is None, trained=trained))


def serve(app: "Guard", arguments: ExploreArguments) -> None:
    """Listens until it is interrupted; raises UsageError for an address that cannot be bound."""
    from threetowers.explore.listen import Listener

    def said(port: int) -> None:
        name = f"[{arguments.host}]" if ":" in arguments.host else arguments.host
        query = "" if arguments.token is None else f"?token={arguments.token}"
        print(f"http://{name}:{port}/{query}   (Ctrl-C ends it)", flush=True)

    with contextlib.suppress(KeyboardInterrupt):
        Listener(app, arguments.host, arguments.port, said).run()
