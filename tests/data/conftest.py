"""Small tokenizers, built here: one per character, and a byte-level BPE that speaks ChatML."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from opd.data.tasks import build_tokenizer

CHATML = """\
{%- if tools %}{{ '<|im_start|>system\\ntools: ' + (tools | tojson) + '<|im_end|>\\n' }}{% endif %}
{%- for message in messages %}
{{- '<|im_start|>' + message.role + '\\n' }}
{%- if message.role == 'assistant' and message.tool_calls %}
{{- (message.content or '') + '<tool_call>' + message.tool_calls[0].function.name }}
{%- else %}
{{- message.content }}
{%- endif %}
{{- '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}
{%- if style is defined %}{{ '[' + style + ']' }}{% endif %}{% endif %}"""

# The same rendering; the assistant's words and end token are marked.
CHATML_MARKED = """\
{%- for message in messages %}
{{- '<|im_start|>' + message.role + '\\n' }}
{%- if message.role == 'assistant' %}
{%- generation %}
{%- if message.tool_calls %}
{{- (message.content or '') + '<tool_call>' + message.tool_calls[0].function.name }}
{%- else %}{{ message.content }}{% endif %}{{ '<|im_end|>' }}
{%- endgeneration %}{{ '\\n' }}
{%- else %}{{ message.content + '<|im_end|>\\n' }}{% endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"""

# Shows the reasoning of the last turn only, as templates of reasoning models do.
FORGETFUL = """\
{%- for message in messages %}
{{- '<|im_start|>' + message.role + '\\n' }}
{%- if message.role == 'assistant' and loop.last %}{{ '<think>' + message.thought + '</think>' }}
{%- endif %}{{ message.content + '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"""

TEMPLATES = {
    "chatml": CHATML,
    "marked": CHATML_MARKED,
    "forgetful": FORGETFUL,
    "with bos": "{{- bos_token }}" + CHATML,
}

_CORPUS = [
    "What is the sum of 12 and 30? The sum is 42.\n\n",
    "user assistant system tool the answer is\n\n\n\n",
    "<think> Hello world, hello there. </think>\n\n",
] * 4


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def characters() -> PreTrainedTokenizerFast:
    return build_tokenizer()


@pytest.fixture(scope="session")
def make_bpe() -> Callable[..., PreTrainedTokenizerFast]:
    """`make_bpe(template, adds=...)`: a BPE that adds "", "bos" or "bos eos" to a plain text.

    The template is one of `TEMPLATES` by name, or the text of another.
    """
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    special = ["<|bos|>", "<|im_start|>", "<|im_end|>", "<|eot|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=340,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(_CORPUS, trainer)
    trained = bpe.to_str()
    processor = {
        "bos": processors.TemplateProcessing(single="<|bos|> $A", special_tokens=[("<|bos|>", 0)]),
        "bos eos": processors.TemplateProcessing(
            single="<|bos|> $A <|im_end|>", special_tokens=[("<|bos|>", 0), ("<|im_end|>", 2)]
        ),
    }

    def make(
        template: str | None = "chatml", *, adds: str = "", **options: object
    ) -> PreTrainedTokenizerFast:
        backend = Tokenizer.from_str(trained)
        if adds:
            backend.post_processor = processor[adds]
        settings = {"bos_token": "<|bos|>", "eos_token": "<|im_end|>", "pad_token": "<|im_end|>"}
        tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, **{**settings, **options})
        tokenizer.chat_template = TEMPLATES.get(template, template)
        return tokenizer

    return make


@pytest.fixture(scope="session")
def bpe(make_bpe: Callable[..., PreTrainedTokenizerFast]) -> PreTrainedTokenizerFast:
    """The ChatML one, whose pad token is its end token."""
    return make_bpe()
