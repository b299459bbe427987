"""`threetowers push`: an exported folder goes to the Hugging Face Hub, after what is sent has been said and agreed to.

Only the files that an export writes are sent. Everything else in the folder is left out, by name. The upload itself is
huggingface_hub's, which also finds the token and the endpoint (HF_TOKEN, HF_ENDPOINT).
"""

import contextlib
import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import HfApi, constants, get_token, is_offline_mode, metadata_load
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, RepositoryNotFoundError
from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]  # documented there

from threetowers import __version__
from threetowers.commands.arguments import PushArguments
from threetowers.errors import UsageError
from threetowers.export.formats import ALSO, FORMATS
from threetowers.towers.frozen.base import first_line

MAIN = "main"
"""The revision that the Hub shows and that libraries load when none is named."""
MOST_NAMED = 10
"""Files of a list that are named; of the others the number is said."""


@dataclass(frozen=True)
class Repository:
    """What the Hub knows of a repository: its visibility, and the names of the files that are there."""

    private: bool
    files: frozenset[str]


def push(arguments: PushArguments) -> str:
    """Sends the files of an export to a repository of the Hub; returns a line that says where they are.

    What will be sent is printed first. On a terminal it has to be agreed to, and elsewhere --yes has to be given.
    Raises UsageError for a folder that no export has written, for a name that the Hub does not take, and for what the
    Hub or the network refuse.
    """
    folder, repository = arguments.folder, arguments.repository
    files, others = export_files(folder)
    _check_name(repository)
    if not (arguments.yes or sys.stdin.isatty()):
        raise UsageError("push: there is no terminal to ask on; give --yes to send without being asked")
    constants.HF_HUB_DISABLE_TELEMETRY = True  # the client would tell, and look up, what else runs it
    api = HfApi(library_name="threetowers", library_version=__version__)
    if is_offline_mode():
        raise UsageError("push: HF_HUB_OFFLINE is set, so nothing can be sent; unset it")
    if get_token() is None:
        raise UsageError(
            f"push: there is no token for {api.endpoint}; log in with `hf auth login`, or set HF_TOKEN to a token with "
            "write access"
        )
    with _plainly(api.endpoint, repository):
        there = _look(api, repository)
    if there and arguments.private and not there.private:
        raise UsageError(
            f"push: {repository} is there already and public, and --private is for a new repository; change its "
            "visibility on the Hub, or give another name"
        )
    print("\n".join(_plan(arguments, api.endpoint, files, others, there)), flush=True)
    if not (arguments.yes or _agreed()):
        return "nothing was sent"
    with _plainly(api.endpoint, repository):
        if there is None:
            api.create_repo(repository, private=arguments.private)
        if arguments.revision != MAIN:
            api.create_branch(repository, branch=arguments.revision, exist_ok=True)
        commit = api.upload_folder(
            repo_id=repository,
            folder_path=folder,
            allow_patterns=files,
            revision=arguments.revision,
            commit_message="Model exported by threetowers",
        )
    return f"sent: {commit.commit_url}"


def export_files(folder: Path) -> tuple[list[str], list[str]]:
    """The files of an export in a folder, and the files that are no part of it, sorted.

    Raises UsageError for a folder that is no complete export; it names what is missing.
    """
    if not folder.is_dir():
        raise UsageError(f"push: {folder}: there is no such folder")
    if (folder / "config.toml").is_file():
        raise UsageError(
            f"push: {folder} is a run folder; export it first: threetowers export {folder} --to open_clip --out DIR"
        )
    found = sorted(str(path.relative_to(folder).as_posix()) for path in folder.rglob("*") if path.is_file())
    lacking = {name: [file for file in form.files if file not in found] for name, form in FORMATS.items()}
    complete = [name for name, missing in lacking.items() if not missing]
    if not complete:
        nearest = min(lacking, key=lambda name: len(lacking[name]))
        raise UsageError(
            f"push: {folder} is no export of threetowers: of the format {nearest}, {', '.join(lacking[nearest])} "
            f"{'are' if len(lacking[nearest]) > 1 else 'is'} missing; write one with `threetowers export`"
        )
    if "open_clip" in complete:
        _check_encoder(folder / "open_clip_config.json")
    own = {file for name in complete for file in FORMATS[name].files} | set(ALSO)
    return [file for file in found if file in own], [file for file in found if file not in own]


