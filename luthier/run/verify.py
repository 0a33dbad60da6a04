"""Compare a result of training, a checkpoint or an export with its manifest.json."""

import argparse
import os
from pathlib import Path

from luthier.core.errors import OutputError
from luthier.core.manifest import MANIFEST_NAME, read_manifest, verify_folder, write_manifest


def main(argv: list[str]) -> int:
    """Return 0 if all files are as recorded, else 1. Raises `OutputError` if there is no manifest."""
    parser = argparse.ArgumentParser(prog="luthier verify", description=__doc__)
    parser.add_argument("folder", metavar="DIR", help="a folder that luthier wrote")
    parser.add_argument(
        "--record",
        action="store_true",
        help="make the manifest of a folder that another program wrote, from its files as they are now",
    )
    options = parser.parse_args(argv)
    if options.record:
        record(Path(options.folder))
    findings = verify_folder(options.folder)
    for finding in findings:
        print(finding)
    files = read_manifest(options.folder)["files"]
    if findings:
        print(f"{options.folder}: {len(findings)} of {len(files)} files are not as recorded")
        return 1
    num_bytes = sum(recorded["size_bytes"] for recorded in files.values())
    print(f"{options.folder}: OK, {len(files)} files, {num_bytes} bytes")
    return 0


def record(folder: Path) -> None:
    """Whether the files are whole is for the user to know. Raises `OutputError` if the folder has a manifest."""
    if not os.path.isdir(folder):  # unlike the methods of Path, these never raise
        raise OutputError(f"{folder}: no such folder")
    if os.path.exists(folder / MANIFEST_NAME):
        raise OutputError(f"{folder}: has a {MANIFEST_NAME} already -> remove it to record the files as they are now")
    try:
        write_manifest(folder)
    except OSError as fault:
        raise OutputError(f"{fault.filename or folder}: cannot be read ({fault.strerror or fault})") from fault
