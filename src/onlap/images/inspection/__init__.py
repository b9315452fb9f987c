"""What is in an image: its history, its files by layer, how two differ."""
