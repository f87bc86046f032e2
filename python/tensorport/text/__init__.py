"""Text around any model: a checkpoint's tokenizer, streams of text, chat templates, and gpt-oss's harmony format.

>>> from tensorport.text import HarmonyParser, TextStream, Tokenizer, reply
>>> tokenizer = Tokenizer.from_directory("gpt-oss-20b/")
>>> prompt = tokenizer.encode(tokenizer.chat_prompt([{"role": "user", "content": "What is 2 + 2?"}]))
>>> parser = HarmonyParser(tokenizer)
>>> for delta in parser.push(ids) + parser.finish():    # as the ids come: analysis, commentary, final
...     print(delta.text, end="")
>>> reply(parser.messages).text
'2 + 2 = 4.'

Nothing here imports JAX. What needs the extra `text` (tokenizers, jinja2) imports it when it is first used.
"""

from tensorport.text.harmony import (
    ChatReply,
    HarmonyDelta,
    HarmonyMessage,
    HarmonyParser,
    ToolCall,
    reply,
    stop_token_ids,
)
from tensorport.text.stream import TextStream
from tensorport.text.template import render
from tensorport.text.tokenizer import Tokenizer

__all__ = [
    "ChatReply",
    "HarmonyDelta",
    "HarmonyMessage",
    "HarmonyParser",
    "TextStream",
    "Tokenizer",
    "ToolCall",
    "render",
    "reply",
    "stop_token_ids",
]
