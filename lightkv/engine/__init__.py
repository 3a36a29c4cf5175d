"""Many prompts at once: streamed prefill, shared decode steps and quantised KV caches, in bounded memory."""
