"""`threetowers push` sends the files of an export and no others, after it has said so; it never ends in a traceback."""

import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import constants

from kit.hub import Hub, running_hub
from threetowers import __version__, cli
from threetowers.commands.arguments import PushArguments
from threetowers.commands.push import export_files, push
from threetowers.errors import UsageError
from threetowers.export.formats import ALSO, FORMATS

# huggingface_hub hands its HTTP client a file in a way that the client advises against
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")

CARD = "---\nlibrary_name: open_clip\n---\n# A model trained with threetowers, for open_clip\n"
OPEN_CLIP = ["README.md", "open_clip_config.json", "open_clip_model.safetensors", *ALSO]


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Hub]:
    with running_hub() as found:
        monkeypatch.setattr(constants, "ENDPOINT", found.endpoint)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)  # its client speaks to servers of its own
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_TELEMETRY", False)
        monkeypatch.setenv("HF_TOKEN", "hf_secret")
        yield found


def export(folder: Path, name: str = "open_clip") -> Path:
    """A folder with the files of a format, of different bytes and odd lengths."""
    for number, file in enumerate(sorted({*FORMATS[name].files, *ALSO})):
        path = folder / file
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(bytes((index * 7 + number) % 256 for index in range(997 * (number + 1))))
    (folder / "README.md").write_text(CARD, encoding="utf-8")
    return folder


def send(folder: Path, **changes: Any) -> str:
    return push(PushArguments(**{"folder": folder, "repository": "me/pair", "yes": True, **changes}))


