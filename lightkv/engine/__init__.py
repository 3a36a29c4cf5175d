"""The engine: many prompts at once, with streaming prefill, batched decoding and quantised KV caches."""
