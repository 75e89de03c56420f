"""The upload of a finished model to the Hugging Face Hub, and what has to be so before training begins."""

from __future__ import annotations

import pyarrow.fs as pafs

from hfbatch.data.filesystem import is_local, one_line, open_filesystem
from hfbatch.data.temporary import own_folder
from hfbatch.errors import SpecError, WorkerError


def hub_faults(repo: str | None) -> list[str]:
    """What keeps a model from being uploaded, as far as this machine knows. :param repo: None for no upload."""
    from huggingface_hub import constants, get_token
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    if repo is None:
        return []
    faults = []
    try:
        validate_repo_id(repo)
    except HFValidationError:
        faults.append(f"push_to_hub {repo!r} is no name of a repository; write org/model")
    if constants.HF_HUB_OFFLINE:
        faults.append(f"push_to_hub {repo!r}: HF_HUB_OFFLINE is set; unset it, or leave push_to_hub out")
    if get_token() is None:
        faults.append(
            f"push_to_hub {repo!r} needs a token; set HF_TOKEN to one that may write, or leave push_to_hub out"
        )
    return faults


def open_repository(repo: str) -> None:
    """Creates the repository, private, unless it is there. :raises SpecError: if this token may not write to it."""
    from huggingface_hub import HfApi

    try:
        HfApi().create_repo(repo, private=True, exist_ok=True)
        HfApi().auth_check(repo, write=True)
    except Exception as error:  # the HTTP client has errors of its own for a Hub out of reach
        raise SpecError(
            f"push_to_hub {repo!r} cannot be written to: {one_line(error)}; check the name and what the token may do"
        ) from error


def upload(model: str, repo: str) -> str:
    """Uploads a finished model; returns the address of the commit.

    :param model: its folder or URL.
    :raises WorkerError: if the Hub does not take it; the model stays where it is.
    """
    from huggingface_hub import HfApi

    fs, root = open_filesystem(model)
    with own_folder("upload-") as own:
        local = own / "model"  # the folder itself holds the mark of its owner too
        local.mkdir()
        if not is_local(fs):
            pafs.copy_files(root, str(local), fs, pafs.LocalFileSystem())
        folder = root if is_local(fs) else str(local)
        try:
            return str(
                HfApi().upload_folder(repo_id=repo, folder_path=folder, commit_message="Upload by hfbatch")
            )
        except Exception as error:
            raise WorkerError(
                f"the model is finished, but {repo} did not take it: {one_line(error)}; the same command uploads again"
            ) from error
