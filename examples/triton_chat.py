"""A chat with a model that `semkv-deploy triton` wrote, over Triton's HTTP: the session keeps what was said.

Usage: python examples/triton_chat.py http://127.0.0.1:8000/v2/models/chat "Why is the sky blue?" "And at night?"
"""

import json
import sys
import uuid

import httpx

url, texts, session = sys.argv[1], sys.argv[2:], uuid.uuid4().hex
for number, text in enumerate(texts):
    turn = {
        "text_input": text,
        "session_id": session,
        "start_session": number == 0,
        "end_session": number == len(texts) - 1,
        "max_tokens": 64,
    }
    with httpx.stream("POST", f"{url}/generate_stream", json=turn, timeout=60) as answer:
        for line in answer.iter_lines():
            if line.startswith("data: "):
                response = json.loads(line.removeprefix("data: "))
                if "error" in response:
                    sys.exit(response["error"])
                print(response["text_output"], end="", flush=True)
    seen, cached = response["prompt_tokens"], response["cached_tokens"]
    print(f"\n[{seen} tokens, {cached} of them in the cache already]")
