"""Compare a result of training, a checkpoint or an export with its manifest.json."""

import argparse

from luthier.core.manifest import read_manifest, verify_folder


def main(argv: list[str]) -> int:
    """Return 0 if all files are as recorded, else 1. Raises `OutputError` if there is no manifest."""
    parser = argparse.ArgumentParser(prog="luthier verify", description=__doc__)
    parser.add_argument("folder", metavar="DIR", help="a folder that luthier wrote")
    folder = parser.parse_args(argv).folder
    findings = verify_folder(folder)
    for finding in findings:
        print(finding)
    files = read_manifest(folder)["files"]
    if findings:
        print(f"{folder}: {len(findings)} of {len(files)} files are not as recorded")
        return 1
    num_bytes = sum(recorded["size_bytes"] for recorded in files.values())
    print(f"{folder}: OK, {len(files)} files, {num_bytes} bytes")
    return 0
