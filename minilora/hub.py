"""A base by its name on the model hub, ORG/NAME or ORG/NAME@REVISION, as a folder of this machine.

huggingface_hub (the extra `hub`) fetches it, into its own cache, with a bar, and goes on where a fetch was cut off.
Only the files of one layout are fetched: a repository may hold the same weights twice. Without a connection, what the
cache has is taken. A run pins the revision to the commit that it names when the run begins, and writes that down.
"""

import os
import re
from pathlib import Path

from minilora.config import TOKENIZER_FILES, base_folder
from minilora.errors import UserError, need_library

_HUB_NAME = re.compile(r"(?P<name>[\w-][\w.-]*/[\w-][\w.-]*)(@(?P<revision>[\w-][\w./-]*))?", re.ASCII)
_BESIDE = ("README.md", "minilora.json", *TOKENIZER_FILES)
_HF = ("config.json", "generation_config.json", "model.safetensors*", "model-*-of-*.safetensors", *_BESIDE)
_MISTRAL = ("params.json", "consolidated*.safetensors*", *_BESIDE)
_ANSWER_S = 10  # as long as the hub may take for its first answer


def local_folder(path: str | Path, tokenizer_only: bool = False) -> Path:
    """The folder of a base: of "demo", of a path, or of a name on the hub, of which what is missing is fetched.

    Raises UserError for a name that the hub does not have, or does not give us, and without huggingface_hub.
    """
    return base_folder(path) if (found := hub_name(path)) is None else _fetch(*found, tokenizer_only)


def pinned(path: str) -> str:
    """`path`; a name on the hub with the commit that its revision is now, so that the same weights are found again."""
    if (found := hub_name(path)) is None:
        return path
    return f"{found[0]}@{_fetch(*found).name}"


def hub_name(path: str | Path | None) -> tuple[str, str | None] | None:
    """ORG/NAME and revision of a name on the hub. What exists here is a folder; so is what begins with ., / or ~."""
    match = _HUB_NAME.fullmatch(path) if isinstance(path, str) else None
    return (match["name"], match["revision"]) if match and not os.path.exists(match[0]) else None


def _fetch(name: str, revision: str | None, tokenizer_only: bool = False) -> Path:
    """The folder of one commit in huggingface_hub's cache; it is called by the commit's hash."""
    need_library("huggingface_hub", "hub", f"{name}: no such folder; as a model of the hub it")
    from huggingface_hub import HfApi, errors, snapshot_download

    wanted = [*(TOKENIZER_FILES if tokenizer_only else _HF)]
    try:
        try:
            info = HfApi().model_info(name, revision=revision, timeout=_ANSWER_S)
        except errors.HfHubHTTPError:  # the hub answered, and said no
            raise
        except Exception:  # no answer; what that raises depends on the library's own library
            # Of Mistral's layout the cache then only needs to hold the tokenizer to be whole.
            return Path(snapshot_download(name, revision=revision, allow_patterns=wanted, local_files_only=True))
        held = {file.rfilename for file in info.siblings or ()}
        if not tokenizer_only and not held & {"model.safetensors", "model.safetensors.index.json"}:
            wanted = [*_MISTRAL]
        return Path(snapshot_download(name, revision=revision, allow_patterns=wanted))
    except errors.LocalEntryNotFoundError:
        problem = "no such folder, the hub cannot be reached, and its cache here does not have it"
    except errors.GatedRepoError:
        problem = "the hub gives it only to those who accepted its terms; do so there, then log in: hf auth login"
    except errors.RevisionNotFoundError:
        problem = f"the hub's model has no revision {revision}"
    except errors.RepositoryNotFoundError:
        problem = "no such folder, and no such model on the hub (or it is private: hf auth login)"
    except Exception as error:
        problem = f"could not be fetched: {error}; run this again, it goes on where it stopped"
    raise UserError(f"{name}: {problem}")
