"""Keep the user's files that a run executes, so that its results can be explained and repeated later."""

from __future__ import annotations

import shutil
from pathlib import Path

from a2tgpo.config.run import RunConfig
from a2tgpo.config.user_files import MISSING, digest_name, file_digests, user_files

FOLDER = "plugins"


def keep_files(folder: Path, config: RunConfig) -> None:
    """Copy the user's files to `folder`/plugins/NAME.DIGEST.py; an earlier copy with the same content is kept.

    A file that does not exist is left out, because the build of the rewards or tools reports it.
    """
    digests = file_digests(config)
    for key, name in user_files(config).items():
        path, found = Path(name).expanduser(), digests[digest_name(key, name)]
        if found != MISSING:
            copy = folder / FOLDER / f"{path.stem}.{found}{path.suffix}"
            copy.parent.mkdir(exist_ok=True)
            shutil.copyfile(path, copy)
