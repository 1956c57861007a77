"""Loading the base: where from, what is drawn, what is refused."""

from __future__ import annotations

import io
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file
from tokenizers import processors
from torch import nn

from fedpeft.config.sections import ModelSection, PeftSection
from fedpeft.errors import ModelError
from fedpeft.models.attach import attach
from fedpeft.models.base_model import (
    head_modules,
    load_base,
    load_tokenizer,
    model_path,
    new_modules,
    skeleton_of,
)
from fedpeft.models.comparison import draw_token_rows, read_logits
from fedpeft.models.export import export_adapter, load_adapter
from fedpeft.models.offsite import whole_model
from fedpeft.models.trainable import digest_frozen, trainable_parameters
from tests.models.tiny import LABELS, VOCABULARY, batch, logits, saved, tiny_base, tiny_tokenizer


def section(folder: Path, **more: str) -> ModelSection:
    return ModelSection.model_validate({"path": str(folder), **more})


def test_a_saved_language_model_comes_back_frozen_and_quietly(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = saved("llama", tmp_path)
    capsys.readouterr()  # saving draws a progress bar
    base = load_base(section(folder))
    assert not base.training
    assert not trainable_parameters(base)
    assert torch.equal(logits(base, "llama"), logits(tiny_base("llama"), "llama"))
    assert capsys.readouterr() == ("", "")


def test_bfloat16_weights_are_the_rounded_weights(tmp_path: Path) -> None:
    base = load_base(section(saved("llama", tmp_path), dtype="bfloat16"))
    exact = dict(tiny_base("llama").named_parameters())
    assert all(torch.equal(p, exact[name].bfloat16()) for name, p in base.named_parameters())


def test_a_new_head_depends_on_the_seed_alone(tmp_path: Path) -> None:
    where = section(saved("llama", tmp_path), task="sequence-classification")
    before = torch.get_rng_state()
    first = load_base(where, num_labels=LABELS, seed=7)
    assert torch.equal(before, torch.get_rng_state())
    torch.rand(5)
    assert digest_frozen(load_base(where, num_labels=LABELS, seed=7)) == digest_frozen(first)
    assert digest_frozen(load_base(where, num_labels=LABELS, seed=8)) != digest_frozen(first)
    assert new_modules(first) == head_modules(first) == ("score",)


def test_a_head_of_another_size_is_drawn_anew(tmp_path: Path) -> None:
    where = section(saved("bert", tmp_path), task="sequence-classification")
    assert new_modules(load_base(where, num_labels=LABELS)) == ()
    assert new_modules(load_base(where, num_labels=LABELS + 2)) == ("classifier",)


def test_a_missing_pooler_counts_as_new(tmp_path: Path) -> None:
    model = tiny_base("bert")
    encoder = model.get_submodule("bert")
    encoder.pooler = None  # type: ignore[assignment]  # as saved without a pooling layer
    encoder.save_pretrained(saved("bert", tmp_path))  # type: ignore[operator]  # transformers is untyped
    base = load_base(section(tmp_path, task="sequence-classification"), num_labels=LABELS)
    assert head_modules(base) == ("bert.pooler.dense", "classifier")


def test_a_classifier_reads_the_last_real_token(tmp_path: Path) -> None:
    where = section(saved("llama", tmp_path), task="sequence-classification")
    base, pad = load_base(where, num_labels=LABELS), load_tokenizer(where).pad_token_id
    ids = batch("llama")["input_ids"].clamp(min=2)
    padded = torch.cat([ids, torch.full((len(ids), 5), pad)], dim=1)
    with torch.no_grad():
        bare, long = base(input_ids=ids).logits, base(input_ids=padded).logits
    assert torch.allclose(bare, long, atol=1e-6)


def test_a_tokenizer_without_padding_pads_with_its_end_token(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(section(saved("llama", tmp_path)))
    assert tokenizer.pad_token == "</s>"
    assert tokenizer(["w4 w5", "w6"], padding=True)["input_ids"] == [[4, 5], [6, 1]]


@pytest.mark.parametrize(
    ("path", "said"),
    [
        ("/no/such/folder", "is not a folder"),
        ("./here", "is not a folder"),
        ("no-such/model", "could not be fetched"),
    ],
)
def test_a_missing_model_is_one_line(path: str, said: str) -> None:
    with pytest.raises(ModelError, match=said) as caught:
        load_base(ModelSection(path=path))
    assert "\n" not in str(caught.value)
    assert path in str(caught.value)


@pytest.mark.parametrize("damage", ["no config", "bad config", "no weights", "short weights", "unknown type"])
def test_a_damaged_folder_is_one_line(tmp_path: Path, damage: str) -> None:
    folder = saved("llama", tmp_path)
    config, weights = folder / "config.json", folder / "model.safetensors"
    if damage == "no config":
        config.unlink()
    elif damage == "bad config":
        config.write_text("{", encoding="utf-8")
    elif damage == "no weights":
        weights.unlink()
    elif damage == "short weights":
        weights.write_bytes(weights.read_bytes()[:1000])
    else:
        config.write_text(json.dumps({**json.loads(config.read_text()), "model_type": "no-such"}))
    with pytest.raises(ModelError, match="no causal-lm model can be loaded") as caught:
        load_base(section(folder))
    assert "\n" not in str(caught.value)


def test_a_model_of_another_task_is_refused(tmp_path: Path) -> None:
    saved("llama-classifier", tmp_path)
    renamed = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**renamed, "tie_word_embeddings": False}))
    with pytest.raises(ModelError, match="lacks weights that a causal-lm model needs"):
        load_base(section(tmp_path))


