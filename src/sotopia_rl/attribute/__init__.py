"""Attribution: how much each utterance of an agent contributed to its scores.

`config` says what to attribute and how, `methods` is the table of methods, `items` are the pieces of work, `prompt`
and `reply` are the two sides of a question to the annotator, `run` does it for many episodes, `estimate`
says what that would take.
"""

from sotopia_rl.attribute.config import BUILT_IN, AttributionConfig
from sotopia_rl.attribute.estimate import Preview, preview
from sotopia_rl.attribute.items import AttributionItem, AttributionKey, attribution_items
from sotopia_rl.attribute.methods import METHODS, Method
from sotopia_rl.attribute.run import COMPUTED, annotator_name, attribute, attribute_all

__all__ = [
    "BUILT_IN",
    "COMPUTED",
    "METHODS",
    "AttributionConfig",
    "AttributionItem",
    "AttributionKey",
    "Method",
    "Preview",
    "annotator_name",
    "attribute",
    "attribute_all",
    "attribution_items",
    "preview",
]
