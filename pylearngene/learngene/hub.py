# SPDX-License-Identifier: Apache-2.0
"""The Hugging Face Hub as another place for a gene folder; its client is imported only when it is needed.

Fetching ends in a local folder that is read with the same distrust as any other.
"""

from __future__ import annotations

import contextlib
import os
import re
import tempfile
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from pylearngene.errors import GeneFileError, WriteError
from pylearngene.files import dtype_name, path_text, shown, write_folder
from pylearngene.learngene.folder import CONFIG_FILE, TENSOR_FILE
from pylearngene.learngene.host import HostSpec, require

_REPO_ID = re.compile(r"[A-Za-z0-9][\w.\-]*/[A-Za-z0-9][\w.\-]*", re.ASCII)


def _reason(error: Exception) -> str:
    return shown(f"{type(error).__name__}: {error}".splitlines()[0])[1:-1]


def find_folder(place: str | os.PathLike[str], revision: str | None) -> Path:
    """Return the local folder; a text that is none but looks like `owner/name` is fetched from the Hub."""
    folder = Path(place)
    with contextlib.suppress(OSError):
        if folder.is_dir():
            return folder
    what = f"folder {path_text(place)}"
    if os.path.lexists(folder):
        raise GeneFileError(f"{what}: expected a folder, got something else")
    if not isinstance(place, str) or _REPO_ID.fullmatch(place) is None:
        raise GeneFileError(f"{what}: expected a folder, found nothing there")
    try:
        from huggingface_hub import snapshot_download
    except ImportError:
        raise GeneFileError(f"{what}: found nothing there (to look on the Hub, install huggingface_hub)") from None
    try:
        return Path(snapshot_download(place, revision=revision, allow_patterns=[TENSOR_FILE, CONFIG_FILE]))
    except Exception as error:  # the Hub client raises many unrelated classes
        raise GeneFileError(f"{what}: found nothing there, and nothing on the Hub: {_reason(error)}") from error


def card(repo_id: str, method: str, host: HostSpec, stored: Mapping[str, Tensor]) -> str:
    """Return a README in Markdown: method, host, sizes, the table of tensors; the licence is left to its author."""
    rows = []
    for name, tensor in stored.items():
        shape = " x ".join(map(str, tensor.shape)) or "scalar"
        rows.append(f"| `{name}` | {shape} | {dtype_name(tensor.dtype)} | {tensor.nbytes:,} |")
    values, size = sum(t.numel() for t in stored.values()), sum(t.nbytes for t in stored.values())
    return "\n".join(
        [
            "---",
            "library_name: pylearngene",
            "tags:",
            "- learngene",
            f"- {method}",
            "---",
            "",
            f"# {repo_id}",
            "",
            f"A learngene of method `{method}` for a host of family `{host.family}` "
            f"(blocks at `{host.blocks}`, depth {host.depth}): {values:,} values, {size:,} bytes.",
            "",
            "```python",
            "import pylearngene as plg",
            "",
            f'lg = plg.Learngene.from_pretrained("{repo_id}")',
            f"net = lg.descend(depth={host.depth})",
            "```",
            "",
            "## Licence",
            "",
            "Not stated yet: add the licence under which you share these tensors.",
            "",
            "## Tensors",
            "",
            "| name | shape | dtype | bytes |",
            "|---|---|---|---:|",
            *rows,
            "",
        ]
    )


def upload(
    repo_id: str,
    files: Mapping[str, bytes],
    readme: str,
    *,
    private: bool | None = None,
    revision: str | None = None,
    commit_message: str | None = None,
    token: str | bool | None = None,
) -> str:
    """Upload files to a repository, made if it does not exist, and the README only where there is none yet.

    Raises:
        ArgumentError: `repo_id` is not of the form `owner/name`.
        WriteError: huggingface_hub is missing, or the Hub cannot be reached or refuses.
    """
    require(isinstance(repo_id, str) and _REPO_ID.fullmatch(repo_id) is not None, "repo_id", "owner/name", repo_id)
    try:
        from huggingface_hub import HfApi
    except ImportError:
        raise WriteError("push_to_hub: expected the package huggingface_hub, it is not installed") from None
    try:
        api = HfApi(token=token)
        api.create_repo(repo_id, private=private, exist_ok=True)
        if not api.file_exists(repo_id, "README.md", revision=revision):
            files = {**files, "README.md": readme.encode()}
        with tempfile.TemporaryDirectory() as folder:
            write_folder(folder, files)
            commit = api.upload_folder(
                repo_id=repo_id, folder_path=folder, revision=revision, commit_message=commit_message
            )
    except Exception as error:  # the client raises many unrelated classes
        raise WriteError(f"push_to_hub: repository {shown(repo_id)} was not written: {_reason(error)}") from error
    return str(commit.commit_url)
