"""A student to the Hugging Face hub, with a page that says how to use it."""

from __future__ import annotations

import os
import re
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...core.card import CardError, StudentCard, read_card
from ...trainer.checkpoint.merged import of_folder
from ...trainer.data.files import DataError, check_file, whole_folder
from ..export.export import Export
from ..export.merge import PARTS
from ..export.student import StudentFile
from ..export.tensors import ExportError, Weights
from .model_card import LORA_NAME, Page, check_license, readme

NAME = re.compile(r"[A-Za-z0-9](?:[A-Za-z0-9._-]{0,94}[A-Za-z0-9_])?")
PICTURES = (".png", ".jpg", ".jpeg", ".webp")
LARGEST = 2**25  # bytes of a picture on the page
LOGIN = "log in with `hf auth login`, or give a token by HF_TOKEN or --token"


@dataclass(frozen=True)
class Upload:
    """What goes to a repository: files, or their content, by their paths there; what to say of it, in words."""

    repo: str
    files: Mapping[str, Path | bytes]
    remarks: tuple[str, ...] = ()

    def sizes(self) -> dict[str, int]:
        """Bytes by path."""
        return {n: len(f) if isinstance(f, bytes) else f.stat().st_size for n, f in self.files.items()}


@contextmanager
def prepared(
    student: Path,
    repo: str,
    license: str,
    base_model: str = "",
    grid: Path | None = None,
    base: Path | None = None,
) -> Iterator[Upload]:
    """What is uploaded of a student's file or a diffusers folder of one, within: the files made for it go afterwards.

    `base_model` is the base's name on the hub, `grid` a picture (else the newest preview of the run that the file lies
    in), `base` the base on disk, which a LoRA of a transformer needs to be written for diffusers. Raises ExportError,
    CardError or DataError before anything is made.
    """
    license = check_license(license)
    check_repo("repository", repo)
    if base_model:
        check_repo("--base-model", base_model)
    grid = _grid(student, grid)
    with tempfile.TemporaryDirectory(prefix="turbodistill-") as made:
        files: dict[str, Path | bytes] = {}
        if student.is_dir():
            card = _folder_card(student)
            files |= {p.relative_to(student).as_posix(): p for p in sorted(student.rglob("*")) if p.is_file()}
            page = Page(repo, card, license, base_model)
        else:
            page = _of_file(student, Page(repo, read_card(student), license, base_model), files, Path(made), base)
        if grid is not None:
            name = f"grid{grid.suffix.lower()}"
            files[name], page = grid, _with(page, grid=name)
        files["README.md"] = readme(page).encode()
        yield Upload(repo, files, _remarks(page))


def _of_file(student: Path, page: Page, files: dict[str, Path | bytes], made: Path, base: Path | None) -> Page:
    """The file itself; of a LoRA also diffusers' form of it."""
    files[student.name] = student
    if page.card.kind == "full":
        inside = Weights(student)
        return _with(page, file=student.name, whole=any(n.startswith(PARTS[1:]) for n in inside))
    if base is None and not StudentFile(student).of_a_unet():
        return _with(page, file=student.name)  # a transformer's, of which the base says how diffusers splits it
    for _ in Export(student, "peft", made / LORA_NAME, base).run():
        pass
    files[LORA_NAME] = made / LORA_NAME
    return _with(page, file=student.name, lora=True)


def _remarks(page: Page) -> tuple[str, ...]:
    if page.lora or page.card.kind == "full" or not page.file:
        return ()
    return (f"{page.file} goes without diffusers' form of it, {LORA_NAME}: give the base on disk by --base to add it",)


def _with(page: Page, **changes: Any) -> Page:
    return Page(**(page.__dict__ | changes))


def _folder_card(folder: Path) -> StudentCard:
    if card := of_folder(folder):
        return card
    raise ExportError(
        f"{folder} is no diffusers folder of a student: make one with `turbodistill export --to diffusers`, or give "
        "the student's file"
    )


def _grid(student: Path, grid: Path | None) -> Path | None:
    """The picture for the page: the one given, or the newest preview beside the student."""
    if grid is None:
        return max((student.parent / "previews").glob("*.png"), default=None)
    check_file("the picture", grid)
    if grid.suffix.lower() not in PICTURES or grid.stat().st_size > LARGEST:
        raise ExportError(f"grid is {grid!s:.300}: give a picture ({', '.join(PICTURES)}) of up to {LARGEST >> 20} MB")
    return grid