def _check_encoder(path: Path) -> None:
    """Raises UsageError for an open_clip_config.json whose text tower needs a folder of this machine."""
    with contextlib.suppress(
        ValueError, KeyError, TypeError
    ):  # no such model: open_clip says what is wrong with it
        name = json.loads(path.read_bytes())["model_cfg"]["text_cfg"]["hf_model_name"]
        if name and Path(name).is_absolute():
            raise UsageError(
                f"push: {path}: hf_model_name is a folder of this machine, {name}. Write the name on the Hub of the "
                "encoder that the text tower started at there, such as sentence-transformers/all-MiniLM-L6-v2"
            )


def _check_name(repository: str) -> None:
    try:
        validate_repo_id(repository)
    except HFValidationError as error:
        raise UsageError(f"push: {first_line(error)}") from None
    if "/" not in repository:
        raise UsageError(
            f"push: {repository!r}: say whose it is: USER/{repository} or ORGANISATION/{repository}"
        )


def _look(api: HfApi, repository: str) -> Repository | None:
    """The repository as it is; None where there is none, or none that the token may see."""
    try:
        info = api.model_info(repository)
    except RepositoryNotFoundError:
        return None
    return Repository(bool(info.private), frozenset(each.rfilename for each in info.siblings or ()))


def _plan(
    arguments: PushArguments,
    endpoint: str,
    files: Sequence[str],
    others: Sequence[str],
    there: Repository | None,
) -> Iterator[str]:
    """What will be sent, and where to, line by line."""
    private = there.private if there else arguments.private
    state = "is there already" if there else "will be created"
    sizes = {name: (arguments.folder / name).stat().st_size for name in files}
    yield f"endpoint    {endpoint}"
    yield f"repository  {arguments.repository}, {'private' if private else 'public'}, {state}"
    yield f"revision    {arguments.revision}"
    yield from (f"{size:>16,} bytes  {name}" for name, size in sizes.items())
    yield f"{sum(sizes.values()):>16,} bytes  in all"
    if others:
        yield f"not sent, because no part of the export: {_named(others)}"
    if there and arguments.revision == MAIN:
        replaced, kept = sorted(there.files.intersection(files)), sorted(there.files.difference(files))
        if replaced:
            yield f"replaced there: {_named(replaced)}"
        if kept:
            yield f"left as they are there: {_named(kept)}"
    if not _has_licence(arguments.folder / "README.md"):
        yield "README.md names no licence; add `license: …` to its metadata"


def _named(files: Sequence[str]) -> str:
    more = len(files) - MOST_NAMED
    return ", ".join(files[:MOST_NAMED]) + (f" and {more:,} more" if more > 0 else "")


def _has_licence(card: Path) -> bool:
    """Whether the metadata of a card name a licence. Raises UsageError for metadata that are no valid YAML."""
    try:
        return "license" in (metadata_load(card) or {})
    except Exception as error:  # of a YAML reader, which is the client's
        raise UsageError(
            f"push: {card}: the metadata at the top cannot be read ({first_line(error)})"
        ) from None


def _agreed() -> bool:
    try:
        return input("send? [y/N] ").strip().lower() in ("y", "yes")
    except EOFError:
        return False


@contextlib.contextmanager
def _plainly(endpoint: str, repository: str) -> Iterator[None]:
    """Whatever the Hub, the network or their client refuse, as UsageError with what to do."""
    try:
        yield
    except Exception as error:  # of an HTTP client that differs between the versions of huggingface_hub
        refusal = next((each for each in _causes(error) if isinstance(each, HfHubHTTPError)), None)
        if refusal is None:
            (*_, first) = _causes(error)
            raise UsageError(
                f"push: {repository} could not be sent to {endpoint} ({first_line(first)}); look at the network and at "
                "HF_ENDPOINT, and give the same command again"
            ) from error
        status = refusal.response.status_code
        raise UsageError(
            f"push: {endpoint} refuses {repository} ({status}: {refusal.server_message or first_line(refusal)}); "
            f"{_remedy(status)}"
        ) from error


def _causes(error: BaseException) -> Iterator[BaseException]:
    """An error, what it was raised from, and so on."""
    found: BaseException | None = error
    while found is not None:
        yield found
        found = found.__cause__


def _remedy(status: int) -> str:
    if status == 401:
        return "the token is not valid there; log in with `hf auth login`, or set HF_TOKEN"
    if status in (403, 404):
        return "the token needs write access to this name; give it that access, or take another name"
    return "give the same command again later, or take another name"
