"""What the specifications of images say: documents, media types, names, platforms."""
