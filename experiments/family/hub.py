"""Checkpoints to a hub, by the hub's own library."""

from collections.abc import Sequence
from pathlib import Path

import httpx
from huggingface_hub import HfApi, get_token
from huggingface_hub.errors import HfHubHTTPError

from gptoss_jax.errors import OutputError, reason


def push(folders: Sequence[Path], owner: str, endpoint: str | None = None) -> list[str]:
    """Upload each folder to OWNER/its name, and give the addresses; OutputError where one is refused.

    The folders stay as they are, and what was uploaded before stays on the hub: the same call goes on.
    """
    api = HfApi(endpoint=endpoint)
    if get_token() is None:
        raise OutputError(f"{api.endpoint}: takes no model without a token: set HF_TOKEN, or run `hf auth login`")
    return [_push(api, folder, f"{owner}/{folder.name}") for folder in folders]


def _push(api: HfApi, folder: Path, repository: str) -> str:
    try:
        made = api.create_repo(repository, exist_ok=True)
        api.upload_folder(repo_id=repository, folder_path=folder, commit_message="The checkpoint and its card")
    except (httpx.HTTPError, OSError, ValueError, RuntimeError) as error:
        # A failed upload of one file hides why in its cause.
        cause = error.__cause__ if isinstance(error, RuntimeError) and error.__cause__ else error
        raise OutputError(f"{repository}: not uploaded to {api.endpoint}: {_words(cause)}") from None
    return str(made)


def _words(error: BaseException) -> str:
    if isinstance(error, HfHubHTTPError):
        status, said = error.response.status_code, error.response.reason_phrase.lower()
        advice = "give a token that may write there" if status in (401, 403) else "run the same command again later"
        return f"refused with {status} ({said}): {advice}"
    if isinstance(error, httpx.TransportError | OSError):
        return f"the connection failed ({reason(error)}): look at the network and --endpoint"
    return reason(error)
