"""semkv-deploy: build and run decoder LLMs whose KV cache is compressed under a fixed memory budget."""

__version__ = "0.1.0"
