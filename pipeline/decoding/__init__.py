"""Decodes video and image files into the frames that the model gets."""
