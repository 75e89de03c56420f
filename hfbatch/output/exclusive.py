"""Creates a file only if it does not exist, on filesystems that support it.

Local and network disks: a hard link of a complete file. S3 and Google Cloud Storage: a conditional upload by obstore,
since pyarrow's filesystems have none.
"""

from __future__ import annotations

import errno
import os
import uuid
from collections.abc import Callable
from contextlib import suppress
from datetime import timedelta
from functools import lru_cache
from typing import Any

import pyarrow.fs as pafs

from hfbatch.data.filesystem import is_local, one_line
from hfbatch.output.layout import TEMPORARY_END
from hfbatch.output.writer import sync_folder

Create = Callable[[str, bytes], bool]
"""Takes a path on the filesystem and the content; returns whether it created the file, False if one existed."""

_NO_LINKS = {errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK, errno.EXDEV}


def exclusive_create(fs: pafs.FileSystem) -> Create | None:
    """Returns a function that creates files exclusively on a filesystem; None if the filesystem cannot.

    The function raises OSError if the file cannot be written, NotImplementedError if the server lacks the operation.
    """
    if is_local(fs):
        return _create_local
    if isinstance(fs, pafs.S3FileSystem):
        return _ObjectStore(fs, _s3_store)
    if isinstance(fs, getattr(pafs, "GcsFileSystem", ())):
        return _ObjectStore(fs, _gcs_store)
    return None


def _create_local(path: str, data: bytes) -> bool:
    """Creates a complete file; a process that dies meanwhile leaves only a temporary file."""
    folder, name = os.path.split(path)
    os.makedirs(folder, exist_ok=True)
    if os.path.lexists(path):
        return False
    temporary = os.path.join(folder, f".{name}.{uuid.uuid4().hex}{TEMPORARY_END}")
    try:
        _write_new(temporary, data)
        os.link(temporary, path)
    except (FileExistsError, FileNotFoundError):  # not found: the holder has deleted temporary files
        return False
    except OSError as error:
        if error.errno not in _NO_LINKS:
            raise
        try:
            _write_new(path, data)
        except FileExistsError:
            return False
    finally:
        with suppress(OSError):
            os.unlink(temporary)
    sync_folder(folder)
    return True


def _write_new(path: str, data: bytes) -> None:
    with open(path, "xb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


class _ObjectStore:
    """Creates objects by a conditional upload. :param open_store: returns the obstore store of a bucket."""

    def __init__(self, fs: pafs.FileSystem, open_store: Callable[[pafs.FileSystem, str], Any]) -> None:
        self._open = lru_cache(maxsize=1)(lambda bucket: open_store(fs, bucket))

    def __call__(self, path: str, data: bytes) -> bool:
        import obstore
        from obstore.exceptions import AlreadyExistsError, BaseError, NotSupportedError

        bucket, _, key = path.partition("/")
        try:
            obstore.put(self._open(bucket), key, data, mode="create")
        except AlreadyExistsError:
            return False
        except (BaseError, ValueError, FileNotFoundError) as error:
            cause = one_line(ValueError(str(error).partition("\n\nDebug source")[0]))
            if isinstance(error, NotSupportedError) or "501 Not Implemented" in cause:
                raise NotImplementedError(cause) from None
            raise OSError(cause) from None  # the original message is a page long
        return True


_LIMITS: dict[str, Any] = {
    "client_options": {"allow_http": True, "timeout": "30s", "connect_timeout": "10s"},
    "retry_config": {"max_retries": 3, "retry_timeout": timedelta(seconds=30)},
}


def _s3_store(fs: pafs.FileSystem, bucket: str) -> Any:
    """Opens a bucket with the endpoint and keys of pyarrow's filesystem, else with AWS's credential chain."""
    from obstore.store import S3Store

    options = fs.__reduce__()[1][0]  # pyarrow exposes these options only by pickling
    config: Any = {"region": fs.region}
    if options.get("endpoint_override"):
        scheme = "" if "://" in options["endpoint_override"] else f"{options.get('scheme') or 'https'}://"
        config["endpoint"] = scheme + options["endpoint_override"]
    if options.get("force_virtual_addressing"):
        config["virtual_hosted_style_request"] = True
    if options.get("access_key"):
        names = (
            ("access_key_id", "access_key"),
            ("secret_access_key", "secret_key"),
            ("token", "session_token"),
        )
        keys = {name: options[given] for name, given in names if options.get(given)}
        return S3Store(bucket, config=config | keys, **_LIMITS)
    if options.get("anonymous"):
        return S3Store(bucket, config=config | {"skip_signature": True}, **_LIMITS)
    from obstore.auth.boto3 import Boto3CredentialProvider

    try:
        provider = Boto3CredentialProvider()
    except ValueError:
        raise OSError(
            "no AWS credentials are found; set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY"
        ) from None
    return S3Store(bucket, config=config, credential_provider=provider, **_LIMITS)


def _gcs_store(fs: pafs.FileSystem, bucket: str) -> Any:
    from obstore.store import GCSStore

    return GCSStore(bucket, **_LIMITS)
