"""`fedloom score`: run the programs that a run kept because there was no sandbox."""

from __future__ import annotations

from fedloom.cli.options import NOT_RUN, Debug, Imports, Run, UnsafeExecution


def score(
    run: Run,
    unsafe_execution: UnsafeExecution = False,
    imports: Imports = None,
    debug: Debug = False,
) -> None:
    """Run the programs that a run kept because there was no sandbox, and book their scores; nothing is generated anew.

    [bold]Examples[/]

    fedloom score runs/code
    """
    from rich.console import Console

    from fedloom.report import write_report
    from fedloom.rescoring import rescore
    from fedloom.results import not_run, results

    summary = rescore(run, unsafe_execution)
    if (run / "report.html").is_file():
        write_report(run)
    console = Console()
    console.print(results(summary["metrics"]))
    for line in not_run(summary["not_run"]):
        console.print(line, style="yellow", markup=False, highlight=False)
    if summary["not_run"]:
        raise SystemExit(NOT_RUN)
