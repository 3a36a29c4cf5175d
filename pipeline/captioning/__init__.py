"""From frames to answers: the model, its prompts, its memory, and the row that a unit gets."""
