"""Chat templates: the text that transformers makes of a conversation, and what a template cannot do to us."""
import pytest

from gpt.errors import UserError
from gpt.text import BPETokenizer
from gpt.text.templates import render

jinja2 = pytest.importorskip("jinja2", reason="chat templates need Jinja")

MESSAGES = [{"role": "system", "content": "Be <brief> & kind."}, {"role": "user", "content": "Grüße, \"you\""},
            {"role": "assistant", "content": " Hi! "}, {"role": "user", "content": "Bye"}]
TEMPLATES = {
    "chatml": "{% for m in messages %}{{'<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>' + '\n'}}"
              "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}",
    "generation": "{%- for m in messages %}\n{% if m.role == 'assistant' %}\n  {%- generation -%}\n  {{ m.content }}\n"
                  "  {% endgeneration %}\n{% else %}\n[{{ m.role }}]\n{% endif %}\n{% endfor %}",
    "loops": "{% for m in messages %}{% if loop.index > 2 %}{% break %}{% endif %}{{ m.role|upper }} {% endfor %}"
             "{{ messages[::-1][0].content.strip() }}{% set ns = namespace(n=0) %}{% for m in messages %}"
             "{% set ns.n = ns.n + 1 %}{% endfor %}{{ ns.n }}",
    "json": "{{ bos_token }}{{ messages | tojson }}{{ messages[0] | tojson(indent=2) }}{{ eos_token }}",
    "tools": "{%- if tools %}{{ tools }}{% endif %}{% if strftime_now is defined %}{{ strftime_now('%Y') }}{% endif %}",
}


def tokenizer_with(template):
    tokenizer = BPETokenizer.train("a b c", 260, special_tokens=["<s>", "</s>"])
    return tokenizer.configure({"bos_token": "<s>", "eos_token": "</s>", "chat_template": template})


@pytest.mark.parametrize("name", TEMPLATES)
@pytest.mark.parametrize("prompt", [True, False])
def test_the_text_is_that_of_transformers(name, prompt):
    pytest.importorskip("transformers", reason="the oracle transformers is not installed")
    from transformers.utils.chat_template_utils import render_jinja_template

    (expected,), _ = render_jinja_template([MESSAGES], chat_template=TEMPLATES[name], add_generation_prompt=prompt,
                                           bos_token="<s>", eos_token="</s>")
    assert render(tokenizer_with(TEMPLATES[name]), MESSAGES, prompt) == expected


@pytest.mark.parametrize("template", [
    "{{ ''.__class__.__mro__ }}", "{{ messages.append(1) }}", "{% for %}", "{{ 1 / 0 }}",
    "{{ range(10000000) | list }}", "{{ raise_exception('no system prompt, please') }}", "{{ messages + 1 }}",
    "{% include '/etc/passwd' %}", "{{ cycler.__init__.__globals__.os.popen('id').read() }}",
    "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "{{ tojson(messages) }}",
])
def test_what_a_template_may_not_do(template):
    with pytest.raises(UserError, match="chat template refuses") as error:
        render(tokenizer_with(template), MESSAGES)
    assert "root:" not in str(error.value) and "uid=" not in str(error.value)
