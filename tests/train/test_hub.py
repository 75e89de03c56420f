"""Uploads to the Hub: refused before training without a token, offline or without a right; then what is sent."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from huggingface_hub import constants

from hfbatch.errors import SpecError, WorkerError
from hfbatch.train.hub import hub_faults, open_repository, upload
from tests.train.hub_server import Hub, hub_server


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """A hub on loopback that this process is pointed at."""
    with hub_server() as found:
        monkeypatch.setattr(constants, "ENDPOINT", found.url)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setenv("HF_TOKEN", "hf_abc")
        yield found


def test_what_is_wrong_is_reported_before_work(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert hub_faults(None) == []
    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "none"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    name, offline, token = hub_faults("org/model/more")
    assert name == "push_to_hub 'org/model/more' is not a repository name; write org/model"
    assert "HF_HUB_OFFLINE is set" in offline
    assert "needs a token; set HF_TOKEN" in token
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setenv("HF_TOKEN", "hf_abc")
    assert hub_faults("org/model") == []


def test_the_repository_is_created_private_and_the_right_to_write_is_checked(hub: Hub) -> None:
    open_repository("org/model")
    (created,) = hub.created
    assert (created["organization"], created["name"], created["visibility"]) == ("org", "model", "private")
    assert any("auth-check" in call for call in hub.calls)
    assert hub.tokens == {"Bearer hf_abc"}
    hub.readable_only = True
    with pytest.raises(SpecError, match="'org/model' cannot be written to") as caught:
        open_repository("org/model")
    assert "hf_abc" not in str(caught.value)


def test_the_whole_folder_is_uploaded(hub: Hub, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "model.safetensors").write_bytes(b"weights")
    upload(str(tmp_path), "org/model")
    assert hub.files == {"config.json": b"{}", "model.safetensors": b"weights"}


def test_a_folder_on_s3_is_uploaded_too(hub: Hub, s3: dict[str, str]) -> None:
    import boto3

    client = boto3.client("s3", endpoint_url=s3["endpoint"])
    client.put_object(Bucket=s3["bucket"], Key="out/model/config.json", Body=b"{}")
    upload(f"s3://{s3['bucket']}/out/model", "org/model")
    assert hub.files == {"config.json": b"{}"}


def test_a_hub_that_takes_nothing_leaves_the_model(hub: Hub, tmp_path: Path) -> None:
    hub.readable_only = True
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(WorkerError, match="the same command uploads again"):
        upload(str(tmp_path), "org/model")
    assert (tmp_path / "config.json").exists()
