"""The sentencepiece model in the two other forms it travels in: a tokenizer.json and the metadata of a GGUF file."""

from __future__ import annotations

from pathlib import Path

from sentencepiece import SentencePieceProcessor
from tokenizers import AddedToken, Tokenizer, decoders, normalizers
from tokenizers.models import BPE

DATA = Path(__file__).parent.parent / "data"
MODEL_FILE = DATA / "gemma_1_2_tokenizer.model"

FIRST_BYTE_ID, FIRST_RANKED_ID, LAST_RANKED_ID = 217, 473, 255967
ADDED_IN_JUNE = range(FIRST_BYTE_ID)  # the added tokens of the first published tokenizer.json
ADDED_IN_JULY = [*ADDED_IN_JUNE, *range(LAST_RANKED_ID + 1, 256000)]  # of the second
_SPECIAL = frozenset({"<pad>", "<eos>", "<bos>", "<unk>", "<start_of_turn>", "<end_of_turn>"})


def pieces(processor: SentencePieceProcessor) -> list[str]:
    return processor.id_to_piece(list(range(processor.vocab_size())))


def write_tokenizer_json(processor: SentencePieceProcessor, path: Path) -> None:
    """As the first published file: a merge for every way to cut a piece in two, in the order of the pieces' ranks."""
    texts = pieces(processor)
    texts[FIRST_BYTE_ID + 9] = "\t"  # "<0x09>" in the model
    vocab = {text: token_id for token_id, text in enumerate(texts)}
    merges = []
    for token_id, text in enumerate(texts):
        rank = token_id - FIRST_RANKED_ID if FIRST_RANKED_ID <= token_id <= LAST_RANKED_ID else 0
        for cut in range(1, len(text)):
            left, right = text[:cut], text[cut:]
            if left in vocab and right in vocab:
                merges.append((rank, token_id, vocab[left], vocab[right]))
    merges.sort()
    pairs = [(texts[left_id], texts[right_id]) for _, _, left_id, right_id in merges]
    model = BPE(vocab, pairs, fuse_unk=True, unk_token="<unk>", byte_fallback=True)
    tokenizer = Tokenizer(model)
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    added = [texts[token_id] for token_id in ADDED_IN_JUNE]
    tokenizer.add_tokens([AddedToken(text, normalized=False, special=text in _SPECIAL) for text in added])
    tokenizer.enable_truncation(16)  # a saved limit must not cut anything
    tokenizer.save(str(path), pretty=False)


def gguf_metadata(processor: SentencePieceProcessor, added: list[int] | range) -> dict[str, object]:
    """As llama.cpp's converter writes it: what it does not know as an added token, it takes for a normal piece."""
    tokens, scores, types = pieces(processor), [], []
    for token_id in range(len(tokens)):
        scores.append(processor.get_score(token_id))
        if processor.is_byte(token_id):
            types.append(6)
        elif processor.is_control(token_id):
            types.append(3)
        elif processor.is_unknown(token_id):
            types.append(2)
        else:
            types.append(1)
    for token_id in added:
        text = tokens[token_id]
        special = text in _SPECIAL or text in ("<mask>", "<2mass>", "[@BOS@]") or text.startswith("<unused")
        types[token_id] = 3 if special else 4
        tokens[token_id] = text if special else text.replace("▁", " ")
        scores[token_id] = -1000.0
    return {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.pre": "default",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.scores": scores,
        "tokenizer.ggml.token_type": types,
        "tokenizer.ggml.bos_token_id": 2,
        "tokenizer.ggml.eos_token_id": 107,  # instruction-tuned files name the end of the turn here
        "tokenizer.ggml.add_bos_token": True,
        "tokenizer.ggml.add_space_prefix": False,
    }
