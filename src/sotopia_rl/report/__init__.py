"""The report: a page to read, the same in Markdown, and a table for the terminal. It computes nothing.

`write.py` gathers what the page shows, `wording.py` puts numbers into sentences, `charts.py` draws,
`pictures.py` says what. `page.html.jinja` with the files it includes, `page.css` and `page.js` is the page, `table.py`
is for the terminal, and `matrix.py` is the page of a ranking.
"""

from sotopia_rl.report.matrix import matrix_table, write_matrix
from sotopia_rl.report.table import results_table
from sotopia_rl.report.write import ReportInput, write_report

__all__ = ["ReportInput", "matrix_table", "results_table", "write_matrix", "write_report"]
