"""The kinds of tasks of `luthier eval`, one file each. `luthier.evals.task.EvalKind` says what a file provides."""