@pytest.mark.parametrize(("task", "labels"), [("causal-lm", 3), ("sequence-classification", None)])
def test_labels_belong_to_classifiers(tmp_path: Path, task: str, labels: int | None) -> None:
    with pytest.raises(ModelError, match="num_labels"):
        load_base(section(tmp_path, task=task), num_labels=labels)


READERS: dict[str, Callable[[ModelSection], object]] = {
    "model": load_base,
    "tokenizer": load_tokenizer,
    "skeleton": skeleton_of,
    "whole model": lambda where: whole_model(where.path, where.task),
}


@pytest.mark.parametrize("reader", sorted(READERS))
def test_code_in_a_model_folder_is_never_run_even_for_who_says_yes(
    tmp_path: Path, reader: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = saved("llama", tmp_path)
    for file, names in (
        ("config.json", ("AutoConfig", "AutoModelForCausalLM")),
        ("tokenizer_config.json", ("AutoTokenizer",)),
    ):
        table = json.loads((folder / file).read_text()) if (folder / file).exists() else {}
        code: dict[str, Any] = {name: f"evil.{name}" for name in names}
        table |= {"auto_map": code | {"AutoTokenizer": ["evil.A", "evil.B"]}}
        table["model_type" if file == "config.json" else "tokenizer_class"] = "Homemade"
        (folder / file).write_text(json.dumps(table))
    (folder / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    monkeypatch.setattr("sys.stdin", io.StringIO("y\n" * 20))  # as `yes y |` would answer
    with pytest.raises(ModelError):
        READERS[reader](section(folder))
    assert not (tmp_path / "ran").exists()
    assert "evil" not in sys.modules


def test_weights_in_a_pickle_are_not_read(tmp_path: Path) -> None:
    folder = saved("llama", tmp_path)
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    for load in (load_base, READERS["whole model"]):
        with pytest.raises(ModelError, match=r"no (causal-lm )?model can be loaded"):
            load(section(folder))


def test_the_embedded_model_is_a_folder_of_the_package() -> None:
    folder = Path(model_path(ModelSection()))
    assert (folder / "config.json").is_file()


def test_a_real_folder_without_a_padding_token(shared_dir: Path) -> None:
    where = section(shared_dir / "models" / "stories260K")
    base: nn.Module = load_base(where)
    assert load_tokenizer(where).pad_token_id is not None
    assert sum(p.numel() for p in base.parameters()) == 260_032


CLASSIFIERS: dict[str, tuple[Callable[[], Any], tuple[str, ...]]] = {
    "bart": (
        lambda: transformers.BartModel(
            transformers.BartConfig(
                vocab_size=VOCABULARY,
                d_model=16,
                max_position_embeddings=64,
                encoder_layers=1,
                decoder_layers=1,
                encoder_attention_heads=2,
                decoder_attention_heads=2,
                encoder_ffn_dim=16,
                decoder_ffn_dim=16,
                bos_token_id=2,
                eos_token_id=1,
                pad_token_id=0,
                decoder_start_token_id=1,
                forced_eos_token_id=1,
            )
        ),
        ("classification_head",),
    ),
    "t5": (
        lambda: transformers.T5ForConditionalGeneration(
            transformers.T5Config(
                vocab_size=VOCABULARY,
                d_model=16,
                d_kv=8,
                d_ff=16,
                num_layers=1,
                num_heads=2,
                decoder_start_token_id=0,
                pad_token_id=0,
                eos_token_id=1,
            )
        ),
        ("classification_head",),
    ),
    "xlnet": (
        lambda: transformers.XLNetModel(
            transformers.XLNetConfig(
                vocab_size=VOCABULARY,
                d_model=16,
                n_layer=1,
                n_head=2,
                d_inner=16,
                pad_token_id=0,
                eos_token_id=1,
            )
        ),
        ("logits_proj", "sequence_summary"),
    ),
    "modernbert": (
        lambda: transformers.ModernBertModel(
            transformers.ModernBertConfig(
                vocab_size=VOCABULARY,
                hidden_size=16,
                intermediate_size=16,
                num_hidden_layers=1,
                num_attention_heads=2,
                pad_token_id=0,
                eos_token_id=1,
                bos_token_id=2,
                cls_token_id=3,
                sep_token_id=4,
            )
        ),
        ("classifier", "head"),
    ),
}


@pytest.mark.parametrize("kind", CLASSIFIERS)
def test_a_classifier_of_any_architecture_gets_a_new_head_that_trains(kind: str, tmp_path: Path) -> None:
    build, heads = CLASSIFIERS[kind]
    build().save_pretrained(tmp_path / "base")
    tiny_tokenizer().save_pretrained(tmp_path / "base")
    where = section(tmp_path / "base", task="sequence-classification")
    base = load_base(where, num_labels=LABELS, seed=7)
    assert head_modules(base) == heads

    model = attach(base, PeftSection(method="lora"), task=where.task, seed=0)
    trained = trainable_parameters(model)
    assert all(any(f".{head}." in name for name in trained) for head in heads)
    rows = draw_token_rows(model)
    assert read_logits(model, rows).shape == (len(rows), LABELS)
    export_adapter(model, tmp_path / "adapter", base_name="base")
    again = load_adapter(load_base(where, num_labels=LABELS, seed=7), tmp_path / "adapter")
    assert torch.equal(read_logits(again, rows), read_logits(model, rows))


@pytest.mark.parametrize(("is_decoder", "seed"), [(False, 0), (False, 1), (False, 2), (True, 0)])
def test_an_encoder_is_no_language_model(is_decoder: bool, seed: int, tmp_path: Path) -> None:
    config = transformers.BertConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        is_decoder=is_decoder,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        transformers.BertLMHeadModel(config).save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    if is_decoder:
        assert not load_base(section(tmp_path)).training
    else:
        with pytest.raises(ModelError, match=r"is no decoder: its logits see later tokens.*sequence-classif"):
            load_base(section(tmp_path))


def test_a_token_without_an_embedding_is_refused(tmp_path: Path) -> None:
    where = section(saved("llama", tmp_path))
    tokenizer = load_tokenizer(where)
    load_base(where, tokenizer=tokenizer)
    tokenizer.add_tokens(["<new>"])
    with pytest.raises(ModelError, match=rf"1 tokens beyond the {VOCABULARY} rows .*'<new>', {VOCABULARY}\)"):
        load_base(where, tokenizer=tokenizer)


@pytest.mark.parametrize("kind", ["Mamba", "Mamba2", "FalconMamba"])
def test_lora_without_targets_works_on_state_space_models(kind: str, tmp_path: Path) -> None:
    more = {"num_heads": 4, "head_dim": 8, "n_groups": 1, "chunk_size": 8} if kind == "Mamba2" else {}
    config = getattr(transformers, f"{kind}Config")(
        vocab_size=VOCABULARY,
        hidden_size=16,
        num_hidden_layers=1,
        state_size=4,
        bos_token_id=2,
        eos_token_id=1,
        pad_token_id=0,
        **more,
    )
    getattr(transformers, f"{kind}ForCausalLM")(config).save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    model = attach(load_base(section(tmp_path)), PeftSection(method="lora"), task="causal-lm", seed=0)
    wrapped = {name.split(".lora_")[0].rpartition(".")[2] for name in trainable_parameters(model)}
    assert "in_proj" in wrapped
    assert not wrapped & {"out_proj", "dt_proj"}


def test_a_method_that_cannot_compute_on_an_architecture_is_refused(tmp_path: Path) -> None:
    CLASSIFIERS["bart"][0]().save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    base = load_base(section(tmp_path, task="sequence-classification"), num_labels=LABELS)
    with pytest.raises(ModelError, match="'prompt' cannot compute on this model"):
        attach(base, PeftSection(method="prompt"), task="sequence-classification", seed=0)


def test_a_classifier_that_reads_off_the_end_token_needs_one(tmp_path: Path) -> None:
    CLASSIFIERS["bart"][0]().save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    where = section(tmp_path, task="sequence-classification")
    with pytest.raises(ModelError, match="a bart classifies by the one end token of each row"):
        load_base(where, num_labels=LABELS, tokenizer=load_tokenizer(where))

    ended = tiny_tokenizer()
    ended.pad_token = "<unk>"
    ended.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="$A </s>", pair="$A </s> $B </s>", special_tokens=[("</s>", 1)]
    )
    ended.save_pretrained(tmp_path)
    load_base(where, num_labels=LABELS, tokenizer=load_tokenizer(where))
