"""The package's prompts: one Jinja file per prompt, loaded by name. No text is written anywhere else.

Every variable must be given (`StrictUndefined`), and values go in unchanged: what an utterance contains is
never read as markup.
"""

from __future__ import annotations

from functools import cache, lru_cache
from importlib import resources

from jinja2 import Environment, FunctionLoader, StrictUndefined, Template

from sotopia_rl.episode import sha256_text

_BLANK = "\x00"


def render(name: str, /, **values: object) -> str:
    """The prompt of file `name` with `values` filled in."""
    return template(name).render(values)


@lru_cache(maxsize=1024)
def frame(name: str, blanks: tuple[str, ...], /, **values: str) -> tuple[str, ...]:
    """The prompt of file `name` as the texts around `blanks`, variables that it names once each and in this order.

    For prompts that are filled in at every turn: joining texts takes a tenth of the time of rendering.
    """
    texts = tuple(template(name).render(values, **dict.fromkeys(blanks, _BLANK)).split(_BLANK))
    assert len(texts) == len(blanks) + 1, f"{name} does not name {', '.join(blanks)} once each"
    return texts


@cache
def template(name: str) -> Template:
    """The compiled file `name`."""
    return _environment().get_template(name)


def source(name: str) -> str:
    """The text of file `name`, as it is on disk."""
    return resources.files(__package__).joinpath(name).read_text(encoding="utf-8")


@cache
def template_sha256(name: str) -> str:
    """Hash of the file `name`, for provenance."""
    return sha256_text(source(name))


@cache
def _environment() -> Environment:
    # Prompts are plain text, not HTML: escaping would change what people said.
    return Environment(loader=FunctionLoader(source), undefined=StrictUndefined, autoescape=False)  # noqa: S701
