"""From frames to rows: the model, its prompts, its memory, and the captioner that makes a unit's row."""
