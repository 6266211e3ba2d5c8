"""`evals/qwen2.5-7b.jinja` against what Qwen documents and against the model's own template as TRL ships it."""

from pathlib import Path

import jinja2
import pytest
import trl
from transformers.utils.chat_template_utils import render_jinja_template

from sotopia_rl.models import Message

TEMPLATE = Path(__file__).parents[1] / "evals" / "qwen2.5-7b.jinja"
MODELS_OWN = Path(trl.__file__).parent / "chat_templates" / "qwen2_5.jinja"
CHATS = [
    [Message(role="user", content="Hello, I'm Ann.")],
    [Message(role="system", content="Be brief."), Message(role="user", content="Hi <|im_end|> {{ x }}\n\n")],
    [
        Message(role="user", content="  spaces and\n\nparagraphs  "),
        Message(role="assistant", content='{"action_type": "speak", "argument": "李雷 said: \\"no\\""}'),
        Message(role="user", content=""),
    ],
    [Message(role="user", content="a"), Message(role="system", content="late"), Message(role="assistant", content="b")],
]


def rendered(template: Path, chat: list[Message], *, add_generation_prompt: bool) -> str:
    """As transformers and vLLM render a tokenizer's template."""
    texts, _ = render_jinja_template(
        [[m.model_dump() for m in chat]],
        chat_template=template.read_text(encoding="utf-8"),
        add_generation_prompt=add_generation_prompt,
    )
    return str(texts[0])


def test_the_documented_form_of_a_chat_comes_out() -> None:
    chat = [
        Message(role="user", content="Give me a short introduction to large language models."),
        Message(role="assistant", content="Models of text."),
        Message(role="user", content="More."),
    ]
    assert rendered(TEMPLATE, chat, add_generation_prompt=True) == (
        "<|im_start|>system\nYou are Qwen, created by Alibaba Cloud. You are a helpful assistant.<|im_end|>\n"
        "<|im_start|>user\nGive me a short introduction to large language models.<|im_end|>\n"
        "<|im_start|>assistant\nModels of text.<|im_end|>\n"
        "<|im_start|>user\nMore.<|im_end|>\n"
        "<|im_start|>assistant\n"
    )


def test_a_system_message_replaces_the_default() -> None:
    text = rendered(TEMPLATE, CHATS[1], add_generation_prompt=False)
    assert text.startswith("<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\n")


@pytest.mark.parametrize("add_generation_prompt", [False, True])
@pytest.mark.parametrize("chat", CHATS)
def test_the_models_own_template_gives_the_same(chat: list[Message], add_generation_prompt: bool) -> None:
    if not MODELS_OWN.is_file():
        pytest.skip("this TRL does not ship Qwen2.5's template")
    own = rendered(MODELS_OWN, chat, add_generation_prompt=add_generation_prompt)
    assert rendered(TEMPLATE, chat, add_generation_prompt=add_generation_prompt) == own


@pytest.mark.parametrize("chat", CHATS)
def test_the_output_does_not_depend_on_how_jinja_trims(chat: list[Message]) -> None:
    messages = [m.model_dump() for m in chat]
    texts = {
        jinja2.Environment(trim_blocks=trim, lstrip_blocks=lstrip)  # noqa: S701  no HTML
        .from_string(TEMPLATE.read_text(encoding="utf-8"))
        .render(messages=messages, add_generation_prompt=True)
        for trim in (False, True)
        for lstrip in (False, True)
    }
    assert texts == {rendered(TEMPLATE, chat, add_generation_prompt=True)}


def test_tools_are_refused() -> None:
    chat = [{"role": "user", "content": "weather?"}, {"role": "tool", "content": "rain"}]
    with pytest.raises(jinja2.TemplateError, match="knows no tools"):
        render_jinja_template([chat], chat_template=TEMPLATE.read_text(encoding="utf-8"))
