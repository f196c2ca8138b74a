"""Names to paths: local ones as they are, hub ids through a loopback server that speaks the hub's protocol."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import huggingface_hub
import huggingface_hub.constants
import numpy as np
import pytest

from gemma2_fast.errors import HubError
from gemma2_fast.weights import hub as hub_module
from gemma2_fast.weights.hub import resolve_model
from gemma2_fast.weights.safetensors import read_safetensors_directory
from gemma2_fast.weights.tensor import Tensor
from gemma2_fast.weights.writer import write_safetensors
from tests.weights.hub_server import COMMIT, Hub, Repository, serve

SECRET = "hf_secret"
WANTED = {
    "config.json": b'{"a": 1}',
    "generation_config.json": b'{"b": 1}',
    "model-00001-of-00002.safetensors": b"",
    "model-00002-of-00002.safetensors": b"",
    "model.safetensors.index.json": b"",
    "tokenizer.json": b'{"c": 1}',
    "tokenizer.model": b"sp",
    "tokenizer_config.json": b'{"d": 1}',
    "chat_template.jinja": b"{{ 1 }}",
    "special_tokens_map.json": b'{"e": 1}',
}
UNWANTED = dict.fromkeys(("README.md", "model.gguf", "pytorch_model.bin", "flax/model.safetensors", "a.png"), b"large")


def checkpoint_files(directory: Path) -> dict[str, bytes]:
    """A repository whose two shards are true safetensors files."""
    shards = [name for name in WANTED if name.endswith("of-00002.safetensors")]
    for number, shard in enumerate(shards):
        write_safetensors(directory / shard, {f"t{number}": Tensor.from_float32(np.full(2, number, dtype=np.float32))})
    index = {"weight_map": {f"t{number}": shard for number, shard in enumerate(shards)}}
    files = WANTED | {shard: (directory / shard).read_bytes() for shard in shards}
    return files | {"model.safetensors.index.json": json.dumps(index).encode()} | UNWANTED


def use_endpoint(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """HF_ENDPOINT is read when the library is imported; this changes it afterwards."""
    download = partial(huggingface_hub.snapshot_download, endpoint=url)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    (tmp_path / "source").mkdir()
    files = checkpoint_files(tmp_path / "source")
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
    repositories = {
        "google/open": Repository(files),
        "google/gated": Repository(files, token=SECRET),
        "google/gguf-only": Repository({"config.json": b"{}", "model.gguf": b"GGUF"}),
        "google/broken": Repository(files, status=500),
    }
    with serve(repositories) as hub:
        use_endpoint(hub.url, monkeypatch)
        monkeypatch.setattr(huggingface_hub.constants, "HF_TOKEN_PATH", str(tmp_path / "no-token"))
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
        yield hub


def resolve(name: str, tmp_path: Path, **options: object) -> Path:
    return resolve_model(name, cache_dir=tmp_path / "cache", **options)  # type: ignore[arg-type]


def test_a_local_path_is_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "owner" / "model").mkdir(parents=True)
    (tmp_path / "m.gguf").touch()
    assert resolve_model(tmp_path) == tmp_path
    assert resolve_model(str(tmp_path / "m.gguf")) == tmp_path / "m.gguf"
    monkeypatch.chdir(tmp_path)
    assert resolve_model("owner/model") == Path("owner/model")  # a directory goes before a hub id
    monkeypatch.setenv("HOME", str(tmp_path))
    assert resolve_model("~/m.gguf") == tmp_path / "m.gguf"


@pytest.mark.parametrize(
    "name",
    [
        "/no/such/model",
        "./model",
        "../model",
        "~/model",
        "~nobody-here/model",
        "model",
        "a/b/c",
        "owner/m.gguf",
        "",
        "owner/",
        "a\\b",
        "o/m x",
    ],
)
def test_a_path_that_does_not_exist_is_not_looked_for_on_the_hub(name: str, hub: Hub, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="does not exist .*give a directory, a .gguf file or a hub id"):
        resolve(name, tmp_path)
    assert hub.requests == []


def test_a_path_object_is_never_a_hub_id(hub: Hub, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        resolve_model(Path("google/open"), cache_dir=tmp_path / "cache")
    assert hub.requests == []


@pytest.mark.parametrize("revision", [None, "main", COMMIT])
def test_downloads_what_a_checkpoint_needs_and_nothing_else(revision: str | None, hub: Hub, tmp_path: Path) -> None:
    directory = resolve("google/open", tmp_path, revision=revision)
    assert sorted(str(p.relative_to(directory)) for p in directory.rglob("*")) == sorted(WANTED)
    assert hub.downloads() == sorted(WANTED)
    assert directory.is_relative_to(tmp_path / "cache")
    tensors = read_safetensors_directory(directory).tensors  # through the links of the hub's cache
    assert {name: t.to_float32().tolist() for name, t in tensors.items()} == {"t0": [0, 0], "t1": [1, 1]}


def test_a_second_time_downloads_nothing(hub: Hub, tmp_path: Path) -> None:
    first = resolve("google/open", tmp_path)
    hub.requests.clear()
    assert resolve("google/open", tmp_path) == first
    assert hub.downloads() == []
    hub.requests.clear()
    assert resolve("google/open", tmp_path, local_files_only=True) == first
    assert hub.requests == []


def test_a_gated_model_names_its_licence_page_and_the_token(hub: Hub, tmp_path: Path) -> None:
    for token in (None, "hf_other"):
        with pytest.raises(HubError) as caught:
            resolve("google/gated", tmp_path, token=token)
        assert "google/gated is gated: accept its licence at https://huggingface.co/google/gated" in str(caught.value)
        assert "HF_TOKEN" in str(caught.value)
        assert isinstance(caught.value, OSError)
        assert hub.downloads() == []


@pytest.mark.parametrize("source", ["argument", "environment"])
def test_a_token_opens_a_gated_model(source: str, hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if source == "environment":
        monkeypatch.setenv("HF_TOKEN", SECRET)
        directory = resolve("google/gated", tmp_path)
    else:
        directory = resolve("google/gated", tmp_path, token=SECRET)
    assert (directory / "tokenizer.model").read_bytes() == b"sp"


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("google/absent", {}, r"google/absent was not found on the hub, and no such path exists here.*HF_TOKEN"),
        ("google/open", {"revision": "v9"}, r"google/open has no revision 'v9': give a branch, tag or commit"),
        ("google/gguf-only", {}, r"google/gguf-only holds no .safetensors files; .*\.gguf"),
        (
            "google/open",
            {"local_files_only": True},
            r"google/open is not, .* in the .*cache, and local_files_only=True",
        ),
        ("google/open", {"token": True}, r"token=True needs a stored login; set HF_TOKEN or run `hf auth login`"),
        ("google/bro--ken", {}, r"'google/bro--ken' is not a hub id \(owner/name\)"),
    ],
)
def test_says_what_to_do(name: str, options: dict[str, object], message: str, hub: Hub, tmp_path: Path) -> None:
    with pytest.raises(HubError, match=message):
        resolve(name, tmp_path, **options)


def test_a_hub_that_fails_is_quoted(hub: Hub, tmp_path: Path) -> None:
    with pytest.raises(HubError, match=r"the hub at \S+ answered: .*500.*; try again"):
        resolve("google/broken", tmp_path)


def test_offline_says_so(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = resolve("google/open", tmp_path)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    hub.requests.clear()
    assert resolve("google/open", tmp_path) == first
    with pytest.raises(HubError, match="google/gated is not, .* in the local cache, and HF_HUB_OFFLINE forbids"):
        resolve("google/gated", tmp_path)
    assert hub.requests == []


def test_a_hub_out_of_reach_says_so(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = resolve("google/open", tmp_path)
    use_endpoint("http://127.0.0.1:9", monkeypatch)  # the discard port: nobody listens
    assert resolve("google/open", tmp_path) == first
    message = r"in the local cache, and the hub at https://\S+ cannot be reached \(.*\); check the network"
    with pytest.raises(HubError, match=message):
        resolve("google/gated", tmp_path)


def test_an_error_of_the_transport_becomes_a_hub_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class ProxyError(Exception):
        pass

    def fail(*_: object, **__: object) -> None:
        raise ProxyError("the proxy refused\nand more")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    with pytest.raises(HubError, match="google/open could not be downloaded: the proxy refused; try again$"):
        resolve("google/open", tmp_path)


def test_a_download_that_stopped_half_way_is_not_taken_for_whole(hub: Hub, tmp_path: Path) -> None:
    directory = resolve("google/open", tmp_path)
    (directory / "config.json").unlink()
    with pytest.raises(HubError, match="not completely, in the local cache, and local_files_only=True"):
        resolve("google/open", tmp_path, local_files_only=True)
    assert (resolve("google/open", tmp_path) / "config.json").exists()


@pytest.mark.parametrize("is_terminal", [False, True])
def test_bars_need_a_terminal(
    is_terminal: bool, hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: is_terminal, raising=False)
    resolve("google/open", tmp_path, progress=False)
    assert capsys.readouterr() == ("", "")
    bar = hub_module._progress_bar(True)
    assert (bar is None) == is_terminal


def test_the_environment_is_honoured(hub: Hub, tmp_path: Path) -> None:
    """HF_ENDPOINT, HF_HOME, HF_TOKEN and HF_HUB_OFFLINE, which the library reads once, in a process of its own."""
    code = "import sys; from gemma2_fast.weights.hub import resolve_model; print(resolve_model(sys.argv[1]))"

    def run(name: str, **environment: str) -> subprocess.CompletedProcess[str]:
        package = Path(hub_module.__file__).parents[2]
        env = {**os.environ, "HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "home"), "NO_PROXY": "127.0.0.1"}
        env |= {"PYTHONPATH": os.pathsep.join([str(package), env.get("PYTHONPATH", "")]), **environment}
        return subprocess.run([sys.executable, "-c", code, name], env=env, capture_output=True, text=True, timeout=60)

    loaded = run("google/gated", HF_TOKEN=SECRET)
    assert loaded.returncode == 0, loaded.stderr
    assert Path(loaded.stdout.strip()).is_relative_to(tmp_path / "home" / "hub")
    assert loaded.stderr == ""
    hub.requests.clear()
    offline = run("google/open", HF_HUB_OFFLINE="1")
    assert "HF_HUB_OFFLINE forbids downloads" in offline.stderr
    assert hub.requests == []


def test_importing_the_module_does_not_import_the_hub_library() -> None:
    code = "import sys, gemma2_fast.weights.hub; print('huggingface_hub' in sys.modules)"
    package = Path(hub_module.__file__).parents[2]
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(package), os.environ.get("PYTHONPATH", "")])}
    result = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, timeout=60)
    assert result.stdout.strip() == "False", result.stderr
