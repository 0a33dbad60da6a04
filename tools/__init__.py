"""Programs for those who work on luthier; not part of the package."""
