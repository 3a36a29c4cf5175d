"""From a video or image file to the frames that a model gets."""
