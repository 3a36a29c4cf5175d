"""What a vision token is and where it lies in the prompt, for every model family."""
