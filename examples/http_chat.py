"""A chat with `semkv-deploy serve`, by OpenAI's client: every call sends all messages, the server reads what is new.

Usage: python examples/http_chat.py http://127.0.0.1:8000/v1 "Why is the sky blue?" "And at night?"
"""

import os
import sys

from openai import OpenAI

client = OpenAI(base_url=sys.argv[1], api_key=os.environ.get("SEMKV_API_KEY", "none"))
model = client.models.list().data[0].id
messages = []
for text in sys.argv[2:]:
    messages.append({"role": "user", "content": text})
    reply = ""
    options = {"include_usage": True}
    for chunk in client.chat.completions.create(
        model=model, messages=messages, max_tokens=64, temperature=0, stream=True, stream_options=options
    ):
        if chunk.choices:
            piece = chunk.choices[0].delta.content or ""
            reply += piece
            print(piece, end="", flush=True)
        else:
            usage = chunk.usage
    # As it was given: a reply that is changed is another conversation.
    messages.append({"role": "assistant", "content": reply})
    print(f"\n[{usage.prompt_tokens} tokens, {usage.prompt_tokens_details.cached_tokens} of them in the cache already]")
