"""JSON schemas as restrictions on the next token, by xgrammar."""

from __future__ import annotations

import json
import logging
from collections.abc import Collection
from typing import Any

import torch

from sotopia_rl.models import JsonSchema

logger = logging.getLogger(__name__)


class SchemaConstraint:
    """Keeps one reply on the path of one schema."""

    def __init__(self, compiled: Any) -> None:
        import xgrammar

        self.matcher = xgrammar.GrammarMatcher(compiled, terminate_without_stop_token=True)

    def fill(self, allowed_bits: torch.Tensor, index: int) -> None:
        self.matcher.fill_next_token_bitmask(allowed_bits, index)

    def accept(self, token: int) -> bool:
        accepted = self.matcher.accept_token(token)
        assert accepted, f"token {token} was masked out and chosen all the same"
        return bool(self.matcher.is_terminated())


class SchemaCompiler:
    """Compiles schemas for one tokenizer, each once.

    A schema or a tokenizer that xgrammar cannot take leaves the reply unconstrained, which is logged once:
    whoever asked validates the reply in any case.
    """

    def __init__(self, tokenizer: Any, vocab_size: int, stop_tokens: Collection[int]) -> None:
        self._compiled: dict[str, Any] = {}
        self._compiler: Any = None
        try:
            import xgrammar
        except ImportError:
            logger.warning("xgrammar is not installed: replies are not constrained to their JSON schema")
            return
        try:
            info = xgrammar.TokenizerInfo.from_huggingface(
                tokenizer, vocab_size=vocab_size, stop_token_ids=sorted(stop_tokens)
            )
            self._compiler = xgrammar.GrammarCompiler(info, max_threads=2)
        except (RuntimeError, ValueError) as error:
            logger.warning("xgrammar cannot take this tokenizer, replies are not constrained: %s", error)

    def constraint(self, schema: JsonSchema) -> SchemaConstraint | None:
        """A fresh constraint for one reply, or None where there can be none."""
        if self._compiler is None:
            return None
        text = json.dumps(schema)
        if text not in self._compiled:
            self._compiled[text] = self._compile(text)
        compiled = self._compiled[text]
        return None if compiled is None else SchemaConstraint(compiled)

    def _compile(self, text: str) -> Any:
        try:
            # Free white space lets a small model print line breaks until its limit.
            return self._compiler.compile_json_schema(text, any_whitespace=False)
        except (RuntimeError, ValueError) as error:
            logger.warning("xgrammar cannot compile a schema, its replies are not constrained: %s", error)
            return None
