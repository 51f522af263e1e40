"""The tokenizer: SentencePiece BPE with byte fallback, written as tokenizer.model and .json.

Both files describe the same merges. llama.cpp's converter reads the first, transformers the
second; there is no dummy prefix, so that text after a chat symbol is encoded like text anywhere.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

VOCAB_SIZE = 2048
CHAT_SYMBOLS = ("<|system|>", "<|user|>", "<|assistant|>", "<|end|>")
CHAT_TEMPLATE = (
    "{{ bos_token }}"
    "{% for message in messages %}"
    "{{ '<|' + message['role'] + '|>' + message['content'] | trim + '<|end|>' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)


def train_tokenizer(texts: Iterable[str], folder: Path) -> None:
    """Train on the texts and write every tokenizer file to the folder."""
    import sentencepiece

    folder.mkdir(parents=True, exist_ok=True)
    lines = (line for text in texts for line in text.split("\n") if line)
    model_path = folder / "tokenizer.model"
    with model_path.open("wb") as model_file:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=lines,
            model_writer=model_file,
            model_type="bpe",
            vocab_size=VOCAB_SIZE,
            byte_fallback=True,
            character_coverage=1.0,
            add_dummy_prefix=False,
            remove_extra_whitespaces=False,
            normalization_rule_name="identity",
            split_digits=True,
            allow_whitespace_only_pieces=True,
            user_defined_symbols=list(CHAT_SYMBOLS),
            num_threads=1,  # the order of merges must not depend on the machine
            minloglevel=2,
        )
    _write_json_form(model_path, folder / "tokenizer.json")
    _write_configs(folder)


def _write_json_form(model_path: Path, json_path: Path) -> None:
    """Convert the SentencePiece model to the `tokenizers` format."""
    from sentencepiece import SentencePieceProcessor
    from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, processors

    model = SentencePieceProcessor(model_file=str(model_path))
    pieces = [model.id_to_piece(i) for i in range(model.get_piece_size())]
    vocabulary = {piece: i for i, piece in enumerate(pieces)}
    merges = [
        (piece[:cut], piece[cut:])
        for i, piece in enumerate(pieces)  # ids rise as SentencePiece's scores fall
        if not (model.is_control(i) or model.is_unknown(i) or model.is_byte(i))
        and piece not in CHAT_SYMBOLS
        for cut in range(1, len(piece))
        if piece[:cut] in vocabulary and piece[cut:] in vocabulary
    ]
    tokenizer = Tokenizer(
        models.BPE(vocabulary, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    )
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", model.bos_id())]
    )
    tokenizer.add_special_tokens(
        [AddedToken(t, normalized=False) for t in ("<unk>", "<s>", "</s>", *CHAT_SYMBOLS)]
    )
    tokenizer.save(str(json_path))


def _write_configs(folder: Path) -> None:
    """Write the settings that both old and new transformers read."""
    special = ("<unk>", "<s>", "</s>", *CHAT_SYMBOLS)
    flags = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False}
    config = {
        "tokenizer_class": "LlamaTokenizer",
        "added_tokens_decoder": {
            str(i): {"content": token, **flags, "special": True} for i, token in enumerate(special)
        },
        "additional_special_tokens": list(CHAT_SYMBOLS),
        "bos_token": "<s>",
        "eos_token": "<|end|>",
        "pad_token": "</s>",
        "unk_token": "<unk>",
        "add_bos_token": True,
        "add_eos_token": False,
        "add_prefix_space": False,
        "legacy": False,
        "clean_up_tokenization_spaces": False,
        "model_max_length": 1024,
        "chat_template": CHAT_TEMPLATE,
    }
    special_map = {k: config[k] for k in ("bos_token", "eos_token", "pad_token", "unk_token")}
    special_map["additional_special_tokens"] = list(CHAT_SYMBOLS)
    for name, content in (
        ("tokenizer_config.json", config),
        ("special_tokens_map.json", special_map),
    ):
        text = json.dumps(content, indent=2, ensure_ascii=False)
        (folder / name).write_text(text + "\n", encoding="utf-8")
