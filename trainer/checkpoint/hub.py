"""Models of the hub, through its own client: its cache, its offline mode, its revisions and its token."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable
from pathlib import Path
from typing import Any

from .errors import ModelError
from .folder import BESIDE, INDEX, SHARD, choose_variant
from .header import PICKLES
from .merged import CARD

NAME = re.compile(r"(?P<repository>[\w.-]+/[\w.-]+)(?:/(?P<file>.+\.safetensors))?")
SMALL = (".json", ".txt", ".model", ".jinja")
ENDINGS = (".safetensors", *PICKLES)  # of a file that is not there, rather than of a repository
LOGIN = "log in with `hf auth login`, or set HF_TOKEN"


def named(source: str) -> tuple[str, str | None] | None:
    """A repository of the hub, and a file in it, that a source names: owner/name or owner/name/file.safetensors."""
    match = NAME.fullmatch(source)
    if match is None or ".." in source or source[0] in "./~" or match["repository"].endswith(ENDINGS):
        return None
    return match["repository"], match["file"]


def wanted(names: Iterable[str], variant: str | None, only: Collection[str] | None = None) -> list[str]:
    """Of a repository's files those that a pipeline needs: descriptions, tokenizers, one variant of the weights.

    Of all its components, or `only` of those.
    """
    parts = {n.partition("/")[0] for n in names} - set(BESIDE)
    names = [n for n in names if n.partition("/")[0] in (parts if only is None else {INDEX, *only})]
    chosen = [n for n in names if n in (INDEX, CARD)]
    for component in sorted({n.partition("/")[0] for n in names if n.count("/") == 1}):
        inside = [n.partition("/")[2] for n in names if n.startswith(f"{component}/")]
        kind, files = choose_variant(inside, variant)
        shards = [n for n in inside if SHARD.search(n) and (f".{kind}" in n) == bool(kind)]
        use = [n for n in inside if n.endswith(SMALL) and ".index." not in n] + files
        use += shards if files and files[0].endswith(".json") else []
        chosen += [f"{component}/{n}" for n in use]
    return chosen


def fetch(
    repository: str,
    file: str | None = None,
    *,
    revision: str | None = None,
    token: str | bool | None = None,
    variant: str | None = None,
    only: Collection[str] | None = None,
    endpoint: str | None = None,
) -> Path:
    """The folder of a pipeline, or the single `file`, in the hub's cache; what is not there is downloaded.

    Of a pipeline all components, or `only` those.

    Without a network, or with HF_HUB_OFFLINE, the cache alone counts. Raises ModelError, with what to do.
    """
    try:
        from huggingface_hub import errors
    except ImportError as error:
        raise ModelError(f"a model of the hub needs {error.name}: pip install 'turbodistill[demo]'") from None
    try:
        if file:
            return _file(repository, file, revision=revision, token=token, endpoint=endpoint)
        return _folder(repository, variant, only, revision=revision, token=token, endpoint=endpoint)
    except ModelError:
        raise
    except Exception as error:  # a network has no end of ways to fail, and none of them is a fault of ours
        what = repository + (f" at revision {revision:.100}" if revision else "")
        reasons: tuple[tuple[type[Exception], str], ...] = (
            (errors.GatedRepoError, f"{what} on the hub is gated: accept its terms on its page there, then {LOGIN}"),
            (errors.RevisionNotFoundError, f"{what} is not on the hub: give a branch, tag or commit that it has"),
            (
                errors.RepositoryNotFoundError,
                f"{what} is neither a file or folder here nor a model on the hub that you can see: check the name; if "
                f"it is private, {LOGIN}",
            ),
            (
                errors.LocalEntryNotFoundError,
                f"{what} is neither a file or folder here nor in the hub's cache, and the hub cannot be reached (no "
                "network, or HF_HUB_OFFLINE is set): check the name, or connect once",
            ),
            (errors.EntryNotFoundError, f"{what} on the hub has no file {file!s:.200}: check the name"),
            (errors.HFValidationError, f"{repository:.200} can be no model on the hub: check the name"),
            (Exception, f"{what} cannot be had from the hub ({_answer(error)})"),
        )
        raise ModelError(next(words for kind, words in reasons if isinstance(error, kind))) from None


def _answer(error: Exception) -> str:
    """What a server answered, or else what went wrong, and what to do."""
    code = getattr(getattr(error, "response", None), "status_code", 0)
    if code in (401, 403):
        return f"{code}, not allowed: {LOGIN}, with a token that may read it"
    return f"answer {code}: try again later" if code else f"{error!s:.200}: check network and disk"


def _file(repository: str, file: str, **how: Any) -> Path:
    from huggingface_hub import hf_hub_download

    return Path(hf_hub_download(repository, file, **how))


def _folder(
    repository: str,
    variant: str | None,
    only: Collection[str] | None,
    *,
    revision: str | None,
    token: Any,
    endpoint: str | None,
) -> Path:
    """A pipeline's folder in the cache, with what was lacking downloaded; without a network as it is there."""
    from huggingface_hub import HfApi, errors, snapshot_download

    try:
        info = HfApi(endpoint=endpoint, token=token).model_info(repository, revision=revision)
    except (errors.HfHubHTTPError, errors.HFValidationError) as error:
        if getattr(getattr(error, "response", None), "status_code", 0) < 500:
            raise
        info = None
    except Exception:  # offline mode, no network, no name server, a proxy
        info = None
    if info is None:
        return Path(snapshot_download(repository, revision=revision, local_files_only=True))
    names = [s.rfilename for s in info.siblings or ()]
    if INDEX not in names:
        files = sorted(n for n in names if n.endswith(".safetensors") and "/" not in n)
        hint = f"give one of its files, such as {repository}/{files[0]}" if files else "give another"
        raise ModelError(f"{repository} on the hub is no diffusers pipeline, it has no {INDEX}: {hint}")
    patterns = wanted(names, variant, only)
    return Path(
        snapshot_download(repository, revision=revision, token=token, endpoint=endpoint, allow_patterns=patterns)
    )
