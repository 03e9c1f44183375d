"""Files of models on the Hugging Face Hub, or a sentence that says what to download instead."""

import json
import pathlib
import socket
import urllib.parse
import urllib.request
from collections.abc import Callable

from save_jax import hub_ids
from save_jax.errors import UserError
from save_jax.weights.files import torchscript

# In order of preference; an index names the files that a large model is split into.
WEIGHTS = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)
INDEX = ".index.json"


def is_id(source: str) -> bool:
    """Says whether a source that is no path has the form of a hub id, or is a model of OpenAI's."""
    return bool(hub_ids.parse(source) or torchscript.official_address(source))


def download(source: str) -> pathlib.Path:
    """Returns the directory, in the hub's local cache, of a model's weights; may download them.

    Args:
        source: OWNER/NAME or OWNER/NAME@REVISION; without a revision, what the cache holds of the
            default branch or, if it holds nothing, that branch as it is now.

    Raises:
        UserError: the hub cannot be reached and the cache does not hold them, or there is no such
            model or revision.
    """
    address = torchscript.official_address(source)
    if address:
        raise UserError(
            f"{source} names one of OpenAI's models and is no path: download {address} and give "
            "the path of the file"
        )
    found = hub_ids.parse(source)
    if found is None:
        raise UserError(f"{source}: expected {hub_ids.FORM}")
    model, revision = found
    try:
        import huggingface_hub
        from huggingface_hub import errors
    except ImportError as error:
        raise UserError(
            f"there is no path {source}; to download it from the Hugging Face Hub: "
            "pip install -e '.[weights]' in the project's folder"
        ) from error

    def fetch(file: str) -> pathlib.Path:
        return pathlib.Path(huggingface_hub.hf_hub_download(model, file, revision=revision))

    for file in WEIGHTS:
        cached = huggingface_hub.try_to_load_from_cache(model, file, revision=revision)
        if isinstance(cached, str):
            path = pathlib.Path(cached)
            return _with_shards(path, fetch) if INDEX in file else path.parent
    url = huggingface_hub.hf_hub_url(model, WEIGHTS[0], revision=revision)
    offline = UserError(
        f"there is no path {source}, and the Hugging Face Hub cannot be reached: download {url} "
        f"where there is a network (or its {WEIGHTS[2]}, of a model that has none), put it into a "
        "directory here and give that directory"
    )
    if not _reachable(url):
        raise offline
    try:
        for file in WEIGHTS:
            try:
                path = fetch(file)
            except errors.RemoteEntryNotFoundError:
                continue
            return _with_shards(path, fetch) if INDEX in file else path.parent
    except errors.RevisionNotFoundError as error:
        raise UserError(
            f"{source}: {model} on the Hugging Face Hub has no branch, tag or commit {revision!r}"
        ) from error
    except (errors.RepositoryNotFoundError, errors.HFValidationError) as error:
        raise UserError(
            f"there is no path {source}, and the Hugging Face Hub has no such model"
        ) from error
    except (errors.LocalEntryNotFoundError, errors.HfHubHTTPError, OSError) as error:
        raise offline from error
    raise UserError(f"{source} on the Hugging Face Hub has none of {', '.join(WEIGHTS)}")


def _with_shards(index: pathlib.Path, fetch: Callable[[str], pathlib.Path]) -> pathlib.Path:
    for shard in sorted(set(json.loads(index.read_text())["weight_map"].values())):
        fetch(shard)
    return index.parent


def _reachable(url: str) -> bool:
    """Says whether the host has an address: the hub's client retries for half a minute."""
    import huggingface_hub.constants

    if huggingface_hub.constants.HF_HUB_OFFLINE:
        return False
    parts = urllib.parse.urlsplit(url)
    if urllib.request.getproxies().get(parts.scheme):
        return True
    try:
        return bool(socket.getaddrinfo(parts.hostname, parts.port or parts.scheme))
    except OSError:
        return False
