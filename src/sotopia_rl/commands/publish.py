"""What `evaluate play`, `rejudge`, `compare` and `report` end with: results and page of run folders."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from sotopia_rl.console import out
from sotopia_rl.errors import EvaluationError

if TYPE_CHECKING:  # scipy takes a second, which `--help` does not need
    from sotopia_rl.results import EvaluateConfig


def publish(
    runs: list[Path],
    output: Path,
    *,
    config: EvaluateConfig | None = None,
    baseline: str | None = None,
    published: bool = False,
) -> None:
    """Compute the results of run folders, write them with their report, and show the table and the answers.

    Raises:
        EvaluationError: A comparison has no pair; after everything was written.
    """
    from sotopia_rl.evaluate.contrast import contrasts_of_each
    from sotopia_rl.evaluate.folder import load_evaluation
    from sotopia_rl.report import ReportInput, results_table, write_report
    from sotopia_rl.report.wording import answers, comparisons, headline_metric, headline_pair

    found = load_evaluation(runs)
    results = found.results(config=config, baseline=baseline)
    pairs = sorted(comparisons(results), key=lambda pair: pair != headline_pair(results))
    page = ReportInput(
        results=results,
        title=found.manifest.name,
        contrasts=contrasts_of_each(found.panel, results, pairs, headline_metric(results)),
        provenance=found.provenance(),
        published=published,
    )
    write_report(page, output)
    out.print(results_table(results))
    for sentence in answers(results):
        out.print(sentence, markup=False, soft_wrap=True)
    out.print(f"results {output / 'results.json'}\nreport  {output / 'report.html'}")
    if results.unpaired:
        lacking = {f"{u.system_a} - {u.system_b}": None for u in results.unpaired}
        raise EvaluationError(f"no scored pair for {', '.join(lacking)}; the rest was compared and written")
