"""The limit that is read off a model's tables is where the model itself begins to fail."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers

from fedpeft.config.sections import PeftSection
from fedpeft.models.positions import usable_positions, virtual_tokens

SMALL = {"vocab_size": 48, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1}
BERT_LIKE = SMALL | {"num_attention_heads": 2, "max_position_embeddings": 20}


def gpt2() -> Any:
    config = transformers.GPT2Config(
        vocab_size=48, bos_token_id=1, eos_token_id=2, n_positions=20, n_embd=16, n_layer=1, n_head=2
    )
    return transformers.GPT2LMHeadModel(config)


def gptj() -> Any:
    config = transformers.GPTJConfig(
        vocab_size=48,
        bos_token_id=1,
        eos_token_id=2,
        n_positions=20,
        n_embd=16,
        n_layer=1,
        n_head=2,
        rotary_dim=4,
    )
    return transformers.GPTJForCausalLM(config)


def ctrl() -> Any:
    config = transformers.CTRLConfig(
        vocab_size=48, bos_token_id=1, eos_token_id=2, n_positions=20, n_embd=16, n_layer=1, n_head=2, dff=16
    )
    return transformers.CTRLLMHeadModel(config)


def opt() -> Any:
    config = transformers.OPTConfig(
        vocab_size=48,
        hidden_size=16,
        ffn_dim=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=20,
        word_embed_proj_dim=16,
    )
    return transformers.OPTForCausalLM(config)


def bert() -> Any:
    return transformers.BertForSequenceClassification(transformers.BertConfig(**BERT_LIKE))


def roberta() -> Any:
    return transformers.RobertaForSequenceClassification(
        transformers.RobertaConfig(**BERT_LIKE, pad_token_id=1)
    )


def nystromformer() -> Any:
    config = transformers.NystromformerConfig(**BERT_LIKE, segment_means_seq_len=20, num_landmarks=20)
    return transformers.NystromformerForSequenceClassification(config)


def bart() -> Any:
    config = transformers.BartConfig(
        vocab_size=48,
        d_model=16,
        max_position_embeddings=20,
        encoder_layers=1,
        decoder_layers=1,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        encoder_ffn_dim=16,
        decoder_ffn_dim=16,
    )
    return transformers.BartForSequenceClassification(config)


def llama() -> Any:
    config = transformers.LlamaConfig(**SMALL, num_attention_heads=2, max_position_embeddings=20)
    return transformers.LlamaForCausalLM(config)


def bloom() -> Any:
    return transformers.BloomForCausalLM(
        transformers.BloomConfig(vocab_size=48, hidden_size=16, n_layer=1, n_head=2)
    )


def t5() -> Any:
    config = transformers.T5Config(
        vocab_size=48, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2, decoder_start_token_id=0
    )
    return transformers.T5ForSequenceClassification(config)


def takes(model: Any, length: int) -> bool:
    """Whether a row of so many tokens goes through."""
    ids = torch.full((1, length), 5)
    ids[0, -1] = int(getattr(model.config, "eos_token_id", None) or 2)
    try:
        with torch.no_grad():
            model.eval()(input_ids=ids, attention_mask=torch.ones_like(ids))
    except (IndexError, RuntimeError, ValueError):
        return False
    return True


@pytest.mark.parametrize(
    "build", [gpt2, gptj, ctrl, opt, bert, roberta, bart], ids=lambda build: build.__name__
)
def test_a_row_of_so_many_tokens_goes_through_and_a_longer_one_does_not(
    build: Callable[[], Any],
) -> None:
    model = build()
    limit = usable_positions(model)

    assert limit is not None
    assert takes(model, limit)
    assert not takes(model, limit + 1)


def test_positions_that_start_behind_two_rows_are_counted_by_their_ids() -> None:
    assert usable_positions(nystromformer()) == 20


@pytest.mark.parametrize("build", [llama, bloom, t5], ids=lambda build: build.__name__)
def test_rotary_and_relative_positions_set_no_limit(build: Callable[[], Any]) -> None:
    model = build()

    assert usable_positions(model) is None
    assert takes(model, 40)


def test_the_meta_device_will_do() -> None:
    with torch.device("meta"):
        assert usable_positions(opt()) == 20
        assert usable_positions(roberta()) == 18


def test_prompts_and_prefixes_take_positions_too() -> None:
    assert virtual_tokens(PeftSection.model_validate({"method": "prefix"})) == 16
    assert virtual_tokens(PeftSection.model_validate({"method": "prompt", "num_virtual_tokens": 3})) == 3
    assert virtual_tokens(PeftSection.model_validate({"method": "lora"})) == 0
