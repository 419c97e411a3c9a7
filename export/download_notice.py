"""What a person should know before a checkpoint is downloaded: how large it is, and under which licence."""

from collections.abc import Callable
from fnmatch import fnmatch

from huggingface_hub import model_info
from huggingface_hub.hf_api import ModelInfo

NON_COMMERCIAL = "-nc"


def announce_download(name: str, patterns: list[list[str]], say: Callable[[str], object]) -> None:
    """Say what the download of the hub's repository `name` will be; nothing where the hub doesn't tell.

    Args:
        name: The hub id.
        patterns: Of each component's files, those of the best form first; only the first form that exists is needed.
        say: Called with a sentence, at most once.
    """
    try:
        info = model_info(name, files_metadata=True, timeout=10)
    except Exception:  # offline, or no such repository: the download itself tells it, or finds all in the cache
        return
    say(notice(name, info, patterns))


def notice(name: str, info: ModelInfo, patterns: list[list[str]]) -> str:
    """Return the sentence about a repository of the hub; arguments as for `announce_download`."""
    size = sum(_size(info, forms) for forms in patterns)
    licence = (info.card_data.license if info.card_data else None) or "not stated"
    use = ", for non-commercial use only" if NON_COMMERCIAL in str(licence) else ""
    return (
        f"{name}: {size / 1e9:.1f} GB to download, but for what is in the hub's cache here. Licence of the weights: "
        f"{licence}{use}."
    )


def _size(info: ModelInfo, forms: list[str]) -> int:
    """Return the bytes of the files in the first form that exists."""
    files = {file.rfilename: file.size or 0 for file in info.siblings or []}
    for pattern in forms:
        if found := [size for file, size in files.items() if fnmatch(file, pattern)]:
            return sum(found)
    return 0
