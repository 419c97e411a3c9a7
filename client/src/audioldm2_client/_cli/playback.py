"""Play a file with a player that the machine has, without a shell."""

import shutil
import subprocess
from pathlib import Path

_PLAYERS: dict[str, tuple[str, ...]] = {
    "aplay": ("-q",),
    "paplay": (),
    "ffplay": ("-nodisp", "-autoexit", "-loglevel", "error"),
    "afplay": (),
}
_WAV_ONLY = {"aplay"}


def find_player(path: Path) -> list[str]:
    """Return the command that plays files such as `path`, without the file itself.

    Raises:
        ValueError: there is no player.
    """
    names = [name for name in _PLAYERS if path.suffix.lower() == ".wav" or name not in _WAV_ONLY]
    for name in names:
        if command := shutil.which(name):
            return [command, *_PLAYERS[name]]
    raise ValueError(f"--play needs one of the commands {', '.join(names)}, and none is installed; install one")


def play(command: list[str], path: Path) -> None:
    """Play a file and wait for its end.

    Raises:
        OSError: the player can't be started or fails.
    """
    done = subprocess.run([*command, str(path.absolute())], stdin=subprocess.DEVNULL, check=False)
    if done.returncode:
        raise OSError(f"{command[0]} ended with status {done.returncode}")
