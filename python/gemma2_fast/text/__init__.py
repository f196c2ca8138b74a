"""Text to ids and back, and the chat format."""

from gemma2_fast.text.chat import ChatFormat
from gemma2_fast.text.detokenizer import StreamDetokenizer
from gemma2_fast.text.find import TOKENIZER_FILES, chat_template_from_gguf, find_chat_template, find_tokenizer
from gemma2_fast.text.tokenizer import Tokenizer

__all__ = [
    "TOKENIZER_FILES",
    "ChatFormat",
    "StreamDetokenizer",
    "Tokenizer",
    "chat_template_from_gguf",
    "find_chat_template",
    "find_tokenizer",
]
