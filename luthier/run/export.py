"""`luthier export RUN`: merge base model and adapters into one folder that any program can load."""

from luthier.core.log import info


def main(argv: list[str]) -> int:
    from luthier.config.load import read_source
    from luthier.config.runs import ExportRun
    from luthier.workflow.export import export
    from luthier.workflow.preflight import load_checked, tell_warnings

    run = load_checked("export", read_source(argv), begins=True)
    assert isinstance(run, ExportRun)
    tell_warnings(run)
    folder = export(run)
    for file in sorted(folder.iterdir()):
        info(f"  {file.name}: {file.stat().st_size:,} bytes")
    print(f"exported: {folder}")
    return 0
