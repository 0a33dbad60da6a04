"""What users write: one file per group of keys. A field is named like its key, and its help text stands below it."""
