"""A model's name → where its files lie: a local path as it is, a hub id after a download into the hub's own cache."""

from __future__ import annotations

import os
import re
import sys
from pathlib import Path
from typing import Any

from gemma2_fast.errors import HubError

# What a checkpoint needs; everything else in a repository (GGUF and Flax copies, pictures) stays where it is.
WANTED = (
    "config.json",
    "generation_config.json",
    "*.safetensors",
    "*.safetensors.index.json",
    "tokenizer*",
    "chat_template*",
    "special_tokens_map.json",
)
UNWANTED = ("*/*",)
HUB_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*/[A-Za-z0-9][A-Za-z0-9._-]*")
MODEL_PAGES = "https://huggingface.co/"


def resolve_model(
    name_or_path: str | os.PathLike[str],
    *,
    revision: str | None = None,
    token: str | bool | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
    local_files_only: bool = False,
    progress: bool = True,
) -> Path:
    """The directory with a model's config, safetensors and tokenizer files, or its .gguf file.

    token: None takes HF_TOKEN or the stored login. HF_ENDPOINT, HF_HUB_OFFLINE, HF_HOME and HF_TOKEN are honoured; the
    hub's library reads them when it is first imported, which is here.
    Errors: FileNotFoundError for a path that does not exist; HubError, saying what to do, for all else.
    """
    name = str(name_or_path)
    path = Path(os.path.expanduser(name_or_path))
    if name and path.exists():
        return path
    if not isinstance(name_or_path, str) or not HUB_ID.fullmatch(name) or name.endswith((".gguf", ".safetensors")):
        raise FileNotFoundError(
            f"{name!r} does not exist (looked at {path.absolute()}); "
            "give a directory, a .gguf file or a hub id such as google/gemma-2-2b-it"
        )
    directory = _download(name, revision, token, cache_dir, local_files_only, progress)
    if not any(directory.glob("*.safetensors")):
        raise HubError(
            f"{_named(name, revision)} holds no .safetensors files; pick a repository that does, or download its .gguf "
            "file yourself and give the path of that"
        )
    return directory


def _download(
    hub_id: str,
    revision: str | None,
    token: str | bool | None,
    cache_dir: str | os.PathLike[str] | None,
    local_files_only: bool,
    progress: bool,
) -> Path:
    # Half a second and many modules: only who names a hub id pays for them.
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (
        GatedRepoError,
        HFValidationError,
        LocalEntryNotFoundError,
        LocalTokenNotFoundError,
        OfflineModeIsEnabled,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    named = _named(hub_id, revision)
    try:
        return Path(
            snapshot_download(
                hub_id,
                revision=revision,
                token=token,
                cache_dir=None if cache_dir is None else os.fspath(cache_dir),
                local_files_only=local_files_only,
                allow_patterns=list(WANTED),
                ignore_patterns=list(UNWANTED),
                tqdm_class=_progress_bar(progress),
            )
        )
    except GatedRepoError as error:
        raise HubError(
            f"{named} is gated: accept its licence at {MODEL_PAGES}{hub_id} with your Hugging Face account, then set "
            f"HF_TOKEN (or pass token=) to a token of that account"
        ) from error
    except RepositoryNotFoundError as error:
        raise HubError(
            f"{named} was not found on the hub, and no such path exists here: check the name; for a private or gated "
            f"model ({MODEL_PAGES}{hub_id}) set HF_TOKEN (or pass token=) to a token that may read it"
        ) from error
    except RevisionNotFoundError as error:
        raise HubError(
            f"{hub_id} has no revision {revision!r}: give a branch, tag or commit that {MODEL_PAGES}{hub_id} lists"
        ) from error
    except (LocalEntryNotFoundError, OfflineModeIsEnabled) as error:
        raise HubError(_not_cached(named, local_files_only, error)) from error
    except LocalTokenNotFoundError as error:
        raise HubError(f"{named}: token=True needs a stored login; set HF_TOKEN or run `hf auth login`") from error
    except HFValidationError as error:
        raise HubError(f"{hub_id!r} is not a hub id (owner/name): {error}") from error
    except Exception as error:  # the transport's own, which differ from version to version of the library
        raise HubError(f"{named} could not be downloaded: {_first_line(error)}; try again") from error


def _named(hub_id: str, revision: str | None) -> str:
    return hub_id if revision is None else f"{hub_id} at revision {revision}"


def _not_cached(named: str, local_files_only: bool, error: Exception) -> str:
    from huggingface_hub import constants
    from huggingface_hub.errors import HfHubHTTPError

    if local_files_only:
        reason = "local_files_only=True forbids downloads; leave it out once"
    elif constants.HF_HUB_OFFLINE:
        reason = "HF_HUB_OFFLINE forbids downloads; unset it once"
    elif isinstance(error.__cause__, HfHubHTTPError):
        reason = f"the hub at {constants.ENDPOINT} answered: {_first_line(error.__cause__)}; try again"
    else:
        reason = f"the hub at {constants.ENDPOINT} cannot be reached ({_first_line(error)}); check the network"
    return f"{named} is not, or not completely, in the local cache, and {reason}"


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def _progress_bar(progress: bool) -> type[Any] | None:
    """None takes the hub's own bars; else a bar that shows nothing, so that a pipe gets no control characters."""
    if progress and sys.stderr.isatty():
        return None
    from tqdm.auto import tqdm

    def disabled(bar: Any, *args: Any, **kwargs: Any) -> None:
        tqdm.__init__(bar, *args, **{**kwargs, "disable": True})

    return type("SilentBar", (tqdm,), {"__init__": disabled})
