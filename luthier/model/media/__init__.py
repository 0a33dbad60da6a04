"""What a model needs for images, videos and audio: its processor with the limits of a run, positions on several
axes, and each image computed once."""
