"""Models on the Hugging Face Hub, through huggingface_hub (the extra `hub`), which is imported when it is needed.

The library's own settings decide the rest: $HF_TOKEN, $HF_HOME, $HF_HUB_OFFLINE.
"""

import importlib
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType

from bvae.errors import UserError


def is_model_id(name: str) -> bool:
    """True for a name of the Hub's form, `user/name`."""
    return re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", name, re.ASCII) is not None


@contextmanager
def _library(repo_id: str) -> Iterator[ModuleType]:
    """huggingface_hub; its failures in the block become a UserError of one line."""
    try:
        library = importlib.import_module("huggingface_hub")
    except ImportError:
        raise UserError(f"{repo_id}: no such folder here, and the Hub needs: pip install 'bvae[hub]'") from None
    errors = importlib.import_module("huggingface_hub.errors")
    try:
        yield library
    except errors.RepositoryNotFoundError as error:  # a gated one too
        raise UserError(f"{repo_id}: no such folder here, and no such model on the Hub, or no access to it") from error
    except errors.RevisionNotFoundError as error:
        raise UserError(f"{repo_id}: the Hub's model has no such revision") from error
    except errors.LocalEntryNotFoundError as error:
        raise UserError(
            f"{repo_id}: no such folder here, nor in the Hub's cache, and the Hub cannot be reached"
        ) from error
    except errors.EntryNotFoundError as error:
        raise UserError(f"{repo_id}: the Hub has it, but it is not a model of bvae ({_first_line(error)})") from error
    except (OSError, ValueError) as error:  # HfHubHTTPError, OfflineModeIsEnabled, HFValidationError, a full disk
        raise UserError(f"{repo_id}: {_first_line(error)}") from error


def _first_line(error: Exception) -> str:
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


def download(repo_id: str, files: Sequence[str], revision: str | None = None) -> Path:
    """The folder of the Hub's cache that holds `files` of one commit of a model. Raises UserError."""
    with _library(repo_id) as library:
        first, *others = files
        folder = Path(library.hf_hub_download(repo_id, first, revision=revision)).parent
        for name in others:  # of the same commit, even where somebody uploads another in between
            library.hf_hub_download(repo_id, name, revision=folder.name)
        return folder


def upload(folder: Path, repo_id: str, private: bool | None, message: str) -> str:
    """Uploads a folder's files to a model, which is made where there is none; returns the commit's address.

    Raises UserError.
    """
    with _library(repo_id) as library:
        api = library.HfApi(library_name="bvae")
        repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
        return str(api.upload_folder(repo_id=repo_id, folder_path=folder, commit_message=message).commit_url)
