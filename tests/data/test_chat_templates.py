"""Chat templates that never end or fill the memory."""

from __future__ import annotations

import time

import pytest
from tiny import tiny_tokenizer

from internal_policy import UserError
from internal_policy.data import chat_templates
from internal_policy.data.prompts import Prompt, render_all

SLOW = "it took more than 1 seconds"
LONG = "it makes 15000000 characters; needed is a text of at most 10000000"
GOOD = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }} {% endfor %}"


def rendered(template, contents=("one", "two")):
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = template
    return render_all([Prompt(c) for c in contents], "chat", tokenizer), tokenizer


def test_templates_render_as_in_transformers():
    found, tokenizer = rendered(GOOD)
    chats = [[{"role": "user", "content": c}] for c in ("one", "two")]
    assert found == [tokenizer.apply_chat_template(c, tokenize=True)["input_ids"] for c in chats]


@pytest.mark.parametrize(
    ("template", "why"),
    [
        (
            "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
            SLOW,
        ),
        ("{{ 9 ** (9 ** 9) }}", SLOW),
        ("{{ messages[0]['content'] * 10000000000 }}", "it needs more than 1024 MiB"),
        (
            "{{ messages[0]['content'] * 5000000 }}",
            LONG,
        ),
        ("{{ raise_exception('no \n user here') }}", "no user here"),
        ("{{ messages[5].content }}", "list object has no element 5"),
    ],
)
def test_a_template_that_does_not_finish_is_refused(monkeypatch, template, why):
    monkeypatch.setattr(chat_templates, "SECONDS", 1.0)
    before = time.monotonic()
    with pytest.raises(UserError) as error:
        rendered(template)
    assert str(error.value) == f"the chat template refuses a chat with roles ['user'] ({why}); try --template plain"
    assert time.monotonic() - before < 20


def test_a_template_that_ends_its_process_is_refused(monkeypatch):
    import os

    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = GOOD
    tokenizer.apply_chat_template = lambda *_, **__: os._exit(1)
    with pytest.raises(UserError, match="its process ended"):
        render_all([Prompt("one")], "chat", tokenizer)
