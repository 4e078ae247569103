"""Where a model comes from: a local folder, an output folder of ours, or the Hugging Face hub and its cache."""

import re
from pathlib import Path

from quantcli.errors import InputError, first_line
from quantcli.folder import resolve_model_folder

__all__ = ["locate_model"]

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?")
_FILES = ("*.json", "*.safetensors", "*.model", "*.txt", "*.jinja", "*.py", "tokenizer*")


def locate_model(model: str) -> Path:
    """The folder that holds the model: `model` itself, its `model/`, or what the hub's cache has of that id.

    Raises:
        InputError: there is no such folder, and no hub or cache that knows the id.
    """
    path = Path(model)
    if path.exists() or not _HUB_ID.fullmatch(model) or model.startswith("."):
        return resolve_model_folder(path)
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(model, allow_patterns=list(_FILES)))
    except (LocalEntryNotFoundError, HfHubHTTPError, HFValidationError, OSError) as error:
        reason = first_line(error)
        raise InputError(
            f"{model} is neither a folder nor a model that the hub or its cache can give ({reason[:120]})",
            hint="give the path of a downloaded model folder",
        ) from error