@pytest.mark.parametrize("name", FORMATS)
def test_every_byte_of_an_export_arrives_and_nothing_else(
    name: str, hub: Hub, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = export(tmp_path / "out", name)
    own = {
        path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()
    }
    others = (
        "events.log",
        "checkpoints/step-1/model.safetensors",
        ".env",
        "README-threetowers.md",
        "onnx/x.txt",
    )
    for other in others:
        (folder / other).parent.mkdir(parents=True, exist_ok=True)
        (folder / other).write_text("secret")
    assert send(folder) == f"sent: {hub.endpoint}/me/pair/commit/{'1' * 40}"
    assert hub.committed == {f"me/pair@main/{file}": content for file, content in own.items()}
    assert hub.repositories["me/pair"]["private"] is False and hub.branches == []
    assert [each for each in hub.requests if each[0] != "PUT" and each[2] != "Bearer hf_secret"] == []
    assert hub.agents and all(f"threetowers/{__version__}" in each for each in hub.agents)
    assert not any("torch" in each for each in hub.agents), "the client tells nothing about the machine"
    said = capsys.readouterr().out
    for file, content in own.items():
        assert f"{len(content):,} bytes  {file}\n" in said
    for words in (
        f"{sum(map(len, own.values())):,} bytes  in all", f"endpoint    {hub.endpoint}\n",
        "me/pair, public, will be created", "revision    main", "names no licence",
    ):  # fmt: skip
        assert words in said
    left_out = next(line for line in said.splitlines() if line.startswith("not sent"))
    assert all(other in left_out for other in others) and not any(f" {file}" in left_out for file in own)


def test_a_new_repository_can_be_private_and_have_a_branch(
    hub: Hub, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    send(export(tmp_path / "out"), private=True, revision="v2")
    assert hub.repositories["me/pair"]["private"] is True
    assert hub.branches == ["v2"] and {key.partition("/open_clip_config")[0] for key in hub.committed} >= {
        "me/pair@v2"
    }
    said = capsys.readouterr().out
    assert "me/pair, private, will be created" in said and "revision    v2" in said


@pytest.mark.parametrize("private", [True, False])
def test_a_repository_that_is_there_stays_as_visible_as_it_is(
    private: bool, hub: Hub, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    hub.repositories["me/pair"] = {"private": private, "files": ["README.md", "notes.txt"]}
    send(export(tmp_path / "out"))
    assert "/api/repos/create" not in [path for _, path, _ in hub.requests]
    said = capsys.readouterr().out
    assert f"me/pair, {'private' if private else 'public'}, is there already" in said
    assert "replaced there: README.md\n" in said and "left as they are there: notes.txt\n" in said


def test_a_public_repository_gets_nothing_that_was_meant_to_be_private(hub: Hub, tmp_path: Path) -> None:
    hub.repositories["me/pair"] = {"private": False, "files": []}
    with pytest.raises(UsageError, match=r"me/pair is there already and public.*another name"):
        send(export(tmp_path / "out"), private=True)
    assert hub.methods() == {"GET"}


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize(
    ("typed", "sent"), [("y\n", True), ("YES\n", True), ("n\n", False), ("\n", False), ("", False)]
)
def test_a_terminal_is_asked_after_everything_was_said(
    typed: str, sent: bool, hub: Hub, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.setattr("sys.stdin", Terminal(typed))
    answer = send(export(tmp_path / "out"), yes=False)
    assert answer.startswith("sent: ") == sent == bool(hub.committed)
    assert sent or (answer == "nothing was sent" and hub.methods() == {"GET"})
    plan, asked, _ = capsys.readouterr().out.partition("send? [y/N]")
    assert asked and "bytes  in all" in plan


def test_without_a_terminal_it_has_to_be_agreed_to_beforehand(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("y\n"))
    with pytest.raises(UsageError, match="--yes"):
        send(export(tmp_path / "out"), yes=False)
    assert hub.requests == []


def test_a_folder_that_is_no_export_is_refused_by_what_is_missing(tmp_path: Path) -> None:
    folder = export(tmp_path / "out")
    assert export_files(folder) == (sorted(OPEN_CLIP), [])
    (folder / "tokenizer.json").unlink()  # of a model with open_clip's own vocabulary
    assert "tokenizer.json" not in export_files(folder)[0]
    (folder / "open_clip_model.safetensors").unlink()
    with pytest.raises(UsageError, match=r"of the format open_clip, open_clip_model\.safetensors is missing"):
        export_files(folder)
    with pytest.raises(UsageError, match="no such folder"):
        export_files(tmp_path / "gone")
    (folder / "config.toml").touch()
    with pytest.raises(UsageError, match="is a run folder; export it first"):
        export_files(folder)


def no_token(monkeypatch: pytest.MonkeyPatch, hub: Hub, folder: Path) -> None:
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(folder / "none"))


def offline(monkeypatch: pytest.MonkeyPatch, hub: Hub, folder: Path) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)


def unreachable(monkeypatch: pytest.MonkeyPatch, hub: Hub, folder: Path) -> None:
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")  # `discard`, where nothing listens


def wrong_token(monkeypatch: pytest.MonkeyPatch, hub: Hub, folder: Path) -> None:
    hub.refuse["/api/models/"] = 401, "Invalid credentials in Authorization header"


def no_permission(monkeypatch: pytest.MonkeyPatch, hub: Hub, folder: Path) -> None:
    hub.refuse["/api/repos/create"] = 403, "You don't have the rights to create a model under the namespace"


def read_only(monkeypatch: pytest.MonkeyPatch, hub: Hub, folder: Path) -> None:
    hub.refuse["/commit/"] = 403, "This token has no write access"


def too_large(monkeypatch: pytest.MonkeyPatch, hub: Hub, folder: Path) -> None:
    hub.refuse["/lfs/objects/batch"] = 413, "Storage limit reached"


def damaged_card(monkeypatch: pytest.MonkeyPatch, hub: Hub, folder: Path) -> None:
    (folder / "README.md").write_text(CARD.replace("open_clip\n---", "[open_clip\n---"), encoding="utf-8")


@pytest.mark.parametrize(
    ("name", "around", "says"),
    [
        ("me/pair", no_token, ("no token", "hf auth login", "HF_TOKEN")),
        ("me/pair", offline, ("HF_HUB_OFFLINE", "unset")),
        ("me/pair", unreachable, ("http://127.0.0.1:9", "network", "HF_ENDPOINT")),
        ("me/pair", wrong_token, ("401", "Invalid credentials", "hf auth login")),
        ("me/pair", no_permission, ("403", "rights to create", "another name")),
        ("me/pair", read_only, ("403", "no write access", "write access to this name")),
        ("me/pair", too_large, ("413", "Storage limit reached", "later")),
        ("me/pair", damaged_card, ("README.md", "metadata")),
        ("pair", None, ("USER/pair",)),
        ("me/my pair", None, ("alphanumeric", "me/my pair")),
        ("a/b/c", None, ("namespace/repo_name",)),
    ],
)  # fmt: skip
def test_what_goes_wrong_is_said_in_one_line_with_what_to_do(
    name: str, around: Any, says: tuple[str, ...], hub: Hub, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    folder = export(tmp_path / "out")
    if around:
        around(monkeypatch, hub, folder)
    with pytest.raises(SystemExit) as stop:
        cli.main(["push", str(folder), name, "--yes"])
    said = capsys.readouterr().err
    assert stop.value.code == 2 and "Traceback" not in said
    (line,) = [line for line in said.splitlines() if line.startswith("threetowers: ")]
    assert all(each in line for each in says), line
    assert "hf_secret" not in said and not hub.committed


def test_flags_may_stand_alone_or_have_a_value(hub: Hub, tmp_path: Path) -> None:
    folder = export(tmp_path / "out")
    for number, words in enumerate((["--private", "--yes"], ["--private", "True", "--yes", "True"])):
        with pytest.raises(SystemExit) as stop:
            cli.main(["push", str(folder), f"me/pair{number}", *words])
        assert stop.value.code == 0 and hub.repositories[f"me/pair{number}"]["private"] is True