def check_repo(what: str, repo: str) -> None:
    """Raise ExportError for a name that no repository can have."""
    owner, _, name = repo.partition("/")
    if not (NAME.fullmatch(owner) and NAME.fullmatch(name)) or ".." in repo or "--" in repo or repo.endswith(".git"):
        raise ExportError(
            f"{what} is {repo!r:.120}: give owner/name, each of up to 96 letters, digits, '-', '_' and '.', without "
            "'--' or '..'"
        )


def write(upload: Upload, folder: Path) -> None:
    """Everything as it would be uploaded, in a new folder; raises ExportError if there is one, OSError in words."""
    if folder.exists():
        raise ExportError(f"{folder!s:.300} is there already: give another folder by --out")
    with whole_folder(folder) as part:
        for name, content in upload.files.items():
            (part / name).parent.mkdir(parents=True, exist_ok=True)
            if isinstance(content, bytes):
                (part / name).write_bytes(content)
            else:
                shutil.copyfile(content, part / name)


def push(
    upload: Upload, token: str | None = None, private: bool = False, revision: str = "", create_pr: bool = False
) -> str:
    """Upload everything in one commit, and give its address, or that of the pull request.

    Without `token` the hub's own login or HF_TOKEN counts. The repository is made if there is none. Raises ExportError,
    which says what to do; the token is in no message.
    """
    if create_pr and revision:
        raise ExportError("--create-pr goes to the main branch: leave out --revision")
    from huggingface_hub import CommitOperationAdd, HfApi, constants, get_token

    if constants.HF_HUB_OFFLINE:
        raise ExportError("HF_HUB_OFFLINE is set, so nothing is uploaded: unset it")
    if not (token or get_token()):
        raise ExportError(f"nobody is logged in on the hub: {LOGIN}")
    operations = [
        CommitOperationAdd(path_in_repo=name, path_or_fileobj=content if isinstance(content, bytes) else str(content))
        for name, content in upload.files.items()
    ]
    api = HfApi(token=token)
    with _in_words(upload.repo, revision):
        if create_pr:
            api.repo_info(upload.repo)
        else:
            api.create_repo(upload.repo, private=private or None, exist_ok=True)
        if revision and revision != constants.DEFAULT_REVISION:
            api.create_branch(upload.repo, branch=revision, exist_ok=True)
        done = api.create_commit(
            upload.repo,
            operations,
            commit_message="A student by TurboDistill",
            revision=revision or None,
            create_pr=create_pr,
        )
    return done.pr_url or done.commit_url


@contextmanager
def _in_words(repo: str, revision: str) -> Iterator[None]:
    """Within, what the hub or the network answers is an ExportError that says what to do."""
    from huggingface_hub import constants

    try:
        yield
    except (CardError, DataError):
        raise
    except Exception as error:  # its libraries raise those of three different HTTP clients, by version
        status = getattr(getattr(error, "response", None), "status_code", None)
        kinds = {kind.__name__ for kind in type(error).__mro__}
        words = {
            401: f"the hub does not accept the token for {repo} (401): {LOGIN}",
            403: f"the token may not write to {repo} (403): give one with the role write for {repo.partition('/')[0]}",
            404: f"{repo}{f' at {revision}' if revision else ''} is not on the hub (404): check the name",
            409: f"somebody else changed {repo} meanwhile (409): run it again",
            413: "the hub takes no file that large (413): export the student as a LoRA",
        }
        if status in words:
            message = words[status]
        elif "LocalTokenNotFoundError" in kinds:
            message = f"nobody is logged in on the hub: {LOGIN}"
        elif kinds & {"TransportError", "ConnectionError", "Timeout", "TimeoutException"}:
            message = f"the hub at {constants.ENDPOINT} cannot be reached ({type(error).__name__}): check the network"
        elif status is not None:
            message = f"the hub refused {repo} ({status}: {_first_line(error)}): try again later"
        elif isinstance(error, (ValueError, OSError)):
            message = f"the upload to {repo} failed ({_first_line(error)})"
        else:
            raise
        raise ExportError(message) from None


def _first_line(error: Exception) -> str:
    """What an error says, on one line and without anything that looks like a token."""
    return re.sub(r"hf_\w+|Bearer \S+", "...", " ".join(str(error).split()))[:300]


def default_folder(repo: str) -> Path:
    """Where a dry run writes."""
    return Path(os.curdir) / repo.partition("/")[2]
