"""What attribution costs on published episodes."""

from __future__ import annotations

import json

from sotopia_data import FOLDER, needs_sotopia_data
from sotopia_rl.attribute import AttributionConfig, preview
from sotopia_rl.store.sotopia_read import read_document


@needs_sotopia_data
def test_one_call_for_three_dimensions_takes_at_most_half_the_tokens_of_three_calls():
    """Tokens are estimated by characters; the texts of both ways are the same, so the ratio is not."""
    text = (FOLDER / "golden/episodes_to_jsonl_sotopia-0.1.4.jsonl").read_text(encoding="utf-8")
    imported = [read_document(json.loads(line), where="golden") for line in text.splitlines()]
    rated = [(i.episode, i.rating) for i in imported]
    together, separate = (
        preview(rated, AttributionConfig(together=together), "openai/gpt-4o") for together in (True, False)
    )
    assert (together.calls, separate.calls) == (6, 18)
    tokens = [seen.prompt_tokens + seen.completion_tokens for seen in (together, separate)]
    assert tokens[0] <= 0.5 * tokens[1]
    assert together.cost_usd <= 0.5 * separate.cost_usd
