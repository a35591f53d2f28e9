"""Pictures by the person that they show: each folder with pictures is one person."""

import logging
from pathlib import PurePosixPath

from kdhooks.errors import KDHooksError
from kdhooks.picture_files import PictureFiles, first

log = logging.getLogger("kdhooks")


def named_pictures(files: PictureFiles, subject: str) -> dict[str, str]:
    """Return the path of each picture by its name, "person/picture".

    subject: the start of each error message.
    """
    found: dict[str, str] = {}
    folders: dict[str, str] = {}
    for path in (path for path in files.names if "/" in path):
        folder, _, file = path.rpartition("/")
        person = folder.rpartition("/")[2]
        if folders.setdefault(person, folder) != folder:
            raise KDHooksError(
                f"{subject}: '{files.source}' must have one folder per person; found "
                f"'{folders[person]}' and '{folder}'; rename one, or move its images to the other"
            )
        name = f"{person}/{PurePosixPath(file).stem}"
        if name in found:
            raise KDHooksError(f"{subject}: '{files.source}' holds two images '{name}'; rename one")
        found[name] = path
    known = set(folders.values())
    for folder in sorted(known):
        if outer := known & set(map(str, PurePosixPath(folder).parents)):
            raise KDHooksError(
                f"{subject}: a person's folder must not hold another one; found '{folder}' in "
                f"'{min(outer)}' of '{files.source}'; move its images up, or the folder out"
            )
    if len(found) < len(files.names):
        beside = [path for path in files.names if "/" not in path]
        log.warning(
            "%s: skipped %d images in no person's folder: %s", subject, len(beside), first(beside)
        )
    return found
