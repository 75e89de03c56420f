"""Uploads a finished model to the Hugging Face Hub, and checks before training that this is possible."""

from __future__ import annotations

import pyarrow.fs as pafs

from hfbatch.data.filesystem import is_local, one_line, open_filesystem
from hfbatch.data.temporary import own_folder
from hfbatch.errors import SpecError, WorkerError


def hub_faults(repo: str | None) -> list[str]:
    """Checks offline that a model can be uploaded. :param repo: None for no upload."""
    from huggingface_hub import constants, get_token
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    if repo is None:
        return []
    faults = []
    try:
        validate_repo_id(repo)
    except HFValidationError:
        faults.append(f"push_to_hub {repo!r} is not a repository name; write org/model")
    if constants.HF_HUB_OFFLINE:
        faults.append(f"push_to_hub {repo!r}: HF_HUB_OFFLINE is set; unset it, or leave push_to_hub out")
    if get_token() is None:
        faults.append(
            f"push_to_hub {repo!r} needs a token; set HF_TOKEN to one with write access, or leave push_to_hub out"
        )
    return faults


def open_repository(repo: str) -> None:
    """Creates the repository, private, unless it exists. :raises SpecError: if the token has no write access."""
    from huggingface_hub import HfApi

    try:
        HfApi().create_repo(repo, private=True, exist_ok=True)
        HfApi().auth_check(repo, write=True)
    except Exception as error:  # the HTTP client raises its own errors if the Hub is unreachable
        raise SpecError(
            f"push_to_hub {repo!r} cannot be written to: {one_line(error)}; check the name and the token's permissions"
        ) from error


def upload(model: str, repo: str) -> str:
    """Uploads a finished model; returns the URL of the commit.

    :param model: its folder or URL.
    :raises WorkerError: if the upload fails; the model stays in the output.
    """
    from huggingface_hub import HfApi

    fs, root = open_filesystem(model)
    with own_folder("upload-") as own:
        local = own / "model"  # since the folder itself also contains its owner's mark
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
                f"the model is finished, but its upload to {repo} failed: {one_line(error)}; the same command uploads again"
            ) from error
