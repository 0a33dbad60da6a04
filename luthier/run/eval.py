"""`luthier eval RUN task=TASK`: measure a model and print the table of its scores."""


def main(argv: list[str]) -> int:
    from luthier.config.load import read_source
    from luthier.config.runs import EvalRun
    from luthier.workflow.comparison import evaluate
    from luthier.workflow.preflight import load_checked, tell_warnings

    run = load_checked("eval", read_source(argv), begins=True)
    assert isinstance(run, EvalRun)
    tell_warnings(run)
    print(evaluate(run).table)
    return 0
