"""A model hub: checkpoints that are read from it, and bundles that are uploaded to it.

A file of a hub is named `hf://ORG/NAME[@REVISION]/FILE.pt`.  Which commit a name meant is decided
once, at the download, and recorded.  What is said to the hub goes through this module alone.
"""

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

FORM = "hf://ORG/NAME[@REVISION]/FILE.pt"
REPOSITORY_NAME = re.compile(r"[\w.-]+/[\w.-]+")
_FILE = re.compile(r"hf://([\w.-]+/[\w.-]+?)(?:@([\w.-]+))?/((?:(?!\.\.)[\w.-]+/)*[\w.-]+\.pt)")


@dataclass(frozen=True)
class HubFile:
    """A file of a repository on the hub, at a branch, tag or commit."""

    repository: str
    file: str
    revision: str = "main"

    @classmethod
    def parse(cls, name: str) -> "HubFile":
        """Reads `hf://ORG/NAME[@REVISION]/FILE.pt`.

        Raises:
            ValueError: it is not written like that.
        """
        match = _FILE.fullmatch(name)
        if match is None:
            raise ValueError(f"{name} does not name a file of a model hub: write {FORM}")
        return cls(match[1], match[3], match[2] or "main")

    def at(self, commit: str) -> str:
        """Its name with the commit, which always means the same bytes."""
        return f"hf://{self.repository}@{commit}/{self.file}"


@contextmanager
def _explained(what: str) -> Iterator[None]:
    """Turns what the hub's client raises into a line that says what failed.

    Raises:
        ValueError: the hub or the network refuses.
    """
    try:
        yield
    except Exception as error:  # the hub's own kinds of error are many, and not all are OSError
        reason = next(iter(str(error).splitlines()), "") or type(error).__name__
        refused = getattr(getattr(error, "response", None), "status_code", None) in (401, 403)
        log_in = "; log in with `hf auth login`, or set HF_TOKEN" if refused else ""
        raise ValueError(f"{what} failed ({reason}){log_in}") from error


def download(wanted: HubFile) -> tuple[Path, dict[str, str]]:
    """Fetches a file of the hub into the cache of its client.

    Returns:
        The file there; and `revision`, the commit that it is of, with `licence`, if its repository
        states one.

    Raises:
        ValueError: it cannot be fetched.
    """
    import huggingface_hub

    with _explained(f"the download of {wanted.repository}/{wanted.file}"):
        info = huggingface_hub.HfApi().model_info(wanted.repository, revision=wanted.revision)
        fetched = huggingface_hub.hf_hub_download(wanted.repository, wanted.file, revision=info.sha)
    licence = info.card_data.get("license") if info.card_data else None
    facts = {"revision": str(info.sha)} | ({"licence": str(licence)} if licence else {})
    return Path(fetched), facts


def upload(repository: str, files: Mapping[str, Path | bytes], message: str) -> str:
    """Puts files into a repository of the hub in one commit; a new repository is made private.

    Args:
        repository: ORG/NAME.
        files: path in the repository -> a file here, or its content.
        message: of the commit.

    Returns:
        The commit's address.

    Raises:
        ValueError: the hub or the network refuses.
    """
    import huggingface_hub

    with _explained(f"the upload to {repository}"):
        api = huggingface_hub.HfApi()
        api.create_repo(repository, private=True, exist_ok=True)
        adds = [
            huggingface_hub.CommitOperationAdd(name, content) for name, content in files.items()
        ]
        done = api.create_commit(repository, adds, commit_message=message)
    return str(done.commit_url)
