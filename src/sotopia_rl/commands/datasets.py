"""`data pull`: published data sets from the hub."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from sotopia_rl.console import out


def pull(
    name: str,
    /,
    *,
    target: Path | None = None,
    file: Annotated[list[str] | None, Parameter(negative=())] = None,
    revision: str = "main",
) -> None:
    """Download a published data set; what is there already and unchanged is left alone.

    Parameters
    ----------
    name
        sotopia-pi, sotopia or reward-annotation, or the data set's name on the hub.
    target
        Folder for the files; data/NAME by default.
    file
        Glob pattern of the files to fetch, instead of those that this package can use; may be repeated.
    revision
        Branch, tag or commit.
    """
    from sotopia_rl import hub

    data_set = hub.data_set(name)
    folder = target or Path("data") / data_set.repo_id.rpartition("/")[2]
    pulled = hub.pull(name, folder, files=file, revision=revision)
    for path in pulled.files:
        out.print(str(path), markup=False, highlight=False, soft_wrap=True)
    licence = f"{data_set.repo_id} at {pulled.commit[:12]}: {data_set.about}. Licence: {data_set.licence}."
    out.print(licence, markup=False, highlight=False, soft_wrap=True)
