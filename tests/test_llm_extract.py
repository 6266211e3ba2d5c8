"""The extractor: any wrapping, any small slip, never a guess."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sotopia_rl.llm.extract import MAX_DEPTH, UnusableReply, extract_json

ACTION = {"action_type": "speak", "argument": 'She said "I <3 you" </think> {name} }{ didn\'t'}
TEXT = json.dumps(ACTION)

json_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**63)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=12,
)
json_objects = st.dictionaries(st.text(max_size=8), json_values, max_size=5)
json_texts = st.builds(
    lambda value, ascii_only, indent: json.dumps(value, ensure_ascii=ascii_only, indent=indent),
    json_objects,
    st.booleans(),
    st.sampled_from([None, 0, 2]),
)

WRAPPINGS = [
    "{}",
    "```json\n{}\n```",
    "```\n{}\n```\n",
    "Sure! Here is my answer:\n{}",
    "Here you go: {}\n\nLet me know if that's fine.",
    '<think>He wants {{"a": 1}} or {{ maybe</think>{}',
    "  <think>\n\n</think>\n\n{}",
    'thinking {{"draft": 1}} aloud </think>\n{}',
    "I fill in {{action_type}} and {{your argument}}: {}",
    "\ufeff{}<|im_end|>",
]


def refusal(text: str) -> str:
    with pytest.raises(UnusableReply) as caught:
        extract_json(text)
    return str(caught.value)


def object_or_refusal(text: str) -> object:
    try:
        return [extract_json(text)]
    except UnusableReply as error:
        return str(error)


@given(json_texts, st.sampled_from(WRAPPINGS))
def test_any_object_comes_back_from_any_wrapping(text, wrapping):
    before, after = wrapping.split("{}")
    value = extract_json(before.replace("{{", "{").replace("}}", "}") + text + after)
    assert json.dumps(value) == json.dumps(json.loads(text))


@given(json_texts, st.data())
def test_every_strict_prefix_is_refused(text, data):
    cut = data.draw(st.integers(0, len(text) - 1))
    refusal(text[:cut])


@given(json_texts, st.sampled_from(WRAPPINGS), st.data())
def test_every_strict_prefix_is_refused_in_any_lead_in(text, wrapping, data):
    before = wrapping.split("{}")[0].replace("{{", "{").replace("}}", "}")
    if "draft" in before:
        return  # a draft without its closing tag is an object of its own
    refusal(before + text[: data.draw(st.integers(0, len(text) - 1))])


@given(json_objects)
def test_a_python_literal_reads_as_the_same_object(value):
    # repr uses single quotes, True, False and None; its \x escapes are no JSON and are refused.
    text = repr(value)
    try:
        found = extract_json(text)
    except UnusableReply:
        assert "\\x" in text or "\\u" in text or "\\U" in text
    else:
        assert json.dumps(found) == json.dumps(value)


@given(json_objects, json_objects)
def test_two_objects_are_refused_unless_they_are_the_same(one, two):
    text = f"{json.dumps(one)}\nor\n{json.dumps(two)}"
    if json.dumps(one, sort_keys=True) == json.dumps(two, sort_keys=True):
        assert extract_json(text) == one
    else:
        assert "different JSON objects" in refusal(text)


@given(st.text())
def test_any_text_gives_an_object_or_a_refusal(text):
    assert object_or_refusal(text)


@given(st.text(alphabet="{}[]\"':,\\ntuTNe01.-<>/hink "))
def test_any_soup_of_json_characters_gives_an_object_or_a_refusal(text):
    assert object_or_refusal(text)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        (TEXT, ACTION),
        ('{"a": "two\nlines\tand a tab"}', {"a": "two\nlines\tand a tab"}),
        ("{'a': 'x', 'b': True, 'c': None,}", {"a": "x", "b": True, "c": None}),
        ('{"a": [1, 2, ], "b": False}', {"a": [1, 2], "b": False}),
        ('{"a": "don\\\'t", }', {"a": "don't"}),
        ("{'smile': '\\ud83d\\ude00', 'é': '\\u00e9'}", {"smile": "\U0001f600", "é": "é"}),
        ('{"a": -1.5e3, "b": 7}', {"a": -1500.0, "b": 7}),
        ("{}", {}),
        ("```json\n{'a': 1}\n```", {"a": 1}),
        ('{"a": 1} {"a":1}', {"a": 1}),
    ],
)
def test_small_slips_are_read(text, value):
    assert extract_json(text) == value


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "empty"),
        ("  \n", "empty"),
        ("null", "no JSON object"),
        ("I would rather not say.", "no JSON object"),
        ("<html><body>Bad gateway</body></html>", "no JSON object"),
        ("42", "no JSON object"),
        ('[{"a": 1}]', "is a list"),
        ('[{"a": 1}', "is a list"),
        ('[1, {"a": 1}', "is a list"),
        ('Both: [{"a": 1}, {"a": 2}]', "is a list"),
        ('{"a": 1', "stops in the middle"),
        ('{"a": "he sa', "stops in the middle"),
        ("{'a': 'he sa", "stops in the middle"),
        ('{"a": 12', "stops in the middle"),
        ('{"a": {"b": 1}', "stops in the middle"),
        ('{"a": "x\\', "stops in the middle"),
        ("{'a': '\\u00", "stops in the middle"),
        ("```json\n{", "stops in the middle"),
        ('<think>hm {"a": 1}', "stops inside <think>"),
        ('Well. <think>{"a": 1}', "stops inside <think>"),
        ("<think>hm</think>", "no JSON object after the reasoning"),
        ('{"a": 1, "a": 2}', "'a' stands twice"),
        ("{'a': 1, 'a': 1}", "'a' stands twice"),
        ('{"x": {"a": 1, "a": 1}}', "'a' stands twice"),
        ('{"a": NaN}', "NaN is not"),
        ('{"a": -Infinity}', "Infinity is not"),
        ("{'a': NaN,}", "NaN is not"),
        ('{"a": 1e999}', "too large"),
        ('{"a": 123456789012345678901234567890}', "too large"),
        ('{"a": "she said "no" to him"}', "quotation mark"),
        ("{'a': 'it's fine'}", "quotation mark"),
        ("{a: 1}", "double quotes"),
        ('{"a": yes}', "'yes' needs double quotes"),
        ('{"a" 1}', "colon"),
        ('{"a": 1} and "b": 2}', "closing brace too many"),
        ('{"a": 1}, "b": {"c": 2}}', "closing brace too many"),
        ('{{"a": 1}}', "double quotes"),
        ('{"a": "\\ud83d"}', "half a character"),
        ("{'a': '\\ud83d'}", "half a character"),
        ('{"a": "\\x41"}', "no escape"),
        ("{'a': +5}", "expected a value"),
        ("{'a': '\\uzzzzzz'}", "four digits"),
        ('{"a":' * 2000 + "1" + "}" * 2000, "deep"),
        ('{"a":' * (MAX_DEPTH + 1) + "1" + "}" * (MAX_DEPTH + 1), "deep"),
        ("{'a':" * 2000 + "1" + "}" * 2000, "deep"),
    ],
)
def test_a_refusal_says_what_is_wrong(text, words):
    message = refusal(text)
    assert words in message
    assert len(message) < 250
    assert "\n" not in message
